"""Ollama's Modelfile: where the weights are, the chat template in Go's language, and where an answer ends.

Ollama does not read the Jinja template in a GGUF file; it looks for one that is like it among its own, and otherwise
has none. Most templates only write something before and after each message, which can be said in Go's templates too:
`Turns` is read off a few rendered conversations, and is used only if it writes all of them again.

The Modelfile's syntax is that of parser/parser.go in https://github.com/ollama/ollama, its variables those of
template/template.go there.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Message = Mapping[str, str]
_SYSTEM, _ASKED, _ANSWER, _AGAIN, _LAST = "Zqs1x", "Zqu2x", "Zqa3x", "Zqu4x", "Zqa5x"
"""Contents of messages that no template writes on its own."""
_TURNS: tuple[Message, ...] = (
    {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _AGAIN}, {"role": "assistant", "content": _LAST},
)  # fmt: skip
PROBES: tuple[tuple[Message, ...], ...] = (_TURNS[:1], _TURNS[:2], _TURNS[:3], _TURNS)
"""Conversations to render, each with and without the generation prompt, and each after `SYSTEM`."""
SYSTEM: Message = {"role": "system", "content": _SYSTEM}


@dataclass(frozen=True)
class Turns:
    """A chat template that writes something before and after each message."""

    around: Mapping[str, tuple[str, str]]
    """Role -> what is before and after a message's content."""
    default: str
    """What a conversation without a system message begins with."""
    generation: str
    """The generation prompt."""

    def render(self, messages: Sequence[Message], prompt: bool) -> str:
        """Return a conversation's text."""
        text = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + (self.generation if prompt else "")

    def in_go(self) -> str:
        """Return the template for Ollama, which gives it ``.System`` and ``.Messages``."""
        text = _go(self.default)
        if text and "system" in self.around:
            text = f"{{{{ if not .System }}}}{text}{{{{ end }}}}"
        text += "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        word = "if"
        for role, (before, after) in self.around.items():
            end = _go(after)
            if role == "assistant":  # an answer that is to be continued is not ended
                end = f"{{{{ if not $last }}}}{end}{{{{ end }}}}"
            text += f'{{{{ {word} eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{end}'
            word = "else if"
        generation = f'{{{{ if and $last (ne .Role "assistant") }}}}{_go(self.generation)}{{{{ end }}}}'
        return f"{text}{{{{ end }}}}{generation}{{{{ end }}}}"


def read_turns(plain: Sequence[str], prompted: Sequence[str], begin: str) -> Turns | None:
    """Return what a template writes around users' and assistants' messages; None if it does more than that.

    Args:
        plain: `PROBES`, rendered without the generation prompt.
        prompted: the same with it.
        begin: the token that programs add before a text, which the template writes, too; "" if there is none.
    """
    whole, first = plain[-1].removeprefix(begin), plain[0].removeprefix(begin)
    try:
        _, rest = whole.split(_ASKED)
        between, rest = rest.split(_ANSWER)
        again, rest = rest.split(_AGAIN)
        _, after_answer = rest.split(_LAST)
        before, after_asked = first.split(_ASKED)
    except ValueError:
        return None
    before_asked = again.removeprefix(after_answer)
    default = before.removesuffix(before_asked)
    turns = Turns(
        {"user": (before_asked, after_asked), "assistant": (between.removeprefix(after_asked), after_answer)},
        default,
        prompted[0].removeprefix(plain[0]),
    )
    return turns if _writes(turns, PROBES, plain, prompted, begin) else None


def with_system(turns: Turns, plain: Sequence[str], prompted: Sequence[str], begin: str) -> Turns | None:
    """Return ``turns`` with what is around a system message; None if the template does not write it as one of them.

    Args:
        turns: what is around other messages.
        plain: `PROBES` after `SYSTEM`, rendered without the generation prompt.
        prompted: the same with it.
        begin: as in `read_turns`.
    """
    text = plain[0].removeprefix(begin)
    if text.count(_SYSTEM) != 1 or _ASKED not in text:
        return None
    before, rest = text.split(_SYSTEM)
    after = rest.partition(_ASKED)[0].removesuffix(turns.around["user"][0])
    whole = Turns({"system": (before, after), **turns.around}, turns.default, turns.generation)
    probes = [(SYSTEM, *probe) for probe in PROBES]
    return whole if _writes(whole, probes, plain, prompted, begin) else None


def _writes(
    turns: Turns, probes: Sequence[Sequence[Message]], plain: Sequence[str], prompted: Sequence[str], begin: str
) -> bool:
    return all(
        begin + turns.render(probe, False) == text and begin + turns.render(probe, True) == with_prompt
        for probe, text, with_prompt in zip(probes, plain, prompted, strict=True)
    )


def _go(text: str) -> str:
    """Return literal text of a Go template that a Modelfile can hold."""
    return "".join(map(_go_character, text))


def _go_character(character: str) -> str:
    if character in '{"':  # two of the former begin an action, three of the latter end a Modelfile's text
        return f"{{{{ `{character}` }}}}"
    if character in " \t\n" or unicodedata.category(character)[0] in "LMNPS":
        return character
    code = ord(character)  # the Modelfile's parser drops what cannot be printed
    return f'{{{{ "\\U{code:08x}" }}}}'


def modelfile(
    weights: str, adapter: str | None, turns: Turns | None, stops: Sequence[str], notes: Sequence[str]
) -> str:
    """Return the text of a Modelfile.

    Args:
        weights: the GGUF file, or Ollama's name of a model.
        adapter: the adapter's GGUF file.
        turns: the chat template.
        stops: texts that end an answer.
        notes: lines of comment.
    """
    lines = [f"# {note}" for note in notes]
    lines += [f"FROM {weights}", *([f"ADAPTER {adapter}"] if adapter else [])]
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.in_go()}"""')
    lines += [f'PARAMETER stop "{stop}"' if '"' not in stop else f'PARAMETER stop """{stop}"""' for stop in stops]
    return "\n".join(lines) + "\n"
