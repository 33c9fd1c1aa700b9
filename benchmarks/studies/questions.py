"""The questions: what each study varies. A unit is a variant with one seed, trained in a process of its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fsdp_qlora.files.home import cache_folder
from tools.minilm import MINILM

SEEDS = (0, 1, 2)
"""Of the headline comparisons; the others have the first."""
_FULL = ("quant=none", "lora=none", "optim.lr=3e-5")
_NONE = ("quant=none",)
_FORMATS = {"none": _NONE, "nf4": (), "fp4": ("quant=fp4",), "int8": ("quant=int8",)}
_METHODS = {"QLoRA": (), "LoRA": _NONE, "full": _FULL, "full, 1e-4": (*_FULL[:2], "optim.lr=1e-4")}
_STATISTICS = {
    "nf4": (), "no double quantization": ("quant.double_quant=false",), "blocks of 256": ("quant.block_size=256",),
}  # fmt: skip
_MINILM = (
    "objective=embedding", f"model.name={MINILM}", "data.max_length=64", "train.global_batch_size=16",
    "train.micro_batch_size=16",
)  # fmt: skip
CHATTY = "SmolLM2-135M-Instruct"
MINI = "MiniLM (all-MiniLM-L6-v2), whose float32 weights are the originals"


def _rates(*others: str, own: str = "1.3e-3") -> dict[str, tuple[str, ...]]:
    """Return learning rates by name: ``auto``'s own, and others."""
    return {f"auto, {own}": ("optim.lr=auto",)} | {rate: (f"optim.lr={rate}",) for rate in others}


@dataclass(frozen=True)
class Study:
    """One question."""

    name: str
    question: str
    variants: dict[str, tuple[str, ...]]
    """Name -> overrides of the command line."""
    reference: str
    """The variant that the others are compared with."""
    seeds: tuple[int, ...] = SEEDS[:1]
    always: tuple[str, ...] = ()
    """Overrides of every variant."""
    base: str = CHATTY
    """What was trained, in words."""
    timed: bool = False
    """Whether the page says what the trainings took: only where nothing else ran on the machine."""


STUDIES = (
    Study(
        "formats",
        "What does the format of the base cost, before training and after equal steps?",
        _FORMATS,
        "none", SEEDS,
    ),
    Study("statistics", "What do fewer bytes of statistics cost?", _STATISTICS, "nf4"),
    Study(
        "methods",
        "Is QLoRA as good as LoRA, and either as good as full fine-tuning? What is forgotten?",
        _METHODS,
        "LoRA", SEEDS,
    ),
    Study(
        "rows",
        "Little data: is an adapter better than full fine-tuning, and from how many rows on is it not?",
        {
            f"{kind}, {rows} rows, {steps} steps": (*overrides, f"data.max_rows={rows}", f"train.max_steps={steps}")
            for rows, steps in ((50, 24), (200, 48), (900, 96)) for kind, overrides in (("QLoRA", ()), ("full", _FULL))
        },
        "QLoRA, 50 rows, 24 steps",
    ),
    Study(
        "adapters",
        "Which adapter learns most in equal steps, which in equal time, and how large is it?",
        {
            "LoRA, r 16": (), "LoRA, r 4": ("lora.r=4",), "LoRA, r 64": ("lora.r=64",), "rsLoRA": ("lora=rslora",),
            "DoRA": ("lora=dora",), "PiSSA": ("lora=pissa",), "OLoRA": ("lora=olora",),
            "LoRA+": ("optim.loraplus_lr_ratio=16",),
            "LoRA, r 64, 20 steps: r 16's time": ("lora.r=64", "train.max_steps=20"),
            "DoRA, 16 steps: LoRA's time": ("lora=dora", "train.max_steps=16"),
        },
        "LoRA, r 16", timed=True,
    ),
    Study(
        "rates",
        "Is the learning rate that `auto` chooses a good one?",
        _rates("1e-4", "4e-4", "4e-3", "1.2e-2"), "auto, 1.3e-3",
    ),
    Study(
        "encoder_rates",
        "Is the learning rate that `auto` chooses a good one for a smaller model of another family?",
        _rates("1e-4", "2e-3", "6e-3", own="5.7e-4"), "auto, 5.7e-4", SEEDS[:1], _MINILM, MINI,
    ),
    Study(
        "encoder_formats",
        "What does the format of the base cost where the weights are the originals?",
        _FORMATS,
        "none", SEEDS, _MINILM, MINI,
    ),
    Study(
        "encoder_statistics",
        "What do fewer bytes of statistics cost where the weights are the originals?",
        _STATISTICS, "nf4", SEEDS[:1], _MINILM, MINI,
    ),
    Study(
        "encoder_methods",
        "QLoRA, LoRA and full fine-tuning where the weights are the originals: what is learned, what is forgotten?",
        _METHODS,
        "LoRA", SEEDS, _MINILM, MINI,
    ),
)  # fmt: skip
"""In the order of the page."""


@dataclass(frozen=True)
class Unit:
    """A training: settings and a seed. Studies that have a variant in common share it."""

    overrides: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Its key in the results, on any machine."""
        return " ".join((*self.overrides, f"run.seed={self.seed}")).replace(f"{cache_folder()}/", "")


def units_of(study: Study, variant: str) -> list[Unit]:
    """Return the units of a variant, by seed."""
    return [Unit((*study.always, *study.variants[variant]), seed) for seed in study.seeds]


def units(names: Collection[str]) -> list[Unit]:
    """Return the units of the studies of these names, each once: all variants with the first seed, then the next."""
    return list(dict.fromkeys(
        unit for study in STUDIES if study.name in names
        for by_seed in zip(*(units_of(study, variant) for variant in study.variants), strict=True) for unit in by_seed
    ))  # fmt: skip
