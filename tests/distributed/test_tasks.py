"""`evaluate`: tasks of lm-evaluation-harness on a sharded model are those of its own `HFLM`, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.run.inference import load_for_inference
from fsdp_qlora.run.measure import measure, without_adapter
from tests.build import config_of, world_of
from tests.distributed.test_many_adapters import make_adapters
from tests.distributed.test_merged import run_merge
from tests.tasks import TASKS, write_tasks

pytestmark = pytest.mark.full
GROUPS: dict[str, Any] = {
    "precision": {"name": "fp32"}, "quant": {"name": "none", "double_quant": False}, "model": {"check": "off"},
    "train": {"eval_batch_size": 3}, "generate": {"batch_size": 2},
}  # fmt: skip
"""Computed as `HFLM` does: in float32, without quantization."""


def asked(folder: str, **evaluate: Any) -> RunConfig:
    config = config_of(folder, **GROUPS)
    return replace(config, evaluate=replace(config.evaluate, **evaluate))


def measured(ranks: Ranks, folder: str, adapter: str | None, evaluate: dict[str, Any]) -> dict[str, Any] | str:
    """Measure as the command does; return each model's numbers, or the error."""
    config = asked(folder, **evaluate)
    values = {}
    try:
        prepared = load_for_inference(config, Path(adapter) if adapter else None, world_of(ranks))
        if config.evaluate.compare:
            with without_adapter(prepared):
                values["before"] = measure(config, prepared).tasks
        return {**values, "after": measure(config, prepared).tasks}
    except FsdpQloraError as error:
        return f"{error.exit_code} {error}"


def stock(model: Any, folder: Path, chat_template: bool = False, **settings: Any) -> dict[str, dict[str, float]]:
    """Return what lm-evaluation-harness says with its own model class, which holds the whole model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = settings.pop("tasks", list(TASKS))
    own = HFLM(pretrained=model, tokenizer=settings.pop("tokenizer"), batch_size=3, device="cpu")
    results = simple_evaluate(
        own, tasks=names, task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0, apply_chat_template=chat_template, **settings,
    )  # fmt: skip
    assert results is not None
    return {
        task: {name: float(v) for name, v in values.items() if isinstance(v, int | float) and name != "sample_len"}
        for task, values in results["results"].items()
    }


def same(numbers: dict[str, dict[str, float]], judge: dict[str, dict[str, float]]) -> None:
    """Compare all numbers that the judge has (standard errors are left out there)."""
    for task, values in judge.items():
        assert values, task
        assert {name: numbers[task][name] for name in values} == pytest.approx(values, rel=1e-4, abs=1e-6), task


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = {"one": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])}
    return make_adapters(base, tmp_path_factory.mktemp("adapters"), config)["one"]


CHAT = {"chat_template": True, "num_fewshot": 1, "limit": 5, "tasks": ["words_choice", "words_answer", "words_last"]}
"""A rolling log-probability is that of a text alone, which is no chat."""


@pytest.mark.parametrize("more", [{}, CHAT], ids=["plain", "chat"])
def test_base_and_adapter_are_as_in_the_harness_itself(pool, tmp_path, tiny_model, plain, adapter, more):
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path / "tasks")
    if more:  # what is given away in a prompt comes from here
        for file in tasks.glob("*.yaml"):
            file.write_text(file.read_text() + "fewshot_split: test\n")
    evaluate = {"tasks": list(TASKS), "task_path": str(tasks), "compare": True, **more}
    # on all four: transformers' `generate` asks the whole world whether an answer is unfinished
    one, four = (pool.run(n, measured, str(tiny_model), adapter, evaluate)[0] for n in (1, 4))
    judged = {"before": stock(plain, tasks, tokenizer=str(tiny_model), **more)}
    tuned: Any = peft.PeftModel.from_pretrained(plain, adapter)
    judged["after"] = stock(tuned, tasks, tokenizer=str(tiny_model), **more)
    tuned.unload()  # `plain` is as it was
    for which, judge in judged.items():
        same(one[which], judge)
        same(four[which], judge)
        same(four[which], one[which])
    assert one["before"]["words_last"]["perplexity,none"] != pytest.approx(
        one["after"]["words_last"]["perplexity,none"]
    )
    assert "acc_stderr,none" in one["after"]["words_choice"]


def test_a_merged_model_is_as_in_the_harness_and_near_its_adapter(pool, tmp_path, tiny_model, adapter):
    pytest.importorskip("lm_eval")
    tasks, merged = write_tasks(tmp_path / "tasks"), str(tmp_path / "merged")
    assert pool.run(1, run_merge, str(tiny_model), adapter, merged, "none", "original")[0][0] == "original"
    evaluate = {"tasks": list(TASKS), "task_path": str(tasks)}
    judge = stock(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), tasks, tokenizer=merged)
    one, four = (pool.run(n, measured, merged, None, evaluate)[0]["after"] for n in (1, 4))
    same(one, judge)
    same(four, judge)
    unmerged = pool.run(1, measured, str(tiny_model), adapter, evaluate)[0]["after"]
    for task, name in (("words_rolling", "bits_per_byte,none"), ("words_last", "perplexity,none")):
        assert one[task][name] == pytest.approx(unmerged[task][name], rel=0.02)  # the merged weights are bf16


def _unknown(tasks: Path) -> tuple[dict[str, Any], str]:
    return {"tasks": ["words_choise"]}, "no task 'words_choise'. Did you mean 'words_choice'?"


def _no_data(tasks: Path) -> tuple[dict[str, Any], str]:
    (tasks / "rows.jsonl").unlink()
    return {}, "evaluate.tasks: cannot load words_choice: "


def _asks_for_more(tasks: Path) -> tuple[dict[str, Any], str]:
    file = tasks / "words_answer.yaml"
    file.write_text(file.read_text().replace("  max_gen_toks: 10", "  max_gen_toks: 10\n  num_beams: 4"))
    return {"tasks": ["words_answer"]}, "a task asks for num_beams in generation_kwargs"


def _too_long(tasks: Path) -> tuple[dict[str, Any], str]:
    file = tasks / "words_answer.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 10", "max_gen_toks: 600"))
    return {"tasks": ["words_answer"]}, "an answer may take 600 tokens, and the model has 512 positions"


@pytest.mark.parametrize("spoil", [_unknown, _no_data, _asks_for_more, _too_long])
def test_what_cannot_be_run_ends_all_ranks_with_one_message(pool, tmp_path, tiny_model, spoil):
    pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path / "tasks")
    more, said = spoil(tasks)
    messages = pool.run(
        2, measured, str(tiny_model), None, {"tasks": ["words_choice"], "task_path": str(tasks), **more}
    )
    assert len(set(messages)) == 1 and str(messages[0]).startswith("2 evaluate.tasks: ") and said in str(messages[0])
