"""`generate.prompts`: a file of prompts is answered in batches as one by one, on any number of ranks, and never twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.shards import local_tensor
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.inference import prompts as prompt_files
from fsdp_qlora.inference.prompts import read_prompts
from fsdp_qlora.run.answers import answer_file
from fsdp_qlora.run.inference import load_for_inference
from tests.build import build, config_of, world_of
from tests.distributed.test_many_adapters import CONFIGS, make_adapters, stock
from tests.tiny import make_model, sentence

SAMPLED = {"temperature": 1.0, "top_p": 0.9}


def write_prompts(folder: Path, count: int = 13) -> Path:
    """Write prompts of different lengths, in both forms, with a field of their own."""
    lines = []
    for number in range(count):
        text = sentence(number, 1 + (5 * number) % 11)
        asked = {"prompt": text} if number % 3 else {"messages": [{"role": "user", "content": text}]}
        lines.append(json.dumps({**asked, "id": f"row {number}"}))
    file = folder / "prompts.jsonl"
    file.write_text("\ufeff" + "\n".join(lines) + "\n")  # as Windows' editors write it
    return file


def one_by_one(folder: Path, file: Path, max_new_tokens: int) -> list[str]:
    """Answer with stock transformers in float32, a prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    answers = []
    for line in file.read_text("utf-8-sig").splitlines():
        fields = json.loads(line)
        messages = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def answer(
    ranks: Ranks,
    folder: str,
    file: str,
    to: str,
    most_rounds: int | None = None,
    generate: dict[str, Any] | None = None,
) -> list[Any]:
    """Answer as the command does, at most ``most_rounds`` rounds of batches; return the count or the error."""
    groups: dict[str, Any] = {"precision": {"name": "fp32"}, "quant": {"name": "none", "double_quant": False}}
    prepared = build(ranks, folder, **groups)
    settings = {"prompts": file, "to": to, "max_new_tokens": 12, "batch_size": 3, **(generate or {})}
    config = from_dict({"model": {"name": folder}, "generate": settings})
    add = prompt_files.Answers.add
    rounds = []

    def interrupted(self: Any, texts: Any) -> None:
        if len(rounds) == most_rounds:
            raise FsdpQloraError("killed")
        rounds.append(1)
        add(self, texts)

    prompt_files.Answers.add = interrupted  # type: ignore[method-assign]
    try:
        return [answer_file(config, prepared), len(rounds)]
    except FsdpQloraError as error:
        return [str(error), len(rounds)]
    finally:
        prompt_files.Answers.add = add


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_file_is_answered_as_one_by_one(pool, tmp_path, tiny_model, num_ranks):
    file, to = write_prompts(tmp_path), tmp_path / "answers.jsonl"
    found = pool.run(num_ranks, answer, str(tiny_model), str(file), str(to))
    assert {each[0] for each in found} == {13}
    lines = read(to)
    assert [line["index"] for line in lines] == list(range(13))
    assert [line["id"] for line in lines] == [f"row {n}" for n in range(13)] and "digest" not in lines[0]
    assert [line["answer"] for line in lines] == one_by_one(tiny_model, file, 12)
    assert not list(tmp_path.glob("*.part"))


def _weigh(ranks: Ranks, folder: str) -> float:
    """Return this rank's share of the base's bytes."""
    prepared = build(ranks, folder, precision={"name": "fp32"}, quant={"name": "none", "double_quant": False})
    base = list(prepared.model.base.parameters())
    return sum(local_tensor(p).nbytes for p in base) / sum(p.numel() * p.itemsize for p in base)


@pytest.mark.full
def test_500_prompts_on_one_rank_and_sharded(pool, tmp_path):
    """Two ranks answer as a user starts them in tests/e2e/test_prompt_files.py; here `generate` asks the whole pool."""
    model = make_model(tmp_path / "model", initializer_range=0.4)  # with the usual one, all answers are empty
    file, generate = write_prompts(tmp_path, 500), {"max_new_tokens": 12, "batch_size": 16}
    wanted = one_by_one(model, file, 12)
    assert len(set(wanted)) > 50
    for num_ranks in (1, 4):
        to = tmp_path / f"answers{num_ranks}.jsonl"
        counts = pool.run(num_ranks, answer, str(model), str(file), str(to), None, generate)
        assert {count for count, _ in counts} == {500}
        assert [line["index"] for line in read(to)] == list(range(500))
        assert [line["answer"] for line in read(to)] == wanted
    for num_ranks in (2, 4):
        assert all(abs(share * num_ranks - 1) < 0.02 for share in pool.run(num_ranks, _weigh, str(model)))


