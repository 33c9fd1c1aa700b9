"""objective=sft on models that read images: losses and gradients are upstream's, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from fsdp_qlora.adapters.experts import peft_config
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.whole import as_saved
from fsdp_qlora.checks import reference
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.load.stream import resident_bytes
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.quant.matrices import QuantMatrices
from fsdp_qlora.run.inference import load_for_inference
from tests.build import build, config_of, essence, losses, metrics, refused_fit, run_fit, whole, world_of
from tests.families import keep_as_packed
from tests.image_chats import VISION, mean_loss, upstream_losses, upstream_row
from tests.image_chats import chat_case as _case
from tests.objectives import held_and_planned, upstream_model
from tests.tolerances import FP32_LOSSES

pytestmark = pytest.mark.full


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", VISION)
def test_losses_are_upstreams_row_by_row(pool, tmp_path, family, num_ranks):
    model, groups = _case(tmp_path, family)
    ours = losses(pool.run(num_ranks, run_fit, model, str(tmp_path), "run", groups)[0]["metrics"])
    wanted, _ = pool.run(1, upstream_losses, model, groups, family)[0]
    assert len(ours) == 6 and ours == pytest.approx(wanted, rel=FP32_LOSSES)


def _gradients(ranks: Ranks, folder: str, groups: dict[str, Any], family: str) -> tuple[float, float, float]:
    """Return our loss of rows with two images, one and none, upstream's, and how far our gradients are off."""
    prepared = build(ranks, folder, **groups)
    data = prepared.data
    assert data is not None and data.train is not None
    objective = build_objective(prepared.settings.objective)
    with torch.no_grad():
        for parameter in dict(trainable_parameters(prepared.model)).values():
            local_tensor(parameter).normal_(std=0.1)  # B starts at zero, and A would get no gradient
    batch = data.encoder.rows(data.train).collate([0, 1, 2, 3], 0)
    (ours, _), *_ = objective.sums(prepared.model.train(), batch.to(ranks.device)).values()
    ours.backward()
    trained = dict(trainable_parameters(prepared.model))
    values = {name: whole(p).detach().clone() for name, p in trained.items()}
    own = {name: whole(p.grad).detach().clone() for name, p in trained.items() if p.grad is not None}
    config = peft_config(prepared.plan.targets, [], prepared.settings.lora, objective.task_type)
    upstream: Any = upstream_model(prepared)
    config = as_saved(config, prepared.plan.modules, prepared.shapes, upstream)
    adapted = reference.adapt(upstream, config, values).train()
    file, total = Path(groups["data"]["train"]), 0.0
    for line in file.read_text().splitlines()[:4]:
        row = upstream_row(Path(folder), family, json.loads(line), file.parent)
        loss = adapted(**row).loss * int((row["labels"][:, 1:] != -100).sum())
        (loss * ranks.size).backward()  # each rank has computed the same rows, and ours are added up
        total += float(loss.detach())
    # upstream's towers end before their last layer, whose adapters get no gradient there, and zeros here
    theirs = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable_parameters(adapted)}
    assert own.keys() == theirs.keys()
    prepared.close()
    if not prepared.config.lora.modules_to_save and prepared.config.lora.target_modules == "all-linear":
        assert all("language_model" in name for name in own)
    off = max(float((own[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-12)) for n in own)
    return float(ours), total, off


@pytest.mark.parametrize("family", VISION)
def test_gradients_are_upstreams(pool, tmp_path, family):
    model, groups = _case(tmp_path, family, model={"check": "off"})
    ours, theirs, off = pool.run(2, _gradients, model, groups, family)[0]
    assert ours == pytest.approx(theirs, rel=FP32_LOSSES) and off < 1e-5


def _exported_loss(ranks: Ranks, folder: str, groups: dict[str, Any], adapter: str, family: str) -> float:
    """Return the mean loss of all rows in plain transformers and PEFT, with our rounded weights and the adapter."""
    prepared = build(ranks, folder, **groups)
    adapted: nn.Module = PeftModel.from_pretrained(upstream_model(prepared), adapter).eval()  # type: ignore[arg-type]
    prepared.close()
    file = Path(groups["data"]["train"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return mean_loss(adapted, [upstream_row(Path(folder), family, row, file.parent) for row in rows])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_run_resumes_and_its_adapter_loads_in_plain_peft(pool, tmp_path, family):
    model, groups = _case(tmp_path, family, checkpoint={"every_steps": 3})
    groups["data"] |= {"eval": groups["data"]["train"]}
    whole_run = pool.run(2, run_fit, model, str(tmp_path), "whole", groups)[0]
    pool.run(2, run_fit, model, str(tmp_path), "split", {**groups, "train": {"max_steps": 3}})
    pool.run(2, run_fit, model, str(tmp_path), "split", groups)
    assert essence(metrics(tmp_path / "split"))[-1] == essence(metrics(tmp_path / "whole"))[-1]
    one, two = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("split", "whole"))
    assert one.read_bytes() == two.read_bytes()
    pool.run(1, run_fit, model, str(tmp_path), "elastic", {**groups, "train": {"max_steps": 3}})
    elastic = losses(pool.run(2, run_fit, model, str(tmp_path), "elastic", groups)[0]["metrics"])
    assert elastic == pytest.approx(losses(whole_run["metrics"]), rel=FP32_LOSSES)
    adapter = tmp_path / "whole/adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert (adapter / "preprocessor_config.json").is_file() and (adapter / "tokenizer.json").is_file()
    loss = pool.run(1, _exported_loss, model, groups, str(adapter), family)[0]
    assert loss == pytest.approx(whole_run["summary"]["eval_loss_after"], rel=FP32_LOSSES)


BOTH: dict[str, dict[str, Any]] = {
    "llava": {"target_modules": ["q_proj", "model.vision_tower.*.q_proj", "multi_modal_projector.linear_1"]},
    "qwen2_vl": {"target_modules": ["q_proj", "down_proj", "model.visual.*.qkv"]},
    "llava, projector": {"modules_to_save": ["multi_modal_projector"]},
}
"""Settings that also train what only images pass through."""


@pytest.mark.parametrize("how", BOTH)
def test_the_vision_tower_is_trained_too(pool, tmp_path, how):
    family, trained = how.partition(",")[0], "multi_modal_projector" if "projector" in how else "vis"
    model, groups = _case(tmp_path, family, model={"check": "off"}, lora=BOTH[how])
    ours, theirs, off = pool.run(2, _gradients, model, groups, family)[0]
    assert ours == pytest.approx(theirs, rel=FP32_LOSSES) and off < 1e-5
    groups["data"]["eval"] = groups["data"]["train"]
    one = pool.run(1, run_fit, model, str(tmp_path), "one", groups)[0]
    two = pool.run(2, run_fit, model, str(tmp_path), "two", groups)[0]  # a rank may have texts alone
    assert losses(two["metrics"]) == pytest.approx(losses(one["metrics"]), rel=FP32_LOSSES)
    saved = load_file(tmp_path / "two/adapter/adapter_model.safetensors")
    assert any(trained in name and bool(value.any()) for name, value in saved.items() if "lora_A" not in name)
    loss = pool.run(1, _exported_loss, model, groups, str(tmp_path / "two/adapter"), family)[0]
    assert loss == pytest.approx(two["summary"]["eval_loss_after"], rel=FP32_LOSSES)


QUANTIZED: dict[str, dict[str, Any]] = {
    "llava": {"quant": {"vision": "nf4"}, "lora": BOTH["llava"]},
    "llava, siglip": {"quant": {"vision": "nf4", "overrides": {"*.vision_tower.*.fc1": "none"}}},
    "qwen2_vl": {"quant": {"vision": "nf4", "block_size": 128}, "lora": BOTH["qwen2_vl"]},
    "qwen2_5_vl": {"quant": {"name": "nf4", "vision": "int8", "llm_int8_threshold": 1e-6}},
}
"""Settings that quantize what images alone pass through, too; adapters on it, on some of it, or on none."""


@pytest.mark.parametrize("family", QUANTIZED)
def test_the_vision_tower_is_quantized_too(pool, tmp_path, family):
    model, groups = _case(tmp_path, family, **QUANTIZED[family])
    groups["data"]["eval"] = groups["data"]["train"]
    for num_ranks in (1, 2):
        ran = pool.run(num_ranks, run_fit, model, str(tmp_path), f"{num_ranks}", groups)[0]
        wanted, after = pool.run(1, upstream_losses, model, groups, family)[0]
        assert losses(ran["metrics"]) == pytest.approx(wanted, rel=FP32_LOSSES)
        assert ran["summary"]["eval_loss_after"] == pytest.approx(after, rel=FP32_LOSSES)
    groups["model"] = {**groups.get("model", {}), "check": "off"}
    ours, theirs, off = pool.run(2, _gradients, model, groups, family)[0]
    assert ours == pytest.approx(theirs, rel=FP32_LOSSES) and off < 1e-5
    for num_ranks in (1, 3):
        results = pool.run(num_ranks, _packed_and_planned, model, groups)
        assert max(held for held, _, _ in results) == results[0][1] and results[0][2] > 0


def _packed_and_planned(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[int, int, int]:
    """Return the bytes of packed weights and statistics that this rank holds, those planned, and weights of a tower."""
    prepared = build(ranks, folder, **groups)
    planned, beside = prepared.plan.bytes, prepared.shapes.beside
    held = sum(resident_bytes(m) for m in prepared.model.base.modules() if isinstance(m, QuantMatrices))
    return held, planned.base_packed + planned.base_statistics, sum(
        isinstance(m, QuantMatrices) for n, m in prepared.model.base.named_modules()
        if n.removesuffix(".base_layer") in beside
    )  # fmt: skip


def _stock_loss(ranks: Ranks, folder: str, groups: dict[str, Any], adapter: str, family: str) -> float:
    """Return the mean loss of all rows in plain PEFT, on a base that transformers quantizes with bitsandbytes."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", device_map={"": "cpu"},
        quantization_config=quantization,
    )  # fmt: skip
    keep_as_packed(model)
    assert all(type(m) is not nn.Linear for n, m in model.named_modules() if "vis" in n or "projector" in n)
    adapted: nn.Module = PeftModel.from_pretrained(model, adapter).eval()  # type: ignore[arg-type]
    file = Path(groups["data"]["train"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return mean_loss(adapted, [upstream_row(Path(folder), family, row, file.parent) for row in rows])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_its_adapter_loads_on_what_bitsandbytes_quantizes(pool, tmp_path, family):
    model, groups = _case(tmp_path, family, quant={"vision": "nf4"}, lora=BOTH[family])
    groups["data"]["eval"] = groups["data"]["train"]
    ran = pool.run(2, run_fit, model, str(tmp_path), "run", groups)[0]
    loss = pool.run(1, _stock_loss, model, groups, str(tmp_path / "run/adapter"), family)[0]
    assert loss == pytest.approx(ran["summary"]["eval_loss_after"], rel=FP32_LOSSES)


SPREAD = {
    "a copy on every rank": {"fsdp": {"shard_degree": 1, "replicate_degree": 2}},
    "layers recomputed": {"train": {"activation_checkpointing": "full"}},
    "layers kept gathered": {"fsdp": {"reshard_after_forward": "false"}},
    "parameters on the host": {"fsdp": {"offload": "params"}},
    "paged optimizer": {"optim": {"name": "paged_adamw_32bit"}},
    "micro-batches by tokens": {"train": {"micro_batch_tokens": 96}},
    "adapters on every rank": {"fsdp": {"adapters": "replicated"}},
    "the tower packed, on the host": {"fsdp": {"offload": "params"}, "quant": {"vision": "nf4"}},
    "the tower packed, recomputed": {"train": {"activation_checkpointing": "full"}, "quant": {"vision": "nf4"}},
}


@pytest.mark.parametrize("how", SPREAD)
def test_how_it_is_spread_changes_no_loss(pool, tmp_path, how):
    model, groups = _case(tmp_path, "qwen2_vl", quant=SPREAD[how].get("quant", {}))
    plain = losses(pool.run(2, run_fit, model, str(tmp_path), "plain", groups)[0]["metrics"])
    merged = {name: {**groups.get(name, {}), **SPREAD[how].get(name, {})} for name in {*groups, *SPREAD[how]}}
    layout = "copies" if how == "a copy on every rank" else "shard"
    other = losses(pool.run(2, run_fit, model, str(tmp_path), "other", merged, layout=layout)[0]["metrics"])
    assert len(other) == 6 and other == pytest.approx(plain, rel=FP32_LOSSES)


HELD: dict[str, dict[str, Any]] = {
    "qwen2_vl": {}, **{how: {"lora": lora} for how, lora in BOTH.items()}, "llava, quantized": QUANTIZED["llava"],
    "qwen3_vl": {},
}  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("how", HELD)
def test_planned_bytes_are_held(pool, tmp_path, how, num_ranks):
    model, groups = _case(tmp_path, how.partition(",")[0], model={"check": "off"}, **HELD[how])
    results = pool.run(num_ranks, held_and_planned, model, groups)
    planned = results[0][1]
    assert {key: max(held[key] for held, _ in results) for key in planned} == planned


def _with_other_pixels(ranks: Ranks, folder: str, groups: dict[str, Any]) -> str:
    """Return what the check says of code that brightens images a little."""
    outputs = CausalModel.outputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CausalModel, "outputs",
            lambda self, pixel_values, **rest: outputs(self, pixel_values=pixel_values * 1.01, **rest),
        )  # fmt: skip
        return refused_fit(ranks, folder, str(groups["root"]), {k: v for k, v in groups.items() if k != "root"})


def test_other_pixels_are_found_by_the_check(pool, tmp_path):
    model, groups = _case(tmp_path, "llava", model={"check": "always"})
    assert "would not match its own code" in pool.run(1, _with_other_pixels, model, {**groups, "root": tmp_path})[0]


LANGUAGE = ["q_proj", "v_proj", "down_proj", "up_proj"]
BY_HEART: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"quant": {"vision": "nf4"}, "lora": {"target_modules": [*LANGUAGE, "model.visual.*.qkv"]}},
    "llava": {"lora": {"target_modules": LANGUAGE}},
}


@pytest.mark.parametrize("family", BY_HEART)
def test_sixteen_rows_are_learned_by_heart_in_bf16(pool, tmp_path, family):
    own = BY_HEART[family]
    model, groups = _case(
        tmp_path, family, precision={"name": "bf16"}, optim={"lr": 0.01}, data={"max_rows": 16},
        quant=own.get("quant", {}), lora={"r": 16, "alpha": 32, **own["lora"]},
        train={"max_steps": 40, "global_batch_size": 16, "micro_batch_size": 4},
    )  # fmt: skip
    made = losses(pool.run(2, run_fit, model, str(tmp_path), "run", groups)[0]["metrics"])
    assert made[-1] < 0.3 * made[0]


def _whole_loss(ranks: Ranks, folder: str, groups: dict[str, Any], family: str) -> float:
    """Return the mean loss of all rows by a whole model in plain transformers."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    file = Path(groups["data"]["train"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return mean_loss(model.eval(), [upstream_row(Path(folder), family, row, file.parent) for row in rows])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_whole_base_is_trained_too(pool, tmp_path, family):
    model, groups = _case(tmp_path, family, quant={"name": "none", "double_quant": False}, lora={"variant": "none"})
    groups["optim"], groups["data"]["eval"] = {"lr": 2e-4}, groups["data"]["train"]
    one = pool.run(1, run_fit, model, str(tmp_path), "one", groups)[0]
    two = pool.run(2, run_fit, model, str(tmp_path), "two", groups)[0]
    assert losses(two["metrics"]) == pytest.approx(losses(one["metrics"]), rel=FP32_LOSSES)
    loss = pool.run(1, _whole_loss, str(tmp_path / "two/model"), groups, family)[0]
    assert loss == pytest.approx(two["summary"]["eval_loss_after"], rel=FP32_LOSSES)


def test_a_model_that_reads_images_is_loaded_without_rows_by_nobody(pool, tmp_path):
    model, groups = _case(tmp_path, "llava")
    said = pool.run(1, _answering, model, groups)[0]
    assert said.startswith("2 model.name: a llava reads images")


def _answering(ranks: Ranks, folder: str, groups: dict[str, Any]) -> str:
    """Return the refusal of a model to answer with."""
    try:
        load_for_inference(config_of(folder, precision=groups["precision"]), world=world_of(ranks))
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""
