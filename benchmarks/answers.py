"""How fast are answers? `python -m benchmarks.answers`: `generate.prompts` beside transformers' own `generate`.

Both answer the same batches of prompts greedily, padded on the left, with a KV cache, 32 new tokens each, on the same
weights in 16, 8 and 4 bits, with the adapter on top (theirs: bitsandbytes and PEFT) and merged (`export what=merged`).
One process, by turns: each pair of turns is one batch, and gives one ratio of seconds and one of the process's CPU
time. On a machine with other work read the latter, with ``--threads 1``: waiting threads spin. Loading is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.pairs import PAIRS, Ratio, measured_on
from benchmarks.ranks import machine
from fsdp_qlora.config.schema import GenerateSettings, RunConfig, from_dict
from fsdp_qlora.files.home import cache_folder
from fsdp_qlora.inference.batches import Row, answer_batch
from fsdp_qlora.inference.end_of_turn import EndOfTurn
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.merge import merge
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.world import open_world

ROWS, NEW_TOKENS = 16, 32
BITS: dict[str, dict[str, Any]] = {
    "none": {}, "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16},
}  # fmt: skip
Answer = Callable[[list[list[int]]], list[str]]


def write_adapter(base: Path, folder: Path) -> Path:
    """Save a LoRA of rank 16 with random values on all linears of the decoder layers."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.002)
    model.save_pretrained(str(folder))
    return folder


def settings(model: Path, quant: str, threads: int = 0) -> RunConfig:
    """Return the settings of one process."""
    return from_dict({
        "launcher": {"threads_per_rank": threads},
        "model": {"name": str(model)}, "quant": {"name": quant, "double_quant": quant == "nf4"},
        "precision": {"name": "bf16"}, "export": {"merge_base": "original"},
    })  # fmt: skip


def ours(prepared: Prepared, tokenizer: Any) -> Answer:
    """Return what answers with this package."""
    wanted = GenerateSettings(max_new_tokens=NEW_TOKENS)

    def run(prompts: list[list[int]]) -> list[str]:
        rows = [Row(number, ids) for number, ids in enumerate(prompts)]
        texts = answer_batch(prepared.model, tokenizer, EndOfTurn([]), rows, wanted)
        return [texts[number] for number in range(len(rows))]

    return run


def theirs(model: Path, quant: str, adapter: Path | None, tokenizer: Any) -> Answer:
    """Return what answers with transformers, bitsandbytes and PEFT."""
    packed = {"quantization_config": BitsAndBytesConfig(**BITS[quant])} if BITS[quant] else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map={"": "cpu"}, **packed)
    loaded.generation_config.eos_token_id = None
    loaded = loaded if adapter is None else PeftModel.from_pretrained(loaded, str(adapter))
    loaded.eval()

    @torch.no_grad()
    def run(prompts: list[list[int]]) -> list[str]:
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        out = loaded.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    return run


def compare(ways: dict[str, Answer], batches: list[list[list[int]]]) -> dict[str, Any]:
    """Answer the batches by turns; return the medians of seconds and the ratio of speeds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    equal = total = 0
    for number, batch in enumerate([batches[0], *batches]):  # the first is not counted: kernels are made for it
        texts = {}
        for name in list(ways) if number % 2 else reversed(ways):
            started, worked = time.perf_counter(), time.process_time()
            texts[name] = ways[name](batch)
            if number:
                seconds[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - worked)
        equal += sum(a == b for a, b in zip(*texts.values(), strict=True))
        total += len(batch)
    mine, other = seconds.values()
    ratio, cpu = Ratio.of(other, mine), Ratio.of(*reversed(busy.values()))
    return {
        "ratio": ratio.median, "low": ratio.low, "high": ratio.high, "cpu_ratio": cpu.median, "cpu_low": cpu.low,
        "cpu_high": cpu.high, "equal": equal, "answers": total,
        "tokens_per_second": ROWS * NEW_TOKENS / statistics.median(mine),
        "other_tokens_per_second": ROWS * NEW_TOKENS / statistics.median(other),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Return the comparisons as a table."""
    lines = [
        "| base | adapter | ours, tokens/s | transformers, tokens/s | speeds (interval) | of CPU time | equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = Ratio(row["ratio"], row["low"], row["high"])
        cpu = Ratio(row["cpu_ratio"], row["cpu_low"], row["cpu_high"])
        lines.append(
            f"| {row['quant']} | {row['adapter']} | {row['tokens_per_second']:.0f} | "
            f"{row['other_tokens_per_second']:.0f} | {ratio} | {cpu} | {row['equal']} of {row['answers']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write benchmarks/results/answers.md and answers.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--quant", nargs="*", default=list(BITS), choices=list(BITS))
    options = parser.parse_args()
    base = cache_folder() / "embedded" / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (cache_folder() / "embedded" / "alpaca_en_demo.jsonl").read_text("utf-8").splitlines()
    asked = [json.loads(line) for line in lines[: ROWS * options.pairs]]
    asked = [[{"role": "user", "content": f"{row['instruction']} {row['input']}".strip()}] for row in asked]
    texts = [tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for messages in asked]
    prompts = sorted(tokenizer(texts)["input_ids"], key=len)
    batches = [prompts[start : start + ROWS] for start in range(0, len(prompts), ROWS)]
    measured: dict[str, Any] = {**machine(), "pairs": options.pairs, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        adapter, merged = write_adapter(base, Path(scratch) / "adapter"), Path(scratch) / "merged"
        world = open_world(settings(base, "none"))
        with world.stack:
            merge(settings(base, "none"), adapter, merged, world)
        for quant in options.quant:
            for model, on_top in ((base, adapter), (merged, None)):
                prepared = load_for_inference(settings(model, quant, options.threads), on_top)
                ways = {"ours": ours(prepared, tokenizer), "theirs": theirs(model, quant, on_top, tokenizer)}
                row = {"quant": quant, "adapter": "merged" if on_top is None else "on top", **compare(ways, batches)}
                prepared.close()
                measured["rows"].append(row)
                print(row, file=sys.stderr, flush=True)
                write(measured, options.out, options.threads)


def write(measured: dict[str, Any], out: Path, threads: int) -> None:
    """Write what is measured so far."""
    page = f"# Answers\n\nMeasured by `python -m benchmarks.answers`; its docstring says how. {ROWS} prompts a batch, "
    pairs = f"{measured['pairs']} pairs of turns; an interval leaves out the largest and the smallest ratio"
    page += (
        f"{NEW_TOKENS} new tokens each{', one thread' if threads == 1 else ''}; {pairs}.\n\n{measured_on(measured)}\n\n"
    )
    page += table(measured["rows"])
    (out / "answers.json").write_text(json.dumps(measured, indent=1) + "\n")
    (out / "answers.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
