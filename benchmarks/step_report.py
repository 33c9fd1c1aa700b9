"""Tables and plots of what `benchmarks.step` measured: `benchmarks/results/step.md` and `step_*.svg`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsdp_qlora.plan.devices import device_of_driver

Found = dict[str, Any]
GOALS = [
    (2, "ours", "TRL", 2.5),
    (2, "ours, full checkpointing", "TRL, full checkpointing", 2.0),
    (2, "ours", "bare loop", 1.5),
    (2, "ours", "bare loop, eager attention", 1.3),
    (2, "ours", "matrix products alone", 0.5),
    (1, "ours", "bare loop", 2.0),
    (1, "ours", "bare loop, eager attention", 1.4),
    (1, "ours", "matrix products alone", 0.5),
]
"""(ranks, way, the way it is compared with, ratio aimed at)"""


def write_report(folder: Path) -> str:
    """Write the page from every ``step_*.json`` in ``folder``, with its plots; return it."""
    parts = {name: json.loads(file.read_text()) for name in WRITERS if (file := folder / f"step_{name}.json").is_file()}
    text = "# A training step\n\nMeasured by `python -m benchmarks.step`; how: its docstring. `make bench` runs it.\n"
    for name, found in parts.items():
        versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        cores = "" if found["device"].startswith("NVIDIA") else f"{found['cores']} cores of "
        text += f"\n## {TITLES[name]}\n\n{found['date']}, {cores}{found['device']}; {versions}.\n\n"
        text += f"{found['note']}\n\n" if "note" in found else ""
        text += WRITERS[name]([{**row, "device": found["device"]} for row in found["rows"]], folder)
    (folder / "step.md").write_text(text)
    return text


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _peers(rows: list[Found], folder: Path) -> str:
    text = ""
    for ranks in (2, 1):
        mine = [r for r in rows if r["ranks"] == ranks]
        text += f"{ranks} rank(s), {mine[0]['length']} tokens a rank and step:\n\n" + _table(
            ["way", "tokens/s (lowest to highest)", "s/step", "start to first step, s", "memory growth, MB"],
            [
                [
                    r["way"], f"{r['tokens_per_second']:.0f} ({r['lowest']:.0f} to {r['highest']:.0f})",
                    f"{r['step_seconds']:.2f}", f"{r['first_step_seconds']:.1f}", f"{r['growth_bytes'] / 1e6:.0f}",
                ]
                for r in mine
            ],
        ) + "\n"  # fmt: skip
    speed = {(r["ranks"], r["way"]): r["tokens_per_second"] for r in rows}
    goals = []
    for ranks, way, other, aim in GOALS:
        ratio = speed[ranks, way] / speed[ranks, other]
        goals.append([str(ranks), way, other, f"{ratio:.2f}", f"{aim}", "yes" if ratio >= aim else "**no**"])
    text += _table(["ranks", "tokens/s of", "over those of", "ratio", "aimed at", "reached"], goals)
    first = next(r for r in rows if r["way"] == "ours" and r["ranks"] == 2)
    text += f"\nOurs read {first['read'] / 1e6:.0f} MB a rank and gathers {first['gathered'] / 1e6:.0f} MB a rank and "
    text += (
        "step. It is run with `train.compile=true fsdp.adapters=replicated data.packing=true`. What `auto` chose: "
        + "; ".join(f"`{k}` {v}" for k, v in first["choices"].items())
        + ".\n"
    )
    _bars(rows, folder / "step_peers.svg")
    return text + "\n![tokens a second](step_peers.svg)\n"


def _growth(rows: list[Found], folder: Path) -> str:
    text = "A random model as wide as SmolLM2-135M: 4 layers, vocabulary 32,768, r 16, 512 tokens a rank, 2 ranks, but "
    text += "for what is varied. Planned are tensors alone, measured is the growth of the process.\n\n"
    table = [
        [
            r["varied"], str(r["value"]), f"{r['tokens_per_second']:.0f}", f"{r['step_seconds']:.3f}",
            f"{r['growth_bytes'] / 1e6:.0f}", f"{r['planned'] / 1e6:.0f}",
        ]
        for r in rows
    ]  # fmt: skip
    text += _table(["varied", "value", "tokens/s", "s/step", "memory growth, MB", "planned peak, MB"], table)
    _lines(rows, folder / "step_growth.svg")
    return text + "\n![seconds a step](step_growth.svg)\n"


def _start(rows: list[Found], folder: Path) -> str:
    by_way = {r["way"]: r for r in rows}
    table = [[r["way"], f"{r['first_step_seconds']:.1f}", f"{r['growth_bytes'] / 1e6:.0f}"] for r in by_way.values()]
    ours, theirs = by_way["ours"], by_way["trl"]
    time = ours["first_step_seconds"] / theirs["first_step_seconds"]
    growth = ours["growth_bytes"] / theirs["growth_bytes"]
    table.append(["ours, of theirs", f"{time:.2f} (aim: 0.50)", f"{growth:.2f} (aim: 0.60)"])
    return _table(["2 ranks", "process start to end of the first step, s", "memory growth of a rank, MB"], table)


def _auto(rows: list[Found], folder: Path) -> str:
    chosen, *tried = sorted(rows, key=lambda r: r["way"] != "auto")
    tried.sort(key=lambda r: -r["of_auto"])
    table = [
        [r["way"], f"{r['tokens_per_second']:.0f} ({r['lowest']:.0f} to {r['highest']:.0f})",
         f"{r['of_auto']:.2f}", f"{r['growth_bytes'] / 1e6:.0f}"]
        for r in (chosen, *tried)
    ]  # fmt: skip
    header = ["setting", "tokens/s (lowest to highest)", "of `auto` by turns with it", "memory growth, MB"]
    text = _table(header, table)
    return text + "\n`auto` chose: " + "; ".join(f"`{k}` {v}" for k, v in chosen["choices"].items()) + ".\n"


def _large(rows: list[Found], folder: Path) -> str:
    """MFU is that of the model's own operations: what is computed twice does not count."""
    device = device_of_driver(rows[0]["device"])
    flops = next((r["step_flops"] for r in rows if r.get("step_flops")), None)
    table = []
    for r in rows:
        share = flops / r["step_seconds"] / (device.teraflops * 1e12) if flops and device else None
        table.append(
            [
                r["way"], f"{r['tokens_per_second']:.0f}", f"{r['step_seconds']:.3f}",
                "-" if share is None else f"{share:.2f}", f"{r['device_peak_bytes'] / 2**30:.2f}",
                f"{r['planned'] / 2**30:.2f}" if r.get("planned") else "-",
            ]
        )  # fmt: skip
    return _table(["way", "tokens/s", "s/step", "MFU", "peak on the device, GiB", "planned, GiB"], table)


