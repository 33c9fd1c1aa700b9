"""The files of the twin: a small model of the run's class, written by upstream on rank 0, copied to every rank."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fsdp_qlora.checks import reference
from fsdp_qlora.checks.settings import LENGTHS
from fsdp_qlora.dist.mesh import Ranks
from fsdp_qlora.dist.reduce import from_main, gather_json
from fsdp_qlora.errors import ModelError, typed_line
from fsdp_qlora.model.cut import cut_config, shallow_config

LARGEST = 500_000_000
"""Most parameters of real layers that are compared where a class cannot be made small: 2 GB a copy in float32."""


@dataclass(frozen=True)
class SmallModel:
    """What is known of a twin's files."""

    unusable_positions: int | None
    """See `reference.unusable_positions`."""
    layers_of: str | None
    """`config_digest` of the model, where the twin has layers as large as the model's own."""


def config_digest(config: PreTrainedConfig) -> str:
    """Return a digest of all of a model's config."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:40]


def write_small(
    folder: Path, config: PreTrainedConfig, max_length: int, code: Path | None, ranks: Ranks
) -> SmallModel:  # fmt: skip
    """Write a small model into every rank's ``folder``. Every rank calls it.

    Where the class cannot be made small its real layers are taken, one of each kind, with few experts and tokens.

    Args:
        folder: empty, this rank's own.
        config: the model's.
        max_length: longest row of the run.
        code: folder with the model's own code, where it brings some that is trusted.
        ranks: the run's.

    Raises:
        ModelError: on every rank alike, if neither can be made, or upstream's own code does not run on it.
    """
    problem, written = "", SmallModel(None, None)
    if ranks.is_main:
        try:
            written = _written(folder, config, max_length, code)
        except Exception as error:  # upstream's constructors and forwards raise anything
            problem = typed_line(error) if not isinstance(error, ModelError) else str(error)
    files = [] if problem else sorted(file for file in folder.iterdir() if file.is_file())
    names = [file.name for file in files]
    problem, names, unusable, layers_of = gather_json(
        [problem, names, written.unusable_positions, written.layers_of], ranks
    )[0]
    if problem:
        raise ModelError(
            f"model.check: this model cannot be compared with its own upstream code, for it cannot be made small "
            f"({problem}). model.check=off trains it unchecked."
        )
    for name in names:
        received = from_main((folder / name).read_bytes() if ranks.is_main else b"", ranks)
        if not ranks.is_main:
            (folder / name).write_bytes(received)
    return SmallModel(unusable, layers_of)


def _written(folder: Path, config: PreTrainedConfig, max_length: int, code: Path | None) -> SmallModel:
    try:
        return SmallModel(_write(folder, cut_config(config, max_length), code), None)
    except Exception as error:  # upstream's constructors and forwards raise anything
        try:
            shallow = shallow_config(config)
            count = _num_parameters(shallow, code)
        except Exception:  # the first error says more
            raise error from None
        if count > LARGEST:
            raise ModelError(
                f"{typed_line(error)}; its real layers, one of each kind, have {count / 1e6:,.0f} million parameters, "
                f"and {LARGEST / 1e6:,.0f} are compared at most"
            ) from error
        return SmallModel(_write(folder, shallow, code), config_digest(config))


def _num_parameters(config: PreTrainedConfig, code: Path | None) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=code is not None)
    return sum(parameter.numel() for parameter in model.parameters())


def _write(folder: Path, config: PreTrainedConfig, code: Path | None) -> int | None:
    """Write a model of ``config``; return its `unusable_positions`."""
    model = reference.write_model(folder, config, code)
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, LENGTHS[0], dtype=torch.long), use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("upstream's own code gives values that are not finite")
    return reference.unusable_positions(model)
