"""The chunked loss equals torch's cross entropy over all logits, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsdp_qlora.heads.dense import LossHead
from fsdp_qlora.heads.upstream import AfterHead


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_cross_entropy_of_all_logits(chunk, softcap, scale, bias):
    torch.manual_seed(0)
    linear = nn.Linear(16, 50, bias=bias).requires_grad_(False)
    head = LossHead.from_linear(linear, AfterHead(scale, softcap), chunk)
    assert head.weight is linear.weight
    hidden, labels = torch.randn(20, 16, requires_grad=True), torch.randint(0, 50, (20,))
    twin = hidden.detach().clone().requires_grad_()
    weights = torch.rand(20)
    (head(hidden, labels=labels) * weights).sum().backward()
    logits = linear(twin) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    (losses * weights).sum().backward()
    torch.testing.assert_close(head(hidden, labels=labels), losses)
    torch.testing.assert_close(hidden.grad, twin.grad)


def test_no_supervised_token_gives_an_empty_loss_that_can_go_backward():
    head = LossHead.from_linear(nn.Linear(4, 9).requires_grad_(False), AfterHead(), 8)
    hidden = torch.randn(0, 4, requires_grad=True)
    head(hidden, labels=torch.zeros(0, dtype=torch.long)).sum().backward()
    assert hidden.grad.shape == (0, 4)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of values of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_never_holds_all_logits():
    head = LossHead.from_linear(nn.Linear(8, 1000).requires_grad_(False), AfterHead(), 4)
    with _Largest() as largest:
        head(torch.randn(64, 8, requires_grad=True), labels=torch.zeros(64, dtype=torch.long)).sum().backward()
    assert largest.numel <= 8000  # the weight itself; 64 rows of logits would be 64,000


@torch.no_grad()
def test_logits_of_the_last_tokens_do_not_copy_the_weight_for_each_row():
    linear = nn.Linear(8, 1000, bias=False).requires_grad_(False)
    head, hidden = LossHead.from_linear(linear, AfterHead(), 4), torch.randn(5, 7, 8)
    with _Largest() as largest:
        logits = head(hidden[:, -1:])
    assert largest.numel <= 8000 and logits.shape == (5, 1, 1000)
    torch.testing.assert_close(logits, linear(hidden)[:, -1:])
