"""The names of all formats, methods, objectives, optimizers, trackers and exports: built-in and registered later.

Each one is a file in its own package (`quant/formats/`, `adapters/`, `objectives/`, `optim/`, `track/`, `export/`),
which registers it. The names are here, below all those packages, so that a misspelt one is rejected before torch is
imported. For built-in ones, names, registries and ``conf/<group>/*.yaml`` match (`tests/unit/test_seams.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import ClassVar, Generic, NoReturn, Protocol, TypeVar

from fsdp_qlora.errors import ConfigError


class _Named(Protocol):
    """A class with a name."""

    name: ClassVar[str]


_T = TypeVar("_T", bound=_Named)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


class Names:
    """Names that one setting accepts, in the order in which they are listed."""

    def __init__(self, *shipped: str) -> None:
        self.shipped = shipped
        """The built-in names, which the command line and ``conf/`` know."""
        self._all = dict.fromkeys(shipped)

    def add(self, name: str) -> None:
        """Let settings accept ``name``."""
        self._all[name] = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __contains__(self, name: object) -> bool:
        return name in self._all


class Registry(dict[str, type[_T]], Generic[_T]):
    """The classes behind the names of a setting. Registering one lets the setting accept its name."""

    def __init__(self, kind: str, names: Names) -> None:
        """Start empty; ``kind`` is what the names are names of, in one word."""
        super().__init__()
        self._kind, self._names = kind, names

    def register(self, kind: type[_T]) -> type[_T]:
        """Register a class under its ``name`` (the command line knows only built-in ones).

        Raises:
            ValueError: if another class has that name.
        """
        if (holder := self.get(kind.name, kind)) is not kind:
            raise ValueError(
                f"{_path(kind)}: the {self._kind} {kind.name!r} is already registered by {_path(holder)}; choose "
                "another name."
            )
        self[kind.name] = kind
        self._names.add(kind.name)
        return kind

    def __missing__(self, name: str) -> NoReturn:
        """Refuse a name that nothing is registered under."""
        raise ConfigError(f"{self._kind}: {name!r} is not one of {', '.join(self)}.{nearest(name, self)}")


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


FORMATS = Names("nf4", "fp4", "int8")
"""``quant=``: storage formats of weights (`fsdp_qlora.quant.formats`)."""
METHODS = Names("lora", "rslora")
"""``lora.variant``: adapter methods (`fsdp_qlora.adapters.method`)."""
OBJECTIVES = Names("sft")
"""``objective=``: losses (`fsdp_qlora.objectives`)."""
OPTIMIZERS = Names(
    "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix_8bit", "sgd", "adafactor"
)
"""``optim=``: optimizers (`fsdp_qlora.optim.optimizers`)."""
TRACKERS = Names("console", "wandb")
"""``track=``: where metrics go in addition to metrics.jsonl (`fsdp_qlora.track`)."""
EXPORTS = Names("adapter", "base-4bit")
"""``export what=``: what is exported (`fsdp_qlora.export`)."""
NONE = "none"
"""Word that an optional setting accepts in addition to names, to turn it off."""