def test_what_was_answered_before_a_kill_is_kept_on_another_number_of_ranks(pool, tmp_path, tiny_model):
    file, to = write_prompts(tmp_path), tmp_path / "answers.jsonl"
    assert pool.run(1, answer, str(tiny_model), str(file), str(to), 2)[0][0] == "killed"
    part = to.with_name("answers.jsonl.part")
    assert len(read(part)) == 6 and not to.exists()
    with part.open("a") as stream:
        stream.write('{"index": 3, "ans')  # what a kill in the middle of a write leaves
    found = pool.run(4, answer, str(tiny_model), str(file), str(to))
    assert found[0] == [13, 1]  # 7 prompts are left: 3 batches, and one rank has none
    assert [line["answer"] for line in read(to)] == one_by_one(tiny_model, file, 12)


def _other_prompts(file: Path, to: Path) -> str:
    file.with_name("other.jsonl").write_text('{"prompt": "another"}\n')
    to.with_name(to.name + ".part").write_text('{"index": 0, "prompt": "x", "answer": "y", "digest": "0"}\n')
    return "other prompts"


def _other_settings(file: Path, to: Path) -> str:
    (first, *_) = read_prompts(file)
    line = {"index": 0, **first.fields, "answer": "of another adapter", "digest": f"{first.digest}-0123456789abcdef"}
    to.with_name(to.name + ".part").write_text(json.dumps(line) + "\n" + '{"index": 1, "cut sh')
    return "another model or adapter, or with other settings"


def _the_part_of_the_answers(file: Path, to: Path) -> str:
    """What is asked lies where the answers' part would: it is not rewritten, nor is its last line lost."""
    file.rename(to.with_name(to.name + ".part"))
    file.symlink_to(to.with_name(to.name + ".part"))
    with file.open("a") as stream:
        stream.write('{"prompt": "the last one, without a line feed"}')
    return "which is the file of prompts"


def _half_a_character(file: Path, to: Path) -> str:
    file.write_text('{"prompt": "fine"}\n\n{"prompt": "half: \\ud800"}\n')
    return "rejects 1 of 2 prompts: prompts.jsonl line 3: "


def _no_content(file: Path, to: Path) -> str:
    file.write_text('{"prompt": "fine"}\n{"messages": [{"role": "user"}]}\n')
    return "rejects 1 of 2 prompts: prompts.jsonl line 2: "


def _broken(file: Path, to: Path) -> str:
    file.write_text('{"prompt": "fine"}\nnot json\n{"prompt": 3}\n[1]\n{"messages": [{"content": "x"}]}\n')
    return "cannot be read whole: line 2: "


def _has_answers(file: Path, to: Path) -> str:
    file.write_text('{"prompt": "fine", "answer": "mine"}\n')
    return "line 1: it has 'answer'"


def _both(file: Path, to: Path) -> str:
    file.write_text('{"prompt": "one", "messages": [{"role": "user", "content": "two"}]}\n')
    return 'both "prompt" and "messages"'


def _too_long(file: Path, to: Path) -> str:
    file.write_text('{"prompt": "fine"}\n' + json.dumps({"prompt": sentence(1, 9000)}) + "\n")
    return "too many for 1 of the prompts, those in line 2 ("


def _exists(file: Path, to: Path) -> str:
    to.write_text("kept\n")
    return "already exists"


def _empty(file: Path, to: Path) -> str:
    file.write_text("\n\n")
    return "holds no prompts"


def _missing(file: Path, to: Path) -> str:
    file.unlink()
    return "cannot be read"


@pytest.mark.parametrize("spoil", [
    _other_prompts, _other_settings, _broken, _has_answers, _both, _too_long, _exists, _empty, _missing,
    *(pytest.param(odd, marks=pytest.mark.full) for odd in (_the_part_of_the_answers, _half_a_character, _no_content)),
])  # fmt: skip
def test_what_cannot_be_answered_is_said_on_every_rank(pool, tmp_path, tiny_model, spoil: Callable[[Path, Path], str]):
    file, to = write_prompts(tmp_path), tmp_path / "answers.jsonl"
    said = spoil(file, to)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    messages = [each[0] for each in pool.run(2, answer, str(tiny_model), str(file), str(to))]
    assert all(
        said in str(message) and str(message).startswith(("generate.", "model.name: its ")) for message in messages
    ), messages
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_sampled_answers_are_the_same_each_time(pool, tmp_path, tiny_model):
    file = write_prompts(tmp_path, 5)
    for name in ("one", "two"):
        pool.run(1, answer, str(tiny_model), str(file), str(tmp_path / name), None, SAMPLED)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_settings_that_contradict_each_other():
    from fsdp_qlora.config.rules import failures

    config = from_dict({"prompt": "x", "generate": {"prompts": "file"}})
    said = failures(config)
    assert any(line.startswith("generate.prompts:") for line in said)
    assert any(line.startswith("generate.to:") for line in said)


