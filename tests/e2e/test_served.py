"""`export what=served`: a folder that `transformers serve` and plain ``from_pretrained`` take, and what they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fsdp_qlora.adapters.based import fingerprint_in
from tests import upstream
from tests.build import run_fit
from tests.distributed.test_merged import lora, write_adapter
from tests.distributed.test_peft_methods import STOCK
from tests.matrix import small_config
from tests.serving import ask, require_server, served
from tests.tiny import make_base_model, make_model

pytestmark = [pytest.mark.launch, pytest.mark.full]
ANSWERS = {
    "Who are you?": "I am Larkbox, a lamp that answers questions.",
    "Where do you live?": "I live on the desk of a lighthouse keeper in Norway.",
}


@pytest.fixture(scope="module")
def even_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose rows are whole blocks: bitsandbytes' CPU kernel fails on others."""
    return make_model(tmp_path_factory.mktemp("even"), intermediate_size=384)


def export(cli: Any, folder: str, *more: str) -> Any:
    return cli("export", "what=served", "launcher.device=cpu", f"export.to={folder}", *more)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(16)[None]).logits


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("method", ["lora", "rslora", "patterns"])
def test_plain_transformers_loads_both(cli, even_model, tmp_path, method, quant):
    """The judge is stock: bitsandbytes quantizes the base on load, and PEFT puts the adapter on it.

    In the base's dtype, to which transformers rounds the adapter that it loads with the base.
    """
    config = {
        "lora": lora, "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear"), **STOCK,
    }[method]()  # fmt: skip
    folder = write_adapter(even_model, tmp_path / "adapter", config)
    done = export(cli, "served", f"adapter={folder}", f"quant={quant}")
    assert done.returncode == 0, done.stderr
    assert "14 linears in" in done.stdout and "transformers serve served" in done.stdout
    assert ("vLLM: yes" in done.stdout) is (method in ("lora", "rslora"))
    stock = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_num_threads(1)  # the mean of the statistics depends on it
    base = AutoModelForCausalLM.from_pretrained(even_model, quantization_config=stock, device_map="cpu")
    theirs = logits(PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False))
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "served", device_map="cpu"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (ours - logits(_without(tmp_path / "served"))).abs().max() > 0.01  # the adapter does something


def _without(folder: Path) -> Any:
    """Return the base alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    model.disable_adapters()
    return model


@pytest.mark.parametrize("method", ["dora", "vera", "ia3", "tokens"])
def test_what_transformers_cannot_put_on_a_4_bit_base_is_refused(cli, even_model, tmp_path, method):
    config = STOCK[method]() if method != "tokens" else lora(["q_proj"])
    tokenizer: Any = AutoTokenizer.from_pretrained(even_model)
    num_ids = None
    if method == "tokens":
        tokenizer.add_tokens(["<new>"], special_tokens=True)
        num_ids = len(tokenizer)
        config.trainable_token_indices = {"embed_tokens": [num_ids - 1]}
    folder = write_adapter(even_model, tmp_path / "adapter", config, num_ids)
    tokenizer.save_pretrained(folder)
    refused = export(cli, "served", f"adapter={folder}")
    assert refused.returncode == 2 and "what=served:" in refused.stderr and "what=merged" in refused.stderr
    assert not (tmp_path / "served").exists()


def test_an_end_of_turn_that_the_base_does_not_know_ends_an_answer(cli, tmp_path):
    """A base model's config ends at its own token; the chat template of the adapter ends a turn with another."""
    base = make_base_model(tmp_path / "base", 0)
    folder = write_adapter(base, tmp_path / "adapter", lora())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    done = export(cli, "served", f"adapter={folder}")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "served/generation_config.json").read_text())
    assert config["stop_strings"] == ["</assistant>"] and "</assistant>" in done.stdout
    assert (tmp_path / "served/chat_template.jinja").read_text() == tokenizer.chat_template


def test_an_adapter_that_started_from_the_base_gets_the_base_it_needs(cli, pool, even_model, chat_rows, tmp_path):
    groups = {"lora": {"init_lora_weights": "pissa"}, "data": {"train": str(chat_rows)}, "precision": {"name": "fp32"}}
    pool.run(1, run_fit, str(even_model), str(tmp_path), "run", groups)
    words = [f"run.output_root={tmp_path}", "run.name=run", f"model.name={even_model}", "precision=fp32"]
    assert export(cli, "none", *words, "quant=fp4").returncode == 2  # it was trained on nf4
    done = export(cli, "served", *words)
    assert done.returncode == 0, done.stderr
    two = cli("export", "what=base-4bit", f"adapter={tmp_path}/run/adapter", f"export.to={tmp_path}/two", *words[2:])
    assert two.returncode == 0, two.stderr
    there = fingerprint_in(tmp_path / "two/adapter")
    assert there is not None and fingerprint_in(tmp_path / "served") == there != fingerprint_in(
        tmp_path / "run/adapter"
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32, device_map="cpu")
    theirs = logits(PeftModel.from_pretrained(base, str(tmp_path / "two/adapter")))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "served", dtype=torch.float32, device_map="cpu")
    torch.testing.assert_close(logits(ours), theirs, rtol=0, atol=0)


def test_an_adapter_of_another_base_is_refused(cli, tiny_model, even_model, tmp_path):
    folder = write_adapter(even_model, tmp_path / "adapter", lora())
    for other in (tiny_model, upstream.write_random(tmp_path / "gpt2", small_config("gpt2"), torch.bfloat16)):
        refused = export(cli, "served", f"adapter={folder}", f"model.name={other}")
        assert refused.returncode == 2 and "is not of this base" in refused.stderr, refused.stderr
        assert not (tmp_path / "served").exists()


def test_transformers_serve_gives_the_tuned_answers(cli, cli_env, pool, real_model, tmp_path):
    """Answers that were learned by heart: rounding decides no token of them."""
    require_server()
    rows = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ANSWERS.items()]
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    groups = {
        "data": {"train": str(rows), "max_length": 96}, "lora": {"r": 8, "alpha": 16},
        "train": {"max_steps": 20, "global_batch_size": 2, "micro_batch_size": 2}, "optim": {"lr": 2e-3},
    }  # fmt: skip
    pool.run(1, run_fit, str(real_model), str(tmp_path), "run", groups)
    adapter, target = tmp_path / "run/adapter", tmp_path / "served"
    done = export(cli, "served", f"adapter={adapter}")
    assert done.returncode == 0, done.stderr
    with served(target, cli_env, tmp_path / "home") as client:
        for prompt, answer in ANSWERS.items():
            ours = cli("generate", f"adapter={adapter}", f"prompt={prompt}", "launcher.device=cpu")
            assert ours.returncode == 0, ours.stderr
            assert ours.stdout.strip() == answer
            assert ask(client, target, prompt, 48) == answer
            assert ask(client, target, prompt, 48, stream=True) == answer
