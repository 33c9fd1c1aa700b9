"""Folds an adapter's folder into dense weights, one linear or stack of experts at a time, by PEFT's own ``merge``.

Every method that PEFT can merge is merged, in float32, by the code that defines it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fsdp_qlora.adapters.experts import experts_parameters, peft_config, stored_shape, stored_value
from fsdp_qlora.adapters.folder import (
    WEIGHTS_NAME,
    opened_weights,
    read_adapter_config,
    require_shapes,
    stored_modules,
)
from fsdp_qlora.adapters.method import build_method, of_target, scaling_of, shared_names, spelt_out
from fsdp_qlora.adapters.names import IN_FILE, LORA_A, LORA_B, base_name
from fsdp_qlora.adapters.peft_layers import CPU, META, adapted_alone, adapted_layers
from fsdp_qlora.adapters.starts import Start
from fsdp_qlora.adapters.turns import FILE_NAME, read_start
from fsdp_qlora.adapters.whole import within
from fsdp_qlora.errors import ModelError
from fsdp_qlora.files.read import own_file
from fsdp_qlora.load.finite import require_finite
from fsdp_qlora.load.weights import LowRank
from fsdp_qlora.shapes.linears import LinearShape
from fsdp_qlora.shapes.tokens import TOKEN_ROWS

FOLDED_AT_ONCE = 2**26
"""Weights of a stack that are folded at a time."""


def pieces_of(stack: LinearShape, weights: int = FOLDED_AT_ONCE) -> list[slice]:
    """Return which matrices of a stack are folded at a time: of two or more, as PEFT takes one for a linear."""
    number = max(1, stack.count // max(2, weights // stack.numel_each))
    bounds = [stack.count * place // number for place in range(number + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


class _Experts(nn.Module):
    """Some stacked weights, as PEFT's wrapper expects them."""

    def __init__(self, weights: torch.Tensor, is_transposed: bool) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights, requires_grad=False)
        self.is_transposed = is_transposed


