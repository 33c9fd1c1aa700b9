"""`Verdict`: the result of the twin check."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsdp_qlora.errors import FsdpQloraError, ModelError


@dataclass(frozen=True)
class Verdict:
    """The result of the check."""

    attention: str
    """The attention implementation that matches upstream."""
    fell: dict[str, str] = field(default_factory=dict)
    """Implementations tried before it -> how they differ from upstream."""
    unusable_positions: int | None = None
    """See `reference.unusable_positions`."""
    layers_of: str | None = None
    """`config_digest` of the model if its real layers were compared because no small ones could be built."""


def is_about_attention(error: FsdpQloraError) -> bool:
    """Whether ``error`` concerns one attention implementation, so that the model may work with another."""
    return error.exit_code == ModelError.exit_code and str(error).startswith("model.attn_implementation")
