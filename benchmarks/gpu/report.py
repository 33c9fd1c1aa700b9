"""One table of everything that `benchmarks.gpu` measured: merged from the JSON files of the parts that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.facts import Facts
from benchmarks.gpu.parts import PARTS, Row
from fsdp_qlora.plan.devices import device_of_driver

GOAL = 0.10
"""How far plan and simulation may be from what was allocated."""
ANCHORS = (
    ("QLoRA, Llama-3-8B, an A100", "4,140", "42 %", "reported by others"),
    ("QLoRA, Llama-3-8B, an H100", "13,000", "42 %", "computed: that share of an H100's peak"),
    ("bf16 LoRA, Llama-3-8B, an H100", "12,500 to 14,100", "-", "reported by others"),
)
"""What to hold ours against: way, tokens/s of a card, share of the peak, where it is from (issue 18)."""
HEADER = (
    "part", "way", "cards", "tokens/s a card (lowest to highest)", "share of peak, 4 N", "start to first step, s",
    "loading, s", "drawn a rank, GB", "planned, GB", "simulated, GB", "allocated, GB", "reserved, GB",
    "gathered and checked, MB", "remarks",
)  # fmt: skip
LONGEST = 240
DRY = "dry run on a CPU"


def part_file(folder: Path, part: str) -> Path:
    """Return the file of a part's rows."""
    return folder / f"gpu_{part}.json"


def write_report(folder: Path) -> str:
    """Write ``gpu.md`` from every ``gpu_*.json`` in ``folder``; return it."""
    parts = {name: json.loads(file.read_text()) for name in PARTS if (file := part_file(folder, name)).is_file()}
    text = "# On a GPU\n\n"
    if any(_is_dry(part) for part in parts.values()):
        text += "**Rows marked as a dry run ran a tiny model. They show that the script runs, and no GPU's speed.**\n\n"
    text += (
        "Measured by `python -m benchmarks.gpu` (`make bench-gpu`): packed rows of 2,048 random tokens, random weights "
        "drawn on the device from a seed, NF4 with double quantization, r 16 on all linears, AdamW. Docstrings in "
        "`benchmarks/gpu/` say what each figure is.\n\n"
    )
    text += "".join(f"- {line}\n" for line in _heads(parts)) + "\n"
    lines = [line for name, part in parts.items() for row in part["rows"] for line in [_line(name, part, row)]]
    lines += [["anchor", way, "1", speed, share, *["-"] * 8, source] for way, speed, share, source in ANCHORS]
    text += _table(lines) + NOTES
    missing = [name for name in PARTS if name not in parts]
    text += f"\nNot run yet: {', '.join(missing)}.\n" if missing else ""
    (folder / "gpu.md").write_text(text)
    return text


NOTES = f"""
Tokens/s are medians of rounds, real tokens only. The share of the peak is tokens/s x 4 N over the vendor's bf16 peak; N
counts all weights of the base, of experts those that a token is sent to; a forward and a backward without gradients
for a frozen base are 4 N operations a token. Planned and simulated are tensors of the fullest rank; allocated and
reserved are `max_memory_allocated` and `max_memory_reserved` from the first step on. Plan and simulation are to be
within {GOAL:.0%} of what was allocated. "Drawn" stands for bytes read: nothing is read from a disk. A lone rank gathers
nothing, so nothing of it is checked.
"""


def _is_dry(part: dict[str, Any]) -> bool:
    return part["facts"]["accelerator"] is None or part["small"]


