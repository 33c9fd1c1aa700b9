"""PiSSA, OLoRA and LoftQ on a base that is loaded sharded and quantized.

The judge of PiSSA and OLoRA is PEFT on a dense float32 copy, whose residual stock bitsandbytes then quantizes. PEFT's
LoftQ computes on CUDA only and leaves out alpha / r: there, it is the paper's alternation in ten lines.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters.names import ADAPTER, trainable_parameters
from fsdp_qlora.adapters.peft_layers import adapted_layers
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.load.stream import resident_bytes
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.quant.packing import raw_bytes
from tests.build import build, essence, losses, norms, run_fit, whole
from tests.distributed.test_families import LR, _batches
from tests.distributed.test_peft_methods import QUANT, TARGETS, _dense_copy, _ids, _rounded
from tests.families import reference_losses
from tests.tiers import some_in_full
from tests.tiny import make_packed
from tests.tolerances import FP32_LOSSES, FP32_NORMS, apart

R, ALPHA, ITERATIONS = 4, 8, 3
STARTS = ("pissa", "pissa_niter_4", "olora", "loftq")
CASES = [case for case in itertools.product(STARTS, QUANT) if case != ("loftq", "none")]
ALL = some_in_full(CASES, {("olora", "int8"), ("loftq", "fp4")})
FLIPPED = 1e-3
"""Share of the codes that another order of summation may move to a neighbour."""


def settings_of(start: str, quant: str, rows: Path | None = None, **more: Any) -> dict[str, Any]:
    """Return the groups of a run in float32."""
    lora: dict[str, Any] = {"r": R, "alpha": ALPHA, "init_lora_weights": start}
    groups: dict[str, dict[str, Any]] = {
        "lora": lora | ({"loftq_iter": ITERATIONS} if start == "loftq" else {}), "quant": QUANT[quant],
        "precision": {"name": "fp32"}, "model": {"check": "off"}, "optim": {"lr": LR},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }  # fmt: skip
    if rows is not None:
        groups["data"] = {"train": str(rows), "max_length": 64, "max_rows": 6}
    return {**groups, **{name: {**groups.get(name, {}), **values} for name, values in more.items()}}


def dense(folder: Path) -> Any:
    """Return upstream's model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def loftq(weight: torch.Tensor, quant: str, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return base and ``s B A`` by the paper's algorithm 1."""
    product = torch.zeros_like(weight)
    base = weight
    for _ in range(iterations):
        base = _rounded(weight - product, quant)
        left, values, right = torch.linalg.svd(weight - base, full_matrices=False)
        product = left[:, :R] @ torch.diag(values[:R]) @ right[:R]
    return base, product


@torch.no_grad()
def judged(folder: Path, start: str, quant: str) -> Any:
    """Return PEFT's model on a dense copy whose weights are what the residual is rounded to."""
    torch.set_num_threads(1)
    model = dense(folder)
    by_hand = start in ("loftq", "pissa_niter_4")  # PEFT's draws depend on all that was drawn before
    originals = {n: m.weight.detach().clone() for n, m in model.named_modules() if n.rpartition(".")[2] in TARGETS}
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=True if by_hand else start
    )
    adapted = get_peft_model(model, config)
    for name, layer in adapted_layers(adapted).items():
        base = layer.get_base_layer()
        if start == "loftq":
            original = originals[name.removeprefix("base_model.model.")]
            base.weight.data, product = loftq(original, quant, ITERATIONS)
            left, values, right = torch.linalg.svd(product, full_matrices=False)
            roots = torch.diag((values[:R] / (ALPHA / R)).sqrt())
            layer.lora_A[ADAPTER].weight.data = roots @ right[:R]
            layer.lora_B[ADAPTER].weight.data = left[:, :R] @ roots
        else:
            if by_hand:
                torch.manual_seed(seed_of(0, name))
                layer.pissa_init(ADAPTER, start)  # type: ignore[operator]
            base.weight.data = _rounded(base.weight.data, quant)
    return adapted


