"""Training objectives, one file each. `build_objective` builds one by name, `register` adds another."""

from fsdp_qlora.objectives.objective import Objective, Sums, Totals, build_objective, loss_of, register, token_losses
from fsdp_qlora.objectives.seq2seq import SequenceToSequence
from fsdp_qlora.objectives.sequence_classification import SequenceClassification
from fsdp_qlora.objectives.sft import SupervisedFineTuning

__all__ = [
    "Objective",
    "SequenceClassification",
    "SequenceToSequence",
    "Sums",
    "SupervisedFineTuning",
    "Totals",
    "build_objective",
    "loss_of",
    "register",
    "token_losses",
]
