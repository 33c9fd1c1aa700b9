"""How fast is a training step, beside its peers and the bare matrix products? `python -m benchmarks.step PART ...`.

Each way to train (`benchmarks/step_ways.py`) is started once, every rank a process of its own; then all train some
steps by turns, round after round, on the same batches: rows of real conversations laid end to end, one row a rank and
step, with the masks of assistant-only training. Reported are medians over the rounds of tokens a second (the slowest
rank counts), their spread, seconds from start to the end of the first step, and memory growth: `ru_maxrss` at the end
over that after the imports.

Parts: ``peers`` (SmolLM2-135M, 2 ranks and 1), ``growth`` (ranks, length, layers, rank of the adapters, vocabulary),
``start`` (a model of 1.1 billion weights), ``auto`` (every combination of what ``auto`` decides), ``large`` (for a GPU,
one rank: a Llama of 8 billion random weights, packed rows of 2,048 tokens, two a step; ``--small`` tries the script on
a CPU with a tiny model).

TRL's SFTTrainer also computes entropy and token accuracy in each step; that is part of what it does. Its base, and the
bare loop's, is whole on every rank (DDP); ours is sharded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.ranks import Way, machine
from benchmarks.step_rows import random_llama, save_tokenizer, small_model, write_rows
from benchmarks.step_spec import Spec
from fsdp_qlora.files.home import cache_folder

Found = dict[str, Any]
FAST = {"train": {"compile": "true"}, "data": {"packing": True}, "fsdp": {"adapters": "replicated"}}
"""What a long run on full rows would use: compiled layers, adapters whole on every rank."""
OFF = {"train": {"compile": "false"}, "data": {"packing": True}}


def measure(specs: Mapping[str, Spec], num_ranks: int, length: int, rounds: int, steps: int, logs: Path) -> list[Found]:
    """Start each way, step them by turns, and return a row for each."""
    live = {}
    for name, spec in specs.items():
        print(f"starting {name}, {num_ranks} rank(s) x {length} tokens", file=sys.stderr, flush=True)
        live[name] = Way(spec, num_ranks, logs)
        live[name].steps(1)
    speeds: dict[str, list[float]] = {name: [] for name in live}
    device_peak: dict[str, int] = {}
    growth: dict[str, float] = {}
    for number in range(rounds):
        for name, way in live.items():
            answers = way.steps(steps)
            tokens = num_ranks * length * specs[name].batch * steps
            speeds[name].append(tokens / max(a["seconds"] for a in answers))
            device_peak[name] = max(a.get("allocated", 0) for a in answers)
            growth[name] = max(a["growth"] for a in answers)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for name, way in live.items():
        rows.append(
            {
                "way": name, "ranks": num_ranks, "length": length, "tokens_per_second": statistics.median(speeds[name]),
                "lowest": min(speeds[name]), "highest": max(speeds[name]),
                "step_seconds": num_ranks * length * way.spec.batch / statistics.median(speeds[name]),
                "device_peak_bytes": device_peak[name],
                "first_step_seconds": max(a["first_step"] for a in way.first), "growth_bytes": growth[name],
                "spec": dataclasses.asdict(way.spec), **{k: way.first[0].get(k) for k in KNOWN},
            }
        )  # fmt: skip
        way.close()
    return rows


KNOWN = ("read", "gathered", "planned", "step_flops", "choices")
"""What only ours knows: bytes read, bytes gathered a step, planned peak, operations of a step, what ``auto`` became."""


def peers(scratch: Path, options: argparse.Namespace) -> list[Found]:
    """Compare with TRL, bare loops, our own trainer on a bf16 base, and the matrix products alone."""
    model = str(cache_folder() / "embedded" / "smollm2-135m-instruct")
    rows = scratch / "rows.json"
    write_rows(rows, options.length)
    common = {"model": model, "rows": str(rows)}
    ways = {
        "ours": Spec("ours", **common, overrides=FAST),
        "bare loop": Spec("bare", **common),
        "bare loop, eager attention": Spec("bare", **common, attention="eager"),
        "TRL": Spec("trl", **common),
        "matrix products alone": Spec("roofline", **common),
    }
    variants = {
        "ours, not compiled": Spec("ours", **common, overrides=OFF),
        "ours, debug=plain": Spec("ours", **common, overrides={**OFF, "debug": {"name": "plain"}}),
        "ours, bf16 base": Spec("ours", **common, overrides={**OFF, "quant": {"name": "none"}}),
        "ours, full checkpointing": Spec("ours", **common, overrides=OFF, checkpointing=True),
        "TRL, full checkpointing": Spec("trl", **common, checkpointing=True),
    }
    alone = {k: ways[k] for k in ("ours", "bare loop", "bare loop, eager attention", "matrix products alone")}
    found = []
    for chosen, num_ranks in ((ways, 2), (variants, 2), (alone, 1)):  # all at once would not fit in 24 GB
        found += measure(chosen, num_ranks, options.length, options.rounds, options.steps, scratch)
    return found


GROWTH: dict[str, tuple[str, list[Any]]] = {
    "ranks": ("ranks", [1, 2, 4]),
    "length": ("tokens of a row", [256, 1024, 4096]),
    "layers": ("decoder layers", [2, 4, 8]),
    "r": ("rank of the adapters", [8, 32, 128]),
    "vocabulary": ("vocabulary", [8192, 32768, 131072]),
}
BASE = {"ranks": 2, "length": 512, "layers": 4, "r": 16, "vocabulary": 32768}


def growth(scratch: Path, options: argparse.Namespace) -> list[Found]:
    """Vary one thing at a time on random models as wide as SmolLM2-135M."""
    found = []
    for key, (_, values) in GROWTH.items():
        for value in values:
            at = {**BASE, key: value}
            folder = small_model(scratch / f"{at['layers']}-{at['vocabulary']}", at["layers"], at["vocabulary"])
            rows = scratch / f"rows-{at['length']}-{at['vocabulary']}.json"
            if not rows.exists():
                write_rows(rows, at["length"], 8, at["vocabulary"])
            spec = Spec("ours", str(folder), str(rows), r=at["r"], overrides=OFF)
            (row,) = measure({key: spec}, at["ranks"], at["length"], options.rounds, options.steps, scratch)
            found.append({**row, **at, "varied": key, "value": value})
    return found


def start(scratch: Path, options: argparse.Namespace) -> list[Found]:
    """Take the first steps on a Llama of 1.1 billion weights."""
    from benchmarks.loading_rank import make_model

    folder, rows = scratch / "llama", scratch / "rows.json"
    folder.mkdir()
    make_model(folder)
    save_tokenizer(folder)
    write_rows(rows, 128, 8, 32000)
    lean = {
        **OFF, "quant": {"cache_dequantized": "false"}, "fsdp": {"reshard_after_forward": "true"},
        "launcher": {"keep_freed_memory": False},
    }  # fmt: skip
    ways = {
        "ours": Spec("ours", str(folder), str(rows), overrides=lean),
        "ours, as auto decides": Spec("ours", str(folder), str(rows), overrides=OFF),
        "trl": Spec("trl", str(folder), str(rows)),
    }
    return [row for name, spec in ways.items() for row in measure({name: spec}, 2, 128, 1, 1, scratch)]


def large(scratch: Path, options: argparse.Namespace) -> Iterator[Found]:
    """Compare on the work of an 8B model with TRL (FSDP2, and not) and our own trainer on a bf16 base."""
    length, batch = (64, 2) if options.small else (2048, 2)
    folder = random_llama(scratch / "llama", small=options.small)
    rows = scratch / "rows.json"
    write_rows(rows, length, 8, 4096 if options.small else None)
    common = {"model": str(folder), "rows": str(rows), "batch": batch}
    full = {"data": {"packing": True}, "train": {"compile": "false" if options.small else "auto"}}
    lean = {**full, "quant": {"cache_dequantized": "false"}, "fsdp": {"offload": "activations"}}
    ways = {
        "ours": Spec("ours", **common, overrides=full),
        "ours, bf16 base": Spec("ours", **common, overrides={**full, "quant": {"name": "none"}}),
        "ours, full checkpointing": Spec("ours", **common, overrides=full, checkpointing=True),
        "ours, least memory": Spec("ours", **common, overrides=lean, checkpointing=True),
        "TRL, FSDP2": Spec("trl", **common, fsdp=True),
        "TRL, FSDP2, full checkpointing": Spec("trl", **common, fsdp=True, checkpointing=True),
        "TRL": Spec("trl", **common),
        "TRL, full checkpointing": Spec("trl", **common, checkpointing=True),
        "matrix products alone": Spec("roofline", **common),
    }
    if not torch.cuda.is_available() and not options.ways:
        print("without an accelerator there is no FSDP2 of accelerate's: those ways are left out", file=sys.stderr)
        ways = {name: spec for name, spec in ways.items() if not spec.fsdp}
    chosen = {name: ways[name] for name in options.ways or ways}
    for name, spec in chosen.items():  # one after the other: two do not fit on the device
        yield from measure({name: spec}, 1, length, options.rounds, options.steps, scratch)


def auto(scratch: Path, options: argparse.Namespace) -> list[Found]:
    """Try every combination of what ``auto`` decides, and what it decides."""
    model = str(cache_folder() / "embedded" / "smollm2-135m-instruct")
    rows = scratch / "rows.json"
    write_rows(rows, options.length)
    specs = {"auto": Spec("ours", model, str(rows), overrides={"data": {"packing": True}})}
    for checkpointing, reshard, cache, compiled in COMBINATIONS:
        overrides = {
            "train": {"compile": compiled, "activation_checkpointing": checkpointing}, "data": {"packing": True},
            "fsdp": {"reshard_after_forward": reshard}, "quant": {"cache_dequantized": cache},
        }  # fmt: skip
        name = f"{checkpointing}, reshard {reshard}, cache {cache}, compile {compiled}"
        specs[name] = Spec("ours", model, str(rows), overrides=overrides)
    found, names = [], list(specs)[1:]
    for place in range(0, len(names), 4):  # all at once would not fit in 24 GB; `auto` is in each group, to compare
        chosen = {name: specs[name] for name in ("auto", *names[place : place + 4])}
        group = measure(chosen, 2, options.length, options.rounds, options.steps, scratch)
        for row in group:
            row["of_auto"] = row["tokens_per_second"] / group[0]["tokens_per_second"]
        found += group if not found else group[1:]
    return found


COMBINATIONS = [
    (checkpointing, reshard, cache, compiled)
    for checkpointing in ("none", "selective", "full")
    for reshard in ("false", "true")
    for cache in (("true", "false") if checkpointing == "none" else ("false",))
    for compiled in (("true", "false") if checkpointing == "none" else ("false",))
]
PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterable[Found]]] = {
    "peers": peers, "growth": growth, "start": start, "auto": auto, "large": large,
}  # fmt: skip


def main() -> None:
    """Measure the parts asked for, and write their JSON; the report is written anew from all that is there."""
    from benchmarks.step_report import write_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["peers", "growth", "start", "auto"], help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="large: a tiny model")
    parser.add_argument("--ways", nargs="*", help="large: only these")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (peers, auto)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each way in a round")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for part in options.parts:
        rows: list[Found] = []
        with tempfile.TemporaryDirectory() as scratch:
            for row in PARTS[part](Path(scratch), options):
                rows.append(row)  # written at once: time on a lent device may end
                (options.out / f"step_{part}.json").write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")
    print(write_report(options.out))


if __name__ == "__main__":
    main()
