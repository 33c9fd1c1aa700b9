"""Does a packed row see its neighbours? Tried on the model itself before training, forward and backward.

Attention backends that do not read restarting positions mix the rows of a sequence without any error, and training on
them looks fine. So packing is refused unless this probe passes for the model, backend and device in use.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from fsdp_qlora.dist.mesh import Ranks
from fsdp_qlora.errors import ModelError
from fsdp_qlora.model.causal import CausalModel
from fsdp_qlora.model.lora import trainable_parameters
from fsdp_qlora.quant.linear import local_tensor

_LENGTH = 12
_FORWARD_LIMIT = 1e-3
_BACKWARD_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


def require_isolation(model: CausalModel, ranks: Ranks, vocab_size: int, attention: str) -> None:
    """Check that packing two rows changes neither's logits, and that their gradients add up. Every rank calls it.

    Leaves mode and gradients as they were (there must be none).

    Raises:
        ModelError: if the rows see each other.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (3, _LENGTH), generator=generator).to(ranks.device)
    was_training = model.training
    model.eval()  # dropout would hide what is looked for
    try:
        leak, dtype = _forward_leak(model, ids)
        drift, limit = _backward_drift(model, ids, ranks), _BACKWARD_LIMIT[dtype]
    finally:
        model.train(was_training)
        for _, parameter in trainable_parameters(model):
            parameter.grad = None
    if leak > _FORWARD_LIMIT or drift > limit:
        raise ModelError(
            f"data.packing: with attn_implementation={attention} the packed rows of this model see each other (logits "
            f"move by {leak:.1e} of their size, gradients by {drift:.1e}). Set data.packing=false, or try another "
            "model.attn_implementation (eager, sdpa, flash_attention_2)."
        )


def _packed(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(_LENGTH, device=first.device)
    return torch.cat([first, second])[None], torch.cat([positions, positions])[None]


@torch.no_grad()
def _forward_leak(model: CausalModel, ids: torch.Tensor) -> tuple[float, torch.dtype]:
    """Return how far the second row's logits move when the first one is another (relative), and their dtype."""
    seen = [model.logits(*_packed(first, ids[2]))[:, _LENGTH:] for first in (ids[0], ids[1])]
    one, other = (logits.float() for logits in seen)
    return float((one - other).abs().max() / one.abs().max()), seen[0].dtype


def _backward_drift(model: CausalModel, ids: torch.Tensor, ranks: Ranks) -> float:
    """Return how far a packed gradient is from the sum of the two alone (relative)."""

    def labels(rows: torch.Tensor) -> torch.Tensor:
        marked = rows.clone()
        marked[:, ::_LENGTH] = -100  # the first token of each row
        return marked

    def gradients() -> list[torch.Tensor]:
        found = [local_tensor(p.grad).float().clone() for _, p in trainable_parameters(model) if p.grad is not None]
        for _, parameter in trainable_parameters(model):
            parameter.grad = None
        return found

    together, positions = _packed(ids[0], ids[2])
    model(together, labels(together), positions).sum().backward()
    packed = gradients()
    for row in (ids[0], ids[2]):
        model(row[None], labels(row[None])).sum().backward()
    alone = gradients()
    squares = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for a, b in zip(packed, alone, strict=True):
        squares += torch.stack([(a - b).double().square().sum(), b.double().square().sum()]).to(ranks.device)
    dist.all_reduce(squares, group=ranks.group)
    gap, size = squares.sqrt().tolist()
    return gap / max(size, 1e-30)