def _loaded(ranks: Ranks, folder: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Return factors and dequantized base by target, the bytes of the base, and the first loss."""
    prepared = build(ranks, folder, **groups)
    model = prepared.model.eval()
    values, raw = {}, {}
    for name, layer in adapted_layers(model).items():
        key = name[name.index("base_model") :]
        base = layer.get_base_layer()
        a, b = (whole(getattr(layer, kind)[ADAPTER].weight.detach()).clone() for kind in ("lora_A", "lora_B"))
        if isinstance(base, QuantMatrices):
            parts = {
                n: whole(p.detach()).clone()
                for n in ("packed", "absmax", "nested")
                if (p := getattr(base, n)) is not None
            }
            raw[key] = {n: raw_bytes(p) for n, p in parts.items()}
            copy = type(base)(base.in_features, base.out_features, base.quant_format, device="cpu")
            for n, p in parts.items():
                getattr(copy, n).data = p
            copy.offset = base.offset
            weight = copy.dequantize(torch.float32)
        else:
            weight = whole(base.weight.detach()).clone()
            raw[key] = {"weight": raw_bytes(weight)}
        values[key] = (a, b, weight)
    with torch.no_grad():
        loss = float(model(_ids(), _ids()).sum())
    return {"values": values, "raw": raw, "loss": loss, "digest": prepared.model.starts.digest}


def _judged_loss(model: nn.Module) -> float:
    with torch.no_grad():
        logits = model(input_ids=_ids(), use_cache=False).logits
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), _ids()[:, 1:].flatten(), reduction="sum"))


@pytest.mark.parametrize(("start", "quant"), ALL)
def test_factors_base_and_first_loss_are_the_judges(pool, tiny_model, start, quant):
    loaded = {n: pool.run(n, _loaded, str(tiny_model), settings_of(start, quant))[0] for n in (1, 2, 3)}
    first = loaded[1]
    for n in (2, 3):  # the same bits at any number of ranks
        assert loaded[n]["digest"] == first["digest"]
        for key, parts in first["raw"].items():
            assert all(torch.equal(loaded[n]["raw"][key][part], value) for part, value in parts.items()), (n, key)
    judge, originals = judged(tiny_model, start, quant), dense(tiny_model)
    for name, layer in adapted_layers(judge).items():
        a, b, weight = first["values"][name]
        up, down = (getattr(layer, kind)[ADAPTER].weight.detach() for kind in ("lora_B", "lora_A"))
        assert float(b.norm()) > 0
        product, wanted, base = b @ a, up @ down, layer.get_base_layer().weight.detach()
        # what int8 loses has no direction of its own: a code that rounds otherwise turns its singular vectors
        limit, flipped = (5e-2, 1e-2) if (start, quant) == ("loftq", "int8") else (1e-3, FLIPPED)
        assert float((product - wanted).norm()) <= limit * float(wanted.norm()), name
        original = originals.get_submodule(name.removeprefix("base_model.model.")).weight
        lost, theirs = (float((original - w - ALPHA / R * p).norm()) for w, p in ((weight, product), (base, wanted)))
        assert lost == pytest.approx(theirs, rel=1e-3, abs=1e-5), name
        assert float((weight - base).abs().gt(1e-5).float().mean()) <= flipped, name
    assert first["loss"] == pytest.approx(_judged_loss(judge), rel=1e-4 if quant != "none" else FP32_LOSSES)
    plain = pool.run(2, _loaded, str(tiny_model), settings_of("true", quant))[0]
    assert plain["digest"] == "" and plain["loss"] != first["loss"]
    original = _judged_loss(dense(tiny_model))
    if quant == "none":  # nothing is lost
        assert first["loss"] == pytest.approx(original, rel=FP32_LOSSES)
    elif start != "loftq":  # the residual's error, and no more
        assert first["loss"] == pytest.approx(original, rel=2e-2)


@pytest.mark.parametrize("quant", some_in_full(["nf4", "fp4", "int8"], {"nf4"}))
def test_what_loftq_loses_falls_with_its_iterations(pool, tiny_model, quant):
    model = dense(tiny_model)
    errors = []
    for iterations in (1, 2, 5):
        groups = settings_of("loftq", quant, lora={"loftq_iter": iterations})
        values = pool.run(2, _loaded, str(tiny_model), groups)[0]["values"]
        errors.append(
            sum(
                float(
                    (model.get_submodule(key.removeprefix("base_model.model.")).weight - w - ALPHA / R * b @ a).norm()
                )
                for key, (a, b, w) in values.items()
            )
        )
    plain = pool.run(2, _loaded, str(tiny_model), settings_of("true", quant))[0]["values"]
    nothing = sum(
        float((model.get_submodule(key.removeprefix("base_model.model.")).weight - w).norm())
        for key, (_, _, w) in plain.items()
    )
    assert nothing > errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("start", "quant"), ALL)
def test_trains_and_resumes_on_any_number_of_ranks(pool, tiny_model, chat_rows, tmp_path, start, quant):
    groups = settings_of(start, quant, chat_rows, checkpoint={"every_steps": 2})
    runs = {n: pool.run(n, run_fit, str(tiny_model), str(tmp_path), f"on{n}", dict(groups))[0] for n in (1, 2, 3)}
    judge = judged(tiny_model, start, quant)
    wanted = reference_losses(judge, _batches(tiny_model, chat_rows, tmp_path / "cache"), LR)
    assert max(apart(losses(runs[2]["metrics"]), wanted)) <= (FP32_LOSSES if quant == "none" else 1e-3)
    for run in runs.values():
        assert max(apart(losses(run["metrics"]), losses(runs[1]["metrics"]))) <= FP32_LOSSES
        assert max(apart(norms(run["metrics"]), norms(runs[1]["metrics"]))) <= FP32_NORMS
    split = {**groups, "train": {"max_steps": 2}}
    for name, ranks, kept in (("same", 2, True), ("other", 3, True), ("again", 2, False)):
        pool.run(2, run_fit, str(tiny_model), str(tmp_path), name, dict(split))
        if not kept:  # computed again: the same bits
            (tmp_path / name / FILE_NAME).unlink()
        resumed = pool.run(ranks, run_fit, str(tiny_model), str(tmp_path), name, dict(groups))[0]
        if ranks == 2:
            assert essence(resumed["metrics"]) == essence(runs[2]["metrics"])
            exported = [tmp_path / run / "adapter/adapter_model.safetensors" for run in (name, "on2")]
            assert exported[0].read_bytes() == exported[1].read_bytes()
        assert max(apart(losses(resumed["metrics"]), losses(runs[2]["metrics"]))) <= FP32_LOSSES
        for beside in (tmp_path / name / FILE_NAME, tmp_path / name / "adapter" / FILE_NAME):
            assert beside.read_bytes() == (tmp_path / "on1" / FILE_NAME).read_bytes()


def _held(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    prepared = build(ranks, folder, **groups)
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), prepared.config.optim)
    optimizer.prepare_state(1)
    planned = prepared.plan.bytes
    return {
        "base": sum(resident_bytes(m) for m in prepared.model.modules() if isinstance(m, QuantMatrices)),
        "adapters": sum(local_tensor(p).numel() * 4 for _, p in trainable_parameters(prepared.model)),
        "optimizer": optimizer.state_bytes(),
    }, {
        "base": planned.base_packed + planned.base_statistics,
        "adapters": planned.adapters,
        "optimizer": planned.optimizer,
    }


@pytest.mark.parametrize(("start", "quant"), some_in_full(CASES, {("olora", "nf4")}))
def test_planned_bytes_are_the_held_ones(pool, tiny_model, start, quant):
    for num_ranks in (1, 2, 3):
        found = pool.run(num_ranks, _held, str(tiny_model), settings_of(start, quant))
        for key, planned in found[0][1].items():
            assert planned == max(held[key] for held, _ in found), key


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_is_stored_in_4_bits_is_dequantized_first(pool, tiny_model, tmp_path, start):
    packed = make_packed(tiny_model, tmp_path / "packed")
    loaded = {n: pool.run(n, _loaded, str(packed), settings_of(start, "nf4"))[0] for n in (1, 2)}
    assert loaded[1]["digest"] == loaded[2]["digest"] != ""
    model = _dense_copy(tiny_model, "nf4")
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=start)  # type: ignore[arg-type]
    for name, layer in adapted_layers(get_peft_model(model, config)).items():
        a, b, weight = loaded[2]["values"][name]
        product = (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight).detach()
        assert float((b @ a - product).norm()) <= 1e-2 * float(product.norm())  # dequantized in bf16 there
        wanted = _rounded(layer.get_base_layer().weight.detach(), "nf4")
        assert float((weight - wanted).norm()) <= 2e-2 * float(wanted.norm())


def refused(ranks: Ranks, folder: str, groups: dict[str, Any]) -> str:
    try:
        build(ranks, folder, **groups)
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_loftq_refuses_a_base_that_is_stored_in_4_bits(pool, tiny_model, tmp_path):
    packed = make_packed(tiny_model, tmp_path / "packed")
    said = pool.run(2, refused, str(packed), settings_of("loftq", "nf4"))
    assert all(s.startswith("2 ") and "already quantized; use the 16-bit model" in s for s in said)


PAIRS = [{"variant": "dora", "init_lora_weights": "pissa"}, {"variant": "rslora", "init_lora_weights": "olora"},
         {"variant": "dora", "use_rslora": True}, {"variant": "dora", "use_rslora": True, "init_lora_weights": "olora"}]  # fmt: skip


@pytest.mark.parametrize("quant", some_in_full(["none", "nf4"], {"none"}))
@pytest.mark.parametrize("lora", some_in_full(PAIRS, PAIRS[:1]), ids=str)
def test_pairs_that_peft_allows_start_as_in_peft(pool, tiny_model, lora, quant):
    groups = settings_of("true", quant)
    groups["lora"] = {"r": R, "alpha": ALPHA, **lora}
    loaded = {n: pool.run(n, _loaded, str(tiny_model), groups)[0] for n in (1, 2)}
    torch.set_num_threads(1)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=TARGETS, use_dora=lora["variant"] == "dora",
        use_rslora=bool(lora.get("use_rslora")) or lora["variant"] == "rslora",
        init_lora_weights=lora.get("init_lora_weights", True),
    )  # fmt: skip
    judge: Any = get_peft_model(dense(tiny_model), config)
    if "init_lora_weights" in lora:
        assert loaded[1]["digest"] == loaded[2]["digest"] != ""
        for name, layer in adapted_layers(judge).items():
            a, b, _ = loaded[2]["values"][name]
            product = (layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight).detach()
            assert float((b @ a - product).norm()) <= 1e-3 * float(product.norm())
    if quant == "none":
        assert loaded[2]["loss"] == pytest.approx(_judged_loss(judge), rel=FP32_LOSSES)
    assert loaded[1]["loss"] == pytest.approx(loaded[2]["loss"], rel=FP32_LOSSES)


def _in_layout(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[str, float]:
    model = build(ranks, folder, **groups).model.eval()
    with torch.no_grad():
        return model.starts.digest, float(model(_ids(), _ids()).sum())


@pytest.mark.parametrize("start", some_in_full(["pissa", "loftq"], {"pissa"}))
def test_no_layout_changes_a_start(pool, tiny_model, start):
    digest, loss = pool.run(1, _in_layout, str(tiny_model), settings_of(start, "nf4"))[0]
    for fsdp in ({"adapters": "replicated"}, {"offload": "params"}, {"shard_degree": 1, "replicate_degree": 2}):
        for found in pool.run(2, _in_layout, str(tiny_model), settings_of(start, "nf4", fsdp=fsdp)):
            assert found[0] == digest and found[1] == pytest.approx(loss, rel=FP32_LOSSES), fsdp
    for found in pool.run(4, _in_layout, str(tiny_model), settings_of(start, "nf4"), layout="hybrid"):
        assert found[0] == digest and found[1] == pytest.approx(loss, rel=FP32_LOSSES)


@pytest.mark.parametrize("start", some_in_full(STARTS, {"olora"}))
def test_the_checks_at_the_start_hold_in_bf16(pool, tiny_model, start):
    exact = pool.run(2, _in_layout, str(tiny_model), settings_of(start, "nf4"))[0]
    groups = settings_of(start, "nf4", precision={"name": "bf16"}, model={"check": "always"})
    digest, loss = pool.run(2, _in_layout, str(tiny_model), groups)[0]
    assert digest == exact[0] and loss == pytest.approx(exact[1], rel=1e-2)
