"""Several adapters on one sharded base: each row computed as stock PEFT does it, on a dense copy and on bitsandbytes.

The judge is one process with stock PEFT: each adapter alone (`set_adapter`), none (`disable_adapter`), and its own
mixed batches (``adapter_names``).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from fsdp_qlora.adapters.served import BASE
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.run.inference import load_for_inference
from tests.build import config_of, world_of
from tests.distributed.test_peft_methods import QUANT, STOCK, TARGETS, _dense_copy
from tests.families import keep_as_packed
from tests.tiers import some_in_full
from tests.tiny import make_model

CONFIGS: dict[str, Any] = {
    "poet": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "coder": lambda: peft.LoraConfig(
        r=6, lora_alpha=5, use_rslora=True, target_modules=TARGETS, rank_pattern={"v_proj": 3}, alpha_pattern={"o_proj": 9}
    ),
    "judge": lambda: peft.LoraConfig(r=1, lora_alpha=1, target_modules=["down_proj", r"layers.0.self_attn.k_proj"]),
}  # fmt: skip
"""Adapters of different ranks, scalings and targets, written as a user of PEFT would."""
NAMES = ["coder", BASE, "judge", "poet", "coder"]
"""The adapter of each row."""
NEW_TOKENS = 6


def make_adapters(base: Any, folder: Path, configs: dict[str, Any]) -> dict[str, str]:
    """Write a folder for each config, with random values that matter."""
    for number, (name, config) in enumerate(configs.items()):
        model: Any = get_peft_model(base, config())
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(folder / name))
        base = model.unload()
    return {name: str(folder / name) for name in configs}


def stock(base: Any, folders: dict[str, str]) -> Any:
    """Return stock PEFT's model with all adapters."""
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(base, folder, first)
    for name, folder in others:
        model.load_adapter(folder, name)
    return model.eval()


def _ids() -> torch.Tensor:
    return torch.randint(5, 100, (len(NAMES), 12), generator=torch.Generator().manual_seed(3))


def _greedy() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)