def _heads(parts: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each machine: its devices, its libraries, and the parts that ran there."""
    heads: dict[str, list[str]] = {}
    for name, part in parts.items():
        heads.setdefault(_head(part["facts"]), []).append(f"{name} ({part['facts']['date']}, {part['seconds']:.0f} s)")
    return [f"{head}: {', '.join(names)}" for head, names in heads.items()]


def _head(facts: Facts) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    if facts["accelerator"] is None:
        return f"{facts['cores']} cores of {facts['device']}, no accelerator; python {facts['python']}, {libraries}"
    driver = f"driver {facts['driver'] or 'unknown'}, runtime {facts['runtime']}"
    return f"{facts['cards']} x {facts['device']}, {driver}; python {facts['python']}, {libraries}"


def _table(lines: list[list[str]]) -> str:
    rows = [list(HEADER), ["---"] * len(HEADER), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def _line(name: str, part: dict[str, Any], row: Row) -> list[str]:
    ranks, speed, shape = row.get("ranks", 1), row.get("tokens_per_second"), row.get("shape")
    cells = [name, f"{shape}: {row['way']}" if shape else row["way"], str(ranks)]
    if speed is None:
        cells += ["-", "-"]
    else:
        lowest, highest = row["lowest"] / ranks, row["highest"] / ranks
        cells += [f"{speed / ranks:,.0f} ({lowest:,.0f} to {highest:,.0f})", _share(part, row)]
    cells += [_number(row, "first_step_seconds", 1, 1), _number(row, "load_seconds", 1, 1)]
    cells += [_number(row, "read", 1e9, 2)]
    cells += [_number(row, key, 1e9, 2) for key in ("planned", "simulated", "allocated", "reserved")]
    cells += [_number(row, "gather_checked", 1e6, 1)]
    return [*cells, "; ".join(remarks(part, row)) or "-"]


def _number(row: Row, key: str, unit: float, digits: int) -> str:
    return "-" if row.get(key) is None else f"{row[key] / unit:,.{digits}f}"


def _share(part: dict[str, Any], row: Row) -> str:
    """Return the share of the device's peak; nothing for a device whose peak is not known."""
    device = None if _is_dry(part) else device_of_driver(part["facts"]["device"])
    if device is None:
        return "-"
    operations = row["tokens_per_second"] * 4 * row["weights_of_token"] / row["ranks"]
    return f"{operations / (device.teraflops * 1e12):.1%}"


def remarks(part: dict[str, Any], row: Row) -> list[str]:
    """Return what else is to be said of a row: dry run, failure, out of memory, how far off the plan was."""
    said = [DRY if part["facts"]["accelerator"] is None else "tiny model"] if _is_dry(part) else []
    if row.get("out_of_memory"):
        said.append(out_of_memory(row))
    elif "failed" in row:
        said.append(shortened(row["failed"]))
    if "counts" in row:
        said.append(", ".join(f"{n} {verdict}" for verdict, n in row["counts"].items()) + f" in {row['seconds']:.0f} s")
        said += [f"failed: {', '.join(row['failed_tests'])}"] if row["failed_tests"] else []
    for digest in row.get("digests", ()):
        share = digest["differing"] / digest["bytes"]
        same = "a CPU's bytes" if not share else f"{share:.2%} of the bytes differ from a CPU's"
        said.append(f"{digest['format']}: {same} (sha256 {digest['sha256'][:12]})")
    if row.get("allocated") and not row.get("out_of_memory"):
        said += [f"{key} {_off(row, key)}" for key in ("planned", "simulated") if row.get(key)]
    if "simulation_failed" in row:
        said.append(f"simulation: {row['simulation_failed']}")
    if (compiled := row.get("choices", {}).get("train.compile")) is not None:
        said.append(f"compile {compiled}")
    return said


def shortened(text: str) -> str:
    """Return the beginning of a long message; the JSON has all of it."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _off(row: Row, key: str) -> str:
    off = row[key] / row["allocated"] - 1
    return f"{off:+.1%}{'' if abs(off) <= GOAL else ' (**over the goal**)'}"


def out_of_memory(row: Row) -> str:
    """Return by how much the plan was wrong, and what to set."""
    if row.get("planned") is None or not row.get("allocated"):
        return f"out of memory before a plan was known ({row['failed']})"
    planned, allocated = row["planned"] / 1e9, row["allocated"] / 1e9
    wrong = f"the plan is wrong by at least {allocated - planned:.1f} GB" if allocated > planned else "the plan fits"
    wrong += f" (planned {planned:.1f}, allocated {allocated:.1f} GB when it failed)"
    change = f"set {row['smaller']}" if row.get("smaller") else "lower data.max_length, or shard over more cards"
    return f"out of memory: {wrong}; {change} ({row['failed']})"
