"""seq2seq: an encoder-decoder (T5, BART, Marian) reads a source and writes a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.labels import TOKENS
from fsdp_qlora.data.loader import MicroBatch, NamedBatch
from fsdp_qlora.data.pairs import PairEncoder, Side
from fsdp_qlora.data.prepare import columns_of
from fsdp_qlora.data.texts import pad_token
from fsdp_qlora.errors import ModelError
from fsdp_qlora.objectives.objective import Objective, Sums, perplexity, register
from fsdp_qlora.objectives.scores import of_texts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@register
class SequenceToSequence(Objective):
    """The mean cross entropy over all target tokens of the global batch; upstream shifts them for the decoder."""

    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    uses_head = True
    writes = True
    task_type = "SEQ_2_SEQ_LM"

    @property
    def packages(self) -> tuple[str, ...]:
        """What ROUGE and BLEU are computed by."""
        return ("rouge_score", "sacrebleu") if self.settings.generate_rows else ()

    def configure(self, config: PreTrainedConfig) -> None:
        """Check that it describes an encoder-decoder.

        Raises:
            ModelError: if it does not, or does not say which tokens upstream shifts labels with.
        """
        if not getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model.name: a {config.model_type} is not an encoder-decoder, and objective=seq2seq trains only those "
                "(T5, BART, Marian and their like). Use objective=sft for a causal language model."
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

    def encoder(self, data: DataSettings, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> PairEncoder:
        """Return what stores pairs of texts."""
        settings, cut = self.settings, data.truncation
        end: Any = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        sources = Side(tokenizer, data.max_length, cut)
        targets = Side(tokenizer, settings.max_target_length, cut, learned=True, end=end)
        positions = getattr(config, "max_position_embeddings", None) or 0
        return PairEncoder(
            columns_of(data), tokenizer, sources, targets, pad_token(config), settings.source_prefix, positions
        )

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the sum of the cross entropy of all target tokens."""
        assert isinstance(micro_batch, NamedBatch)
        return {"loss": (model.losses(**micro_batch.tensors).sum(), TOKENS)}  # type: ignore[operator]

    def metrics(self, loss: float, means: Mapping[str, float]) -> dict[str, float]:
        """Return the perplexity: exp(loss), or infinity if that overflows."""
        return {"perplexity": perplexity(loss)}

    def score(self, observed: Sequence[Any]) -> dict[str, float]:
        """Return ROUGE and BLEU of pairs of a text that was written and the one that was wanted."""
        return of_texts(*zip(*observed, strict=True))
