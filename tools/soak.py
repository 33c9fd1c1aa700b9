"""Kill and resume, again and again: `python -m tools.soak` (make soak); a short one runs in the tests.

Two warm ranks train a tiny model. Each cycle ends them at a random moment in a random way, the next goes on. At the end
the loss curve must be the uninterrupted one bit for bit, with no step twice or missing.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.publish import complete_checkpoints
from tests import tiny, warm
from tests.build import essence, metrics

WAYS = {
    "kill -9 rank 0": (signal.SIGKILL, [0]),
    "kill -9 rank 1": (signal.SIGKILL, [1]),
    "kill -9 both": (signal.SIGKILL, [0, 1]),
    "SIGTERM to both": (signal.SIGTERM, [0, 1]),
    "SIGUSR1 to rank 1": (signal.SIGUSR1, [1]),
}


@dataclass
class Result:
    """What a soak saw."""

    cycles: int = 0
    resumed_from_a_checkpoint: int = 0
    ways: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    slowest_end: float = 0.0


def soak(cycles: int, seed: int, folder: Path, env: dict[str, str], steps: int, moments: tuple[float, float]) -> Result:
    """Run ``cycles`` cycles of ``moments`` (seconds, from, to) and then to the end; raise AssertionError if it differs.

    Args:
        cycles: how often the run is ended.
        seed: draws moments and ways.
        folder: an empty folder.
        env: environment of the ranks.
        steps: length of the run.
        moments: when after its start a cycle is ended, at random between these.
    """
    began = time.monotonic()
    model = tiny.make_model(folder / "model")
    rows = tiny.write_chat_rows(folder / "rows.jsonl")
    arguments = [
        "train", f"model.name={model}", f"data.train={rows}", "data.eval_fraction=0.1", "data.max_length=64",
        "train.global_batch_size=5", "train.micro_batch_size=1", "lora.r=4", "lora.dropout=0.1", "launcher.device=cpu",
        f"train.max_steps={steps}", "train.eval_every=8", "checkpoint.every_steps=3", "checkpoint.keep_best=1",
    ]  # fmt: skip
    codes, text = warm.run([*arguments, "run.name=whole"], folder, env, timeout=900)
    assert codes == [0, 0], text
    chance, result = random.Random(seed), Result(cycles, steps=steps)
    run = folder / "outputs/split"
    for _ in range(cycles):
        prefix = _lines_of_the_newest_checkpoint(run)
        result.resumed_from_a_checkpoint += bool(prefix)
        way = chance.choice(list(WAYS))
        ranks = warm.start([*arguments, "run.name=split"], folder, env)
        time.sleep(chance.uniform(*moments))
        ranks.kill(*WAYS[way])
        ended = time.monotonic()
        ranks.wait(15)
        result.slowest_end = max(result.slowest_end, time.monotonic() - ended)
        result.ways[way] = result.ways.get(way, 0) + 1
        if prefix:
            assert (run / "metrics.jsonl").read_bytes().startswith(prefix), "lines before a resume have changed"
    codes, text = warm.run([*arguments, "run.name=split"], folder, env, timeout=900)
    assert codes == [0, 0], text
    whole, split = (metrics(folder / "outputs" / name) for name in ("whole", "split"))
    assert [line["step"] for line in split if "loss" in line] == list(range(1, steps + 1))
    assert essence(split) == essence(whole), "the stitched curve is not the uninterrupted one"
    weights = [(folder / f"outputs/{n}/adapter/adapter_model.safetensors").read_bytes() for n in ("whole", "split")]
    assert weights[0] == weights[1]
    result.seconds = time.monotonic() - began
    return result


def _lines_of_the_newest_checkpoint(run: Path) -> bytes:
    """Return the lines of metrics.jsonl up to the newest complete checkpoint, which must be valid."""
    complete = complete_checkpoints(run / "checkpoints")
    if not complete:
        return b""
    manifest = open_checkpoint(complete[-1]).manifest
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    parsed = metrics(run) if lines and lines[-1].endswith(b"\n") else []
    return b"".join(line for line, values in zip(lines, parsed, strict=False) if values["step"] <= manifest.step)


def main() -> None:
    """Run the soak and write what it saw to docs/soak.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/soak.md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "FSDP_QLORA_CACHE": f"{scratch}/cache", "HF_HUB_OFFLINE": "1"}
        result = soak(options.cycles, options.seed, Path(scratch), env, steps=12 * options.cycles, moments=(1.0, 6.0))
    ways = "\n".join(f"| {way} | {count} |" for way, count in sorted(result.ways.items()))
    text = f"""# The last soak

`make soak`, seed {options.seed}, {time.strftime("%Y-%m-%d")}, {os.cpu_count()} CPU cores, 2 gloo ranks.

{result.cycles} times the run was ended at a random moment and started again; {result.resumed_from_a_checkpoint} of the
{result.cycles} starts went on from a checkpoint (the others were ended before the first was complete). The stitched
`metrics.jsonl` of {result.steps} steps is bit-equal to the uninterrupted run's (losses, gradient norms, learning rates,
token counts, held-out losses), no step is twice or missing, lines before a resume stayed byte-identical, and the
adapter's bytes are equal. The ranks were gone at most {result.slowest_end:.1f} s after the blow; all took
{result.seconds:.0f} s.

| ended by | times |
|---|---|
{ways}
"""
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