WRITERS = {"peers": _peers, "growth": _growth, "start": _start, "auto": _auto, "large": _large}
TITLES = {
    "peers": "Beside its peers (SmolLM2-135M-Instruct, NF4 base, r 16 on all linears)",
    "growth": "How it grows",
    "start": "From start to first step (1.1 billion weights)",
    "large": "8 billion weights on one device",
    "auto": "What `auto` chooses, beside every combination",
}


def _bars(rows: list[Found], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.42 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    names = [f"{r['way']}, {r['ranks']} rank(s)" for r in rows]
    speeds = [r["tokens_per_second"] for r in rows]
    spread = [[s - r["lowest"] for s, r in zip(speeds, rows, strict=True)],
              [r["highest"] - s for s, r in zip(speeds, rows, strict=True)]]  # fmt: skip
    colours = ["tab:blue" if r["way"].startswith("ours") else "tab:gray" for r in rows]
    axes.barh(names, speeds, xerr=spread, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second")
    figure.savefig(file)


def _lines(rows: list[Found], file: Path) -> None:
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(r["varied"] for r in rows))
    figure = Figure(figsize=(3 * len(kinds), 5), layout="constrained")
    grid = figure.subplots(2, len(kinds))
    for column, kind in enumerate(kinds):
        mine = [r for r in rows if r["varied"] == kind]
        values = [r["value"] for r in mine]
        grid[0][column].plot(values, [r["step_seconds"] for r in mine], "o-")
        grid[0][column].set_title(kind)
        grid[1][column].plot(values, [r["growth_bytes"] / 1e6 for r in mine], "o-", label="measured growth")
        grid[1][column].plot(values, [r["planned"] / 1e6 for r in mine], "s--", label="planned tensors")
        for line in (0, 1):
            grid[line][column].set_ylim(bottom=0)
    grid[0][0].set_ylabel("seconds a step")
    grid[1][0].set_ylabel("MB a rank")
    grid[1][0].legend()
    figure.savefig(file)
