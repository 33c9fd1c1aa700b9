"""One LoRA made of several with weights, as PEFT's ``add_weighted_adapter`` makes it; all in float32.

Each adapter changes a weight by ``s B A``, and the result is to change it by the sum of ``w s B A``:

- ``linear``: A and B are sums of those of the adapters, each times ``sqrt(|w s|)``. The product of the sums is not the
  sum of the products; it is exact for one adapter alone.
- ``cat``: those of all adapters one after the other. Exact; the ranks add up.
- ``svd``: the best approximation of the sum of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, sqrt

import torch


@dataclass(frozen=True)
class Weighted:
    """What one adapter adds to one module."""

    down: torch.Tensor
    """A, ``[r, in_features]``."""
    up: torch.Tensor
    """B, ``[out_features, r]``."""
    weight: float
    """Its weight times its scaling."""


def combine(parts: Sequence[Weighted], kind: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of one adapter of scaling 1 that stands for ``parts``; ``svd`` gives it the rank ``r``.

    ``linear`` needs equal ranks.
    """
    if kind == "linear":
        roots = [sqrt(abs(part.weight)) for part in parts]
        down = sum(part.down * copysign(root, part.weight) for part, root in zip(parts, roots, strict=True))
        up = sum(part.up * root for part, root in zip(parts, roots, strict=True))
        assert isinstance(down, torch.Tensor) and isinstance(up, torch.Tensor)
        return down, up
    down = torch.cat([part.down * part.weight for part in parts])
    up = torch.cat([part.up for part in parts], dim=1)
    return (down, up) if kind == "cat" else _truncated(down, up, r)


def _truncated(down: torch.Tensor, up: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of the best approximation of ``up @ down`` of rank ``r``; singular values are in B.

    The product itself is as large as the weight, and of a rank no higher than theirs: only the triangles of two QR
    decompositions are decomposed further.
    """
    left, left_triangle = torch.linalg.qr(up)
    right, right_triangle = torch.linalg.qr(down.t())
    u, s, vh = torch.linalg.svd(left_triangle @ right_triangle.t(), full_matrices=False)
    return (vh[:r] @ right.t()).contiguous(), left @ (u[:, :r] * s[:r])


def squares(parts: Sequence[Weighted], made: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Return the sums of squares of the weighted sum of changes, and of its difference from what was made of it."""
    down = torch.cat([part.down.double() * part.weight for part in parts])
    up = torch.cat([part.up.double() for part in parts], dim=1)
    off = torch.cat([down, made[0].double()]), torch.cat([up, -made[1].double()], dim=1)
    return _norm(down, up), _norm(*off)


def _norm(down: torch.Tensor, up: torch.Tensor) -> float:
    """Return the sum of squares of ``up @ down``, which is not formed."""
    return max(float(((up.t() @ up) * (down @ down.t())).sum()), 0.0)
