"""Kill it anywhere: nothing complete is ever lost, and the next start goes on as if nothing had happened."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from fsdp_qlora.checkpoint.checkpointer import open_checkpoint
from fsdp_qlora.checkpoint.publish import complete_checkpoints
from fsdp_qlora.checkpoint.resume import whole_of
from fsdp_qlora.load.safetensors import file_digests
from tests import warm
from tests.build import essence, metrics
from tests.tiers import some_in_full
from tests.tiny import make_model, poisoned
from tools.soak import soak

KEPT = ("checkpoint.every_steps=2", "checkpoint.keep_last=1", "train.max_steps=6", "train.eval_every=2")


@pytest.fixture(scope="module")
def arguments(tiny_model, chat_rows) -> list[str]:
    """A run with dropout, accumulation, evaluations and a checkpoint every other step."""
    return [
        "train", f"model.name={tiny_model}", f"data.train={chat_rows}", "data.eval_fraction=0.1", "data.max_length=64",
        "train.global_batch_size=6", "train.micro_batch_size=1", "lora.r=4", "lora.dropout=0.1", "run.name=run",
        "launcher.device=cpu", *KEPT,
    ]  # fmt: skip


class Whole:
    """The run that nothing happened to, and what it wrote, in order."""

    def __init__(self, folder: Path, arguments: list[str], env: dict[str, str]) -> None:
        log = folder / "writes.txt"
        fault = warm.Fault(0, str(folder / "outputs"), log=str(log))
        codes, text = warm.run(arguments, folder, env, fault=fault)
        assert codes == [0, 0], text
        self.writes = log.read_text().splitlines()
        self.lines = essence(metrics(folder / "outputs/run"))
        self.adapter = (folder / "outputs/run/adapter/adapter_model.safetensors").read_bytes()

    def write(self, pattern: str) -> int:
        """Return the number of the first write that matches."""
        return next(int(line.split()[0]) for line in self.writes if re.search(pattern, line))


@pytest.fixture(scope="module")
def whole(arguments, cli_env, tmp_path_factory) -> Whole:
    """The uninterrupted run."""
    return Whole(tmp_path_factory.mktemp("whole"), arguments, cli_env)


def _fault(rank: int, folder: Path, at: int, number: int = signal.SIGKILL) -> warm.Fault:
    return warm.Fault(rank, str(folder / "outputs"), at, number)


def _resumes(folder: Path, arguments: list[str], env: dict[str, str], whole: Whole) -> None:
    """Check that what is complete is valid, and that the next start ends as the uninterrupted run did."""
    for checkpoint in complete_checkpoints(folder / "outputs/run/checkpoints"):
        open_checkpoint(checkpoint)
    codes, text = warm.run(arguments, folder, env)
    assert codes == [0, 0], text
    assert essence(metrics(folder / "outputs/run")) == whole.lines
    assert (folder / "outputs/run/adapter/adapter_model.safetensors").read_bytes() == whole.adapter
    left = {f.name for f in (folder / "outputs/run/checkpoints").iterdir()}
    assert left == {"step_00000006", "latest"}


def _kill(folder: Path, arguments: list[str], env: dict[str, str], whole: Whole, rank: int, at: int) -> None:
    codes, text = warm.run(arguments, folder, env, fault=_fault(rank, folder, at), timeout=90)
    assert codes[rank] == -signal.SIGKILL, text
    published = whole.write(r"os.rename .*COMPLETE$")
    if rank == 0 and at > published:
        assert complete_checkpoints(folder / "outputs/run/checkpoints"), "the newest complete one was lost"
    _resumes(folder, arguments, env, whole)


POINTS = {
    "before its first shard": r"open .*saving_step_00000002/shard",
    "before the manifest": r"open .*saving_step_00000004/\.manifest",
    "before the rename": r"os.rename .*saving_step_00000004 ",
    "before COMPLETE": r"os.rename .*step_00000004/\.COMPLETE\.",
    "while an old one is removed": r"os.rename .*step_00000002 .*removing",
    "before the summary": r"os.rename .*summary.json$",
}


@pytest.mark.parametrize("point", some_in_full(POINTS, ["before COMPLETE"]))
def test_rank_0_killed(whole, arguments, cli_env, tmp_path, point):
    _kill(tmp_path, arguments, cli_env, whole, 0, whole.write(POINTS[point]))


def test_rank_1_killed_before_its_second_shard(whole, arguments, cli_env, tmp_path):
    # its writes: mkdir of the staging folder and its shard, for each checkpoint
    _kill(tmp_path, arguments, cli_env, whole, 1, 4)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("share", range(6))
def test_rank_0_killed_at_every_write_point(whole, arguments, cli_env, tmp_path, share):
    for at in range(1 + share, len(whole.writes) + 1, 6):
        folder = tmp_path / str(at)
        folder.mkdir()
        codes, text = warm.run(arguments, folder, cli_env, fault=_fault(0, folder, at), timeout=90)
        if codes[0] == 0:  # cleaning up takes a write more or less from run to run
            continue
        assert codes[0] == -signal.SIGKILL, text
        if at > whole.write(r"os.rename .*COMPLETE$"):
            assert complete_checkpoints(folder / "outputs/run/checkpoints"), at
        _resumes(folder, arguments, cli_env, whole)


SIGNALS = {
    "before step 1": (signal.SIGTERM, r"os.mkdir .*outputs/run"),
    "during the first evaluation": (signal.SIGUSR1, r"open .*metrics.jsonl"),
    "during a save": (signal.SIGTERM, r"open .*saving_step_00000002/\.manifest"),
}


@pytest.mark.parametrize("moment", some_in_full(SIGNALS, ["during a save"]))
def test_a_signal_to_one_rank_stops_all_after_a_save(whole, arguments, cli_env, tmp_path, moment):
    number, pattern = SIGNALS[moment]
    fault = _fault(0, tmp_path, whole.write(pattern), number)
    codes, text = warm.run(arguments, tmp_path, cli_env, fault=fault, timeout=120)
    assert codes == [75, 75], text
    assert json.loads((tmp_path / "outputs/run/exit.json").read_text())["code"] == 75
    saved = complete_checkpoints(tmp_path / "outputs/run/checkpoints")
    assert len(saved) == (0 if moment == "before step 1" else 1)
    _resumes(tmp_path, arguments, cli_env, whole)


def test_two_signals_at_once_save_once(whole, arguments, cli_env, tmp_path):
    ranks = warm.start(arguments, tmp_path, cli_env, fault=_fault(0, tmp_path, whole.write(r"metrics.jsonl")))
    ranks.kill(signal.SIGTERM)
    ranks.kill(signal.SIGTERM)
    codes = ranks.wait(30)
    assert set(codes) <= {75, -signal.SIGTERM, -signal.SIGKILL, 1}, ranks.text()
    _resumes(tmp_path, arguments, cli_env, whole)


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_training_goes_on_once(arguments, cli_env, tmp_path):
    fault = warm.Fault(1, "", file_limit=20_000)
    run = [*arguments, "model.check=off"]  # the twin's files would meet the limit first
    codes, text = warm.run(run, tmp_path, cli_env, fault=fault, timeout=120)
    assert codes == [74, 74], text
    assert text.count("checkpoint of step 2 FAILED; older checkpoints are intact: rank 1 could not write") == 1
    assert "checkpoint of step 4 FAILED" in text and "2 saves in a row failed" in text
    assert "(raise the limit on files (ulimit -f)). The run stops." in text and "free up space" not in text
    assert [line["step"] for line in metrics(tmp_path / "outputs/run") if "loss" in line][-1] >= 4
    assert not any((tmp_path / "outputs/run/checkpoints").iterdir())  # nothing half is left


@pytest.mark.full
def test_the_fallback_folder_takes_the_last_save(whole, arguments, cli_env, tmp_path):
    (tmp_path / "outputs/run").mkdir(parents=True)
    blocker = tmp_path / "outputs/run/checkpoints"
    blocker.write_text("a file where the folder should be")
    codes, text = warm.run([*arguments, "checkpoint.fallback_dir=elsewhere"], tmp_path, cli_env, timeout=120)
    assert codes == [74, 74], text
    (saved,) = complete_checkpoints(tmp_path / "elsewhere/run")
    assert f"checkpoint.resume=elsewhere/run/{saved.name}" in text
    blocker.unlink()
    codes, text = warm.run([*arguments, f"checkpoint.resume={saved}"], tmp_path, cli_env)
    assert codes == [0, 0], text
    assert (tmp_path / "outputs/run/adapter/adapter_model.safetensors").read_bytes() == whole.adapter


def test_a_full_disk_is_seen_before_writing_and_the_older_checkpoint_stays(arguments, cli_env, tmp_path):
    disk = tmp_path / "outputs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here; the file limit and the blocked folder are tested above")
    try:
        codes, text = warm.run([*arguments, "checkpoint.keep_last=9"], tmp_path, cli_env, timeout=120)
        assert codes == [74, 74], text
        assert "are free there" in text
        saved = complete_checkpoints(disk / "run/checkpoints")
        assert saved
        for checkpoint in saved:
            open_checkpoint(checkpoint)
        assert json.loads((disk / "run/exit.json").read_text())["code"] == 74
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.full
def test_a_base_that_was_changed_between_the_samples_is_refused_by_a_resume(arguments, cli_env, tmp_path):
    """R18: and one that was only copied is taken, after it was read."""
    model = make_model(tmp_path / "large", intermediate_size=4096)  # larger than all samples together
    run = [*arguments, f"model.name={model}", "train.eval_every=0"]
    codes, text = warm.run(run, tmp_path, cli_env)
    assert codes == [0, 0], text
    manifest = open_checkpoint(tmp_path / "outputs/run/checkpoints/step_00000006").manifest
    assert whole_of(manifest.identity).keys() == {"model.safetensors"}
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    codes, text = warm.run([*run, "train.max_steps=8"], tmp_path, cli_env)
    assert codes == [0, 0] and text.count("hashing the base model's files") == 1, text
    sampled = file_digests(model)
    data = bytearray(weights.read_bytes())
    data[-200_000:-199_998] = b"\0\0"
    weights.write_bytes(bytes(data))
    assert file_digests(model) == sampled, "the samples do not see it"
    codes, text = warm.run([*run, "train.max_steps=9"], tmp_path, cli_env)
    assert codes == [2, 2] and f"{weights} is not the file that" in text, text


@pytest.mark.full
def test_a_full_disk_at_a_line_of_metrics_stops_the_run_after_a_save(arguments, cli_env, tmp_path):
    """R12: 74 with the path, no step lost, and the same command goes on."""
    file, small = tmp_path / "outputs/run/metrics.jsonl", tmp_path / "small"
    file.parent.mkdir(parents=True)
    small.mkdir()
    file.touch()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "x", str(small)], check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here; tests/unit/test_unwritten.py has the parts")
    (small / "filler").write_bytes(b"x" * 4096)
    (small / "metrics.jsonl").touch()  # one page is left for it
    run = [*arguments, "train.max_steps=40", "checkpoint.every_steps=100", "train.eval_every=0"]
    try:
        subprocess.run(["mount", "--bind", str(small / "metrics.jsonl"), str(file)], check=True)
        codes, text = warm.run(run, tmp_path, cli_env, timeout=120)
    finally:
        subprocess.run(["umount", str(file)], check=False)
        subprocess.run(["umount", str(small)], check=False)
    assert codes == [74, 74], text
    assert f"{file} cannot be written: No space left on device" in text and "The run was saved and stopped" in text
    (saved,) = complete_checkpoints(tmp_path / "outputs/run/checkpoints")
    assert 5 < int(saved.name[5:]) < 40
    codes, text = warm.run(run, tmp_path, cli_env, timeout=120)
    assert codes == [0, 0], text
    assert [line["step"] for line in metrics(tmp_path / "outputs/run")][-1] == 40


@pytest.mark.parametrize("policy", some_in_full(["stop", "skip", "rollback"], ["skip"]))
def test_a_sample_that_makes_nan(arguments, tiny_model, chat_rows, cli_env, tmp_path, policy):
    model, file, bad = poisoned(tiny_model, chat_rows, tmp_path)
    run = [
        *arguments, f"model.name={model}", f"data.train={file}", "data.eval_fraction=0", "train.eval_every=0",
        "train.max_steps=10", f"train.on_nonfinite={policy}", "checkpoint.every_steps=3",
    ]  # fmt: skip
    codes, text = warm.run(run, tmp_path, cli_env, timeout=180)
    lines = metrics(tmp_path / "outputs/run")
    steps = [line["step"] for line in lines if "loss" in line]
    where = f"layers.0.input_layernorm is the first module whose output is not finite, for training row(s) {bad}."
    if policy == "stop":
        assert codes == [1, 1] and where in text and "the parameters were not updated" in text, text
        assert json.loads((tmp_path / "outputs/run/exit.json").read_text())["code"] == 1
        return
    assert codes == [0, 0], text
    (event,) = [line for line in lines if "bad_step" in line]
    assert where in event["reason"]
    assert steps == list(range(1, 11))
    first, after = event["left_out"]
    assert after - first == (6 if policy == "skip" else 6 * (event["bad_step"] - event["step"]))
    summary = json.loads((tmp_path / "outputs/run/summary.json").read_text())
    assert summary["rows_left_out"] == after - first


@pytest.mark.full
def test_other_settings_on_purpose_and_a_start_from_an_old_adapter(whole, arguments, cli_env, tmp_path):
    codes, text = warm.run(arguments, tmp_path, cli_env)
    assert codes == [0, 0], text
    longer = [*arguments, "train.max_steps=8", "optim.lr=1e-3"]
    codes, text = warm.run(longer, tmp_path, cli_env)
    assert codes == [2, 2] and "checkpoint.resume_overrides=[optim.lr]" in text, text
    codes, text = warm.run([*longer, "checkpoint.resume_overrides=[optim.lr]"], tmp_path, cli_env)
    assert codes == [0, 0], text
    lines = metrics(tmp_path / "outputs/run")
    assert essence(lines)[: len(whole.lines)] == whole.lines and lines[-1]["step"] == 8

    start = [*arguments, "run.name=second", "lora.init_from=outputs/run/adapter", "train.max_steps=2"]
    codes, text = warm.run(start, tmp_path, cli_env)
    assert codes == [0, 0], text
    before = [json.loads((tmp_path / f"outputs/{n}/summary.json").read_text()) for n in ("run", "second")]
    assert abs(before[1]["eval_loss_before"] - before[0]["eval_loss_after"]) < 1e-6
    codes, text = warm.run([*start, "run.name=third", "lora.alpha=64"], tmp_path, cli_env)
    assert codes == [2, 2] and "lora.alpha: 64.0, but the adapter" in text, text


@pytest.mark.full
def test_inspect_shows_one_and_compares_two(arguments, cli_env, tmp_path):
    codes, text = warm.run([*arguments, "checkpoint.keep_last=3"], tmp_path, cli_env)
    assert codes == [0, 0], text
    folder = tmp_path / "outputs/run/checkpoints"

    def inspect(*paths: Path) -> tuple[int, str]:
        codes, text = warm.run(["inspect", *map(str, paths)], tmp_path, cli_env, num_ranks=1)
        return codes[0], text

    code, text = inspect(tmp_path / "outputs/run")
    assert code == 0 and "every sha256 matches" in text and "progress.position" in text
    assert inspect(folder / "step_00000004", folder / "step_00000004")[0] == 0
    code, text = inspect(folder / "step_00000004", folder / "step_00000006")
    assert code == 1 and "max |a-b|" in text and "0 tensors are bit-equal" in text
    (folder / "step_00000004/adapter/README.md").write_text("changed")
    code, text = inspect(folder / "step_00000004")
    assert code == 65 and "README.md is damaged" in text
    assert inspect(tmp_path / "nowhere")[0] == 65
    assert (folder / "latest").read_text() == "step_00000006\n"


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_short_soak(cli_env, tmp_path):
    result = soak(4, seed=1, folder=tmp_path, env=cli_env, steps=40, moments=(1.5, 4.0))
    assert result.resumed_from_a_checkpoint >= 1 and result.slowest_end < 10
