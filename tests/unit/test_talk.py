"""A chat remembers the conversation, obeys its commands, and reads a pipe as it reads a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from fsdp_qlora.cli.typed import typed_lines
from fsdp_qlora.config.rules import failures
from fsdp_qlora.config.schema import from_dict
from fsdp_qlora.config.verb_rules import check_verb
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.inference.chat import Chat, Reply


def talk(*lines: str, adapters: tuple[str, ...] = (), reply: Callable[[str], Reply] | None = None) -> list[Any]:
    """Return what the model was asked: the contents of each conversation, and the adapter."""
    asked: list[Any] = []

    def answer(messages: list[dict[str, Any]], adapter: str | None, number: int) -> Reply:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
        asked.append(([m["content"] for m in messages], adapter, number))
        return reply(messages[-1]["content"]) if reply else Reply(f"re: {messages[-1]['content']}")

    Chat(answer, adapters, adapters[0] if adapters else None).talk(iter(lines))
    return asked


def test_the_conversation_is_kept_until_reset_and_ends_at_quit():
    assert talk("one", " ", " two ", "/reset", "three", "/quit", "never") == [
        (["one"], None, 0),
        (["one", "re: one", "two"], None, 1),
        (["three"], None, 2),
    ]


def test_another_adapter_goes_on_with_the_conversation(capsys):
    asked = talk("one", "/adapter coder", "two", "/adapter codr", "/adapter", "three", adapters=("poet", "coder"))
    assert [each[1] for each in asked] == ["poet", "coder", "coder"] and len(asked[2][0]) == 5
    said = capsys.readouterr().err
    assert "no adapter 'codr'; loaded are poet, coder. Did you mean 'coder'?" in said
    assert "adapters: poet, coder; coder answers" in said


def test_what_is_no_command_is_not_sent(capsys):
    assert talk("/rest", "//rest", "/adapter poet") == [(["/rest"], None, 0)]
    said = capsys.readouterr().err
    assert "no command /rest. Did you mean '/reset'?" in said and "load several adapters" in said


def test_what_cannot_be_answered_is_taken_back(capsys):
    def reply(text: str) -> Reply:
        if text == "long":
            raise ModelError("The conversation has 9 tokens.")
        return Reply("", True) if text == "stopped at once" else Reply("half", text == "stopped later")

    asked = talk("long", "stopped at once", "stopped later", "last", reply=reply)
    assert asked[-1][0] == ["stopped later", "half", "last"]
    assert "The conversation has 9 tokens. Your last message is forgotten." in capsys.readouterr().err


@pytest.mark.parametrize("pieces", [[b"one\ntw\xc3", b"\xb6\r\n", b"three"], [b"one\n", b"tw\xc3\xb6\nthree\n"]])
def test_lines_come_from_a_pipe_in_any_pieces(pieces):
    read, write = os.pipe()
    saved = os.dup(0)
    os.dup2(read, 0)
    try:
        lines = typed_lines()
        for piece in pieces[:-1]:
            os.write(write, piece)
        assert next(lines) == "one"
        os.write(write, pieces[-1])
        os.close(write)
        assert list(lines) == ["twö", "three"]
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(read)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"generate": {"chat": True}, "prompt": "x"}, "generate.chat: reads what you say from standard input"),
        ({"generate": {"chat": True, "prompts": "f", "to": "g"}}, "leave generate.prompts out"),
        ({"generate": {"stop": ["x", ""]}}, "generate.stop: an empty text"),
        ({"generate": {"seed": -1}}, "generate.seed: must not be negative"),
        ({"evaluate": {"limit": 3}}, "evaluate.limit: is about tasks"),
        ({"evaluate": {"tasks": ["a", "a"]}}, "evaluate.tasks: a is named more than once"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    assert any(said in line for line in failures(from_dict(settings)))


def test_a_comparison_needs_an_adapter():
    config = from_dict({"model": {"name": "x"}, "evaluate": {"compare": True, "tasks": ["a"]}})
    with pytest.raises(ConfigError, match=r"^evaluate\.compare: compares an adapter with its base"):
        check_verb("evaluate", config)
