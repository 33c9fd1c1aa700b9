"""Examples -> token ids and, for each token, whether it is learned.

The mask comes from places in the text (`fsdp_qlora.data.spans`), not from token ids (pad may equal eos) and not from
``{% generation %}`` blocks (most templates have none). Texts are tokenized in batches, with all cores. A prompt and its
completion are tokenized as one text, so that BOS, EOS and spaces come out as in any other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.chat import Example
from fsdp_qlora.data.messages import require_unicode
from fsdp_qlora.data.spans import Span, learned_spans, require_end
from fsdp_qlora.data.template import ChatTemplate
from fsdp_qlora.errors import DataError

TrainOn = Literal["assistant", "last", "all"]
"""What is learned: every answer, the last one, or every token."""


@dataclass(frozen=True)
class _Text:
    """A text, and the characters of it that are learned (None = all)."""

    text: str
    plain: bool
    """Whether BOS and EOS are added; a chat template writes its own."""
    spans: list[Span] | None


Encoded = tuple[np.ndarray, np.ndarray]
"""int32 ids and bool learned, both ``[length]``."""


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant") -> Encoded:
    """Encode one example.

    Raises:
        DataError: if it cannot be rendered.
    """
    (result,) = encode_batch([example], tokenizer, train_on)
    if isinstance(result, DataError):
        raise result
    return result


def encode_batch(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant"
) -> list[Encoded | DataError]:
    """Encode examples together; what is wrong with one is its own result."""
    template = ChatTemplate(tokenizer)
    results: list[Encoded | DataError | None] = [None] * len(examples)
    texts: dict[int, _Text] = {}
    for number, example in enumerate(examples):
        try:
            texts[number] = _text_of(example, template, train_on)
        except DataError as error:
            results[number] = error
    for plain in (False, True):
        chosen = {number: text for number, text in texts.items() if text.plain == plain}
        for number, result in zip(chosen, _tokenized(list(chosen.values()), tokenizer, plain), strict=True):
            results[number] = result
    return [result for result in results if result is not None]


def _tokenized(texts: list[_Text], tokenizer: PreTrainedTokenizerBase, plain: bool) -> list[Encoded | DataError]:
    """Tokenize texts together or, if the tokenizer rejects one of them, one by one."""
    if not texts:
        return []
    try:
        found: Any = tokenizer(
            [text.text for text in texts], add_special_tokens=plain, return_offsets_mapping=True,
            return_special_tokens_mask=True, verbose=False,
        )  # fmt: skip
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        if len(texts) == 1:
            return [DataError(f"the tokenizer rejects the text: {type(error).__name__}: {error}")]
        return [result for text in texts for result in _tokenized([text], tokenizer, plain)]
    columns = (found["input_ids"], found["offset_mapping"], found["special_tokens_mask"])
    return [_masked(text, tokenizer, *row) for text, *row in zip(texts, *columns, strict=True)]


def _masked(
    text: _Text, tokenizer: PreTrainedTokenizerBase, tokens: list[int], offsets: list[Span], added: list[int]
) -> Encoded:
    ids = np.array(tokens, dtype=np.int32)
    if text.spans is None:
        learned = np.ones(len(ids), dtype=bool)
    else:
        learned = _learned(np.array(offsets, dtype=np.int64).reshape(-1, 2), text.spans)
    if not text.plain:
        return ids, learned
    own = np.flatnonzero(np.array(added, dtype=bool) == 0)
    first, last = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)
    if text.spans is not None:
        learned[:first] = False  # added tokens have no place in the text: their offsets are (0, 0)
        learned[last:] = True
    end = tokenizer.eos_token_id
    if 0 < last < len(ids) and ids[last - 1] == ids[last] == end:
        ids, learned = np.delete(ids, last), np.delete(learned, last)  # the text has its own
    if 0 < first < len(ids) and ids[first - 1] == ids[first] == tokenizer.bos_token_id:
        ids, learned = np.delete(ids, first), np.delete(learned, first)
    if isinstance(end, int) and (not len(ids) or ids[-1] != end):
        ids, learned = np.append(ids, np.int32(end)), np.append(learned, True)
    return ids, learned


def _learned(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Return which tokens are learned: those that overlap a span.

    Args:
        offsets: int64 ``[length, 2]``, start and end of each token in the text. With ``trim_offsets``, tokens of
            spaces have no width: such a token covers the text from the previous token's end up to its own. A token
            without any text was inserted before the one that follows, and is learned with it.
        spans: starts and ends in the text.
    """
    starts, stops = offsets[:, 0], offsets[:, 1]
    before = np.concatenate([np.zeros(min(1, len(stops)), dtype=np.int64), stops[:-1]])
    starts = np.where(starts == stops, np.minimum(before, starts), starts)
    stops = np.where(starts == stops, stops + 1, stops)
    learned = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        learned |= (starts < stop) & (stops > start)
    return learned


def _text_of(example: Example, template: ChatTemplate, train_on: TrainOn) -> _Text:
    if example.messages:
        return _chat_text(example, template, train_on)
    text = example.prompt + example.completion
    require_unicode(text)
    spans = None if train_on == "all" or not example.prompt else [(len(example.prompt), len(text))]
    return _Text(text, True, spans)


def _chat_text(example: Example, template: ChatTemplate, train_on: TrainOn) -> _Text:
    conversation = template.settled(example)
    turns = [turn for turn, message in enumerate(example.messages) if message["role"] == "assistant"]
    if train_on == "all":
        if example.not_learned:
            raise DataError(
                f"message {min(example.not_learned) + 1} is marked as not to be learned, and data.train_on=all learns "
                "everything; data.ignore_keys drops the key that marks it"
            )
        if turns:
            require_end(conversation, turns[-1])
        return _Text(conversation.text, False, None)
    turns = turns[-1:] if train_on == "last" else turns
    turns = [turn for turn in turns if turn >= example.num_prompt and turn not in example.not_learned]
    return _Text(conversation.text, False, learned_spans(conversation, turns))
