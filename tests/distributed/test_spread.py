"""`generate.device_map`: answers are stock transformers' and PEFT's, wherever the layers are.

Here all of them are on the CPU or on disk; only a machine with GPUs shows layers on several devices, and quantized
layers beside unquantized ones in host memory.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fsdp_qlora.adapters.served import BASE
from fsdp_qlora.config.schema import RunConfig, from_dict
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.run.answers import answer_file
from fsdp_qlora.run.spread import load_over_devices
from tests.build import world_of
from tests.distributed.test_many_adapters import CONFIGS, make_adapters, stock
from tests.distributed.test_prompt_files import read, write_prompts
from tests.tiny import make_model

pytestmark = pytest.mark.full
HALF = "2MB"
"""Of the 3.1 MB of the model in float32."""
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with rows that bitsandbytes' CPU kernel takes: multiples of its blocks of 64."""
    return make_model(tmp_path_factory.mktemp("spread") / "model", num_hidden_layers=4, intermediate_size=384)


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return make_adapters(base, tmp_path_factory.mktemp("adapters"), CONFIGS)


def settings(model: Path | str, quant: str = "none", **generate: Any) -> RunConfig:
    return from_dict({
        "model": {"name": str(model)}, "precision": {"name": "fp32"},
        "quant": {"name": quant, "double_quant": quant == "nf4"},
        "generate": {"device_map": "auto", "max_new_tokens": NEW_TOKENS, "batch_size": 3, **generate},
    })  # fmt: skip


def _answer(
    ranks: Ranks, folder: str, quant: str, adapters: Any, generate: dict[str, Any]
) -> tuple[dict[str, str], list[str]] | str:  # fmt: skip
    """Answer a file of prompts as the command does; return where the model's parts are, and which are not in memory."""
    config = replace(settings(folder, quant, **generate), adapter=adapters)
    named = {name: Path(place) for name, place in adapters.items()} if isinstance(adapters, dict) else adapters
    try:
        spread = load_over_devices(config, Path(named) if isinstance(named, str) else named, world_of(ranks))
        answer_file(config, spread)
    except FsdpQloraError as error:
        return str(error)
    return dict(spread.places), [name for name, weight in spread.model.named_parameters() if weight.is_meta]


def judged(loaded: Any, tokenizer: Any, texts: list[Any], adapter: str | None) -> list[str]:
    """Answer one by one with stock PEFT, or with the base alone."""
    if adapter not in (None, BASE):
        loaded.set_adapter(adapter)
    answers = []
    with loaded.disable_adapter() if adapter == BASE else nullcontext():
        for messages in texts:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = loaded.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            answers.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def _asked(file: Path) -> list[Any]:
    lines = [json.loads(line) for line in file.read_text("utf-8-sig").splitlines()]
    return [line.get("messages") or [{"role": "user", "content": line["prompt"]}] for line in lines]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("who", ["base", "coder", "all"])
def test_answers_are_stock_transformers_one_by_one(pool, tmp_path, model, folders, who, on_disk):
    file, tokenizer = write_prompts(tmp_path, 7), AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    names = [*folders, BASE] if who == "all" else [None]
    judge = base if who == "base" else stock(base, folders)
    for name in names:
        generate = {"prompts": str(file), "to": str(tmp_path / f"to-{name}"), "adapter": name}
        generate |= {"max_memory": {"cpu": HALF}} if on_disk else {}
        given = {"base": None, "coder": folders["coder"], "all": folders}[who]
        places, away = pool.run(1, _answer, str(model), "none", given, generate)[0]
        assert ("disk" in places.values()) is on_disk and bool(away) is on_disk
        assert not [weight for weight in away if "lora" in weight], "adapters are small and stay"
        found = [line["answer"] for line in read(tmp_path / f"to-{name}")]
        assert found == judged(judge, tokenizer, _asked(file), "coder" if who == "coder" else name)
    assert who != "all" or len({(tmp_path / f"to-{name}").read_text() for name in names}) > 1


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantized_base_is_bitsandbytes_own(pool, tmp_path, model, folders, quant):
    file, tokenizer = write_prompts(tmp_path, 4), AutoTokenizer.from_pretrained(model)
    packed = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                      "bnb_4bit_compute_dtype": torch.float32}, "int8": {"load_in_8bit": True}}[quant]  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(**packed)
    )
    judge = PeftModel.from_pretrained(base, folders["coder"], "coder").eval()
    generate = {"prompts": str(file), "to": str(tmp_path / "to"), "batch_size": 1}  # int8 scales by rows, padding too
    places, away = pool.run(1, _answer, str(model), quant, folders["coder"], generate)[0]
    assert set(places.values()) == {"cpu"} and not away
    assert [line["answer"] for line in read(tmp_path / "to")] == judged(judge, tokenizer, _asked(file), "coder")


def test_what_it_cannot_do_is_said(pool, tmp_path, model, folders):
    file = write_prompts(tmp_path, 1)
    generate = {"prompts": str(file), "to": str(tmp_path / "to")}
    said = pool.run(1, _answer, str(model), "nf4", None, {**generate, "offload_fp32": True})[0]
    assert said.startswith("generate.offload_fp32: leaves layers in host memory unquantized")
    other = make_model(tmp_path / "other", seed=1, num_hidden_layers=2)
    said = pool.run(1, _answer, str(other), "none", folders["coder"], generate)[0]
    assert said.startswith("adapter: ") and not (tmp_path / "to").exists()
    (model_file,) = other.glob("*.safetensors")
    model_file.write_bytes(model_file.read_bytes()[:-100])
    assert model_file.name in pool.run(1, _answer, str(other), "none", None, generate)[0]


def test_upstreams_own_ways_lose_adapters_of_layers_on_disk(model, folders):
    """If this fails, upstream has mended it: `adapters/stock.py` may go."""
    ids = torch.arange(5, 12)[None]

    def half() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, device_map="auto", max_memory={"cpu": 2_000_000}
        )

    judge = stock(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folders)
    mixin, peft = half(), half()
    mixin.load_adapter(folders["poet"], adapter_name="poet")
    peft = PeftModel.from_pretrained(peft, folders["poet"], "poet", max_memory={"cpu": 2_000_000})
    peft.load_adapter(folders["coder"], "coder")
    with torch.no_grad():
        for loaded, name in ((mixin, "poet"), (peft, "coder")):
            judge.set_adapter(name)
            loaded.set_adapter(name)
            assert not torch.allclose(loaded.eval()(input_ids=ids).logits, judge(input_ids=ids).logits, atol=1e-4)
