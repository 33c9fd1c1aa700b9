"""fsdp_qlora: fine-tune large language models in 4-bit on many GPUs.

The public names, loaded when first used, so that importing the package costs nothing. Imports only what ``python -m``
has loaded before: the current folder is still the first place in which modules are looked for (`module_path`).
"""

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from fsdp_qlora.adapters.lora import attach_lora
    from fsdp_qlora.checkpoint.checkpointer import Checkpointer
    from fsdp_qlora.config.convert import from_dict
    from fsdp_qlora.config.schema import RunConfig
    from fsdp_qlora.distributed.mesh import Ranks, build_ranks
    from fsdp_qlora.export.adapter import export_adapter
    from fsdp_qlora.load.safetensors import SafetensorsFolder
    from fsdp_qlora.load.stream import stream_linear, stream_weights
    from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
    from fsdp_qlora.parallel.shard import mixed_precision, shard_model
    from fsdp_qlora.plan.plan import TrainPlan, make_plan
    from fsdp_qlora.quant.formats import Format, build_format, dequantize, quantize
    from fsdp_qlora.quant.linear import QuantLinear
    from fsdp_qlora.run.decide import plan_for
    from fsdp_qlora.run.fit import fit
    from fsdp_qlora.run.inference import load_for_inference
    from fsdp_qlora.run.prepare import prepare
    from fsdp_qlora.run.prepared import Prepared
    from fsdp_qlora.run.training import FitResult
    from fsdp_qlora.run.world import open_world

_HOME = {
    "SafetensorsFolder": "load.safetensors",
    "stream_linear": "load.stream",
    "mixed_precision": "parallel.shard",
    "build_ranks": "distributed.mesh",
    "Ranks": "distributed.mesh",
    "from_dict": "config.convert",
    "plan_for": "run.decide",
    "open_world": "run.world",
    "Prepared": "run.prepared",
    "prepare": "run.prepare",
    "load_for_inference": "run.inference",
    "Checkpointer": "checkpoint.checkpointer",
    "RunConfig": "config.schema",
    "export_adapter": "export.adapter",
    "FitResult": "run.training",
    "fit": "run.fit",
    "attach_lora": "adapters.lora",
    "shard_model": "parallel.shard",
    "build_skeleton": "model.skeleton",
    "read_shapes": "model.skeleton",
    "stream_weights": "load.stream",
    "TrainPlan": "plan.plan",
    "make_plan": "plan.plan",
    "Format": "quant.formats",
    "build_format": "quant.formats",
    "dequantize": "quant.formats",
    "quantize": "quant.formats",
    "QuantLinear": "quant.linear",
}

__all__ = [
    "Checkpointer",
    "FitResult",
    "Format",
    "Prepared",
    "QuantLinear",
    "Ranks",
    "RunConfig",
    "SafetensorsFolder",
    "TrainPlan",
    "attach_lora",
    "build_format",
    "build_ranks",
    "build_skeleton",
    "dequantize",
    "export_adapter",
    "fit",
    "from_dict",
    "load_for_inference",
    "make_plan",
    "mixed_precision",
    "open_world",
    "plan_for",
    "prepare",
    "quantize",
    "read_shapes",
    "shard_model",
    "stream_linear",
    "stream_weights",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
