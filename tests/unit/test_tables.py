"""Parquet and Arrow give the rows that were put in, and fail for one cell of one row at most."""

from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.encode import encode
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.data.sources import read_source, streamed_rows
from fsdp_qlora.data.tables import without_nulls
from fsdp_qlora.data.tokens import reader
from fsdp_qlora.errors import DataError

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    loaded = AutoTokenizer.from_pretrained(tiny_model)
    loaded.chat_template = TEMPLATE
    return loaded


def _row(name, arguments, encoded=False):
    properties = {key: {"type": "string"} for key in arguments}
    call = {"id": "c", "function": {"name": name, "arguments": json.dumps(arguments) if encoded else arguments}}
    return {
        "messages": [
            {"role": "user", "content": "call"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
    }


CALLS = [
    ("weather", {"city": "Oslo"}),
    ("add", {"a": 1, "b": {"c": [1, 2]}}),
    ("now", {"zone": "é漢"}),
    ("nothing", {}),
]
ROWS = [_row(*call) for call in CALLS]


def _parquet(rows, folder):
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def _arrow(rows, folder):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def _datasets_parquet(rows, folder):
    """Write what `datasets` makes of JSONL: objects without a common type are stored as JSON."""
    _jsonl(rows, folder)
    loaded = Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"))
    loaded.to_parquet(str(folder / "mixed.parquet"))
    return folder / "mixed.parquet"


def _saved(rows, folder):
    Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def _jsonl(rows, folder):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def _columns_of_json(rows, folder):
    return _parquet([{key: json.dumps(value) for key, value in row.items()} for row in rows], folder)


def _tools_of_json(rows, folder):
    return _parquet([{**row, "tools": [json.dumps(tool) for tool in row["tools"]]} for row in rows], folder)


def _tokens(source, tokenizer):
    read = reader("auto", {}, None)
    return [tuple(part.tolist() for part in encode(read(row), tokenizer)) for row in read_source(str(source))]


@pytest.mark.parametrize("write", [_parquet, _arrow, _datasets_parquet, _saved, _columns_of_json, _tools_of_json])
@pytest.mark.parametrize("encoded", [False, True])
def test_every_container_gives_the_tokens_of_jsonl(tmp_path, tokenizer, write, encoded):
    expected = _tokens(_jsonl(ROWS, tmp_path), tokenizer)
    rows = [_row(*call, encoded=True) for call in CALLS] if encoded else ROWS[:3]  # no struct type is without fields
    assert _tokens(write(rows, tmp_path), tokenizer) == expected[: len(rows)]
    text = tokenizer.decode(expected[0][0])
    assert '<call>weather {"city": "Oslo"}</call>' in text and '"properties": {"city": {"type": "string"}}' in text


@pytest.mark.parametrize("stored", ["json", "structs", "structs without features"])
def test_a_stream_of_datasets_gives_the_tokens_of_jsonl(tmp_path, tokenizer, stored):
    rows = ROWS[:3] if stored != "json" else [*ROWS, _row("explicit", {"unit": None})]
    file = _jsonl(rows, tmp_path)
    if stored == "json":
        stream = Dataset.from_json(str(file), cache_dir=str(tmp_path / "cache")).to_iterable_dataset()
    else:
        stream = Dataset.from_list(rows).to_iterable_dataset()
    if stored == "structs without features":
        stream = stream.map(lambda row: row)
        assert stream.features is None
    read = reader("auto", {}, None)
    found = [
        tuple(part.tolist() for part in encode(read(row), tokenizer)) for row in streamed_rows(stream, "owner/name")
    ]
    assert found == _tokens(file, tokenizer)


def test_rows_of_several_formats_in_one_table(tmp_path, tokenizer):
    """A table gives each row the columns of all others, as nulls: they do not decide what the row is."""
    rows = [{"text": "plain"}, {"prompt": "a", "completion": "b"}, {"instruction": "c", "output": "d"}]
    columns = sorted({column for row in rows for column in row})
    table = _parquet([{column: row.get(column) for column in columns} for row in rows], tmp_path)
    assert _tokens(table, tokenizer) == _tokens(_jsonl(rows, tmp_path), tokenizer)


def test_nulls_are_left_out_and_maps_become_objects(tmp_path):
    inner = pa.struct([("x", pa.int64()), ("y", pa.int64())])
    kind = pa.struct([("a", pa.int64()), ("m", pa.map_(pa.string(), inner)), ("l", pa.large_list(inner))])
    value = {"a": None, "m": [("k", {"x": 1, "y": None}), ("l", None)], "l": [{"x": None, "y": 2}, None]}
    columns = {
        "deep": pa.array([value, None], kind),
        "json": pa.array([['{"a": null, "b": 1}'], None]).cast(pa.list_(pa.json_())),
        "flat": pa.array([[1, None], None], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    one, other = (row.values for row in read_source(str(tmp_path / "rows.parquet")))
    assert one == {
        "deep": {"m": {"k": {"x": 1}}, "l": [{"y": 2}, None]},
        "json": [{"a": None, "b": 1}],  # as it was written
        "flat": [1, None],
    }
    assert other == {"deep": None, "json": None, "flat": None}
    assert without_nulls([{"a": None, "b": [1, None, {"c": None}]}]) == [{"b": [1, None, {}]}]


def _bad_table(folder):
    """Write columns that Python cannot hold or decode, in the second of three rows."""
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    far = pa.array([0, 2**62, 0], pa.timestamp("ms"))
    return {"completion": pa.array(["x", "y", "z"]), "prompt": not_utf8, "when": far}, folder / "bad.parquet"


def test_a_cell_that_cannot_be_read_is_a_bad_row(tmp_path, tokenizer):
    columns, file = _bad_table(tmp_path)
    pq.write_table(pa.table({key: columns[key] for key in ("prompt", "completion")}), file)
    settings = {"train": str(file), "max_length": 64}
    with pytest.raises(DataError, match=r"bad\.parquet, row 2: the column 'prompt' cannot be read: UnicodeDecodeError"):
        prepare_data(DataSettings(**settings), 0, tokenizer, tmp_path / "cache")
    data = prepare_data(DataSettings(**settings, on_bad_row="skip"), 0, tokenizer, tmp_path / "cache")
    assert data.train_counts.kept == 2


def test_a_column_that_nobody_asks_for_is_not_converted(tmp_path, tokenizer):
    columns, file = _bad_table(tmp_path)
    pq.write_table(pa.table({"prompt": pa.array(["a", "b", "c"]), "completion": columns["completion"]} | {
        "when": columns["when"], "other": columns["prompt"],
    }), file)  # fmt: skip
    with pytest.raises((OverflowError, ValueError, UnicodeDecodeError)):
        pq.read_table(file).to_pylist()
    assert len(_tokens(file, tokenizer)) == 3
    asked = {"train": str(file), "max_length": 64, "columns": {"prompt": "other"}}
    with pytest.raises(DataError, match="row 2: the column 'other' cannot be read"):
        prepare_data(DataSettings(**asked), 0, tokenizer, tmp_path / "cache")


def test_a_table_with_unknown_columns_names_them(tmp_path):
    file = _parquet([{"question": "a", "reply": "b", "day": datetime.date(2020, 1, 1)}], tmp_path)
    (row,) = read_source(str(file))
    with pytest.raises(DataError, match="the columns day, question, reply are none of"):
        reader("auto", {}, None)(row)
