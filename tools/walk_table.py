"""Two outputs of ``python -m tests.fake_cuda`` -> docs/walks.md: what a step asks of its device, before and after.

``python -m tools.walk_table BEFORE AFTER WHAT``; WHAT names the two in a sentence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "walks.md"
STEP = "step 3"
INTRODUCTION = """
A *walk* runs the product's code on the fake CUDA device of `tests/fake_cuda`, on tensors without bytes: build, load
from fake files, three steps (forward, backward, clipping, optimizer), evaluation, an answer of two tokens, the tensors
of a checkpoint, the adapter gathered and exported up to its file. `tests/unit/test_walks.py` holds every walk to the
rules below, in `make test` for all pairs of settings (optimizer, format, offload, ranks, attention, checkpointing,
packing, adapters, kernels, compilation, micro-batches; `tests/fake_cuda/pairs.py`) and in `make test-full` for the
variants of the table as well.

- No operation mixes devices.
- A step waits for the device once, and so does an evaluation; numerics.md names the exceptions.
- The layers of an answer never wait. Around them, transformers waits several times a token.
- Nothing on the host reads a copy before something waited for it, and no stream reads or overwrites what another one
  may still write or read.
- What a checkpoint saves is neither copied, nor gathered, nor waited for before torch's stager takes it.

Faults are planted to show that each rule can fail: a buffer on the CPU, an `.item()` in a layer, a non-blocking copy
read too early, a stream that nobody waits for; in a step and in an answer.
"""
LIMITS = """
## What is not walked

- *Numbers*: fake tensors have none. The kernels of torch, bitsandbytes, Triton and Liger do not run, and neither does
  NCCL (a `fake` process group stands for it).
- *Liger's kernels* (`train.kernels=liger`) are checked and counted where Liger launches them, and then skipped. Which
  of their tensors a kernel writes is unknown, so each counts as written. Liger and Triton must be importable
  (CONTRIBUTING.md); otherwise these walks are skipped by name.
- *Inductor*, which asks the card for its properties and writes Triton code: `train.compile=true` and
  `train.kernels=compile` are walked with Dynamo and AOTAutograd (`aot_eager`; pairs of settings with `eager`), so a
  compiled graph launches one kernel per operation here and fewer on a card.
- *Files*: reading safetensors, digests (`checks/gather.py`), the stager and the writers behind a checkpoint's tensors,
  and the bytes of `adapter_model.safetensors`: a fake tensor has no bytes to write.
- *The twin check* (`checks/twin.py`), which compares numbers.
- *flash_attention_2*, whose package needs a card to be imported; *flex_attention*, which must be compiled by inductor.
- *LLM.int8's outlier columns*: bitsandbytes' fake kernels do not look for them, so the wait of numerics.md for a
  threshold does not show.
- *Sampling and streaming* an answer, stop strings, and answers to a file of prompts (`inference/prompts.py`).
- *The allocator*, and time.
"""


def _read(file: str) -> dict[str, Any]:
    return {line["name"]: line for line in map(json.loads, Path(file).read_text().splitlines())}


def _count(walk: Any, kind: str) -> str:
    if walk is None or "error" in walk:
        return "not walked"
    value = walk.get(kind, {}).get(STEP, 0)
    if kind == "arrived":
        return f"{value.get('beside', 0) / 1e6:.2f} of {sum(value.values()) / 1e6:.2f}" if value else "not counted"
    return f"{value / 1e6:.2f}" if kind == "gathered" else str(sum(value.values()) if value else 0)


def _row(name: str, before: Any, after: Any) -> str:
    if "skipped" in after:
        raise SystemExit(f"{name} was skipped: {after['skipped']}")
    kinds = ("syncs", "launches", "gathered", "arrived")
    return f"| {name} | {' | '.join(f'{_count(before, kind)} -> {_count(after, kind)}' for kind in kinds)} |"


def main() -> int:
    """Write the page."""
    before, after = _read(sys.argv[1]), _read(sys.argv[2])
    lines = [
        "# What a step asks of its device",
        "",
        f"Written by `tools/walk_table.py`: {sys.argv[3]}",
        INTRODUCTION,
        "## The third step",
        "",
        "A small Llama (2 layers of width 256, 2 micro-batches, 48 tokens a row; Mixtral with 4 experts), after the",
        "optimizer's state exists. *Waits*: how often the host waits for the device. *Launches*: operations that start",
        "work there. *Gathered*: MB of all gathered units. *Copied ahead*: MB copied from host memory beside other",
        "work, of all that are copied from there. No time is measured here.",
        "",
        "| variant | waits | launches | gathered MB | copied ahead, MB |",
        "|---|---|---|---|---|",
        *(_row(name, before.get(name), walk) for name, walk in after.items() if not name.startswith("planted")),
        LIMITS.rstrip(),
    ]
    PAGE.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
