"""fsdp_qlora: fine-tune large language models in 4 bits on many GPUs.

Public names are loaded on first use, so importing the package costs nothing. This file imports only modules that
``python -m`` has already loaded, because the current folder is still first on ``sys.path`` (`module_path`).
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers know this name, so typing need not be imported
if TYPE_CHECKING:
    from fsdp_qlora.adapters.lora import attach_lora, initialize_adapters
    from fsdp_qlora.adapters.names import trainable_parameters
    from fsdp_qlora.checkpoint.checkpointer import Checkpointer, Snapshot
    from fsdp_qlora.checkpoint.contents import checkpoint_tensors, optimizer_shapes
    from fsdp_qlora.config.auto import Resume
    from fsdp_qlora.config.optim import OptimSettings, ScheduleSettings
    from fsdp_qlora.config.schema import (
        CheckpointSettings,
        DataSettings,
        DebugSettings,
        FsdpSettings,
        LauncherSettings,
        LoraSettings,
        ModelSettings,
        ObjectiveSettings,
        PrecisionSettings,
        QuantSettings,
        RunConfig,
        RunSettings,
        TrackSettings,
        TrainSettings,
        from_dict,
    )
    from fsdp_qlora.data.deal import deal
    from fsdp_qlora.distributed.mesh import Ranks, build_ranks
    from fsdp_qlora.distributed.process import Placement, process_group
    from fsdp_qlora.distributed.reduce import all_sum, gather_json
    from fsdp_qlora.distributed.seeds import seed_of
    from fsdp_qlora.distributed.shards import row_range
    from fsdp_qlora.export.adapter import export_adapter, gather_adapter, short_targets
    from fsdp_qlora.load.safetensors import SafetensorsFolder
    from fsdp_qlora.load.stream import stream_linear, stream_weights
    from fsdp_qlora.model.construct import parameters_on_meta
    from fsdp_qlora.model.replaceable import replaceable_linears
    from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
    from fsdp_qlora.optim.optimizers import ShardedOptimizer
    from fsdp_qlora.parallel.shard import mixed_precision, shard_model, synchronize_gradients
    from fsdp_qlora.plan.plan import TrainPlan, make_plan
    from fsdp_qlora.quant.formats import Format, build_format, dequantize, quantize, to_rows
    from fsdp_qlora.quant.linear import QuantLinear
    from fsdp_qlora.quant.packing import ROW_WEIGHTS
    from fsdp_qlora.quant.swap import swap_linears
    from fsdp_qlora.run.decide import plan_for
    from fsdp_qlora.run.fit import fit
    from fsdp_qlora.run.inference import load_for_inference
    from fsdp_qlora.run.prepare import prepare
    from fsdp_qlora.run.prepared import Prepared
    from fsdp_qlora.run.training import FitResult
    from fsdp_qlora.run.world import open_world
    from fsdp_qlora.train.progress import Progress

_HOME = {
    "CheckpointSettings": "config.schema",
    "Checkpointer": "checkpoint.checkpointer",
    "DataSettings": "config.schema",
    "DebugSettings": "config.schema",
    "FitResult": "run.training",
    "Format": "quant.formats",
    "FsdpSettings": "config.schema",
    "LauncherSettings": "config.schema",
    "LoraSettings": "config.schema",
    "ModelSettings": "config.schema",
    "ObjectiveSettings": "config.schema",
    "OptimSettings": "config.optim",
    "Placement": "distributed.process",
    "PrecisionSettings": "config.schema",
    "Prepared": "run.prepared",
    "Progress": "train.progress",
    "QuantLinear": "quant.linear",
    "QuantSettings": "config.schema",
    "ROW_WEIGHTS": "quant.packing",
    "Ranks": "distributed.mesh",
    "Resume": "config.auto",
    "RunConfig": "config.schema",
    "RunSettings": "config.schema",
    "SafetensorsFolder": "load.safetensors",
    "ScheduleSettings": "config.optim",
    "ShardedOptimizer": "optim.optimizers",
    "Snapshot": "checkpoint.checkpointer",
    "TrackSettings": "config.schema",
    "TrainPlan": "plan.plan",
    "TrainSettings": "config.schema",
    "all_sum": "distributed.reduce",
    "attach_lora": "adapters.lora",
    "build_format": "quant.formats",
    "build_ranks": "distributed.mesh",
    "build_skeleton": "model.skeleton",
    "checkpoint_tensors": "checkpoint.contents",
    "deal": "data.deal",
    "dequantize": "quant.formats",
    "export_adapter": "export.adapter",
    "fit": "run.fit",
    "from_dict": "config.schema",
    "gather_adapter": "export.adapter",
    "gather_json": "distributed.reduce",
    "initialize_adapters": "adapters.lora",
    "load_for_inference": "run.inference",
    "make_plan": "plan.plan",
    "mixed_precision": "parallel.shard",
    "open_world": "run.world",
    "optimizer_shapes": "checkpoint.contents",
    "parameters_on_meta": "model.construct",
    "plan_for": "run.decide",
    "prepare": "run.prepare",
    "process_group": "distributed.process",
    "quantize": "quant.formats",
    "read_shapes": "model.skeleton",
    "replaceable_linears": "model.replaceable",
    "row_range": "distributed.shards",
    "seed_of": "distributed.seeds",
    "shard_model": "parallel.shard",
    "short_targets": "export.adapter",
    "stream_linear": "load.stream",
    "stream_weights": "load.stream",
    "swap_linears": "quant.swap",
    "synchronize_gradients": "parallel.shard",
    "to_rows": "quant.formats",
    "trainable_parameters": "adapters.names",
}

__all__ = [
    "ROW_WEIGHTS",
    "CheckpointSettings",
    "Checkpointer",
    "DataSettings",
    "DebugSettings",
    "FitResult",
    "Format",
    "FsdpSettings",
    "LauncherSettings",
    "LoraSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimSettings",
    "Placement",
    "PrecisionSettings",
    "Prepared",
    "Progress",
    "QuantLinear",
    "QuantSettings",
    "Ranks",
    "Resume",
    "RunConfig",
    "RunSettings",
    "SafetensorsFolder",
    "ScheduleSettings",
    "ShardedOptimizer",
    "Snapshot",
    "TrackSettings",
    "TrainPlan",
    "TrainSettings",
    "all_sum",
    "attach_lora",
    "build_format",
    "build_ranks",
    "build_skeleton",
    "checkpoint_tensors",
    "deal",
    "dequantize",
    "export_adapter",
    "fit",
    "from_dict",
    "gather_adapter",
    "gather_json",
    "initialize_adapters",
    "load_for_inference",
    "make_plan",
    "mixed_precision",
    "open_world",
    "optimizer_shapes",
    "parameters_on_meta",
    "plan_for",
    "prepare",
    "process_group",
    "quantize",
    "read_shapes",
    "replaceable_linears",
    "row_range",
    "seed_of",
    "shard_model",
    "short_targets",
    "stream_linear",
    "stream_weights",
    "swap_linears",
    "synchronize_gradients",
    "to_rows",
    "trainable_parameters",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
