"""The experts of one layer, forward and backward, by turns: `python -m benchmarks.experts [--dtype float32]`.

Ours beside transformers' eager loop over experts and its grouped path, all with the same weights, and ours with
adapters on the experts beside without. transformers' are dense; ours are nf4, either kept dense as well, as a run keeps
them where nothing is resharded and they fit (ADR 0019), or dequantized for each product. All outputs and input
gradients are compared first. Ours and the others have a process each: ours has the settings of a run for memory and
compiled products (`settle_host_memory`), the others have none, or with ``--theirs-keep`` the one for memory. Each turn
routes the tokens anew. Each pair of turns gives one ratio of seconds and one of CPU time, which other processes disturb
less (`benchmarks.pairs`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from copy import copy
from multiprocessing.connection import Connection
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
from fsdp_qlora.distributed.memory import PRODUCTS_KEPT_FOR_EXPERTS, settle_host_memory
from fsdp_qlora.model.experts import EXPERTS_IMPLEMENTATION
from fsdp_qlora.quant.formats import QuantizedTensor, build_format, quantize
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.shapes.linears import LinearShape

HIDDEN, EXPERTS, INTERMEDIATE, TOP_K, TOKENS, R = 1024, 64, 512, 8, 1024, 16
KEPT, MADE = "kept dense", "dequantized"
AIMS = {
    (KEPT, "eager"): 1.5, (KEPT, "grouped"): 1.0, (KEPT, f"{KEPT}, adapters"): 1.5,
    (MADE, "eager"): 1.5, (MADE, "grouped"): 1.0, (MADE, f"{MADE}, adapters"): 1.5,
}  # fmt: skip
"""(Ours, other) -> the least ratio of their times that is aimed at, or for adapters, the largest."""
THEIRS, WARM = ("eager", "grouped"), 3
"""Ways of transformers', and pairs that warm up."""
THEIR_PRODUCTS = 1024
"""How many compiled products oneDNN and torch keep where nothing is set."""
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
    dense = {name: _experts(name).to(dtype) for name in ("eager", "grouped_mm")}
    ours = {name: _experts(EXPERTS_IMPLEMENTATION) for kind in (KEPT, MADE) for name in (kind, f"{kind}, adapters")}
    targets = []
    for key in ("gate_up_proj", "down_proj"):
        count, out, into = getattr(dense["eager"], key).shape
        made = _quantized(torch.randn(count, out, into) * into**-0.5)
        for module in dense.values():
            getattr(module, key).data = made.stack().whole(0, count, dtype)
        kept = copy(made)
        kept._buffers = {**made._buffers, "dense": dense["eager"].get_parameter(key).data}
        for name, module in ours.items():
            delattr(module, key)
            setattr(module, key, kept if name.startswith(KEPT) else made)
        targets.append(LinearShape(f"layer.experts.{key}", out, into, count=count, stacked=True))
    adapted = {name: _adapted(module, targets) for name, module in ours.items() if "adapters" in name}
    return {"eager": dense["eager"], "grouped": dense["grouped_mm"], **ours, **adapted}


def _adapted(experts: nn.Module, targets: list[LinearShape]) -> nn.Module:
    parent = nn.ModuleDict({"layer": nn.ModuleDict({"experts": experts})})
    attach_experts(parent, targets, LoraSettings(r=R))
    adapted = parent.get_submodule("layer.experts")
    for module in adapted.modules():
        if isinstance(module, nn.Linear):  # the adapters, on meta
            module.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return adapted


