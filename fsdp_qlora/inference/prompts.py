"""A file of prompts and the file of their answers: what is asked, what has been answered, and what is left.

Answers are appended as they come, to ``OUT.part``; once all are there, they are put in the prompts' order into ``OUT``.
A run that was killed goes on where it stopped, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.config.choices import nearest
from fsdp_qlora.errors import ConfigError, DataError, StorageError
from fsdp_qlora.files.write import append_to
from fsdp_qlora.track.lines import read_lines, to_line, write_lines

ANSWER, INDEX, DIGEST, ADAPTER = "answer", "index", "digest", "adapter"


@dataclass(frozen=True)
class Prompt:
    """One line of the file."""

    index: int
    """Number of the line's prompt, from 0."""
    fields: Mapping[str, Any]
    """The line as it is; its answer is written beside."""
    messages: list[dict[str, Any]]
    """What is asked, as a conversation."""
    adapter: str | None = None
    """The adapter that the line names, of several."""
    line: int = 0
    """Number of the line in its file, from 1."""

    @property
    def digest(self) -> str:
        """A digest of the line, by which an answer is known to be this prompt's."""
        text = json.dumps(self.fields, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(
    file: Path, adapters: Collection[str] = (), default: str | None = None, key: str = "generate.prompts"
) -> list[Prompt]:
    """Read a JSONL file of ``{"prompt": "..."}`` or ``{"messages": [{"role": ..., "content": ...}, ...]}``.

    Args:
        file: the file, which ``key`` names.
        adapters: names of the loaded adapters, of which a line may name one as its ``adapter``.
        default: the adapter that answers the other lines.
        key: the setting, for messages.

    Raises:
        DataError: naming every line that cannot be read; nothing is answered then.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}: {file} cannot be read: {error}.") from error
    prompts: list[Prompt] = []
    wrong: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            messages = _messages(fields)
            prompts.append(Prompt(len(prompts), fields, messages, _adapter(fields, adapters, default), number))
        except (ValueError, RecursionError) as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"{key}: {file} cannot be read whole: {'; '.join(wrong[:5])}{more}.")
    if not prompts:
        raise DataError(f"{key}: {file} holds no prompts.")
    return prompts


def _adapter(fields: dict[str, Any], adapters: Collection[str], default: str | None) -> str | None:
    """Return the adapter that answers a line: the one it names, or ``default``."""
    name = fields.get(ADAPTER, default)
    if name is None and not adapters:
        return None
    if name is None:
        raise ValueError(f'no "{ADAPTER}" to say which of {", ".join(adapters)} answers, and no generate.adapter')
    if not adapters:
        raise ValueError(f'its "{ADAPTER}" chooses among several; load them with adapter={{name: FOLDER, ...}}')
    if not isinstance(name, str) or name not in adapters:
        raise ValueError(
            f"there is no adapter {name!r}; loaded are {', '.join(adapters)}.{nearest(str(name), adapters)}"
        )
    return name


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


def part_of(file: Path) -> Path:
    """Return the file in which the answers for ``file`` are collected until all are there."""
    return file.with_name(file.name + ".part")


class Answers:
    """The answers to a file of prompts, on the one process that writes them."""

    def __init__(self, file: Path, prompts: Iterable[Prompt], asked: str | None = None) -> None:
        """Read what an earlier run has answered.

        Args:
            file: the file to write.
            prompts: what is answered.
            asked: a digest of who answers, and with which settings: answers of others are not mixed with these. None:
                not compared.

        Raises:
            ConfigError: if ``file`` is complete already, or its part belongs to other prompts, or others answered.
            StorageError: if its folder cannot be made.
        """
        self.file, self._part = file, part_of(file)
        self._prompts, self._asked = list(prompts), asked
        if file.exists():
            raise ConfigError(f"generate.to: {file} already exists; choose another file.")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"generate.to: the folder of {file} cannot be made: {error}.") from error
        self._lines: dict[int, dict[str, Any]] = {}
        for line in self._earlier():
            index = line.get(INDEX, -1) if isinstance(line, dict) else -1
            known = type(index) is int and 0 <= index < len(self._prompts)
            digest = str(line.get(DIGEST)) if known else ""
            if not known or digest.partition("-")[0] != self._prompts[index].digest:
                raise ConfigError(
                    f"generate.to: {self._part} holds answers to other prompts; remove it, or choose another file."
                )
            if self._asked is not None and digest != self._digest(index):
                raise ConfigError(
                    f"generate.to: {self._part} holds answers of another model or adapter, or with other settings "
                    "(generate, quant, precision, data.template), and they would be mixed with these. Start it as "
                    "before, or remove that file, or choose another one."
                )
            self._lines[index] = line
        if self._lines and self._asked is not None:
            write_lines(self._part, self._lines.values())  # without a last line that a kill cut short

    def _earlier(self) -> list[Any]:
        if not self._part.exists():
            return []
        try:
            return read_lines(self._part)
        except (OSError, ValueError) as error:
            raise ConfigError(f"generate.to: {self._part} cannot be read: {error}; remove it.") from error

    def _digest(self, index: int) -> str:
        return f"{self._prompts[index].digest}-{self._asked}"

    @property
    def left(self) -> list[Prompt]:
        """The prompts without an answer."""
        return [prompt for prompt in self._prompts if prompt.index not in self._lines]

    def add(self, answers: Mapping[int, str]) -> None:
        """Write answers by the indices of their prompts."""
        lines = [
            {INDEX: i, **self._prompts[i].fields, ANSWER: text, DIGEST: self._digest(i)}
            for i, text in sorted(answers.items())
        ]
        self._lines |= {line[INDEX]: line for line in lines}
        with append_to(self._part) as stream:
            stream.write("".join(map(to_line, lines)).encode())

    def finish(self) -> None:
        """Put all answers in order into the file."""
        kept = ({k: v for k, v in self._lines[i].items() if k != DIGEST} for i in sorted(self._lines))
        write_lines(self.file, kept)
        self._part.unlink(missing_ok=True)
