"""Checks on the real model that the training losses match those of the model's own logits."""

from __future__ import annotations

import torch
from torch import nn

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_max
from fsdp_qlora.errors import ModelError, first_line
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.parallel.shard import release_all

LENGTH = 48
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest relative difference of the two mean losses; both run through the same layers."""


@torch.no_grad()
def require_losses_agree(model: CausalModel, ranks: Ranks) -> None:
    """Compare both losses on one row and leave the training mode unchanged. Every rank calls it.

    Raises:
        ModelError: identically on every rank, if they differ or cannot be computed.
    """
    weight = getattr(model.base.get_input_embeddings(), "weight", None)
    vocab = model.num_ids(weight.shape[0] if isinstance(weight, torch.Tensor) else 256)
    positions = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    length = min(LENGTH, positions) if isinstance(positions, int) and positions > 1 else LENGTH
    ids = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(0)).to(ranks.device)
    was_training = model.training
    model.eval()
    try:
        ours = float(model(ids, ids).mean())
        logits = model.logits(ids)[0]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # upstream bugs that only one dtype triggers (xLSTM)
        raise ModelError(
            f"model.check: this model's own code does not run in {model.base.dtype} ({first_line(error)[:200]}). "
            "Try another precision."
        ) from error
    finally:
        model.train(was_training)
        release_all(model)
    theirs = float(nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:]))
    gap = all_max(abs(ours - theirs) / max(abs(theirs), 1e-6), ranks)
    if not gap <= LIMITS.get(logits.dtype, LIMITS[torch.bfloat16]):
        raise ModelError(
            f"model.check: on a row of {length} tokens, training computes a loss of {ours:.4f}, but the model's own "
            f"logits give {theirs:.4f}. Try debug=plain; model.check=off trains it anyway."
        )
