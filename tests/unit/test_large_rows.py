"""S12: a row has a size that it may take; whatever a file unfolds to, no more than a piece of it is held."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import subprocess
import sys
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.chat import Example
from fsdp_qlora.data.csv_rows import csv_rows
from fsdp_qlora.data.encode import _call, encode
from fsdp_qlora.data.json_rows import json_lines, json_rows
from fsdp_qlora.data.lines import MAX_ROW, text_lines
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.data.sources import read_source
from fsdp_qlora.data.tokens import Counts, Fit, fit_row
from fsdp_qlora.data.windows import tokenize_in_windows
from fsdp_qlora.errors import DataError
from tests import tokenizers
from tests.tiers import some_in_full
from tests.tiny import sentence

LONG = "is longer than the limit of 64 MiB per row"


def _read(rows):
    """Return place and content of rows, or what is wrong with them."""
    return [(row.where, row.problem if row.values is None else dict(row.values)) for row in rows]


@pytest.mark.parametrize("end", [b"", b"\n", b"\nnext", b"\r\nnext\n"])
@pytest.mark.parametrize("length", [49, 50, 51, 200])
def test_lines_above_the_limit_are_passed_over_and_the_next_one_is_found(end, length):
    data = b"first\n" + b"x" * length + end
    found = _read(text_lines("f", io.BytesIO(data), limit=50))
    too_long = length + len(end) - len(b"next" if b"next" in end else b"") - end.count(b"\n", 4) > 50
    assert found[0] == ("f, line 1", {"line": "first"})
    assert found[1] == ("f, line 2", LONG if too_long else {"line": "x" * length})
    assert found[2:] == ([("f, line 3", {"line": "next"})] if b"next" in end else [])


def test_lines_of_json_above_the_limit():
    lines = [json.dumps({"text": "a"}), json.dumps({"text": "b" * 100}), json.dumps({"text": "c"})]
    found = _read(json_lines("f", io.BytesIO("\n".join(lines).encode()), limit=50))
    assert found == [("f, line 1", {"text": "a"}), ("f, line 2", LONG), ("f, line 3", {"text": "c"})]


@pytest.mark.parametrize(("text", "found"), [
    ("a,b\n1,2\n" + "x" * 200 + ",3\n4,5\n", [{"a": "1", "b": "2"}, ("line 3", LONG), {"a": "4", "b": "5"}]),
    ('a,b\n"' + "x\n" * 200 + '",3\n4,5\n', [("line 2", LONG), {"a": "4", "b": "5"}]),
    ('a,b\n"' + 'say ""x""\n' * 50 + '",3\n4,5\n', [("line 2", LONG), {"a": "4", "b": "5"}]),
    ('a,b\n1,2\n"never closed' + "\n3,4" * 200, [{"a": "1", "b": "2"}, ("line 3", LONG)]),
    ("a,b\n" + "\n" * 500 + "1,2\n", [{"a": "1", "b": "2"}]),
    ("a,b\n" + "\n" * 500 + "1\n", [("line 502", "does not have the 2 columns of the first line")]),
    ("a,b\n" + "x" * 200, [("line 2", LONG)]),
    ("a,b\n" + "x" * 200 + "\r1,2\r\n3\n", [("line 2", LONG), {"a": "1", "b": "2"}, ("line 4", "does not have the 2")]),
])  # fmt: skip
def test_csv_rows_above_the_limit(text, found):
    rows = list(csv_rows("f.csv", io.BytesIO(text.encode()), limit=100))
    assert len(rows) == len(found)
    for row, expected in zip(rows, found, strict=True):
        if isinstance(expected, dict):
            assert row.values == expected
        else:
            assert row.where == f"f.csv, {expected[0]}" and row.problem.startswith(expected[1])


def _json(text, limit=100):
    return _read(json_rows("f", lambda: contextlib.closing(io.BytesIO(text.encode())), limit))


def test_json_arrays_are_read_in_pieces():
    blanks = " \n" * 2_000_000
    rows = [{"text": f"{n} é漢 " + "x" * (n % 60)} for n in range(200)]
    assert _json(json.dumps(rows)) == [(f"f, row {n}", row) for n, row in enumerate(rows, start=1)]
    spread = f"{blanks}[{blanks}" + f"{blanks},{blanks}".join(map(json.dumps, rows[:3])) + f"{blanks}]{blanks}"
    assert [found for _, found in _json(spread)] == rows[:3]
    numbers = _json(f"[{blanks}12{blanks},3]")
    assert [found for _, found in numbers] == ["expected an object {...}, got int"] * 2


def test_rows_of_a_json_array_above_the_limit():
    with pytest.raises(DataError, match=f"f, row 2 {LONG}, so no later row can be read"):
        _json(json.dumps([{"text": "a"}, {"text": "b" * 5_000_000}, {"text": "c"}]))
    with pytest.raises(DataError, match=rf"f, row 2 .* at character {2_000_000 + 19}"):
        _json('[{"text": "a"},' + " " * 2_000_000 + "{} oops]")


def test_json_that_is_no_array_has_the_limit_too():
    assert _json(json.dumps({"text": "a", "b": [1]}, indent=2)) == [("f, row 1", {"text": "a", "b": [1]})]
    lines = "\n".join(json.dumps({"text": text}) for text in ("a", "b" * 200, "c"))
    assert _json(lines) == [("f, line 1", {"text": "a"}), ("f, line 2", LONG), ("f, line 3", {"text": "c"})]
    assert _json(" " * 500) == [("f, line 1", LONG)]


def _limited(gibibytes, code, *arguments, timeout=300):
    """Run Python that may take so much address space."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({int(gibibytes * 2**30)},) * 2)\n"
    return subprocess.run(
        [sys.executable, "-c", limit + code, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False
    )  # fmt: skip


_READS = """
import sys
from fsdp_qlora.data.sources import read_source
from fsdp_qlora.errors import DataError
try:
    for row in read_source(sys.argv[1]):
        try:
            said = row.problem if row.values is None else len(row.values["text"])
        except DataError as error:
            said = error
        print(row.where.rpartition(", ")[2], said)
except DataError as error:
    print(error)
"""
BEFORE, AFTER = json.dumps({"text": "a"}).encode(), json.dumps({"text": "bb"}).encode()
MEBIBYTES = 1300


def _compressed(file, parts):
    settings = {".xz": {"preset": 0}}.get(file.suffix, {"compresslevel": 1})
    with {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[file.suffix](file, "wb", **settings) as stream:
        for part, times in parts:
            for _ in range(times):
                stream.write(part)


BLANKS = b" " * 2**20
FILES = {
    "one line.jsonl.gz": [(BEFORE + b'\n{"text": "', 1), (BLANKS, MEBIBYTES), (b'"}\n' + AFTER + b"\n", 1)],
    "a cell.csv.gz": [(b"text,b\na,1\n", 1), (b"x" * 2**20, MEBIBYTES), (b",1\nbb,2\n", 1)],
    "an open quote.csv.gz": [
        (b'text,b\na,1\n"', 1),
        (b"x\n" * 2**19, 8),
        (b"x" * 2**20 + b"\n", MEBIBYTES),
        (b'",1\nbb,2\n', 1),
    ],
    "blanks.json.gz": [(b"[" + BEFORE, 1), (BLANKS, MEBIBYTES), (b"," + AFTER + b"]", 1)],
    "blanks before.json.gz": [(BLANKS, MEBIBYTES), (b"[" + BEFORE + b"," + AFTER + b"]", 1)],
    "a string.json.gz": [(b"[" + BEFORE + b', {"text": "', 1), (BLANKS, MEBIBYTES), (b'"}]', 1)],
}


@pytest.mark.full
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_megabytes_that_unfolds_to_gigabytes(tmp_path, name):
    """S12: read in a process that may take 1.2 GiB in all."""
    _compressed(tmp_path / name, FILES[name])
    assert (tmp_path / name).stat().st_size < 20_000_000
    done = _limited(1.2, _READS, tmp_path / name)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    if name.startswith("blanks"):
        assert lines == ["row 1 1", "row 2 2"]
    elif name == "a string.json.gz":
        assert lines[0] == "row 1 1" and "so no later row can be read" in lines[1] and len(lines) == 2
    else:
        assert [line.partition(" ")[2].partition(" ")[2] for line in lines] == ["1", LONG, "2"]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_long_line_is_a_bad_row_in_every_compression(tmp_path, suffix):
    file = tmp_path / f"rows.jsonl.{suffix}"
    _compressed(file, [(BEFORE + b"\n", 1), (b" " * 2**20, 65), (b"\n" + AFTER, 1)])
    assert [row.problem for row in read_source(str(file))] == ["", LONG, ""]


def _arrow(path, columns, compression=None, file_format=False):
    batch = pa.record_batch(columns)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("file_format", [False, True])
def test_a_batch_that_decompresses_to_too_much_is_refused_by_its_header(tmp_path, compression, file_format):
    """S12: a buffer that says it is 20 GB. Nothing is made room for."""
    file = tmp_path / "rows.arrow"
    _arrow(file, {"text": pa.array(["fox " * 1000] * 10)}, compression, file_format)
    assert len(list(read_source(str(file)))) == 10
    content = file.read_bytes()
    size = (40_000).to_bytes(8, "little")
    at = content.rindex(size)  # before the last buffer; lz4 may also store the offsets as they are
    file.write_bytes(content[:at] + (20 * 2**30).to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(DataError, match=r"rows\.arrow: record batch 1 takes 20\.0 GiB in memory, .* smaller batches"):
        list(read_source(str(file)))


@pytest.mark.parametrize("file_format", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_honest_arrow_files_are_read(tmp_path, compression, file_format):
    rows = [{"text": f"row {n}", "n": n, "tags": ["a", None], "more": {"b": n}, "no": None} for n in range(3000)]
    table = pa.Table.from_pylist(rows)
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    columns["kind"] = pa.array(["x", "y", None] * 1000).dictionary_encode()
    columns["view"] = pa.array(["short", None, "longer than twelve"] * 1000, pa.string_view())
    columns["map"] = pa.array([[("k", 1)], None, []] * 1000, pa.map_(pa.string(), pa.int8()))
    columns["seen"] = pa.array([[1], None, [2, 3]] * 1000, pa.list_view(pa.int8()))
    _arrow(tmp_path / "rows.arrow", columns, compression, file_format)
    found = [dict(row.values or {}) for row in read_source(str(tmp_path / "rows.arrow"))]
    assert [row["text"] for row in found] == [f"row {n}" for n in range(3000)]
    assert (found[2]["kind"], found[2]["view"], found[0]["map"], found[2]["seen"]) == (
        None, "longer than twelve", {"k": 1}, [2, 3]
    )  # fmt: skip


def _dictionary(size, count):
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["x" * size]))


def _tables(tmp_path, columns):
    _arrow(tmp_path / "rows.arrow", columns, "zstd")
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet", compression="zstd", store_schema=False)
    return [tmp_path / "rows.arrow", tmp_path / "rows.parquet"]


@pytest.mark.full
def test_a_cell_that_is_too_long_is_a_bad_row_where_it_is_read(tmp_path):
    good = pa.array(["fox"] * 3)
    for file in _tables(tmp_path, {"text": good, "scan": _dictionary(MAX_ROW + 1, 3)}):
        assert [(row.values or {})["text"] for row in read_source(str(file))] == ["fox"] * 3
        for row in read_source(str(file)):
            with pytest.raises(DataError, match=f"the column 'scan' {LONG}"):
                (row.values or {})["scan"]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["a dictionary", "lists of nulls", "a column of nulls"])
def test_a_table_of_kilobytes_that_unfolds_to_gigabytes(tmp_path, kind):
    """S12: read in a process that may take 3 GiB in all; the rows take 4 GB and more together."""
    if kind == "a dictionary":
        files, said = _tables(tmp_path, {"text": _dictionary(20 * 2**20, 200)}), [str(20 * 2**20)] * 200
    elif kind == "lists of nulls":
        lists = pa.ListArray.from_arrays(pa.array([0, 10**9, 2 * 10**9], pa.int32()), pa.nulls(2 * 10**9))
        files, said = [tmp_path / "rows.arrow"], [f"the column 'text' {LONG}"] * 2
        _arrow(files[0], {"text": lists})
    else:
        files, said = [tmp_path / "rows.arrow"], None
        _arrow(files[0], {"text": pa.nulls(10**9)})
    for file in files:
        assert file.stat().st_size < 1_000_000
        code = _READS if said else _READS.replace('len(row.values["text"])', "sys.exit(row.values['text'] is not None)")
        done = _limited(3, code, file)
        assert done.returncode == 0, done.stderr[-2000:]
        assert said is None or [line.split(" ", 2)[2] for line in done.stdout.splitlines()] == said


TEXTS = {
    "sentences": " ".join(sentence(n, 12) for n in range(200)),
    "code": tokenizers.CODE * 200,
    "one word": "".join(sentence(n, 9) for n in range(200)).replace(" ", ""),
    "no spaces": "漢字かな交じり文。" * 1200,
    "one letter": "a" * 12_000,
    "a repetition of three": "fox" * 4000,
    "spaces": "fox" + " " * 10_000 + "dog" + "\n" * 5000 + "end",
    "ligatures and marks": "ﬁne café ① ﬀ ½ " * 900,
    "outside the plane": "a👩‍👩‍👧‍👦🇳🇴é " * 900,
    "markers": "<|im_start|>user\nfox<|im_end|>\n" * 400,
    "numbers": " ".join(str(n**3) for n in range(1500)),
}


def _tokens(tokenizer, plain, text):
    return _call([text], tokenizer, plain)[0]


@pytest.mark.parametrize("kind", some_in_full(tokenizers.KINDS, ("bytes",)))
def test_windows_give_the_tokens_of_the_whole_text(kind):
    """S12: for each kind of tokenizer, also where no word ends for longer than a window."""
    tokenizer = tokenizers.make(kind)
    for name, text in TEXTS.items():
        for plain in (True, False):
            tokenize = partial(_tokens, tokenizer, plain)
            whole = tokenize(text)
            for window, overlap in ((4096, 512), (5001, 333), (9000, 2048)):
                found = tokenize_in_windows(text, tokenize, window, overlap)
                assert found.ids.tolist() == whole.ids.tolist(), name
                assert found.offsets.tolist() == whole.offsets.tolist()
                assert found.added.tolist() == whole.added.tolist()


@pytest.mark.full
def test_windows_of_the_real_tokenizer_on_the_real_text(real_data, real_model):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    text = (real_data / "wiki_demo.txt").read_text(encoding="utf-8")[: 2**20]
    whole = _tokens(tokenizer, True, text)
    for window, overlap in ((2**14, 2**10), (2**18, 2**13)):
        found = tokenize_in_windows(text, partial(_tokens, tokenizer, True), window, overlap)
        assert len(text) > window and found.ids.tolist() == whole.ids.tolist()
        assert found.offsets.tolist() == whole.offsets.tolist()


def test_a_text_without_a_place_to_cut_it_is_a_bad_row():
    """A word that is not known is one token, however long it is: no window knows where it ends."""
    core = Tokenizer(models.WordLevel({"fox": 0, "?": 1}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="?")
    text = "fox " * 500 + "x" * 9000 + " fox" * 500
    with pytest.raises(DataError, match="the text of 13000 characters is too long to tokenize at once"):
        tokenize_in_windows(text, partial(_tokens, tokenizer, False), 4096, 512)


LONG_TEXT = " ".join(f"{n} {sentence(n, 12)}" for n in range(17_000))
"""More than is tokenized at once."""


@pytest.mark.full
@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_long_row_keeps_the_tokens_of_the_uncut_text(kind):
    """S12: for each truncation, of a text, a prompt with its answer, and a chat."""
    tokenizer = tokenizers.make(kind)
    assert len(LONG_TEXT) > 2**20
    middle = len(LONG_TEXT) // 2
    examples = [
        Example(completion=LONG_TEXT),
        Example(prompt=LONG_TEXT[:middle], completion=LONG_TEXT[middle:]),
        Example(messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": LONG_TEXT}]),
    ]
    for example in examples:
        with _uncut():
            whole = encode(example, tokenizer)
        found = encode(example, tokenizer)
        for truncation in ("right", "left", "drop", "split"):
            fit, counts = Fit(64, truncation, "assistant"), (Counts(), Counts())
            kept = [list(fit_row(row, fit, count)) for row, count in zip((whole, found), counts, strict=True)]
            assert counts[0] == counts[1] and len(kept[0]) == len(kept[1]) == counts[0].kept
            for one, other in zip(*kept, strict=True):
                assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


@contextlib.contextmanager
def _uncut():
    """Tokenize texts of any length at once, as before."""
    from fsdp_qlora.data import encode as module

    before, module._TOGETHER = module._TOGETHER, 2**40
    try:
        yield
    finally:
        module._TOGETHER = before


_PREPARES = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.prepare import prepare_data
data = prepare_data(DataSettings(train=sys.argv[1], max_length=64), 0, AutoTokenizer.from_pretrained(sys.argv[2]), Path(sys.argv[3]))
print(data.train_counts.kept, data.train_counts.truncated, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.full
def test_an_honest_row_of_30_megabytes_takes_no_gigabytes(tmp_path, tiny_model, cli_env):
    """S12: it took 5 GB, whatever was kept of it."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": " ".join(sentence(n, 12) for n in range(500_000))}) + "\n")
    assert file.stat().st_size > 30_000_000
    command = [sys.executable, "-c", _PREPARES, str(file), str(tiny_model), str(tmp_path / "cache")]
    done = subprocess.run(command, env=cli_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, truncated, megabytes = map(int, done.stdout.split())
    assert (kept, truncated) == (1, 1) and megabytes < 1700


@pytest.mark.full
def test_bad_rows_without_end_are_counted_and_the_first_ones_listed(tmp_path, tiny_model):
    """S12: a compressed file of kilobytes with as many bad rows as it likes."""
    file = tmp_path / "rows.jsonl.gz"
    _compressed(file, [(BEFORE + b"\n", 1), (b"0\n" * 10_000, 11)])
    settings = DataSettings(train=str(file), max_length=64, on_bad_row="skip")
    data = prepare_data(settings, 0, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "cache")
    assert (data.train_counts.kept, data.num_bad) == (1, 110_000) and data.bad_rows is not None
    assert data.bad_rows.read_bytes().count(b"\n") == 100_000


def test_a_message_that_quotes_a_row_is_cut(tmp_path, tiny_model):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "x" * 1_000_000, "content": "a"}]}))
    with pytest.raises(DataError, match="line 1: unknown role") as refused:
        prepare_data(DataSettings(train=str(file)), 0, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "cache")
    assert len(str(refused.value)) < 3000
