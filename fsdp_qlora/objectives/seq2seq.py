"""seq2seq: an encoder-decoder reads a text (T5, BART, Marian) or a recording (Whisper), and writes a target."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fsdp_qlora.config.auto import asked
from fsdp_qlora.config.schema import DataSettings, ObjectiveSettings
from fsdp_qlora.data.encoder import RowEncoder
from fsdp_qlora.data.labels import learned_positions
from fsdp_qlora.data.pairs import LABELS, SUPERVISED, PairEncoder, Side
from fsdp_qlora.data.prepare import columns_of
from fsdp_qlora.data.spoken import FEATURES, SpokenEncoder
from fsdp_qlora.data.texts import pad_token
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.objectives.objective import Objective, PerToken, register, stand_in_texts
from fsdp_qlora.objectives.scores import of_speech, of_texts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, WhisperProcessor

_SPEECH = "whisper"
"""The one type of speech model whose own code is compared with ours."""


class SequenceToSequence(PerToken):
    """The mean cross entropy over all target tokens of the global batch; upstream shifts them for the decoder."""

    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    uses_head = True
    writes = True
    task_type = "SEQ_2_SEQ_LM"

    @classmethod
    def of(cls, settings: ObjectiveSettings) -> Objective:
        """Return the form for texts, or that for recordings."""
        return SpeechToText(settings) if settings.source == "audio" else cls(settings)

    def settled(self, folder: Path, config: PreTrainedConfig) -> ObjectiveSettings:
        """Return its settings with what the model's encoder reads.

        Raises:
            ModelError: if it reads speech, but is no Whisper.
            ConfigError: if a setting does not go with what it reads.
        """
        settings, defaults = self.settings, ObjectiveSettings()
        source = asked(settings.source) or ("audio" if _hears(config) else "text")
        if source == "audio" and config.model_type != _SPEECH:
            raise ModelError(
                f"model.name: objective=seq2seq trains of all speech models only Whisper, and this is a "
                f"{config.model_type}."
            )
        others = ("language", "task") if source == "text" else ("source_prefix",)
        if odd := [key for key in others if getattr(settings, key) != getattr(defaults, key)]:
            raise ConfigError(
                f"objective.{odd[0]}: a {config.model_type} reads {'recordings' if source == 'audio' else 'texts'} and "
                "has no use for it; leave it out."
            )
        return replace(settings, source=source)

    @property
    def packages(self) -> tuple[str, ...]:
        """What ROUGE and BLEU are computed by, once it is known that the model reads texts."""
        known = self.settings.source == "text" and self.settings.generate_rows
        return ("rouge_score", "sacrebleu") if known else ()

    def configure(self, config: PreTrainedConfig) -> None:
        """Check that it describes an encoder-decoder.

        Raises:
            ModelError: if it does not, or does not say which tokens upstream shifts labels with.
        """
        if not getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model.name: a {config.model_type} is not an encoder-decoder, and objective=seq2seq trains only those "
                "(T5, BART, Marian, Whisper and their like). Use objective=sft for a causal language model."
            )
        for key in ("decoder_start_token_id", "pad_token_id"):
            if getattr(config, key, None) is None:
                raise ModelError(
                    f"model.name: config.json has no {key}, which labels are shifted with; set "
                    f"model.config_overrides.{key}."
                )

    def probe(self, config: PreTrainedConfig, draw: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """Return sources with targets of other lengths."""
        rows, most = super().probe(config, draw), min(96, config.get_text_config().vocab_size)
        lengths = reversed([row["input_ids"].shape[1] for row in rows])
        written = [torch.randint(4, most, (1, length), generator=draw) for length in lengths]
        return [row | {"decoder_input_ids": ids} for row, ids in zip(rows, written, strict=True)]

    def stand_in(self, folder: Path, config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Return sources, and targets as long as can be."""
        most = min(self.settings.max_target_length, _positions(config))
        targets = stand_in_texts(rows, most, _vocabulary(config, "decoder"))["input_ids"]
        return self._sources(config, rows, length) | {LABELS: targets, SUPERVISED: learned_positions(targets)}

    def _sources(self, config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
        return stand_in_texts(rows, length, _vocabulary(config, "encoder"))

    def encoder(self, data: DataSettings, tokenizer: Any, config: PreTrainedConfig) -> RowEncoder:
        """Return what stores pairs of texts."""
        settings, cut = self.settings, data.truncation
        sources = Side(tokenizer, data.max_length, cut)
        targets = Side(tokenizer, settings.max_target_length, cut, learned=True, end=_end(tokenizer, config))
        positions = getattr(config, "max_position_embeddings", None) or 0
        return PairEncoder(
            columns_of(data), tokenizer, sources, targets, pad_token(config), settings.source_prefix, positions
        )

    def score(self, observed: Sequence[Any]) -> dict[str, float]:
        """Return ROUGE and BLEU of pairs of a text that was written and the one that was wanted."""
        return of_texts(*zip(*observed, strict=True))

    def writing(self, tokenizer: Any, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the most tokens to write."""
        return {"max_new_tokens": self.settings.max_target_length}


register(SequenceToSequence)  # as a decorator it would hide from type checkers what the next class extends


class SpeechToText(SequenceToSequence):
    """The form of `SequenceToSequence` for Whisper: its sources are recordings of at most 30 seconds.

    The labels are those of transformers' own recipe (``run_speech_recognition_seq2seq.py``): the prefix that tells
    language and task, the text and the end token, without the first token, which upstream puts before them.
    """

    auto_class = "AutoModelForSpeechSeq2Seq"
    task_type = None  # PEFT's wrapper for SEQ_2_SEQ_LM passes `input_ids`, which these models do not take
    reads = "recordings"

    @property
    def packages(self) -> tuple[str, ...]:
        """What the word error rate is computed by."""
        return ("jiwer",) if self.settings.generate_rows else ()

    def configure(self, config: PreTrainedConfig) -> None:
        """Check that nothing in the model is drawn at random in training.

        Raises:
            ModelError: if its forward masks parts of the spectrogram.
        """
        super().configure(config)
        if getattr(config, "apply_spec_augment", False):
            raise ModelError(
                "model.name: apply_spec_augment in config.json masks parts of each recording at random, other ones on "
                "each rank and in each resume. Set model.config_overrides.apply_spec_augment=false to train without it."
            )

    def probe(self, config: PreTrainedConfig, draw: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """Return spectrograms with targets of several lengths; sources are never padded."""
        shape = (1, *_spectrogram(config))
        return [
            {FEATURES: torch.randn(shape, generator=draw), "decoder_input_ids": row["decoder_input_ids"]}
            for row in super().probe(config, draw)
        ]

    def _sources(self, config: PreTrainedConfig, rows: int, length: int) -> dict[str, torch.Tensor]:
        return {FEATURES: torch.zeros(rows, *_spectrogram(config))}

    def encoder(self, data: DataSettings, tokenizer: WhisperProcessor, config: PreTrainedConfig) -> SpokenEncoder:
        """Return what stores recordings with their texts.

        Raises:
            ModelError: if the tokenizer's targets do not begin with the token that upstream's decoder begins with.
        """
        texts: Any = tokenizer.tokenizer  # type: ignore[attr-defined]
        start = config.decoder_start_token_id
        if texts.prefix_tokens[0] != start:
            raise ModelError(
                f"model.name: its tokenizer begins a text with token {texts.prefix_tokens[0]}, but config.json has "
                f"decoder_start_token_id={start}; use the tokenizer that came with the model."
            )
        most = self.settings.max_target_length + 1
        if most <= (marks := len(texts("", add_special_tokens=True)["input_ids"])):
            raise ConfigError(
                f"objective.max_target_length: {self.settings.max_target_length} leaves no token for the text, as a "
                f"target has {marks - 1} of its own (language, task and end). Set it to at least {marks}."
            )
        targets = Side(texts, most, data.truncation, learned=True, end=_end(texts, config))
        return SpokenEncoder(data, tokenizer, targets, config.max_source_positions, config.max_target_positions)

    def require_fit(self, encoder: RowEncoder, model: PreTrainedModel) -> None:
        """Check that the model takes the spectrograms of its feature extractor.

        Raises:
            ModelError: if it does not.
        """
        assert isinstance(encoder, SpokenEncoder)
        if encoder.size != (wanted := _spectrogram(model.config)):
            raise ModelError(
                f"model.name: its feature extractor makes spectrograms of {encoder.size[0]} x {encoder.size[1]}, and "
                f"the model takes {wanted[0]} x {wanted[1]}; use the preprocessor_config.json that came with it."
            )

    def row_length(self, folder: Path, config: PreTrainedConfig) -> int:
        """Return what the encoder makes of every recording: shorter ones are filled up with silence."""
        return config.max_source_positions

    def score(self, observed: Sequence[Any]) -> dict[str, float]:
        """Return the error rates of pairs of a text that was written and the one that was wanted."""
        return of_speech(*zip(*observed, strict=True))

    def writing(self, tokenizer: Any, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the prefix that targets are learned with, in the words of upstream's ``generate``."""
        from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

        known, prefix = tokenizer.get_vocab(), tokenizer.prefix_tokens
        most = min(self.settings.max_target_length, config.max_target_positions - len(prefix))
        own: dict[str, Any] = {
            "max_new_tokens": most, "return_timestamps": False, "no_timestamps_token_id": known["<|notimestamps|>"],
            "is_multilingual": tokenizer.language is not None,
        }  # fmt: skip
        if tokenizer.language is None:
            return own
        languages = (f"<|{code}|>" for code in LANGUAGES)
        return own | {
            "language": tokenizer.language, "task": tokenizer.task,
            "lang_to_id": {token: known[token] for token in languages if token in known},
            "task_to_id": {task: known[f"<|{task}|>"] for task in TASK_IDS},
        }  # fmt: skip


def _hears(config: PreTrainedConfig) -> bool:
    """Whether transformers has a class for a config that turns speech, and none that turns texts, into texts."""
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING

    speech, texts = MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return type(config) in speech and type(config) not in texts


def _end(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Any:
    """Return the token that ends a target."""
    return tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id


def _vocabulary(config: PreTrainedConfig, side: str) -> int:
    """Return the tokens that a side knows: both sides' own, or those of its config."""
    return getattr(config, "vocab_size", None) or getattr(config, side).get_text_config().vocab_size


def _positions(config: PreTrainedConfig) -> int:
    """Return the most tokens of a target that a decoder has positions for."""
    sizes = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    return next((size for size in sizes if size), sys.maxsize)


def _spectrogram(config: PreTrainedConfig) -> tuple[int, int]:
    """Return rows and columns of the spectrograms that a Whisper takes: its convolutions halve the columns."""
    return config.num_mel_bins, 2 * config.max_source_positions
