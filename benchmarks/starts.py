"""How long from the command to the end of the first step? `python -m benchmarks.starts [--checks | --before ...]`.

Each way is started by the command line, by turns, round after round: the quickstart's model on two ranks, without
evaluation. Reported are medians over the rounds, and the median of the rounds' ratios with its interval
(`benchmarks.pairs`). Before the first round each way starts once uncounted; it fills the caches of compiled code, data
and twin checks, but for the way that starts each time without compiled code. Compared are layers compiled or not; with
``--checks`` the twin check run, remembered or left out; with ``--before NAME=FOLDER`` checkouts of older commits, and
there the time to import the library as well.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.pairs import Ratio, measured_on
from benchmarks.ranks import ROOT, machine

SETTINGS = (
    "experiment=quickstart", "data.eval_fraction=0", "train.eval_every=0", "train.sample_prompts=[]",
    "train.max_steps=100000", "data.max_length=512", "data.packing=true", "train.micro_batch_size=1",
    "train.global_batch_size=2", "launcher.nproc_per_node=2",
)  # fmt: skip
LIBRARY = "import fsdp_qlora; fsdp_qlora.prepare, fsdp_qlora.fit"


@dataclass(frozen=True)
class Start:
    """One way to start."""

    name: str
    settings: tuple[str, ...]
    code: Path = ROOT
    """Checkout that runs."""
    without_cache: bool = False
    """Whether it finds no compiled code of earlier runs."""
    env: Mapping[str, str] = field(default_factory=dict)

    def seconds(self, scratch: Path) -> float:
        """Start the run; return the seconds to its first step's line in metrics.jsonl, and end it."""
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            folder = Path(place) / "run"
            env = {**os.environ, **self.env, "PYTHONPATH": str(self.code), "HF_HUB_OFFLINE": "1"}
            if self.without_cache:
                env["TORCHINDUCTOR_CACHE_DIR"] = place
            command = [
                sys.executable,
                "-m",
                "fsdp_qlora",
                "train",
                *SETTINGS,
                *self.settings,
                f"run.output_root={place}",
                "run.name=run",
            ]
            log = (scratch / f"{self.name}.txt").open("w")
            started = time.perf_counter()
            with log, subprocess.Popen(command, env=env, cwd=self.code, stdout=log, stderr=log) as run:
                try:
                    self._wait(run, folder / "metrics.jsonl", log.name)
                    return time.perf_counter() - started
                finally:
                    run.send_signal(signal.SIGTERM)
                    run.wait()

    def _wait(self, run: subprocess.Popen[Any], metrics: Path, log: str) -> None:
        while not (metrics.exists() and any(json.loads(line).get("step") == 1 for line in _lines(metrics))):
            if run.poll() is not None:
                raise SystemExit(f"{self.name} ended with {run.returncode}:\n{Path(log).read_text()[-2000:]}")
            time.sleep(0.02)

    def import_seconds(self) -> float:
        """Return the seconds that a process takes which imports the library."""
        started = time.perf_counter()
        env = {**os.environ, "PYTHONPATH": str(self.code)}
        subprocess.run([sys.executable, "-c", LIBRARY], check=True, env=env, cwd=self.code)
        return time.perf_counter() - started


