"""Checkpoints that are 4-bit already: their very bytes, written by transformers or by us; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdp_qlora.config.schema import QuantSettings, from_dict
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.errors import ConfigError, ModelError, StorageError
from fsdp_qlora.export import quantized_base
from fsdp_qlora.export.quantized_base import export_base
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.load.stored import PackedWeight, fill_packed, find_kept, find_weight, require_readable
from fsdp_qlora.model.skeleton import build_skeleton
from fsdp_qlora.quant.formats import build_format, quantize
from fsdp_qlora.quant.linear import QuantLinear
from fsdp_qlora.quant.packing import raw_bytes
from fsdp_qlora.shapes.linears import LinearShape
from tests import tiny

CPU = torch.device("cpu")
FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="session")
def packed(tiny_model, tmp_path_factory):
    made = {}

    def make(name="nf4", double_quant=True, **settings) -> Path:
        key = (name, double_quant, *map(str, settings.items()))
        if key not in made:
            target = tmp_path_factory.mktemp("packed") / "model"
            made[key] = tiny.make_packed(tiny_model, target, name, double_quant, **settings)
        return made[key]

    return make


def _layer(key, shape, name="nf4", double_quant=True) -> QuantLinear:
    layer = QuantLinear(shape[1], shape[0], build_format(name, double_quant), device="cpu")
    layer.stored = LinearShape(key.removesuffix(".weight"), *shape)
    return layer


def _same(layer: QuantLinear, weight: torch.Tensor) -> bool:
    expected = quantize(weight, layer.quant_format)
    pairs = [(getattr(layer, part), getattr(expected, part)) for part in ("packed", "absmax", "nested", "offset")]
    return all((a is None and b is None) or torch.equal(raw_bytes(a), raw_bytes(b)) for a, b in pairs)


@pytest.mark.parametrize(("name", "double_quant"), FORMATS)
def test_stored_bytes_are_ours(tiny_model, packed, name, double_quant):
    source = SafetensorsFolder(packed(name, double_quant))
    weights = load_file(tiny_model / "model.safetensors")
    for key in (Q, DOWN):  # one row; 2.75 rows
        layer = _layer(key, weights[key].shape, name, double_quant)
        found = find_weight(source, layer)
        assert isinstance(found, PackedWeight)
        rows = layer.packed.shape[0]
        fill_packed(layer, found, source, (0, rows), CPU)
        assert _same(layer, weights[key])


def test_any_storage_dtype_is_read_as_bytes(tiny_model, packed):
    source = SafetensorsFolder(packed(bnb_4bit_quant_storage=torch.bfloat16))
    assert source.entries[DOWN].dtype == "BF16"
    weight = load_file(tiny_model / "model.safetensors")[DOWN]
    layer = _layer(DOWN, weight.shape)
    fill_packed(layer, find_weight(source, layer), source, (0, 3), CPU)
    assert _same(layer, weight)


def test_what_was_left_in_16_bit_is_told_apart(packed):
    source = SafetensorsFolder(packed(llm_int8_skip_modules=["q_proj", "lm_head"]))
    assert source.entries[Q].dtype == "BF16"
    assert not isinstance(find_weight(source, _layer(Q, (128, 128))), PackedWeight)
    assert isinstance(find_weight(source, _layer(DOWN, (128, 352))), PackedWeight)
    with pytest.raises(ModelError, match=r"down_proj\.weight is stored in nf4, but this run keeps that .*") as refused:
        find_kept(source, DOWN, (128, 352))
    for setting in ("quant=none", "quant.overrides", "quant.embeddings=none"):
        assert setting in str(refused.value)
    assert "16 bit" not in str(refused.value), "precision=fp32 keeps 32"


def _edited(folder: Path, target: Path, edit) -> SafetensorsFolder:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    return SafetensorsFolder(target)


def _state(**changes):
    def edit(tensors):
        key = f"{Q}.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(tensors[key].tolist())), **changes}
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


def _put(ending, value):
    return lambda tensors: tensors.update({f"{Q}.{ending}": value})


def _drop(ending):
    return lambda tensors: tensors.pop(f"{Q}.{ending}")


def _scale(ending):
    return lambda tensors: tensors[f"{Q}.{ending}"].mul_(1.001)


def _nan(ending):
    return lambda tensors: tensors[f"{Q}.{ending}"].fill_(float("nan"))


def _bytes(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


STATE = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(("edit", "said"), [
    (_state(blocksize=128), "set quant.block_size=128"),
    (_state(nested_blocksize=1024), "nested_blocksize is 1024, not 256"),
    (_state(quant_type="fp4"), "quant_type is fp4, not nf4"),
    (_state(shape=[128, 64]), r"shape is \[128, 64\], not \[128, 128\]"),
    (_state(nested_offset=float("nan")), "nested_offset is nan"),
    (_state(nested_offset=1e39), "nested_offset is 1e"),
    (_state(nested_offset=10**400), "nested_offset is 1000"),
    (_state(nested_offset=None), "nested_offset is None"),
    (_put(STATE, _bytes(b"{broken")), "is not JSON"),
    (_put(STATE, _bytes(b"[" * 60000)), "is not JSON"),
    (_put(STATE, _bytes(b"\xff\xfe")), "is not JSON"),
    (_put(STATE, _bytes(b"[1]")), "is not a JSON object"),
    (_put(STATE, torch.zeros(70000, dtype=torch.uint8)), "has 70000 bytes"),
    (_scale("quant_map"), r"quant_map holds different values"),
    (_scale("nested_quant_map"), r"nested_quant_map holds different values"),
    (_drop("nested_quant_map"), r"no tensor .*nested_quant_map"),
    (_drop("nested_absmax"), r"no tensor .*nested_absmax"),
    (_drop("absmax"), r"no tensor .*q_proj\.weight\.absmax"),
    (_drop(STATE), r"q_proj\.weight has 0 of the tensors"),
    (_put("quant_state.bitsandbytes__fp4", _bytes(b"{}")), "has 2 of the tensors"),
    (_put("absmax", torch.zeros(255, dtype=torch.uint8)), "has 255 bytes, but its weight needs 256"),
    (_put("absmax", torch.zeros(256)), "is F32, not U8"),
    (_put("nested_absmax", torch.zeros(2)), "has 8 bytes, but its weight needs 4"),
    (lambda tensors: tensors.update({Q: tensors[Q][1:].clone()}), "8191 bytes, but its weight needs 8192"),
    (lambda tensors: tensors.update({Q.removesuffix("weight") + "SCB": torch.ones(128)}), "int8 form"),
])  # fmt: skip
def test_what_would_change_the_numbers_is_refused_by_name(packed, tmp_path, edit, said):
    source = _edited(packed(), tmp_path / "edited", edit)
    with pytest.raises(ModelError, match=said) as caught:
        find_weight(source, _layer(Q, (128, 128)))
    assert "q_proj.weight" in str(caught.value)


@pytest.mark.parametrize(("double_quant", "ending"), [(True, "nested_absmax"), (False, "absmax")])
def test_statistics_that_are_not_finite_are_refused_by_name(packed, tmp_path, double_quant, ending):
    source = _edited(packed("nf4", double_quant), tmp_path / "edited", _nan(ending))
    layer = _layer(Q, (128, 128), "nf4", double_quant)
    with pytest.raises(ModelError, match=rf"q_proj\.weight\.{ending} holds values that are not finite"):
        fill_packed(layer, find_weight(source, layer), source, (0, 1), CPU)


@pytest.mark.parametrize(("stored", "asked", "said"), [
    (("fp4", False), ("nf4", True), "set quant=fp4 quant.double_quant=false"),
    (("nf4", False), ("nf4", True), r"the settings ask for nf4 with double quantization; set quant.double_quant=false"),
    (("nf4", True), ("none", False), r"ask for no quantization; set quant=nf4 quant.double_quant=true"),
])  # fmt: skip
def test_other_settings_than_the_stored_format_name_the_overrides(packed, stored, asked, said):
    folder = packed(*stored)
    require_readable(folder, QuantSettings(*stored))
    with pytest.raises(ModelError, match=said):
        require_readable(folder, QuantSettings(*asked))
    if asked[0] != "none":  # also where config.json does not tell
        with pytest.raises(ModelError, match=said):
            find_weight(SafetensorsFolder(folder), _layer(Q, (128, 128), *asked))


@pytest.mark.parametrize(("config", "said"), [
    ({"quantization_config": {"quant_method": "fp8"}}, "quantized with fp8"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with gptq"),
    ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantized with awq"),
    ({"compression_config": {"format": "pack"}}, "quantized with unknown"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "quantized with mxfp4"),
    ({"quantization_config": {"load_in_8bit": True}}, "quantized with bitsandbytes int8"),
    ({"quantization_config": [1]}, "is not a JSON object"),
    ([1], "is not a model's configuration"),
])  # fmt: skip
def test_other_methods_are_refused_by_name(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        require_readable(tmp_path, QuantSettings())


def _export(folder: Path, target: Path, name="nf4", double_quant=True, **settings):
    base = build_skeleton(folder, torch.bfloat16, "eager")
    return export_base(base, folder, target, build_format(name, double_quant), CPU, **settings)


@pytest.mark.parametrize(("name", "double_quant"), FORMATS)
def test_the_exported_base_is_what_transformers_writes(tiny_model, packed, tmp_path, name, double_quant):
    done = _export(tiny_model, tmp_path / "base", name, double_quant)
    assert done.quantized == 14
    theirs = load_file(packed(name, double_quant) / "model.safetensors")
    ours = load_file(tmp_path / "base" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (value.dtype, value.shape) == (ours[key].dtype, ours[key].shape), key
        assert torch.equal(raw_bytes(value), raw_bytes(ours[key])), key
    configs = [json.loads((f / "config.json").read_text()) for f in (packed(name, double_quant), tmp_path / "base")]
    assert configs[0] == configs[1]
    beside = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    assert all((tmp_path / "base" / f).read_bytes() == (tiny_model / f).read_bytes() for f in beside)
    assert (tmp_path / "base" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def _transformers_weights(folder: Path) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    found = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        found[name] = parameter.data if state is None else dequantize_4bit(parameter.data, state)
    return found


def test_transformers_loads_several_files_with_linears_outside_the_layers(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    vocab = tiny.make_tokenizer(tmp_path / "opt")
    shape = {"hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = OPTConfig(**shape, vocab_size=vocab, word_embed_proj_dim=64, max_position_embeddings=64)
    OPTForCausalLM(settings).to(torch.bfloat16).save_pretrained(str(tmp_path / "opt"), max_shard_size="200KB")
    done = _export(tmp_path / "opt", tmp_path / "base", file_bytes=50_000)
    files = sorted(f.name for f in (tmp_path / "base").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files) and index["metadata"]["total_size"] == done.num_bytes
    found, plain = _transformers_weights(tmp_path / "base"), _transformers_weights(tmp_path / "opt")
    assert found.keys() == plain.keys()
    kept = [n for n, w in plain.items() if torch.equal(w, found[n])]
    assert {"model.decoder.project_in.weight", "model.decoder.embed_tokens.weight"} <= set(kept)
    changed = plain.keys() - set(kept)
    assert len(changed) == done.quantized == 12
    # 4 bits are near the weights, and not anyone else's
    assert all((plain[n] - found[n]).abs().max() < 0.2 * plain[n].abs().max() for n in changed)


def test_an_export_appears_whole_or_not_at_all(tiny_model, packed, tmp_path, monkeypatch):
    target = tmp_path / "base"
    with pytest.raises(ModelError, match=r"export\.to: .* not empty"):
        _export(tiny_model, tiny_model)
    with pytest.raises(ModelError, match="already quantized"):
        _export(packed(), target)

    real, calls = quantized_base.save_file, []

    def full_disk(tensors, file, **settings):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(tensors, file, **settings)

    monkeypatch.setattr(quantized_base, "save_file", full_disk)
    with pytest.raises(StorageError, match=r"export\.to: .*No space left"):
        _export(tiny_model, target, file_bytes=50_000)
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    broken = tmp_path / "nan"
    tiny.make_model(broken)
    tensors = load_file(broken / "model.safetensors")
    tensors[DOWN][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj\.weight holds values that are not finite"):
        _export(broken, target)
    assert list(tmp_path.iterdir()) == [broken]
    target.mkdir()  # empty is as good as absent
    _export(tiny_model, target)
    assert (target / "model.safetensors").is_file()


def test_what_an_export_of_the_base_needs():
    with pytest.raises(ConfigError) as caught:
        check_verb("export", from_dict({"what": "base-4bit", "quant": {"name": "none"}, "export": {"checkpoint": "x"}}))
    assert all(key in str(caught.value) for key in ("model.name:", "export.to:", "quant:", "export.checkpoint:"))
    check_verb("export", from_dict({}))