def _step(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward and backward; return the output and the gradient of the input."""
    x = x.detach().requires_grad_()
    out = module(x, index, weights)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    return out.detach(), x.grad


def _require_equal(run: dict[str, Callable[[], tuple[Tensor, Tensor]]], dtype: torch.dtype) -> None:
    for mine, name in ((mine, name) for mine in (KEPT, MADE) for name in ("eager", "grouped")):
        for a, b in zip(run[mine](), run[name](), strict=True):
            gap = float((a.float() - b.float()).norm() / b.float().norm())
            if not gap <= LIMITS[dtype]:
                raise SystemExit(f"{mine} and {name} differ by {gap:.1e}")


def _routing(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the experts of each token and their weights, which get gradients as in a model."""
    generator = torch.Generator().manual_seed(seed)
    weights, index = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(-1).topk(TOP_K)
    return index, weights.to(dtype).requires_grad_()


def _work(connection: Connection, dtype: torch.dtype, threads: int, ours: bool, keep: bool) -> None:
    """Run turns: receive ``(name, seed)``, answer with seconds and seconds of CPU time; None ends it."""
    if keep:
        settle_host_memory(True, PRODUCTS_KEPT_FOR_EXPERTS if ours else THEIR_PRODUCTS)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    modules = _modules(dtype)
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    index, weights = _routing(0, dtype)
    if ours:
        _require_equal({n: lambda m=module: _step(m, x, index, weights) for n, module in modules.items()}, dtype)
    while (asked := connection.recv()) is not None:
        name, seed = asked
        index, weights = _routing(seed, dtype)
        started, on_cpu = time.perf_counter(), time.process_time()
        _step(modules[name], x, index, weights)
        connection.send((time.perf_counter() - started, time.process_time() - on_cpu))


class _Worker:
    """A process that runs turns."""

    def __init__(self, dtype: torch.dtype, threads: int, ours: bool, keep: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, dtype, threads, ours, keep), daemon=True)
        self._process.start()
        theirs.close()

    def turn(self, name: str, seed: int) -> tuple[float, float]:
        self._connection.send((name, seed))
        return self._connection.recv()

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def measure(dtype: torch.dtype, pairs: int, threads: int, theirs_keep: bool) -> list[dict[str, Any]]:
    """Return a row for each comparison."""
    workers = {ours: _Worker(dtype, threads, ours, ours or theirs_keep) for ours in (True, False)}
    rows = []
    for (mine, other), aim in AIMS.items():
        taken: dict[str, list[tuple[float, float]]] = {mine: [], other: []}
        for pair in range(pairs + WARM):
            for name in (mine, other) if pair % 2 else (other, mine):  # neither is always the first
                turn = workers[name not in THEIRS].turn(name, pair)
                if pair >= WARM:
                    taken[name].append(turn)
        rows.append(_row(mine, other, aim, taken))
    for worker in workers.values():
        worker.close()
    return rows


def _row(mine: str, other: str, aim: float, taken: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"ours": mine, "other": other, "aim": aim}
    for place, clock in enumerate(("", "cpu_")):
        theirs, ours = ([turn[place] for turn in taken[name]] for name in (other, mine))
        ratio = Ratio.of(theirs, ours)
        row |= {f"{clock}ratio": ratio.median, f"{clock}low": ratio.low, f"{clock}high": ratio.high}
        row |= {f"{clock}seconds": statistics.median(ours), f"{clock}other_seconds": statistics.median(theirs)}
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| time of | over that of ours | ratio (95 % interval) | aimed at | of CPU time | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        more = "adapters" in row["other"]
        missed = row["ratio"] > row["aim"] if more else row["ratio"] < row["aim"]
        aim = f"at {'most' if more else 'least'} {row['aim']}{', **missed**' if missed else ''}"
        wall, cpu = (Ratio(*(row[f"{clock}{key}"] for key in ("ratio", "low", "high"))) for clock in ("", "cpu_"))
        seconds = f"{row['other_seconds']:.3f} and {row['seconds']:.3f}"
        lines.append(f"| {row['other']} | {row['ours']} | {wall} | {aim} | {cpu} | {seconds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write ``experts.json`` and ``experts.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--theirs-keep", action="store_true", help="keep freed memory in both processes")
    options = parser.parse_args()
    figures: dict[str, Any] = {**machine(), "dtype": options.dtype, "threads": options.threads, "pairs": options.pairs}
    figures["theirs_keep"] = options.theirs_keep
    figures["rows"] = measure(getattr(torch, options.dtype), options.pairs, options.threads, options.theirs_keep)
    kept = "keeps" if options.theirs_keep else "does not keep"
    page = (
        "# Experts\n\nMeasured by `python -m benchmarks.experts`; its docstring says how. "
        f"Hidden size {HIDDEN}, {EXPERTS} experts of {INTERMEDIATE}, {TOP_K} a token, {TOKENS} tokens, "
        f"{options.dtype}, rank {R}, {options.threads} thread(s), {options.pairs} pairs; "
        f"transformers' process {kept} freed memory.\n\n"
        f"{measured_on(figures)}\n\n{_table(figures['rows'])}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "experts.json").write_text(json.dumps(figures, indent=1) + "\n")
    (options.out / "experts.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
