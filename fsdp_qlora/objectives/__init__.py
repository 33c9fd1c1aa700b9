"""Training objectives, one file each. `build_objective` builds one by name, `register` adds another."""

from fsdp_qlora.objectives.objective import Objective, Sums, build_objective, loss_of, register
from fsdp_qlora.objectives.sft import SupervisedFineTuning, token_losses

__all__ = ["Objective", "Sums", "SupervisedFineTuning", "build_objective", "loss_of", "register", "token_losses"]
