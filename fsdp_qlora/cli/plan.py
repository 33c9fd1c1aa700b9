"""`plan`: shows what a run would do and hold on each rank, from the model's config alone."""

from __future__ import annotations

import json
import shlex
from typing import Any

from transformers import PreTrainedModel

from fsdp_qlora.cli.launcher import ranks_to_start
from fsdp_qlora.cli.tables import print_columns, print_table
from fsdp_qlora.config.auto import asked
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.memory import resident_bytes
from fsdp_qlora.model.replaceable import kept_linears
from fsdp_qlora.model.rope import rope_choice
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.plan.choices import KERNELS_KEY
from fsdp_qlora.plan.parameters import alike
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.plan.quantized import describe
from fsdp_qlora.plan.report import report
from fsdp_qlora.run.decide import SHARD_DEGREE, planned
from fsdp_qlora.run.images import IMAGES_KEY
from fsdp_qlora.shapes.linears import ModelShapes
from fsdp_qlora.simulate.step import simulate_here
from fsdp_qlora.track.console import duration, megabytes

Rows = list[tuple[str, str]]
_MOMENTS = {
    "first_layer": "at the first layer",
    "head": "at the head",
    "layer_backward": "in a layer's backward",
    "update": "in the update",
    "images": "while the vision tower reads images",
    "images_backward": "in the vision tower's backward",
    "loading": "while loading, where adapters start",
}
_ON_HOST = {
    "loading": "for loading",
    "offloaded_parameters": "of offloaded parameters",
    "offloaded_activations": "of offloaded activations",
}
_SMALL = "tensors below 1 MiB"
_LEFT = {"none": _SMALL, "full": _SMALL, "selective": f"what selective checkpointing chooses, and {_SMALL}"}
"""What ``fsdp.offload=activations`` does not move, by checkpointing."""
_NUMBERS = {"train.global_batch_size": "rows per step", "train.num_epochs": "epochs", "optim.lr": "learning rate"}
"""Numbers that the plan assumes, or follow from the model, where they are ``auto``."""
_LARGE_NODE = 8
"""Most devices that one usually finds in a node."""


def run(config: RunConfig) -> int:
    """Print the plan as a table or as JSON; return the exit code."""
    here = ranks_to_start(config)  # first: afterwards torch may take the simulated device for the machine's
    world_size = config.plan.world_size or here
    counted, base, plan = planned(config, world_size)
    shapes = read_shapes(base)
    simulation = simulate_here(config, world_size) if config.plan.simulate else None  # nothing is trained afterwards
    figures = report(counted, plan, shapes, None if simulation is None else simulation.peak_bytes)
    figures["model"] = _of_the_model(config, counted, base, shapes)
    figures["process_bytes"] = resident_bytes()
    if config.plan.json:
        if simulation is not None:
            figures["simulation"] = simulation.to_dict()
        print(json.dumps(figures, indent=2))
        return 0
    rows = [
        *_bytes(figures, plan, config),
        *_fates(figures),
        *_model(figures),
        *_work(figures, plan, config),
        *_time(figures),
    ]
    if simulation is not None:
        rows += simulation.rows(plan)
    print_table(f"plan for {config.model.name}", rows)
    print(
        "Parameters, statistics, adapters and optimizer are exact. Gradients, activations, logits and gather are "
        "calculated for the moment at which FSDP and autograd hold the most; not all kinds are held at once."
    )
    if figures["device"]:
        print(_assumed(figures["device"]))
    for line in figures["advice"]:
        print(f"Advice: {line}")
    if figures["search"]:
        _print_search(figures["search"], config)
    return 0


def _of_the_model(
    config: RunConfig, counted: RunConfig, base: PreTrainedModel, shapes: ModelShapes
) -> dict[str, Any]:  # fmt: skip
    """Return what follows from the model's code and names: attention, rotary factors, linears left as they are."""
    kept = kept_linears(base, shapes.layers)
    by_reason = {why: alike(n for n, w in kept.items() if w == why) for why in dict.fromkeys(kept.values())}
    return {
        "attention": counted.model.attn_implementation,
        "attention_asked_for": asked(config.model.attn_implementation) is not None,
        "rope": rope_choice(base.config, config.data.max_length),
        "left_as_they_are": by_reason,
        "without_adapter": alike(shapes.not_adapted),
    }


def _model(figures: dict[str, Any]) -> Rows:
    model = figures["model"]
    how = "as asked" if model["attention_asked_for"] else "auto"
    rows = [("attention", f"{model['attention']} ({how}; confirmed at the start of training)")]
    if model["rope"]:
        rows.append(("rotary embedding", model["rope"]))
    for why, names in model["left_as_they_are"].items():
        rows.append(("left unchanged", f"{_counted(names)}: {why}"))
    if model["without_adapter"]:
        rows.append(("without adapter", f"{_counted(model['without_adapter'])}: PEFT would not load it there"))
    return rows


