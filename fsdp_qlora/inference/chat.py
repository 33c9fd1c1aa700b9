"""A conversation in a terminal: what is typed, what is remembered, and the commands that begin with a slash.

It reads lines and calls a model's answer through a function, so it knows neither ranks nor tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fsdp_qlora.config.choices import nearest
from fsdp_qlora.errors import ModelError
from fsdp_qlora.shown import visible

COMMANDS = {
    "/reset": "forget the conversation",
    "/adapter": "NAME: let another adapter answer; without a name, list them",
    "/quit": "end (also Ctrl-D)",
    "/help": "show this",
}


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    interrupted: bool = False
    """Whether the user stopped it before its end."""


Answer = Callable[[list[dict[str, Any]], str | None, int], Reply]
"""Answers a conversation with the adapter of a name; the number counts the answers, and varies what is sampled."""


@dataclass
class Chat:
    """A conversation, and the adapter that answers."""

    answer: Answer
    """Prints the answer as it comes, and returns it.

    Raises `ModelError` if the conversation cannot be answered, for example if it is too long.
    """
    adapters: Sequence[str] = ()
    """Names to choose from; empty if there is no choice."""
    adapter: str | None = None
    """The one that answers."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation so far."""
    _answers: int = 0

    def talk(self, lines: Iterator[str]) -> None:
        """Answer line by line until ``/quit`` or the end of the lines."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/") and not text.startswith("//"):
                self._command(*text.split(maxsplit=1))
            elif text:
                self._say(text.removeprefix("/") if text.startswith("//") else text)

    def _say(self, text: str) -> None:
        """Answer ``text``; what cannot be answered is taken back."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            reply = self.answer(asked, self.adapter, self._answers)
        except ModelError as error:
            note(f"{error} Your last message is forgotten.")
            return
        self._answers += 1
        if reply.interrupted:
            note("(stopped)")
        if reply.text or not reply.interrupted:
            self.messages = [*asked, {"role": "assistant", "content": reply.text}]

    def _command(self, command: str, rest: str = "") -> None:
        if command == "/reset":
            self.messages = []
            note("the conversation is forgotten")
        elif command == "/adapter":
            self._use(rest.strip())
        elif command == "/help":
            self.introduce()
        else:
            note(
                f"there is no command {command}.{nearest(command, COMMANDS)} {_commands()} (// begins a message with /)"
            )

    def _use(self, name: str) -> None:
        if not self.adapters:
            note("there is nothing to choose from: load several adapters with adapter={name: FOLDER, ...}")
        elif not name:
            note(f"adapters: {', '.join(self.adapters)}; {self.adapter} answers")
        elif name not in self.adapters:
            note(f"there is no adapter {name!r}; loaded are {', '.join(self.adapters)}.{nearest(name, self.adapters)}")
        else:
            self.adapter = name
            note(f"{name} answers now; the conversation goes on")

    def introduce(self) -> None:
        """Say what can be typed."""
        for command, about in COMMANDS.items():
            note(f"{command} {about}")


def _commands() -> str:
    return f"There are {', '.join(COMMANDS)}."


def note(text: str) -> None:
    """Tell the user something that is not an answer: on stderr, so that a pipe gets answers only."""
    print(visible(text), file=sys.stderr, flush=True)
