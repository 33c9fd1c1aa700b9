"""A board answers or says that it does not; nobody waits on it for a rank that stands still."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from fsdp_qlora.distributed import notes as board
from fsdp_qlora.distributed.notes import FileBoard, StoreBoard


def test_notes_are_files_that_are_replaced_whole(tmp_path):
    one, other = FileBoard(tmp_path), FileBoard(tmp_path)
    assert other.read("0") is None
    one.write("0", "first")
    one.write("0", "second")
    assert other.read("0") == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["0"]


def test_many_writers_leave_a_whole_note(tmp_path):
    notes = [str(n) * 5000 for n in range(8)]
    writers = [threading.Thread(target=FileBoard(tmp_path).write, args=("0", note)) for note in notes for _ in range(9)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert FileBoard(tmp_path).read("0") in (None, *notes)
    assert [file.name for file in tmp_path.iterdir()] == ["0"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OSError):
        FileBoard(tmp_path / "gone").write("0", "x")


def test_a_store_gives_what_was_written():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    found = StoreBoard(store)
    assert found.read("0") is None
    found.write("0", "note")
    assert found.read("0") == "note"


class _Stopped:
    """What a store looks like whose server is stopped: no call returns."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.calls = 0

    def set(self, name: str, note: str) -> None:
        self.calls += 1
        self.goes_on.wait()

    def check(self, names: list[str]) -> bool:
        self.calls += 1
        self.goes_on.wait()
        return False


def test_a_stopped_store_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(board, "STORE_SECONDS", 0.2)
    store = _Stopped()
    asked = StoreBoard(store)
    started = time.monotonic()
    for ask in (lambda: asked.write("0", "x"), lambda: asked.read("0"), lambda: asked.read("1")):
        with pytest.raises(TimeoutError, match="rank 0 does not answer"):
            ask()
    assert time.monotonic() - started < 5
    assert store.calls == 1, "no thread is left behind for each question"
    store.goes_on.set()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert asked.read("0") is None
            return
        except TimeoutError:
            continue
    raise AssertionError("it answers again, and is not asked")