def _wanted(judge: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Return what stock PEFT computes: with each adapter alone, with none, and with all in one batch."""
    ids, answers = _ids(), {}
    with torch.no_grad():
        for name in names:
            judge.set_adapter(name)
            answers[name] = judge(input_ids=ids).logits
        with judge.disable_adapter():
            answers[BASE] = judge(input_ids=ids).logits
        answers["rows"] = judge(input_ids=ids, adapter_names=NAMES).logits
        answers["tokens"] = judge.generate(input_ids=ids, generation_config=_greedy(), adapter_names=NAMES)
    return answers


def _answers(ranks: Ranks, folder: str, adapters: dict[str, str], groups: dict[str, Any]) -> dict[str, torch.Tensor]:
    config = config_of(folder, model={"check": "off"}, **groups)
    prepared = load_for_inference(config, {n: Path(f) for n, f in adapters.items()}, world_of(ranks))
    model, ids = prepared.model, _ids()
    with torch.no_grad():
        found = {"first": model.logits(ids)}
        for name in (*adapters, BASE):
            model.use_adapter(name)
            found[name] = model.logits(ids)
        model.use_adapter(None)
        assert torch.equal(model.logits(ids), found[BASE])
        model.use_adapter(next(iter(adapters)))
        assert torch.equal(model.logits(ids), found["first"])
        found["rows"] = model.logits(ids, adapter_names=NAMES)
        found["tokens"] = model.generate(
            input_ids=ids, generation_config=_greedy(), adapter_names=NAMES, synced_gpus=False
        )
    assert not any(parameter.requires_grad for parameter in model.parameters())
    return found


@pytest.mark.parametrize(
    ("num_ranks", "quant"), some_in_full(itertools.product((1, 2, 3), QUANT), {(1, "nf4"), (2, "nf4"), (2, "none")})
)
def test_each_alone_and_each_row_are_stock_pefts(pool, tiny_model, tmp_path, num_ranks, quant):
    folders = make_adapters(_dense_copy(tiny_model, quant), tmp_path, CONFIGS)
    wanted = _wanted(stock(_dense_copy(tiny_model, quant), folders), list(CONFIGS))
    groups = {"quant": QUANT[quant], "precision": {"name": "fp32"}}
    for found in pool.run(num_ranks, _answers, str(tiny_model), folders, groups):
        for name, logits in wanted.items():
            torch.testing.assert_close(found[name], logits, rtol=1e-4, atol=1e-5)
    alone = [wanted[name] for name in (*CONFIGS, BASE)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(alone, 2))


def _base_alone(ranks: Ranks, folder: str, groups: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    prepared = load_for_inference(config_of(folder, model={"check": "off"}, **groups), None, world_of(ranks))
    assert prepared.model.peft is None and prepared.plan.bytes.adapters == 0
    assert not any("lora" in name for name, _ in prepared.model.named_parameters())
    with torch.no_grad():
        tokens = prepared.model.generate(input_ids=_ids(), generation_config=_greedy(), synced_gpus=False)
        return prepared.model.logits(_ids()), tokens


@pytest.mark.parametrize(
    ("num_ranks", "quant"), some_in_full(itertools.product((1, 2), QUANT), {(1, "none"), (2, "nf4")})
)
def test_the_base_alone_has_no_adapters(pool, tiny_model, num_ranks, quant):
    """Neither in memory nor in a forward."""
    groups = {"quant": QUANT[quant], "precision": {"name": "fp32"}}
    judge = _dense_copy(tiny_model, quant).eval()
    for logits, tokens in pool.run(num_ranks, _base_alone, str(tiny_model), groups):
        torch.testing.assert_close(logits, judge(_ids()).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(tokens, judge.generate(_ids(), generation_config=_greedy()))


def test_each_alone_and_each_row_are_those_of_stock_peft_on_stock_bitsandbytes(pool, tmp_path):
    # of rows that blocks cross, bitsandbytes' kernel takes the wrong statistics
    folder = make_model(tmp_path / "base", intermediate_size=384)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )  # fmt: skip
    keep_as_packed(base)
    folders = make_adapters(_dense_copy(folder, "nf4"), tmp_path, CONFIGS)
    wanted = _wanted(stock(base, folders), list(CONFIGS))
    found = pool.run(2, _answers, str(folder), folders, {"precision": {"name": "fp32"}})[0]
    for name, logits in wanted.items():
        torch.testing.assert_close(found[name], logits, rtol=1e-4, atol=1e-4)


def _bytes(ranks: Ranks, folder: str, adapters: dict[str, str]) -> dict[str, Any]:
    """Return the bytes of the model's tensors on this rank, and what the adapters are said to take."""
    config = config_of(folder, model={"check": "off"})
    prepared = load_for_inference(config, {n: Path(f) for n, f in adapters.items()}, world_of(ranks))
    tensors = [local_tensor(t) for t in (*prepared.model.parameters(), *prepared.model.buffers())]
    held = sum(t.numel() * t.itemsize for t in dict.fromkeys(tensors))
    return {"held": held, "said": {name: size.bytes_here for name, size in prepared.adapters.items()},
            "whole": {name: size.num_bytes for name, size in prepared.adapters.items()}}  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_memory_grows_by_one_adapter_each(pool, tiny_model, tmp_path, num_ranks):
    folders = make_adapters(_dense_copy(tiny_model, "none"), tmp_path, CONFIGS)
    names = list(folders)
    rows: list[list[dict[str, Any]]] = [
        pool.run(num_ranks, _bytes, str(tiny_model), {n: folders[n] for n in names[:count]}) for count in (1, 2, 3)
    ]
    for fewer, more, name in zip(rows, rows[1:], names[1:], strict=False):
        for a, b in zip(fewer, more, strict=True):
            assert b["held"] - a["held"] == b["said"][name] > 0
        assert sum(b["said"][name] for b in more) == more[0]["whole"][name]
        with safe_open(Path(folders[name]) / "adapter_model.safetensors", framework="pt") as stored:
            sizes = [stored.get_tensor(key).nbytes for key in stored.keys()]  # noqa: SIM118
        assert more[0]["whole"][name] == sum(sizes)


def _switched(
    ranks: Ranks, folder: str, adapters: dict[str, str], groups: dict[str, Any]
) -> dict[str, torch.Tensor] | str:
    config = config_of(folder, model={"check": "off"}, **groups)
    try:
        prepared = load_for_inference(config, {n: Path(f) for n, f in adapters.items()}, world_of(ranks))
        found = {}
        with torch.no_grad():
            for name in (*adapters, BASE):
                prepared.model.use_adapter(name)
                found[name] = prepared.model.logits(_ids())
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    try:
        prepared.model.logits(_ids(), adapter_names=NAMES[:4] + NAMES[:1])
    except FsdpQloraError as error:
        found["rows"] = f"{error.exit_code} {error}"
    return found


ALONE = ("vera", "randlora")
"""Methods that a base takes only one adapter of."""


@pytest.mark.parametrize("method", some_in_full(sorted(STOCK.keys() - {"patterns"}), {"ia3", "vera"}))
def test_adapters_in_pefts_own_layers_are_switched_or_refused(pool, tiny_model, tmp_path, method):
    configs = {"one": STOCK[method], "two": STOCK[method]}
    folders = make_adapters(_dense_copy(tiny_model, "nf4"), tmp_path, configs)
    found = pool.run(2, _switched, str(tiny_model), folders, {"precision": {"name": "fp32"}})[0]
    if method in ALONE:
        assert found.startswith(f"2 adapter: one is {method}, whose layers share projections; ")
        return
    for name in ("one", "two"):
        judge = stock(_dense_copy(tiny_model, "nf4"), {name: folders[name]})
        with torch.no_grad():
            torch.testing.assert_close(found[name], judge(input_ids=_ids()).logits, rtol=1e-4, atol=1e-5)
            with judge.disable_adapter():
                torch.testing.assert_close(found[BASE], judge(input_ids=_ids()).logits, rtol=1e-4, atol=1e-5)
    assert (found["one"] - found["two"]).abs().max() > 1e-3
    assert found["rows"].startswith("2 adapter_names: ")


def _said(ranks: Ranks, folder: str, adapters: dict[str, str], names: list[str]) -> str:
    config = config_of(folder, model={"check": "off"})
    try:
        prepared = load_for_inference(config, {n: Path(f) for n, f in adapters.items()}, world_of(ranks))
        prepared.model.logits(_ids(), adapter_names=names)
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_what_cannot_be_served_together_is_refused_by_name(pool, tiny_model, tmp_path):
    base = _dense_copy(tiny_model, "none")
    folders = make_adapters(base, tmp_path, CONFIGS | {"ia3": STOCK["ia3"], "dora": STOCK["dora"]})
    lora, unknown = {"poet": folders["poet"]}, ["poet", "poem", BASE, BASE, BASE]
    for adapters, names, said in (
        (
            lora,
            unknown,
            "2 adapter_names: there is no adapter 'poem'; loaded are poet (and __base__ for none). Did you",
        ),
        (lora, ["poet"], "2 adapter_names: 1 names for 5 rows; "),
        (lora, "poet", "2 adapter_names: expected a list"),
        ({**lora, "ia3": folders["ia3"]}, [], "2 adapter: poet is lora and ia3 is ia3; only adapters of one method"),
        ({**lora, "dora": folders["dora"]}, [], "2 adapter: poet is lora and dora is dora; only adapters of one"),
        ({"update": folders["poet"]}, [], "2 adapter: 'update' cannot be an adapter's name in PEFT"),
        ({"dora": folders["dora"]}, ["dora"] * 5, "2 adapter_names: PEFT's layers of these adapters (Linear) compute"),
    ):
        assert pool.run(1, _said, str(tiny_model), adapters, names)[0].startswith(said)
