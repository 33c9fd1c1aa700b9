"""Measures a run's speed beyond tokens per second: a profile of some steps, and the share of peak performance."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.distributed.reduce import gather_json, on_every, on_main
from fsdp_qlora.files.write import write_json
from fsdp_qlora.parallel.shard import model_dtype
from fsdp_qlora.plan.devices import Device, device_of_driver
from fsdp_qlora.profile.modules import record_modules, scoped_modules
from fsdp_qlora.profile.phases import WAITING
from fsdp_qlora.profile.profiler import StepProfiler
from fsdp_qlora.profile.roofline import GemmTimes, mfu, time_gemms
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.track.meter import Meter

SUMMED = "seconds of a step by phase; they add up to step_seconds"


class Profiling:
    """The profiler and the meter of a run; every rank must construct it at the same point."""

    def __init__(self, prepared: Prepared, run_folder: Path) -> None:
        self._prepared, self._folder = prepared, run_folder / "profile"
        debug, ranks = prepared.config.debug, prepared.ranks
        self.profiler: StepProfiler | None = None
        self._gemms: GemmTimes | None = None
        if debug.name == "profile":
            scoped = partial(record_modules, scoped_modules(prepared.model.base))
            self.profiler = on_every(
                lambda: StepProfiler(
                    self._folder, ranks.rank, ranks.device, debug.warmup_steps, debug.record_steps, scoped
                ),
                ranks,
            )
        self.meter = self._meter()

    def _meter(self) -> Meter:
        prepared, ranks = self._prepared, self._prepared.ranks
        device = known_device(ranks.device)
        if device is not None and prepared.config.precision.name == "bf16":  # known peak rates are for bf16
            return Meter(partial(mfu, prepared.plan, prepared.shapes, device, ranks.size))
        if self.profiler is None or ranks.device.type != "cpu":
            return Meter()
        prepared.ranks.phases.enter("timing matrix products alone")
        self._gemms = time_gemms(
            prepared.plan, prepared.shapes, ranks, model_dtype(prepared.config.precision.name),
            usual_tokens(prepared), prepared.config.train.logits_chunk,
        )  # fmt: skip
        return Meter(partial(self._gemms.share, ranks.size))

    def finish(self) -> dict[str, Any] | None:
        """Write ``profile/phases.json`` and return the part for the summary. Every rank calls it."""
        if self.profiler is None:
            return None
        profiler, ranks = self.profiler, self._prepared.ranks
        self._prepared.ranks.phases.enter("reading the profile")
        profiler.close()
        results = gather_json(on_every(profiler.result, ranks), ranks)
        if not all(results):
            return None
        whole = {"meaning": SUMMED, "ranks": results}
        if self._gemms is not None:
            whole["matrix_products_alone"] = self._gemms.to_dict()
        on_main(lambda: write_json(self._folder / "phases.json", whole), ranks)
        # The ranks step together, so the slowest is not the one with the longest step but the one that waits least.
        slowest = min(results, key=lambda one: one["phases"][WAITING])
        shown = [results[0]] if slowest["rank"] == 0 else [results[0], slowest]
        return {**whole, "ranks": shown, "slowest_rank": slowest["rank"], "folder": str(self._folder)}


def known_device(device: torch.device) -> Device | None:
    """Return the specifications of this rank's GPU; None on a CPU or an unknown GPU."""
    if device.type == "cpu":
        return None
    return device_of_driver(torch.get_device_module(device).get_device_name(device))


def usual_tokens(prepared: Prepared) -> int:
    """Return the number of tokens in a typical micro-batch."""
    assert prepared.data is not None
    train, counts, longest = prepared.config.train, prepared.data.train_counts, prepared.config.data.max_length
    if train.micro_batch_tokens:
        return train.micro_batch_tokens
    whole = prepared.config.data.packing or not counts.kept  # no row of a stream is known yet
    return train.micro_batch_size * (longest if whole else max(1, round(counts.tokens / counts.kept)))
