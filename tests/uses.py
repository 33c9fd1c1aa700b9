"""What people do with a family beside training it in float32: generate, export, train in bf16, plan for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from fsdp_qlora.adapters import build_method
from fsdp_qlora.checks.agree import require_losses_agree
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ModelError, typed_line
from fsdp_qlora.export.adapter import export_adapter, gather_adapter, short_targets
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.quant.formats import Packed
from fsdp_qlora.run.build import OpenedModel, load_model, open_model
from fsdp_qlora.run.decide import planned
from tests import upstream

NEW_TOKENS = 8
BF16_FACTOR = 2.0


def problems(tries: dict[str, Callable[[], str | list[str]]]) -> list[str]:
    """Return what is not as upstream has it; an error is a problem, too."""
    found: list[str] = []
    for name, run in tries.items():
        try:
            problem = run()
        except Exception as error:
            problem = typed_line(error)
        found += [f"{name}: {line}" for line in ([problem] if isinstance(problem, str) else problem) if line]
    return found


def generation_differs(model: CausalModel, judge: nn.Module, ids: torch.Tensor) -> str:
    """Compare eight greedy tokens after two prompts, one of them padded on the left, with a cache."""
    prompts, mask = ids[:, :16].clone(), torch.ones(2, 16, dtype=torch.long)
    prompts[1, :5], mask[1, :5] = 0, 0
    settings: dict[str, Any] = {
        "input_ids": prompts, "attention_mask": mask, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS,
        "do_sample": False, "use_cache": True, "pad_token_id": 0, "synced_gpus": False,
    }  # fmt: skip
    try:
        wanted = judge.eval().generate(**settings)  # type: ignore[operator]
    except Exception as error:  # upstream cannot: nothing to be equal to
        return _must_fail(lambda: model.eval().generate(**settings), error)
    found = model.eval().generate(**settings)
    return "" if torch.equal(found, wanted) else f"generates {found[:, 16:].tolist()}, not {wanted[:, 16:].tolist()}"


def _must_fail(run: Callable[[], Any], reason: Exception, kind: type[Exception] = Exception) -> str:
    try:
        run()
    except kind:
        return ""
    return f"works, where upstream ends with {type(reason).__name__}"


def export_differs(
    model: CausalModel, opened: OpenedModel, folder: Path, ids: torch.Tensor, wanted: float, trains: bool
) -> str:
    """Compare the loss of plain PEFT with the exported adapter on upstream's model."""
    targets = short_targets(opened.plan.targets, model.base)
    with TemporaryDirectory() as scratch:
        export_adapter(
            Path(scratch),
            gather_adapter(model),
            build_method("lora").peft(targets, LoraSettings(r=4, alpha=8.0), "CAUSAL_LM"),
            str(folder),
        )
        judge = rounded(folder, torch.float32, opened.plan.quantized)
        adapted = PeftModel.from_pretrained(judge, scratch, is_trainable=True).train(trains)
        found = float(upstream.loss_sum(adapted, ids).detach())
    return "" if abs(found - wanted) <= 1e-5 * wanted else f"exported, PEFT's loss is {found}, not {wanted}"


def rounded(folder: Path, dtype: torch.dtype, quantized: Sequence[Packed]) -> Any:
    """Return upstream's model with the weights that we quantize sent through NF4."""
    judge = upstream.load(folder, dtype)
    linears = [x.linear for x in quantized]
    upstream.round_to_nf4(judge, [x.parameter for x in linears], [x.parameter for x in linears if x.transposed])
    return judge


def bf16_differs(ranks: Ranks, settings: RunConfig, folder: Path, ids: torch.Tensor) -> list[str]:
    """Compare in bf16: dtypes with upstream's, and the distance from float32 with upstream's own (no adapter works)."""
    in_bf16 = replace(settings, precision=replace(settings.precision, name="bf16"))
    opened = open_model(in_bf16, folder, ranks, None)
    theirs = {n: t.dtype for n, t in opened.base.named_parameters()} | dict(_buffer_dtypes(opened.base))
    judge = rounded(folder, torch.bfloat16, opened.plan.quantized)
    own = {n: t.dtype for n, t in judge.named_parameters()} | dict(_buffer_dtypes(judge))
    odd = [
        f"{n} is {theirs[n]}, upstream's {own[n]}" for n in sorted(own.keys() & theirs.keys()) if own[n] != theirs[n]
    ]
    model, _ = load_model(opened.compiled(False), ranks)
    try:
        near = _token_losses(judge, ids)
    except RuntimeError as error:  # upstream cannot (xLSTM): nothing to be near to
        return [_must_fail(lambda: require_losses_agree(model, ranks), error, ModelError)]
    exact = _token_losses(rounded(folder, torch.float32, opened.plan.quantized), ids)
    with torch.no_grad():
        ours = _distance(model.eval()(ids, ids), exact)
    allowed = BF16_FACTOR * _distance(near, exact)
    return odd[:2] + ([f"{ours:.1e} from float32, where {allowed:.1e} is allowed"] if ours > allowed else [])


def _token_losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def _distance(losses: torch.Tensor, exact: torch.Tensor) -> float:
    return float((losses - exact).square().mean().sqrt() / exact.mean())


def _buffer_dtypes(model: nn.Module) -> list[tuple[str, torch.dtype]]:
    return [(n, t.dtype) for n, t in model.named_buffers() if t.is_floating_point()]


def plan_differs(settings: RunConfig) -> str:
    """See that a plan for a GPU takes an attention that the class takes."""
    on_gpu = replace(
        settings, plan=replace(settings.plan, gpu="24GiB"), precision=replace(settings.precision, name="bf16")
    )
    config, base, _ = planned(on_gpu, 2)
    attention, kind = config.model.attn_implementation, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base.config), None)
    if kind is None:
        return ""
    can = {
        "eager": True, "sdpa": kind._supports_sdpa, "flash_attention_2": kind._supports_flash_attn,
    }.get(attention, False)  # fmt: skip
    return "" if can else f"a plan for a GPU takes {attention}"
