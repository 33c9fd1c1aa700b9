"""`PeftMethod`: an adapter method that PEFT's own layers compute, described by PEFT's config alone.

Shapes and initial values are those of the layer that PEFT attaches to a lone linear, on meta or on the CPU, so there is
no second description of them here that could be wrong. `peft_methods.py` has the methods.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from fsdp_qlora.adapters.method import Method, plain_number
from fsdp_qlora.adapters.names import adapter_key
from fsdp_qlora.adapters.peft_layers import CPU, META, adapted_layers, layers_alone
from fsdp_qlora.adapters.saved import Kept, kept_by
from fsdp_qlora.config.choices import PEFT_METHODS
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.distributed.shards import fill_slice
from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import LinearShape

_SHAPES: dict[tuple[str, str, int, int, str], dict[str, tuple[int, ...]]] = {}
"""Shapes by method, last part of the target's name, its size and the settings: a model has few, and many linears."""


class PeftMethod(Method):
    """A method of PEFT's, in PEFT's own layers."""

    layer = None
    keys: ClassVar[Mapping[str, str]] = {}
    """Setting (``r``, ``alpha``, ``dropout``) -> its key in PEFT's config."""
    always: ClassVar[Mapping[str, Any]] = {}
    """Settings of PEFT's config that ours do not have, unless they are among the options."""
    random_start: ClassVar[bool] = False
    """Whether trained tensors start from random values, so that each layer draws its own."""

    def peft(self, targets: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM") -> PeftConfig:
        """Return the PEFT config."""
        given = {"r": lora.r, "alpha": plain_number(lora.alpha), "dropout": lora.dropout}
        values = {key: given[setting] for setting, key in self.keys.items()}
        with warnings.catch_warnings():
            # advice about save_projection=false, which is a choice: `shapes` takes PEFT's warnings for refusals
            warnings.filterwarnings("ignore", message="Specified to not save")
            return self.config(
                task_type=task_type,  # type: ignore[arg-type]
                **{"target_modules": list(targets), **self.always, **values, **lora.options},
            )

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether it has this method's PEFT type."""
        return config.get("peft_type") == self._type

    @property
    def _type(self) -> str:
        return str(self.peft([""], LoraSettings()).peft_type.value)  # type: ignore[union-attr]

    @property
    def reads(self) -> frozenset[str]:
        """Which of ``r`` and ``alpha`` it reads."""
        return frozenset(self.keys) & {"r", "alpha"}

    @property
    def honoured(self) -> frozenset[str]:
        """The keys of an adapter_config.json that this method's settings express."""
        return frozenset({*self.keys.values(), *self.always, *PEFT_METHODS.get(self.name, ())})

    def settings(self, config: Mapping[str, Any]) -> LoraSettings:
        """Return the settings, without targets, that an adapter_config.json of this method expresses."""
        known = {setting: config[key] for setting, key in self.keys.items() if key in config and setting != "dropout"}
        options = {key: config[key] for key in PEFT_METHODS.get(self.name, ()) if key in config}
        return LoraSettings(variant=self.name, options=options, **known)

    def shapes(self, linear: LinearShape, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the trained tensors of the layer that PEFT attaches to such a linear.

        Raises:
            PlanError: if PEFT refuses, or would change the settings.
        """
        if linear.transposed:
            raise PlanError(
                f"lora.variant: {self.name} adapts linears, and {linear.name} is a Conv1D, whose weight is transposed; "
                "choose lora or rslora."
            )
        last = linear.name.rpartition(".")[2]
        key = (self.name, last, linear.out_features, linear.in_features, repr(lora))
        if key not in _SHAPES:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", category=UserWarning, module=r"peft\.")
                try:
                    layer = self._alone(last, (linear.out_features, linear.in_features), lora, META)
                except (ValueError, TypeError, NotImplementedError, ArithmeticError, UserWarning) as error:
                    raise PlanError(
                        f"lora.variant: {self.name} does not fit {linear.name} [{linear.out_features}, "
                        f"{linear.in_features}]: {str(error).rstrip('.')}. Change lora.r, lora.options or "
                        "lora.target_modules."
                    ) from error
            trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
            _SHAPES[key] = {_in_file(name): tuple(p.shape) for name, p in trained.items()}
        return _SHAPES[key]

    def tensor_names(self) -> set[str]:
        """Return the names that tensors of a target may have in PEFT's file: they depend on the settings."""
        names = PEFT_TYPE_TO_TUNER_MAPPING[self._type].tuner_layer_cls.adapter_layer_names  # type: ignore[index]
        return {*names, *(f"{name}.weight" for name in names)}

    def kept(self, linear: LinearShape, lora: LoraSettings) -> Kept:
        """Return what PEFT's layer keeps."""
        last, size = linear.name.rpartition(".")[2], (linear.out_features, linear.in_features)
        return kept_by(self.name, linear, lora, lambda: self._alone(last, size, lora, META))

    def _alone(self, name: str, size: tuple[int, int], lora: LoraSettings, device: torch.device) -> Any:
        config = self.peft([name], lora, None)
        return layers_alone(config, {name: size}, device)[name]

    @torch.no_grad()
    def initialize(self, model: nn.Module, lora: LoraSettings, seed: int, shard_rank: int, shard_size: int) -> None:
        """Give every trained tensor the value that PEFT's constructor gives it, drawn from ``seed`` and the layer."""
        plain = dataclasses.replace(lora, dropout=0.0)
        drawn: dict[tuple[str, int, int], dict[str, torch.Tensor]] = {}
        for name, layer in adapted_layers(model).items():
            size = layer.out_features, layer.in_features  # type: ignore[attr-defined]
            last = name.rpartition(".")[2]
            if self.random_start or (last, *size) not in drawn:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed_of(seed, adapter_key(name)))
                    made = self._alone(last, size, plain, CPU)
                drawn[last, *size] = {n: p.detach() for n, p in made.named_parameters() if p.requires_grad}
            for child, parameter in layer.named_parameters():  # type: ignore[attr-defined]
                if parameter.requires_grad:
                    fill_slice(parameter, drawn[last, *size][child], shard_rank, shard_size)


def _in_file(name: str) -> str:
    return adapter_key(f"base_model.{name}").removeprefix("base_model.")
