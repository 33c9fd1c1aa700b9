"""`fit`: trains what `prepare` returned, saves checkpoints to resume from, and writes the adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fsdp_qlora.checkpoint.publish import step_folder
from fsdp_qlora.config.convert import to_dict
from fsdp_qlora.distributed.reduce import any_rank, on_main
from fsdp_qlora.distributed.signals import StopSignals
from fsdp_qlora.errors import STOPPED_EXIT_CODE, typed_line
from fsdp_qlora.files.read import read_json
from fsdp_qlora.files.write import write_json
from fsdp_qlora.run.claim import claim
from fsdp_qlora.run.folder import RunFolder
from fsdp_qlora.run.judged import verdict_on
from fsdp_qlora.run.prepared import Prepared
from fsdp_qlora.run.started import started
from fsdp_qlora.run.starts import keep_start
from fsdp_qlora.run.summary import summarize
from fsdp_qlora.run.training import FitResult, Training
from fsdp_qlora.shown import published
from fsdp_qlora.track.sink import Ended, Sink, State
from fsdp_qlora.track.sinks import Tracked, open_sinks
from fsdp_qlora.track.tracker import JsonLines, Tracker

_log = logging.getLogger(__name__)


def fit(prepared: Prepared, folder: RunFolder | None = None, signals: StopSignals | None = None) -> FitResult:
    """Resume if the settings ask for it, train, save, and write the adapter. Every rank calls it.

    Args:
        prepared: what `prepare` returned.
        folder: the run folder, already claimed; None claims ``<run.output_root>/<run.name>`` and finally releases it.
        signals: handlers that are already installed; None installs them for the duration of the training.

    Raises:
        FsdpQloraError: a subclass that names the cause; on every rank, if the other ranks can know of it.
    """
    if folder is not None:
        return _fit(prepared, folder, signals or StopSignals())
    folder = RunFolder(prepared.config.run.output_root, prepared.config.run.name)
    try:
        decision = claim(folder, prepared.config, prepared.ranks)
        if not decision.start:
            return FitResult(True, folder.read_summary())
        result = _fit(prepared, folder, signals or StopSignals())
        if prepared.ranks.is_main:
            folder.write_exit(0 if result.finished else STOPPED_EXIT_CODE, 0)
        return result
    finally:
        folder.unlock()


def _fit(prepared: Prepared, folder: RunFolder, stop: StopSignals) -> FitResult:
    with stop as signals:
        training = Training(prepared, folder)
        resumed = training.resume()
        keep_start(prepared, folder)
        on_main(lambda: folder.begin(published(to_dict(prepared.config))), prepared.ranks)
        on_main(lambda: folder.write_start(started(training)), prepared.ranks)
        before = _before(training, folder, resumed)
        if any_rank(signals.requested, prepared.ranks):  # stopped while loading: nothing to save yet
            return FitResult(False, {})
        with _tracker(training, folder) as tracker:
            finished = training.run(tracker, signals)
            tracker.close()
            on_main(training.unwritten.require_none, prepared.ranks)
            training.close()
            profile = training.profiling.finish()
            if not finished:
                tracker.end(Ended(State.STOPPED))
                return FitResult(False, {}, step_folder(folder.checkpoints, training.progress.step))
            size = training.export()
            summary = summarize(
                prepared, training.progress, training.profiling.meter, training.batches.num_rows, training.prompts,
                before, training.answers(), size,
            ) | ({"profile": profile} if profile else {})  # fmt: skip
            summary["verdict"] = on_main(lambda: verdict_on(training), prepared.ranks)
            on_main(lambda: folder.write_summary(summary), prepared.ranks)
            given = folder.model if prepared.config.lora.trains_base else folder.adapter
            tracker.end(Ended(State.FINISHED, summary=summary, adapter=given))
    return FitResult(True, summary)


def _before(training: Training, folder: RunFolder, resumed: Path | None) -> Sequence[str | None]:
    """Return the answers to the sample prompts before training.

    A resumed run cannot generate them, because its adapter is already trained: it reads those that its first start
    stored, and has None for the others.
    """
    file, prompts = folder.path / "answers_before.json", [prompt.text for prompt in training.prompts]
    if resumed is None:
        answers = training.answers()
        on_main(lambda: write_json(file, dict(zip(prompts, answers, strict=True))), training.ranks)
        return answers
    stored: dict[str, str] = on_main(lambda: _stored_answers(file, prompts), training.ranks)
    return [stored.get(prompt) for prompt in prompts]


def _stored_answers(file: Path, prompts: Sequence[str]) -> dict[str, str]:
    """Return the answers before training by prompt; warn if one is missing."""
    stored: dict[str, str] = {}
    why = "does not answer every sample prompt"
    try:
        stored = read_json(file, dict[str, str])
    except FileNotFoundError:
        why = "is missing"
    except ValueError as error:
        why = f"is damaged ({error})"
    if any(prompt not in stored for prompt in prompts):
        _log.warning(
            "%s %s. The adapter is already trained, so the summary has no answers from before training in their place.",
            file, why,
        )  # fmt: skip
    return stored


@contextmanager
def _tracker(training: Training, folder: RunFolder) -> Iterator[Tracker]:
    """Open the sinks on rank 0; tell them how the run ended if that is by a failure, and close them in any case."""
    sinks: list[Sink] = []

    def opened() -> None:
        config, step = training.config, training.progress.step
        sinks.append(JsonLines(folder.metrics_file, step, training.unwritten))
        total = training.batches.length.total_steps(training.progress)
        run = Tracked(folder.path, config.run.name, config.track, published(to_dict(config)), step, total)
        sinks.extend(open_sinks(run))

    on_main(opened, training.ranks)
    tracker = Tracker(sinks, training.ranks.phases.by_itself)
    try:
        yield tracker
    except BaseException as error:
        tracker.end(Ended(State.FAILED, typed_line(error)))
        raise
    finally:
        tracker.close()
