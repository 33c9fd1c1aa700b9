"""Faults planted in a walk, which it must find."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def _in_forward(base: nn.Module, hook: Any) -> None:
    base.get_submodule("model.layers.1").register_forward_hook(hook)


def a_buffer_on_the_host(base: nn.Module) -> None:
    """Compute with a buffer that stayed in host memory."""
    buffer = torch.zeros(base.config.hidden_size)  # type: ignore[union-attr]
    _in_forward(base, lambda *found: found[-1] + buffer)


def an_item_in_the_step(base: nn.Module) -> None:
    """Read a value from the device in a layer's forward."""
    _in_forward(base, lambda *found: found[-1].detach().sum().item() and None)


def a_copy_read_too_early(base: nn.Module) -> None:
    """Compute on the host with what a copy that nobody waits for brings there."""

    def hook(*found: Any) -> None:
        found[-1].detach().to("cpu", non_blocking=True).add(1)

    _in_forward(base, hook)


def a_stream_that_nobody_waits_for(base: nn.Module) -> None:
    """Change a layer's output on another stream, which waits for nothing and which nothing waits for."""

    def hook(*found: Any) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[-1].detach().mul_(2)

    _in_forward(base, hook)


PLANTS = {
    plant.__name__: plant
    for plant in (a_buffer_on_the_host, an_item_in_the_step, a_copy_read_too_early, a_stream_that_nobody_waits_for)
}
