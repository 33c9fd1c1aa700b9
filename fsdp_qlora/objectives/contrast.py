"""The loss of pairs against all other rows of a global batch, in two passes, and what retrieval measures.

A row's negatives are the rows of the same global batch, on whatever rank they are. So that no two micro-batches need be
in memory at once, vectors are first computed without gradients, gathered, and the loss is differentiated by them. Then
each micro-batch is computed again, and its vectors carry these derivatives on to the parameters (GradCache,
https://arxiv.org/abs/2101.06983). The gradient is that of the loss over the global batch, for any number of ranks and
any size of micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_gather

ANCHOR, POSITIVE, NEGATIVE = range(3)
"""What a text is to its row."""
_AT_ONCE = 1024
"""Anchors whose similarities are in memory together."""


@dataclass(frozen=True)
class Texts:
    """The vectors of a micro-batch's texts."""

    vectors: torch.Tensor
    """float32 ``[texts, hidden]``, of length 1."""
    role: torch.Tensor
    """int64 ``[texts]``: `ANCHOR`, `POSITIVE` or `NEGATIVE`. Each row has one of the first two, in the same order."""


def losses(texts: Texts, temperature: float) -> torch.Tensor:
    """Return the cross entropy of each row's positive among all positives and negatives: float32 ``[rows]``.

    InfoNCE (https://arxiv.org/abs/1807.03748) of cosine similarities, as sentence-transformers'
    ``MultipleNegativesRankingLoss`` with a scale of ``1 / temperature``.
    """
    anchors, positives, negatives = (texts.vectors[texts.role == role] for role in (ANCHOR, POSITIVE, NEGATIVE))
    similarities = anchors @ torch.cat([positives, negatives]).T / temperature
    return F.cross_entropy(similarities, torch.arange(len(anchors), device=anchors.device), reduction="none")


@dataclass(frozen=True)
class Known:
    """What the loss over a global batch says of one micro-batch."""

    loss: torch.Tensor
    """Of its rows, summed: float32 ``[]``."""
    slopes: torch.Tensor
    """Derivatives of the rows' summed loss by its vectors: float32 ``[texts, hidden]``."""


def differentiate(own: dict[int, Texts], temperature: float, ranks: Ranks) -> dict[int, Known]:
    """Return what the loss of all ranks' rows says of this rank's micro-batches, by their number. A collective.

    Args:
        own: the micro-batches of this rank that have rows, by their number.
        temperature: what similarities are divided by.
        ranks: the ranks that share the global batch.
    """
    width = torch.tensor([part.vectors.shape[1] for part in own.values()] or [0], device=ranks.device).max()
    width = int(torch.stack(all_gather(width, ranks.group)).max())
    empty = torch.zeros(0, width, device=ranks.device)
    vectors = _gathered(torch.cat([empty, *(part.vectors for part in own.values())]), ranks)
    about = [torch.stack([torch.full_like(part.role, number), part.role], dim=1) for number, part in own.items()]
    table = _gathered(torch.cat([torch.zeros(0, 2, dtype=torch.int64, device=ranks.device), *about]), ranks)
    number = table[:, 0]
    order = torch.sort(number, stable=True).indices  # a micro-batch's texts come from one rank, and stay in order
    number, role = number[order], table[order, 1]
    leaf = vectors[order].requires_grad_()
    with torch.enable_grad():
        of_rows = losses(Texts(leaf, role), temperature)
        (slopes,) = torch.autograd.grad(of_rows.sum(), leaf)
    row_number = number[role == ANCHOR]
    return {n: Known(of_rows.detach()[row_number == n].sum(), slopes[number == n]) for n in own}


def _gathered(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Return the rows of all ranks' tensors ``[any, columns]``, in rank order."""
    sizes = [int(size) for size in all_gather(torch.tensor([len(tensor)], device=ranks.device), ranks.group)]
    padded = tensor.new_zeros(max(sizes), tensor.shape[1])
    padded[: len(tensor)] = tensor
    parts = all_gather(padded, ranks.group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def retrieval(anchors: torch.Tensor, positives: torch.Tensor) -> tuple[list[bool], list[float]]:
    """Return, for each anchor, whether its own positive is the most similar of all, and 1 / that one's rank.

    Args:
        anchors: float32 ``[rows, hidden]``, of length 1.
        positives: likewise. Those as similar as an anchor's own do not come before it.
    """
    ranks: list[int] = []
    for start in range(0, len(anchors), _AT_ONCE):
        similarities = anchors[start : start + _AT_ONCE] @ positives.T
        own = similarities.diagonal(start).unsqueeze(1)
        ranks += (1 + (similarities > own).sum(1)).tolist()
    return [rank == 1 for rank in ranks], [1 / rank for rank in ranks]
