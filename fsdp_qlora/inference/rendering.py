"""Renders a prompt with a chat template in a process that can be killed (`fsdp_qlora.distributed.sandbox`)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.distributed.sandbox import Apart, StuckError
from fsdp_qlora.errors import ModelError

_TEXT, _REFUSAL = b"t", b"r"


def render_apart(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **settings: Any) -> str:
    """Render ``messages`` with the chat template, in a separate process.

    Raises:
        ModelError: if the chat template rejects them, does not terminate, or takes too much memory.
    """
    return render_all_apart(tokenizer, [messages], **settings)[0]


def render_all_apart(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]], **settings: Any
) -> list[str]:
    """Render several conversations, as `render_apart` does one."""

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
    return [_text(each) for each in said]


def _text(said: bytes) -> str:
    if said.startswith(_REFUSAL):
        raise ModelError(f"model.name: its chat template rejects the prompt: {said[1:].decode()}")
    return said[1:].decode("utf-8", "surrogatepass")
