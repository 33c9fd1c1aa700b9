"""The twin check: compares our code with upstream's before the first step, on a small twin of the model.

The twin has the class, code and switches of the run's model, in small sizes (`model/cut.py`). Upstream's
``save_pretrained`` writes it; our side loads it, shards it over the run's own mesh, quantizes, adapts and runs it under
the run's settings. Upstream's side is stock transformers, bitsandbytes and PEFT in float32 with eager attention
(`reference.py`). The losses of all tokens and all gradients must agree, in the run's own layout (padded or packed), and
a later token must not change an earlier loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fsdp_qlora.adapters import build_method
from fsdp_qlora.adapters.experts import peft_config, short_parameters
from fsdp_qlora.adapters.names import trainable_parameters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.adapters.whole import as_saved
from fsdp_qlora.attention.layout import Layout
from fsdp_qlora.checks import reference
from fsdp_qlora.checks.reference import Computed
from fsdp_qlora.checks.settings import LENGTHS, twin_settings
from fsdp_qlora.checks.small import write_small
from fsdp_qlora.checks.verdict import Verdict, is_about_attention
from fsdp_qlora.config.schema import LoraSettings, RunConfig
from fsdp_qlora.distributed.mesh import Ranks
from fsdp_qlora.distributed.reduce import all_max, any_rank, gather_json
from fsdp_qlora.distributed.shards import local_tensor, row_range
from fsdp_qlora.errors import FsdpQloraError, ModelError, typed_line
from fsdp_qlora.export.adapter import export_adapter, short_targets
from fsdp_qlora.files.scratch import scratch_folder
from fsdp_qlora.heads.quantized import QuantLossHead
from fsdp_qlora.model.root import CausalModel
from fsdp_qlora.objectives import build_objective, token_losses
from fsdp_qlora.plan.plan import TrainPlan
from fsdp_qlora.quant.formats import one_thread

LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
"""Largest relative differences in float32: of a token's loss (relative to the mean loss), and of all gradients."""
ONE_LIMIT = 1e-3
"""Largest relative difference of one parameter's gradient, relative to at least 1 % of the norm of all."""
BF16_FACTOR, BF16_FLOOR = 2.0, 1e-3
"""In bf16, our losses may differ from upstream's float32 by this factor times upstream's own bf16 error, plus floor."""
BF16_GRADIENTS = 0.1
"""The floor for all gradients, relative to their norm: a few tokens may be routed to other experts."""
BF16_LEAK = 3e-2
"""Largest effect of a changed token on other losses in bf16, from rounding alone (experts get other batches)."""
PACKED = (24, 40, 31, 29)
"""Lengths of rows that share sequences, two in each; the second sequence is padded."""
ROWS_LEAK = "rows leak into each other"
CHANGED = 37
"""Index of the token that is changed to test whether earlier losses depend on it."""


class Opened(Protocol):
    """The part of an opened model that the check needs."""

    @property
    def plan(self) -> TrainPlan:
        """The plan, which says what is quantized and what is trained."""
        ...


Build = Callable[[RunConfig, Path], tuple[CausalModel, Opened]]
"""Builds and loads our model from a folder with these settings, as a run does. Every rank calls it."""


def check_twin(
    config: RunConfig, model_config: PreTrainedConfig, code: Path | None, candidates: Sequence[str], ranks: Ranks,
    build: Build, kind: Callable[[RunConfig, Path, Ranks, Build], Twin] | None = None,
) -> Verdict:  # fmt: skip
    """Return the first of the attention ``candidates`` that matches upstream. Every rank calls it.

    Args:
        config: the run's settings.
        model_config: the model's config.
        code: folder with the model's own trusted code, if it has any.
        candidates: attention implementations in order of preference.
        ranks: the ranks of the run.
        build: builds our side.
        kind: what compares them, if it is no causal language model.

    Raises:
        ModelError: identically on every rank, if none matches; it says what differs, where first, by how much, and
            what to set.
    """
    fell: dict[str, str] = {}
    kind = kind or Twin
    with scratch_folder("fsdp-qlora-twin-") as folder:
        objective = build_objective(config.objective)
        small = write_small(folder, model_config, config.data.max_length, code, ranks, objective)
        for attention in candidates:
            settings = twin_settings(config, folder, attention, ranks.device)
            problem = kind(settings, folder, ranks, build).problem()
            if problem is None and small.float32 and config.precision.name == "bf16":  # mixed: some stay in float32
                rounded = replace(settings, precision=replace(settings.precision, name="bf16"))
                problem = kind(rounded, folder, ranks, build).problem()
            if problem is None:
                return Verdict(attention, fell, small.unusable_positions, small.layers_of)
            fell[attention] = problem
    raise ModelError(_message(config, model_config, fell))


