"""What does loading take on each rank, beside `from_pretrained(load_in_4bit)`? `python -m benchmarks.loading`.

A Llama of 1.1 billion random bf16 weights (the shape of TinyLlama) in files of at most 300 MB is loaded, quantized to
NF4 with double quantization, by 1, 2 and 4 ranks of ours (skeleton, swap, head, adapters, shard, `stream_weights`), and
by two processes that each call `from_pretrained`, by turns; its files are in the page cache. Every rank is a fresh
process. Its time runs from the group's last barrier until all its weights are there; its growth is `ru_maxrss` at the
end over its resident memory after imports and group creation. Threads: cores / ranks (ours loads with one in any case).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
FILE_BYTES = 300_000_000
WORLDS = (1, 2, 4)
PEER_RANKS = 2
Found = list[dict[str, Any]]
"""What each rank measured."""


def _run(way: str, folder: Path, num_ranks: int) -> Found:
    """Start fresh processes; the parent holds no tensors, for ``ru_maxrss`` starts at what a parent had."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)), "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.loading_rank", way, str(folder)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{way} on {num_ranks} ranks failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure(folder: Path, rounds: int) -> tuple[dict[int, list[Found]], list[Found]]:
    """Return what the ranks of ours measured by number of ranks, and those of the peer, in each round."""
    ours: dict[int, list[Found]] = {n: [] for n in WORLDS}
    peer: list[Found] = []
    for number in range(rounds):
        for num_ranks in WORLDS:
            ours[num_ranks].append(_run("ours", folder, num_ranks))
        peer.append(_run("peer", folder, PEER_RANKS))
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return ours, peer


def _worst(rounds: list[Found], key: str) -> float:
    """Return the median over the rounds of the worst rank's value."""
    return statistics.median(max(rank[key] for rank in found) for found in rounds)


def report(ours: dict[int, list[Found]], peer: list[Found], rounds: int) -> str:
    """Return the page of results, with what was aimed at beside what was found."""
    largest = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    alone = _worst(ours[1], "growth")
    rows, misses = [], []
    for num_ranks, found in ours.items():
        seconds, growth, planned = (_worst(found, key) for key in ("seconds", "growth", "planned"))
        read, allowed = _worst(found, "read") / _worst(found, "files"), 1.15 * planned + largest / num_ranks
        rows.append(
            f"| {num_ranks} | {seconds:.1f} | {100 * read:.1f} % | {growth / 1e6:.0f} | {100 * growth / alone:.1f} % | "
            f"{planned / 1e6:.0f} | {allowed / 1e6:.0f} |"
        )
        share = 1 / num_ranks + 0.1
        misses += [f"bytes at {num_ranks}"] * (read > share) + [f"memory at {num_ranks}"] * (growth / alone > share)
        misses += [f"growth over plan at {num_ranks}"] * any(r["growth"] > allowed for ranks in found for r in ranks)
    time_ratio, growth_ratio = (_worst(ours[PEER_RANKS], k) / _worst(peer, k) for k in ("seconds", "growth"))
    misses += ["time beside the peer"] * (time_ratio > 0.5) + ["growth beside the peer"] * (growth_ratio > 0.25)
    table = "\n".join(rows)
    return f"""# What loading takes on each rank

`python -m benchmarks.loading` ({time.strftime("%Y-%m-%d")}, {os.cpu_count()} CPU cores, torch {version("torch")},
transformers {version("transformers")}): a Llama of 1.1 billion weights, {_worst(ours[1], "files") / 1e9:.2f} GB of
bf16 in files of at most 300 MB; the worst rank's figures, medians of {rounds} round(s) by turns. What is measured: the
docstring of `benchmarks/loading.py`.

| ranks | seconds | bytes read, of the files | memory growth, MB | of one rank's | planned shard, MB | at most, MB |
|---|---|---|---|---|---|---|
{table}

"At most" is the planned shard + 15 % + one rank's slice of the largest tensor. Bytes and growth are to be at most 1/N +
10 % of the whole.

| {PEER_RANKS} processes | seconds | memory growth, MB |
|---|---|---|
| ours | {_worst(ours[PEER_RANKS], "seconds"):.1f} | {_worst(ours[PEER_RANKS], "growth") / 1e6:.0f} |
| `from_pretrained(load_in_4bit)` | {_worst(peer, "seconds"):.1f} | {_worst(peer, "growth") / 1e6:.0f} |
| ours, of theirs | {time_ratio:.2f} (aim: 0.50) | {growth_ratio:.2f} (aim: 0.25) |

Missed: {", ".join(misses) or "nothing"}.
"""


def main() -> None:
    """Measure and write benchmarks/results/loading.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "benchmarks.loading_rank", "maker", scratch], check=True)
        text = report(*measure(Path(scratch), options.rounds), options.rounds)
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
