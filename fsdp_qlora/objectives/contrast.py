"""The loss of pairs against all other rows of a global batch, in two passes, and what retrieval measures.

A row's negatives are the rows of the same global batch, on whatever rank they are. So that no two micro-batches need be
in memory at once, vectors are first computed without gradients, gathered, and the loss is differentiated by them. Then
each micro-batch is computed again, and its vectors carry these derivatives on to the parameters (GradCache,
https://arxiv.org/abs/2101.06983). The gradient is that of the loss over the global batch, for any number of ranks and
any size of micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_gather

_AT_ONCE = 1024
"""Anchors whose similarities are in memory together."""
Table = list[tuple[int, int, int]]
"""Of each micro-batch of a rank: its number in the global batch, its rows, and its negatives; none in idle ones."""


@dataclass(frozen=True)
class Texts:
    """The vectors of a micro-batch's texts, each float32 ``[texts, hidden]``, of length 1."""

    anchors: torch.Tensor
    positives: torch.Tensor
    """One for each anchor, in the same order."""
    negatives: torch.Tensor

    def joined(self) -> torch.Tensor:
        """Return all of them: anchors, then positives, then negatives."""
        return torch.cat([self.anchors, self.positives, self.negatives])


def losses(texts: Texts, temperature: float) -> torch.Tensor:
    """Return the cross entropy of each row's positive among all positives and negatives: float32 ``[rows]``.

    InfoNCE (https://arxiv.org/abs/1807.03748) of cosine similarities, as sentence-transformers'
    ``MultipleNegativesRankingLoss`` with a scale of ``1 / temperature``.
    """
    anchors = texts.anchors
    similarities = anchors @ torch.cat([texts.positives, texts.negatives]).T / temperature
    return F.cross_entropy(similarities, torch.arange(len(anchors), device=anchors.device), reduction="none")


@dataclass(frozen=True)
class Known:
    """What the loss over a global batch says of one micro-batch."""

    loss: torch.Tensor
    """Of its rows, summed: float32 ``[]``."""
    slopes: torch.Tensor
    """Derivatives of the rows' summed loss by its vectors, in the order of `Texts.joined`: float32 ``[texts, hidden]``.
    """


def all_tables(own: Table, ranks: Ranks) -> list[Table]:
    """Return every rank's table, in rank order; all have as many micro-batches. A collective that waits once."""
    parts = all_gather(torch.tensor(own, device=ranks.device).view(-1, 3), ranks.group)
    return [[(a, b, c) for a, b, c in part] for part in torch.stack(parts).tolist()]


def differentiate(
    own: Sequence[tuple[int, Texts]], temperature: float, ranks: Ranks, tables: Sequence[Table]
) -> dict[int, Known]:
    """Return what the loss of all ranks' rows says of this rank's micro-batches, by their number. A collective.

    Args:
        own: the number and the texts of this rank's micro-batches, in the order of its table; of idle ones, which have
            no rows there, the texts do not count.
        temperature: what similarities are divided by.
        ranks: the ranks that share the global batch.
        tables: those of all ranks (`all_tables`).
    """
    vectors = [texts.joined()[: _count(line)] for (_, texts), line in zip(own, tables[ranks.rank], strict=True)]
    gathered = _gathered(torch.cat(vectors), [sum(map(_count, table)) for table in tables], ranks)
    parts: dict[int, tuple[int, torch.Tensor]] = {}  # a micro-batch's texts come from one rank, and stay in order
    for table, rows in zip(tables, gathered, strict=True):
        for (number, count, _), part in zip(table, rows.split([_count(line) for line in table]), strict=True):
            if count:
                parts[number] = count, part
    sizes = {number: (count, count, len(part) - 2 * count) for number, (count, part) in sorted(parts.items())}
    leaves = {number: parts[number][1].detach().clone().requires_grad_() for number in sizes}
    with torch.enable_grad():
        each = [leaf.split(sizes[number]) for number, leaf in leaves.items()]
        of_rows = losses(Texts(*(torch.cat(vectors) for vectors in zip(*each, strict=True))), temperature)
        slopes = torch.autograd.grad(of_rows.sum(), list(leaves.values()))
    of_each = of_rows.detach().split([count for count, _, _ in sizes.values()])
    known = {number: Known(rows.sum(), slope) for number, rows, slope in zip(sizes, of_each, slopes, strict=True)}
    return {number: known[number] for number, count, _ in tables[ranks.rank] if count}


def _count(line: tuple[int, int, int]) -> int:
    """Return the texts of a micro-batch."""
    _, rows, negatives = line
    return 2 * rows + negatives


def _gathered(tensor: torch.Tensor, sizes: Sequence[int], ranks: Ranks) -> list[torch.Tensor]:
    """Return all ranks' tensors ``[rows, columns]`` of these numbers of rows, in rank order."""
    padded = tensor.new_zeros(max(sizes), tensor.shape[1])
    padded[: len(tensor)] = tensor
    parts = all_gather(padded, ranks.group)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


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
