"""The methods that PEFT's own layers compute, sharded: equal to stock PEFT on a dense copy of the dequantized weights.

The judge is one process in float32 with PEFT's own configs and layers on plain `nn.Linear`s; their weights are what
bitsandbytes' functions make of the model's. int8 is compared where it multiplies every column without rounding inputs
(``llm_int8_threshold`` next to 0), because a dense copy does not round them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters import build_method
from fsdp_qlora.adapters.names import adapter_key, trainable_parameters
from fsdp_qlora.adapters.norms import StepNorms
from fsdp_qlora.adapters.peft_layers import adapted_layers
from fsdp_qlora.config.choices import PEFT_METHODS
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import fill_slice, local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.load.stream import resident_bytes
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.quant.linear import ReadableLinear
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.run.inference import load_for_inference
from tests.build import build, config_of, essence, losses, metrics, norms, run_fit, whole, world_of
from tests.distributed.test_families import LR, _batches
from tests.families import reference_losses
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES, FP32_NORMS, apart

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R: dict[str, Any] = {"r": 4, "target_modules": TARGETS}
STOCK: dict[str, Any] = {
    "dora": lambda: peft.LoraConfig(use_dora=True, lora_alpha=8, **R),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(**R),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(**R),
    "loha": lambda: peft.LoHaConfig(alpha=8, **R),
    "lokr": lambda: peft.LoKrConfig(alpha=8, **R),
    "hra": lambda: peft.HRAConfig(**R),
    "shira": lambda: peft.ShiraConfig(random_seed=0, **R),
    "road": lambda: peft.RoadConfig(group_size=32, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(randlora_alpha=8, **R),
    "c3a": lambda: peft.C3AConfig(block_size=32, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=100, target_modules=TARGETS),
    "patterns": lambda: peft.LoraConfig(
        lora_alpha=8, exclude_modules=["o_proj"], rank_pattern={"v_proj": 2, r"layers\.1\.mlp.*": 6},
        alpha_pattern={"q_proj": 5}, **R,
    ),
}  # fmt: skip
"""PEFT's config, written as a user of PEFT would."""
OPTIONS: dict[str, dict[str, Any]] = {
    "ia3": {"feedforward_modules": ["down_proj"]}, "oft": {"oft_block_size": 32}, "road": {"group_size": 32},
    "c3a": {"block_size": 32}, "fourierft": {"n_frequency": 100},
}  # fmt: skip
PATTERNS = {
    "variant": "lora", "exclude_modules": ["o_proj"], "rank_pattern": {"v_proj": 2, "*.layers.1.mlp.*": 6},
    "alpha_pattern": {"q_proj": 5.0},
}  # fmt: skip
"""Our own LoRA with the settings of the stock config of that name."""
QUANT: dict[str, dict[str, Any]] = {
    "nf4": {}, "fp4": {"name": "fp4"}, "none": {"name": "none"},
    "int8": {"name": "int8", "double_quant": False, "llm_int8_threshold": 1e-6},
}  # fmt: skip
QUICK = {("ia3", "nf4"), ("vera", "int8"), ("hra", "fp4"), ("dora", "none"), ("patterns", "nf4")}
ALL = some_in_full(itertools.product(STOCK, QUANT), QUICK)


def _settings(method: str, quant: str, rows: Path | None = None, **more: Any) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {
        "lora": PATTERNS if method == "patterns" else {"variant": method, "options": OPTIONS.get(method, {})},
        "quant": QUANT[quant],
        "precision": {"name": "fp32"},
        "model": {"check": "off"},
        "optim": {"lr": LR},
        "schedule": {"name": "constant", "warmup_ratio": 0.0},
    }
    if rows is not None:
        groups["data"] = {"train": str(rows), "max_length": 64, "max_rows": 6}
    return {**groups, **{name: {**groups.get(name, {}), **values} for name, values in more.items()}}


@torch.no_grad()
def _rounded(weight: torch.Tensor, quant: str) -> torch.Tensor:
    if quant == "none":
        return weight
    if quant == "int8":
        codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return codes.float() * absmax[:, None] / 127
    packed, state = bnb.functional.quantize_4bit(
        weight.view(1, -1), blocksize=64, quant_type=quant, compress_statistics=True
    )
    return bnb.functional.dequantize_4bit(packed, state).view_as(weight)


def _dense_copy(folder: Path, quant: str) -> Any:
    torch.set_num_threads(1)  # the mean of the statistics depends on it
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            module.weight.data = _rounded(module.weight.data, quant)
    return model.requires_grad_(False)


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {adapter_key(name): p for name, p in model.named_parameters() if p.requires_grad}