def _answer_by_adapter(
    ranks: Ranks, folder: str, adapters: dict[str, str], file: str, to: str, chosen: str | None
) -> Any:
    """Answer as the command does, with adapters loaded by name."""
    generate = {"prompts": file, "to": to, "max_new_tokens": 8, "batch_size": 2, "adapter": chosen}
    config = config_of(
        folder, precision={"name": "fp32"}, quant={"name": "none", "double_quant": False}, model={"check": "off"},
        generate=generate, adapter=adapters,
    )  # fmt: skip
    try:
        return answer_file(
            config, load_for_inference(config, {n: Path(f) for n, f in adapters.items()}, world_of(ranks))
        )
    except FsdpQloraError as error:
        return str(error)


@pytest.mark.full
def test_each_row_is_answered_by_the_adapter_that_it_names(pool, tmp_path, tiny_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    folders = make_adapters(base, tmp_path / "adapters", CONFIGS)
    names = ["coder", "__base__", None, "judge", "coder", "poet", None]
    file, lines = tmp_path / "prompts.jsonl", []
    for number, name in enumerate(names):
        lines.append({"prompt": sentence(number, 2 + number)} | ({"adapter": name} if name else {}))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    judge, wanted = stock(base, folders), []
    for line, name in zip(lines, names, strict=True):
        asked = [{"role": "user", "content": line["prompt"]}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        judge.set_adapter("poet" if name in (None, "__base__") else name)
        with judge.disable_adapter() if name == "__base__" else nullcontext():
            out = judge.generate(**inputs, max_new_tokens=8, do_sample=False)
        wanted.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert len(set(wanted)) > 1
    for num_ranks in (1, 4):  # all four: transformers' `generate` asks the whole world whether an answer is unfinished
        to = tmp_path / f"answers{num_ranks}.jsonl"
        pool.run(num_ranks, _answer_by_adapter, str(tiny_model), folders, str(file), str(to), "poet")
        assert [line["answer"] for line in read(to)] == wanted
    said = pool.run(1, _answer_by_adapter, str(tiny_model), folders, str(file), str(tmp_path / "no.jsonl"), None)[0]
    assert 'line 3: no "adapter" to say which of poet, coder, judge, __base__ answers' in said and "line 7" in said
    file.write_text('{"prompt": "x", "adapter": "codr"}\n')
    said = pool.run(1, _answer_by_adapter, str(tiny_model), folders, str(file), str(tmp_path / "no.jsonl"), None)[0]
    assert "there is no adapter 'codr'" in said and "Did you mean 'coder'?" in said


@pytest.mark.full
def test_a_key_value_cache_is_used_and_answers_stop_at_texts(pool, tmp_path, tiny_model):
    file = write_prompts(tmp_path, 4)
    sampled = {"temperature": 2.0, "seed": 5}
    lengths, free = pool.run(1, _lengths, str(tiny_model), str(file), str(tmp_path / "free"), sampled)[0]
    assert lengths[0] > 1 and set(lengths[1:]) == {1} and len(lengths) > 4
    text = next(match[0] for answer in free if (match := re.search("[!-~]{2}", answer[1:])))
    sampled["stop"] = [text, "not there"]
    _, cut = pool.run(1, _lengths, str(tiny_model), str(file), str(tmp_path / "cut"), sampled)[0]
    assert cut == [answer.partition(text)[0].strip() for answer in free] and cut != free


def _lengths(ranks: Ranks, folder: str, file: str, to: str, more: dict[str, Any]) -> Any:
    """Answer; return how many tokens each forward of the first layer saw, and the answers."""
    config = config_of(
        folder, precision={"name": "fp32"}, quant={"name": "none", "double_quant": False}, model={"check": "off"},
        generate={"prompts": file, "to": to, "max_new_tokens": 12, "batch_size": 4, **more},
    )  # fmt: skip
    prepared = load_for_inference(config, None, world_of(ranks))
    lengths: list[int] = []
    layer = prepared.model.base.model.layers[0]
    layer.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    answer_file(config, prepared)
    return lengths, [line["answer"] for line in read(Path(to))]
