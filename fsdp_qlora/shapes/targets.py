"""Selects the linears that get an adapter: expands ``lora.target_modules`` to full names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fsdp_qlora.errors import PlanError
from fsdp_qlora.shapes.linears import ModelShapes, quantized_linears


def target_linears(shapes: ModelShapes, target_modules: str | Sequence[str]) -> tuple[str, ...]:
    """Expand ``lora.target_modules`` to the full names of linears, in the model's order.

    ``all-linear`` means every linear inside the decoder layers; otherwise each item is a full name or the end of one.

    Raises:
        PlanError: if an item matches no linear (the message lists the names), or none can take an adapter.
    """
    linears = [x.name for x in quantized_linears(shapes) if not x.stacked]
    candidates = [name for name in linears if name not in shapes.not_adapted]
    if not candidates:
        raise PlanError(
            "lora.target_modules: this model's decoder layers have no linear layer that can take an adapter: each one "
            "has its own forward, has its weight read by other code, is kept in float32 by upstream, or would lose its "
            "adapter in plain PEFT, which looks for it elsewhere."
        )
    if target_modules == "all-linear":
        return tuple(candidates)
    items = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    for item in items:
        if not any(_matches(name, item) for name in candidates):
            if any(_matches(name, item) for name in linears):
                raise PlanError(
                    f"lora.target_modules: plain PEFT could not load an adapter for {item!r} in this model: it renames "
                    "it, or takes it for the experts' stacked weights. Leave it out (all-linear does)."
                )
            raise PlanError(
                f"lora.target_modules: {item!r} matches none of the model's {len(candidates)} linears; "
                f"this model has {', '.join(endings(candidates))} (or all-linear)."
            )
    return tuple(name for name in candidates if any(_matches(name, item) for item in items))


def _matches(name: str, item: str) -> bool:
    return name == item or name.endswith("." + item)


def endings(names: Iterable[str]) -> list[str]:
    """Return the distinct last parts of ``names``, in order of appearance."""
    return list(dict.fromkeys(re.split(r"\.", name)[-1] for name in names))
