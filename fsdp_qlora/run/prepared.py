"""`Prepared`: a sharded model with its weights loaded, its tokenizer or image processor, plan and data."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.adapters.served import AdapterSize
from fsdp_qlora.config.auto import Choice
from fsdp_qlora.config.schema import RunConfig
from fsdp_qlora.data.prepare import PreparedData
from fsdp_qlora.distributed.memory import spared_memory
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.process import Placement
from fsdp_qlora.errors import ModelError
from fsdp_qlora.load.fingerprint import Base
from fsdp_qlora.load.stream import LoadReport
from fsdp_qlora.model.processor import tokenizer_of
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.plan.recipe import Recipe
from fsdp_qlora.shapes.linears import ModelShapes

if TYPE_CHECKING:
    from peft import PeftModel

    from fsdp_qlora.model.processor import Processor


@dataclass
class Prepared:
    """A sharded model with its weights loaded, its tokenizer, plan and data."""

    config: RunConfig
    """The settings as asked for."""
    settings: RunConfig
    """The settings with every ``auto`` resolved."""
    plan: TrainPlan
    model: CausalModel
    processor: Processor
    """What reads the model's rows: its tokenizer, its image processor or feature extractor, or two of them."""
    ranks: Ranks
    folder: Path
    """The base model's folder."""
    shapes: ModelShapes
    load: LoadReport
    origin: Base
    """The files that the base came from."""
    data: PreparedData | None
    placement: Placement
    threads: int
    recipe: Recipe
    """The numbers of the run, where `config` may say ``auto``."""
    adapters: dict[str, AdapterSize] = field(default_factory=dict)
    """What each adapter of `load_for_inference` takes, by name, if they were given names."""
    process_bytes: int = 0
    """Resident memory of this process before the model was loaded: the interpreter, libraries, tokenizer and rows."""
    choices: dict[str, Choice] = field(default_factory=dict)
    """What the plan and the device chose for settings left at ``auto``, by key, and why."""
    repairs: tuple[str, ...] = ()
    """Fixes that change this model's losses: see `fsdp_qlora.run.build.OpenedModel.repairs`."""
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ModelError: if it has none.
        """
        if (texts := tokenizer_of(self.processor)) is None:
            name = type(self.model.base).__name__
            raise ModelError(f"model.name: a {name} reads images, so it has no tokenizer and writes no texts.")
        return texts

    @property
    def mesh(self) -> DeviceMesh:
        """The device mesh the model is sharded over."""
        return self.ranks.mesh

    @property
    def max_positions(self) -> int:
        """Positions that the model has; 0: unknown."""
        return self.shapes.max_positions

    @property
    def peft_model(self) -> PeftModel:
        """The transformers model with its adapters."""
        assert self.model.peft is not None
        return self.model.peft

    def apart_from_steps(self) -> AbstractContextManager[object]:
        """Return a context for what allocates other blocks than a step: evaluation and generation (`spared_memory`)."""
        keeps = self.ranks.device.type == "cpu" and self.config.launcher.keep_freed_memory
        return spared_memory() if keeps else nullcontext()

    def close(self) -> None:
        """Leave the process group."""
        self._stack.close()
