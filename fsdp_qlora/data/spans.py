"""Which characters of a rendered conversation are learned.

An answer's span is the text that the template writes for it. To find it, the conversation is rendered a second time
with a placeholder instead of the answer. Text shared by both belongs to the template; the difference is the answer::

    with the answer       ... <|im_start|>assistant⏎ <think>⏎six sevens⏎</think>⏎⏎42  <|im_end|>⏎
    with a placeholder    ... <|im_start|>assistant⏎ @@@@@@@@                         <|im_end|>⏎
                          shared                  the answer                       shared

The span starts after the generation prompt if the text contains it at that place, else at the first character that
differs. It ends with the marker that the template puts after any answer. A template may strip the answer, open it with
a prompt that is not in the rows, or use a marker that is not a special token.
"""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_qlora.data.messages import Message
from fsdp_qlora.data.template import ChatTemplate, Conversation
from fsdp_qlora.errors import DataError

Span = tuple[int, int]

_LENGTH = 8  # of the placeholder: some templates strip a character or more

_ONLY_LAST = (
    "data.train_on=last learns only the last answer of each row; data.template=FILE sets a template that only appends"
)


def learned_spans(conversation: Conversation, turns: list[int]) -> list[Span]:
    """Return the learned span of the conversation's text for each of ``turns`` (indices of messages).

    Raises:
        DataError: if an answer cannot be located, or nothing marks the end of its turn.
    """
    return [_span(conversation, turn) for turn in turns]


def require_end(conversation: Conversation, turn: int) -> None:
    """Reject a template that writes nothing after the answer ``turn``.

    Raises:
        DataError: if it writes nothing. An answer that cannot be located is not an error here.
    """
    try:
        answer = _find(conversation, turn, conversation.up_to(turn), [])
    except DataError:
        return
    if not answer.ends:
        raise _endless(turn)


def _endless(turn: int) -> DataError:
    return DataError(
        f"the chat template writes nothing after an answer (message {turn + 1}), so the model would never learn to "
        "stop; data.template=FILE sets a template that ends each turn, for example with the tokenizer's end token"
    )


@dataclass(frozen=True)
class _Answer:
    """An answer's place in a text: ``start`` is where generation would start, ``words`` the span of the answer."""

    text: str
    start: int
    words: Span
    ends: list[int]
    """Candidates for the end of the turn, last one first."""


def _span(conversation: Conversation, turn: int) -> Span:
    alone = _find(conversation, turn, conversation.up_to(turn), [])
    if not alone.ends:
        raise _endless(turn)
    continued = _continued(conversation, turn, alone)
    for end in alone.ends:
        if continued.startswith(alone.text[:end]):
            return alone.start, end
    if turn == len(conversation.messages) - 1:
        return alone.start, alone.ends[0]
    return _within(conversation, turn, alone)


def _continued(conversation: Conversation, turn: int, alone: _Answer) -> str:
    """Return the text with a message after the turn, to see which of several markers end the turn.

    After the last turn, the last marker may end the conversation rather than the turn. With a single marker there is no
    ambiguity, and the conversation's own text is returned.
    """
    if turn < len(conversation.messages) - 1 or len(alone.ends) == 1:
        return conversation.text
    try:
        return conversation.render([*conversation.messages, {"role": "user", "content": "?"}])
    except DataError:
        return conversation.text


def _within(conversation: Conversation, turn: int, alone: _Answer) -> Span:
    """Return the span of an answer that the template writes or ends differently when turns follow it."""
    text = conversation.text
    if not text.startswith(alone.text[: _starts_at(conversation, turn, alone)]):
        raise DataError(
            "the chat template rewrites earlier turns when later ones are added, so the model would never see the text "
            f"before this answer (message {turn + 1}) as it is here; {_ONLY_LAST}"
        )
    answer = _find(conversation, turn, text, conversation.messages[turn + 1 :])
    if text[slice(*answer.words)] != alone.text[slice(*alone.words)]:
        raise DataError(
            f"the chat template drops or changes part of this answer (message {turn + 1}), such as its reasoning, when "
            f"later turns follow, so that part cannot be learned here; {_ONLY_LAST}"
        )
    after = alone.words[1]
    for end in alone.ends:
        if text.startswith(alone.text[after:end], answer.words[1]):
            return answer.start, answer.words[1] + end - after
    raise DataError(
        f"the chat template ends this turn (message {turn + 1}) only if no other turn follows, so the model would not "
        f"learn to stop here; {_ONLY_LAST}"
    )


def _starts_at(conversation: Conversation, turn: int, alone: _Answer) -> int:
    """Return where message ``turn`` starts in the text that ends with it."""
    try:
        before = conversation.render(conversation.messages[:turn]) if turn else ""
    except DataError:
        return alone.start
    return min(len(before), alone.start) if alone.text.startswith(before) else alone.start


def _find(conversation: Conversation, turn: int, text: str, later: list[Message]) -> _Answer:
    """Locate the answer ``turn`` in ``text``, which has the messages ``later`` after it."""
    before = conversation.messages[:turn]
    mark = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in text)  # Unicode's private use area
    try:
        other = conversation.render([*before, {"role": "assistant", "content": mark * _LENGTH}, *later])
    except DataError as error:
        raise DataError(
            f"the answer in message {turn + 1} cannot be located: with another answer in its place, {error}"
        ) from error
    head, marked, _ = other.partition(mark)
    tail = other.rpartition(mark)[2]
    if not marked:
        raise DataError(
            f"the chat template does not write the content of the assistant's messages (message {turn + 1}), so there "
            "is nothing to learn; data.template=FILE sets another template"
        )
    start = _shared_start(text, head)
    stop = max(start, len(text) - _shared_start(text[::-1], tail[::-1]))
    ends = _ends(text, (start, stop), tail, conversation.template)
    return _Answer(text, _speaks_from(conversation, turn, text, start), (start, stop), ends)


def _speaks_from(conversation: Conversation, turn: int, text: str, start: int) -> int:
    """Return where generation would start; ``start`` is the first character that depends on the answer."""
    before = conversation.messages[:turn]
    if not before:
        prompt = conversation.template.generation_prompt(conversation.example)
        at = text.rfind(prompt, 0, start + len(prompt)) if prompt else -1
        return at + len(prompt) if 0 <= at < start else start
    try:
        prompt = conversation.render(before, prompt=True)
        if not text.startswith(prompt):
            return start
        if prompt != conversation.render(before):
            return len(prompt)
    except DataError:
        return start  # a template may reject a conversation that ends here
    # Without a generation prompt, a header before the answer ("ASSISTANT:") is not learned, but a space is.
    return start if text[len(prompt) : start].strip() else len(prompt)


def _ends(text: str, words: Span, tail: str, template: ChatTemplate) -> list[int]:
    """Return candidates for the end of the turn; ``tail`` is what the template writes after any answer.

    The turn ends after the first special token of the tail, or after one of those directly following it. Without
    special tokens, it ends after the whole tail, excluding trailing white space.
    """
    start, stop = words
    if text.endswith(tail) and tail.strip():
        ends: list[int] = []
        for token in template.special_token.finditer(tail):
            if ends and token.start() != ends[-1]:
                break
            ends.append(token.end())
        return [stop + end for end in reversed(ends or [len(tail.rstrip())])]
    whole = text.rstrip()  # tool calls may end with another token, and an answer may contain its own end marker
    return [len(whole)] if len(whole) > start and template.ends_with_special_token(whole) else []


def _shared_start(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    if one.startswith(other):
        return len(other)
    low, high = 0, min(len(one), len(other))
    while low < high:  # binary search; invariant: the first `low` characters are equal
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
