"""What is taken from upstream's own code: buffers, dtypes, names, what surrounds the head, which linears may be swapped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fsdp_qlora.adapters.names import names_taken_for_experts
from fsdp_qlora.errors import ModelError, PlanError
from fsdp_qlora.heads.upstream import after_head, head_input
from fsdp_qlora.load.buffers import persistent_buffers
from fsdp_qlora.load.conversions import arrangement
from fsdp_qlora.load.inventory import take_stock
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.model.construct import float32_parameters
from fsdp_qlora.model.families import decoder_layers
from fsdp_qlora.model.replaceable import is_plain_linear, kept_linears, replaceable_linears
from fsdp_qlora.model.rope import rope_choice, settle_rope
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.shapes.targets import target_linears
from tests import upstream
from tests.matrix import small_config


def _folder(tmp_path: Path, model_type: str, **more) -> Path:
    return upstream.write_random(tmp_path / model_type, small_config(model_type, **more))


def _stock(folder: Path):
    base = build_skeleton(folder, torch.float32, "eager")
    source = SafetensorsFolder(folder)
    source.arrange(arrangement(base, source.entries))
    return take_stock(base, source), base, source


def _change(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["codegen", "gptj", "xglm", "gpt_neox", "llama", "phi3", "deepseek_v3", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_and_dtypes_are_those_of_from_pretrained(tmp_path, model_type, dtype):
    folder = _folder(tmp_path, model_type)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ours = build_skeleton(folder, dtype, "eager")
    saved = persistent_buffers(ours).keys()
    for name, buffer in theirs.named_buffers():
        mine = ours.get_buffer(name)
        assert mine.dtype == buffer.dtype, name
        assert name in saved or torch.equal(mine, buffer), name
    for name, parameter in theirs.named_parameters():
        assert ours.get_parameter(name).dtype == parameter.dtype, name
        assert ours.get_parameter(name).is_meta


@pytest.mark.parametrize("model_type", ["hy_v3", "dots1", "falcon_mamba"])
def test_what_upstream_keeps_in_float32_is_kept_whole_in_float32(tmp_path, model_type):
    folder = _folder(tmp_path, model_type)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wanted = {n for n, p in theirs.named_parameters() if p.dtype == torch.float32}
    ours = build_skeleton(folder, torch.bfloat16, "eager")
    assert float32_parameters(ours).keys() == wanted
    assert {n: b.dtype for n, b in ours.named_buffers()} == {n: b.dtype for n, b in theirs.named_buffers()}
    assert read_shapes(ours).float32 == wanted


def test_a_leftover_tensor_is_named(tmp_path):
    folder = _folder(tmp_path, "llama")
    _change(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    with pytest.raises(ModelError, match=re.escape("model.layers.0.self_attn.q_proj.bias")):
        _stock(folder)


def test_a_missing_buffer_is_named(tmp_path):
    folder = _folder(tmp_path, "deepseek_v3")
    name = next(n for n in load_file(folder / "model.safetensors") if n.endswith("e_score_correction_bias"))
    _change(folder, lambda t: t.pop(name))
    with pytest.raises(ModelError, match=re.escape(name)):
        _stock(folder)


def test_tensors_that_upstream_leaves_out_are_counted(tmp_path):
    folder = _folder(tmp_path, "gpt2")
    _change(folder, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}))
    stock, _, _ = _stock(folder)
    assert stock.left_out == ("transformer.h.0.attn.bias",)
    assert "1 tensors" in stock.describe()
    folder = _folder(tmp_path, "deepseek_v3")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert layers <= 8
    _change(folder, lambda t: t.update({"model.layers.61.eh_proj.weight": torch.zeros(4, 8)}))
    assert _stock(folder)[0].left_out == ("model.layers.61.eh_proj.weight",)


def test_a_second_copy_of_a_tied_weight_must_be_equal(tmp_path):
    folder = _folder(tmp_path, "llama", tie_word_embeddings=True)

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _change(folder, copy)
    assert _stock(folder)[0].copies == ("lm_head.weight",)
    _change(folder, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ModelError, match="tie_word_embeddings=false"):
        _stock(folder)


def test_a_tied_weight_under_its_other_name_is_found(tmp_path):
    folder = _folder(tmp_path, "llama", tie_word_embeddings=True)

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    _change(folder, rename)
    _, base, source = _stock(folder)
    shape = tuple(base.get_input_embeddings().weight.shape)
    assert source.find("model.embed_tokens.weight", shape).parts[0].name == "lm_head.weight"


def test_the_single_file_wins_over_an_old_index(tmp_path):
    folder = _folder(tmp_path, "llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "old.safetensors"}}))
    (folder / "._model.safetensors").write_bytes(b"left by macOS")
    assert "model.embed_tokens.weight" in SafetensorsFolder(folder).entries


def test_of_diffusers_files_the_one_without_a_variant_is_read(tmp_path):
    folder = _folder(tmp_path, "llama")
    whole = folder / "diffusion_pytorch_model.safetensors"
    (folder / "model.safetensors").rename(whole)
    save_file({"model.norm.weight": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    source = SafetensorsFolder(folder)
    assert {entry.file for entry in source.entries.values()} == {whole}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}), ("gemma2", {"final_logit_softcapping": 7.0}), ("granite", {"logits_scaling": 8.0}),
        ("hyperclovax", {"logits_scaling": 3.0}), ("mpt", {"logit_scale": "inv_sqrt_d_model"}), ("cohere", {}),
        ("recurrent_gemma", {}), ("bert", {}), ("bart", {}), ("modernbert-decoder", {}), ("inkling2_text", {}),
        ("xlstm", {}), ("gemma3", {}), ("llama4", {}),
    ],
)  # fmt: skip
def test_around_the_head_is_upstreams_own(tmp_path, model_type, more):
    model = AutoModelForCausalLM.from_config(small_config(model_type, **more), attn_implementation="eager").eval()
    upstream.randomize(model)
    after = after_head(model)
    ids = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        product = model.get_output_embeddings()(head_input(model, input_ids=ids, use_cache=False)).flatten(0, 1)
        if after.code is not None:
            found = after.code(product)
        else:
            found = product * after.scale
            found = found if after.softcap is None else after.softcap * torch.tanh(found / after.softcap)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_linear_with_a_forward_of_its_own_is_not_plain():
    assert is_plain_linear(nn.Linear(2, 2)) and not is_plain_linear(_Doubled(2, 2))


@pytest.mark.parametrize(("model_type", "kept"), [("falcon_mamba", "x_proj"), ("falcon", "query_key_value")])
def test_linears_whose_weights_others_read_are_kept(tmp_path, model_type, kept):
    base = build_skeleton(_folder(tmp_path, model_type), torch.float32, "eager")
    shapes_of = {x.name.rpartition(".")[2] for x in read_shapes(base).linears}
    assert kept not in shapes_of
    layers = tuple(n for n, m in base.named_modules() if m in decoder_layers(base))
    assert any(name.endswith(kept) for name in kept_linears(base, layers))


class _Attention(nn.Module):
    """As in diffusers, whose `fuse_projections` makes one linear of three if it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(4, 4), nn.Linear(4, 4)

    def fuse_projections(self) -> torch.Tensor:
        return self.to_q.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x) + x @ self.to_k.weight


