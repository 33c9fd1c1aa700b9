"""Writes the twin's files: a small model of the run's class, saved by upstream on rank 0 and copied to every rank."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fsdp_qlora.checks import reference
from fsdp_qlora.checks.settings import LENGTHS
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import from_main, gather_json
from fsdp_qlora.errors import ModelError, typed_line
from fsdp_qlora.model.construct import kept_in_float32
from fsdp_qlora.model.cut import cut_config, shallow_config
from fsdp_qlora.model.families import decoder_layers
from fsdp_qlora.objectives import Objective

LARGEST = 250_000_000
"""Maximum parameters to compare in real layers, if a class cannot be built small: 1 GB per copy in float32."""


@dataclass(frozen=True)
class SmallModel:
    """Facts about a twin's files."""

    unusable_positions: int | None
    """See `reference.unusable_positions`."""
    layers_of: str | None
    """`config_digest` of the model if the twin has the model's real layers, else None."""
    float32: bool = False
    """Whether the class keeps some parameters in float32 when all others are bf16."""


def config_digest(config: PreTrainedConfig) -> str:
    """Return a digest of a model's whole config."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:40]


def write_small(
    folder: Path, config: PreTrainedConfig, max_length: int, code: Path | None, ranks: Ranks, objective: Objective
) -> SmallModel:  # fmt: skip
    """Write a small model into every rank's ``folder``. Every rank calls it.

    If the class cannot be built small, its real layers are taken, one of each kind, with few experts and tokens.

    Args:
        folder: an empty folder of this rank's own.
        config: the model's config.
        max_length: longest row of the run.
        code: folder with the model's own trusted code, if it has any.
        ranks: the ranks of the run.
        objective: what the model is for, which says of which class it is.

    Raises:
        ModelError: identically on every rank, if neither can be built, or upstream's own code does not run on it.
    """
    problem, written = "", SmallModel(None, None)
    if ranks.is_main:
        try:
            written = _written(folder, config, max_length, code, objective)
        except Exception as error:  # upstream's constructors and forwards raise anything
            problem = typed_line(error) if not isinstance(error, ModelError) else str(error)
    files = [] if problem else sorted(file for file in folder.iterdir() if file.is_file())
    names = [file.name for file in files]
    problem, names, fields = gather_json([problem, names, asdict(written)], ranks)[0]
    if problem:
        raise ModelError(
            "model.check: this model cannot be compared with its upstream code, because no small version of it can be "
            f"built ({problem}). model.check=off trains it unchecked."
        )
    for name in names:
        received = from_main((folder / name).read_bytes() if ranks.is_main else b"", ranks)
        if not ranks.is_main:
            (folder / name).write_bytes(received)
    return SmallModel(**fields)


def _written(
    folder: Path, config: PreTrainedConfig, max_length: int, code: Path | None, objective: Objective
) -> SmallModel:
    kind = objective.auto_class

    def cut(config: PreTrainedConfig, max_length: int, num_layers: int) -> PreTrainedConfig:
        return objective.shrink(cut_config(config, max_length, num_layers))

    try:
        return _write(folder, with_every_kind(cut, config, max_length, code, kind), code, objective)
    except Exception as error:  # upstream's constructors and forwards raise anything
        try:
            shallow = with_every_kind(shallow_config, config, max_length, code, kind)
            count = sum(parameter.numel() for parameter in on_meta(shallow, code, kind).parameters())
        except Exception:  # the first error says more
            raise error from None
        if count > LARGEST:
            raise ModelError(
                f"{typed_line(error)}; at full size, one layer of each kind has {count / 1e6:,.0f} million parameters "
                f"in total, and the limit is {LARGEST / 1e6:,.0f}"
            ) from error
        return replace(_write(folder, shallow, code, objective), layers_of=config_digest(config))


def with_every_kind(
    cut: Callable[[PreTrainedConfig, int, int], PreTrainedConfig], config: PreTrainedConfig, max_length: int,
    code: Path | None, auto: str | None = None,
) -> PreTrainedConfig:  # fmt: skip
    """Return a small config whose model has a layer of each kind in the whole model, going by their modules.

    Raises:
        ValueError: if a kind is missing: ``cut`` relies on names of settings, which remote code may spell differently.
    """
    kinds = [kind_of(layer) for layer in decoder_layers(on_meta(config, code, auto))]
    last = max((kinds.index(kind) for kind in kinds), default=0)
    lost: list[int] = []
    for num_layers in (0, last + 1):
        small = cut(config, max_length, num_layers)
        here = {kind_of(layer) for layer in decoder_layers(on_meta(small, code, auto))}
        lost = [number for number, kind in enumerate(kinds) if kind not in here]
        if not lost:
            return small
    raise ValueError(f"a small model has no layer like layer {lost[0]}")


def kind_of(layer: nn.Module) -> frozenset[tuple[str, str]]:
    """Return a layer's kind: the names (without digits) and classes of its modules."""
    return frozenset((re.sub(r"[0-9]+", "", name), type(module).__name__) for name, module in layer.named_modules())


def on_meta(config: PreTrainedConfig, code: Path | None, auto: str | None = None) -> PreTrainedModel:
    """Return upstream's model of ``config`` on the meta device, to inspect its modules and shapes."""
    with torch.device("meta"), no_init_weights():
        return reference.auto_class(auto).from_config(config, trust_remote_code=code is not None)


def _write(folder: Path, config: PreTrainedConfig, code: Path | None, objective: Objective) -> SmallModel:
    model = reference.write_model(folder, config, code, objective.auto_class)
    if objective.of_tokens:
        inputs = {"input_ids": torch.zeros(1, LENGTHS[0], dtype=torch.long), "use_cache": False}
    else:
        inputs = objective.probe(model.config, torch.Generator().manual_seed(0))[0]
    with torch.no_grad():
        outputs = model(**inputs)
    if not bool(torch.isfinite(outputs[0]).all()):
        raise ValueError("upstream's own code returns values that are not finite")
    unusable = reference.unusable_positions(model) if objective.of_tokens else None
    return SmallModel(unusable, None, bool(kept_in_float32(model)))
