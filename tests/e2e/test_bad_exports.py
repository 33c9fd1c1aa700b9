"""Exports that cannot be finished: one message, the right exit code, nothing lost, and no half taken for a whole."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import peft
import pytest

from tests import warm
from tests.build import run_fit
from tests.distributed.test_merged import lora, write_adapter
from tests.tiny import make_model

pytestmark = [pytest.mark.launch, pytest.mark.full]
KINDS = ("adapter", "for_vllm", "plain_lora", "base-4bit", "started", "merged", "served")
LIMIT = 6_000
"""Bytes of the largest file that a full disk takes: less than any weights, more than what is printed."""


@pytest.fixture(scope="module")
def world(pool: Any, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, adapters of stock PEFT, and a run whose adapter started from the base."""
    folder = tmp_path_factory.mktemp("exports")
    base = make_model(folder / "base", intermediate_size=384)
    write_adapter(base, folder / "adapter", lora())
    patterns = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    write_adapter(base, folder / "patterns", patterns)
    groups = {
        "lora": {"init_lora_weights": "pissa"}, "data": {"train": str(chat_rows)}, "checkpoint": {"every_steps": 2},
    }  # fmt: skip
    pool.run(1, run_fit, str(base), str(folder), "run", groups)
    return folder


def words(kind: str, world: Path, target: Path) -> list[str]:
    """Return a command that exports to ``target``."""
    given = {
        "adapter": [f"adapter={world}/adapter"],
        "for_vllm": [f"adapter={world}/patterns", "export.for_vllm=true"],
        "plain_lora": [f"adapter={world}/run/adapter", "export.plain_lora=true"],
        "base-4bit": ["what=base-4bit", f"model.name={world}/base"],
        "started": ["what=base-4bit", f"adapter={world}/run/adapter"],
        "merged": ["what=merged", f"adapter={world}/adapter"],
        "served": ["what=served", f"adapter={world}/adapter"],
    }[kind]
    return ["export", *given, f"export.to={target}", "launcher.device=cpu"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def export(
    kind: str, world: Path, target: Path, env: dict[str, str], fault: warm.Fault | None = None, *more: str
) -> tuple[int, str]:
    home = target.parent
    home.mkdir(exist_ok=True)
    codes, text = warm.run([*words(kind, world, target), *more], home, env, 1, fault, timeout=400)
    (home / "rank0.txt").unlink()
    return codes[0], text


def messages(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("fsdp-qlora, rank 0:")]


@pytest.mark.parametrize("kind", KINDS)
def test_no_space_is_one_message_and_leaves_nothing(cli_env, world, tmp_path, kind):
    target, before = tmp_path / "out/target", content(world)
    code, text = export(kind, world, target, cli_env, warm.Fault(0, "", file_limit=LIMIT))
    assert code == 74 and len(messages(text)) == 1 and "Traceback" not in text, text
    assert str(target) in messages(text)[0] and not list(target.parent.iterdir())
    assert content(world) == before
    assert export(kind, world, target, cli_env)[0] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 16 KiB, less than any export; the test is skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full(cli_env, world, small_disk, kind):
    target = small_disk / "target"
    codes, text = warm.run(words(kind, world, target), small_disk.parent, cli_env, 1, timeout=400)
    assert codes == [74] and len(messages(text)) == 1 and "Traceback" not in text, text
    assert "No space left" in text and not list(small_disk.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_empty_is_left_as_it_is(cli_env, world, tmp_path, kind):
    target = tmp_path / "out/target"
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("mine")
    for more in ((), ("export.overwrite=true",)):
        code, text = export(kind, world, target, cli_env, None, *more)
        assert code == 2 and len(messages(text)) == 1 and "export.to:" in text, text
        assert content(target) == {"mine.txt": b"mine"} and len(list(target.parent.iterdir())) == 1
    shutil.rmtree(target)
    assert export(kind, world, target, cli_env)[0] == 0
    first = content(target)
    (target / "stale.json").write_text("{}")
    code, text = export(kind, world, target, cli_env)
    assert code == 2 and "export.overwrite=true" in text
    assert export(kind, world, target, cli_env, None, "export.overwrite=true")[0] == 0
    assert content(target) == first and len(list(target.parent.iterdir())) == 1


def _points(total: int) -> list[int]:
    """Return write points spread over an export, with its first and last ones."""
    spread = [total * part // 6 for part in range(1, 6)]
    return sorted({1, 2, *spread, total - 1, total} - {0})


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_several_points_and_started_again(cli_env, world, tmp_path, kind):
    target, log = tmp_path / "out/target", tmp_path / "writes"
    assert export(kind, world, target, cli_env, warm.Fault(0, str(target.parent), log=str(log)))[0] == 0
    whole, total = content(target), len(log.read_text().splitlines())
    (target / "stale.json").write_text("{}")
    old = content(target)
    for at, overwrite in itertools.product(_points(total), (False, True)):
        shutil.rmtree(target.parent)
        if overwrite:
            for name, data in old.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(data)
        more = ["export.overwrite=true"] if overwrite else []
        code, _ = export(kind, world, target, cli_env, warm.Fault(0, str(target.parent), at=at), *more)
        assert code == -9, (at, overwrite)
        if target.exists():
            assert content(target) in ([old, whole] if overwrite else [whole]), (at, overwrite)
    assert export(kind, world, target, cli_env, None, "export.overwrite=true")[0] == 0
    assert content(target) == whole


@pytest.mark.parametrize("what", ["adapter", "merged", "served"])
def test_a_broken_run_folder(cli, world, tmp_path, what):
    shutil.copytree(world / "run", tmp_path / "outputs/run")
    run = [f"what={what}", "run.name=run", f"model.name={world}/base", "export.to=out", "launcher.device=cpu"]
    checkpoints = tmp_path / "outputs/run/checkpoints"
    newest = sorted(checkpoints.glob("step_*"))[-1]
    weights = newest / "adapter/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for damage, code, said in (
        (lambda: None, 65, str(newest)),
        (lambda: shutil.rmtree(newest / "adapter"), 65, str(newest)),
        (lambda: shutil.rmtree(checkpoints), 65, "holds no complete checkpoint"),
        (lambda: shutil.rmtree(tmp_path / "outputs"), 65, "holds no complete checkpoint"),
    ):
        damage()
        done = cli("export", *run)
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not os.path.lexists(tmp_path / "out")


def test_adapters_that_are_none_or_of_another_base(cli, world, tmp_path):
    other = make_model(tmp_path / "other", intermediate_size=448)
    broken = tmp_path / "broken"
    shutil.copytree(world / "adapter", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    bad = {
        "none": (f"adapter={tmp_path}/other", "adapter:"),
        "broken": (f"adapter={broken}", "is damaged"),
        "other": (f"adapter={world}/adapter", "adapter:"),
    }
    for what, (word, said) in itertools.product(("adapter", "merged", "served", "base-4bit"), bad.values()):
        if what == "adapter" and word == bad["other"][0]:
            continue  # a copy needs no base
        done = cli("export", f"what={what}", word, f"model.name={other}", "export.to=out", "launcher.device=cpu")
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, (what, done.stderr)
        assert not (tmp_path / "out").exists()
    done = cli(
        "export", f"adapter={world}/run/adapter", f"model.name={other}", "export.plain_lora=true", "export.to=out"
    )
    assert done.returncode == 2 and "was trained on another base than" in done.stderr, done.stderr
    done = cli("export", "what=base-4bit", f"adapter={world}/run/adapter", f"model.name={other}", "export.to=out")
    assert done.returncode == 2 and "not of this base" in done.stderr and not (tmp_path / "out").exists(), done.stderr