def _counted(names: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in names.items())


def _bytes(figures: dict[str, Any], plan: TrainPlan, config: RunConfig) -> Rows:
    kinds = figures["bytes_per_rank"].items()
    rows = [(kind.replace("_", " "), megabytes(count)) for kind, count in kinds if count]
    peak = f"{megabytes(figures['peak_planned_bytes'])}, {_MOMENTS[figures['peak_moment']]}"
    rows.append(("planned peak per rank", peak))
    if plan.settings.on_accelerator:
        reserve = f"{megabytes(figures['reserve_bytes'])} for CUDA, NCCL and the allocator"
        rows.append(("framework (reserve)", f"{reserve}: the larger of 1.5 GiB and 6 %"))
    if figures["gpu_bytes"]:
        verdict = "fits" if figures["fits"] else "does not fit"
        simulated = figures["peak_simulated_bytes"]
        left = figures["gpu_bytes"] - (simulated or figures["peak_planned_bytes"]) - figures["reserve_bytes"]
        by = f"{megabytes(abs(left))} {'left' if left >= 0 else 'missing'}"
        by += ", according to the simulation" if simulated else ""
        rows.append((f"in {config.plan.gpu or figures['device']['memory']}", f"{verdict}, {by}"))
    host = figures["host_bytes_per_rank"]
    parts = [f"{megabytes(count)} {_ON_HOST[kind]}" for kind, count in host.items() if count]
    total = f"{megabytes(sum(host.values()))}: " if len(parts) > 1 else ""
    rows.append(("host memory per rank", total + ", ".join(parts)))
    if stays := figures["kept_on_device_bytes"]:
        rows.append(
            (
                "stays on the device",
                f"{megabytes(stays)} of what layers keep for backward: {_LEFT[plan.settings.checkpointing]}",
            )
        )
    rows.append(
        ("process", f"another {megabytes(figures['process_bytes'])} of host memory for Python and its libraries")
    )
    return rows


def _fates(figures: dict[str, Any]) -> Rows:
    return [(f"{fate}: {sum(names.values())}", _counted(names) or "none") for fate, names in figures["fates"].items()]


def _work(figures: dict[str, Any], plan: TrainPlan, config: RunConfig) -> Rows:
    batch, flops = figures["batch"], figures["flops_per_token"]
    gathered = figures["gathered_bytes_per_micro_batch"]
    return [
        ("ranks", _ranks(plan, config)),
        *[("images", f"auto: {choice}") for key, choice in plan.choices.items() if key == IMAGES_KEY],
        *[("shard degree", f"auto: {choice}") for key, choice in plan.choices.items() if key == SHARD_DEGREE],
        ("FSDP units", str(figures["fsdp_units"])),
        ("quantized linears", f"{describe(plan.quantized)}; embedding and head {config.quant.embeddings}"),
        ("trainable parameters", f"{plan.trainable_parameters:,} of {plan.base_parameters:,}"),
        (
            "batch",
            f"{_several(batch['global_rows'], 'row')} per step = {_several(batch['micro_batches'], 'micro-batch')} of "
            f"{batch['micro_batch_rows']} x {batch['max_length']} tokens, {_dealt(plan)}; "
            f"{batch['tokens_per_step']:,} tokens",
        ),
        *[(words, f"auto: {plan.choices[key]}") for key, words in _NUMBERS.items() if key in plan.choices],
        (
            "saving memory",
            f"checkpointing {plan.settings.checkpointing}, offload {config.fsdp.offload}"
            + (f", {len(plan.offloaded)} parameters in host memory" if plan.offloaded else ""),
        ),
        ("kernels", str(plan.choices[KERNELS_KEY])),
        *_start(plan),
        (
            "gathered per rank",
            f"{megabytes(gathered)} per micro-batch, {megabytes(figures['gathered_bytes_per_step'])} per step"
            if gathered
            else "nothing",
        ),
        (
            "operations per token",
            f"{flops['total'] / 1e9:.1f} G: forward {flops['forward'] / 1e9:.1f}, backward "
            f"{flops['backward'] / 1e9:.1f}, recomputed {flops['recompute'] / 1e9:.1f}",
        ),
    ]


