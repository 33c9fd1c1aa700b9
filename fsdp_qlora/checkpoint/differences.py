"""Compares two checkpoints tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fsdp_qlora.checkpoint.manifest import SavedCheckpoint
from fsdp_qlora.checkpoint.write import read_tensors


@dataclass(frozen=True)
class Difference:
    """How one tensor differs."""

    name: str
    text: str


def contrast(first: SavedCheckpoint, second: SavedCheckpoint) -> Iterator[Difference]:
    """Yield every tensor that is not bit-equal in both checkpoints, holding two tensors in memory at a time."""
    ours, theirs = first.manifest.tensors, second.manifest.tensors
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield Difference(name, f"only in {(first if name in ours else second).folder}")
        elif ours[name] != theirs[name]:
            yield Difference(name, f"{ours[name]} and {theirs[name]}")
        else:
            shape = {name: ours[name]}
            a, b = read_tensors(first.folder, shape)[name], read_tensors(second.folder, shape)[name]
            if (text := _differ(a, b)) is not None:
                yield Difference(name, text)


def _differ(a: torch.Tensor, b: torch.Tensor) -> str | None:
    if a.dtype != b.dtype:
        return f"{a.dtype} and {b.dtype}"
    if torch.equal(a.view(torch.uint8) if a.ndim else a, b.view(torch.uint8) if b.ndim else b):
        return None  # compared as bits: NaN equals itself, and -0.0 differs from 0.0
    gap = (a.double() - b.double()).abs()
    share = float((gap > 0).double().mean()) if gap.numel() else 0.0
    norm = float(b.double().norm()) or 1.0
    return f"max |a-b| {float(gap.max()):.3e}, |a-b|/|b| {float(gap.norm()) / norm:.3e}, {100 * share:.1f} % of values"
