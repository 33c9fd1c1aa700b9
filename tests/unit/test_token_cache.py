"""R4: whatever happens to the token cache, what is trained on is what was tokenized. R15: nothing stays for ever."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.cache import SUMS, hold, obtain, prune, sweep
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.errors import StorageError
from fsdp_qlora.files.locks import alone

FILES = ("tokens.arrow", "train.npy", "eval.npy", "counts.json", "bad_rows.jsonl", SUMS)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"p{n}", "completion": "fox " * (1 + n % 3)}) for n in range(20)]
    file.write_text("\n".join([*lines, "{broken"]) + "\n")
    return file


def _start(rows, tokenizer, cache, progress=None):
    """Return the tokens of both parts, and the folder that they are kept in."""
    settings = DataSettings(train=str(rows), max_length=32, eval_fraction=0.2, on_bad_row="skip")
    data = prepare_data(settings, 0, tokenizer, cache, progress=progress)
    assert data.train is not None and data.eval is not None
    return [data.train[:], data.eval[:], data.train_counts, data.eval_counts], cache / "tokens" / data.key


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def _replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {
    "cut": _cut,
    "emptied": lambda file: os.truncate(file, 0),
    "a bit at the start": lambda file: _flip(file, 0),
    "a bit in the middle": lambda file: _flip(file, 0.5),
    "a bit at the end": lambda file: _flip(file, 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "gone": lambda file: file.unlink(),
    "a pipe": _replace_by_pipe,
    "a folder": _replace_by_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_noticed_and_made_anew(tmp_path, tokenizer, rows, capsys, damage):
    """R4: with one line on the screen, and the tokens are those of the first start."""
    first, folder = _start(rows, tokenizer, tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    for name in FILES:
        capsys.readouterr()
        DAMAGES[damage](folder / name)
        again, same = _start(rows, tokenizer, tmp_path)
        said = capsys.readouterr().err.splitlines()
        assert again == first and same == folder
        assert len(said) == 1 and str(folder) in said[0] and said[0].endswith("Tokenizing the data again."), said
        assert _start(rows, tokenizer, tmp_path)[0] == first and capsys.readouterr().err == ""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def _with_sums_that_fit(folder: Path) -> None:
    lines = subprocess.run(
        ["sha256sum", *(name for name in FILES if name != SUMS and (folder / name).is_file())],
        cwd=folder, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (folder / SUMS).write_text(lines)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"train": 3}', '{"train": {"kept": 1, "odd": 2}}', "\xff"])
def test_odd_counts_whose_digest_fits(tmp_path, tokenizer, rows, text):
    """R4: another version's counts.json, for example."""
    first, folder = _start(rows, tokenizer, tmp_path)
    (folder / "counts.json").write_text(text)
    _with_sums_that_fit(folder)
    assert _start(rows, tokenizer, tmp_path)[0] == first


def test_sums_without_a_file_that_is_gone_too(tmp_path, tokenizer, rows):
    first, folder = _start(rows, tokenizer, tmp_path)
    (folder / "eval.npy").unlink()
    _with_sums_that_fit(folder)
    assert _start(rows, tokenizer, tmp_path)[0] == first


@pytest.mark.parametrize("kind", ["a file", "a link to nowhere", "an empty folder", "of a version without digests"])
def test_something_else_in_the_place_of_the_folder(tmp_path, tokenizer, rows, kind):
    first, folder = _start(rows, tokenizer, tmp_path)
    if kind == "of a version without digests":
        (folder / SUMS).unlink()
    else:
        shutil.rmtree(folder)
        {"a file": folder.touch, "an empty folder": folder.mkdir}.get(kind, lambda: folder.symlink_to("nowhere"))()
    assert _start(rows, tokenizer, tmp_path)[0] == first
    assert folder.is_dir() and not folder.is_symlink()


def test_sums_are_in_the_form_that_sha256sum_reads(tmp_path, tokenizer, rows):
    _, folder = _start(rows, tokenizer, tmp_path)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=folder, check=True)


