"""PEFT's adapters on a meta model: attach, initialise the same on any number of ranks.

PEFT gives the config, the file format and the adapter modules. Its dispatcher learns our 4-bit layer through
``LoraConfig._register_custom_module`` (private by name; `tests/unit/test_lora.py` says when it breaks).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from fsdp_qlora.errors import NumericsError
from fsdp_qlora.model.stream import fill_slice
from fsdp_qlora.quant.linear import QuantLinear, local_tensor
from fsdp_qlora.quant.products import multiply

ADAPTER = "default"


class QuantLoraLinear(nn.Module, LoraLayer):
    """LoRA on a `QuantLinear`: ``base(x) + B(A(dropout(x))) * scaling`` (LoRA, https://arxiv.org/abs/2106.09685).

    Attributes:
        fused: whether base and adapter are one product (`quant/products.py`); else they are two, as in PEFT. Dropout
            between the two needs the latter.
        sharing: those that read the same input, if any do.
    """

    def __init__(
        self, base_layer: QuantLinear, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.fused = False
        self.sharing: SharedInput | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., out_features]`` for ``[..., in_features]``."""
        if not self.fused or self.disable_adapters or self.active_adapters != [ADAPTER]:
            return self._apart(x)
        out = products([self], x)[0] if self.sharing is None else self.sharing.product(self, x)
        bias = self.base_layer.bias
        return out if bias is None else out + bias  # type: ignore[operator]

    def _apart(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            if name in self.lora_A:
                # Adapters that FSDP does not gather (fsdp.adapters=replicated) come in float32.
                down, up = (cast(torch.Tensor, m[name].weight).to(x.dtype) for m in (self.lora_A, self.lora_B))
                low = nn.functional.linear(self.lora_dropout[name](x), down)
                out = out + nn.functional.linear(low, up) * self.scaling[name]
        return out


def products(layers: Sequence[QuantLoraLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """Return ``x`` times each layer's matrix and adapter, without biases; one op."""
    down = [cast(torch.Tensor, layer.lora_A[ADAPTER].weight) for layer in layers]
    up = [cast(torch.Tensor, layer.lora_B[ADAPTER].weight) for layer in layers]
    matrices = [cast(QuantLinear, layer.base_layer).for_product(x) for layer in layers]
    return multiply(x, matrices, down, up, [layer.scaling[ADAPTER] for layer in layers])


class SharedInput:
    """Layers that read one input (queries, keys and values): the first that is asked makes the products of all.

    Any input may come: what was made for another tensor is never given, so a layer that does not read the same one
    (cross-attention) is right, too, and only slower.
    """

    def __init__(self, layers: Sequence[QuantLoraLinear]) -> None:
        self.layers = tuple(layers)
        self._input: torch.Tensor | None = None
        self._made: dict[int, torch.Tensor] = {}
        for layer in layers:
            layer.sharing = self

    def product(self, layer: QuantLoraLinear, x: torch.Tensor) -> torch.Tensor:
        """Return ``layer``'s product of ``x``, once; it is let go of."""
        place = self.layers.index(layer)
        if self._input is not x or place not in self._made:
            self._input, self._made = x, dict(enumerate(products(self.layers, x)))
        found = self._made.pop(place)
        if not self._made:
            self._input = None
        return found


SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that read the same input in transformers' models."""


def use_fused_products(model: nn.Module) -> list[SharedInput]:
    """Let adapted linears make one product of base and adapter, and those that read one input theirs together.

    Return the groups of the latter. Adapters with dropout stay as they are: it comes between the two products.
    """
    groups = []
    for parent in list(model.modules()):
        if isinstance(parent, QuantLoraLinear):
            dropout = parent.lora_dropout[ADAPTER]
            parent.fused = not (isinstance(dropout, nn.Dropout) and dropout.p > 0)
    for parent in list(model.modules()):
        for names in SHARED_INPUTS:
            found = [m for n in names if isinstance(m := getattr(parent, n, None), QuantLoraLinear) and m.fused]
            if len(found) > 1 and len({(m.in_features, m.get_base_layer().quant_format) for m in found}) == 1:
                groups.append(SharedInput(found))
    return groups


def lora_config(
    target_modules: Sequence[str], r: int, alpha: float, dropout: float = 0.0, variant: str = "lora",
    task_type: str | None = "CAUSAL_LM",
) -> LoraConfig:  # fmt: skip
    """Return PEFT's config for the adapters."""
    return LoraConfig(
        task_type=task_type,  # type: ignore[arg-type]
        target_modules=list(target_modules),
        r=r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=variant == "rslora",
    )


def attach_lora(
    model: PreTrainedModel, target_modules: Sequence[str], r: int, alpha: float, dropout: float = 0.0,
    variant: str = "lora", task_type: str | None = "CAUSAL_LM",
) -> PeftModel:  # fmt: skip
    """Add LoRA adapters (float32, on meta) to the named linears of a meta model and freeze all else."""
    config = lora_config(target_modules, r, alpha, dropout, variant, task_type)
    config._register_custom_module({QuantLinear: QuantLoraLinear})
    with warnings.catch_warnings():
        # peft warns of a tied embedding that it would have to untie to merge; we neither target nor merge it here
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message="Unsupported layer type .*QuantLinear")  # it is registered above
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    assert isinstance(peft_model, PeftModel)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(name, parameter)`` of what is trained; the names are those of a plain PEFT adapter file."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield adapter_key(name), parameter


def adapter_key(name: str) -> str:
    """Return a parameter's name in PEFT's file: from ``base_model`` on, without the adapter's name."""
    return name[name.index("base_model") :].replace(f".{ADAPTER}.", ".")


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int, shard_rank: int = 0, shard_size: int = 1) -> None:
    """Initialise the adapters as PEFT does (A uniform as `nn.Linear`, B zero), each from a seed of its own name.

    Each tensor is drawn whole on the CPU and sliced, so the values do not depend on the number of ranks.
    """
    for name, parameter in trainable_parameters(model):
        if ".lora_B." in name:
            local_tensor(parameter).zero_()
            continue
        if ".lora_A." not in name:
            raise NumericsError(f"{name}: no initialisation is known for this trainable parameter.")
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        bound = parameter.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)), PEFT's and nn.Linear's own
        whole = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        fill_slice(parameter, whole, shard_rank, shard_size)


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
