"""The rest of `plan`'s report besides memory: operations, gathering versus computing, advice, search results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from math import ceil
from typing import Any

from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.plan.devices import LINK_SHARE, MFU, Device, Interconnect, find_device, find_interconnect
from fsdp_qlora.plan.layout import slowest_link
from fsdp_qlora.plan.moved import gathered_bytes
from fsdp_qlora.plan.parameters import fates
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.plan.search import Found, best, fastest, search
from fsdp_qlora.plan.sizes import parse_bytes, reserve_bytes
from fsdp_qlora.plan.storage import StorageSettings
from fsdp_qlora.plan.timing import StepTime, flops_per_token, step_time
from fsdp_qlora.shapes.linears import ModelShapes


def report(
    config: RunConfig, plan: TrainPlan, shapes: ModelShapes, simulated_bytes: int | None = None
) -> dict[str, Any]:
    """Return the full report of the `plan` command as JSON: `TrainPlan.to_dict` and estimates.

    Raises:
        ConfigError: if the device or the interconnect is not known.
    """
    device = find_device(config.plan.device) if config.plan.device else None
    gpu = config.plan.gpu or (device.memory if device else None)
    flops = flops_per_token(plan, shapes)
    values = plan.to_dict(gpu, simulated_bytes) | {
        "fates": fates(plan, shapes),
        "kept_on_device_bytes": (plan.memory.kept.all(plan.settings).stays if plan.settings.offload_activations else 0),
        "gpu_bytes": parse_bytes(gpu) if gpu else None,
        "gathered_bytes_per_micro_batch": gathered_bytes(plan.memory, plan.settings),
        "gathered_bytes_per_step": gathered_bytes(plan.memory, plan.settings) * plan.batch.accumulation_steps,
        "flops_per_token": asdict(flops) | {"total": flops.total},
        "device": None,
        "time": None,
        "advice": [],
        "search": None,
    }
    speed = None
    if device is not None:
        own = find_interconnect(config.plan.interconnect or device.interconnect)
        link = slowest_link(own, plan.shard_size, config.launcher.nproc_per_node or plan.world_size)
        time = step_time(plan, shapes, device, link, config.fsdp.prefetch > 0)
        values["device"] = assumptions(config.plan.device or "", device, link)
        values["time"] = time.to_dict()
        values["advice"] = advice(plan, time, config, gpu)
        speed = _speed(plan, shapes, device, link, config.fsdp.prefetch > 0)
    if config.plan.search and gpu is not None:
        values["search"] = _search(plan, shapes, gpu, speed)
    return values


def _speed(
    plan: TrainPlan, shapes: ModelShapes, device: Device, link: Interconnect, prefetch: bool
) -> Callable[[StorageSettings, int], float]:
    def tokens_per_second(settings: StorageSettings, turns: int) -> float:
        return step_time(plan, shapes, device, link, prefetch, settings, turns).tokens_per_second

    return tokens_per_second


def assumptions(name: str, device: Device, link: Interconnect) -> dict[str, Any]:
    """Return the assumptions behind the time estimates."""
    return {
        "name": name,
        "memory": device.memory,
        "bf16_teraflops": device.teraflops,
        "assumed_mfu": MFU,
        "memory_gigabytes_per_second": device.bandwidth,
        "interconnect": link.name,
        "interconnect_gigabytes_per_second": link.rate / 1e9,
        "host_gigabytes_per_second": device.host * LINK_SHARE,
        "assumed_link_share": LINK_SHARE,
    }


def advice(plan: TrainPlan, time: StepTime, config: RunConfig, gpu: str | None) -> list[str]:
    """Return advice for plans in which gathering takes longer than computing."""
    moving, working = time.gather_seconds, time.compute_seconds + time.dequantize_seconds
    if plan.shard_size == 1 or moving <= working:
        return []
    length = plan.settings.max_length
    rows = ceil(time.balanced_tokens / length)
    larger = replace(plan.settings, micro_batch_size=rows)
    peak = plan.memory.plan(larger).peak
    held = f"{peak / 1e9:.1f} GB of tensors"
    if gpu is not None:
        fits = peak + reserve_bytes(peak, gpu) <= parse_bytes(gpu)
        held += ", which fits" if fits else f", which does not fit {gpu}"
    lines = [
        f"gathering takes {moving:.2f} s and computing {working:.2f} s per micro-batch: ranks wait for communication. "
        f"train.micro_batch_size={rows} (of {length} tokens) or as many tokens through data.packing balances them; "
        f"it holds {held}. The global batch is then at least {rows * plan.world_size} rows."
    ]
    if plan.settings.reshard_after_forward:
        kept = plan.memory.plan(replace(plan.settings, reshard_after_forward=False)).peak
        if gpu is not None and kept + reserve_bytes(kept, gpu) <= parse_bytes(gpu):
            lines.append(
                f"fsdp.reshard_after_forward=false gathers once instead of twice and fits: {kept / 1e9:.1f} GB."
            )
    return lines


def _search(
    plan: TrainPlan, shapes: ModelShapes, gpu: str, speed: Callable[[StorageSettings, int], float] | None
) -> dict[str, Any]:
    capacity = parse_bytes(gpu)
    budget = capacity - reserve_bytes(0, gpu)
    tried = search(plan.memory, plan.settings, plan.batch, budget, shapes.max_positions, speed)
    chosen, quickest = best(tried), fastest(tried)
    return {
        "budget_bytes": budget,
        "max_length": plan.settings.max_length,
        "tried": [asdict(f) for f in tried],
        "best": None if chosen is None else asdict(chosen),
        "overrides": [] if chosen is None else _overrides(chosen, plan),
        "fastest": None if quickest is None else asdict(quickest),
        "fastest_overrides": [] if quickest is None else _overrides(quickest, plan),
    }


def _overrides(chosen: Found, plan: TrainPlan) -> list[str]:
    """Return the overrides that apply what the search found."""
    lines = [
        f"train.micro_batch_size={chosen.micro_batch_size}",
        f"train.activation_checkpointing={chosen.checkpointing}",
        f"fsdp.offload={chosen.offload}",
    ]
    if (rows := plan.batch.of_rows(chosen.micro_batch_size).global_batch_size) > plan.batch.global_batch_size:
        lines.append(f"train.global_batch_size={rows}")
    return lines
