"""What makes one vector of a text's hidden states, as sentence-transformers name it, and the files that tell it so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig

from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.read import own_file, read_json

POOLING_FILE = "1_Pooling/config.json"
_KEYS = {
    "cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens", "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}  # fmt: skip
_OURS = ("mean", "cls", "lasttoken")


def pooling_of(folder: Path, config: PreTrainedConfig) -> str:
    """Return the pooling that a model's folder asks for, else the mean of an encoder, the last token of a decoder.

    Raises:
        ModelError: if it asks for one that is not computed here.
    """
    file = own_file(folder, POOLING_FILE)
    if not file.is_file():
        decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
        return "lasttoken" if decoder else "mean"
    stored: dict[str, Any] = read_json(file, dict)
    given = stored.get("pooling_mode")
    modes = [given] if isinstance(given, str) else given or [mode for mode, key in _KEYS.items() if stored.get(key)]
    if len(modes) != 1 or modes[0] not in _OURS:
        raise ModelError(
            f"objective.pooling: {file} asks for {' + '.join(map(str, modes)) or 'none'}, which is not computed here; "
            f"set it to one of {', '.join(_OURS)}."
        )
    return modes[0]


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return one vector for each text, float32 ``[texts, hidden]``, of length 1.

    Args:
        hidden: the last hidden states ``[texts, length, hidden]``, padded on the right.
        mask: int64 ``[texts, length]``, 1 where there is a token.
        pooling: ``mean`` over a text's tokens, its first (``cls``) or its last (``lasttoken``).
    """
    hidden = hidden.float()
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * weights).sum(1) / weights.sum(1)
    elif pooling == "cls":
        vectors = hidden[:, 0]
    else:
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return torch.nn.functional.normalize(vectors, dim=-1)


def sentence_transformers_files(pooling: str, width: int, max_length: int) -> dict[str, Any]:
    """Return the files by which sentence-transformers loads an adapter's folder: name -> JSON."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    return {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        POOLING_FILE: {"word_embedding_dimension": width} | {key: mode == pooling for mode, key in _KEYS.items()},
    }