class StoredAdapter:
    """A PEFT adapter folder, whose tensors are read when they are needed."""

    def __init__(self, folder: Path) -> None:
        """Read its config and the names of its tensors.

        Raises:
            ModelError: if it is no adapter folder, or one that is not supported.
            SecurityError: if its file of tensors is a link out of the folder.
        """
        self.folder = folder
        self.config = read_adapter_config(folder)
        modules = stored_modules(folder, self.config)
        self._settings = self.config.settings(modules)
        self.modules = [name for name in modules if not self.config.stacked_in(name)]
        """Names of the linears with an adapter."""
        self.stacks = list(self._settings.target_parameters)
        """Names of the stacked weights of experts with an adapter."""
        self._method = build_method(self._settings.method)
        self._file = own_file(folder, WEIGHTS_NAME)
        with opened_weights(self._file) as stored:
            names = list(stored.keys())
        self._whole = {
            base_name(name): name for name in names if name in self.config.biases or within(name, self.config.modules)
        }
        self._tables = [name for name in self.modules if f"{IN_FILE}{name}.lora_embedding_A" in names]

    def require_fits(self, sizes: Mapping[str, tuple[int, int]], stacks: Iterable[LinearShape] = ()) -> None:
        """Check that the file has the tensors that PEFT's own layers have on such linears, and no others.

        Weights of the base that were trained are not looked at.

        Args:
            sizes: as for `fold`, of every linear with an adapter.
            stacks: as for `fold_stack`.

        Raises:
            ModelError: naming the first tensor that is missing, that PEFT would pass over, or that has another shape.
        """
        wanted, beside = self._of_peft(sizes), set(self._whole.values())
        of_stacks: dict[str, tuple[LinearShape, tuple[int, ...]]] = {}
        if stacks := list(stacks):
            experts = experts_parameters(self._method, stacks, self._settings)
            of_stacks = {key: (stack, shape) for stack in stacks for key, shape in experts[stack.name].items()}
        wanted |= {key: shape for key, (_, shape) in of_stacks.items()}
        with opened_weights(self._file) as stored:
            stored.require_equal_copies()
            names = {name for name in stored.keys() if not name.endswith(TOKEN_ROWS)} - beside  # noqa: SIM118
            for odd, what in (
                (wanted.keys() - names, "lacks {} tensor(s) that PEFT has with its settings"),
                (names - wanted.keys(), "holds {} tensor(s) that PEFT passes over with its settings"),
            ):
                if odd:
                    raise ModelError(
                        f"adapter: {self._file} {what.format(len(odd))} (first: {min(odd)}); the file is not whole, or "
                        "its config is of another adapter."
                    )
            shapes = {name: stored.get_slice(name).get_shape() for name in wanted.keys() - of_stacks.keys()}
            for key, (stack, shape) in of_stacks.items():
                shapes[key] = stored_shape(stored, key, shape, stack, self.config.exchanged)
        require_shapes(self._file, wanted, shapes)

    def _of_peft(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that PEFT saves of adapters on such linears, without copies of shared ones.

        Raises:
            ModelError: if PEFT refuses the settings for these linears.
        """
        if not sizes:
            return {}
        names, settings = list(sizes), self._settings
        settings = replace(  # patterns of stacks mean none of these
            settings,
            rank_pattern={name: r for name, r in settings.rank_pattern.items() if name in sizes},
            alpha_pattern={name: alpha for name, alpha in settings.alpha_pattern.items() if name in sizes},
        )
        try:
            config = self._method.peft(names, spelt_out(settings, names), None)
            alone = adapted_alone(config, sizes, META, tables=self._tables)
            state = get_peft_model_state_dict(alone, save_embedding_layers=False)
        except (ValueError, TypeError, NotImplementedError, ArithmeticError) as error:
            raise ModelError(f"adapter: {self.folder} does not fit this base model: {error}") from error
        shared = shared_names()
        ends = tuple(f".{name.rpartition('.')[2]}" for name in shared)
        return {n: tuple(value.shape) for n, value in state.items() if n in shared or not n.endswith(ends)}

    @torch.no_grad()
    def fold(self, name: str, weight: torch.Tensor, sizes: Mapping[str, tuple[int, int]]) -> torch.Tensor:
        """Return the weight of linear ``name`` with its adapter folded in.

        Args:
            name: a linear with an adapter.
            weight: ``[out_features, in_features]``; it is not changed.
            sizes: name -> ``(out_features, in_features)`` of every linear with an adapter: the shared projections of
                some methods fit the largest.

        Returns:
            float32 ``[out_features, in_features]``.

        Raises:
            ModelError: if the adapter's tensors do not fit the linear, or hold values that are not finite.
        """
        first = {size: other for other, size in reversed(list(sizes.items()))}
        linears = {other: size for size, other in first.items()} | {name: sizes[name]}
        settings = of_target(self._settings, name)
        model = adapted_alone(self._method.peft(list(linears), settings, None), linears, CPU, tables=self._tables)
        self._load(model, self._tensors(name), f"{name} {list(weight.shape)}")
        layer = adapted_layers(model)[IN_FILE + name]
        base: nn.Module = layer.get_base_layer()
        base.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
        layer.merge()
        return layer.get_base_layer().weight.detach()  # type: ignore[no-any-return]

    @torch.no_grad()
    def fold_stack(
        self, target: LinearShape, weight: torch.Tensor, stacks: Iterable[LinearShape], at_once: int = FOLDED_AT_ONCE
    ) -> torch.Tensor:
        """Return the stacked weights ``target`` of experts with their adapter folded in.

        PEFT folds some experts at a time: beside the result, only a bounded piece is in memory.

        Args:
            target: stacked weights with an adapter.
            weight: of `LinearShape.stored_shape`; it is not changed.
            stacks: all stacked weights with an adapter, in the model's order, which tells their names in the file.
            at_once: how many weights are folded at a time.

        Returns:
            float32, of the same shape.

        Raises:
            ModelError: if the adapter's tensors do not fit, or hold values that are not finite.
        """
        down, up = self._factors(target, list(stacks))
        folded = weight.to(torch.float32, copy=True)
        settings = of_target(self._settings, target.name)
        for piece in pieces_of(target, at_once):
            experts = _Experts(folded[piece], target.transposed)  # shares the memory of `folded`
            config = peft_config([], ["experts.weights"], settings, None)
            model: Any = get_peft_model(nn.ModuleDict({"experts": experts}), config)  # type: ignore[arg-type]
            factors = down[piece].reshape(-1, down.shape[2]), up[:, :, piece].reshape(up.shape[0], -1)
            names = f"{IN_FILE}experts{LORA_A}", f"{IN_FILE}experts{LORA_B}"
            self._load(model, dict(zip(names, factors, strict=True)), target.name)
            adapted_layers(model)[f"{IN_FILE}experts"].merge()
        return folded

    def _factors(self, target: LinearShape, stacks: list[LinearShape]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A ``[count, r, in]`` and B ``[out, r, count]`` of a stack, float32."""
        wanted = experts_parameters(self._method, stacks, self._settings)[target.name]
        values = []
        with opened_weights(self._file) as stored:
            for key, shape in wanted.items():
                if key not in stored.keys():  # noqa: SIM118
                    raise ModelError(f"adapter: {self._file} has no {key}, an adapter's on {target.name}.")
                value = stored_value(stored, key, shape, target, self.config.exchanged)
                if tuple(value.shape) != tuple(shape):
                    raise ModelError(f"adapter: {key} is {list(value.shape)} in {self._file}, not {list(shape)}.")
                require_finite(value, f"adapter: {key} in {self._file}")
                values.append(value.float())
        down, up = values
        return down.view(target.count, -1, target.in_features), up.view(target.out_features, -1, target.count)

    def _load(self, model: PeftModel, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Fill the adapters of PEFT's model."""
        try:
            loaded = set_peft_model_state_dict(model, dict(tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelError(f"adapter: {self._file} does not fit {what}: {error}") from error
        if loaded.unexpected_keys:
            raise ModelError(f"adapter: {self._file}: PEFT does not know {loaded.unexpected_keys[0]}.")

    def taken(self, name: str) -> LowRank | None:
        """Return what its start took off the weight of a linear before that was stored; None: nothing.

        Raises:
            ModelError: if the folder lacks what it started from.
        """
        if self.config.start is None or name not in self.modules:
            return None
        return self.start_of(name).taken(self.config.start, self.scaling(name))

    def start_of(self, name: str) -> Start:
        """Return what the adapter of a linear started from.

        Raises:
            ModelError: if the folder lacks it.
        """
        return read_start(own_file(self.folder, FILE_NAME), IN_FILE + name)

    def scaling(self, name: str) -> float:
        """Return the factor of the product of LoRA's matrices of a linear."""
        return scaling_of(of_target(self._settings, name))

    def token_rows(self, table: str) -> torch.Tensor | None:
        """Return the trained rows of an embedding or head, ``[len(config.token_ids), hidden_size]``, if it has any."""
        key = f"{IN_FILE}{table}.{TOKEN_ROWS}"
        with opened_weights(self._file) as stored:
            if key not in stored.keys():  # noqa: SIM118
                return None
            rows = stored.get_tensor(key)
        require_finite(rows, f"adapter: {key} in {self._file}")
        return rows

    @property
    def whole_parameters(self) -> Mapping[str, str]:
        """The base's own parameters that were trained: name in the base's files -> name in PEFT's file."""
        return self._whole

    def whole(self, parameter: str) -> torch.Tensor:
        """Return a parameter of the base that was trained (`whole_parameters`)."""
        with opened_weights(self._file) as stored:
            value = stored.get_tensor(self._whole[parameter])
        require_finite(value, f"adapter: {parameter} in {self._file}")
        return value

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the file's tensors of one linear, and those of none."""
        start, shared = f"{IN_FILE}{name}.", shared_names()
        with opened_weights(self._file) as stored:
            own = [key for key in stored.keys() if key.startswith(start) or key in shared]  # noqa: SIM118
            own = [key for key in own if base_name(key) not in self._whole]
            tensors = {key: stored.get_tensor(key).float() for key in own}
        for key, value in tensors.items():
            require_finite(value, f"adapter: {key} in {self._file}")
        return tensors
