"""What a start of adapters needs, from the base weights (PiSSA, OLoRA, LoftQ) or from training rows (EVA).

It happens while the model is loaded, so it costs memory at a moment of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fsdp_qlora.adapters.eva import update_bytes, update_operations
from fsdp_qlora.adapters.method import of_target
from fsdp_qlora.adapters.starts import LARGE, is_exact, operations, workspace
from fsdp_qlora.config.schema import LoraSettings
from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import LinearShape


@dataclass(frozen=True)
class StartCost:
    """The cost of decomposing the weights of all targets, or with EVA their inputs, for one micro-batch."""

    name: str
    matrices: int
    """Matrices to decompose; the ranks share them."""
    bytes: int
    """Bytes on a rank's device for the largest of them, while the model is loaded; on a CPU, with the inputs kept."""
    operations: float
    """Floating-point operations of all of them together."""


def start_cost(lora: LoraSettings, targets: Sequence[LinearShape], quantized: Collection[str]) -> StartCost | None:
    """Return the cost of the start, or None if adapters start from random values.

    Args:
        lora: the settings, with patterns spelt out.
        targets: the linears that get an adapter.
        quantized: names of the linears that are stored quantized.

    Raises:
        PlanError: if a target is too small for its rank, is not quantized (LoftQ), or needs a large exact SVD that the
            settings do not allow.
    """
    name = lora.start
    if name is None:
        return None
    ranks = {linear.name: of_target(lora, linear.name).r for linear in targets}
    for linear in targets:
        short = min(linear.out_features, linear.in_features)
        if ranks[linear.name] > short:
            raise PlanError(
                f"lora.r: {ranks[linear.name]} is above the smaller side of {linear.name} [{linear.out_features}, "
                f"{linear.in_features}], and {name} finds only {short} directions in it; lower lora.r or "
                "lora.rank_pattern, or leave it out with lora.exclude_modules."
            )
        if name == "loftq" and linear.name not in quantized:
            raise PlanError(
                f"lora.init_lora_weights: loftq starts from what quantization loses, and {linear.name} stays in 16 "
                "bits; leave it out with lora.exclude_modules, or choose pissa or olora."
            )
    large = [x for x in targets if min(x.out_features, x.in_features) > LARGE]
    if large and is_exact(name) and not lora.allow_large_svd:
        first = large[0]
        other = "lora.init_lora_weights=pissa_niter_4, which approximates it quickly, or " if name == "pissa" else ""
        raise PlanError(
            f"lora.init_lora_weights: {name} decomposes {len(large)} matrices whose smaller side is above {LARGE:,} "
            f"({first.name} is [{first.out_features}, {first.in_features}]), which takes minutes each; set "
            f"{other}lora.allow_large_svd=true (and launcher.timeout_seconds, 600, to more than twice the time of one)."
        )
    iterations = lora.loftq_iter
    return StartCost(
        name,
        len(targets),
        max(workspace(name, linear, ranks[linear.name]) for linear in targets),
        sum(operations(name, linear, ranks[linear.name], iterations) for linear in targets),
    )


def rows_cost(
    lora: LoraSettings, targets: Sequence[LinearShape], tokens: int, itemsize: int, on_accelerator: bool
) -> StartCost:  # fmt: skip
    """Return the cost of EVA.

    Args:
        lora: the settings as asked for.
        targets: the linears that get an adapter.
        tokens: tokens of a micro-batch, all of them supervised.
        itemsize: bytes of a number in an activation.
        on_accelerator: whether the inputs of a micro-batch, which are kept in host memory, are elsewhere.
    """
    kept = 0 if on_accelerator else itemsize * tokens * sum(x.in_features for x in targets)
    return StartCost(
        "eva", len(targets), kept + update_bytes(lora, targets, tokens), update_operations(lora, targets, tokens)
    )
