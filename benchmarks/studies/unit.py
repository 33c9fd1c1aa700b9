"""Trains one unit and prints its result as JSON: `python -m benchmarks.studies.unit FOLDER OVERRIDE ...`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.rows import CHATS, ELSEWHERE, HELD_OUT, PAIRS, TRAIN, UNRELATED
from fsdp_qlora.cli.compose import compose_config
from fsdp_qlora.cli.outside import embedded_path
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.objectives.contrast import Texts, losses
from fsdp_qlora.objectives.embedding import unpacked
from fsdp_qlora.objectives.objective import token_losses
from fsdp_qlora.run.fit import fit
from fsdp_qlora.run.prepare import prepare
from fsdp_qlora.run.prepared import Prepared

SETTINGS = (
    f"model.name={embedded_path('smollm2-135m-instruct')}", "data.max_length=192", "train.max_steps=24",
    "train.global_batch_size=8", "train.micro_batch_size=4", "train.eval_every=0", "optim.lr=5e-4",
    "schedule.warmup_steps=3", "lora.r=16", "lora.alpha=32", "checkpoint.resume=never", "launcher.device=cpu",
    "data.eval_fraction=0",
)  # fmt: skip
TOGETHER = 8
"""Held-out rows at a time."""


def main(arguments: list[str]) -> int:
    """Train; print one line of JSON."""
    folder, *overrides = arguments
    runs, of_pairs = Path(folder) / "runs", "objective=embedding" in overrides
    rows = Path(folder) / (PAIRS if of_pairs else CHATS)
    fixed = [*SETTINGS, f"data.train={rows / TRAIN}", f"run.output_root={runs}", "run.name=unit"]
    config = compose_config("train", [*fixed, *overrides])
    measure = pair_losses if of_pairs else row_losses
    prepared = prepare(config)
    sets = {file.removesuffix(".jsonl"): rows / file for file in (HELD_OUT, UNRELATED, ELSEWHERE)}
    before = {name: measure(prepared, file) for name, file in sets.items()}
    started = time.process_time()
    summary = fit(prepared).summary
    cpu_seconds = time.process_time() - started
    after = {name: measure(prepared, file) for name, file in sets.items()}
    kept = ("trainable_parameters", "base_parameters", "adapter_bytes", "steps", "tokens", "planned_bytes_per_rank")
    checkpoints = runs / "unit" / "checkpoints"
    print(json.dumps({
        **{key: summary[key] for key in kept},
        "quantized_bytes": sum(rank["quantized_bytes"] for rank in summary["ranks"]),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file()),
        "cpu_seconds": cpu_seconds, "before": before, "after": after,
    }))  # fmt: skip
    prepared.close()
    return 0


@torch.no_grad()
def row_losses(prepared: Prepared, file: Path) -> list[tuple[float, int]]:
    """Return for each row the sum of its tokens' losses and their number."""
    settings = DataSettings(train=str(file), eval_fraction=0.0, max_length=prepared.config.data.max_length)
    data = prepare_data(settings, 0, prepared.tokenizer, cache_folder())
    rows = data.some_rows(0)
    prepared.model.eval()
    losses: dict[int, tuple[float, int]] = {}
    by_length = sorted(range(len(rows)), key=lambda number: rows.lengths[number])
    for start in range(0, len(rows), TOGETHER):
        numbers = by_length[start : start + TOGETHER]
        counts = [int(rows.targets[number]) for number in numbers]
        of_rows = token_losses(prepared.model, rows.collate(numbers, 0)).split(counts)
        losses |= {n: (float(one.sum()), count) for n, one, count in zip(numbers, of_rows, counts, strict=True)}
    return [losses[number] for number in range(len(rows))]


@torch.no_grad()
def pair_losses(prepared: Prepared, file: Path) -> list[tuple[float, int]]:
    """Return each row's loss in finding its second text among those of all rows."""
    assert prepared.data is not None
    settings = DataSettings(train=str(file), eval_fraction=0.0, max_length=prepared.config.data.max_length)
    encoder = prepared.data.encoder
    rows = prepare_data(settings, 0, prepared.tokenizer, cache_folder(), encoder=encoder).some_rows(0)
    objective = build_objective(prepared.settings.objective)
    prepared.model.eval()
    _, observed = objective.observe(prepared.model, rows.collate(list(range(len(rows))), 0))
    anchors, positives = (torch.from_numpy(np.stack([unpacked(row[side]) for row in observed])) for side in (0, 1))
    texts = Texts(anchors, positives, anchors[:0])
    return [(float(loss), 1) for loss in losses(texts, prepared.settings.objective.temperature)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
