"""Training objectives, one file each. `build_objective` builds one by name, `register` adds another."""

from fsdp_qlora.objectives.image_classification import ImageClassification
from fsdp_qlora.objectives.objective import Objective, Sums, Totals, build_objective, loss_of, register, token_losses
from fsdp_qlora.objectives.sequence_classification import SequenceClassification
from fsdp_qlora.objectives.sft import SupervisedFineTuning

__all__ = [
    "ImageClassification",
    "Objective",
    "SequenceClassification",
    "Sums",
    "SupervisedFineTuning",
    "Totals",
    "build_objective",
    "loss_of",
    "register",
    "token_losses",
]