def test_linears_of_any_module_are_found_but_those_that_its_forward_reads():
    assert [x.name for x in replaceable_linears(nn.Sequential(_Attention()))] == ["0.to_q"]


def test_only_text_layers_of_a_model_that_sees_are_units(tmp_path):
    base = build_skeleton(_folder(tmp_path, "gemma3"), torch.float32, "eager")
    assert all("vision" not in name for name in read_shapes(base).layers)


def test_peft_still_takes_these_names_for_experts():
    assert {"gate_proj", "up_proj", "down_proj"} <= names_taken_for_experts(CONFIG_MAPPING["deepseek_v3"]())
    assert names_taken_for_experts(CONFIG_MAPPING["llama"]()) == frozenset()


def test_an_adapter_that_peft_would_look_for_under_another_name_is_none(tmp_path):
    shapes = read_shapes(build_skeleton(_folder(tmp_path, "laguna"), torch.float32, "eager"))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in shapes.not_adapted} == {"shared_experts"}
    assert not read_shapes(build_skeleton(_folder(tmp_path / "other", "llama"), torch.float32, "eager")).not_adapted
    name = next(iter(shapes.not_adapted))
    with pytest.raises(PlanError, match=f"could not load an adapter for '{name}' in this model: it renames it"):
        target_linears(shapes, [name])
    none = replace(shapes, not_adapted=frozenset(x.name for x in shapes.linears))
    with pytest.raises(PlanError, match="kept in float32 by upstream, or would lose its adapter in plain PEFT"):
        target_linears(none, "all-linear")


def _long(original: int) -> dict:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "rope_theta": 1e4}
    return {"original_max_position_embeddings": original, "rope_parameters": rope | {
        "original_max_position_embeddings": original}}  # fmt: skip


@pytest.mark.parametrize(("max_length", "word"), [(64, "short"), (65, "long")])
def test_longrope_is_chosen_once_by_the_longest_row_of_the_run(tmp_path, max_length, word):
    folder = _folder(tmp_path, "phi3", **_long(4096))
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    ours = build_skeleton(folder, torch.float32, "eager")
    settle_rope(ours, max_length)
    assert word in str(rope_choice(ours.config, max_length))
    x = torch.zeros(1)
    long_batch = torch.arange(max_length)[None]
    wanted = theirs(x, long_batch)
    found = ours.get_submodule("model.rotary_emb")(x, long_batch)
    torch.testing.assert_close(found, wanted)
    short = ours.get_submodule("model.rotary_emb")(x, torch.arange(9)[None])
    torch.testing.assert_close(short[0], wanted[0][:, :9])


def test_dynamic_rope_refuses_rows_beyond_the_models_length(tmp_path):
    folder = _folder(tmp_path, "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    base = build_skeleton(folder, torch.float32, "eager")
    with pytest.raises(ModelError, match=r"data\.max_length"):
        settle_rope(base, 129)
    settle_rope(base, 128)
    assert rope_choice(base.config, 128) is None
