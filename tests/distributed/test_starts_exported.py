"""What is given away of adapters that started from the base weights answers as the trained model, in plain PEFT too."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters.based import fingerprint_in, require_same_base
from fsdp_qlora.adapters.folder import read_adapter_config
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.cli.export import run as run_export
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import ConfigError, FsdpQloraError, ModelError
from fsdp_qlora.export.vllm import served_by_vllm
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.safetensors import SafetensorsFolder
from fsdp_qlora.model.skeleton import build_skeleton, read_shapes
from fsdp_qlora.quant.formats import Packed, build_format
from fsdp_qlora.run.inference import load_for_inference
from tests.build import config_of, refused_fit, run_fit, world_of
from tests.distributed.test_peft_methods import QUANT, _ids
from tests.distributed.test_starts import ALPHA, CASES, R, dense, refused, settings_of
from tests.tiers import some_in_full
from tests.tiny import make_model


def _answers(ranks: Ranks, folder: str, adapter: str, quant: str) -> torch.Tensor:
    config = config_of(folder, quant=QUANT[quant], precision={"name": "fp32"}, model={"check": "off", "name": folder})
    model = load_for_inference(config, Path(adapter), world_of(ranks)).model
    with torch.no_grad():
        return model.logits(_ids())


def _export(root: Path, model: Path, capsys: pytest.CaptureFixture[str], **more: Any) -> str:
    values: dict[str, Any] = {
        "model": {"name": str(model)}, "precision": {"name": "fp32"}, "launcher": {"device": "cpu"},
        "run": {"output_root": str(root), "name": "run"}, **more,
    }  # fmt: skip
    assert run_export(check_verb("export", from_dict(values))) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def even_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose rows are whole blocks: bitsandbytes' CPU kernel fails on others."""
    return make_model(tmp_path_factory.mktemp("even"), intermediate_size=384)


@pytest.mark.parametrize(("start", "quant"), some_in_full(CASES, {("pissa", "nf4"), ("olora", "none")}))
def test_exports_answer_as_the_trained_model(pool, even_model, chat_rows, tmp_path, capsys, start, quant):
    groups = settings_of(start, quant, chat_rows, checkpoint={"every_steps": 2})
    pool.run(2, run_fit, str(even_model), str(tmp_path), "run", groups)
    adapter = tmp_path / "run/adapter"
    mine = pool.run(2, _answers, str(even_model), str(adapter), quant)[0]
    said = _export(tmp_path, even_model, capsys, export={"plain_lora": True, "to": str(tmp_path / "plain")})
    said_by = re.search(r"differ from the trained model's by (\S+) of .*, and by (\S+) on", said)
    assert said_by is not None, said
    on_original, on_quantized = float(said_by[1]), float(said_by[2])
    with torch.no_grad():
        plain = PeftModel.from_pretrained(dense(even_model), tmp_path / "plain").eval()
        theirs = plain(input_ids=_ids()).logits
        again = _export(
            tmp_path,
            even_model,
            capsys,
            adapter=str(adapter),
            export={"plain_lora": True, "to": str(tmp_path / "again")},
        )
    assert "rank 8" in said and "rank 8" in again
    weights = "adapter_model.safetensors"
    plain, second = (load_file(tmp_path / name / weights) for name in ("plain", "again"))
    assert plain.keys() == second.keys() and all(torch.equal(plain[name], second[name]) for name in plain)
    assert fingerprint_in(adapter) is not None and fingerprint_in(tmp_path / "plain") == fingerprint_in(adapter)
    if quant == "none":
        assert on_original < 1e-6 and on_quantized < 1e-6
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)
        if start != "pissa_niter_4":  # plain PEFT finds the same start in the original base
            with torch.no_grad():
                restarted = PeftModel.from_pretrained(dense(even_model), adapter).eval()(input_ids=_ids()).logits
            torch.testing.assert_close(restarted, mine, rtol=1e-4, atol=1e-5)
        return
    assert 1e-3 < on_original < 0.2 and 1e-4 < on_quantized < 0.3
    with torch.no_grad():  # the conversion itself changes nothing: only the rounding of the residual is missing
        torch.testing.assert_close(theirs, _unrounded(even_model, adapter), rtol=1e-3, atol=1e-4)
    assert 0 < float((theirs - mine).norm()) < 0.5 * float(mine.norm())
    merged = tmp_path / "merged"
    _export(
        tmp_path,
        even_model,
        capsys,
        what="merged",
        adapter=str(adapter),
        quant=QUANT[quant],
        export={"to": str(merged), "merge_base": "dequantized"},
    )
    with torch.no_grad():  # folded into what its start left of the base, in 16 bits
        theirs = dense(merged).eval()(input_ids=_ids()).logits
    assert float((theirs - mine).norm()) < 0.02 * float(mine.norm())
    if quant == "int8":  # bitsandbytes' int8 has no export
        return
    base = tmp_path / "base"
    said = _export(
        tmp_path,
        even_model,
        capsys,
        what="base-4bit",
        adapter=str(adapter),
        quant=QUANT[quant],
        export={"to": str(base)},
    )
    assert "14 linears" in said
    torch.testing.assert_close(pool.run(2, _answers, str(base), str(base / "adapter"), quant)[0], mine, rtol=0, atol=0)
    with torch.no_grad():
        stored = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        for parameter in stored.parameters():  # a base in 4 bits has some in its files' dtype
            parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
        for linear in (m for m in stored.modules() if isinstance(m, bnb.nn.Linear4bit)):
            linear.compute_dtype, linear.support_avx512bf16_for_cpu = torch.float32, False
        theirs = PeftModel.from_pretrained(stored, base / "adapter").eval()(input_ids=_ids()).logits
    torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-4)


