"""`Training`: resumes, steps, evaluates, saves and exports a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from fsdp_qlora.adapters import build_method
from fsdp_qlora.adapters.experts import peft_config, short_parameters
from fsdp_qlora.adapters.loraplus import learning_rates
from fsdp_qlora.adapters.names import adapter_key, trainable_parameters
from fsdp_qlora.adapters.replicated import ReplicatedGradients
from fsdp_qlora.adapters.turns import FILE_NAME
from fsdp_qlora.adapters.whole import as_saved, with_head
from fsdp_qlora.checkpoint.checkpointer import Checkpointer, Snapshot
from fsdp_qlora.checkpoint.contents import checkpoint_tensors, optimizer_shapes
from fsdp_qlora.checkpoint.manifest import SavedCheckpoint
from fsdp_qlora.checkpoint.resume import INITIAL_ADAPTER, identity_of, whole_of, with_whole
from fsdp_qlora.checkpoint.retention import Retention
from fsdp_qlora.checks.copies import require_equal_copies
from fsdp_qlora.checks.gradients import FirstGradients
from fsdp_qlora.checks.nonfinite import locate_nonfinite
from fsdp_qlora.config.auto import Choice, Resume, switch
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.config.schema import GenerateSettings, RunConfig
from fsdp_qlora.data.loader import MicroBatch, TokenRows
from fsdp_qlora.distributed.memory import memory_peak
from fsdp_qlora.distributed.reduce import on_main
from fsdp_qlora.distributed.seeds import seed_of
from fsdp_qlora.distributed.signals import StopSignals
from fsdp_qlora.errors import DataError, NonFiniteError, PlanError, first_line
from fsdp_qlora.export.adapter import as_started, export_adapter, gather_adapter, short_targets
from fsdp_qlora.export.card import model_card
from fsdp_qlora.export.full_model import export_model, gather_base
from fsdp_qlora.inference.end_of_turn import end_of_turn
from fsdp_qlora.inference.generate import answer
from fsdp_qlora.load.fingerprint import header_of
from fsdp_qlora.load.safetensors import file_digests
from fsdp_qlora.objectives import build_objective
from fsdp_qlora.optim.decay import undecayed_parameters
from fsdp_qlora.optim.optimizers import ShardedOptimizer
from fsdp_qlora.optim.schedules import build_schedule, warmup_notice
from fsdp_qlora.parallel.compile import waiting_for_compiler
from fsdp_qlora.parallel.fallback import EagerFallback
from fsdp_qlora.parallel.shard import model_dtype, release_all, release_gathered, synchronizer
from fsdp_qlora.plan.choices import smaller
from fsdp_qlora.run.base_files import BaseFiles
from fsdp_qlora.run.batches import build_batches, data_key
from fsdp_qlora.run.decide import skeleton
from fsdp_qlora.run.evaluate import evaluate_rows
from fsdp_qlora.run.folder import RunFolder, versions
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.profiling import Profiling
from fsdp_qlora.run.samples import SamplePrompt, held_out_prompts
from fsdp_qlora.shapes.tokens import trained_indices
from fsdp_qlora.shown import published
from fsdp_qlora.track.console import megabytes
from fsdp_qlora.track.tracker import Tracker
from fsdp_qlora.track.unwritten import Unwritten
from fsdp_qlora.train.evaluate import Evaluation
from fsdp_qlora.train.loop import Due, LoopHooks, train_loop
from fsdp_qlora.train.progress import Progress
from fsdp_qlora.train.recovery import Recovery
from fsdp_qlora.train.step import StepSettings

if TYPE_CHECKING:
    from fsdp_qlora.model.processor import Processor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """The result of `fit`."""

    finished: bool
    """False if the run was stopped early; it can be resumed."""
    summary: dict[str, Any]
    """Contents of summary.json; empty if the run was stopped."""
    checkpoint: Path | None = None
    """The checkpoint that a stopped run was saved to; None if it was stopped before the first step."""


class Training:
    """The optimizer, data, checkpoints and progress of one run: built from a `Prepared`, driven by `fit`."""

    def __init__(self, prepared: Prepared, folder: RunFolder) -> None:
        if prepared.data is None:
            raise DataError("data.train: not set. Give a file, a folder, a hub data set, or a list of them.")
        self.prepared, self.folder, self.recipe = prepared, folder, prepared.recipe
        self.config = prepared.recipe.settled(prepared.config)
        self.model, self.ranks = prepared.model, prepared.ranks
        self.eval_rows = prepared.data.held_out
        self.unwritten = Unwritten()
        self.batches = build_batches(prepared, folder.bad_rows, self.unwritten)
        release_all(self.model)  # an evaluation may have come before
        trained = dict(trainable_parameters(self.model))
        undecayed = {adapter_key(name) for name in undecayed_parameters(self.model)}
        rates = learning_rates({name: p.shape for name, p in trained.items()}, self.config.optim, undecayed)
        self.optimizer = ShardedOptimizer(trained.items(), self.config.optim, rates)
        num_steps = self.batches.length.planned_steps
        for notice in (self.optimizer.notice, warmup_notice(self.config.schedule, num_steps)):
            if self.ranks.is_main and notice:
                _log.warning("%s", notice)
        self.reduce_replicated = ReplicatedGradients(self.optimizer.parameters.items(), self.ranks)
        self.schedule = build_schedule(self.config.schedule, num_steps)
        self.objective = build_objective(prepared.settings.objective)
        self.prompts = self._prompts()
        self.checkpointer = self._checkpointer()
        self.progress, self.profiling = Progress(), Profiling(prepared, folder.path)
        base = file_digests(prepared.folder)
        self.base_files = BaseFiles(prepared)
        self._header = header_of(prepared.origin.fingerprint())
        self.identity = identity_of(
            to_dict(self.config), base, data_key(prepared.data.key, self.config.data), prepared.repairs
        ) | ({INITIAL_ADAPTER: self.model.starts.digest} if self.model.starts.digest else {})

    def resume(self) -> Path | None:
        """Load the checkpoint that the settings ask for; return its folder, or None for a fresh start."""
        settings = self.config.checkpoint
        self.prepared.ranks.phases.enter("finding the checkpoint to resume from")
        found = self.checkpointer.find(Resume.of(settings.resume), self.identity, settings.resume_overrides)
        if found is None:
            return None
        self.base_files.compare(whole_of(found.manifest.identity), found.folder)
        self._load(found)
        return found.folder

    def _load(self, saved: SavedCheckpoint) -> None:
        manifest = saved.manifest
        self.progress.restore(manifest.progress)
        state = self.optimizer.load_state(manifest.step, optimizer_shapes(manifest.tensors))
        self.checkpointer.load(saved, checkpoint_tensors(self.optimizer.parameters.items(), state))
        state.finish()

    def _checkpointer(self) -> Checkpointer:
        settings = self.config.checkpoint
        return Checkpointer(
            self.folder.checkpoints,
            self.ranks,
            Retention(settings.keep_last, settings.keep_every, settings.keep_best),
            fallback=Path(settings.fallback_dir).expanduser() / self.config.run.name if settings.fallback_dir else None,
            asynchronous=settings.asynchronous,
            write_adapter=None if self.config.lora.trains_base else self._write_adapter,
        )

    def save(self, progress: Progress) -> None:
        """Start to save a checkpoint, which includes a ready-to-use adapter."""
        self.prepared.ranks.phases.enter(f"checkpoint of step {progress.step}")
        self.checkpointer.save(self._snapshot(progress), self._tensors)

    def finish(self, progress: Progress) -> None:
        """Make sure this state is on disk."""
        self.prepared.ranks.phases.enter(f"last checkpoint, of step {progress.step}")
        self.checkpointer.finish(self._snapshot(progress), self._tensors)

    def _snapshot(self, progress: Progress) -> Snapshot:
        identity = with_whole(self.identity, self.base_files.known())
        return Snapshot(progress.step, progress.to_dict(), identity, versions())

    def _tensors(self) -> dict[str, Any]:
        # From the optimizer's own list: while a unit is gathered, FSDP exposes other parameters under the same names.
        return checkpoint_tensors(self.optimizer.parameters.items(), self.optimizer)

    def close(self) -> None:
        """End the thread that writes checkpoints, once all ranks are done training."""
        self.checkpointer.close()

    def export(self) -> int:
        """Write the adapter in PEFT's format, or the trained model; return the bytes of the weights.

        Every rank calls it, rank 0 writes.
        """
        trains_base, ranks = self.config.lora.trains_base, self.ranks
        ranks.phases.enter("writing the model" if trains_base else "writing the adapter")
        require_equal_copies(self.optimizer.parameters.items(), ranks)
        if trains_base:
            tensors = gather_base(self.model, model_dtype(self.config.precision.name), ranks.is_main)
            return on_main(lambda: self._write_model(tensors), ranks)
        tensors = gather_adapter(self.model)
        return on_main(lambda: self._write_adapter(self.folder.adapter, tensors, self.progress.to_dict()), ranks)

    def _write_model(self, tensors: Mapping[str, torch.Tensor]) -> int:
        fresh = skeleton(self.prepared.settings, self.prepared.folder)  # ours has float32 masters, and is sharded
        return export_model(self.folder.model, fresh, tensors, self.prepared.processor, self.prepared.folder)

    def _write_adapter(self, folder: Path, tensors: Mapping[str, torch.Tensor], progress: dict[str, Any]) -> int:
        plan, lora = self.prepared.plan, self.prepared.settings.lora  # with whole names
        targets = short_targets(plan.targets, self.model.base)
        parameters = short_parameters(plan.parameters, plan.memory.shapes.parameters)
        card = model_card(published(to_dict(self.config)), self._facts(progress))
        config = as_started(peft_config(targets, parameters, lora, self.objective.task_type), self.config.lora)
        method = build_method(lora.method)
        config = as_saved(config, plan.modules, self.prepared.shapes, self.model.base)
        if count := len(self.config.model.add_tokens):
            first = len(self.prepared.tokenizer) - count
            indices = trained_indices(self.prepared.shapes, first, count)
            config.trainable_token_indices = indices  # type: ignore[attr-defined]
        tensors = with_head({**tensors, **method.fixed(self.model, lora)}, self.prepared.shapes, plan.modules)
        base = self.config.model.name
        base = str(self.prepared.folder) if Path(base).expanduser().is_dir() else base
        beside = [] if lora.start is None else [self.folder.path / FILE_NAME]
        more = self.objective.files(self.config.data, self.model.base.config)
        return export_adapter(
            folder, tensors, config, base, self._saved_processor(), card, beside, self._header, self._saved_config(),
            more,
        )  # fmt: skip

    def _saved_config(self) -> PreTrainedConfig | None:
        """Return the model's config if the objective has changed it, without paths of this machine."""
        if not self.objective.trains_head:
            return None
        config = deepcopy(self.model.base.config)
        config.architectures, config.name_or_path = [type(self.model.base).__name__], ""
        return config

    def _saved_processor(self) -> Processor:
        """Return what reads rows, to save; an added end of turn is its ``eos_token``, where plain PEFT then stops."""
        if not (added := self.config.model.add_tokens):
            return self.prepared.processor
        tokenizer = self.prepared.tokenizer
        end = end_of_turn(self.prepared.folder, self.model.base.config, tokenizer)
        for token in tokenizer.convert_ids_to_tokens(end.ids[:1]):
            if token in added:
                tokenizer = deepcopy(tokenizer)
                tokenizer.eos_token = token
        return tokenizer

    def _facts(self, progress: dict[str, Any]) -> dict[str, Any]:
        return {
            "base_model": self.config.model.name,
            "train_rows": self.batches.num_rows,
            "steps": progress["step"],
            "trainable_parameters": self.prepared.plan.trainable_parameters,
            "eval_loss_before": progress["first_eval_loss"],
            "eval_loss_after": progress["last_eval_loss"],
            "versions": versions(),
        }

    def evaluate(self) -> Evaluation | None:
        """Evaluate on the held-out rows if there are any, and answer the sample prompts if configured."""
        self.prepared.ranks.phases.enter(f"evaluation after step {self.progress.step}")
        with self.prepared.apart_from_steps():
            result = None if self.eval_rows is None else evaluate_rows(self.prepared, self.eval_rows)
        if self.config.train.sample_at_eval and self.config.train.sample_prompts:
            answers = [
                {"prompt": p, "answer": a}
                for p, a in zip(self.config.train.sample_prompts, self.answers(held_out=False), strict=True)
            ]
            if self.ranks.is_main:
                self.unwritten.attempt(
                    self.folder.answers_file, lambda: self.folder.add_answers(self.progress.step, answers)
                )
        return result

    def _prompts(self) -> list[SamplePrompt]:
        """Return the prompts that are answered before and after training."""
        count, rows = self.config.train.sample_held_out, self.eval_rows
        read: list[list[Any]] = []
        if isinstance(rows, TokenRows) and count and self.objective.of_tokens:
            read = on_main(
                lambda: [list(astuple(p)) for p in held_out_prompts(rows, self.prepared.tokenizer, count)], self.ranks
            )
        asked = self.config.train.sample_prompts
        return [*map(SamplePrompt, asked), *(SamplePrompt(*each) for each in read if each[0] not in asked)]

    def answers(self, held_out: bool = True) -> list[str]:
        """Answer the sample prompts by greedy decoding on all ranks; without ``held_out``, only those asked for."""
        prompts = [prompt for prompt in self.prompts if held_out or prompt.wanted is None]
        if not prompts:
            return []
        self.prepared.ranks.phases.enter(f"answers after step {self.progress.step}")
        most, tokenizer = self.config.train.sample_tokens, self.prepared.tokenizer
        end = end_of_turn(self.prepared.folder, self.model.base.config, tokenizer)
        with self.prepared.apart_from_steps():
            return [
                answer(
                    self.model, tokenizer, end, prompt.text,
                    GenerateSettings(max_new_tokens=min(most, prompt.max_tokens or most)),
                )
                for prompt in prompts
            ]  # fmt: skip

    def _recovery(self) -> Recovery:
        train = self.config.train
        return Recovery(
            train.on_nonfinite, train.max_bad_steps,
            locate=self._locate,
            drop_gradients=self.optimizer.zero_grad, restore=self._restore,
        )  # fmt: skip

    def _locate(self, micro_batches: Sequence[MicroBatch], step: int) -> str:
        def run(micro_batch: MicroBatch) -> None:
            torch.manual_seed(seed_of(self.config.run.seed, step, micro_batch.number))
            self.objective.sums(self.model, micro_batch.to(self.ranks.device))

        try:
            return locate_nonfinite(self.model, self.ranks, micro_batches, run)
        finally:
            release_gathered(self.model)

    def _fallback(self) -> EagerFallback | None:
        """Return what turns compilation off if it fails; None if no layers are compiled."""
        if (layers := self.model.compiled_layers) is None:
            return None
        if self.ranks.is_main:
            _log.info("train.compile: %s", waiting_for_compiler("the decoder layers", self.ranks.device))

        def say(step: int, reason: str) -> None:
            why = f"compilation failed at step {step}: {reason}"
            self.prepared.choices["train.compile"] = Choice("false", why)
            if self.ranks.is_main:
                _log.warning("step %d: compilation failed, continuing without it: %s", step, reason)

        asked = switch(self.config.train.compile) is True
        return EagerFallback(layers, self.ranks, asked, say, self.progress.step + 1)

    def _restore(self) -> None:
        """Restore the newest checkpoint."""
        self.checkpointer.settle()
        found = self.checkpointer.find(Resume.of("auto"), self.identity, self.config.checkpoint.resume_overrides)
        if found is None:
            raise NonFiniteError("train.on_nonfinite: rollback found no checkpoint of this run yet; the run stops.")
        self._load(found)

    def run(self, tracker: Tracker, signals: StopSignals) -> bool:
        """Train to the end; return False if stopped early."""
        train = self.config.train

        def before_update() -> None:
            signals.something_to_save = True
            self.checkpointer.before_update()

        due = Due(
            self.batches.length, train.log_every, self.recipe.eval_every,
            self.config.checkpoint.every_steps, train.early_stopping_patience, train.spike_factor,
        )  # fmt: skip
        settings = StepSettings(
            objective=self.objective, ranks=self.ranks, seed=self.config.run.seed, max_grad_norm=train.max_grad_norm,
            synchronize=synchronizer(self.config.lora.trains_masters),
            around=debug_context(self.config),
            enter=self.prepared.ranks.phases.enter,
            before_update=before_update,
            reduce=self.reduce_replicated,
            checks=(FirstGradients(self.model, self.ranks, self.prepared.shapes.beside),), fallback=self._fallback(),
        )  # fmt: skip
        hooks = LoopHooks(
            batch_at=self.batches.batch_at,
            evaluate=self.evaluate,
            save=self.save,
            save_stall=self.checkpointer.take_stall,
            finish=self.finish,
            stop_requested=lambda: signals.requested or self.checkpointer.gave_up or bool(self.unwritten.problem),
            peak_memory=lambda: memory_peak(self.ranks.device)[0],
            around_step=self.profiling.profiler.around_step if self.profiling.profiler else nullcontext,
        )
        self.base_files.begin()
        try:
            return train_loop(
                self.model, self.optimizer, self.schedule, self.recipe.lr, self.progress, due, settings, hooks,
                self._recovery(), tracker, self.profiling.meter,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise PlanError(self._out_of_memory(error)) from error
        finally:
            self.batches.batch_at.close()
            self.base_files.close()

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> str:
        plan = self.prepared.plan
        change = smaller(plan.memory, plan.settings)
        return (
            f"step {self.progress.step + 1}: out of memory on {self.ranks.device}: planned were "
            f"{megabytes(plan.peak)} of tensors, allocated at most {megabytes(memory_peak(self.ranks.device)[0])} "
            f"({first_line(error).rstrip('.')}). "
            + (f"Set {change}." if change else "Lower data.max_length, or shard over more.")
        )


def debug_context(config: RunConfig) -> Callable[[], Any]:
    """Return the context manager that forward and backward run in."""
    return torch.autograd.detect_anomaly if config.debug.name == "anomaly" else nullcontext
