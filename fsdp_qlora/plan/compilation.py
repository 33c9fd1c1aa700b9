"""Whether to compile the decoder layers (``train.compile=auto``): is the run long enough to win back the time?"""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_qlora.config.auto import switch
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.parallel.compile import COMPILATION


@dataclass(frozen=True)
class Compilation:
    """Whether to compile the layers, and why."""

    on: bool
    why: str


def choose_compilation(config: RunConfig, plan: Work, num_steps: int, device_type: str, possible: bool) -> Compilation:
    """Decide ``train.compile=auto``: whether the run is long enough to make up for the compilation time.

    Args:
        config: the settings.
        plan: micro-batches per rank, their tokens, and the weights each token is multiplied with.
        num_steps: optimizer steps in the run.
        device_type: type of the device that computes.
        possible: whether a compiler is available and each of the model's layers is known to be a single graph.
    """
    if (wanted := switch(config.train.compile)) is not None:
        return Compilation(wanted, "as asked")
    if config.debug.name == "plain":
        return Compilation(False, "debug=plain")
    if config.train.kernels == "liger":
        return Compilation(False, "train.kernels=liger")
    if config.fsdp.offloads_activations or config.fsdp.offload_modules:
        which = f"offload={config.fsdp.offload}" if config.fsdp.offloads_activations else "offload_modules"
        return Compilation(False, f"not possible with fsdp.{which}")
    if not possible:
        return Compilation(False, "not possible here")
    rate, gain, cost = COMPILATION["cpu" if device_type == "cpu" else "accelerator"]
    tokens = num_steps * plan.turns * plan.tokens
    seconds = 4 * plan.weights * tokens / rate  # 2 operations per weight in forward and 2 in backward (frozen)
    won = gain * seconds
    why = f"would save about {won:.0f} of {seconds:.0f} s, compiling takes {cost:.0f} s"
    return Compilation(won > cost, why)


@dataclass(frozen=True)
class Work:
    """The parts of a plan that determine how long a run takes."""

    turns: int
    """Micro-batches per rank in a step."""
    tokens: int
    """Tokens in a micro-batch."""
    weights: int
    """Weights that each token is multiplied with."""
