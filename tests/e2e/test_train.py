"""`train` as a person starts it: two ranks, stopped, resumed, killed, started twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.build import losses, metrics
from tests.processes import alive, rank_pid, ranks_of, start, wait_for_step
from tests.tolerances import BF16_LOSSES, close

pytestmark = pytest.mark.launch


def test_stopped_by_sigterm_and_resumed(cli, cli_env, tiny_run, tmp_path):
    long = [*tiny_run, "train.max_steps=30", "lora.dropout=0.1", "train.eval_every=10"]
    whole = cli("train", *long, "run.name=whole", num_ranks=2)
    assert whole.returncode == 0, whole.stderr
    expected = metrics(tmp_path / "outputs/whole")

    split = [*long, "run.name=split"]
    process = start(["train", *split, "launcher.nproc_per_node=2"], cli_env, tmp_path)
    wait_for_step(tmp_path / "outputs/split/metrics.jsonl", 7, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 75, out + err
    folder = tmp_path / "outputs/split"
    assert json.loads((folder / "exit.json").read_text())["code"] == 75
    stopped = metrics(folder)
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    assert int(checkpoint.name[5:]) == stopped[-1]["step"] < 30
    assert not list(checkpoint.glob("*.pt")) and not list(checkpoint.glob(".metadata"))
    before = (folder / "metrics.jsonl").read_text()

    # on one rank first, in a copy: the same numbers but for the order of additions
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(tmp_path / "outputs"), str(copy)], check=True)
    one = cli("train", *split, f"run.output_root={copy}", "launcher.nproc_per_node=1")
    assert one.returncode == 0, one.stderr
    found = losses(metrics(copy / "split"))
    assert len(found) == 30
    assert close(found, losses(expected), BF16_LOSSES)

    again = cli("train", *split, num_ranks=2)
    assert again.returncode == 0, again.stderr
    resumed = metrics(folder)
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    keep = ("step", "loss", "grad_norm", "lr", "tokens", "target_tokens", "eval_loss")
    trimmed = [[{k: m[k] for k in keep if k in m} for m in lines] for lines in (resumed, expected)]
    assert trimmed[0] == trimmed[1]
    weights = [(tmp_path / f"outputs/{n}/adapter/adapter_model.safetensors").read_bytes() for n in ("whole", "split")]
    assert weights[0] == weights[1]

    third = cli("train", *split, num_ranks=2)
    assert third.returncode == 0 and "nothing to do" in third.stdout

    changed = cli("train", *long, "run.name=split", "train.max_steps=40", "optim.lr=1e-3", num_ranks=2)
    assert changed.returncode == 2
    assert "optim.lr: 0.0002 in the checkpoint, 0.001 now" in changed.stderr


@pytest.mark.full
def test_torchrun_and_the_launcher_do_the_same(cli, cli_env, tiny_run, tmp_path):
    mine = cli("train", *tiny_run, "run.name=mine", "launcher.nproc_per_node=2", cold=True)
    assert mine.returncode == 0, mine.stderr
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fsdp_qlora",
        "train", *tiny_run, "run.name=theirs",
    ]  # fmt: skip
    theirs = subprocess.run(
        torchrun, cwd=tmp_path, env=cli_env, capture_output=True, text=True, timeout=400, check=False
    )
    assert theirs.returncode == 0, theirs.stderr
    names = ("mine", "theirs")
    found = [losses(metrics(tmp_path / "outputs" / n)) for n in names]
    assert found[0] == found[1] and len(found[0]) == 4
    summary = json.loads((tmp_path / "outputs/mine/summary.json").read_text())
    assert {"eval_loss_before", "eval_loss_after", "tokens_per_second", "trainable_parameters"} <= summary.keys()
    assert [r["rank"] for r in summary["ranks"]] == [0, 1]
    assert {"bytes_read", "quantized_bytes", "peak_memory_bytes"} <= summary["ranks"][0].keys()
    line = metrics(tmp_path / "outputs/mine")[1]
    assert set(line) == {
        "time", "step", "loss", "grad_norm", "lr", "tokens", "target_tokens", "tokens_per_second", "step_seconds",
        "peak_memory_bytes",
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == ["mine", "theirs"]

    again = cli("train", "run_from=outputs/mine/config.yaml", "run.name=again", num_ranks=2)
    assert again.returncode == 0, again.stderr
    assert losses(metrics(tmp_path / "outputs/again")) == found[0]

    exported = cli("export", "run.name=mine", "export.to=given")
    assert exported.returncode == 0, exported.stderr
    weights = [tmp_path / f / "adapter_model.safetensors" for f in ("given", "outputs/mine/adapter")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    adapter = "adapter=outputs/mine/adapter"
    said = cli("generate", "prompt=What's up, world (a=b)? é {x: [1,2]}", adapter, "generate.max_new_tokens=5")
    assert said.returncode == 0 and "[transformers]" not in said.stderr, said.stderr
    evaluated = cli("evaluate", *tiny_run, adapter, "evaluate.json=eval.json")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads((tmp_path / "eval.json").read_text())
    assert set(found) == {"eval_loss", "eval_perplexity", "target_tokens", "sources"}
    assert abs(found["eval_loss"] - summary["eval_loss_after"]) < BF16_LOSSES * summary["eval_loss_after"]


def test_a_killed_rank_ends_all_and_is_named(cli_env, tiny_run, tmp_path):
    process = start(["train", *tiny_run, "train.max_steps=5000", "launcher.nproc_per_node=2"], cli_env, tmp_path)
    wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 3, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    victim = rank_pid(process, 1)
    started = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - started < 10
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in err.strip().splitlines()[-1]
    assert not any(alive(pid) for pid in ranks)


FAULT = """
import os, sys, threading, time
def plant():
    while True:
        loader = sys.modules.get("fsdp_qlora.data.loader")
        if loader is not None and hasattr(loader, "build_batch"):
            break
        time.sleep(0.001)
    from fsdp_qlora.errors import DataError
    real = loader.TokenRows.collate
    seen = []
    def collate(self, *chosen):
        seen.append(1)
        if len(seen) > 12:
            raise DataError("planted: row 7 is bad")
        return real(self, *chosen)
    loader.TokenRows.collate = collate