def _as_trained(folder: Path) -> Base:
    shapes = read_shapes(build_skeleton(folder, torch.float32, "eager"))
    packed = [Packed(x, build_format("nf4", True, 64)) for x in shapes.linears]
    return Base(SafetensorsFolder(folder), shapes, packed)


def test_the_base_of_an_adapter_on_some_linears(pool, even_model, chat_rows, tmp_path, capsys):
    """The others are quantized as they are."""
    groups = settings_of("pissa", "nf4", chat_rows, lora={"target_modules": ["q_proj"]})
    pool.run(1, run_fit, str(even_model), str(tmp_path), "run", groups)
    adapter, base = tmp_path / "run/adapter", tmp_path / "base"
    said = _export(
        tmp_path, even_model, capsys, what="base-4bit", adapter=str(adapter), quant=QUANT["nf4"],
        export={"to": str(base)},
    )  # fmt: skip
    assert "14 linears" in said
    there, here = fingerprint_in(adapter), fingerprint_in(base / "adapter")
    assert there is not None and here is not None
    assert {n for n, code in here["codes"].items() if code != there["codes"][n]} == {
        n for n in here["codes"] if "q_proj" in n
    }
    with pytest.raises(ModelError, match=r"was trained on another base than .*: other weights in \S*q_proj"):
        require_same_base(base / "adapter", _as_trained(even_model), here)
    mine = pool.run(1, _answers, str(even_model), str(adapter), "nf4")[0]
    torch.testing.assert_close(pool.run(1, _answers, str(base), str(base / "adapter"), "nf4")[0], mine, rtol=0, atol=0)


def _unrounded(folder: Path, adapter: Path) -> torch.Tensor:
    """Return the logits of plain PEFT with the adapter on what its start left of the base, as it was never rounded."""
    model = dense(folder)
    with safe_open(adapter / FILE_NAME, framework="pt") as stored:
        for name in {key.rpartition(".lora_")[0] for key in stored.keys() if ".lora_" in key}:  # noqa: SIM118
            a, b = (stored.get_tensor(f"{name}.{kind}.weight") for kind in ("lora_A", "lora_B"))
            model.get_submodule(name.removeprefix("base_model.model.")).weight -= ALPHA / R * b @ a
    restarted = Path(shutil.copytree(adapter, adapter.parent / "restarted"))
    file = restarted / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": True}))
    return PeftModel.from_pretrained(model, restarted).eval()(input_ids=_ids()).logits


def test_an_adapter_needs_what_its_start_took_off(pool, tiny_model, chat_rows, tmp_path, capsys):
    groups = settings_of("pissa", "nf4", chat_rows)
    pool.run(1, run_fit, str(tiny_model), str(tmp_path), "run", groups)
    adapter = tmp_path / "run/adapter"
    with pytest.raises(ConfigError, match=r"quant: the adapter in .* was trained with .* in nf4 with double"):
        values = {"what": "base-4bit", "adapter": str(adapter), "quant": {"name": "fp4"}}
        _export(tmp_path, tiny_model, capsys, **values, export={"to": str(tmp_path / "base")})
    said = pool.run(1, refused, str(tiny_model), {"lora": {"init_from": str(adapter), "r": R, "alpha": ALPHA}})[0]
    assert said.startswith("2 lora.init_from: the adapter in ") and "export.plain_lora=true" in said
    _export(tmp_path, tiny_model, capsys, export={"plain_lora": True, "to": str(tmp_path / "plain")})
    config = {"init_from": str(tmp_path / "plain"), "r": 2 * R, "alpha": 2 * ALPHA}
    assert pool.run(1, refused, str(tiny_model), {"lora": config, "model": {"check": "off"}})[0] == ""
    assert "vLLM: no" in served_by_vllm(adapter) and "export.plain_lora=true" in served_by_vllm(adapter)
    assert "vLLM: yes" in served_by_vllm(tmp_path / "plain")
    (adapter / FILE_NAME).unlink()
    with pytest.raises(FsdpQloraError, match="init_lora_weights=") as refusal:
        read_adapter_config(adapter)
    assert refusal.value.exit_code == 2


def test_a_checkpoint_of_another_start_is_refused(pool, tiny_model, chat_rows, tmp_path):
    """The factors that a run kept are part of what must match: other ones would mean another base."""
    groups = settings_of("pissa_niter_4", "nf4", chat_rows, train={"max_steps": 2})
    pool.run(1, run_fit, str(tiny_model), str(tmp_path), "run", copy.deepcopy(groups))
    file = tmp_path / "run" / FILE_NAME
    with safe_open(file, framework="pt") as stored:
        tensors, metadata = {n: stored.get_tensor(n) for n in stored.keys()}, stored.metadata()  # noqa: SIM118
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first] + 1e-3}, file, metadata=metadata)
    said = pool.run(1, refused_fit, str(tiny_model), str(tmp_path), {**groups, "train": {"max_steps": 3}})[0]
    assert said.startswith("2 initial adapter, taken off the base: ")
