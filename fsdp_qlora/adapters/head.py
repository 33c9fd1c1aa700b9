"""A LoRA on the output head: its logits are added chunk by chunk, where the loss is computed."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from peft.tuners.lora import Linear
from torch import nn


class LossHead(Protocol):
    """What an adapted head needs of the head under it (`heads/dense.py`)."""

    def trained_losses(
        self, input: torch.Tensor, labels: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the float32 losses ``[tokens]`` of the head's logits plus ``low @ up.T``."""
        ...


class AdaptedLossHead(Linear):
    """PEFT's LoRA layer around a loss head, with that head's interface: given labels, it returns losses."""

    base_layer: Any
    """A `LossHead`."""

    def forward(self, x: torch.Tensor, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Return logits ``[..., vocab]`` as PEFT does; with ``labels`` int64 ``[tokens]``, losses ``[tokens]``."""
        if labels is None:
            return super().forward(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return self.base_layer(x, labels=labels)
        (name,) = active
        down = cast(nn.Linear, self.lora_A[name])
        low = down(self.lora_dropout[name](x.to(down.weight.dtype))) * self.scaling[name]
        return self.base_layer.trained_losses(x, labels, low.to(x.dtype), self.lora_B[name].weight.to(x.dtype))  # type: ignore[operator, union-attr]

    @staticmethod
    def around(layer: Linear, head: nn.Module) -> None:
        """Let PEFT's ``layer`` on a head compute losses with ``head``, a `LossHead` that shares the weight of its own.

        The layer becomes an instance of this class, as `fully_shard` does it with a subclass of its own.
        """
        layer.__class__ = AdaptedLossHead
        layer.base_layer = head
