"""Sizes that meet are compared before training: token ids and the embedding's rows, rows and the model's positions."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fsdp_qlora.checks.reference import unusable_positions, write_model
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.limits import require_rows_fit, tokens_known
from fsdp_qlora.data.loader import TokenRows
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.data.tokens import Counts
from fsdp_qlora.errors import DataError
from tests import tiny
from tests.matrix import small_config


def _data(*rows: list[int]) -> PreparedData:
    columns = {"input_ids": rows, "learned": [[True] * len(row) for row in rows], "source": [0] * len(rows)}
    return PreparedData(None, Dataset.from_dict(columns), None, Counts(), Counts(), "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_tokens_beyond_the_embedding_are_named(tokenizer):
    size = len(tokenizer)
    settings = DataSettings(max_length=8)
    require_rows_fit(_data([1, size - 1]), settings, tokenizer, size, None)
    require_rows_fit(_data([1, size - 2]), settings, tokenizer, size - 1, None)  # it has more, and no row has it
    with pytest.raises(DataError, match=rf"token {size - 1} .*embedding has only {size - 1} rows"):
        require_rows_fit(_data([1], [2, size - 1, 3]), settings, tokenizer, size - 1, None)


def test_tokens_of_a_stream_are_compared_as_they_come(tokenizer):
    size = len(tokenizer)
    rows = TokenRows(_data([1, 2], [3, size - 1]).train)
    assert tokens_known(tokenizer, size)(rows) is rows
    with pytest.raises(DataError, match="Tokenizer and model do not match"):
        tokens_known(tokenizer, size - 1)(rows)


def test_rows_longer_than_the_positions_are_refused_where_there_are_any(tokenizer):
    size, rows = len(tokenizer), _data([1] * 9, [2])
    require_rows_fit(rows, DataSettings(max_length=2048), tokenizer, size, None)
    require_rows_fit(rows, DataSettings(max_length=2048), tokenizer, size, 9)
    require_rows_fit(rows, DataSettings(max_length=2048, packing=True), tokenizer, size, 9)  # positions restart
    for settings in (DataSettings(max_length=10), DataSettings(max_length=2048, packing=True)):
        with pytest.raises(DataError, match=r"Set data\.max_length=8 or less"):
            require_rows_fit(rows, settings, tokenizer, size, 8)


@pytest.mark.parametrize(
    ("model_type", "unusable"),
    [("gpt2", 0), ("roberta", 2), ("opt", 0), ("gptj", 0), ("llama", None), ("mamba2", None), ("bloom", None)],
)
def test_how_many_positions_rows_can_have_is_tried(tmp_path: Path, model_type: str, unusable: int | None):
    assert unusable_positions(write_model(tmp_path, small_config(model_type))) == unusable
