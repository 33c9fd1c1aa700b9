"""R12: a line that cannot be written is a reason to stop after a save, and to say where."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fsdp_qlora.errors import DataError, StorageError
from fsdp_qlora.run.batches import _bad_row_list
from fsdp_qlora.track.lines import read_lines
from fsdp_qlora.track.tracker import JsonLines
from fsdp_qlora.track.unwritten import Unwritten


@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``num_bytes``: writes fail as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _steps(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_lines_that_find_no_room_wait_and_the_run_is_told(tmp_path):
    """R12: nothing is raised in the middle of a step; the file is whole again where room is made in time."""
    file, unwritten = tmp_path / "metrics.jsonl", Unwritten()
    sink = JsonLines(file, 0, unwritten)
    with room(120):
        for step in (1, 2, 3):
            sink.log(step, {"loss": 1.0})
        assert file.stat().st_size == 120, "half a line lies there"
        assert unwritten.problem == f"{file} cannot be written: File too large."
    sink.close()
    assert _steps(file) == [1, 2, 3]
    with pytest.raises(StorageError, match=f"{file} cannot be written") as told:
        unwritten.require_none()
    assert told.value.exit_code == 74


def test_what_never_found_room_is_no_half_line_after_a_resume(tmp_path):
    """R12: the next start cuts it."""
    file = tmp_path / "metrics.jsonl"
    with room(70):
        sink = JsonLines(file, 0, Unwritten())
        for step in (1, 2, 3):
            sink.log(step, {"loss": 1.0})
        sink.close()
    sink = JsonLines(file, 3, Unwritten())
    sink.log(4, {"loss": 1.0})
    assert _steps(file) == [1, 4]


def test_going_back_without_room_is_told_too(tmp_path):
    """R12: a rollback rewrites the file."""
    file, unwritten = tmp_path / "metrics.jsonl", Unwritten()
    sink = JsonLines(file, 0, unwritten)
    for step in (1, 2, 3):
        sink.log(step, {"loss": 1.0})
    with room(10):
        sink.rewind(2)
    assert str(file) in unwritten.problem and _steps(file) == [1, 2, 3]
    sink.rewind(2)
    assert _steps(file) == [1, 2]


def test_the_list_of_bad_rows_is_no_other(tmp_path):
    """R12: it is written while training, from a stream."""
    file, unwritten = tmp_path / "bad_rows.jsonl", Unwritten()
    note = _bad_row_list(file, unwritten)
    with room(60):
        for row in range(3):
            note(f"rows.jsonl:{row}", DataError("no messages"))
    assert str(file) in unwritten.problem
    assert [line["where"] for line in read_lines(file)] == ["rows.jsonl:0"], "half a line is none"
    note = _bad_row_list(file, Unwritten())
    note("rows.jsonl:7", DataError("no messages"))
    assert [line["where"] for line in read_lines(file)] == ["rows.jsonl:0", "rows.jsonl:7"]


def test_where_all_was_written_nothing_is_raised(tmp_path):
    """R12: of course."""
    unwritten = Unwritten()
    JsonLines(tmp_path / "metrics.jsonl", 0, unwritten).log(1, {"loss": 1.0})
    unwritten.require_none()
