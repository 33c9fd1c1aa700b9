"""A whole run as a library, without Hydra: settings by hand -> `prepare` -> `fit` -> a PEFT adapter.

    python examples/library_run.py MODEL_FOLDER DATA.jsonl OUT_FOLDER
    torchrun --nproc-per-node 2 examples/library_run.py MODEL_FOLDER DATA.jsonl OUT_FOLDER

The same file runs on one process and under torchrun: `prepare` opens the process group that it finds in the
environment. Every rank makes the same calls; rank 0 writes.
"""

import argparse
from pathlib import Path

from fsdp_qlora import (
    CheckpointSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    RunConfig,
    RunSettings,
    TrainSettings,
    fit,
    prepare,
)


def settings(model: str, data: Path, out: Path, steps: int) -> RunConfig:
    """Return the run's settings; what is not named keeps the default that `fsdp-qlora train` uses."""
    return RunConfig(
        run=RunSettings(name=out.name, output_root=str(out.parent), seed=0),
        model=ModelSettings(name=model),
        data=DataSettings(train=str(data), eval_fraction=0.1, max_length=256),
        lora=LoraSettings(r=8, alpha=16),
        train=TrainSettings(max_steps=steps, global_batch_size=4, micro_batch_size=1),
        optim=OptimSettings(lr=5e-4),
        checkpoint=CheckpointSettings(resume="never"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model as a library.")
    parser.add_argument("model", help="folder of the base model, or its hub name")
    parser.add_argument("data", type=Path, help="rows to learn from (JSONL, JSON or Parquet)")
    parser.add_argument("out", type=Path, help="folder of the run; the adapter goes to OUT/adapter")
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()

    prepared = prepare(settings(asked.model, asked.data, asked.out.absolute(), asked.steps))
    result = fit(prepared)
    if prepared.ranks.is_main:
        summary = result.summary
        for rank in summary["ranks"]:
            print(f"rank {rank['rank']}: read {rank['bytes_read']:,} bytes, holds {rank['quantized_bytes']:,} in 4-bit")
        print(f"held-out loss {summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f}")
        print(f"{summary['trainable_parameters']:,} parameters trained; adapter in {asked.out / 'adapter'}")
    prepared.close()


if __name__ == "__main__":
    main()
