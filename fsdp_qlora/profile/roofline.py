"""How close a step comes to the hardware's limit: `mfu` on a known GPU, `roofline_share` on a CPU.

On a GPU the reference is the vendor's peak. A CPU has no meaningful peak, so the model's own matrix products are timed
in isolation, as they occur in a step: forward and the gradient of the input, with the same dtype and number of
threads, on all ranks at once.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_sum, barrier
from fsdp_qlora.plan.devices import Device
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.plan.timing import linears_of_token, model_flops
from fsdp_qlora.quant.matrix import SLICE_WEIGHTS
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.track.meter import Window

_REPEATS = 5
_MOST_OPERATIONS = 2e10
"""Most operations of one product in the calibration. Larger products use fewer tokens, which have the same rate."""


def mfu(plan: TrainPlan, shapes: ModelShapes, device: Device, num_ranks: int, window: Window) -> dict[str, float]:
    """Return the window's model FLOPs as a share of the ranks' peak (model FLOPs utilisation)."""
    flops = model_flops(plan, shapes, window.tokens, window.target_tokens, window.rows)
    return {"mfu": flops / (window.seconds * device.teraflops * 1e12 * num_ranks)}


@dataclass(frozen=True)
class GemmTimes:
    """Time of the model's matrix products in isolation, on one rank (the mean over the ranks)."""

    token_seconds: float
    """Seconds for the linears, forward and backward, per token."""
    target_seconds: float
    """Seconds for the head, per supervised token."""
    teraflops: float
    """Rate of the linears' products."""
    micro_batch_tokens: int
    """Rows of the input of the timed products."""

    def share(self, num_ranks: int, window: Window) -> dict[str, float]:
        """Return these products' time as a share of the window's."""
        ideal = window.tokens * self.token_seconds + window.target_tokens * self.target_seconds
        return {"roofline_share": ideal / num_ranks / window.seconds}

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON-serialisable dictionary."""
        return asdict(self)


def time_gemms(
    plan: TrainPlan, shapes: ModelShapes, ranks: Ranks, dtype: torch.dtype, tokens: int, chunk: int
) -> GemmTimes:
    """Time the model's matrix products in isolation. A collective: all ranks run at the same time.

    Args:
        plan: the plan.
        shapes: the model's shapes.
        ranks: the ranks.
        dtype: dtype of the products.
        tokens: tokens in a typical micro-batch.
        chunk: tokens whose logits exist at the same time.
    """
    counts: Counter[tuple[int, int]] = Counter()
    for linear, times in linears_of_token(plan, shapes):
        counts[linear.out_features, linear.in_features] += times
    head = min(shapes.vocab_size, max(1, SLICE_WEIGHTS // shapes.hidden_size))
    barrier(ranks)  # run concurrently, as in a step: the ranks may share cores and memory
    token = sum(n * _seconds_per_token(*shape, tokens, dtype, ranks.device) for shape, n in counts.items())
    target = _seconds_per_token(head, shapes.hidden_size, min(tokens, chunk), dtype, ranks.device)
    token, target = (x / ranks.size for x in all_sum([token, target * shapes.vocab_size / head], ranks))
    flops = sum(4 * n * out * inner for (out, inner), n in counts.items())
    return GemmTimes(token, target, flops / token / 1e12 if token else 0.0, tokens)


def _seconds_per_token(rows: int, columns: int, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return seconds per token for ``x @ weight.T`` plus ``grad @ weight``; the weight is ``[rows, columns]``."""
    tokens = max(1, min(tokens, int(_MOST_OPERATIONS / (2 * rows * columns))))
    weight = torch.randn(rows, columns, device=device).to(dtype)
    x, grad = (torch.randn(tokens, width, device=device).to(dtype) for width in (columns, rows))
    return (_median(lambda: x @ weight.t()) + _median(lambda: grad @ weight)) / tokens


def _median(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
