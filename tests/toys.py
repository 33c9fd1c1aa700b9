"""A format, an adapter method and an objective that do not ship: what `test_seams.py` measures the seams by.

The examples of CONTRIBUTING's "How to add": each registers itself and needs at most 40 lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import HiraConfig
from torch import nn

from fsdp_qlora import adapters, objectives
from fsdp_qlora.adapters import LoRA
from fsdp_qlora.adapters.linear import QuantLoraLinear
from fsdp_qlora.adapters.names import ADAPTER
from fsdp_qlora.adapters.peft_method import PeftMethod
from fsdp_qlora.data.labels import ROWS, TOKENS
from fsdp_qlora.objectives import Objective, token_losses
from fsdp_qlora.quant import formats
from fsdp_qlora.quant.formats import Format
from fsdp_qlora.quant.packing import bits_to_float


@formats.register
@dataclass(frozen=True)
class Row8(Format):
    """A matrix's rows in 8 bits, each scaled by its largest value."""

    name = "row8"
    storage_dtype = torch.int8

    def row_bytes(self, in_features):
        return in_features

    def quantize_run(self, weights, in_features):
        rows = weights.view(-1, in_features).float()
        absmax = rows.abs().amax(dim=1)
        return torch.round(rows * (127 / absmax.clamp(min=1e-12))[:, None]).to(torch.int8), absmax

    def dequantize(self, quantized, shape, dtype):
        scaled = quantized.packed.float() * bits_to_float(quantized.absmax) / 127
        return scaled.to(dtype).view(shape)


class ScaledLinear(QuantLoraLinear):
    """LoRA whose product is multiplied by a trained number for each output."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_scale = nn.ParameterDict({ADAPTER: torch.ones(self.out_features, device="meta")})

    def forward(self, x):
        base = self.base_layer(x)
        return base + (self._apart(x) - base) * self.lora_scale[ADAPTER].to(x.dtype)


@adapters.register
class Scaled(LoRA):
    """LoRA with a third tensor."""

    name = "scaled"
    layer = ScaledLinear

    def shapes(self, linear, lora):
        return super().shapes(linear, lora) | {"lora_scale": (linear.out_features,)}

    def recognizes(self, config):
        return False  # no config of PEFT's says so

    def initial(self, name, shape, generator):
        return torch.ones(tuple(shape)) if name.endswith("lora_scale") else super().initial(name, shape, generator)


@adapters.register
class HiRA(PeftMethod):
    """A method of PEFT's that does not ship: the Hadamard product of the weight and a low-rank one."""

    name = "hira"
    config = HiraConfig
    keys: ClassVar = {"r": "r"}
    random_start = True


@objectives.register
class Squared(Objective):
    """Squared losses of tokens, and the losses of a row: sums with two weights."""

    name = "squared"

    def sums(self, model, micro_batch):
        losses = token_losses(model, micro_batch)
        return {"squares": (losses.square().sum(), TOKENS), "of_rows": (0.01 * losses.sum(), ROWS)}

    def metrics(self, loss, means):
        return {"of_rows": means["of_rows"]}
