"""fsdp_qlora: fine-tune large language models in 4-bit on many GPUs.

The public names, loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsdp_qlora.api import Prepared, load_for_inference, prepare
    from fsdp_qlora.checkpoint.checkpointer import Checkpointer
    from fsdp_qlora.config.schema import RunConfig
    from fsdp_qlora.export.adapter import export_adapter
    from fsdp_qlora.fit import FitResult, fit
    from fsdp_qlora.model.lora import attach_lora
    from fsdp_qlora.model.shard import shard_model
    from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
    from fsdp_qlora.model.stream import stream_weights
    from fsdp_qlora.plan.plan import TrainPlan, make_plan
    from fsdp_qlora.quant.formats import QuantFormat, dequantize, quantize
    from fsdp_qlora.quant.linear import QuantLinear

_HOME = {
    "Prepared": "api",
    "prepare": "api",
    "load_for_inference": "api",
    "Checkpointer": "checkpoint.checkpointer",
    "RunConfig": "config.schema",
    "export_adapter": "export.adapter",
    "FitResult": "fit",
    "fit": "fit",
    "attach_lora": "model.lora",
    "shard_model": "model.shard",
    "build_skeleton": "model.skeleton",
    "read_shapes": "model.skeleton",
    "stream_weights": "model.stream",
    "TrainPlan": "plan.plan",
    "make_plan": "plan.plan",
    "QuantFormat": "quant.formats",
    "dequantize": "quant.formats",
    "quantize": "quant.formats",
    "QuantLinear": "quant.linear",
}

__all__ = [
    "Checkpointer",
    "FitResult",
    "Prepared",
    "QuantFormat",
    "QuantLinear",
    "RunConfig",
    "TrainPlan",
    "attach_lora",
    "build_skeleton",
    "dequantize",
    "export_adapter",
    "fit",
    "load_for_inference",
    "make_plan",
    "prepare",
    "quantize",
    "read_shapes",
    "shard_model",
    "stream_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
