"""`export what=merged`: equal to stock PEFT's ``merge_and_unload`` on a float32 copy of the base, rounded once.

The judge's base is the model's own weights, or what bitsandbytes' functions make of them (rounded to the dtype in which
a run multiplies with them).
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from fsdp_qlora.adapters.fold import StoredAdapter
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.model.skeleton import read_shapes
from fsdp_qlora.run.merge import merge
from tests import tiny, upstream
from tests.build import world_of
from tests.distributed.test_peft_methods import QUANT, STOCK, _rounded
from tests.matrix import small_config
from tests.tiers import some_in_full

FAMILIES = ("llama", "qwen3_moe", "gpt_oss", "gemma3_text", "gpt2")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FORMS = ("original", "dequantized")


def lora(targets: Any = "all-linear") -> peft.LoraConfig:
    """Return PEFT's config of a LoRA."""
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]


def write_adapter(base: Path, folder: Path, config: Any, num_ids: int | None = None) -> Path:
    """Save an adapter of stock PEFT in which every trained value is random."""
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if num_ids is not None:
        dense.resize_token_embeddings(num_ids)
    model = get_peft_model(dense, config)
    torch.manual_seed(1)
    upstream.add_noise(model, 0.05)
    model.save_pretrained(folder, save_embedding_layers=False)  # whole tables, where they were resized
    return folder


@torch.no_grad()
def expected(
    base: Path, adapter: Path, quant: str, form: str, quantized: set[str], num_ids: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the state of PEFT's merge in float32, rounded to bf16 at the end."""
    torch.set_num_threads(1)  # the mean of the statistics depends on it
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if form == "dequantized" and quant != "none":
        for name in quantized:
            parameter = model.get_parameter(name)
            owner = model.get_submodule(name.rpartition(".")[0])
            turned = "c_" in name or bool(getattr(owner, "is_transposed", False))  # GPT-2's Conv1D, gpt-oss's experts
            for matrix in parameter if parameter.dim() == 3 else [parameter]:
                whole = (matrix.t() if turned else matrix).contiguous()
                rounded = _rounded(whole, quant).bfloat16().float()
                matrix.copy_(rounded.t() if turned else rounded)
    if num_ids is not None:
        model.resize_token_embeddings(num_ids)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: value.bfloat16() for name, value in merged.state_dict().items()}


def run_merge(
    ranks: Ranks, base: str, adapter: str, target: str, quant: str, form: str, overwrite: bool = False
) -> list[str]:
    """Merge as the command does with a run's settings; return what was folded into and why, or the error."""
    config = settings(base, quant, form)
    config = replace(config, run_from="run", export=replace(config.export, overwrite=overwrite))
    try:
        done = merge(config, Path(adapter), Path(target), world_of(ranks))
    except FsdpQloraError as error:
        return [str(error)]
    return [done.form, done.why]


def settings(base: str, quant: str, form: str) -> RunConfig:
    return from_dict({
        "model": {"name": base}, "quant": {**QUANT[quant], "allow_16bit": True}, "export": {"merge_base": form},
        "precision": {"name": "bf16"},
    })  # fmt: skip


