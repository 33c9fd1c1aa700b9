"""Renders a prompt with a chat template in a process that can be killed (`fsdp_qlora.distributed.sandbox`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.distributed.sandbox import Apart, StuckError
from fsdp_qlora.errors import ModelError

_TEXT, _REFUSAL = b"t", b"r"
_SHOWN = 5
"""Rejected prompts that a message names."""


def render_apart(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **settings: Any) -> str:
    """Render ``messages`` with the chat template, in a separate process.

    Raises:
        ModelError: if the chat template rejects them, does not terminate, or takes too much memory.
    """
    return render_all_apart(tokenizer, [messages], **settings)[0]


def render_all_apart(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]], names: Sequence[str] = (),
    **settings: Any,
) -> list[str]:  # fmt: skip
    """Render several conversations, as `render_apart` does one; an error says the ``names`` of the rejected ones."""

    def render(messages: list[dict[str, Any]]) -> bytes:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
            assert isinstance(text, str)
            return _TEXT + text.encode("utf-8", "surrogatepass")
        except Exception as error:  # a template is a program: it may raise anything
            return _REFUSAL + f"{type(error).__name__}: {error}".encode(errors="replace")

    process = Apart(render)
    try:
        said = process.results(conversations)
    except StuckError as error:
        raise ModelError(
            f"model.name: its chat template {error}; use another model, or set another template (data.template=FILE)."
        ) from error
    finally:
        process.close()
    require_none({n: each[1:].decode() for n, each in enumerate(said) if each.startswith(_REFUSAL)}, names)
    return [each[1:].decode("utf-8", "surrogatepass") for each in said]


def require_none(refused: Mapping[int, str], names: Sequence[str], what: str = "its chat template") -> None:
    """Check that no conversation was refused.

    Raises:
        ModelError: saying which ones were, by ``names`` if there are any, and why.
    """
    if not refused:
        return
    if not names:
        raise ModelError(f"model.name: {what} rejects the prompt: {next(iter(refused.values()))}")
    shown = "; ".join(f"{names[n]}: {why}" for n, why in list(refused.items())[:_SHOWN])
    more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    raise ModelError(f"model.name: {what} rejects {len(refused)} of {len(names)} prompts: {shown}{more}")
