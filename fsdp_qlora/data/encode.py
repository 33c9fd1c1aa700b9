"""Examples -> token ids and a loss mask.

The mask ``learned`` is derived from character positions in the text (`fsdp_qlora.data.spans`), not from token ids (pad
may equal eos) or ``{% generation %}`` blocks (most templates have none). Texts are tokenized in batches on all cores. A
prompt and its completion are tokenized as one text, so that BOS, EOS and spaces are the same as in any other text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.chat import Example
from fsdp_qlora.data.messages import require_unicode
from fsdp_qlora.data.spans import Span, learned_spans, require_end
from fsdp_qlora.data.template import ChatTemplate
from fsdp_qlora.data.windows import Tokens, tokenize_in_windows
from fsdp_qlora.distributed.sandbox import Apart, StuckError
from fsdp_qlora.errors import DataError

_TOGETHER = 2**20
"""Characters tokenized at once; the tokenizer needs some 200 bytes for each."""
TrainOn = Literal["assistant", "last", "all"]
"""What the loss covers: every answer, the last answer, or every token."""


@dataclass(frozen=True)
class _Text:
    """A text and the spans of its characters that are learned (None = all)."""

    text: str
    plain: bool
    """Whether to add BOS and EOS; a chat template writes its own."""
    spans: list[Span] | None


class StuckTemplateError(DataError):
    """The chat template does not terminate, or kills its process; ``number`` is the index of the example."""

    def __init__(self, template: ChatTemplate, number: int, reason: str) -> None:
        super().__init__(
            f"the chat template that begins with {template.beginning!r} {reason} for one conversation; "
            "data.template=FILE sets another template"
        )
        self.number = number


Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids (int32) and whether each is learned (bool), both ``[length]``."""


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
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant",
    kind: type[ChatTemplate] = ChatTemplate,
) -> list[Encoded | DataError]:  # fmt: skip
    """Encode examples as a batch, rendered by a template of this ``kind``; the result of a bad example is its error.

    Raises:
        StuckTemplateError: if the chat template does not terminate, or kills its process.
    """
    texts: dict[int, _Text] = {}
    results: dict[int, Encoded | DataError] = {}
    for number, text in _texts(examples, kind(tokenizer), train_on):
        if isinstance(text, DataError):
            results[number] = text
        else:
            texts[number] = text
    for plain in (False, True):
        chosen = {number: text for number, text in texts.items() if text.plain == plain}
        results |= zip(chosen, _tokenized(list(chosen.values()), tokenizer, plain), strict=True)
    return [results[number] for number in range(len(examples))]


def _texts(
    examples: Sequence[Example], template: ChatTemplate, train_on: TrainOn
) -> Iterator[tuple[int, _Text | DataError]]:
    """Yield the index and text of each example, those without a chat first."""
    chats = [number for number, example in enumerate(examples) if example.messages]
    for number in set(range(len(examples))) - set(chats):
        try:
            yield number, _plain_text(examples[number], train_on)
        except DataError as error:
            yield number, error
    if not chats:
        return
    items = [(tuple(getattr(examples[number], f.name) for f in fields(Example)), train_on) for number in chats]
    try:
        packed = _renderer(template).results(items)
    except StuckError as error:
        raise StuckTemplateError(template, chats[error.number], str(error)) from error
    for number, result in zip(chats, packed, strict=True):
        yield number, _unpacked(result)


_last: tuple[ChatTemplate, Apart] | None = None
"""The last template and its rendering process, kept for the next batch."""


def _renderer(template: ChatTemplate) -> Apart:
    global _last  # noqa: PLW0603  (one process is shared by all calls)
    if _last is None or _last[0].identity != template.identity:
        if _last is not None:
            _last[1].close()
        _last = template, Apart(partial(_packed, template))
    return _last[1]


def _packed(template: ChatTemplate, item: tuple[tuple[Any, ...], TrainOn]) -> bytes:
    """Return a chat's text or its error as bytes: a line of JSON, then the text."""
    example, train_on = item
    try:
        text = _chat_text(Example(*example), template, train_on)
    except DataError as error:
        return json.dumps({"error": str(error)}).encode()
    except MemoryError:
        return json.dumps({"error": "rendering the conversation needs too much memory"}).encode()
    return json.dumps({"spans": text.spans}).encode() + b"\n" + text.text.encode("utf-8")


