"""sft: supervised fine-tuning, the cross entropy of supervised tokens."""

from __future__ import annotations

from torch import nn

from fsdp_qlora.config.auto import switch
from fsdp_qlora.config.schema import ObjectiveSettings
from fsdp_qlora.data.labels import TOKENS
from fsdp_qlora.data.loader import MicroBatch
from fsdp_qlora.objectives.image_chats import ImageChatTuning
from fsdp_qlora.objectives.objective import Objective, PerToken, Sums, register, token_losses


@register
class SupervisedFineTuning(PerToken):
    """The mean cross entropy over all supervised tokens of the global batch."""

    name = "sft"

    @classmethod
    def of(cls, settings: ObjectiveSettings) -> Objective:
        """Return the objective for conversations with images if ``objective.images`` says so."""
        return ImageChatTuning(settings) if switch(settings.images) else cls(settings)

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the sum of the cross entropy of all supervised tokens."""
        return {"loss": (token_losses(model, micro_batch).sum(), TOKENS)}
