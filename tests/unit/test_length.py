"""What is left of a run is counted in rows; only `train.max_steps` counts steps."""

from __future__ import annotations

import pytest

from fsdp_qlora.config.schema import ScheduleSettings
from fsdp_qlora.optim.schedules import build_schedule, warmup_notice
from fsdp_qlora.train.length import Length
from fsdp_qlora.train.progress import Progress


def _end(length: Length, progress: Progress, skipped: tuple[int, ...] = ()) -> Progress:
    """Run to the end; batches that start at a position in ``skipped`` are left out."""
    while not length.reached(progress):
        rows = length.rows_per_step
        if not length.max_steps:
            rows = min(rows, length.last_position - progress.position)
        if progress.position in skipped:
            progress.position += rows
        else:
            progress.advance(rows, 0, 0, 1.0)
    return progress


@pytest.mark.parametrize(("position", "size", "steps"), [(16, 8, 8), (16, 4, 12), (16, 48, 5), (16, 5, 11), (48, 8, 4)])
def test_a_resume_with_another_batch_trains_on_every_row(position, size, steps):
    length = Length(size, last_position=48)
    begun = Progress(step=4, position=position)
    assert length.total_steps(begun) == steps
    ended = _end(length, begun)
    assert (ended.step, ended.position) == (steps, 48)
    assert length.total_steps(ended) == steps


def test_steps_count_where_steps_were_asked_for():
    length = Length(8, max_steps=6)
    ended = _end(length, Progress(step=4, position=16))
    assert (ended.step, ended.position) == (6, 32)
    assert length.scheduled(Progress(step=4, position=400)) == 4  # rows that were left out do not count
    assert length.total_steps(Progress()) == length.planned_steps == 6


def test_left_out_rows_shorten_the_run_and_the_schedule_still_ends():
    length, schedule = Length(8, last_position=44), build_schedule(ScheduleSettings(name="linear", warmup_ratio=0), 6)
    assert length.planned_steps == length.total_steps(Progress()) == 6
    ended = _end(length, Progress(), skipped=(16, 40))
    assert (ended.step, ended.position) == (4, 44) and length.reached(ended)
    assert [length.scheduled(Progress(step=n, position=8 * n)) for n in range(6)] == list(range(6))  # bit for bit
    assert schedule(length.scheduled(ended)) < schedule(5)


def test_the_learning_rate_does_not_jump_with_the_batch():
    before, after = (Length(size, last_position=48) for size in (4, 8))
    at = Progress(step=6, position=24)
    settings = ScheduleSettings(name="cosine", warmup_ratio=0)
    factors = [build_schedule(settings, n.planned_steps)(n.scheduled(at)) for n in (before, after)]
    assert factors[0] == pytest.approx(factors[1]) == pytest.approx(0.5)


@pytest.mark.parametrize(("steps", "said"), [(100, True), (10, True), (9, False), (0, False)])
def test_a_warm_up_as_long_as_the_run_is_said(steps, said):
    notice = warmup_notice(ScheduleSettings(warmup_steps=steps), 10)
    assert bool(notice) == said
    if said:
        assert notice.startswith("schedule.warmup_steps: ") and f"takes {steps} steps, but the run has 10" in notice


def test_a_warm_up_by_ratio_may_be_the_whole_run_of_one_step():
    assert warmup_notice(ScheduleSettings(), 40) == ""
    assert warmup_notice(ScheduleSettings(), 1) == ""
