"""Tiny tokenizers of the kinds that models have: what they put in, trim and normalize decides where a span is found."""

from __future__ import annotations

from typing import Any

from tests.tiny import sentence

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CODE = "def f(x):\n    if x:\n\t\treturn 1\n\n    return   2  # é漢\n"
_TEXTS = [CODE] * 5 + [sentence(n, 12) for n in range(50)] + ["price 10 is now 8 euro user assistant system"]


def _byte_level(trim: bool, prefix_space: bool = False, adds_ends: bool = False) -> Any:
    """Return a GPT-2 or RoBERTa kind; with ``trim`` offsets leave out spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, trim_offsets=trim)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(_TEXTS, trainer)
    if adds_ends:
        core.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=trim)
    return core, {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}


def _sentencepiece(scheme: str, adds: str = "<s> $A") -> Any:
    """Return a Llama kind: byte fallback, a space put before words, ChatML's markers not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # for training: no token of two words
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    core.train_from_iterator(_TEXTS, trainer)
    if scheme == "normalizer":
        core.pre_tokenizer = None
    core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 1), ("</s>", 2)])
    return core, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _unigram() -> Any:
    """Return a T5 or Gemma kind: Unicode normalized, so that a text's characters and the tokens' are not the same."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = sorted({char for text in _TEXTS for char in text} | set("\n\t<|>_/ﬁ"))
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"], unk_token="<unk>",
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(_TEXTS, trainer)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return core, tokens | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}


KINDS = {
    "bytes": lambda: _byte_level(False),
    "bytes, trimmed": lambda: _byte_level(True),
    "bytes, trimmed, space put before": lambda: _byte_level(True, True),
    "bytes, ends added": lambda: _byte_level(False, False, True),
    "bytes, trimmed, ends added": lambda: _byte_level(True, False, True),
    "pieces, normalizer": lambda: _sentencepiece("normalizer"),
    "pieces, first": lambda: _sentencepiece("first"),
    "pieces, always": lambda: _sentencepiece("always"),
    "pieces, never": lambda: _sentencepiece("never"),
    "pieces, ends added": lambda: _sentencepiece("first", "<s> $A </s>"),
    "unigram": _unigram,
}


def make(kind: str, template: str = CHATML) -> Any:
    """Return a tokenizer of a kind, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    core, tokens = KINDS[kind]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **tokens)
    tokenizer.chat_template = template
    return tokenizer
