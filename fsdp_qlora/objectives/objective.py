"""`Objective`: the definition of a loss.

An objective returns *sums* and, for each, the name of its divisor, a count over the whole global batch. Not means: with
unequal numbers of targets, a mean of means over micro-batches and ranks would be a different loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from fsdp_qlora.config import choices
from fsdp_qlora.config.schema import DataSettings, ObjectiveSettings
from fsdp_qlora.data.encoder import RowEncoder
from fsdp_qlora.data.labels import TOKENS
from fsdp_qlora.data.lines import Row
from fsdp_qlora.data.loader import MicroBatch, NamedBatch, TokenBatch
from fsdp_qlora.data.sources import read_source
from fsdp_qlora.distributed.mesh import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Sums = dict[str, tuple[torch.Tensor, str]]
"""Name -> a sum over a micro-batch, float32 ``[]``, and the name of the weight it is divided by (`Batch.weights`)."""

Reads = Literal["texts", "images", "texts with images", "recordings"]

PROBED = (24, 17, 9)
"""Lengths of the rows of a check."""


class Objective(ABC):
    """A loss. It holds its settings and nothing else.

    The model is the FSDP root (`fsdp_qlora.model.root.CausalModel`): called, it returns the losses of supervised
    tokens; its ``outputs`` are those of the transformers model.
    """

    name: ClassVar[str]
    """Its name in ``objective=``."""
    auto_class: ClassVar[str | None] = None
    """transformers' auto class that builds its model; None: the language model that a config.json describes."""
    trains_head: ClassVar[bool] = False
    """Whether its model has a head of its own, which may be in no file and is trained whole."""
    uses_head: ClassVar[bool] = False
    """Whether its losses are those of an encoder-decoder's output head, a chunk of logits at a time
    (`CausalModel.losses`)."""
    writes: ClassVar[bool] = False
    """Whether its model writes texts of its own from held-out rows, which `score` compares with those wanted."""
    may_lack_head: ClassVar[bool] = False
    """Whether the files may lack its head; then what they lack is drawn and trained whole, as with ``trains_head``."""
    ignores_head: ClassVar[bool] = False
    """Whether the files may hold a head, which its model does without."""
    scores_rows: ClassVar[bool] = False
    """Whether `observe` returns something for each row, which `score` makes metrics of."""
    reads: ClassVar[Reads] = "texts"
    """What its rows hold, and so what reads them: the model's tokenizer, its image processor, or both; recordings its
    feature extractor, and their texts its tokenizer."""
    label_column: ClassVar[str] = "label"
    """Column of raw rows that holds their labels, where there are any."""
    label_of_each: ClassVar[bool] = False
    """Whether that column lists a label for each part of the row (a word), rather than labels of the whole row."""
    task_type: ClassVar[str | None] = "CAUSAL_LM"
    """PEFT's name for the task, in an exported adapter; None where it has none."""

    def __init__(self, settings: ObjectiveSettings | None = None) -> None:
        self.settings = settings or ObjectiveSettings(name=self.name)

    @classmethod
    def of(cls, settings: ObjectiveSettings) -> Objective:
        """Return the objective of these settings, which may be a variant of this one."""
        return cls(settings)

    def before(
        self, model: nn.Module, micro_batches: Sequence[MicroBatch], ranks: Ranks, draw: Callable[[MicroBatch], None]
    ) -> Objective:
        """Return what computes the sums of a global batch: itself, or one that knows what its rows have in common.

        Called before each global batch that is trained on, on every rank with its micro-batches. ``draw`` seeds dropout
        as in the micro-batch's own forward.
        """
        return self

    @abstractmethod
    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the sums of a micro-batch on the model's device, under the same names for every micro-batch.

        The loss is the total of all sums, each divided by its weight, and so are gradients. Every rank must call it the
        same number of times, because the model's forward contains collectives.
        """

    def observe(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Sums, list[Any]]:
        """Return the sums of held-out rows, and for each row what `score` needs of it, as JSON."""
        return self.sums(model, micro_batch), []

    def metrics(self, loss: float, means: Mapping[str, float]) -> dict[str, float]:
        """Return further metrics that an evaluation reports besides the loss.

        Args:
            loss: the total of ``means``.
            means: each sum divided by its weight, over all held-out rows.
        """
        return {}

    def score(self, observed: Sequence[Any]) -> dict[str, float]:
        """Return metrics that are no means, from what `observe` returned for all held-out rows of all ranks.

        If the objective `writes`, each is a pair instead: the text that the model wrote, and the one that was wanted.
        """
        return {}

    def raw_rows(self, name: str) -> Iterator[Row]:
        """Yield the raw rows of a source."""
        return read_source(name)

    def encoder(self, data: DataSettings, tokenizer: Any, config: PreTrainedConfig) -> RowEncoder | None:
        """Return what stores its rows for a model of this config; None: chats and texts of a causal language model.

        ``tokenizer`` is the model's; its image processor if the rows are images, both if they are recordings.
        """
        return None

    def require_fit(self, encoder: RowEncoder, model: PreTrainedModel) -> None:  # noqa: B027 - most need nothing
        """Check that a model, which is on meta, takes what ``encoder`` makes of rows.

        Raises:
            ModelError: if it does not.
        """

    def configure(self, config: PreTrainedConfig) -> None:  # noqa: B027 - most need nothing
        """Change a model's config as the objective needs it: the number and names of labels."""

    def shrink(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return a small model's config (`fsdp_qlora.model.cut`) with what only the objective knows made small, too."""
        return config

    def settled(self, folder: Path, config: PreTrainedConfig) -> ObjectiveSettings:
        """Return its settings with what the model's folder and config decide."""
        return self.settings

    def row_length(self, folder: Path, config: PreTrainedConfig) -> int:
        """Return the positions that every row takes, if the model decides that; 0: at most ``data.max_length``."""
        return 0

    def stand_in(
        self, folder: Path, config: PreTrainedConfig, rows: int, length: int
    ) -> dict[str, torch.Tensor] | None:
        """Return a micro-batch of ``rows`` rows of ``length`` tokens, all of it learned, as `sums` takes it.

        It is what a simulated step computes, so it should take as much memory as any: of several texts, one is a token
        longer than the others, because code of upstream's makes no mask where nothing is padded. None if it is not
        known what its rows look like; objectives of tokens need none.

        Args:
            folder: the model's.
            config: the model's.
            rows: number of rows.
            length: ``data.max_length``, or `row_length`.
        """
        return None

    def without_values(self) -> Objective:
        """Return what takes its place in a simulated step, whose tensors have no values: itself, if it reads none."""
        return self

    def prune(self, model: PreTrainedModel) -> None:  # noqa: B027 - most need nothing
        """Take out of a model, which is on meta, what its loss does not use."""

    def files(self, data: DataSettings, config: PreTrainedConfig) -> dict[str, Any]:
        """Return further files of an exported adapter: name -> JSON."""
        return {}

    def writing(self, tokenizer: Any, config: PreTrainedConfig) -> dict[str, Any]:
        """Return settings of generation for held-out rows, beside those of the model's tokens, if it `writes`.

        ``max_new_tokens`` is the most that it writes.
        """
        return {}

    @property
    def packages(self) -> tuple[str, ...]:
        """Names of the modules, of the extra ``tasks``, that `score` imports."""
        return ()

    def probe(self, config: PreTrainedConfig, draw: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """Return rows of a small model of this config, each alone, ``[1, ...]``, for the check against upstream."""
        most = min(96, config.get_text_config().vocab_size)
        ids = [torch.randint(4, most, (1, length), generator=draw) for length in PROBED]
        return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]

    @property
    def of_tokens(self) -> bool:
        """Whether it trains a causal language model on tokens, which may be packed."""
        return self.auto_class is None


def stand_in_texts(rows: int, length: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Return ids and attention mask of ``rows`` texts for `Objective.stand_in`: all but the first lack a token."""
    ids = torch.arange(rows * length).remainder(vocab_size).view(rows, length)
    mask = torch.ones_like(ids)
    if length > 1:
        mask[1:, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


class PerToken(Objective):
    """A mean cross entropy over tokens: of those that an output head predicts, a chunk of its logits at a time."""

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> Sums:
        """Return the sum of the cross entropy of all tokens that are learned."""
        assert isinstance(micro_batch, NamedBatch)
        return {"loss": (model.losses(**micro_batch.tensors).sum(), TOKENS)}  # type: ignore[operator]

    def metrics(self, loss: float, means: Mapping[str, float]) -> dict[str, float]:
        """Return the perplexity: exp(loss), or infinity if that overflows."""
        return {"perplexity": perplexity(loss)}


def without_cache(config: PreTrainedConfig) -> None:
    """Let a decoder of this config keep no keys and values, which would be kept for nothing."""
    if getattr(text := config.get_text_config(), "use_cache", False):
        text.use_cache = False


def token_losses(model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Return the cross entropy of each supervised token, float32 ``[targets]``, for a micro-batch on the device."""
    assert isinstance(micro_batch, TokenBatch)
    return model(
        micro_batch.input_ids, micro_batch.labels, micro_batch.position_ids, micro_batch.supervised,
        sequences=micro_batch.sequences, rare=micro_batch.rare,
    )  # fmt: skip


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def loss_of(sums: Sums, share: float, weights: Mapping[str, int]) -> torch.Tensor:
    """Return the loss, ``[]``: the total of all sums, times ``share``, each divided by its weight."""
    parts = [value * share / max(1, weights[divisor]) for value, divisor in sums.values()]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


class Totals:
    """Sums over several micro-batches. They stay on the device: reading one there waits for all work before it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self.divided_by: dict[str, str] = {}
        """Name of a sum -> name of its weight."""

    def add(self, sums: Sums, share: float) -> None:
        """Add the sums of a micro-batch, times ``share``, in float64."""
        for name, (value, divisor) in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * share
            self.divided_by[name] = divisor

    @property
    def values(self) -> list[torch.Tensor]:
        """The sums, float64 ``[]``, in the order of `means`."""
        return list(self._sums.values())

    def means(self, over_ranks: Sequence[float], weights: Mapping[str, int]) -> dict[str, float]:
        """Return each of the sums over all ranks divided by its weight."""
        divisors = self.divided_by.items()
        return {name: total / max(1, weights[w]) for (name, w), total in zip(divisors, over_ranks, strict=True)}


_OBJECTIVES: choices.Registry[Objective] = choices.Registry("objective", choices.OBJECTIVES)
register = _OBJECTIVES.register


def build_objective(settings: ObjectiveSettings | str) -> Objective:
    """Return the objective of these settings, or the one of a name with default settings.

    Raises:
        ConfigError: if there is none.
    """
    if isinstance(settings, str):
        return _OBJECTIVES[settings]()
    return _OBJECTIVES[settings.name].of(settings)