@pytest.mark.parametrize("damaged", [False, True])
def test_two_starts_at_once_share_it(tmp_path, tokenizer, rows, damaged):
    """R4: one makes it, and the other one waits and reads no row."""
    if damaged:
        _, folder = _start(rows, tokenizer, tmp_path / "cache")
        _flip(folder / "tokens.arrow", 0.5)
    read = []

    def slowly(count):
        read.append(count)
        time.sleep(0.2)

    with ThreadPoolExecutor(3) as pool:
        starts = [pool.submit(_start, rows, tokenizer, tmp_path / "cache", slowly) for _ in range(3)]
        results = [start.result() for start in starts]
    assert results[0] == results[1] == results[2] and len(read) == 1
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir()] == [results[0][1].name]


_KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import AutoTokenizer
from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.errors import StorageError
settings = DataSettings(train=sys.argv[1], max_length=32, eval_fraction=0.2, on_bad_row="skip")
prepare_data(settings, 0, AutoTokenizer.from_pretrained(sys.argv[2]), Path(sys.argv[3]),
             progress=lambda count: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.full
def test_what_a_killed_start_leaves_is_swept(tmp_path, tokenizer, tiny_model, rows, cli_env):
    """R15: killed while it tokenizes; the next start makes the tokens and removes the rest."""
    command = [sys.executable, "-c", _KILLED, str(rows), str(tiny_model), str(tmp_path / "cache")]
    assert subprocess.run(command, env=cli_env, check=False).returncode == -9
    left = [path.name for path in (tmp_path / "cache" / "tokens").iterdir()]
    assert len(left) == 2 and all(name.startswith("making-") for name in left)
    _, folder = _start(rows, tokenizer, tmp_path / "cache")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_only_what_nobody_works_in_is_swept(tmp_path):
    """R15: leftovers of keys that are being made by somebody else stay; older ones without a lock go."""
    for name in ("making-a.x1", "making-b.x2", "making-b.x3", "making-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.arrow").touch()
    (tmp_path / "kept").mkdir()
    with alone(tmp_path / "making-a.lock"):
        sweep(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "making-a.lock", "making-a.x1"]
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def _fill(root: Path, *names: str) -> None:
    for age, name in enumerate(names):
        obtain(root / name, lambda folder: None, lambda folder: (folder / "tokens").write_bytes(b"x" * 1000) and None)
        os.utime(root / name, (1e9 - age, 1e9 - age))


def test_the_least_recently_used_are_removed_beyond_the_limit(tmp_path):
    """R15: but neither those in use nor those that were used just now."""
    _fill(tmp_path, "a", "b", "c", "d", "e")
    with hold(tmp_path / "d"):
        prune(tmp_path, 10_000)
        assert len(list(tmp_path.iterdir())) == 5
        prune(tmp_path, 2500)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "d"]
    os.utime(tmp_path / "b")
    prune(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_start_is_a_use_and_holds_its_folder(tmp_path, tokenizer, rows):
    settings = DataSettings(train=str(rows), max_length=32, on_bad_row="skip")
    for _ in range(2):
        data = prepare_data(settings, 0, tokenizer, tmp_path)
        folder = tmp_path / "tokens" / data.key
        assert time.time() - folder.stat().st_mtime < 60
        os.utime(folder, (1e9, 1e9))
        prune(folder.parent, 0)
        assert folder.is_dir()
    assert data.held is not None
    data.held.close()
    prune(folder.parent, 0)
    assert not folder.exists()


def test_an_error_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        obtain(tmp_path / "root" / "key", lambda folder: None, fail)
    assert list((tmp_path / "root").iterdir()) == []


def test_the_folder_has_the_mode_that_the_umask_says(tmp_path, tokenizer, rows):
    """S16: so that colleagues can share it."""
    old = os.umask(0o002)
    try:
        _, folder = _start(rows, tokenizer, tmp_path / "cache")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o775


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_what_belongs_to_somebody_else_is_left_alone():
    """R4: what cannot be read is not damaged, and tidying ends nothing."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o777)
    theirs = root / "theirs"
    theirs.mkdir(mode=0o700)
    (theirs / SUMS).write_text("")
    os.seteuid(65534)
    try:
        prune(root, 0, 0.0)
        sweep(root)
        with pytest.raises(StorageError, match="FSDP_QLORA_CACHE"):
            obtain(theirs, lambda folder: None, lambda folder: None)
    finally:
        os.seteuid(0)
    assert [file.name for file in theirs.iterdir()] == [SUMS]
    shutil.rmtree(root)
