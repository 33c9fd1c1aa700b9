"""The fingerprint of the base in an adapter's header: other weights are refused, another format of them is said."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters.based import fingerprint_in
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.export.combined import combine_adapters
from fsdp_qlora.export.vllm import rewrite_for_vllm
from fsdp_qlora.load.fingerprint import KEY, header_of
from fsdp_qlora.run.inference import load_for_inference
from tests.build import build, config_of, run_fit, world_of
from tests.distributed.test_merged import run_merge
from tests.tiny import make_model, make_packed

WEIGHTS = "adapter_model.safetensors"
GROUPS: dict[str, Any] = {"lora": {"target_modules": ["q_proj"]}, "model": {"check": "off"}, "train": {"max_steps": 1}}
FORMATS: dict[str, dict[str, Any]] = {
    "the same": {}, "fp4": {"name": "fp4"}, "int8": {"name": "int8", "double_quant": False}, "none": {"name": "none"},
    "longer blocks": {"block_size": 256},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(pool, tiny_model, chat_rows, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    rows = {"data": {"train": str(chat_rows), "max_length": 64, "max_rows": 6}}
    pool.run(2, run_fit, str(tiny_model), str(root), "run", {**GROUPS, **rows})
    return root / "run/adapter"


def _loaded(ranks: Ranks, folder: str, adapter: str, cases: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    results = []
    for groups in cases:
        said: list[str] = []

        class Heard(logging.Handler):
            def emit(self, record: logging.LogRecord, said: list[str] = said) -> None:
                said.append(record.getMessage())

        handler = Heard(logging.WARNING)
        logging.getLogger("fsdp_qlora").addHandler(handler)
        try:
            load_for_inference(config_of(folder, **{**GROUPS, **groups}), Path(adapter), world_of(ranks))
            error = ""
        except FsdpQloraError as refusal:
            error = f"{refusal.exit_code} {refusal}"
        logging.getLogger("fsdp_qlora").removeHandler(handler)
        results.append((error, [line for line in said if line.startswith("adapter: ")]))
    return results


def test_plain_peft_reads_past_it(trained, tiny_model):
    with safe_open(trained / "adapter_model.safetensors", framework="pt") as stored:
        facts = json.loads(stored.metadata()[KEY])
        assert stored.metadata()["format"] == "pt"
    assert facts["sizes"]["decoder layers"] == 2 and len(facts["codes"]) == 14
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(trained))


def test_another_format_of_the_same_weights_is_said_with_its_difference(pool, trained, tiny_model):
    cases = [{"quant": quant} for quant in FORMATS.values()]
    for name, (error, said) in zip(FORMATS, pool.run(2, _loaded, str(tiny_model), str(trained), cases)[0], strict=True):
        assert error == ""
        if name == "the same":
            assert said == []
            continue
        (line,) = said
        assert f"adapter: {trained} was trained on this base in " in line
        measured = float(line.partition("differ by ")[2].split()[0])
        assert (0.005 if name == "int8" else 0.05) < measured < 0.2  # 4 bits lose about a tenth of a weight


def test_other_exports_carry_it(pool, trained, tiny_model, tmp_path):
    """Two adapters of one base make one of that base; the form for vLLM and a merge know the base, too."""
    facts = fingerprint_in(trained)
    assert facts is not None
    shutil.copytree(trained, tmp_path / "vllm")
    rewrite_for_vllm(tmp_path / "vllm")
    assert fingerprint_in(tmp_path / "vllm") == facts
    other = dict(facts, codes={name: [None, ""] for name in facts["codes"]})  # as if trained on 16 bits
    shutil.copytree(trained, tmp_path / "in16")
    tensors = load_file(trained / WEIGHTS)
    save_file(tensors, tmp_path / "in16" / WEIGHTS, metadata={"format": "pt", **header_of(other)})
    folders, weights = {"a": trained, "b": tmp_path / "vllm", "c": tmp_path / "in16"}, {"a": 1.0, "b": 0.5, "c": 0.5}
    for names, codes in (("ab", facts["codes"]), ("abc", {})):
        combine_adapters({n: folders[n] for n in names}, weights, "cat", tmp_path / names)
        assert fingerprint_in(tmp_path / names) == dict(facts, codes=codes)
        assert pool.run(1, _loaded, str(tiny_model), str(tmp_path / names), [{}])[0] == [("", [])]
    save_file(tensors, tmp_path / "in16" / WEIGHTS, metadata={"format": "pt"})
    combine_adapters({n: folders[n] for n in "ac"}, weights, "cat", tmp_path / "ac")
    assert fingerprint_in(tmp_path / "ac") is None
    wrong = dict(facts, sizes=facts["sizes"] | {"vocabulary": 7}, values=dict.fromkeys(facts["values"], "BF16 0"))
    save_file(tensors, tmp_path / "in16" / WEIGHTS, metadata={"format": "pt", **header_of(wrong)})
    with pytest.raises(FsdpQloraError, match=r"a and c were trained on different bases: for a, vocabulary .*7 for c; "):
        combine_adapters({n: folders[n] for n in "ac"}, weights, "cat", tmp_path / "no")


@pytest.mark.full
def test_a_merge_into_another_base_is_refused(pool, trained, tiny_model, tmp_path):
    arguments = str(trained), str(tmp_path / "merged"), "nf4", "original"
    assert pool.run(1, run_merge, str(tiny_model), *arguments)[0][0] == "original"
    other = make_model(tmp_path / "other", seed=1)
    (said,) = pool.run(1, run_merge, str(other), str(trained), str(tmp_path / "no"), "nf4", "original")[0]
    assert "was trained on another base than" in said and "other weights in " in said


def _changed(folder: Path, target: Path, name: str, factor: float = 1.01) -> str:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = tensors[name] * factor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_other_weights_are_refused_field_by_field(pool, trained, tiny_model, tmp_path):
    linear, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    larger = make_model(tmp_path / "larger", seed=1, num_hidden_layers=3)
    for folder, words in (
        (_changed(tiny_model, tmp_path / "a", linear), [f"other weights in {linear}"]),
        (_changed(tiny_model, tmp_path / "b", norm), [f"other weights in {norm}"]),
        (str(larger), ["decoder layers 2, but 3 here; other weights in "]),
    ):
        ((error, _),) = pool.run(1, _loaded, folder, str(trained), [{}])[0]
        assert error.startswith(f"2 adapter: {trained} was trained on another base than {folder}: ")
        assert all(word in error for word in words)


def test_the_stored_4_bit_form_is_known(pool, trained, tiny_model, tmp_path):
    packed = make_packed(tiny_model, tmp_path / "packed")
    ((error, said),) = pool.run(2, _loaded, str(packed), str(trained), [{}])[0]
    assert (error, said) == ("", [])
    twice = Path(_changed(tiny_model, tmp_path / "b", "model.layers.1.mlp.up_proj.weight", 2.0))
    ((same, _),) = pool.run(1, _loaded, str(make_packed(twice, tmp_path / "c")), str(trained), [{}])[0]
    assert same == ""  # twice a weight has the same codes: only the 16-bit values would tell
    another = make_packed(make_model(tmp_path / "another", seed=1), tmp_path / "d")
    ((error, _),) = pool.run(1, _loaded, str(another), str(trained), [{}])[0]
    assert "was trained on another base" in error and "model.layers.0.mlp.down_proj.weight" in error


def _started(ranks: Ranks, folder: str, adapter: str) -> str:
    try:
        build(ranks, folder, **{**GROUPS, "lora": {"target_modules": ["q_proj"], "init_from": adapter}})
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_a_run_does_not_go_on_from_an_adapter_of_other_weights(pool, trained, tiny_model, tmp_path):
    assert pool.run(1, _started, str(tiny_model), str(trained))[0] == ""
    other = make_model(tmp_path / "other", seed=1)
    assert "was trained on another base" in pool.run(1, _started, str(other), str(trained))[0]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"sizes": 3}', '{"sizes": {}, "values": {}, "codes": {"a": [["x"], 1]}}']
)
def test_a_malformed_fingerprint_is_refused_and_a_missing_one_is_not(pool, trained, tmp_path, text):
    shutil.copytree(trained, tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint_in(tmp_path / "a") is None
    save_file(tensors, file, metadata={"format": "pt", KEY: text})
    with pytest.raises(FsdpQloraError, match=r"the fingerprint of the base in .* is malformed") as refusal:
        fingerprint_in(tmp_path / "a")
    assert refusal.value.exit_code == 2 and torch.is_tensor(next(iter(tensors.values())))