def _ids() -> torch.Tensor:
    return torch.randint(5, 100, (2, 40), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def _randomize(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move initial values, which often make an adapter the identity."""
    noise = {
        n: torch.randn(v.shape, generator=torch.Generator().manual_seed(i)) for i, (n, v) in enumerate(values.items())
    }
    return {name: value + 0.05 * noise[name] for name, value in values.items()}


def _computed(ranks: Ranks, folder: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Return the initial values, and a loss and gradients with other values."""
    prepared = build(ranks, folder, **groups)
    model = prepared.model
    first = {name: whole(p.detach()).clone() for name, p in trainable_parameters(model)}
    values = _randomize(first)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            fill_slice(parameter, values[name], ranks.shard_rank, ranks.shard_size)
    model.train()
    loss = model(_ids(), _ids()).sum()
    loss.backward()
    gradients = {n: whole(p.grad) / ranks.size for n, p in trainable_parameters(model)}
    fixed = build_method(prepared.config.lora.method).fixed(model, prepared.config.lora)
    return {"first": first, "loss": float(loss.detach()), "gradients": gradients, "fixed": fixed}


@pytest.mark.parametrize(("method", "quant"), ALL)
def test_losses_and_gradients_are_those_of_stock_peft_on_a_dense_copy(pool, tiny_model, method, quant):
    judge: Any = get_peft_model(_dense_copy(tiny_model, quant), STOCK[method]())
    found = {n: pool.run(n, _computed, str(tiny_model), _settings(method, quant))[0] for n in (1, 2, 3)}
    first = found[1]["first"]
    parameters = _adapters(judge)
    assert parameters.keys() == first.keys()
    for n in (2, 3):
        assert all(torch.equal(first[name], found[n]["first"][name]) for name in first)
        assert all(torch.equal(value, found[n]["fixed"][name]) for name, value in found[1]["fixed"].items())
    for name, value in _randomize(first).items():
        parameters[name].data = value
    logits = judge.train()(input_ids=_ids(), use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), _ids()[:, 1:].flatten(), reduction="sum")
    loss.backward()
    wanted = float(loss.detach())
    assert not torch.equal(judge.eval()(input_ids=_ids()).logits, _without(judge))
    for mine in found.values():
        assert mine["loss"] == pytest.approx(wanted, rel=FP32_LOSSES)
        gap = sum(float((mine["gradients"][n] - p.grad).square().sum()) for n, p in parameters.items())
        size = sum(float(p.grad.square().sum()) for p in parameters.values())
        assert gap**0.5 <= FP32_NORMS * size**0.5


def _without(judge: Any) -> torch.Tensor:
    with judge.disable_adapter():
        return judge(input_ids=_ids()).logits


def _answers(ranks: Ranks, folder: str, adapter: str, quant: dict[str, Any]) -> torch.Tensor:
    config = config_of(folder, quant=quant, precision={"name": "fp32"}, model={"check": "off"})
    model = load_for_inference(config, Path(adapter), world_of(ranks)).model
    with torch.no_grad():
        return model.logits(_ids())


@pytest.mark.parametrize(("method", "quant"), ALL)
def test_trains_and_resumes_and_plain_peft_loads_the_export(pool, tiny_model, chat_rows, tmp_path, method, quant):
    groups = _settings(method, quant, chat_rows, checkpoint={"every_steps": 2})
    runs = {n: pool.run(n, run_fit, str(tiny_model), str(tmp_path), f"on{n}", dict(groups))[0] for n in (1, 2, 3)}
    judge: Any = get_peft_model(_dense_copy(tiny_model, quant), STOCK[method]())
    first = pool.run(1, _computed, str(tiny_model), _settings(method, quant))[0]["first"]
    for name, parameter in _adapters(judge).items():
        parameter.data = first[name]
    wanted = reference_losses(judge, _batches(tiny_model, chat_rows, tmp_path / "cache"), LR)
    assert wanted[-1] != wanted[0]
    for run in runs.values():
        assert max(apart(losses(run["metrics"]), wanted)) <= FP32_LOSSES
        assert max(apart(norms(run["metrics"]), norms(runs[1]["metrics"]))) <= FP32_NORMS
    split = {**groups, "train": {"max_steps": 2}}
    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "split", split)
    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "split", dict(groups))
    assert essence(metrics(tmp_path / "split")) == essence(metrics(tmp_path / "on2"))
    exported = [tmp_path / name / "adapter" for name in ("on2", "split")]
    assert len({(folder / "adapter_model.safetensors").read_bytes() for folder in exported}) == 1
    plain = PeftModel.from_pretrained(_dense_copy(tiny_model, quant), exported[0]).eval()
    mine = pool.run(2, _answers, str(tiny_model), str(exported[0]), QUANT[quant])[0]
    with torch.no_grad():
        torch.testing.assert_close(mine, plain(input_ids=_ids()).logits, rtol=1e-4, atol=1e-5)


