"""Training objectives, one file each. `build_objective` builds one by name, `register` adds another."""

from fsdp_qlora.objectives.embedding import Embedding
from fsdp_qlora.objectives.image_classification import ImageClassification
from fsdp_qlora.objectives.masked_lm import MaskedLanguageModel
from fsdp_qlora.objectives.objective import Objective, Sums, Totals, build_objective, loss_of, register, token_losses
from fsdp_qlora.objectives.seq2seq import SequenceToSequence
from fsdp_qlora.objectives.sequence_classification import SequenceClassification
from fsdp_qlora.objectives.sft import SupervisedFineTuning
from fsdp_qlora.objectives.token_classification import TokenClassification

__all__ = [
    "Embedding",
    "ImageClassification",
    "MaskedLanguageModel",
    "Objective",
    "SequenceClassification",
    "SequenceToSequence",
    "Sums",
    "SupervisedFineTuning",
    "TokenClassification",
    "Totals",
    "build_objective",
    "loss_of",
    "register",
    "token_losses",
]
