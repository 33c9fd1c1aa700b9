"""Settings that belong to one verb each: `plan`, `evaluate`, `generate`, `export` (a part of `schema.RunConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fsdp_qlora.config.facts import NOT_NEGATIVE, POSITIVE, SHARE, VERBATIM


@dataclass(frozen=True)
class PlanSettings:
    """The `plan` verb."""

    json: bool = False
    """Print JSON instead of a table."""
    world_size: Annotated[int, NOT_NEGATIVE] = 0
    """Ranks to plan for; 0 = as many as `train` would start."""
    gpu: str | None = None
    """Memory of one device (``24GiB``): answers whether the plan fits."""
    device: str | None = None
    """Name of a device (``rtx4090``, ``h100``; a wrong one lists all): its memory where ``gpu`` is not given, and the
    time of a step."""
    interconnect: str | None = None
    """Name of an interconnect (``pcie4_no_p2p``, ``nvlink4``; a wrong one lists all) or a rate (``12GB/s``); null takes
    the device's usual one."""
    simulate: bool = False
    """Also run one step of the real code on tensors without memory, and count what it would allocate."""
    search: bool = False
    """Search the largest micro-batch x sequence length and the cheapest checkpointing and offload that fit."""


@dataclass(frozen=True)
class EvaluateSettings:
    """The `evaluate` verb."""

    json: Annotated[str | None, VERBATIM] = None
    """File for ``{eval_loss, eval_perplexity, target_tokens}``."""


@dataclass(frozen=True)
class GenerateSettings:
    """The `generate` verb."""

    max_new_tokens: Annotated[int, POSITIVE] = 256
    """Longest answer."""
    temperature: Annotated[float, NOT_NEGATIVE] = 0.0
    """0 = greedy, the same answer every time."""
    top_p: Annotated[float, SHARE] = 1.0
    """Nucleus sampling, when the temperature is above 0."""


@dataclass(frozen=True)
class ExportSettings:
    """The `export` verb."""

    checkpoint: Annotated[str | None, VERBATIM] = None
    """Checkpoint folder to export; null takes the newest complete one of the run."""
    to: Annotated[str | None, VERBATIM] = None
    """Folder to write; null takes ``<run folder>/adapter`` for an adapter."""
