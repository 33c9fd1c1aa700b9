"""What layers take is found by running them on meta: torch's private parts still behave, and numbers are exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fsdp_qlora.model.live import OneKernel, backward_peak
from fsdp_qlora.shapes.runs import ByLength


def test_bytes_of_a_backward_are_counted_to_the_byte() -> None:
    """A product with a frozen weight, and its GELU: if this fails, torch changed what live.py stands on."""
    x = torch.empty(8, 16, device="meta", requires_grad=True)
    weight = torch.empty(32, 16, device="meta")
    peak = backward_peak(lambda: F.gelu(F.linear(x, weight)), [x])
    # gradients of the result and of the product; when that of x is computed, the product, which was kept, is freed
    assert peak == 2 * 8 * 32 * 4


def test_attention_keeps_no_scores_where_a_kernel_computes_it() -> None:
    q, k, v = (torch.empty(1, 4, 64, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), OneKernel():
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape and out.requires_grad
    assert max(tensor.numel() for tensor in kept) == q.numel() < 4 * 64 * 64


def test_numbers_by_length_go_through_their_points() -> None:
    cubic = ByLength.through([(64, 3 * 64**2 + 5 * 64 + 7), (32, 3 * 32**2 + 5 * 32 + 7), (16, 3 * 16**2 + 5 * 16 + 7)])
    assert [cubic.at(length) for length in (64, 16, 100)] == [3 * n**2 + 5 * n + 7 for n in (64, 16, 100)]
    assert ByLength.through([(50, 9)]).at(3) == 9