def _ranks(plan: TrainPlan, config: RunConfig) -> str:
    """Return how many ranks there are, on how many nodes, and which of them share one copy of the base."""
    total, shared, node = plan.world_size, plan.shard_size, config.launcher.nproc_per_node
    if total == 1:
        return "1"
    nodes = assumed = ""
    if node and total > node:
        nodes = f" on {-(-total // node)} nodes of {'' if total % node == 0 else 'up to '}{node}"
    elif not node and total > _LARGE_NODE:
        assumed = (
            f"; assumed to be on one node (launcher.nproc_per_node={_LARGE_NODE} plans for nodes of {_LARGE_NODE})"
        )
    if shared == 1:
        copies = "each keeps a whole copy of the base"
    elif shared == total:
        copies = "all share one copy of the base"
    else:
        copies = f"{total // shared} copies of the base, each shared by {shared} ranks"
    return f"{total}{nodes}; {copies}{assumed}"


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("h") else "s")


def _dealt(plan: TrainPlan) -> str:
    """Return how many micro-batches each rank runs."""
    batch = plan.batch
    each, whole = batch.accumulation_steps, batch.num_micro_batches
    if plan.world_size == 1 and whole > 1:
        return "one after the other"
    if whole < plan.world_size:
        return f"on {whole} of the {plan.world_size} ranks: the others have nothing to do"
    if empty := each * plan.world_size - whole:
        return f"{each} on each rank, {empty} fewer on the last ranks together"
    return f"{each} on each rank"


def _start(plan: TrainPlan) -> Rows:
    if (start := plan.start) is None:
        return []
    each = start.operations / plan.world_size
    if start.name == "eva":
        return [
            (
                "adapters start from",
                f"training rows (eva): {start.matrices} inputs, shared by the ranks, {each / 1e12:.2f} T operations on "
                f"each for a micro-batch, {megabytes(start.bytes)}; it settles the ranks, planned here at most "
                f"{max(plan.settings.lora.rank_pattern.values(), default=plan.settings.lora.r)}",
            )
        ]
    return [
        (
            "adapters start from",
            f"the base weights ({start.name}): {start.matrices} matrices, by turns, {each / 1e12:.1f} T operations "
            f"on each rank, {megabytes(start.bytes)} for the largest",
        )
    ]


def _time(figures: dict[str, Any]) -> Rows:
    time, device = figures["time"], figures["device"]
    if time is None:
        return []
    parts = f"compute {duration(time['compute_seconds'])}"
    if time["dequantize_seconds"]:
        parts += f", dequantize {duration(time['dequantize_seconds'])}"
    if time["gather_seconds"]:
        parts += f"; gather {duration(time['gather_seconds'])} over {device['interconnect']}"
    if time["copy_seconds"]:
        parts += f"; copies from and to host memory {duration(time['copy_seconds'])}"
    return [
        (f"micro-batch on {device['name']}", f"{duration(time['micro_batch_seconds'])}: {parts}"),
        ("step", f"{duration(time['step_seconds'])}, {time['tokens_per_second']:,.0f} tokens/s over all ranks"),
    ]


def _assumed(device: dict[str, Any]) -> str:
    return (
        f"Times are estimates: {device['bf16_teraflops']:g} TFLOP/s of bf16 at {device['assumed_mfu']:.0%}, "
        f"{device['memory_gigabytes_per_second']:g} GB/s of memory, {device['interconnect']} at "
        f"{device['interconnect_gigabytes_per_second']:g} GB/s, host memory at "
        f"{device['host_gigabytes_per_second']:g} GB/s (links at {device['assumed_link_share']:.0%} of their rate)."
    )


def _print_search(search: dict[str, Any], config: RunConfig) -> None:
    length = search["max_length"]
    header = ["checkpointing", "offload", f"rows of {length}", "planned peak", "host memory", "longest row"]
    header += ["most tokens", "tokens/s"]
    lines = []
    for tried in search["tried"]:
        speed = tried["tokens_per_second"]
        lines.append(
            [
                tried["checkpointing"],
                tried["offload"],
                str(tried["micro_batch_size"]) if tried["fits"] else "does not fit",
                megabytes(tried["peak_bytes"]),
                megabytes(tried["host_bytes"]) if tried["host_bytes"] else "",
                str(tried["longest"]),
                str(tried["tokens"]),
                "" if speed is None else f"{speed:,.0f}",
            ]
        )
    count = sum(tried["tried"] for tried in search["tried"])
    print_columns(
        f"tried: {count} micro-batches in {megabytes(max(0, search['budget_bytes']))} of tensors", header, lines
    )
    if search["best"] is None:
        print(
            f"Nothing fits, not even one row of {length} tokens; try more ranks, a shorter length, "
            "quant.embeddings=nf4."
        )
    else:
        print(f"The cheapest that fits: {shlex.join(search['overrides'])}")
    if search["fastest"] is not None and search["fastest"] != search["best"]:
        host = search["fastest"]["host_bytes"]
        more = f" ({megabytes(host)} of host memory per rank)" if host else ""
        print(f"The fastest by estimate: {shlex.join(search['fastest_overrides'])}{more}")
