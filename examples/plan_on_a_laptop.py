"""Plan a run without weights, accelerator or Hydra: settings by hand and a model's config.json -> bytes per rank.

    python examples/plan_on_a_laptop.py MODEL_FOLDER

The folder needs only config.json: the model is built on the meta device, which holds shapes and no numbers. So a 70B
model is planned on a laptop in seconds. The figures are those of the fullest rank.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from fsdp_qlora import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    RunConfig,
    TrainSettings,
    build_skeleton,
    make_plan,
    read_shapes,
)

WORLD_SIZES = (1, 2, 4, 8)


def settings(folder: Path) -> RunConfig:
    """Return the settings that decide the bytes; what is not named keeps the default that `fsdp-qlora` uses."""
    return RunConfig(
        model=ModelSettings(name=str(folder)),
        data=DataSettings(max_length=1024),
        lora=LoraSettings(r=16),
        train=TrainSettings(global_batch_size=16, micro_batch_size=1, activation_checkpointing="full"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes per rank on 1, 2, 4 and 8 ranks.")
    parser.add_argument("model", type=Path, help="folder with a config.json")
    folder = parser.parse_args().model

    model = build_skeleton(folder, torch.bfloat16, attn_implementation="sdpa")
    shapes = read_shapes(model)
    config = settings(folder)
    plans = [make_plan(config, shapes, world_size) for world_size in WORLD_SIZES]

    first = plans[0]
    print(f"{first.base_parameters:,} parameters, {len(first.quantized)} linears in {config.quant.name}, ", end="")
    print(f"{first.trainable_parameters:,} trainable in {len(first.targets)} adapters")
    print(f"{'bytes per rank':<20}" + "".join(f"{f'{n} rank(s)':>18}" for n in WORLD_SIZES))
    for kind in asdict(first.bytes):
        print(f"{kind:<20}" + "".join(f"{getattr(plan.bytes, kind):>18,}" for plan in plans))
    print(f"{'total':<20}" + "".join(f"{plan.bytes.total:>18,}" for plan in plans))
    print(f"{'held at once':<20}" + "".join(f"{plan.peak:>18,}" for plan in plans))
    print(f"{'micro-batches a step':<20}" + "".join(f"{plan.batch.accumulation_steps:>18}" for plan in plans))


if __name__ == "__main__":
    main()
