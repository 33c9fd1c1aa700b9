"""Adapters of older PEFT versions and other tools: read under PEFT's names, or refused with the reason."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from safetensors.torch import load_file, save_file

from fsdp_qlora.adapters.folder import stored_modules
from fsdp_qlora.adapters.spellings import spelt
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError, ModelError
from fsdp_qlora.run.inference import load_for_inference
from tests.build import build, config_of, whole, world_of
from tests.distributed.test_many_adapters import make_adapters, stock
from tests.distributed.test_peft_methods import STOCK, R, _dense_copy
from tests.tiers import some_in_full
from tests.tiny import make_model

SPELLINGS: dict[str, Callable[[str], str]] = {
    "the adapter's name inside": lambda n: n.replace(".weight", ".default.weight"),
    "another name inside": lambda n: n.replace(".weight", ".my_adapter.weight"),
    "lower case": lambda n: n.replace("lora_A", "lora_a").replace("lora_B", "lora_b"),
    "no base_model.model": lambda n: n.removeprefix("base_model.model."),
    "base_model alone": lambda n: n.replace("base_model.model.", "base_model.", 1),
    "no prefix at all": lambda n: n.removeprefix("base_model.model.model."),
    "compiled": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "data-parallel": lambda n: f"module.{n}",
}
OLD = ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path", "bias", "fan_in_fan_out",
       "inference_mode", "lora_dropout", "modules_to_save", "task_type")  # fmt: skip
"""The keys that PEFT 0.2 wrote."""


def _respelt(folder: Path, target: Path, spell: Callable[[str], str]) -> str:
    """Copy an adapter with other names, and the config that PEFT 0.2 would have written."""
    shutil.copytree(folder, target)
    file = target / "adapter_model.safetensors"
    save_file({spell(name): tensor for name, tensor in load_file(file).items()}, file)
    config = json.loads((target / "adapter_config.json").read_text())
    old = {key: config[key] for key in OLD} | {"enable_lora": None, "merge_weights": False}
    (target / "adapter_config.json").write_text(json.dumps(old))
    return str(target)


def _logits(ranks: Ranks, folder: str, adapters: list[str]) -> list[torch.Tensor]:
    ids = torch.arange(5, 25).view(1, -1)
    config = config_of(folder, model={"check": "off"}, precision={"name": "fp32"})
    with torch.no_grad():
        return [load_for_inference(config, Path(a), world_of(ranks)).model.logits(ids) for a in adapters]


def _started(ranks: Ranks, folder: str, adapter: str, lora: dict[str, Any]) -> dict[str, torch.Tensor]:
    prepared = build(ranks, folder, model={"check": "off"}, lora={**lora, "init_from": adapter})
    return {n: whole(p.detach()) for n, p in prepared.model.named_parameters() if p.requires_grad}


def test_other_spellings_are_the_same_adapter(pool, tiny_model, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    folders = make_adapters(_dense_copy(tiny_model, "none"), tmp_path, {"plain": lambda: config})
    plain = Path(folders["plain"])
    others = [_respelt(plain, tmp_path / str(n), spell) for n, spell in enumerate(SPELLINGS.values())]
    wanted, *found = pool.run(2, _logits, str(tiny_model), [str(plain), *others])[0]
    assert all(torch.equal(logits, wanted) for logits in found)
    lora = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    values = load_file(plain / "adapter_model.safetensors")
    for other in (others[0], others[5]):  # a run goes on from it
        started = pool.run(2, _started, str(tiny_model), other, lora)[0]
        assert len(started) == len(values)
        for name, value in values.items():
            key = "model." + name.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight")
            assert torch.equal(started[key], value)


@pytest.mark.parametrize("method", some_in_full(["randlora", "vera"], {"randlora"}))
def test_shared_projections_as_stock_peft_writes_them(pool, tiny_model, tmp_path, method):
    """RandLoRA's file repeats them in each layer; VeRA's may leave them out: PEFT draws them from a seed."""
    configs = {"randlora": STOCK["randlora"], "vera": lambda: VeraConfig(save_projection=False, **R)}
    folders = make_adapters(_dense_copy(tiny_model, "nf4"), tmp_path, {"a": configs[method]})
    (mine,) = pool.run(2, _logits, str(tiny_model), list(folders.values()))[0]
    with torch.no_grad():
        theirs = stock(_dense_copy(tiny_model, "nf4"), folders)(input_ids=torch.arange(5, 25).view(1, -1)).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    file = Path(folders["a"]) / "adapter_model.safetensors"
    if method == "vera":  # its config says that they are there, and they are not
        config = json.loads((file.parent / "adapter_config.json").read_text())
        (file.parent / "adapter_config.json").write_text(json.dumps(config | {"save_projection": True}))
        said = pool.run(1, _refused, str(tiny_model), folders["a"])[0]
        assert said.startswith("2 adapter: ") and "set save_projection=false in adapter_config.json" in said


@pytest.mark.full
def test_tables_that_peft_saves_beside_an_adapter_on_head_and_embedding(pool, tmp_path):
    """``save_embedding_layers``: it saves the base's own tables as well, which must then be those of this base."""
    folder = make_model(tmp_path / "model", tie_word_embeddings=False)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"])
    folders = make_adapters(_dense_copy(folder, "nf4"), tmp_path, {"a": lambda: config})
    file = Path(folders["a"]) / "adapter_model.safetensors"
    tables = [name for name in load_file(file) if name.endswith(".base_layer.weight")]
    assert len(tables) == 2
    (mine,) = pool.run(2, _logits, str(folder), list(folders.values()))[0]
    with torch.no_grad():
        theirs = stock(_dense_copy(folder, "nf4"), folders)(input_ids=torch.arange(5, 25).view(1, -1)).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    values = load_file(file)
    for table in tables:
        for other in (values[table] + torch.eye(*values[table].shape) * 0.5, values[table][:-1].contiguous()):
            save_file({**values, table: other}, file)
            said = pool.run(1, _refused, str(folder), folders["a"])[0]
            assert said.startswith("2 adapter: ") and "holds a whole" in said and table.split(".")[-3] in said, said


