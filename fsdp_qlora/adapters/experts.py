"""LoRA on the stacked weights of experts (``lora.target_parameters``), in the layout of PEFT's ``target_parameters``.

PEFT wraps the module that owns the weights, once for each of them: the wrapper of the first weights is inside that of
the second, so their tensors are called ``experts.base_layer.lora_A`` and ``experts.lora_A``. PEFT's own wrapper adds
B @ A to whole dense weights in each forward; `StackedLora` has the same tensors and leaves the product to the experts'
forward (`quant/experts.py`), which adds it token by token.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from fsdp_qlora.adapters.method import Method, build_method, of_target, scaling_of
from fsdp_qlora.adapters.names import ADAPTER, adapter_key
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.errors import PlanError
from fsdp_qlora.quant.experts import set_adapter
from fsdp_qlora.shapes.linears import LinearShape


class StackedLora(nn.Module, LoraLayer):
    """LoRA around an experts module, for one of its stacked weights: ``W_e x + B_e A_e x * scaling`` for expert e.

    A is ``[count * r, in]``, expert by expert; B is ``[out, r * count]``, by rank first and expert second. Both are the
    weights of linears, which are never called.
    """

    def __init__(self, base_layer: nn.Module, target: LinearShape, lora: LoraSettings) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # PEFT knows no experts of ours
            LoraLayer.__init__(self, base_layer)
        self.in_features, self.out_features = target.in_features, target.out_features
        self.count, self.transposed = target.count, target.transposed
        width = target.count * lora.r
        self.lora_A[ADAPTER] = nn.Linear(target.in_features, width, bias=False, device="meta")
        self.lora_B[ADAPTER] = nn.Linear(width, target.out_features, bias=False, device="meta")
        self.r[ADAPTER], self.lora_alpha[ADAPTER] = lora.r, lora.alpha
        self.use_rslora[ADAPTER], self.scaling[ADAPTER] = lora.scales_by_root, scaling_of(lora)
        self._active_adapter = ADAPTER
        set_adapter(self.get_base_layer(), target.name.rpartition(".")[2], self)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return A, B and the factor of their product, or None if adapters are switched off."""
        if self.disable_adapters or ADAPTER not in self.active_adapters:
            return None
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the experts; they ask for `factors`."""
        return self.base_layer(*args, **kwargs)


def attach_experts(base: nn.Module, targets: Iterable[LinearShape], lora: LoraSettings) -> None:
    """Wrap the experts modules of a meta model for each of the stacked weights ``targets``, in the model's order."""
    for target in targets:
        owner = target.name.rpartition(".")[0]
        parent, _, child = owner.rpartition(".")
        settings = of_target(lora, target.name)
        setattr(base.get_submodule(parent), child, StackedLora(base.get_submodule(owner), target, settings))


