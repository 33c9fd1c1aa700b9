"""Conversations -> text, with the tokenizer's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.chat import Example
from fsdp_qlora.data.lines import MAX_ROW
from fsdp_qlora.data.messages import Message, payload_of, require_unicode
from fsdp_qlora.errors import DataError

_CALLS = ("tool_calls", "function_call")


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.source = deepcopy(tokenizer.chat_template)
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        tokens = sorted({token for token in (*added, *tokenizer.all_special_tokens) if token}, key=len, reverse=True)
        self._special_tokens = tuple(tokens)
        self.special_token = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        """Matches any of the tokenizer's special tokens."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """A key that is equal only for the same tokenizer object with unchanged template and special tokens."""
        named = sorted((name, str(token)) for name, token in self._tokenizer.special_tokens_map.items())
        return type(self), id(self._tokenizer), self.source, self._special_tokens, named

    @property
    def beginning(self) -> str:
        """The first characters of the template, to identify it in messages."""
        return " ".join(str(self.source)[:200].split())[:60]

    def ends_with_special_token(self, text: str) -> bool:
        """Whether ``text`` ends with a special token."""
        return text.endswith(self._special_tokens)

    def generation_prompt(self, example: Example) -> str:
        """Return the generation prompt after a user's message; "" if there is none or it cannot be determined."""
        asked = [{"role": "user", "content": "?"}]
        try:
            text, prompt = self.render(asked, example), self.render(asked, example, prompt=True)
        except DataError:
            return ""
        return prompt.removeprefix(text) if prompt.startswith(text) else ""

    def settled(self, example: Example) -> Conversation:
        """Return the conversation as this template expects it: arguments of tool calls as objects or as JSON.

        Raises:
            DataError: if there is no template, it rejects the conversation, or it does not write a message's key or
                content that is meant for the model.
        """
        if not self._tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template, so conversations cannot be rendered; set data.template, or use "
                "prompt/completion"
            )
        conversation = Conversation(self, example, example.messages)
        if any(key in message for message in example.messages for key in _CALLS):
            conversation = self._with_arguments(conversation)
        conversation.require_written()
        return conversation

    def _with_arguments(self, conversation: Conversation) -> Conversation:
        encoded = Conversation(self, conversation.example, [_encoded(message) for message in conversation.messages])
        try:
            text = conversation.text
        except DataError:
            if encoded.messages == conversation.messages or not encoded.renders():
                raise
            return encoded  # the template concatenates the arguments with text, so they must be strings
        printed = (str(value) for message in conversation.messages for value in _arguments(message))
        return encoded if any(value in text for value in printed) else conversation  # {'a': 1} is Python, not JSON

    def given(self, message: Message) -> Message:
        """Return a message as the template gets it."""
        return message

    def render(self, messages: Sequence[Message], example: Example, prompt: bool = False) -> str:
        """Return the text of ``messages``, followed by the generation prompt if ``prompt`` is true.

        Raises:
            DataError: if the template rejects the messages or its text is too long or not valid Unicode.
        """
        settings = {} if example.tools is None else {"tools": example.tools}
        try:
            text = self._tokenizer.apply_chat_template(
                [self.given(message) for message in messages],
                tokenize=False,
                add_generation_prompt=prompt,
                **settings,
                **example.settings,
            )
        except Exception as error:  # a template is a program and may raise anything; blame the row
            raise DataError(f"the chat template rejects the conversation: {type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        if len(text) > MAX_ROW:
            raise DataError(
                f"the chat template renders the conversation to {len(text)} characters, but the limit is {MAX_ROW}"
            )
        require_unicode(text)
        return text


class Conversation:
    """The messages of an example in the form that the template expects."""

    def __init__(self, template: ChatTemplate, example: Example, messages: list[Message]) -> None:
        self.template, self.example, self.messages = template, example, messages
        self._text: str | None = None

    @property
    def text(self) -> str:
        """The rendered text of all messages."""
        if self._text is None:
            self._text = self.render(self.messages)
        return self._text

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Render other messages with the example's tools and settings.

        Raises:
            DataError: as for `ChatTemplate.render`.
        """
        return self.template.render(messages, self.example, prompt)

    def renders(self) -> bool:
        """Whether the template accepts the conversation and renders any text."""
        try:
            return bool(self.text)
        except DataError:
            return False

    def up_to(self, turn: int) -> str:
        """Return the text of the messages up to and including index ``turn``."""
        return self.text if turn == len(self.messages) - 1 else self.render(self.messages[: turn + 1])

    def require_written(self) -> None:
        """Check that the template writes everything in the messages that is meant for the model.

        Raises:
            DataError: if it does not, naming the message and the key.
        """
        for turn, message in enumerate(self.messages):
            keys = payload_of(message)
            if keys and message["content"].strip() and not self._is_written(turn, "content"):
                raise DataError(
                    f"message {turn + 1} has both content and {', '.join(keys)}, but the chat template does not write "
                    "the content, so the model would never see it; data.template=FILE sets a template that does"
                )
            for key in keys:
                if not self._is_written(turn, key):
                    raise DataError(
                        f"message {turn + 1} has the key {key!r}, which the chat template does not write, so the model "
                        "would never see it; data.template=FILE sets a template that does, "
                        f"data.ignore_keys=[{key}] drops the key"
                    )

    def _is_written(self, turn: int, key: str) -> bool:
        """Whether removing the key changes the text, with the message as the last one or with all later ones."""
        message = {name: value for name, value in self.messages[turn].items() if name != key}
        message.setdefault("content", "")
        for end in {turn + 1, len(self.messages)}:
            before, after = self.messages[:turn], self.messages[turn + 1 : end]
            try:
                text = self.text if end == len(self.messages) else self.render([*before, self.messages[turn]])
            except DataError:
                continue  # some templates reject a conversation that ends with a tool call
            try:
                if self.render([*before, message, *after]) != text:
                    return True
            except DataError:
                return True  # the template needs the key
        return False


def _arguments(message: Message) -> list[Mapping[str, Any]]:
    """Return the arguments of a message's calls that are non-empty objects."""
    calls = [call for key in _CALLS for call in _listed(message.get(key)) if isinstance(call, Mapping)]
    calls = [call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls]
    return [arguments for call in calls if isinstance(arguments := call.get("arguments"), Mapping) and arguments]


def _encoded(message: Message) -> Message:
    """Return a message with the arguments of its calls encoded as JSON."""
    return {key: _encoded_calls(value) if key in _CALLS else value for key, value in message.items()}


def _encoded_calls(value: Any) -> Any:
    if isinstance(value, list):
        return [_encoded_calls(call) for call in value]
    if not isinstance(value, Mapping):
        return value
    call = dict(value)
    if "function" in call:
        call["function"] = _encoded_calls(call["function"])
    if isinstance(call.get("arguments"), dict | list):
        call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return call


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
