"""The experts of one layer, forward and backward, by turns: `python -m benchmarks.experts [--dtype float32]`.

Ours (nf4, dequantized for each product) beside transformers' eager loop over experts and its grouped path, both with
the same weights already dequantized, and ours with adapters on the experts beside without. Each pair of turns gives one
ratio (`benchmarks.pairs`). All outputs and input gradients are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.pairs import PAIRS, Ratio, measured_on
from benchmarks.ranks import machine
from fsdp_qlora.adapters.experts import attach_experts
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.model.experts import EXPERTS_IMPLEMENTATION
from fsdp_qlora.quant.formats import QuantizedTensor, build_format, quantize
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.shapes.linears import LinearShape

HIDDEN, EXPERTS, INTERMEDIATE, TOP_K, TOKENS, R = 1024, 64, 512, 8, 1024, 16
AIMS = {"eager": 1.5, "grouped": 1.0, "with adapters": 1.5}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of outputs and gradients, relative to their norm."""


def _experts(implementation: str) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = implementation
    return Qwen3MoeExperts(config).requires_grad_(False)


def _quantized(weights: Tensor) -> QuantMatrices:
    """Return stacked weights in nf4 with double quantization."""
    quant_format = build_format("nf4")
    parts = [quantize(matrix, quant_format) for matrix in weights]
    count, out, into = weights.shape
    made = QuantMatrices(into, out, quant_format, count, device="cpu")
    nested = torch.cat([p.nested for p in parts if p.nested is not None])
    offset = torch.stack([p.offset for p in parts if p.offset is not None])
    made.fill(
        QuantizedTensor(torch.cat([p.packed for p in parts]), torch.cat([p.absmax for p in parts]), nested, offset)
    )
    return made


def _modules(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the modules to compare, by name; all have the same (dequantized) weights."""
    ours, adapted = _experts(EXPERTS_IMPLEMENTATION), _experts(EXPERTS_IMPLEMENTATION)
    eager, grouped = (_experts(name).to(dtype) for name in ("eager", "grouped_mm"))
    targets = []
    for key in ("gate_up_proj", "down_proj"):
        count, out, into = getattr(ours, key).shape
        packed = _quantized(torch.randn(count, out, into) * into**-0.5)
        for module in (eager, grouped):
            getattr(module, key).data = packed.stack().whole(0, count, dtype)
        for module in (ours, adapted):
            delattr(module, key)
            setattr(module, key, packed)
        targets.append(LinearShape(f"layer.experts.{key}", out, into, count=count, stacked=True))
    parent = nn.ModuleDict({"layer": nn.ModuleDict({"experts": adapted})})
    attach_experts(parent, targets, LoraSettings(r=R))
    with_adapters = parent.get_submodule("layer.experts")
    for module in with_adapters.modules():
        if isinstance(module, nn.Linear):  # the adapters, on meta
            module.to_empty(device="cpu")
    return {"ours": ours, "eager": eager, "grouped": grouped, "with adapters": with_adapters}


def _step(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward and backward; return the output and the gradient of the input."""
    x = x.detach().requires_grad_()
    out = module(x, index, weights)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    return out.detach(), x.grad


def _require_equal(run: dict[str, Callable[[], tuple[Tensor, Tensor]]], dtype: torch.dtype) -> None:
    mine = run["ours"]()
    for name in ("eager", "grouped"):
        for a, b in zip(mine, run[name](), strict=True):
            gap = float((a.float() - b.float()).norm() / b.float().norm())
            if not gap <= LIMITS[dtype]:
                raise SystemExit(f"ours and {name} differ by {gap:.1e}")


def measure(dtype: torch.dtype, pairs: int) -> list[dict[str, Any]]:
    """Return a row for each comparison."""
    torch.manual_seed(0)
    modules = _modules(dtype)
    with torch.no_grad():
        for name, parameter in modules["with adapters"].named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.01)
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    weights, index = torch.randn(TOKENS, EXPERTS).softmax(-1).topk(TOP_K)
    run = {name: lambda m=module: _step(m, x, index, weights.to(dtype)) for name, module in modules.items()}
    _require_equal(run, dtype)
    rows = []
    for other, aim in AIMS.items():
        seconds: dict[str, list[float]] = {"ours": [], other: []}
        for pair in range(pairs + 1):
            for name in ("ours", other) if pair % 2 else (other, "ours"):  # neither is always the first
                started = time.perf_counter()
                run[name]()
                if pair:  # the first pair warms up
                    seconds[name].append(time.perf_counter() - started)
        ratio = Ratio.of(seconds[other], seconds["ours"])
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {"other": other, "aim": aim, "ratio": ratio.median, "low": ratio.low, "high": ratio.high, **medians}
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| time of | over that of ours | ratio (95 % interval) | aimed at | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        more = row["other"] == "with adapters"
        missed = row["ratio"] > row["aim"] if more else row["ratio"] < row["aim"]
        aim = f"at {'most' if more else 'least'} {row['aim']}{', **missed**' if missed else ''}"
        ratio = Ratio(row["ratio"], row["low"], row["high"])
        lines.append(f"| {row['other']} | ours | {ratio} | {aim} | {row[row['other']]:.3f} and {row['ours']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write ``experts.json`` and ``experts.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    figures: dict[str, Any] = {**machine(), "dtype": options.dtype, "pairs": options.pairs}
    figures["rows"] = measure(getattr(torch, options.dtype), options.pairs)
    page = (
        "# Experts\n\nMeasured by `python -m benchmarks.experts`; its docstring says how. "
        f"Hidden size {HIDDEN}, {EXPERTS} experts of {INTERMEDIATE}, {TOP_K} a token, {TOKENS} tokens, "
        f"{options.dtype}, rank {R}, {options.pairs} pairs.\n\n{measured_on(figures)}\n\n{_table(figures['rows'])}"
    )
    (options.out / "experts.json").write_text(json.dumps(figures, indent=1) + "\n")
    (options.out / "experts.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
