"""The ways to train that `benchmarks.step` compares: each builds a `Stepper` on the same model and the same batches.

Same in all: the base in 4-bit NF4 with double quantization (but ``bf16 LoRA``), compute in bf16, LoRA on all linears of
the decoder layers with alpha = 2 r and no dropout, AdamW, clipping at 1.0, one row of ``length`` tokens per rank and
step with real chat masks, causal attention over the whole row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.step_ours import loop, ours
from benchmarks.step_peers import bare, device, torchtune, trl, unsloth
from benchmarks.step_rows import Rows
from benchmarks.step_spec import Known, Spec, Stepper
from fsdp_qlora.distributed.process import Placement


@contextlib.contextmanager
def roofline(spec: Spec, rows: Rows, placement: Placement) -> Iterator[tuple[Stepper, Known]]:
    """Multiply with the base's matrices in bf16, forward and for the input's gradient: nothing else.

    The head is multiplied with the supervised positions alone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = [
        (m.out_features, m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": device()}
    weights = [torch.randn(shape, **kind) for shape in shapes]
    head = torch.randn(config.vocab_size, config.hidden_size, **kind)
    inputs = {n: torch.randn(spec.batch * rows.length, n, **kind) for shape in shapes for n in shape}
    number = 0

    def step() -> None:
        nonlocal number
        _, labels = rows.of(number, placement.rank, placement.world_size, spec.batch)
        number += 1
        for weight in weights:
            out, into = weight.shape
            _ = inputs[into] @ weight.t()
            _ = inputs[out] @ weight
        logits = inputs[config.hidden_size][: int((labels[:, 1:] != -100).sum())] @ head.t()
        _ = logits @ head

    yield step, {}


WAYS = {
    "ours": ours, "loop": loop, "trl": trl, "bare": bare, "roofline": roofline, "torchtune": torchtune,
    "unsloth": unsloth,
}  # fmt: skip
