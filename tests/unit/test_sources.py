"""Every kind of file gives its rows; every kind of bad row has one stated behaviour, and none goes unseen."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.mix import apportion, draw, mixture_counts
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.data.sources import expand, read_source
from fsdp_qlora.errors import DataError

ROWS = [{"prompt": "a", "completion": f"b{n}"} for n in range(3)]
LINES = "".join(json.dumps(r) + "\n" for r in ROWS)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def _prepare(file, tokenizer, tmp_path, **settings):
    settings = {"train": file if isinstance(file, list) else str(file), "max_length": 512} | settings
    return prepare_data(DataSettings(**settings), 0, tokenizer, tmp_path / "cache")


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def _table(kind: str, path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        pq.write_table(table, path)
        return
    maker = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, maker(sink, table.schema) as writer:
        writer.write_table(table)


FILES = {
    "rows.jsonl": lambda p: p.write_text(LINES),
    "rows.ndjson": lambda p: p.write_text("﻿" + LINES),  # a byte order mark, as Windows writes it
    "lines.json": lambda p: p.write_text(LINES),
    "array.json": lambda p: p.write_text(json.dumps(ROWS)),
    "rows.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES.encode())),
    "rows.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(LINES.encode())),
    "rows.jsonl.xz": lambda p: p.write_bytes(lzma.compress(LINES.encode())),
    "rows.jsonl.zst": lambda p: p.write_bytes(_zstd(LINES.encode())),
    "rows.csv": lambda p: p.write_text("prompt,completion\n" + "".join(f'a,"b{n}"\n' for n in range(3))),
    "rows.tsv": lambda p: p.write_text("prompt\tcompletion\n" + "".join(f"a\tb{n}\n" for n in range(3))),
    "rows.parquet": lambda p: _table("parquet", p),
    "stream.arrow": lambda p: _table("stream", p),
    "file.arrow": lambda p: _table("file", p),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path, name):
    FILES[name](tmp_path / name)
    rows = list(read_source(str(tmp_path / name)))
    assert [r.values for r in rows] == ROWS
    assert all(name in r.where for r in rows)


def test_folders_globs_urls_and_text(tmp_path):
    for part in ("b", "a"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / f"{part}.txt").write_text(f"{part} one\n\n{part} two\n")
    (tmp_path / "sub" / "notes.doc").write_text("no data")
    expected = [{"text": f"{p} {w}"} for p in "ab" for w in ("one", "two")]
    assert [r.values for r in read_source(str(tmp_path / "sub"))] == expected
    assert [r.values for r in read_source(str(tmp_path / "**/*.txt"))] == expected
    assert [r.values for r in read_source(f"file://{tmp_path}/sub/a.txt")] == expected[:2]
    with pytest.raises(DataError, match="no file matches"):
        expand(str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match="unknown file type"):
        expand(str(tmp_path / "sub" / "notes.doc"))


GOOD = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "fox"}]})
BAD = {
    "broken JSON": (b'{"messages": [', "not valid JSON"),
    "not an object": (b"[1, 2]", "expected an object"),
    "wrong type": (b'{"messages": "hello"}', "does not match data.format"),
    "number for text": (b'{"messages": [{"role": "user", "content": 3}]}', "expected text, got int"),
    "unknown role": (b'{"messages": [{"role": "wizard", "content": "x"}]}', "unknown role 'wizard'"),
    "empty answer": (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}', "empty"),
    "invalid UTF-8": (b'{"messages": "\xff"}', "not valid UTF-8"),
    "NUL byte": (b'{"messages": "\x00"}', "NUL"),
    "escaped NUL": (rb'{"messages": [{"role": "user", "content": "a\u0000b"}]}', "NUL"),
    "duplicated key": (b'{"messages": [], "messages": []}', "the key 'messages' appears twice"),
    "unknown columns": (b'{"question": "a"}', "none of"),
    "bad tools": (b'{"messages": [{"role": "user", "content": "q"}], "tools": "[oops"}', "'tools' is not valid JSON"),
    "deep nesting": (b"[" * 100_000, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_or_passed_over_and_listed(tmp_path, tokenizer, kind):
    line, words = BAD[kind]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode() + b"\n")
    with pytest.raises(DataError) as refusal:
        _prepare(file, tokenizer, tmp_path)
    assert f"{file}, line 3" in str(refusal.value) and words in str(refusal.value)
    assert "data.on_bad_row=skip" in str(refusal.value)
    data = _prepare(file, tokenizer, tmp_path, on_bad_row="skip")
    assert data.train_counts.kept == 2 and data.train_counts.duplicates == 1
    assert data.bad_rows is not None
    (bad,) = map(json.loads, data.bad_rows.read_text().splitlines())
    assert bad["where"].endswith("line 3") and words in bad["problem"]


def test_what_is_no_bad_row(tmp_path, tokenizer):
    """Only a system turn: nothing to learn, counted. Very long: cut, counted. Mixed shapes: each read by its columns."""
    file = tmp_path / "rows.jsonl"
    system = json.dumps({"messages": [{"role": "system", "content": "be kind"}]})
    long = json.dumps({"prompt": "q", "completion": "fox " * 250_000})
    file.write_text(
        "\n".join([GOOD, system, long, json.dumps({"text": "plain words"}), '{"instruction": "a", "output": "b"}'])
    )
    data = _prepare(file, tokenizer, tmp_path)
    counts = data.train_counts
    assert (counts.rows, counts.kept, counts.dropped_unsupervised, counts.truncated) == (5, 4, 1, 1)
    assert data.bad_rows is None and max(len(r["input_ids"]) for r in data.train) == 512


def test_csv_rows_with_missing_cells(tmp_path, tokenizer):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\na,b\nc\n")
    with pytest.raises(DataError, match="line 3: does not have the 2 columns"):
        _prepare(file, tokenizer, tmp_path)


def test_other_names_own_code_and_own_template(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"q": "ask", "a": "fox"}) + "\n")
    data = _prepare(file, tokenizer, tmp_path, columns={"prompt": "q", "completion": "a"})
    assert tokenizer.decode(data.train[0]["input_ids"]) == "askfox<|im_end|>"
    with pytest.raises(DataError, match="line 1: the row has no 'x'"):
        _prepare(file, tokenizer, tmp_path, columns={"prompt": "x"})
    own = {"row_function": "tests.unit.test_sources:as_text", "allow_code": True}
    assert tokenizer.decode(_prepare(file, tokenizer, tmp_path, **own).train[0]["input_ids"]) == "ask: fox<|im_end|>"
    with pytest.raises(DataError, match="allow_code=true"):
        _prepare(file, tokenizer, tmp_path, row_function="tests.unit.test_sources:as_text")


def as_text(row: dict) -> dict:
    """Somebody's own function."""
    return {"text": f"{row['q']}: {row['a']}"}