def _held(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    prepared = build(ranks, folder, **groups)
    optimizer = ShardedOptimizer(trainable_parameters(prepared.model), prepared.config.optim)
    optimizer.prepare_state(1)
    planned, lora = prepared.plan.bytes, prepared.config.lora
    held = {
        "base": sum(resident_bytes(m) for m in prepared.model.modules() if isinstance(m, QuantMatrices)),
        "adapters": sum(local_tensor(p).numel() * 4 for _, p in trainable_parameters(prepared.model)),
        "optimizer": optimizer.state_bytes(),
    }
    fixed = [*build_method(lora.method).fixed(prepared.model, lora).values()]
    if lora.method == "dora":  # its norms are kept from the first forward on, which leaves units gathered
        prepared.model(_ids(), _ids())
        fixed += [m._kept[1] for m in prepared.model.modules() if isinstance(m, StepNorms) and m._kept is not None]
        assert fixed
    return {**held, "fixed": sum(tensor.nbytes for tensor in fixed)}, {
        "fixed": prepared.plan.memory.adapters.fixed,
        "base": planned.base_packed + planned.base_statistics,
        "adapters": planned.adapters,
        "optimizer": planned.optimizer,
    }


@pytest.mark.parametrize("method", some_in_full(STOCK, {"lokr"}))
def test_planned_bytes_are_the_held_ones(pool, tiny_model, method):
    for num_ranks in (1, 2, 3):
        found = pool.run(num_ranks, _held, str(tiny_model), _settings(method, "nf4"))
        for key, planned in found[0][1].items():
            assert planned == max(held[key] for held, _ in found), key


@pytest.mark.parametrize("method", some_in_full(STOCK, {"randlora"}))
def test_in_bf16_it_trains_near_float32(pool, tiny_model, chat_rows, tmp_path, method):
    groups = _settings(method, "nf4", chat_rows)
    exact = losses(pool.run(2, run_fit, str(tiny_model), str(tmp_path), "fp32", dict(groups))[0]["metrics"])
    for num_ranks in (1, 2):
        name, half = f"bf16 on {num_ranks}".replace(" ", "_"), {**groups, "precision": {"name": "bf16"}}
        found = losses(pool.run(num_ranks, run_fit, str(tiny_model), str(tmp_path), name, half)[0]["metrics"])
        assert found == pytest.approx(exact, rel=1e-2)


def _merged(ranks: Ranks, folder: str, method: str) -> tuple[str, bool, int]:
    model = build(ranks, folder, **_settings(method, "nf4")).model
    layers = adapted_layers(model)
    readable = all(isinstance(layer.get_base_layer(), ReadableLinear) for layer in layers.values())
    shared = {id(getattr(layer, "vera_A", None)) for layer in layers.values()}
    try:
        model.peft.merge_adapter()
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}", readable, len(shared)
    return "merged", readable, len(shared)


def test_merging_is_refused_and_shared_projections_exist_once(pool, tiny_model):
    for method in ("vera", "shira"):
        said, readable, shared = pool.run(2, _merged, str(tiny_model), method)[0]
        assert said.startswith("2 merge: ") and readable and shared == 1


def test_shared_projections_are_in_the_file_once(pool, tiny_model, chat_rows, tmp_path):
    pool.run(2, run_fit, str(tiny_model), str(tmp_path), "run", _settings("vera", "nf4", chat_rows))
    with safe_open(tmp_path / "run/adapter/adapter_model.safetensors", framework="pt") as stored:
        names = [name for name in stored.keys() if "vera_A" in name or "vera_B" in name]  # noqa: SIM118
    assert sorted(names) == ["base_model.vera_A", "base_model.vera_B"]


def _refused(ranks: Ranks, folder: str, lora: dict[str, Any]) -> str:
    try:
        build(ranks, folder, lora=lora, model={"check": "off"})
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"variant": "c3a"}, "2 lora.variant: c3a does not fit model.layers.0.self_attn.q_proj [128, 128]: "),
        ({"variant": "oft", "options": {"oft_block_size": 48}}, "2 lora.variant: oft does not fit "),
        ({"variant": "hra", "r": 3}, "2 lora.variant: hra does not fit "),
        ({"variant": "miss", "r": 1000}, "2 lora.variant: miss does not fit "),
        ({"variant": "vera", "dropout": 0.1, "options": {"group_size": 2}}, "2 lora.options: vera has no 'group_size'"),
        ({"variant": "oft", "dropout": 0.1}, "2 lora.dropout: oft does not drop its input"),
        ({"variant": "moebius"}, "2 lora.variant: 'moebius' is not one of lora, rslora, dora, "),
    ],
    ids=str,
)
def test_what_a_method_cannot_do_is_refused(pool, tiny_model, lora, said):
    assert pool.run(1, _refused, str(tiny_model), lora)[0].startswith(said)


def test_every_method_is_judged():
    assert STOCK.keys() - {"patterns"} == PEFT_METHODS.keys()
