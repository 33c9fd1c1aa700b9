"""sft on conversations with images: a decoder reads images among its tokens (LLaVA, Qwen2-VL)."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.chat import read_row
from fsdp_qlora.data.image_chats import ImageChats, Reads
from fsdp_qlora.data.prepare import columns_of, fast
from fsdp_qlora.data.sources import names_of
from fsdp_qlora.data.texts import pad_token
from fsdp_qlora.data.tokens import Fit
from fsdp_qlora.objectives.objective import PerToken
from fsdp_qlora.objectives.vision import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class ImageChatTuning(PerToken):
    """The mean cross entropy over all supervised tokens of the global batch, as ``sft`` without images."""

    name = "sft"
    auto_class = "AutoModelForImageTextToText"
    uses_head = True
    reads = "texts with images"

    def configure(self, config: PreTrainedConfig) -> None:
        """Check that the model's family is one whose images are known.

        Raises:
            ModelError: if it is not.
        """
        family_of(config)

    def encoder(self, data: DataSettings, tokenizer: Any, config: PreTrainedConfig) -> ImageChats:
        """Return what stores conversations; ``tokenizer`` holds the tokenizer and the image processor."""
        family, processor = family_of(config), tokenizer.image_processor
        family.require_fit(processor)
        text: Any = config.get_text_config()
        reads = Reads(
            family.config.image_token_id, partial(family.measure, processor), partial(family.pixels, processor),
            text.vocab_size, pad_token(config), family.marks,
        )  # fmt: skip
        return ImageChats(
            columns_of(data),
            lambda values: read_row(values, data.format, frozenset(data.ignore_keys)),
            fast(tokenizer.tokenizer),
            Fit(data.max_length, data.truncation, data.train_on),
            reads,
            [*names_of(data.train or []), *names_of(data.eval or [])],
            [config.model_type, reads.token, reads.num_ids, processor.to_dict()],
        )

    def probe(self, config: PreTrainedConfig, draw: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """Return rows with two images, one, and none."""
        return family_of(config).probe(draw)

    def shrink(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config with a small vision tower."""
        small = deepcopy(config)
        family_of(small).shrink()
        return small
