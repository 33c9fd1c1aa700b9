"""The names of all formats, methods, objectives, optimizers, trackers and exports: built-in and registered later.

Formats, methods and objectives are classes that register themselves, one kind in a file of `quant/formats/`,
`adapters/` or `objectives/` (`Registry`). Optimizers, trackers and exports are rows of a table: `optim/optimizers.py`,
`track/sinks.py`, `cli/export.py` (`Table`). The names are here, below all those packages, so that a misspelt one is
rejected before torch is imported. For built-in ones, names, registries, tables and ``conf/<group>/*.yaml`` match
(`tests/unit/test_seams.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Generic, NoReturn, Protocol, TypeVar

from fsdp_qlora.errors import ConfigError


class _Named(Protocol):
    """A class with a name."""

    name: ClassVar[str]


_T = TypeVar("_T", bound=_Named)
_V = TypeVar("_V")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = closest(word, known)
    return f" Did you mean {close!r}?" if close else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like ``word``, or None if none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


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


class Table(dict[str, _V], Generic[_V]):
    """What is behind each name of a setting; a name that it lacks is refused."""

    def __init__(self, kind: str, rows: Mapping[str, _V] | None = None) -> None:
        """Start with ``rows``; ``kind`` is what the names are names of, for messages."""
        super().__init__(rows or {})
        self.kind = kind

    def __missing__(self, name: str) -> NoReturn:
        """Refuse a name.

        Raises:
            ConfigError: naming the ones there are.
        """
        raise ConfigError(f"{self.kind}: {name!r} is not one of {', '.join(self)}.{nearest(name, self)}")


class Registry(Table[type[_T]], Generic[_T]):
    """The classes behind the names of a setting. Registering one lets the setting accept its name."""

    def __init__(self, kind: str, names: Names) -> None:
        """Start empty."""
        super().__init__(kind)
        self._names = names

    def register(self, kind: type[_T]) -> type[_T]:
        """Register a class under its ``name`` (the command line knows only built-in ones).

        Raises:
            ValueError: if another class has that name.
        """
        if (holder := self.get(kind.name, kind)) is not kind:
            raise ValueError(
                f"{_path(kind)}: the {self.kind} {kind.name!r} is already registered by {_path(holder)}; choose "
                "another name."
            )
        self[kind.name] = kind
        self._names.add(kind.name)
        return kind


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


FORMATS = Names("nf4", "fp4", "int8")
"""``quant=``: storage formats of weights (`fsdp_qlora.quant.formats`)."""
PEFT_METHODS: dict[str, tuple[str, ...]] = {
    "dora": (),
    "ia3": ("feedforward_modules",),
    "vera": ("d_initial", "projection_prng_key", "save_projection"),
    "oft": ("oft_block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    "miss": (),
    "loha": (),
    "lokr": ("decompose_both", "decompose_factor"),
    "hra": ("apply_GS",),
    "shira": ("random_seed",),
    "road": ("variant", "group_size"),
    "randlora": ("sparse", "very_sparse", "projection_prng_key", "save_projection"),
    "c3a": ("block_size",),
    "fourierft": ("n_frequency", "scaling", "random_loc_seed"),
}
"""Adapter methods that PEFT's own layers compute -> the keys of PEFT's config that ``lora.options`` may set."""
METHODS = Names("lora", "rslora", *PEFT_METHODS)
"""``lora.variant``: adapter methods (`fsdp_qlora.adapters.method`)."""
STARTS = ("pissa", "olora", "loftq", "eva")
"""Names of ``lora.init_lora_weights`` that also name a ``lora.variant``: LoRA with other than random first values."""
BUNDLES: dict[str, dict[str, bool | str]] = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
    **{name: {"init_lora_weights": name} for name in STARTS},
}  # fmt: skip
"""The variants of LoRA: name -> the switches of PEFT's config that it sets. Others can be set beside it."""
WITH_DROPOUT = ("lora", "rslora", "dora", "vera", "miss", "randlora")
"""The adapter methods among them that drop their input (``lora.dropout``)."""
WITH_PATTERNS = ("lora", "rslora", "dora")
"""The adapter methods that take ``lora.rank_pattern`` and ``lora.alpha_pattern``."""
WITH_EXPERTS = ("lora", "rslora")
"""The adapter methods that train stacked experts (``lora.target_parameters``)."""
WITH_TABLES = ("lora", "rslora")
"""The adapter methods that adapt embedding and head."""
OBJECTIVES = Names(
    "sft", "sequence_classification", "token_classification", "masked_lm", "embedding", "seq2seq",
    "image_classification",
)  # fmt: skip
"""``objective=``: losses (`fsdp_qlora.objectives`)."""
WITH_LABELS = ("sequence_classification", "token_classification", "image_classification")
"""The objectives whose rows have labels, each of which is an output of the model's head."""
ROW_BY_ROW = (
    "sequence_classification", "token_classification", "masked_lm", "embedding", "seq2seq", "image_classification",
)  # fmt: skip
"""The objectives whose rows cannot share a sequence, and whose model is no causal language model."""
CAN_SPLIT = ("masked_lm",)
"""The objectives among them that can split a long row (``data.truncation=split``)."""
OF_IMAGES = ("image_classification",)
"""The objectives whose rows are images; their models have no tokenizer."""
OPTIMIZERS = Names(
    "adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix_8bit", "sgd", "adafactor"
)
"""``optim=``: optimizers (`fsdp_qlora.optim.optimizers`)."""
TRACKERS = Names("console", "wandb", "tensorboard", "mlflow")
"""``track=``: where metrics go in addition to metrics.jsonl (`fsdp_qlora.track.sinks`)."""
TRACKER_PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""Trackers that come as an extra of the same name -> the packages they import."""
EXPORTS = Names("adapter", "base-4bit", "merged", "served", "gguf", "gguf-adapter")
"""``export what=``: what is exported (`fsdp_qlora.cli.export`)."""
NONE = "none"
"""Word that an optional setting accepts in addition to names, to turn it off."""