def experts_parameters(
    method: Method, targets: Sequence[LinearShape], lora: LoraSettings
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, for each target, name in PEFT's file -> shape of its tensors.

    ``targets`` must be in the model's order: of the weights of one module, the last has the outermost wrapper.

    Raises:
        PlanError: if the method trains anything but an A and a B.
    """
    if targets and set(method.shapes(targets[0], lora)) != {"lora_A.weight", "lora_B.weight"}:
        raise PlanError(f"lora.target_parameters: {method.name} has no adapters for experts.")
    owners = [target.name.rpartition(".")[0] for target in targets]
    trained = {}
    for place, (target, owner) in enumerate(zip(targets, owners, strict=True)):
        inside = owner + ".base_layer" * owners[place + 1 :].count(owner)
        shapes = method.shapes(target, of_target(lora, target.name))
        trained[target.name] = {f"base_model.model.{inside}.{name}": shape for name, shape in shapes.items()}
    return trained


def peft_config(
    targets: Sequence[str], parameters: Sequence[str], lora: LoraSettings, task_type: str | None = "CAUSAL_LM"
) -> PeftConfig:
    """Return the PEFT config of adapters on the linears ``targets`` and the stacked weights ``parameters``.

    Patterns must be spelt out (`spelt_out`), as for `Method.peft`.
    """
    config = build_method(lora.method).peft(targets, lora, task_type)
    if parameters:
        assert isinstance(config, LoraConfig), "the plan refuses the others"
        config.target_parameters = list(parameters)
    return config


def short_parameters(targets: Iterable[LinearShape], parameters: Iterable[str]) -> list[str]:
    """Return the targets' last three parts (``mlp.experts.down_proj``) if they match only these, else whole names.

    ``parameters`` are the names of all parameters of the unquantized model.
    """
    names = sorted(target.name for target in targets)
    short = sorted({".".join(name.split(".")[-3:]) for name in names})
    meant = sorted(name for name in parameters if any(name.endswith("." + end) for end in short))
    return short if meant == names else names


EXCHANGED_BEFORE = (0, 19)
"""The release of PEFT from which on A reads the input of stacks ``[count, out, in]``."""


def before_exchange(peft_version: object) -> bool:
    """Whether a file of this PEFT version may have A and B of stacked weights exchanged; if it names none, it may."""
    numbers = re.match(r"(\d+)\.(\d+)", peft_version) if isinstance(peft_version, str) else None
    return numbers is None or (int(numbers[1]), int(numbers[2])) < EXCHANGED_BEFORE


def stacked_tensors(model: nn.Module) -> dict[str, StackedLora]:
    """Return the wrapper of each tensor of the experts' adapters, by its name in PEFT's file."""
    return {
        adapter_key(f"{name}.{part}.{ADAPTER}.weight"): module
        for name, module in model.named_modules()
        if isinstance(module, StackedLora)
        for part in ("lora_A", "lora_B")
    }


def stored_shape(
    stored: Any, name: str, shape: Sequence[int], stack: StackedLora | LinearShape | None, exchanged: bool
) -> tuple[int, ...]:
    """Return the shape that `stored_value` returns a tensor in, without reading it."""
    if (other := _other_half(stored, name, shape, stack, exchanged)) is None:
        return tuple(stored.get_slice(name).get_shape())
    return tuple(reversed(stored.get_slice(other).get_shape()))


def stored_value(
    stored: Any, name: str, shape: Sequence[int], stack: StackedLora | LinearShape | None, exchanged: bool
) -> torch.Tensor:
    """Return a tensor of an open PEFT file, converted if it is one of a stack whose A and B are exchanged.

    Until 0.18, PEFT took the first dimension after the experts' for the input, wherever it is. For stacks
    ``[count, out, in]`` it then stored, with the same sum over r,

        W_e[o, i] += sum of A_old[e, r, o] * B_old[i, r, e]        in place of        B[o, r, e] * A[e, r, i]

    so that each of today's tensors is the other of then, turned. Shapes tell which it is if ``in`` and ``out`` differ;
    else the version does (``exchanged``).
    """
    if stack is None or (half := _other_half(stored, name, shape, stack, exchanged)) is None:
        return stored.get_tensor(name)
    other, count = stored.get_tensor(half), stack.count
    if ".lora_A." in name:  # from B_old [in, r * count]
        return other.view(other.shape[0], -1, count).permute(2, 1, 0).reshape(-1, other.shape[0]).contiguous()
    return other.view(count, -1, other.shape[1]).permute(2, 1, 0).reshape(other.shape[1], -1).contiguous()


def _other_half(
    stored: Any, name: str, shape: Sequence[int], stack: StackedLora | LinearShape | None, exchanged: bool
) -> str | None:
    """Return the name of the tensor that ``name`` must be made of, if A and B are exchanged."""
    if stack is None or stack.transposed or not exchanged:
        return None
    told_by_shapes = stack.in_features != stack.out_features
    if told_by_shapes and tuple(stored.get_slice(name).get_shape()) == tuple(shape):
        return None
    return name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
