"""R18: a base that was changed between the samples is noticed by a resume, and a start reads nothing more than before."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from fsdp_qlora.checkpoint.resume import whole_of, with_whole, without
from fsdp_qlora.checks.digests import WholeDigests
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.load.safetensors import file_digests

NAME = "model.safetensors"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """64 MB of weights, as far as the samples go."""
    file = tmp_path / NAME
    file.write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(64_000_000))
    return file


def _change(file: Path, at: int = 1_000_000) -> None:
    """Change some bytes between two samples, and set the times back, as `rsync --inplace --times` does."""
    found = file.stat()
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(b"x" * 1000)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def _made(file: Path, kept: Path | None) -> WholeDigests:
    found = WholeDigests([file], kept)
    found.begin()
    deadline = time.monotonic() + 30
    while NAME not in found.known and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_a_change_between_the_samples_is_noticed(file, tmp_path):
    """R18: by the next run, which reads the file because it is another one than was read before."""
    kept, sampled = tmp_path / "kept", file_digests(tmp_path)
    saved = dict(_made(file, kept).known)
    assert saved == {NAME: hashlib.sha256(file.read_bytes()).hexdigest()}
    _change(file)
    assert file_digests(tmp_path) == sampled, "the samples do not see it"
    now = WholeDigests([file], kept)
    assert now.missing(saved), "and what was kept is not of this file"
    now.make(saved)
    with pytest.raises(ConfigError, match=f"model.name: {file} is not the file that .*step_2 was trained on"):
        now.compare(saved, tmp_path / "step_2")


def test_a_file_that_stayed_is_not_read_again(file, tmp_path, monkeypatch):
    """R18: a start is as fast as before."""
    saved = dict(_made(file, tmp_path / "kept").known)
    monkeypatch.setattr(WholeDigests, "_make", lambda self, name: pytest.fail("read again"))
    again = WholeDigests([file], tmp_path / "kept")
    assert again.known == saved and not again.missing(saved)
    again.compare(saved, tmp_path)
    assert WholeDigests([file], None).known == {}


def test_what_one_side_does_not_know_is_not_compared(file, tmp_path):
    """R18: old checkpoints, and files that are no longer there (their samples say so)."""
    found = WholeDigests([file], None)
    found.compare({NAME: "0" * 64}, tmp_path)
    assert not found.missing({"other.safetensors": "0" * 64}) and not found.missing({})
    found.make(["other.safetensors", "../x"])
    assert found.known == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 1}', '{"sha256": {}}', "[" * 100_000])
def test_what_is_kept_damaged_is_made_anew(file, tmp_path, text):
    """R18: a power cut may leave anything."""
    saved = dict(_made(file, tmp_path / "kept").known)
    (place,) = (tmp_path / "kept").iterdir()
    place.write_text(text)
    assert WholeDigests([file], tmp_path / "kept").known == {}
    assert _made(file, tmp_path / "kept").known == saved


def test_a_file_that_is_written_while_it_is_read_has_no_digest(file, tmp_path):
    """R18: nor has one whose run has ended."""
    found = WholeDigests([file], None)
    found.close()
    found.make([NAME])
    assert found.known == {}


def test_an_identity_with_and_without():
    """R18: the settings are compared as before, whether the digests are in it or not."""
    plain = {"run.seed": 1, f"base model file {NAME}": "5 bytes, sampled sha256 0"}
    whole = with_whole(plain, {NAME: "f" * 64})
    assert whole_of(whole) == {NAME: "f" * 64} and whole_of(plain) == {}
    assert without(whole, []) == without(plain, []) == plain
