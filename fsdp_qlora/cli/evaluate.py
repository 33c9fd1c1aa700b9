"""`evaluate`: loss and metrics on the held-out rows, of the base model alone or with an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fsdp_qlora.cli.ranks import on_ranks
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.files.write import write_json
from fsdp_qlora.run.evaluate import evaluate_prepared
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.world import World


def run(config: RunConfig) -> int:
    """Evaluate; return the exit code."""
    if config.data.train is None:  # `prepare` needs training data; the evaluation rows serve as well
        config = replace(config, data=replace(config.data, train=config.data.eval))
    return on_ranks(config, lambda world: _evaluate(config, world))


def _evaluate(config: RunConfig, world: World) -> int:
    assert not isinstance(config.adapter, dict)  # check_verb
    adapter = Path(config.adapter).expanduser() if config.adapter else None
    result = evaluate_prepared(load_for_inference(config, adapter, world))
    if world.ranks.is_main:
        metrics = "".join(f", {name} {value:.2f}" for name, value in result.metrics.items())
        print(f"loss {result.loss:.4f}{metrics}, {result.target_tokens} supervised tokens")
        if config.evaluate.json:
            values = result.values() | {"target_tokens": result.target_tokens}
            write_json(Path(config.evaluate.json).expanduser(), values)
    return 0
