"""`lora.modules_to_save`: modules trained whole equal stock PEFT's, on any number of ranks, and load in plain PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters.experts import peft_config
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.norms import StepNorms
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.adapters.whole import as_saved
from fsdp_qlora.checks import reference
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import fill_slice
from fsdp_qlora.run.fit import fit
from fsdp_qlora.run.inference import load_for_inference
from tests import tiny
from tests.build import build, config_of, held_bytes, loaded_state, losses, run_fit, whole, world_of
from tests.distributed.test_merged import run_merge
from tests.families import write_family
from tests.tiers import some_in_full
from tests.tolerances import FP32_LOSSES, close

GRADIENTS = 1e-4
LOGITS = 1e-5
"""Largest difference of float32 logits, as a share of the largest."""

NONE = {"name": "none", "double_quant": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "head and norm": ("untied", {"lora": {"modules_to_save": ["lm_head", "model.norm"]}}),
    "shared table": ("tied", {"lora": {"modules_to_save": ["embed_tokens"]}}),
    "shared table, by its other name": ("tied", {"lora": {"modules_to_save": ["lm_head"]}}),
    "embedding": ("untied", {"lora": {"modules_to_save": ["embed_tokens"]}}),
    "all norms": ("tied", {"lora": {"modules_to_save": ["*norm"]}}),
    "linears, which are dense then": ("untied", {"lora": {"modules_to_save": ["down_proj", "model.layers.0.mlp"]}}),
    "head beside a quantized embedding": (
        "untied", {"lora": {"modules_to_save": ["lm_head"]}, "quant": {"embeddings": "nf4"}},
    ),
    "embedding beside a quantized head": (
        "untied", {"lora": {"modules_to_save": ["embed_tokens"]}, "quant": {"embeddings": "int8"}},
    ),
    "shared table that would be quantized": (
        "tied", {"lora": {"modules_to_save": ["embed_tokens"]}, "quant": {"embeddings": "nf4"}},
    ),
    "unquantized base": ("untied", {"lora": {"modules_to_save": ["lm_head", "*norm"]}, "quant": NONE}),
    "dora": ("untied", {"lora": {"modules_to_save": ["lm_head", "*norm"], "variant": "dora"}}),
    "gpt2": ("gpt2", {"lora": {"modules_to_save": ["ln_f", "wte", "c_proj"]}}),
    "router": ("qwen3_moe", {"lora": {"modules_to_save": ["mlp.gate"]}}),
    "experts": ("qwen3_moe", {"lora": {"modules_to_save": ["layers.1.mlp.experts"]}}),
    "gemma": ("gemma3_text", {"lora": {"modules_to_save": ["lm_head", "*norm"]}}),
    "adapters on embedding and head": ("untied", {"lora": {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}}),
    "adapters on both ends of a shared table": (
        "tied", {"lora": {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "variant": "rslora"}},
    ),
    "adapters on a scaled embedding": ("gemma3_text", {"lora": {"target_modules": ["v_proj", "embed_tokens"]}}),
    "an adapter on a capped head": ("gemma2", {"lora": {"target_modules": ["v_proj", "lm_head"]}}),
    "an adapter on one end of a shared table that is freed after the forward": (
        "tied", {"lora": {"target_modules": ["v_proj", "lm_head"]}, "fsdp": {"reshard_after_forward": "true"}},
    ),
    "adapters on an unquantized base's head": (
        "untied", {"lora": {"target_modules": ["v_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, "quant": NONE},
    ),
    "biases of adapted linears": ("qwen2", {"lora": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}}),
    "all biases": ("gpt2", {"lora": {"bias": "all"}}),
    "all biases, the head's too": ("phi", {"lora": {"bias": "all"}}),
    "biases beside a trained head": ("phi", {"lora": {"bias": "all", "modules_to_save": ["lm_head"]}}),
    "biases under dora": ("qwen2", {"lora": {"bias": "lora_only", "variant": "dora"}}),
}  # fmt: skip


def _model(folder: Path, kind: str) -> Path:
    if kind in ("tied", "untied"):
        return tiny.make_model(folder, tie_word_embeddings=kind == "tied")
    return write_family(folder, kind)


def _values(ranks: Ranks, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Give every trained tensor a random value; return them by name in PEFT's file."""
    values = {}
    for number, (name, parameter) in enumerate(trainable_parameters(model)):
        value = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            fill_slice(parameter, value, ranks.shard_rank, ranks.shard_size)
        values[name] = value
    return values