if os.environ.get("RANK") == "1":
    threading.Thread(target=plant, daemon=True).start()
"""


@pytest.mark.full
def test_a_failing_rank_ends_all_with_its_message_last(cli, tiny_run, tmp_path, cli_env):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULT)
    path = f"{tmp_path / 'site'}{os.pathsep}{cli_env['PYTHONPATH']}"
    run = ["train", *tiny_run, "train.max_steps=5000", "data.eval_fraction=0", "launcher.nproc_per_node=2"]
    started = time.monotonic()
    result = cli(*run, cold=True, PYTHONPATH=path)
    assert time.monotonic() - started < 60
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == "fsdp-qlora, rank 1: planted: row 7 is bad"
    assert json.loads((tmp_path / "outputs/tiny/exit.json").read_text())["message"] == "planted: row 7 is bad"


@pytest.mark.full
def test_ranks_die_with_their_launcher_and_the_folder_is_free_again(cli, cli_env, tiny_run, tmp_path):
    run = ["train", *tiny_run, "train.max_steps=5000", "launcher.nproc_per_node=2"]
    process = start(run, cli_env, tmp_path)
    wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 2, process)
    ranks = ranks_of(process)
    second = cli("train", *tiny_run)
    assert second.returncode == 2
    assert ("is in use by process" in second.stderr and str(ranks[0]) in second.stderr) or str(
        ranks[1]
    ) in second.stderr
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in ranks)
    assert cli("train", *tiny_run, "train.max_steps=1", "run.name=tiny").returncode == 0


def test_plan_and_hydras_own_flags(cli, tiny_run):
    plan = cli("plan", *tiny_run, "plan.json=true", "plan.world_size=2", "plan.gpu=24GiB", "plan.simulate=true")
    found = json.loads(plan.stdout)
    assert found["fits"] is True
    assert set(found["bytes_per_rank"]) == {
        "base_packed", "base_statistics", "base_kept", "base_dense", "adapters", "gradients", "optimizer", "activations", "logits",
        "gather",
    }  # fmt: skip
    assert {"reserve_bytes", "peak_planned_bytes", "peak_simulated_bytes"} <= found.keys()
    assert found["peak_simulated_bytes"] == sum(found["simulation"]["bytes"].values()) > 0
    assert found["simulation"]["layers"] == [2] and found["simulation"]["place"]
    assert found["simulation"]["host_peak_bytes"] == 0  # nothing is offloaded, and fused AdamW counts on the device
    offloaded = cli(
        "plan", *tiny_run, "plan.world_size=2", "plan.gpu=24GiB", "plan.simulate=true", "fsdp.offload=params"
    )
    assert offloaded.returncode == 0, offloaded.stderr
    assert "simulated host memory per rank" in offloaded.stdout
    shown = cli("train", "optim.lr=1e-4", "--cfg", "job")
    assert shown.returncode == 0 and "lr: 0.0001" in shown.stdout
    helped = cli("train", "--help")
    assert helped.returncode == 0 and "fsdp-qlora train" in helped.stdout


@pytest.mark.full
def test_multirun_gives_each_job_a_folder(cli, tiny_run, tmp_path):
    result = cli("train", "-m", *tiny_run, "train.max_steps=1", "lora.r=2,4")
    assert result.returncode == 0, result.stderr + result.stdout
    summaries = sorted((tmp_path / "outputs/tiny").glob("*/summary.json"))
    assert len(summaries) == 2
    counts = [json.loads(s.read_text())["trainable_parameters"] for s in summaries]
    assert counts[1] == 2 * counts[0] or counts[0] == 2 * counts[1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("setting", "said", "before"),
    [
        ("train.kernels=compile", "train.kernels=compile: each rank compiles norms", "3 rank(s) on cpu"),
        ("train.compile=true", "train.compile: each rank compiles the decoder layers", "step 1/2"),
    ],
)
def test_a_run_that_compiles_says_so_before_it_goes_quiet(cli, tiny_run, setting, said, before):
    run = [*tiny_run, setting, "train.max_steps=2", "launcher.nproc_per_node=3"]
    done = cli("train", *run, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index(said) < done.stdout.index(before) < done.stdout.index("tiny: done")
    assert said not in cli("train", *run, f"{setting.partition('=')[0]}=auto", "checkpoint.resume=never").stdout
