"""Sweeps: a folder for each combination, one comparison; killed and started again they go on; a search by Optuna."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

NAMES = ["lora.r=2,optim.lr=0.001", "lora.r=2,optim.lr=0.01", "lora.r=4,optim.lr=0.001", "lora.r=4,optim.lr=0.01"]


def record(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def wait_for(file: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not file.is_file():
        assert time.monotonic() < until, f"{file} did not come"
        time.sleep(0.1)


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_a_sweep_killed_in_the_middle_goes_on_and_skips_what_is_done(cli, cli_env, tiny_run, tmp_path):
    folder, words = tmp_path / "outputs/tiny", ["train", "-m", *tiny_run, "optim.lr=1e-3,1e-2", "lora.r=2,4"]
    words += ["checkpoint.every_steps=1"]
    with (tmp_path / "first.txt").open("w") as output:
        command = [sys.executable, "-m", "fsdp_qlora", *words]
        first = subprocess.Popen(command, cwd=tmp_path, env=cli_env, stdout=output, stderr=output)
        wait_for(folder / NAMES[0] / "summary.json", 1200)
        wait_for(folder / NAMES[2] / "checkpoints/step_00000001/COMPLETE", 1200)
        first.kill()  # without a chance to end its job
        first.wait()
    before = (folder / NAMES[0] / "summary.json").stat().st_mtime_ns
    again = cli(*words, timeout=2800)
    assert again.returncode == 0, again.stderr + again.stdout
    assert sorted(path.parent.name for path in folder.glob("*/summary.json")) == sorted(NAMES)
    assert (folder / NAMES[0] / "summary.json").stat().st_mtime_ns == before
    assert again.stdout.count("finished before") >= 1 and "tiny: 4 of 4 jobs" in again.stdout
    steps = [json.loads(line)["step"] for line in (folder / NAMES[2] / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [0, 1, 2, 3, 4]
    jobs = record(folder)
    losses = {name: jobs[name]["values"]["eval_loss_after"] for name in NAMES}
    assert losses == {n: json.loads((folder / n / "summary.json").read_text())["eval_loss_after"] for n in NAMES}
    best = min(losses, key=lambda name: losses[name])
    assert f"best: {best} (eval_loss_after {losses[best]:.4f})" in again.stdout
    started = time.monotonic()
    third = cli(*words)
    assert third.returncode == 0 and third.stdout.count("finished before") == 4, third.stderr
    assert time.monotonic() - started < 60 and f"best: {best}" in third.stdout


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_a_job_that_fails_ends_none_of_the_others_and_the_exit_code_says_so(cli, tiny_run, tmp_path):
    words = ["train", "-m", *tiny_run, "train.max_steps=2", "lora.r=0,2", "optim.lr=1e36,1e-3"]
    words += ["launcher.nproc_per_node=2"]
    done = cli(*words, timeout=2800)
    folder = tmp_path / "outputs/tiny"
    assert done.returncode == 1, done.stderr + done.stdout
    assert done.stderr.count("not run: ") == 2 and "lora.r: must be above 0" in done.stderr
    assert (folder / "lora.r=2,optim.lr=0.001/summary.json").is_file()
    codes = {name: outcome["code"] for name, outcome in record(folder).items()}
    assert codes == {"lora.r=2,optim.lr=1e+36": 1, "lora.r=2,optim.lr=0.001": 0}
    compared = done.stdout[done.stdout.index("tiny: 2 of 2 jobs") :]
    assert "failed (1)" in compared and "best: lora.r=2,optim.lr=0.001" in compared
    assert max(map(len, compared[: compared.index("└")].splitlines())) <= 80, compared


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_a_search_of_four_trials_runs_and_goes_on(cli, tiny_run, tmp_path):
    pytest.importorskip("optuna", reason="needs the package optuna: pip install 'fsdp-qlora[optuna]'")
    words = ["train", "-m", *tiny_run, "train.max_steps=2", "optim.lr=tag(log,interval(1e-4,1e-1))", "lora.r=2,4"]
    folder = tmp_path / "outputs/tiny"
    first = cli(*words, "sweep.trials=2", timeout=2800)
    assert first.returncode == 0 and "tiny: 2 of 2 jobs" in first.stdout, first.stderr + first.stdout
    then = cli(*words, "sweep.trials=4", timeout=2800)
    assert then.returncode == 0 and "tiny: 4 of 4 jobs" in then.stdout, then.stderr + then.stdout
    jobs = record(folder)
    assert len(jobs) == len(list(folder.glob("*/summary.json"))) == 4
    rates = [float(choice.partition("=")[2]) for each in jobs.values() for choice in each["choices"] if "lr" in choice]
    assert len(set(rates)) == 4 and all(1e-4 <= rate <= 1e-1 for rate in rates)
    best = min(each["values"]["eval_loss_after"] for each in jobs.values())
    assert f"(eval_loss_after {best:.4f})" in then.stdout
    started = time.monotonic()
    third = cli(*words, "sweep.trials=4")
    assert third.returncode == 0 and "4 of 4 jobs" in third.stdout and time.monotonic() - started < 60


@pytest.mark.full
def test_ranks_of_torchrun_do_not_sweep(cli, tiny_run):
    done = cli("train", "-m", *tiny_run, "lora.r=2,4", num_ranks=2)
    assert done.returncode == 2 and "fsdp-qlora train -m" in done.stdout, done.stdout
    assert "lora.r=2,4 launcher.nproc_per_node=2" in done.stdout


@pytest.mark.full
def test_an_interval_needs_a_number_of_trials(cli, tiny_run):
    done = cli("train", "-m", *tiny_run, "optim.lr=interval(1e-4,1e-2)")
    assert done.returncode == 2 and "sweep.trials=20" in done.stderr
