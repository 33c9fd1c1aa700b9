"""An adapter that is not whole, or not of this base, is refused by name; stock PEFT says what it is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fsdp_qlora.adapters.based import require_base, require_targets
from fsdp_qlora.adapters.fold import StoredAdapter
from fsdp_qlora.adapters.folder import read_adapter_config, stored_modules
from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from tests.distributed.test_many_adapters import make_adapters
from tests.distributed.test_peft_methods import STOCK, _dense_copy
from tests.tiers import some_in_full

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SELECTED: dict[str, dict[str, Any]] = {
    "endings": {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    "a regular expression": {"target_modules": r".*\.(q|v)_proj"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


def _base(folder: Path) -> Base:
    return Base(SafetensorsFolder(folder), read_shapes(build_skeleton(folder, torch.float32, "eager")), [])


def _stock(model: Path, target: Path, config: Any) -> Path:
    return Path(make_adapters(_dense_copy(model, "none"), target, {"a": lambda: config})["a"])


def _changed(folder: Path, target: Path, change: Any) -> Path:
    """Copy an adapter with other tensors."""
    shutil.copytree(folder, target)
    save_file(change(load_file(folder / FILE)), target / FILE)
    return target


@pytest.mark.parametrize("chosen", some_in_full(SELECTED, {"layers"}))
def test_tensors_are_those_of_the_linears_that_peft_means(tiny_model, tmp_path, chosen):
    folder, base = _stock(tiny_model, tmp_path, peft.LoraConfig(r=2, **SELECTED[chosen])), _base(tiny_model)
    require_targets(folder, base)
    judge: Any = PeftModel.from_pretrained(_dense_copy(tiny_model, "none"), str(folder))
    meant = sorted(judge.base_model.targeted_module_names)
    assert meant == stored_modules(folder, read_adapter_config(folder))
    last, other = f"base_model.model.{meant[-1]}.", "base_model.model.model.layers.0.self_attn.o_proj."
    fewer = _changed(folder, tmp_path / "b", lambda ts: {n: t for n, t in ts.items() if not n.startswith(last)})
    with pytest.raises(ModelError, match=rf"no tensors for 1 of the {len(meant)} modules .*\(first: {meant[-1]}\)"):
        require_targets(fewer, base)
    more = _changed(
        folder, tmp_path / "c", lambda ts: ts | {n.replace(last, other): t.clone() for n, t in ts.items() if last in n}
    )
    with pytest.raises(ModelError, match=r"has tensors for 1 modules that target_modules .*0\.self_attn\.o_proj\)"):
        require_targets(more, base)


def test_modules_trained_whole_and_tables_with_adapters_are_known(tiny_model, tmp_path):
    base = _base(tiny_model)
    whole = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    require_targets(_stock(tiny_model, tmp_path / "whole", whole), base)  # to PEFT, lm_head is then no target
    stock = _stock(tiny_model, tmp_path / "stock", peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    # as PEFT saves it with save_embedding_layers=False
    table = _changed(
        stock, tmp_path / "table", lambda ts: {n: t for n, t in ts.items() if not n.endswith(".base_layer.weight")}
    )
    require_targets(table, base)
    for ending, said in (
        ("lora_embedding_B", r"lacks 1 tensor\(s\) \(first: .*embed_tokens\.lora_embedding_B\)"),
        ("", r"no tensors for 1 of the 3 modules .*\(first: model\.embed_tokens\)"),
    ):
        less = _changed(
            table, tmp_path / f"less{ending}",
            lambda ts, end=ending: {n: t for n, t in ts.items() if "embed_tokens" not in n or not n.endswith(end)},
        )  # fmt: skip
        with pytest.raises(ModelError, match=said):
            require_targets(less, base)


@pytest.mark.parametrize("target_modules", ["(", 3, [["q_proj"]]])
def test_a_config_that_selects_by_nonsense_is_refused(tiny_model, tmp_path, target_modules):
    folder = _stock(tiny_model, tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": target_modules}))
    with pytest.raises(ModelError, match=r"adapter_config\.json is malformed|has no tensors for|that target_modules"):
        require_targets(folder, _base(tiny_model))


def test_half_an_adapter_and_tensors_of_another_method_are_refused(tiny_model, tmp_path):
    folder = _stock(tiny_model, tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    name = "base_model.model.model.layers.1.self_attn.q_proj."
    for number, (change, said) in enumerate((
        (lambda ts: {n: t for n, t in ts.items() if n != f"{name}lora_B.weight"}, r"lacks 1 tensor\(s\) \(first: "),
        (lambda ts: ts | {f"{name}lora_magnitude_vector": torch.ones(128)}, r"holds 1 tensor\(s\) that are no adapter"),
        (lambda ts: ts | {"base_model.vera_A": torch.ones(2, 128)}, r"holds 1 tensor\(s\) that are no adapter"),
    )):  # fmt: skip
        odd = _changed(folder, tmp_path / str(number), change)
        with pytest.raises(ModelError, match=said):
            stored_modules(odd, read_adapter_config(odd))


@pytest.mark.parametrize("method", some_in_full(STOCK, {"vera"}))
def test_a_merge_needs_the_tensors_that_peft_saves(tiny_model, tmp_path, method):
    """PEFT's own file passes; without one of its tensors, with another one or another shape, it is refused."""
    folder = _stock(tiny_model, tmp_path, STOCK[method]())
    linears = {x.name: x for x in _base(tiny_model).shapes.linears}
    sizes = {name: (linears[name].out_features, linears[name].in_features) for name in StoredAdapter(folder).modules}
    StoredAdapter(folder).require_fits(sizes)
    tensors = load_file(folder / FILE)
    first = min(name for name in tensors if ".layers.1." in name and not name.endswith(("randlora_A", "randlora_B")))
    for number, changed in enumerate((
        {name: tensor for name, tensor in tensors.items() if name != first},
        tensors | {first.replace("layers.1", "layers.7"): tensors[first].clone()},
        tensors | {first: torch.cat([tensors[first], tensors[first]]).contiguous()},
    )):  # fmt: skip
        odd = _changed(folder, tmp_path / str(number), lambda _, changed=changed: changed)
        with pytest.raises(ModelError, match=rf"adapter: {odd}"):
            StoredAdapter(odd).require_fits(sizes)


@pytest.mark.full
def test_a_copy_of_a_shared_tensor_must_equal_it(tiny_model, tmp_path):
    folder = _stock(tiny_model, tmp_path, STOCK["randlora"]())
    name = "base_model.model.model.layers.1.self_attn.q_proj.randlora_A"
    odd = StoredAdapter(_changed(folder, tmp_path / "b", lambda ts: ts | {name: ts[name] + 1}))
    with pytest.raises(ModelError, match=rf"{name} differs from base_model\.randlora_A, of which it is a copy"):
        odd.require_fits({odd.modules[0]: (128, 128)})


def test_without_a_fingerprint_vocabulary_and_name_tell(tiny_model, tmp_path):
    folder, base = _stock(tiny_model, tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"])), _base(tiny_model)
    assert require_base(folder, base, str(tiny_model)) == []
    (said,) = require_base(folder, base, "somebody/else")
    assert f"names {tiny_model} as its base" in said and "Its tensors fit somebody/else; whether it was" in said
    tokens = json.loads((tiny_model / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert require_base(folder, base, str(tiny_model)) == []
    turned = {token: len(vocabulary) - 1 - number for token, number in vocabulary.items()}
    tokens["model"]["vocab"] = turned
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ModelError, match=r"trained with another vocabulary than .*: \d+ of \d+ ids are other tokens"):
        require_base(folder, base, str(tiny_model))