@pytest.mark.parametrize(("train_on", "learned"), [
    ("assistant", "one<|im_end|>two<|im_end|>"), ("last", "two<|im_end|>"),
])  # fmt: skip
def test_what_is_learned(tmp_path, tokenizer, train_on, learned):
    turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    row = _prepare(file, tokenizer, tmp_path, train_on=train_on).train[0]
    assert tokenizer.decode([i for i, m in zip(row["input_ids"], row["learned"], strict=True) if m]) == learned
    assert all(_prepare(file, tokenizer, tmp_path, train_on="all").train[0]["learned"])


def test_mixtures_are_exact_and_the_same_every_time(tmp_path, tokenizer):
    files = []
    for number, size in enumerate((10, 5, 40)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{number} {n}"}) + "\n" for n in range(size)))
        files.append(str(file))

    def sizes(**settings) -> list[int]:
        settings["eval_fraction"] = 0
        data = _prepare(files, tokenizer, tmp_path, **settings)
        again = _prepare(files, tokenizer, tmp_path / "again", **settings)
        assert data.train["input_ids"][:] == again.train["input_ids"][:]
        found = np.bincount(np.array(data.train["source"]), minlength=3)
        for source in range(3):  # each row as often as any other of its source, or once more
            rows = [tuple(r["input_ids"]) for r in data.train if r["source"] == source]
            times = [rows.count(r) for r in set(rows)]
            assert not times or max(times) - min(times) <= 1 or found[source] < (10, 5, 40)[source]
        return found.tolist()

    assert sizes() == [10, 5, 40]
    assert sizes(weights=[1, 1, 2]) == [14, 14, 27]
    assert sizes(counts=[3, 12, 0]) == [3, 12, 0]
    assert sum(sizes(temperature=1e9)) == 55 and max(sizes(temperature=1e9)) - min(sizes(temperature=1e9)) <= 1
    with pytest.raises(DataError, match="2 numbers for 3 sources"):
        _prepare(files, tokenizer, tmp_path, weights=[1, 1])


def test_apportion_adds_up():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
    assert mixture_counts([3, 0], None, 0, None) is None
    with pytest.raises(DataError, match="source 2 has no sequence"):
        mixture_counts([3, 0], [1, 1], 0, None)
    assert sorted(draw(np.array([0, 0, 1]), [1, 3], 0).tolist())[-3:] == [2, 2, 2]