def _message(config: RunConfig, model_config: PreTrainedConfig, fell: dict[str, str]) -> str:
    lines = "; ".join(f"{attention}: {problem}" for attention, problem in fell.items())
    packs = [key for key in ("packing", "padding_free") if getattr(config.data, key)]
    tries = [f"data.{key}=false" for key in packs]  # few classes separate rows that share a sequence
    tries += [] if "eager" in fell else ["model.attn_implementation=eager"]
    rows_leak = all(problem == ROWS_LEAK for problem in fell.values())
    tries += [] if config.debug.name == "plain" or rows_leak else ["debug=plain"]
    advice = f" Try {' or '.join(tries)};" if tries else ""
    return (
        f"model.check: training {model_config.model_type} here would not match its own code in transformers "
        f"({lines}).{advice} model.check=off trains it anyway."
    )


class Twin:
    """Compares our small model with upstream's."""

    def __init__(self, config: RunConfig, folder: Path, ranks: Ranks, build: Build) -> None:
        self.config, self.folder, self.ranks, self._build = config, folder, ranks, build
        self.objective = build_objective(config.objective)
        self.layout = Layout.of(config.data, config.train, config.model.attn_implementation)

    def problem(self) -> str | None:
        """Return how our model differs from upstream's, or None if it does not; identical on every rank."""
        problem: str | None = None
        try:
            self.model, opened = self._build(self.config, self.folder)
            self.plan = opened.plan
        except FsdpQloraError as error:
            if not is_about_attention(error):
                raise
            problem = str(error)
        if any_rank(problem is not None, self.ranks):
            return problem or "refused on another rank"
        try:
            problem = self._compare()
        except FsdpQloraError as error:
            problem = str(error)
        except Exception as error:  # upstream's and remote code raise anything, and the other ranks wait
            problem = typed_line(error)
        return next((said for said in gather_json(problem, self.ranks) if said), None)

    def _compare(self) -> str | None:
        values = self._adapter_values()
        for draw in range(2 if self.layout.shared_rows else 1):  # one draw may hide effects between rows
            if problem := self._compare_rows(values, self._rows(draw)):
                return problem
        return self._exported_differs(values)

    def _exported_differs(self, values: dict[str, torch.Tensor]) -> str | None:
        """Return which part of an exported adapter plain PEFT would not load, or None."""
        problem = ""
        if self.ranks.is_main:
            try:
                read = self._read_by_peft(values)
                odd = [n for n in (*values, *read) if n not in read or not values[n].equal(read[n])]
                problem = f"plain PEFT would not load the exported adapter of {odd[0]}" if odd else ""
            except Exception as error:  # PEFT raises anything, and the other ranks wait
                problem = f"plain PEFT would not load the exported adapter ({typed_line(error)})"
        return gather_json(problem, self.ranks)[0] or None

    def _read_by_peft(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        lora, folder = self.plan.settings.lora, self.folder / "adapter"  # with whole names
        targets = short_targets(self.plan.targets, self.model.base)
        method = build_method(lora.method)
        parameters = short_parameters(self.plan.parameters, self.plan.memory.shapes.parameters)
        tensors = {**values, **method.fixed(self.model, lora)}
        export_adapter(folder, tensors, self._peft_config(targets, parameters, lora), "twin")
        model = self._load(torch.float32, torch.device("cpu"))
        return reference.read_adapter(model, folder)

    def _compare_rows(self, values: dict[str, torch.Tensor], rows: list[torch.Tensor]) -> str | None:
        if problem := self._sees_the_future(rows):
            return problem
        wanted, random = self._reference(torch.float32, values, rows)
        mine = self._ours(rows, train=not random)
        if self.config.precision.name == "bf16":
            theirs, _ = self._reference(torch.bfloat16, values, rows)
            return self._bf16_differs(mine, theirs, wanted)
        return self._losses_differ(mine, wanted) or self._gradients_differ(mine, wanted)

    @property
    def _pattern(self) -> list[int]:
        """Number of rows in each sequence of a micro-batch, with as many sequences as in the run, up to two."""
        return self.layout.shared_rows or [1] * self.layout.num_sequences

    def _rows(self, draw: int = 0) -> list[torch.Tensor]:
        """Return random rows for one micro-batch."""
        lengths = PACKED if max(self._pattern) > 1 else LENGTHS
        head = self.model.base.get_output_embeddings()
        rows = head.source.out_features if isinstance(head, QuantLossHead) else head.out_features  # type: ignore[union-attr]
        top = min(int(rows), 96)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1 + draw)
        return [
            torch.randint(4, top, (n,), generator=generator).to(self.ranks.device)
            for n in lengths[: sum(self._pattern)]
        ]

    @torch.no_grad()
    def _adapter_values(self) -> dict[str, torch.Tensor]:
        """Fill our adapters with random values, since B starts at zero and would hide errors; return them whole."""
        drawn = {}
        for number, (name, parameter) in enumerate(trainable_parameters(self.model)):
            generator = torch.Generator().manual_seed(number)
            value = torch.randn(parameter.shape, generator=generator) * 0.1
            local_tensor(parameter).copy_(self._own_rows(value))
            drawn[name] = value
        return drawn

    def _load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Return upstream's model."""
        trusted = self.config.model.trust_remote_code
        return reference.load(self.folder, dtype, device, trusted, self.objective.auto_class)

    def _peft_config(self, targets: Sequence[str], parameters: Sequence[str], lora: LoraSettings) -> PeftConfig:
        """Return the config of the adapter, with the modules that are trained whole."""
        config = peft_config(targets, parameters, lora, self.objective.task_type)
        return as_saved(config, self.plan.modules, self.plan.memory.shapes, self.model.base)

    def _reference_model(self, dtype: torch.dtype, values: dict[str, torch.Tensor]) -> nn.Module:
        """Return upstream's model with PEFT's adapters, its weights rounded as ours."""
        model = self._load(dtype, self.ranks.device)
        with one_thread():
            reference.round_weights(model, (*self.plan.quantized, *self.plan.quantized_edges))
        plain = replace(self.plan.settings.lora, dropout=0.0)
        parameters = [target.name for target in self.plan.parameters]
        return reference.adapt(model, self._peft_config(self.plan.targets, parameters, plain), values)

    def _reference(
        self, dtype: torch.dtype, values: dict[str, torch.Tensor], rows: list[torch.Tensor]
    ) -> tuple[Computed, bool]:
        """Return upstream's results, and whether its training mode is random (PhiMoE's router).

        If it is random, the results are those of evaluation mode.
        """
        adapted = self._reference_model(dtype, values)
        random = any_rank(reference.is_random(adapted, rows[0]), self.ranks)
        return reference.compute(adapted.train(not random), rows), random

    def _ours(self, rows: list[torch.Tensor], train: bool) -> Computed:
        return Computed(self._losses(rows, gradients=True, train=train), self._own_gradients())

    def _own_gradients(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of the gradients of one backward, and free them."""
        ReplicatedGradients(trainable_parameters(self.model), self.ranks)()
        gradients = {}
        for name, parameter in trainable_parameters(self.model):
            own = parameter.grad
            local = local_tensor(parameter)
            gradients[name] = torch.zeros_like(local) if own is None else local_tensor(own) / self.ranks.size
            parameter.grad = None
        return gradients

    def _losses(self, rows: list[torch.Tensor], gradients: bool = False, train: bool = False) -> list[torch.Tensor]:
        """Return our losses for each row's tokens, run as one micro-batch in the run's own layout."""
        pieces = iter([(row.cpu(), torch.ones(len(row), dtype=torch.bool)) for row in rows])
        micro_batch = self.layout.micro_batch([[next(pieces) for _ in range(count)] for count in self._pattern])
        self.model.train(train)
        with torch.set_grad_enabled(gradients):
            losses = token_losses(self.model, micro_batch.to(self.ranks.device))
            if gradients:
                losses.sum().backward()
        return list(losses.detach().split([len(row) - 1 for row in rows]))

    def _losses_differ(self, mine: Computed, wanted: Computed) -> str | None:
        gap = float((torch.cat(mine.losses) - torch.cat(wanted.losses)).abs().max())  # NaN if any loss is NaN
        size = float(torch.cat(wanted.losses).abs().mean())  # scores of tasks have any sign
        worst = all_max(_or_inf(gap / size), self.ranks)
        if worst <= LOSS_LIMIT:
            return None
        return f"a token's loss is off by {worst:.1e} of the mean loss{self._first_difference()}"

    def _own_rows(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of an adapter parameter or gradient."""
        if self.config.fsdp.adapters == "replicated":
            return whole
        return whole[slice(*row_range(whole.shape[0], self.ranks.shard_rank, self.ranks.shard_size))]

    def _bf16_differs(self, mine: Computed, theirs: Computed, wanted: Computed) -> str | None:
        return _bf16_problem(mine, theirs, wanted, self.ranks) or self._bf16_gradients_differ(mine, theirs, wanted)

    def _bf16_gradients_differ(self, mine: Computed, theirs: Computed, wanted: Computed) -> str | None:
        squares = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        for name, exact in wanted.gradients.items():
            here = self._own_rows(exact)
            gaps = (mine.gradients[name].to(here.device) - here, self._own_rows(theirs.gradients[name]) - here, here)
            squares += torch.stack([gap.double().square().sum() for gap in gaps])
        dist.all_reduce(squares, group=self.ranks.group)
        own, upstream, size = squares.sqrt().tolist()
        allowed = BF16_FACTOR * upstream + BF16_GRADIENTS * size
        if own <= allowed:
            return None
        return f"gradients are {own / size:.1e} off float32's, while upstream's in bf16 are {upstream / size:.1e} off"

    def _gradients_differ(self, mine: Computed, wanted: Computed) -> str | None:
        squares = torch.zeros(len(wanted.gradients), 2, dtype=torch.float64, device=self.ranks.device)
        for i, (name, whole) in enumerate(wanted.gradients.items()):
            theirs = self._own_rows(whole)
            gap = mine.gradients[name].to(theirs.device) - theirs
            squares[i, 0], squares[i, 1] = gap.double().square().sum(), theirs.double().square().sum()
        dist.all_reduce(squares, group=self.ranks.group)
        gaps, sizes = squares.sqrt().unbind(1)
        total = float(squares[:, 1].sum().sqrt())
        together = float(squares[:, 0].sum().sqrt()) / max(total, 1e-30)
        each = gaps / torch.clamp(sizes, min=1e-2 * total)
        worst = int(each.argmax())
        if together <= GRADIENT_LIMIT and float(each[worst]) <= ONE_LIMIT:
            return None
        name = list(wanted.gradients)[worst]
        return f"gradients are off by {together:.1e}, the worst ({name}) by {float(gaps[worst] / sizes[worst]):.1e}"

    def _sees_the_future(self, rows: list[torch.Tensor]) -> str | None:
        changed = [row.clone() for row in rows]
        place = min(CHANGED, len(rows[0]) - 2)
        changed[0][place] = changed[0][place] % 90 + 5
        if bool(changed[0][place] == rows[0][place]):
            changed[0][place] += 1
        before = self._losses(rows)
        after = self._losses(changed)
        gap = float((after[0][: place - 1] - before[0][: place - 1]).abs().max())
        others = torch.cat([torch.zeros(1, device=before[0].device), *after[1:]])
        others -= torch.cat([torch.zeros(1, device=before[0].device), *before[1:]])
        size = float(torch.cat(before).mean())
        limit = LOSS_LIMIT if self.config.precision.name == "fp32" else BF16_LEAK
        if not all_max(_or_inf(gap / size), self.ranks) <= limit:
            return "tokens see later ones, so the model would learn to copy the next token"
        if not all_max(_or_inf(float(others.abs().max()) / size), self.ranks) <= limit:
            return ROWS_LEAK
        return None

    def _first_difference(self) -> str:
        """Return part of a sentence that names the first module, in forward order, whose output differs, or ''."""
        row = self._rows()[0]
        theirs = self._load(torch.float32, self.ranks.device)
        with one_thread():
            reference.round_weights(theirs, (*self.plan.quantized, *self.plan.quantized_edges))
        ours = self.model.base
        names: dict[nn.Module, str] = {module: name for name, module in theirs.named_modules() if name}
        own: dict[nn.Module, str] = {
            module: name.replace(".base_layer", "") for name, module in ours.named_modules() if name
        }
        self.model.eval()
        theirs.eval()
        wanted = reference.outputs_of(lambda: theirs(input_ids=row[None], use_cache=False), names)
        inside = {module: name for module, name in own.items() if name in wanted}
        with self.model.peft.disable_adapter() if self.model.peft is not None else nullcontext():
            our_outputs = reference.outputs_of(lambda: self.model.logits(row[None]), inside)
        for name, output in wanted.items():
            mine = our_outputs.get(name)
            if mine is None or mine.shape != output.shape:
                continue
            gap = float((mine - output).abs().max() / output.abs().max().clamp(min=1e-12))
            if not gap <= 1e-4:
                return (
                    f"; first in {name} ({type(theirs.get_submodule(name)).__name__}), whose output is off by {gap:.1e}"
                )
        return ""


def _or_inf(value: float) -> float:
    """Return ``value``, or infinity for NaN, because a maximum over ranks may drop NaN."""
    return math.inf if math.isnan(value) else value


def _bf16_problem(mine: Computed, theirs: Computed, wanted: Computed, ranks: Ranks) -> str | None:
    """Compare our bf16 error, the distance from upstream's float32 losses, with upstream's own bf16 error."""

    def distance(computed: Computed) -> float:
        gap = torch.cat(computed.losses) - torch.cat(wanted.losses)
        return float(gap.square().mean().sqrt() / torch.cat(wanted.losses).mean())

    own, allowed = all_max(_or_inf(distance(mine)), ranks), BF16_FACTOR * distance(theirs) + BF16_FLOOR
    return (
        None
        if own <= allowed
        else f"losses are {own:.1e} off float32's; the limit from upstream's in bf16 is {allowed:.1e}"
    )