def _lines(metrics: Path) -> list[str]:
    return [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


@dataclass(frozen=True)
class Compared:
    """What a way's seconds are compared with: another way, at most so many times as long and so many seconds more."""

    ours: str
    other: str
    times: float
    more: float


def compiled() -> tuple[list[Start], list[Compared]]:
    """Return the ways with compiled layers and without, and how they should compare."""
    ways = [
        Start("not compiled", ("train.compile=false",)),
        Start("compiled, second start", ("train.compile=true",)),
        Start("compiled, first start", ("train.compile=true",), without_cache=True),
    ]
    second = Compared(ways[1].name, ways[0].name, 1.15, 5.0)
    return ways, [second, Compared(ways[2].name, ways[0].name, float("inf"), 30.0)]


def checked() -> tuple[list[Start], list[Compared]]:
    """Return the ways with the twin check run anew, remembered and left out, and how they should compare."""
    off, auto, always = (Start(f"model.check={how}", ("train.compile=false", f"model.check={how}")) for how in CHECKS)
    anew = Compared(always.name, off.name, float("inf"), 3.0)
    return [off, auto, always], [Compared(auto.name, off.name, float("inf"), 0.2), anew]


CHECKS = ("off", "auto", "always")


def beside(before: Mapping[str, Path]) -> tuple[list[Start], list[Compared]]:
    """Return this checkout's way and those of older ones."""
    now = Start("now", ("train.compile=false",))
    older = [Start(name, now.settings, folder.resolve()) for name, folder in before.items()]
    return [now, *older], [Compared(now.name, way.name, 1.05, float("inf")) for way in older]


def measure(ways: list[Start], rounds: int, scratch: Path, imports: bool) -> dict[str, dict[str, list[float]]]:
    """Start each way by turns; return the seconds of each kind by way."""
    found: dict[str, dict[str, list[float]]] = {"first step": {way.name: [] for way in ways}}
    if imports:
        found["import"] = {way.name: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways if number % 2 else reversed(ways):  # none is always the first
            seconds = {"first step": way.seconds(scratch)}
            if imports:
                seconds["import"] = way.import_seconds()
            if number:  # the first round is not counted
                for kind, value in seconds.items():
                    found[kind][way.name].append(value)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return found


def compare(found: dict[str, dict[str, list[float]]], compared: list[Compared]) -> Iterator[dict[str, Any]]:
    """Yield a row for each comparison of each kind."""
    for kind, seconds in found.items():
        for pair in compared:
            mine, theirs = seconds[pair.ours], seconds[pair.other]
            ratio = Ratio.of(mine, theirs)
            more = statistics.median(a - b for a, b in zip(mine, theirs, strict=True))
            yield {
                "kind": kind, "way": pair.ours, "other": pair.other, "seconds": statistics.median(mine),
                "other_seconds": statistics.median(theirs), "ratio": ratio.median, "low": ratio.low,
                "high": ratio.high, "more": more, "at_most": pair.times, "at_most_more": pair.more,
                "reached": ratio.median <= pair.times and more <= pair.more,
            }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """Return the page."""
    settings = f", with {' '.join(found['settings'])}" if found["settings"] else ""
    lines = [
        "# Starts", "",
        "Measured by `python -m benchmarks.starts`; its docstring says how. Seconds from the command to the end of the "
        f"first step, {found['rounds']} rounds{settings}.", "", measured_on(found), "",
        "| seconds to | of | beside | seconds | ratio (interval) | more | reached |", "| --- " * 7 + "|",
    ]  # fmt: skip
    for row in found["rows"]:
        asked = [f"{row['at_most']} times"] if row["at_most"] < float("inf") else []
        asked += [f"{row['at_most_more']:g} s more"] if row["at_most_more"] < float("inf") else []
        lines.append(
            f"| {row['kind']} | {row['way']} | {row['other']} | {row['seconds']:.1f} and {row['other_seconds']:.1f} | "
            f"{Ratio(row['ratio'], row['low'], row['high'])} | {row['more']:.1f} | "
            f"{'yes' if row['reached'] else '**no**'}, asked: at most {' and '.join(asked)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write ``starts.json`` and ``starts.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", nargs="*", default=[], help="NAME=FOLDER of older checkouts, and no compilation")
    parser.add_argument("--settings", nargs="*", default=[], help="settings for every way, such as model.check=off")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--checks", action="store_true", help="compare the twin check's ways instead")
    options = parser.parse_args()
    before = {name: Path(folder) for name, folder in (text.split("=", 1) for text in options.before)}
    name, (ways, compared) = "starts", compiled()
    if options.checks:
        name, (ways, compared) = "starts_checked", checked()
    elif before:
        name, (ways, compared) = "starts_before", beside(before)
    ways = [replace(way, settings=(*way.settings, *options.settings)) for way in ways]
    with tempfile.TemporaryDirectory() as scratch:
        seconds = measure(ways, options.rounds, Path(scratch), imports=bool(before))
    file = options.out / f"{name}.json"
    found = {
        **machine(),
        "rounds": options.rounds,
        "settings": options.settings,
        "seconds": seconds,
        "rows": list(compare(seconds, compared)),
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
