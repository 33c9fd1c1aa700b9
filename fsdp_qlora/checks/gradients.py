"""Checks on the first gradients that they reach everything that is trained."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from fsdp_qlora.adapters.names import ADAPTER, adapter_of, adapter_parameters, trainable_parameters
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import NumericsError


class FirstGradients:
    """Called with the step number after each backward; checks the first two steps of a start, then does nothing."""

    def __init__(self, model: nn.Module, ranks: Ranks, beside: Collection[str] = ()) -> None:
        """Check a model's gradients; ``beside`` are linears that a step without images does not use."""
        self._model, self._ranks, self._beside, self._seen = model, ranks, beside, 0

    def __call__(self, step: int) -> None:
        """Check that every trained parameter has a gradient (first call), and every adapter a nonzero one (second).

        Raises:
            NumericsError: identically on every rank, naming the first parameter that fails.
        """
        self._seen += 1
        if self._seen == 1:
            missing = [name for name, p in trainable_parameters(self._model) if p.grad is None]
            if missing:
                raise NumericsError(
                    f"step {step}: {len(missing)} trained parameters got no gradient (first: {missing[0]}): the loss "
                    "does not depend on them. If this model does not use them on such rows, leave their modules out by "
                    "lora.exclude_modules."
                )
        elif self._seen == 2:  # in the first step B is zero, and so is A's gradient
            self._require_nonzero(step)

    def _require_nonzero(self, step: int) -> None:
        largest: dict[str, torch.Tensor] = {}
        # Not of rows, as none may hold an added token yet, nor of the base's own weights: keys' biases have none.
        for name, parameter in adapter_parameters(self._model, ADAPTER):
            if not parameter.requires_grad:
                continue
            pair = adapter_of(name)
            if any(f".{linear}." in pair for linear in self._beside):
                continue
            grad = local_tensor(parameter.grad)  # type: ignore[arg-type]
            value = grad.abs().max().float() if grad.numel() else torch.zeros((), device=grad.device)
            largest[pair] = torch.maximum(largest.get(pair, value), value)
        if not largest:
            return
        values = torch.stack(list(largest.values())).to(self._ranks.device)  # gradients may be in host memory
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=self._ranks.group)
        dead = [pair for pair, value in zip(largest, values.tolist(), strict=True) if value == 0.0]
        if dead:
            raise NumericsError(f"step {step}: {len(dead)} adapters have a gradient of zero (first: {dead[0]}).")
