"""bitsandbytes' 8-bit and paged optimizers on local shards.

This uses only the functions of `bitsandbytes.functional` that its optimizers call. The optimizers themselves decide by
the size of the tensor they see, which is wrong for a shard, and keep overrides in a global table keyed by ``id()``.
`tests/unit/test_optim.py` compares every update with theirs, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from bitsandbytes import functional

from fsdp_qlora.config.schema import OptimSettings
from fsdp_qlora.optim.groups import groups_of
from fsdp_qlora.optim.sizes import keeps_8bit, num_blocks, num_codes
from fsdp_qlora.optim.state import Blocks, Leaf, LocalOptimizer, Part

PAGED_NUMEL = 100_000
"""Smaller states are not paged (bitsandbytes' own limit)."""


@dataclass(frozen=True)
class Update:
    """One of bitsandbytes' updates and its state."""

    kernel: str
    first: tuple[str, ...]
    """Moments in ``state1``, whose values are signed."""
    second: tuple[str, ...] = ()
    """Moments in ``state2``, whose values are not negative."""
    paged: bool = False


_ADAM = ("adam", ("exp_avg",), ("exp_avg_sq",))
UPDATES = {
    "adamw_8bit": Update(*_ADAM),
    "paged_adamw_8bit": Update(*_ADAM, paged=True),
    "paged_adamw_32bit": Update(*_ADAM, paged=True),
    "lion_8bit": Update("lion", ("exp_avg",)),  # https://arxiv.org/abs/2302.06675
    "ademamix_8bit": Update("ademamix", ("exp_avg", "exp_avg_slow"), ("exp_avg_sq",)),  # arxiv.org/abs/2409.03137
}
PAGED = frozenset(name for name, update in UPDATES.items() if update.paged)
"""Optimizers whose state can move between device and host."""


class BlockwiseOptimizer(LocalOptimizer):
    """Applies the update in `UPDATES` that the settings name; `keeps_8bit` decides which states are in 8 bits."""

    def __init__(self, leaves: Sequence[Leaf], settings: OptimSettings) -> None:
        self._leaves, self._settings, self._update = tuple(leaves), settings, UPDATES[settings.name]
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        super().__init__(groups_of(leaves, settings), {"lr": settings.peak_lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all leaves that have a gradient."""
        paged = False
        for leaf in self._leaves:
            if leaf.local.grad is None:
                continue
            if not self.state[leaf.local]:
                self.state[leaf.local] = self.new_state(leaf, 0)
            state = self.state[leaf.local]
            state["step"] += 1
            if leaf.local.numel():
                paged |= self._prefetch(state)
                self._apply(leaf.local.view(-1), leaf.local.grad.reshape(-1), state, self.group_of(leaf))
        if paged:  # the host may access paged memory only once the device has finished with it
            torch.accelerator.synchronize()

    def _apply(
        self, values: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        settings, step, lr, decay = self._settings, state["step"], group["lr"], group["weight_decay"]
        alpha, beta3 = _slow_moment(settings, step) if self._update.kernel == "ademamix" else (0.0, 0.0)
        if state["state1"].dtype == torch.float32:
            functional.optimizer_update_32bit(
                self._update.kernel, gradient, values, state["state1"], settings.beta1, settings.eps, step, lr,
                state["state2"], settings.beta2, beta3, alpha, decay,
            )  # fmt: skip
            return
        missing = state["state1"].shape[-1] - values.numel()
        padded = values if not missing else torch.nn.functional.pad(values, (0, missing))
        functional.optimizer_update_8bit_blockwise(
            self._update.kernel, gradient if not missing else torch.nn.functional.pad(gradient, (0, missing)), padded,
            state["state1"], state["state2"], settings.beta1, settings.beta2, beta3, alpha, settings.eps, step, lr,
            *self._tables_on(values.device), state["absmax1"], state["absmax2"], decay,
        )  # fmt: skip
        if missing:
            values.copy_(padded[: values.numel()])

    def new_state(self, leaf: Leaf, step: int) -> dict[str, Any]:
        """Return a state of zeros, reusing the memory of an existing state: paged memory is never freed.

        All codes are the code of zero, which decodes to zero whatever the absmax. This also sets the padding of the
        last block, which is in no checkpoint.
        """
        state = dict(self.state.get(leaf.local, {})) or self._allocate(leaf)
        for number, code in enumerate(_codes_of_zero(), 1):
            for value in (state.get(f"state{number}"), state.get(f"absmax{number}")):
                if value is not None:
                    value.fill_(code if value.dtype == torch.uint8 else 0)
        return state | {"step": step}

    def _allocate(self, leaf: Leaf) -> dict[str, Any]:
        small = not keeps_8bit(self._settings, leaf.name, leaf.numel)
        length = leaf.local.numel() if small else num_codes(self._settings.name, leaf.local.numel())
        state: dict[str, Any] = {}
        for number, moments in enumerate((self._update.first, self._update.second), 1):
            shape = (length,) if len(moments) == 1 else (len(moments), length)
            dtype = torch.float32 if small else torch.uint8
            state[f"state{number}"] = self._zeros(leaf.local, shape, dtype) if moments else None
            if not small:
                shape = (*shape[:-1], num_blocks(leaf.local.numel()))
                state[f"absmax{number}"] = leaf.local.new_zeros(shape) if moments else None
        return state

    def _zeros(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._update.paged and like.device.type != "cpu" and like.numel() >= PAGED_NUMEL:
            return functional.get_paged(*shape, dtype=dtype, device=like.device)
        return like.new_zeros(shape, dtype=dtype)

    def _prefetch(self, state: dict[str, Any]) -> bool:
        """Prefetch paged states to the device; return whether there are any."""
        paged = [state[key] for key in ("state1", "state2") if getattr(state[key], "is_paged", False)]
        for tensor in paged:
            functional.prefetch_tensor(tensor)
        return bool(paged)

    def _tables_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values of the 256 codes, for signed and unsigned moments; shared by all states."""
        if device not in self._tables:
            signed, unsigned = (functional.create_dynamic_map(signed=s).to(device) for s in (True, False))
            self._tables[device] = signed, unsigned
        return self._tables[device]

    def parts(self, leaf: Leaf) -> list[Part | Blocks]:
        """Return each moment, in 8-bit blocks or in float32."""
        state, local, parts = self.state[leaf.local], leaf.local, []
        for number, moments in enumerate((self._update.first, self._update.second), 1):
            for i, name in enumerate(moments):
                stored = state[f"state{number}"]
                stored = stored.view(len(moments), stored.shape[-1])[i, : local.numel()].view(local.shape)
                if stored.dtype == torch.float32:
                    parts.append(Part(name, stored, leaf.layout.shape))
                    continue
                absmax = state[f"absmax{number}"]
                absmax = absmax.view(len(moments), absmax.shape[-1])[i]
                parts.append(Blocks(name, stored, absmax, self._tables_on(local.device)[number - 1]))
        return parts


@cache
def _codes_of_zero() -> tuple[int, int]:
    """Return the codes of zero, for signed and unsigned moments."""
    signed, unsigned = (int(functional.create_dynamic_map(signed=s).abs().argmin()) for s in (True, False))
    return signed, unsigned


def _slow_moment(settings: OptimSettings, step: int) -> tuple[float, float]:
    """Return AdEMAMix's ``alpha`` and ``beta3`` at a step: bitsandbytes' schedules, as in the paper."""
    alpha, beta3 = settings.alpha, settings.beta3
    if settings.t_alpha:
        alpha = min(step * alpha / settings.t_alpha, alpha)
    if settings.t_beta3:
        low, high, share = math.log(settings.beta1), math.log(beta3), step / settings.t_beta3
        beta3 = min(math.exp((low * high) / ((1 - share) * high + share * low)), beta3)
    return alpha, beta3
