"""What is said about serving an adapter with vLLM, and the form that it reads right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fsdp_qlora.errors import ModelError
from fsdp_qlora.export.vllm import obstacles, rewrite_for_vllm, served_by_vllm
from tests.families import write_family
from tests.upstream import add_noise

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 12, "lora_alpha": 24, "bias": "none"}
NAMES = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]


@pytest.mark.parametrize(("more", "names", "said"), [
    ({}, NAMES, []),
    ({"use_rslora": True}, NAMES, []),
    ({"use_dora": True}, NAMES, ["DoRA"]),
    ({"modules_to_save": ["lm_head"]}, NAMES, ["modules_to_save"]),
    ({"bias": "lora_only"}, NAMES, ["biases"]),
    ({"trainable_token_indices": {"embed_tokens": [5]}}, NAMES, ["added tokens"]),
    ({"rank_pattern": {"q_proj": 4}}, NAMES, ["passes over rank_pattern"]),
    ({"alpha_pattern": {"q_proj": 4}}, NAMES, ["passes over alpha_pattern"]),
    ({"target_parameters": ["mlp.experts.down_proj"]}, NAMES, ["vllm#52198"]),
    ({"r": 600}, NAMES, ["largest rank is 512"]),
    ({"rank_pattern": {"q_proj": 600}}, NAMES, ["passes over rank_pattern", "has 600"]),
    ({"peft_type": "VERA"}, NAMES, ["LoRA only, not VERA"]),
    ({}, ["base_model.model.lm_head.lora_A.weight"], ["lm_head"]),
])  # fmt: skip
def test_what_vllm_refuses_or_gets_wrong_is_said(more, names, said):
    found = obstacles({**LORA, **more}, names)
    assert len(found) == len(said) and all(word in reason for word, reason in zip(said, found, strict=True)), found


def write(folder: Path, base: Path, **settings: Any) -> Any:
    """Save an adapter of stock PEFT with random values; return its logits on some tokens."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(**settings))
    torch.manual_seed(0)
    add_noise(model, 0.1)
    model.save_pretrained(folder)
    return model.eval()(input_ids=torch.arange(16)[None]).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_the_rewritten_form_computes_the_same(tmp_path, tiny_model, rslora):
    logits = write(
        tmp_path / "adapter", tiny_model, r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"],
        use_rslora=rslora, rank_pattern={"v_proj": 2, "down_proj": 7}, alpha_pattern={"q_proj": 3},
    )  # fmt: skip
    folder = tmp_path / "adapter"
    assert "vLLM: no" in served_by_vllm(folder) and "export.for_vllm=true" in served_by_vllm(folder)
    rewrite_for_vllm(folder)
    line = served_by_vllm(folder)
    assert line.startswith("vLLM: yes: vllm serve ") and "--max-lora-rank 8" in line and str(folder) in line
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (7, 7, False)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=torch.arange(16)[None]).logits
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)


def test_what_no_form_of_an_adapter_can_express_is_left_as_it_is(tmp_path, tiny_model):
    folder = tmp_path / "adapter"
    write(folder, tiny_model, r=4, target_modules=["q_proj"], use_dora=True)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "what=merged" in served_by_vllm(folder)
    with pytest.raises(ModelError, match=r"export\.for_vllm: .*DoRA.*what=merged"):
        rewrite_for_vllm(folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_whether_adapters_on_experts_are_served_depends_on_the_model(tmp_path):
    base = write_family(tmp_path / "base", "qwen3_moe")
    folder = tmp_path / "adapter"
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    write(folder, base, r=2, target_modules=["q_proj"], target_parameters=parameters)
    line = served_by_vllm(folder)
    assert "depends on the model" in line and "is_3d_moe_weight" in line and "what=merged" in line
    with pytest.raises(ModelError, match=r"export\.for_vllm: .*vllm#52198.*what=merged"):
        rewrite_for_vllm(folder)


@pytest.mark.full
def test_an_adapter_that_names_no_base_is_served_on_one_to_fill_in(tmp_path):
    folder = write_family(tmp_path / "base", "llama")
    write(tmp_path / "adapter", folder, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    file = tmp_path / "adapter/adapter_config.json"
    values = json.loads(file.read_text())
    assert f"vllm serve {folder} " in served_by_vllm(file.parent)
    file.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    said = served_by_vllm(file.parent)
    assert "vllm serve BASE " in said and "which the adapter does not name" in said