def _equals_peft(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[float, float, set[str]]:
    """Return the largest relative differences of losses and gradients from stock PEFT, and what is trained."""
    prepared = build(ranks, folder, precision={"name": "fp32"}, **groups)
    model, plan = prepared.model.train(), prepared.plan
    values = _values(ranks, model)
    draw = torch.Generator().manual_seed(0)
    size = min(300, prepared.shapes.vocab_size)
    rows = [torch.randint(0, size, (24,), generator=draw) for _ in range(6)]  # as many on 1, 2 or 3 ranks
    mine = {i: model(rows[i][None], rows[i][None]) for i in range(ranks.rank, len(rows), ranks.size)}
    sum(each.sum() for each in mine.values()).backward()
    ReplicatedGradients(trainable_parameters(model), ranks)()
    gradients = {name: whole(p.grad) for name, p in trainable_parameters(model)}

    dense = reference.load(Path(folder), torch.float32, torch.device("cpu"), False)
    reference.round_weights(dense, (*plan.quantized, *plan.quantized_edges))
    config = as_saved(peft_config(plan.targets, [], prepared.settings.lora), plan.modules, prepared.shapes, dense)
    truth = reference.compute(reference.adapt(dense, config, values).train(), rows)
    assert gradients.keys() == truth.gradients.keys()
    gaps = [float((mine[i].detach() - truth.losses[i]).abs().max() / truth.losses[i].abs().max()) for i in mine]
    total = sum(g.norm() ** 2 for g in truth.gradients.values()) ** 0.5
    slopes = [
        float((g - truth.gradients[n]).norm() / (truth.gradients[n].norm() + 1e-2 * total))
        for n, g in gradients.items()
    ]
    return max(gaps), max(slopes), set(gradients)


@pytest.mark.parametrize("num_ranks", some_in_full([1, 2, 3], [2]))
@pytest.mark.parametrize("kind", some_in_full(KINDS, ["head and norm"]))
def test_equals_stock_peft_on_a_dense_copy(pool, tmp_path, kind, num_ranks):
    base, groups = KINDS[kind]
    for gap, slope, names in pool.run(num_ranks, _equals_peft, str(_model(tmp_path / "base", base)), groups):
        assert gap <= FP32_LOSSES
        assert slope <= GRADIENTS
        beside = (".embed_tokens.", ".lm_head.")  # what is trained is not adapters on linears of the layers alone
        assert any(".lora_" not in name or any(table in name for table in beside) for name in names)


def _held(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes that this rank holds after a backward, by kind, and those planned for the fullest."""
    prepared = build(ranks, folder, **groups)
    ids = torch.arange(24)[None]
    prepared.model.train()(ids, ids).sum().backward()
    held = held_bytes(prepared)
    norms = (m for m in prepared.model.modules() if isinstance(m, StepNorms) and m._kept is not None)
    held["base_kept"] += sum(norm._kept[1].nbytes for norm in norms)
    planned = {kind: getattr(prepared.plan.bytes, kind) for kind in held}
    planned["gradients"] = 4 * prepared.plan.memory.held(prepared.plan.settings)
    return held, planned


@pytest.mark.parametrize("precision", some_in_full(["bf16", "fp32"], []))
@pytest.mark.parametrize("kind", some_in_full(KINDS, []))
def test_the_plan_counts_their_bytes_exactly(pool, tmp_path, kind, precision):
    base, groups = KINDS[kind]
    folder = str(_model(tmp_path / "base", base))
    of_ranks = pool.run(2, _held, folder, groups | {"precision": {"name": precision}})
    planned = of_ranks[0][1]
    assert {kind: max(held[kind] for held, _ in of_ranks) for kind in planned} == planned


def _settings(rows: Path, lora: dict[str, Any], precision: str = "bf16") -> dict[str, Any]:
    return {
        "data": {"train": str(rows), "max_length": 64},
        "lora": lora,
        "train": {"max_steps": 4, "global_batch_size": 6, "micro_batch_size": 1},
        "precision": {"name": precision},
    }


def _trained_logits(ranks: Ranks, folder: str, root: str, groups: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Train, and return the logits of the model that was trained."""
    prepared = build(ranks, folder, run={"output_root": root, "name": "run"}, **groups)
    fit(prepared)
    with torch.no_grad():
        return prepared.model.eval().logits(ids).clone()


def _loaded_logits(ranks: Ranks, adapter: str, groups: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    prepared = load_for_inference(config_of("", **groups), Path(adapter), world_of(ranks))
    with torch.no_grad():
        return prepared.model.logits(ids).clone()


EXPORTED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "untied": ("untied", {"modules_to_save": ["lm_head", "model.norm"]}, {"lm_head.weight", "model.norm.weight"}),
    "tied": ("tied", {"modules_to_save": ["embed_tokens"]}, {"model.embed_tokens.weight", "lm_head.weight"}),
    "norms": ("tied", {"modules_to_save": ["*layernorm"]}, {
        f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")}),
    "linears": ("untied", {"modules_to_save": ["o_proj"]},
                {f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}),
    "tables": ("untied", {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}, set()),
    "shared tables": ("tied", {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}, set()),
    "biases": ("qwen2", {"bias": "lora_only"},
               {f"model.layers.{i}.self_attn.{n}_proj.base_layer.bias" for i in (0, 1) for n in "qkv"}),
    "all biases": ("phi", {"bias": "all", "target_modules": ["q_proj"]}, {
        "lm_head.bias", "model.final_layernorm.bias",
        *(f"model.layers.{i}.{n}.bias" for i in (0, 1) for n in (
            "input_layernorm", "mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense",
            "self_attn.q_proj.base_layer"))}),
}  # fmt: skip


@pytest.mark.parametrize("kind", some_in_full(EXPORTED, ["tied"]))
def test_plain_peft_and_we_load_the_export_with_equal_logits_and_merge_it(pool, tmp_path, kind):
    base, lora, names = EXPORTED[kind]
    folder, rows = _model(tmp_path / "base", base), tiny.write_chat_rows(tmp_path / "rows.jsonl", 12)
    ids, settings = torch.arange(5, 37)[None], _settings(rows, lora, "fp32") | {"quant": NONE}
    ours = pool.run(2, _trained_logits, str(folder), str(tmp_path), settings, ids)[0]
    adapter = tmp_path / "run" / "adapter"
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {n.removeprefix("base_model.model.") for n in stored if ".lora_" not in n} == names
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        before = dense(ids).logits
        theirs = PeftModel.from_pretrained(dense, adapter).eval()(ids).logits
    size = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < LOGITS * size < float((before - theirs).abs().max())
    again = pool.run(2, _loaded_logits, str(adapter), {"precision": {"name": "fp32"}, "quant": NONE}, ids)[0]
    assert float((again - theirs).abs().max()) < LOGITS * size
    said = pool.run(1, run_merge, str(folder), str(adapter), str(tmp_path / "merged"), "none", "original")[0]
    if said[0] != "original":
        assert base == "tied" and "whose table embedding and head share" in said[0]
        return
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():  # the base's files are in 16 bits, and so is the result
        assert float((merged(ids).logits - theirs).abs().max()) < 2e-2 * size
    for name in names:
        key = f"base_model.model.{name}"
        if key in stored and ".base_layer." not in name:
            assert torch.equal(merged.get_parameter(name).to(torch.bfloat16), stored[key].to(torch.bfloat16))


@pytest.mark.parametrize("kind", some_in_full(EXPORTED, []))
def test_resumes_with_the_same_bits_and_ranks_agree(pool, tmp_path, kind):
    base, lora, names = EXPORTED[kind]
    folder, rows = str(_model(tmp_path / "base", base)), tiny.write_chat_rows(tmp_path / "rows.jsonl", 12)
    settings = _settings(rows, lora) | {"checkpoint": {"every_steps": 2}}
    first = pool.run(2, run_fit, folder, str(tmp_path), "run", dict(settings))[0]["metrics"]
    saved = str(tmp_path / "run" / "checkpoints" / "step_00000002")
    arguments = folder, str(tmp_path), saved, _settings(rows, lora)
    states = [pool.run(num_ranks, loaded_state, *arguments)[0] for num_ranks in (1, 2, 3)]
    assert states[0] == states[1] == states[2]
    assert len([n for n in states[0] if ".lora_" not in n]) >= 3 * (len(names) - (kind == "tied"))
    again = _settings(rows, lora) | {"checkpoint": {"resume": saved}}
    more = pool.run(2, run_fit, folder, str(tmp_path), "again", again)[0]["metrics"]
    assert losses(more)[-2:] == losses(first)[-2:]
    of_ranks = [
        losses(pool.run(n, run_fit, folder, str(tmp_path), f"on{n}", _settings(rows, lora, "fp32"))[0]["metrics"])
        for n in (1, 2)
    ]
    assert close(*of_ranks, FP32_LOSSES)
