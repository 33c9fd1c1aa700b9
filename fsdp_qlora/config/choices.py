"""Every kind there is to choose from, on one page: what ships, and what was registered since.

A kind is a file in its own room (`quant/formats/`, `adapters/`, `objectives/`, `optim/`, `track/`, `export/`), which
registers it. The names are here, below all rooms, so that a misspelt one is refused before torch is imported. For what
ships, names, registries and ``conf/<group>/*.yaml`` are equal (`tests/unit/test_seams.py`).
"""

from __future__ import annotations

from collections.abc import Iterator


class Names:
    """Names of one sort of kinds, in the order in which they are listed."""

    def __init__(self, *shipped: str) -> None:
        self.shipped = shipped
        """Those that the command line and ``conf/`` know."""
        self._all = dict.fromkeys(shipped)

    def add(self, name: str) -> None:
        """Let settings take ``name``."""
        self._all[name] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __contains__(self, name: object) -> bool:
        return name in self._all


FORMATS = Names("nf4", "fp4", "int8")
"""``quant=``: how a weight is small (`fsdp_qlora.quant.formats`)."""
METHODS = Names("lora", "rslora")
"""``lora.variant``: what is trained (`fsdp_qlora.adapters.method`)."""
OBJECTIVES = Names("sft")
"""``objective=``: what the loss is (`fsdp_qlora.objectives`)."""
OPTIMIZERS = Names(
    "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix_8bit", "sgd", "adafactor"
)
"""``optim=``: how it moves (`fsdp_qlora.optim.optimizers`)."""
TRACKERS = Names("console", "wandb")
"""``track=``: where metrics go, beside metrics.jsonl (`fsdp_qlora.track`)."""
EXPORTS = Names("adapter", "base-4bit")
"""``export what=``: what is given away (`fsdp_qlora.export`)."""
NONE = "none"
"""What a setting takes besides names where there may be no such thing."""
