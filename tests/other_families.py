"""Encoder-decoders, encoders and speech models of transformers: a small model of each class, ours beside upstream's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from fsdp_qlora.checks import reference
from fsdp_qlora.data.labels import ROWS, TOKENS
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import typed_line
from fsdp_qlora.model.cut import cut_config
from tests import one_batch
from tests.objectives import labelled, source_and_target, without_positions
from tests.speech import write_recordings, write_whisper
from tests.tiny import make_tokenizer, sentence

SEQ2SEQ = tuple(
    dict.fromkeys([*MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES])
)
MASKED = tuple(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
CLASSIFIERS = tuple(name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if name in MASKED)
AUTO = {
    "seq2seq": "AutoModelForSeq2SeqLM", "masked_lm": "AutoModelForMaskedLM", "sequence_classification": "AutoModel",
}  # fmt: skip
"""Objective -> what a base is written as: classifiers draw their heads."""
SETTINGS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"}, "bigbird_pegasus": {"attention_type": "original_full"},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
"""What a family's default config lacks for rows as short as these."""
_VOCAB = 400
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}


def write_each(folder: Path, objective: str, model_types: Iterable[str]) -> dict[str, str]:
    """Write a small model of each type into a folder of its own, and rows; return why there is none of some."""
    row: Any = (
        source_and_target if objective == "seq2seq" else lambda n: {"text": sentence(n, 9 + n % 5), "label": n % 3}
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(8)))
    lacking = {}
    for model_type in model_types:
        own = folder / model_type
        if model_type == "whisper":
            write_whisper(own)
            write_recordings(folder / "heard", 8)
            continue
        own.mkdir()
        try:
            config = _small(model_type)
            config.save_pretrained(own)  # what is refused by its config alone needs no model
            _write_tokenizer(own, objective)
            reference.write_model(own, config, None, AUTO[objective])
        except Exception as error:  # upstream's classes raise anything
            lacking[model_type] = typed_line(error)
    return lacking


def _small(model_type: str) -> PreTrainedConfig:
    """Return a config of the type with small sizes, none of them random, and our tokenizer's vocabulary."""
    config = cut_config(CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {})))
    values = config.to_dict()
    _settle(values)
    return type(config).from_dict(values | _IDS)


def _settle(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _settle(value)
        elif str(key).endswith("vocab_size"):
            values[key] = _VOCAB
        elif isinstance(value, float) and ("dropout" in str(key) or "layerdrop" in str(key)):
            values[key] = 0.0


def _write_tokenizer(folder: Path, objective: str) -> None:
    make_tokenizer(folder)
    if objective == "masked_lm":
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.mask_token = "<|endoftext|>"
        tokenizer.save_pretrained(folder)


def verdicts(ranks: Ranks, folder: str, objective: str, model_types: list[str]) -> dict[str, str]:
    """Return for each type what `one_batch.outcome` says, or the traceback's last line."""
    said = {}
    for model_type in model_types:
        rows = Path(folder, "heard/rows.jsonl" if model_type == "whisper" else "rows.jsonl")
        settings: dict[str, Any] = {
            "objective": {"name": objective} | ({"generate_rows": 0} if objective == "seq2seq" else {}),
            "data": {"train": str(rows), "eval_fraction": 0.0},
            "model": {"check": "auto"},
            "quant": {"allow_16bit": True},
        }
        try:
            how = (labelled, ROWS) if objective == "sequence_classification" else (without_positions, TOKENS)
            said[model_type] = one_batch.outcome(ranks, Path(folder, model_type), settings, *how)
        except Exception as error:
            said[model_type] = f"TRACEBACK {typed_line(error)}"
    return said
