"""`plan`: what a run would do and hold on each rank, from the model's config alone."""

from __future__ import annotations

import json

from fsdp_qlora.api import plan_for
from fsdp_qlora.cli.launcher import ranks_to_start
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.simulate.step import simulate
from fsdp_qlora.track.console import megabytes, print_table


def run(config: RunConfig) -> int:
    """Print the plan as a table or as JSON; return the exit code."""
    world_size = config.plan.world_size or ranks_to_start(config)
    plan = plan_for(config, world_size)
    simulation = simulate(config, world_size) if config.plan.simulate else None
    found = plan.to_dict(config.plan.gpu, None if simulation is None else simulation.peak_bytes)
    if config.plan.json:
        if simulation is not None:
            found["simulation"] = simulation.to_dict()
        print(json.dumps(found, indent=2))
        return 0
    rows = [(kind.replace("_", " "), megabytes(count)) for kind, count in found["bytes_per_rank"].items()]
    rows.append(("planned peak per rank", megabytes(plan.bytes.total)))
    if simulation is not None:
        rows += simulation.rows(plan.bytes)
    if config.plan.gpu:
        verdict = "fits" if found["fits"] else "does not fit"
        rows.append((f"in {config.plan.gpu}", f"{verdict}, with {megabytes(found['reserve_bytes'])} kept free"))
    rows.append(("ranks", f"{plan.world_size}, {plan.shard_size} of which share one copy of the base"))
    rows.append(("FSDP units", str(found["fsdp_units"])))
    rows.append(("4-bit linears", f"{len(plan.quantized)} ({config.quant.name})"))
    rows.append(("trainable parameters", f"{plan.trainable_parameters:,} of {plan.base_parameters:,}"))
    rows.append(
        (
            "batch",
            f"{plan.batch.global_batch_size} rows a step = {plan.batch.num_micro_batches} micro-batches of "
            f"{plan.batch.micro_batch_size}, {plan.batch.accumulation_steps} on each rank",
        )
    )
    print_table(f"plan for {config.model.name}", rows)
    print(
        "Parameters, statistics, adapters, gradients and optimizer are exact; activations, logits and gather estimates."
    )
    return 0
