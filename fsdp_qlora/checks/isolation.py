"""Probes whether rows that share a sequence attend to each other: forward and backward on the real model.

Attention backends that ignore restarting positions or boundaries mix the rows of a sequence without any error, and
training on them looks fine. So rows may share a sequence only if this probe passes for the model, backend and device
in use. It runs the same code as training, on batches of the run's own pattern: a backend may separate rows in a batch
of one sequence and yet mix them in the second of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.attention.candidates import EAGER
from fsdp_qlora.attention.layout import Layout
from fsdp_qlora.data.loader import Piece
from fsdp_qlora.data.pack import pack
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.objectives import token_losses

_LENGTHS = (12, 9, 11)
"""Row lengths in tokens, used in turn; uneven, so that boundaries differ from those of equal parts."""
_FORWARD_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
_BACKWARD_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
Losses = Callable[[list[list[torch.Tensor]]], torch.Tensor]
"""Maps sequences of rows (int64 ``[length]``, all learned) to the model's float32 losses ``[targets]``, row by row."""


def require_isolation(
    model: CausalModel, together: Losses, alone: Losses, pattern: list[int], ranks: Ranks, vocab_size: int,
    attention: str, key: str = "data.packing",
) -> None:  # fmt: skip
    """Check that no row's losses depend on other rows, and that gradients add up. Every rank calls it.

    Leaves the training mode unchanged; there must be no gradients before, and there are none after.

    Args:
        model: the model.
        together: runs a micro-batch as training does.
        alone: runs each row as its own sequence, in a way that only requires causal attention.
        pattern: number of rows in each sequence of a micro-batch.
        ranks: this rank and the others.
        vocab_size: upper bound of the token ids, exclusive.
        attention: the attention implementation, for the message.
        key: the setting that turns row sharing off, for the message.

    Raises:
        ModelError: if rows attend to each other.
    """
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[torch.Tensor]:
        lengths = [_LENGTHS[i % len(_LENGTHS)] for i in range(sum(pattern))]
        return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]

    rows, others = draw(), draw()
    was_training = model.training
    model.eval()  # dropout would mask the effect
    try:
        leak = _forward_leak(lambda chosen: together(_split(chosen, pattern)), rows, others)
        drift = _backward_drift(
            model, lambda: together(_split(rows, pattern)), lambda: alone([[x] for x in rows]), ranks
        )
    finally:
        model.train(was_training)
        for _, parameter in trainable_parameters(model):
            parameter.grad = None
    dtype = model.base.dtype
    if leak > _FORWARD_LIMIT[dtype] or drift > _BACKWARD_LIMIT[dtype]:
        what = "packed rows" if max(pattern) > 1 else "rows"
        others = ", ".join(name for name in (EAGER, "sdpa") if name != attention)
        way_out = f"Set {key}=false, or try another" if key.startswith("data.") else "Try another"
        raise ModelError(
            f"{key}: with attn_implementation={attention}, the {what} of this model leak into each other (losses move "
            f"by {leak:.1e} of their spread, gradients by {drift:.1e} of their norm, tried on {len(pattern)} sequences "
            f"of {max(pattern)} rows). {way_out} model.attn_implementation ({others})."
        )


def _split(rows: list[torch.Tensor], pattern: list[int]) -> list[list[torch.Tensor]]:
    """Distribute rows to the sequences of a micro-batch, in order."""
    given = iter(rows)
    return [[next(given) for _ in range(count)] for count in pattern]


@torch.no_grad()
def _forward_leak(
    losses: Callable[[list[torch.Tensor]], torch.Tensor], rows: list[torch.Tensor], others: list[torch.Tensor]
) -> float:
    """Return how far every second row's losses move when the rows between them change, relative to their spread."""
    base = losses(rows)
    parity = torch.cat([torch.full((len(row) - 1,), i % 2) for i, row in enumerate(rows)]).to(base.device)
    moved = torch.zeros((), device=base.device)
    for kept in (0, 1):
        mixed = [row if i % 2 == kept else other for i, (row, other) in enumerate(zip(rows, others, strict=True))]
        moved = torch.maximum(moved, ((losses(mixed) - base)[parity == kept]).abs().max())
    return float(moved / base.std().clamp_min(1e-30))


def _backward_drift(
    model: CausalModel, together: Callable[[], torch.Tensor], alone: Callable[[], torch.Tensor], ranks: Ranks
) -> float:
    """Return the relative distance of the gradient of all rows together from the sum of those of each row alone."""

    def gradients(losses: torch.Tensor) -> list[torch.Tensor]:
        losses.sum().backward()
        grads = [local_tensor(p.grad).float().clone() for _, p in trainable_parameters(model) if p.grad is not None]
        for _, parameter in trainable_parameters(model):
            parameter.grad = None
        return grads

    squares = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for a, b in zip(gradients(together()), gradients(alone()), strict=True):
        squares += torch.stack([(a - b).double().square().sum(), b.double().square().sum()]).to(ranks.device)
    dist.all_reduce(squares, group=ranks.group)
    gap, size = squares.sqrt().tolist()
    return gap / max(size, 1e-30)


def try_isolation(model: CausalModel, layout: Layout, ranks: Ranks) -> None:
    """Check that rows in a micro-batch laid out like the run's do not attend to each other. Every rank calls it.

    Raises:
        ModelError: if they do.
    """
    pattern = layout.shared_rows
    assert pattern is not None, "no two rows share anything"

    def learned(rows: list[torch.Tensor]) -> list[Piece]:
        return [(ids, torch.ones(len(ids), dtype=torch.bool)) for ids in rows]

    def together(sequences: list[list[torch.Tensor]]) -> torch.Tensor:
        return token_losses(model, layout.micro_batch([learned(rows) for rows in sequences]).to(ranks.device))

    def alone(sequences: list[list[torch.Tensor]]) -> torch.Tensor:
        padded = replace(pack([learned(rows) for rows in sequences]), position_ids=None)
        return token_losses(model, padded.to(ranks.device))

    vocab_size = model.num_ids(model.base.config.get_text_config().vocab_size)
    shares = "data.padding_free" if layout.data.padding_free else "model.attn_implementation"
    key = "data.packing" if layout.data.packing else shares
    require_isolation(model, together, alone, pattern, ranks, vocab_size, layout.attention, key)
