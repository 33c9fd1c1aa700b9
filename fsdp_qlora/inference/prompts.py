"""A file of prompts and the file of their answers: what is asked, what has been answered, and what is left.

Answers are appended as they come, to ``OUT.part``; once all are there, they are put in the prompts' order into ``OUT``.
A run that was killed goes on where it stopped, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import ConfigError, DataError
from fsdp_qlora.files.write import append_to
from fsdp_qlora.track.lines import read_lines, to_line, write_lines

ANSWER, INDEX, DIGEST = "answer", "index", "digest"


@dataclass(frozen=True)
class Prompt:
    """One line of the file."""

    index: int
    """Number of the line's prompt, from 0."""
    fields: Mapping[str, Any]
    """The line as it is; its answer is written beside."""
    messages: list[dict[str, Any]]
    """What is asked, as a conversation."""

    @property
    def digest(self) -> str:
        """A digest of the line, by which an answer is known to be this prompt's."""
        text = json.dumps(self.fields, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(file: Path) -> list[Prompt]:
    """Read a JSONL file of ``{"prompt": "..."}`` or ``{"messages": [{"role": ..., "content": ...}, ...]}``.

    Raises:
        DataError: naming every line that cannot be read; nothing is answered then.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"generate.prompts: {file} cannot be read: {error}.") from error
    prompts: list[Prompt] = []
    wrong: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompts.append(Prompt(len(prompts), fields, _messages(fields)))
        except (ValueError, RecursionError) as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"generate.prompts: {file} cannot be read whole: {'; '.join(wrong[:5])}{more}.")
    if not prompts:
        raise DataError(f"generate.prompts: {file} holds no prompts.")
    return prompts


def _messages(fields: Any) -> list[dict[str, Any]]:
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if taken := sorted({ANSWER, INDEX, DIGEST} & fields.keys()):
        raise ValueError(f"it has {taken[0]!r}, under which the output has its own; rename it")
    if "prompt" in fields and "messages" in fields:
        raise ValueError('both "prompt" and "messages"')
    if isinstance(prompt := fields.get("prompt"), str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('neither "prompt" with text nor "messages"')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message without a role")
    return messages


class Answers:
    """The answers to a file of prompts, on the one process that writes them."""

    def __init__(self, file: Path, prompts: Iterable[Prompt]) -> None:
        """Read what an earlier run has answered.

        Raises:
            ConfigError: if ``file`` is complete already, or its part belongs to other prompts.
        """
        self.file, self._part = file, file.with_name(file.name + ".part")
        self._prompts = list(prompts)
        if file.exists():
            raise ConfigError(f"generate.to: {file} already exists; choose another file.")
        self._lines: dict[int, dict[str, Any]] = {}
        for line in self._earlier():
            index = line.get(INDEX, -1) if isinstance(line, dict) else -1
            known = type(index) is int and 0 <= index < len(self._prompts)
            if not known or line.get(DIGEST) != self._prompts[index].digest:
                raise ConfigError(
                    f"generate.to: {self._part} holds answers to other prompts; remove it, or choose another file."
                )
            self._lines[index] = line

    def _earlier(self) -> list[Any]:
        if not self._part.exists():
            return []
        try:
            lines = read_lines(self._part)
        except (OSError, ValueError) as error:
            raise ConfigError(f"generate.to: {self._part} cannot be read: {error}; remove it.") from error
        write_lines(self._part, lines)  # without a last line that a kill cut short
        return lines

    @property
    def left(self) -> list[Prompt]:
        """The prompts without an answer."""
        return [prompt for prompt in self._prompts if prompt.index not in self._lines]

    def add(self, answers: Mapping[int, str]) -> None:
        """Write answers by the indices of their prompts."""
        lines = [
            {INDEX: i, **self._prompts[i].fields, ANSWER: text, DIGEST: self._prompts[i].digest}
            for i, text in sorted(answers.items())
        ]
        self._lines |= {line[INDEX]: line for line in lines}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with append_to(self._part) as stream:
            stream.write("".join(map(to_line, lines)).encode())

    def finish(self) -> None:
        """Put all answers in order into the file."""
        kept = ({k: v for k, v in self._lines[i].items() if k != DIGEST} for i in sorted(self._lines))
        write_lines(self.file, kept)
        self._part.unlink(missing_ok=True)