def _refused(ranks: Ranks, folder: str, adapter: str) -> str:
    try:
        _logits(ranks, folder, [adapter])
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_an_adapter_of_a_wider_base_is_refused_with_its_shapes(pool, tiny_model, tmp_path):
    folders = make_adapters(
        _dense_copy(tiny_model, "none"), tmp_path, {"a": lambda: LoraConfig(r=4, target_modules=["q_proj"])}
    )
    file = Path(folders["a"]) / "adapter_model.safetensors"
    save_file({n: t.repeat(1, 2) if "lora_A" in n else t for n, t in load_file(file).items()}, file)
    said = pool.run(1, _refused, str(tiny_model), folders["a"])[0]
    assert said.startswith("2 adapter: ") and "2 of its 4 tensors have other shapes" in said
    assert "q_proj.lora_A.weight is [4, 256], not [4, 128]" in said
    last = {n: t for n, t in load_file(file).items() if ".layers.1." not in n}
    save_file({n: t[:, :128].contiguous() for n, t in last.items()}, file)
    said = pool.run(1, _refused, str(tiny_model), folders["a"])[0]
    assert "no tensors for 1 of the 2 modules that target_modules in adapter_config.json means (first: model" in said


def test_a_pickle_is_not_read(tmp_path):
    value = {"base_model.model.a.lora_A.weight": torch.ones(1, 2), "base_model.model.a.lora_B.weight": torch.ones(2, 1)}
    torch.save(value, tmp_path / "adapter_model.bin")
    said = r"only adapter_model\.bin: a pickle, which can run anybody's code .*\. Convert it: python -c \"(.*)\"\.$"
    with pytest.raises(ModelError, match=said) as refusal:
        stored_modules(tmp_path)
    command = re.search(said, str(refusal.value))
    assert command is not None
    subprocess.run([sys.executable, "-c", command[1]], check=True)
    assert stored_modules(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_b"], "is a transposed matrix"),
        (["q.lora_A.weight", "base_model.model.q.lora_A.default.weight"], "which are one tensor in PEFT"),
    ],
)
def test_what_would_be_read_wrong_is_refused(tmp_path, names, said):
    with pytest.raises(ModelError, match=said):
        spelt(names, tmp_path)