def _unpacked(packed: bytes) -> _Text | DataError:
    head, _, text = packed.partition(b"\n")
    stored = json.loads(head)
    return DataError(stored["error"]) if "error" in stored else _Text(text.decode("utf-8"), False, stored["spans"])


def _tokenized(texts: list[_Text], tokenizer: PreTrainedTokenizerBase, plain: bool) -> list[Encoded | DataError]:
    """Tokenize texts in groups that keep the tokenizer's memory to a few hundred megabytes."""
    results: list[Encoded | DataError] = []
    group: list[_Text] = []
    for text in texts:
        if group and sum(len(other.text) for other in (*group, text)) > _TOGETHER:
            results += _together(group, tokenizer, plain)
            group = []
        group.append(text)
    return results + _together(group, tokenizer, plain)


def _together(texts: list[_Text], tokenizer: PreTrainedTokenizerBase, plain: bool) -> list[Encoded | DataError]:
    """Tokenize texts as one batch or, if the tokenizer rejects one of them, one by one."""
    if not texts:
        return []
    try:
        if len(texts[0].text) > _TOGETHER:  # a text this long is alone in its group
            tokenized = [tokenize_in_windows(texts[0].text, lambda text: _call([text], tokenizer, plain)[0])]
        else:
            tokenized = _call([text.text for text in texts], tokenizer, plain)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except DataError as error:
        return [error]
    except BaseException as error:  # a panic in the Rust library is not an Exception
        if len(texts) == 1:
            return [DataError(f"the tokenizer rejects the text: {type(error).__name__}: {error}")]
        return [result for text in texts for result in _together([text], tokenizer, plain)]
    return [_masked(text, tokenizer, tokens) for text, tokens in zip(texts, tokenized, strict=True)]


def _call(texts: list[str], tokenizer: PreTrainedTokenizerBase, plain: bool) -> list[Tokens]:
    encoding: Any = tokenizer(
        texts, add_special_tokens=plain, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    columns = (encoding["input_ids"], encoding["offset_mapping"], encoding["special_tokens_mask"])
    return [
        Tokens(
            np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2), np.array(added, dtype=bool)
        )
        for ids, offsets, added in zip(*columns, strict=True)
    ]


def _masked(text: _Text, tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Encoded:
    ids = tokens.ids
    learned = np.ones(len(ids), dtype=bool) if text.spans is None else _learned(tokens.offsets, text.spans)
    if not text.plain:
        return ids, learned
    own = np.flatnonzero(~tokens.added)
    first, last = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)
    if text.spans is not None:
        learned[:first] = False  # added tokens are not in the text: their offsets are (0, 0)
        learned[last:] = True
    end = tokenizer.eos_token_id
    if 0 < last < len(ids) and ids[last - 1] == ids[last] == end:
        ids, learned = np.delete(ids, last), np.delete(learned, last)  # the text already ends with EOS
    if 0 < first < len(ids) and ids[first - 1] == ids[first] == tokenizer.bos_token_id:
        ids, learned = np.delete(ids, first), np.delete(learned, first)
    if isinstance(end, int) and (not len(ids) or ids[-1] != end):
        ids, learned = np.append(ids, np.int32(end)), np.append(learned, True)
    return ids, learned


def _learned(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Return the mask of learned tokens: those that overlap a span.

    Args:
        offsets: int64 ``[length, 2]``, start and end of each token in the text. With ``trim_offsets``, tokens for
            spaces have zero width; they are taken to cover the text from the end of the previous token. A token
            without any text was inserted before the next one, and is learned if that one is.
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


def _plain_text(example: Example, train_on: TrainOn) -> _Text:
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
                f"message {min(example.not_learned) + 1} is marked as not to be learned, but data.train_on=all learns "
                "everything; data.ignore_keys drops the key that marks it"
            )
        if turns:
            require_end(conversation, turns[-1])
        return _Text(conversation.text, False, None)
    turns = turns[-1:] if train_on == "last" else turns
    turns = [turn for turn in turns if turn >= example.num_prompt and turn not in example.not_learned]
    return _Text(conversation.text, False, learned_spans(conversation, turns))
