"""Talks with the user (``generate.chat``): rank 0 has the terminal, all ranks compute."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from fsdp_qlora.adapters.served import BASE
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.distributed.orders import Tell, led_by_main
from fsdp_qlora.distributed.signals import give_back_signals, take_signals
from fsdp_qlora.errors import ModelError
from fsdp_qlora.inference.chat import Chat, Reply
from fsdp_qlora.inference.generate import answer_ids, encode_conversations
from fsdp_qlora.inference.remembered import Remembered
from fsdp_qlora.run.answers import Answering, ending, sampling_seed


class Talk:
    """A conversation with a prepared model."""

    def __init__(self, config: RunConfig, prepared: Answering) -> None:
        """Check that the model can hold one.

        Raises:
            ModelError: if it has no chat template.
        """
        if not prepared.tokenizer.chat_template:
            raise ModelError(
                "generate.chat: the model has no chat template, so it cannot tell turns apart; set data.template=FILE, "
                "or ask single prompts with prompt=."
            )
        self._prepared, self._settings, self._seed = prepared, config.generate, sampling_seed(config)
        self._ending = ending(prepared, config.generate)
        self._read = Remembered()

    def run(self, lines: Iterator[str], introduce: bool) -> None:
        """Answer ``lines``, which rank 0 reads, until they end. Every rank calls it."""

        def lead(tell: Tell) -> None:
            names = list(self._prepared.adapters)

            def answer(messages: list[dict[str, Any]], adapter: str | None, number: int) -> Reply:
                order = {"ids": self._encode(messages), "adapter": adapter, "seed": self._seed + number}
                tell(order)
                return self._answer(order, stream=True)

            first = self._settings.adapter or next(iter(names), None)
            chat = Chat(answer, [*names, BASE] if names else [], first)
            if introduce:
                chat.introduce()
            chat.talk(lines)

        led_by_main(lead, self._answer, self._prepared.ranks)

    def _encode(self, messages: list[dict[str, Any]]) -> list[int]:
        (ids,) = encode_conversations(self._prepared.tokenizer, [messages])
        positions, answer = self._prepared.max_positions, self._settings.max_new_tokens
        if positions and len(ids) + answer > positions:
            raise ModelError(
                f"The conversation has {len(ids)} tokens, and the answer may take {answer} (generate.max_new_tokens), "
                f"but the model has {positions} positions; /reset begins a new one."
            )
        return ids

    def _answer(self, order: dict[str, Any], stream: bool = False) -> Reply:
        """Answer a tokenized conversation; a collective. On a single rank, Ctrl-C ends the answer."""
        prepared = self._prepared
        if order["adapter"] is not None:
            prepared.model.use_adapter(order["adapter"])
        torch.manual_seed(order["seed"])  # so that all ranks sample the same tokens
        with _interrupts(prepared.ranks.size == 1) as received:
            text = answer_ids(
                prepared.model, prepared.tokenizer, self._ending, order["ids"], self._settings, stream,
                (lambda: bool(received)) if prepared.ranks.size == 1 else None, self._read, order["adapter"],
            )  # fmt: skip
        return Reply(text, bool(received))


@contextmanager
def _interrupts(taken: bool) -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it in the middle of a forward; the second one raises."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = take_signals((signal.SIGINT,), receive) if taken else {}
    try:
        yield received
    finally:
        give_back_signals(before)
