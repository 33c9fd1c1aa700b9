"""How fast are rows turned into tokens, beside TRL, and what does the loader cost? `python -m benchmarks.data`.

The same file (the embedded Alpaca rows, repeated) with the same tokenizer and chat template, prepared by turns by
`fsdp_qlora` (`prepare_data`: read, render, mask, tokenize, write Arrow) and by TRL's SFTTrainer (its preparation of a
prompt and completion data set with completion_only_loss), each in a fresh cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.loader import Cut, Loader, TokenRows
from fsdp_qlora.data.pack import best_fit_decreasing
from fsdp_qlora.data.prepare import PreparedData, prepare_data
from fsdp_qlora.files.home import cache_folder


def _write_rows(folder: Path, repeats: int) -> tuple[Path, Path]:
    """Write the rows as ours (messages) and as TRL's (prompt and completion); repeats differ in their first words."""
    source = cache_folder() / "embedded" / "alpaca_en_demo.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    ours, theirs = folder / "messages.jsonl", folder / "pairs.jsonl"
    with ours.open("w") as mine, theirs.open("w") as other:
        for repeat in range(repeats):
            for row in rows:
                prompt = f"{repeat}: " + "\n\n".join(p for p in (row["instruction"], row["input"]) if p)
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]
                mine.write(json.dumps({"messages": turns}) + "\n")
                other.write(json.dumps({"prompt": turns[:1], "completion": turns[1:]}) + "\n")
    return ours, theirs


def _ours(file: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> tuple[float, PreparedData]:
    started = time.perf_counter()
    data = prepare_data(DataSettings(train=str(file), eval_fraction=0.0, max_length=4096), 0, tokenizer, cache)
    return time.perf_counter() - started, data


def _theirs(file: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> tuple[float, int]:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(cast(Any, tokenizer)), **shape))
    processes = os.cpu_count()
    settings = SFTConfig(
        output_dir=str(cache), report_to=[], use_cpu=True, max_length=None, bf16=False, dataset_num_proc=processes
    )
    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    trainer = SFTTrainer(model=model, args=settings, train_dataset=cast(Any, rows), processing_class=tokenizer)
    seconds = time.perf_counter() - started
    return seconds, sum(len(row["input_ids"]) for row in cast(Any, trainer.train_dataset))


def main() -> None:
    """Measure and write benchmarks/results/data.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.md"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(cache_folder() / "embedded" / "smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = _write_rows(folder, options.repeats)
        speeds: dict[str, list[float]] = {"ours": [], "TRL": []}
        for number in range(options.rounds):
            seconds, data = _ours(files[0], tokenizer, folder / f"ours{number}")
            speeds["ours"].append(data.train_counts.tokens / seconds)
            seconds, tokens = _theirs(files[1], tokenizer, folder / f"theirs{number}")
            speeds["TRL"].append(tokens / seconds)
        rows = TokenRows(data.train)
        loader = Loader(rows, global_batch_size=16, cut=Cut(2, rank=0, num_ranks=2), seed=0)
        started = time.perf_counter()
        for position in range(0, 16 * 200, 16):
            loader.batch_at(position)
        per_batch = (time.perf_counter() - started) / 200
    lengths = np.minimum(2048, np.random.default_rng(1).lognormal(5.0, 1.0, 20_000).astype(int) + 8)
    bins = best_fit_decreasing(lengths, 2048)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    text = f"""# Preparing data

`python -m benchmarks.data` ({time.strftime("%Y-%m-%d")}, {os.cpu_count()} CPU cores): {len(rows)} chat rows,
{options.rounds} rounds by turns, fresh caches; medians. What is measured: the docstring of `benchmarks/data.py`.

| | tokens a second | of TRL's |
|---|---|---|
| ours | {medians["ours"]:,.0f} | {medians["ours"] / medians["TRL"]:.2f} |
| TRL, {os.cpu_count()} processes | {medians["TRL"]:,.0f} | 1.00 |

The loader takes {1000 * per_batch:.2f} ms to build a rank's part of a global batch of 16 rows. Packing 20,000 rows of
log-normal lengths (median about 156, cut at 2048) into sequences of 2048 fills
{100 * lengths.sum() / (len(bins) * 2048):.2f} % of them.
"""
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