def compare(pool: Any, tmp_path: Path, config: PreTrainedConfig, adapter: Any, quant: str, form: str) -> None:
    """Merge and compare with stock PEFT, bit for bit."""
    base = upstream.write_random(tmp_path / "base", config, torch.bfloat16)
    folder = write_adapter(base, tmp_path / "adapter", adapter)
    said = pool.run(1, run_merge, str(base), str(folder), str(tmp_path / "merged"), quant, form)[0]
    assert said[0] == form, said
    linears = _quantized(base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    state = merged.state_dict()
    theirs = expected(base, folder, quant, form, linears)
    assert state.keys() == theirs.keys() and merged.dtype == torch.bfloat16
    odd = {name: (value.float() - theirs[name].float()).abs().max().item() for name, value in state.items()
           if not torch.equal(value, theirs[name])}  # fmt: skip
    assert not odd, odd


def _quantized(base: Path) -> set[str]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    kinds = ("Linear", "Conv1D")
    inside = {n: m for n, m in model.named_modules() if type(m).__name__ in kinds and (".layers." in n or ".h." in n)}
    stacked = {n for n, p in model.named_parameters() if p.dim() == 3 and ".layers." in n}
    return {f"{name}.weight" for name in inside} | stacked


CASES = list(itertools.product(FAMILIES, QUANT, FORMS))


@pytest.mark.parametrize(
    ("family", "quant", "form"),
    some_in_full(
        CASES, {("llama", "nf4", "dequantized"), ("qwen3_moe", "nf4", "original"), ("gpt2", "int8", "dequantized")}
    ),
)
def test_a_merge_equals_pefts(pool, tmp_path, family, quant, form):
    compare(pool, tmp_path, small_config(family), lora(ATTENTION if "moe" in family else "all-linear"), quant, form)


@pytest.mark.parametrize(("tied", "spare"), [(True, 0), (False, 64), (True, 64)])
def test_added_tokens_are_rows_of_the_merged_tables(pool, tmp_path, tied, spare):
    base = tiny.make_base_model(tmp_path / "base", spare, tie_word_embeddings=tied)
    tokenizer = AutoTokenizer.from_pretrained(base)
    first = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    config, tables = lora(ATTENTION), ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config.trainable_token_indices = {table: [first, first + 1] for table in tables}
    folder = write_adapter(base, tmp_path / "adapter", config, len(tokenizer))
    tokenizer.save_pretrained(folder)
    said = pool.run(1, run_merge, str(base), str(folder), str(tmp_path / "merged"), "nf4", "original")[0]
    assert said[0] == "original", said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    theirs = expected(base, folder, "nf4", "original", set(), len(tokenizer))
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert model.config.vocab_size == len(tokenizer) == first + 2
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.convert_tokens_to_ids("<|im_end|>") == model.generation_config.eos_token_id[0]


@pytest.mark.parametrize(
    ("method", "form"), some_in_full(itertools.product(STOCK, FORMS), {("dora", "dequantized"), ("vera", "original")})
)
def test_each_method_merges_as_peft_does(pool, tmp_path, tiny_model, method, form):
    folder = write_adapter(tiny_model, tmp_path / "adapter", STOCK[method]())
    said = pool.run(1, run_merge, str(tiny_model), str(folder), str(tmp_path / "merged"), "nf4", form)[0]
    assert said[0] == form, said
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    theirs = expected(tiny_model, folder, "nf4", form, _quantized(tiny_model))
    for name, value in state.items():
        assert torch.equal(value, theirs[name]), name


def test_files_keep_their_layout_and_a_full_folder_is_left_alone(pool, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_config(small_config("llama"), dtype=torch.float32)
    model.save_pretrained(base, max_shard_size="60KB")
    names = sorted(file.name for file in base.glob("*.safetensors*"))
    assert len(names) > 3
    folder, target = write_adapter(base, tmp_path / "adapter", lora()), tmp_path / "merged"
    arguments = (str(base), str(folder), str(target), "nf4", "auto")
    form, why = pool.run(1, run_merge, *arguments)[0]
    assert form == "dequantized" and "not measured: no held-out rows" in why
    assert sorted(file.name for file in target.glob("*.safetensors*")) == names
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == torch.bfloat16  # the base is in float32
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    (message,) = pool.run(1, run_merge, *arguments)[0]
    assert message.startswith("export.to:") and "export.overwrite=true" in message
    assert before == {file.name: file.read_bytes() for file in target.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_only_an_earlier_merge_is_replaced(pool, tmp_path, tiny_model):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    folder = write_adapter(base, tmp_path / "adapter", lora())
    others = tmp_path / "others"
    others.mkdir()
    (others / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(others, target_is_directory=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target, said in (
        (base, "which is read here"), (folder, "which is read here"), (tmp_path, "or holds"), (others, "no earlier merge"),
        (tmp_path / "file", "is a file"), (tmp_path / "link", "is a link"),
    ):  # fmt: skip
        (message,) = pool.run(1, run_merge, str(base), str(folder), str(target), "nf4", "original", True)[0]
        assert message.startswith("export.to:") and said in message
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for form in FORMS:
        assert pool.run(1, run_merge, str(base), str(folder), str(tmp_path / "merged"), "nf4", form, True)[0][0] == form


def test_without_a_run_the_stored_weights_are_folded_into(pool, tmp_path, tiny_model):
    folder = write_adapter(tiny_model, tmp_path / "adapter", lora())
    form, why = pool.run(1, merge_alone, str(tiny_model), str(folder), str(tmp_path / "merged"))[0]
    assert form == "original" and "run_from" in why


def merge_alone(ranks: Ranks, base: str, adapter: str, target: str) -> list[str]:
    done = merge(settings(base, "nf4", "auto"), Path(adapter), Path(target), world_of(ranks))
    return [done.form, done.why]


def test_an_adapter_of_another_model_is_refused(pool, tmp_path, tiny_model):
    other = upstream.write_random(tmp_path / "base", small_config("gpt2"), torch.bfloat16)
    folder = write_adapter(other, tmp_path / "adapter", lora())
    (message,) = pool.run(1, run_merge, str(tiny_model), str(folder), str(tmp_path / "merged"), "nf4", "original")[0]
    assert message.startswith("adapter:") and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("text", ["[1]", "{", '{"cache_implementation": "none such"}'])
def test_a_base_whose_generation_config_transformers_cannot_read_is_refused(pool, tmp_path, text):
    base = tiny.make_model(tmp_path / "base")
    folder = write_adapter(base, tmp_path / "adapter", lora())
    (base / "generation_config.json").write_text(text)
    (message,) = pool.run(1, run_merge, str(base), str(folder), str(tmp_path / "merged"), "nf4", "original")[0]
    assert message.startswith(f"model.name: transformers cannot read {base}/generation_config.json: ")
    assert not (tmp_path / "merged").exists()


def on_experts(*weights: str, **more: Any) -> peft.LoraConfig:
    """Return PEFT's config of a LoRA on attention and stacked weights of experts, of another rank there."""
    names = [f"mlp.experts.{weight}" for weight in weights]
    ranks = dict.fromkeys(names, 3)
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=names, rank_pattern=ranks,
        task_type="CAUSAL_LM", **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "form"),
    some_in_full(
        itertools.product(("qwen3_moe", "mixtral", "olmoe", "gpt_oss"), FORMS),
        {("qwen3_moe", "original"), ("gpt_oss", "dequantized")},
    ),
)
def test_experts_merge_as_in_peft(pool, tmp_path, family, form):
    compare(pool, tmp_path, small_config(family), on_experts("gate_up_proj", "down_proj"), "nf4", form)


@pytest.mark.full
def test_one_of_two_stacks_merges_with_rslora(pool, tmp_path):
    compare(pool, tmp_path, small_config("qwen3_moe"), on_experts("down_proj", use_rslora=True), "nf4", "original")


@pytest.mark.full
def test_a_stack_is_folded_in_pieces_with_equal_bits(tmp_path):
    """PEFT's product of a few experts has the bits of its product of all."""
    base = upstream.write_random(tmp_path / "base", small_config("qwen3_moe"), torch.bfloat16)
    adapter = StoredAdapter(write_adapter(base, tmp_path / "adapter", on_experts("down_proj")))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    (stack, *_) = [x for x in read_shapes(model).linears if x.name in adapter.stacks]
    weight = model.get_parameter(stack.name)
    whole = adapter.fold_stack(stack, weight, [stack])
    pieces = adapter.fold_stack(stack, weight, [stack], at_once=2 * stack.numel_each)
    assert torch.equal(whole, pieces) and not torch.equal(whole, weight)


def test_experts_that_the_base_does_not_have_are_refused(pool, tmp_path, tiny_model):
    other = upstream.write_random(tmp_path / "base", small_config("qwen3_moe"), torch.bfloat16)
    folder = write_adapter(other, tmp_path / "adapter", on_experts("down_proj"))
    (message,) = pool.run(1, run_merge, str(tiny_model), str(folder), str(tmp_path / "merged"), "nf4", "original")[0]
    assert message.startswith("adapter:") and "experts" in message and not (tmp_path / "merged").exists()
