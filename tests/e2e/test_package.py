"""What is given away: the wheel, the adapter in plain PEFT, W&B's run, the README's commands."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build import losses, metrics
from tests.conftest import ROOT

pytestmark = pytest.mark.launch


@pytest.mark.full
def test_a_wheel_installed_elsewhere_trains(tiny_run, cli_env, tmp_path):
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is in the dev extra")
    wheel = next(hatchling.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    home = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = str(home / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    inside = Path(subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip())  # fmt: skip
    # Its dependencies are those of this environment, as a path of its own: nothing of the checkout is on it.
    (inside / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    env = {k: v for k, v in cli_env.items() if k != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import fsdp_qlora; print(fsdp_qlora.__file__)"], cwd=tmp_path, env=env, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    assert where.startswith(str(home))
    tool = str(home / "bin" / "fsdp-qlora")
    for arguments in (["train", "--help"], ["train", *tiny_run, "train.max_steps=2"]):
        result = subprocess.run(
            [tool, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, check=False
        )
        assert result.returncode == 0, result.stderr
    assert len(losses(metrics(tmp_path / "outputs/tiny"))) == 2


PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
torch.set_num_threads(2)
dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[sys.argv[3]]
adapter, rows = sys.argv[1], [json.loads(line) for line in open(sys.argv[2])]
base_name = json.load(open(adapter + "/adapter_config.json"))["base_model_name_or_path"]
quant = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
base = AutoModelForCausalLM.from_pretrained(base_name, quantization_config=quant, dtype=dtype)
model = PeftModel.from_pretrained(base, adapter).eval()
for module in model.modules():  # bitsandbytes repacks itself for inference on some CPUs
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
tokenizer = AutoTokenizer.from_pretrained(adapter)
total, count = 0.0, 0
for row in rows:
    ids, learned = torch.tensor([row["input_ids"]]), torch.tensor([row["learned"]])
    with torch.no_grad():
        logits = model(ids).logits.double()  # float32 sums over 262,144 tokens are off by 1e-5 by themselves
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    total += float(loss[learned[0, 1:]].sum())
    count += int(learned[0, 1:].sum())
assert "fsdp_qlora" not in sys.modules
print(json.dumps({"loss": total / count, "targets": count}))
"""


def plain_loss(run_folder: Path, env: dict[str, str], tmp_path: Path, precision: str = "bf16") -> dict:
    """Return the loss of a run's held-out rows by transformers, bitsandbytes and PEFT alone, in another process."""
    import numpy as np
    from datasets import Dataset

    (folder,) = (Path(env["FSDP_QLORA_CACHE"]) / "tokens").iterdir()
    held_out = Dataset.from_file(str(folder / "tokens.arrow")).select(np.load(folder / "eval.npy"))
    rows = tmp_path / "held_out.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    result = subprocess.run(
        [sys.executable, str(script), str(run_folder / "adapter"), str(rows), precision], cwd=tmp_path, text=True,
        capture_output=True, timeout=400, check=False, env={k: v for k, v in env.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_adapter_in_plain_peft_has_the_trainers_loss(cli, cli_env, tiny_run, tmp_path):
    cache = {"FSDP_QLORA_CACHE": str(tmp_path / "cache")}
    settings = [*tiny_run, "train.max_steps=12", "optim.lr=5e-3", "data.eval_fraction=0.3"]
    result = cli("train", *settings, num_ranks=2, **cache)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "outputs/tiny/summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.05
    found = plain_loss(tmp_path / "outputs/tiny", {**cli_env, **cache}, tmp_path)
    assert abs(found["loss"] - summary["eval_loss_after"]) < 0.01 * summary["eval_loss_after"]
    config = json.loads((tmp_path / "outputs/tiny/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and "q_proj" in config["target_modules"]
    assert (tmp_path / "outputs/tiny/adapter/README.md").read_text().startswith("---\nbase_model:")


@pytest.mark.full
def test_wandb_offline_on_rank_0_with_no_secret_in_any_file(cli, tiny_run, tmp_path):
    canary = "canary-5f3a9d"
    result = cli("train", *tiny_run, "track=wandb", num_ranks=2, HF_TOKEN=canary, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    runs = list((tmp_path / "outputs/tiny/wandb").glob("offline-run-*"))
    assert len(runs) == 1
    identity = (tmp_path / "outputs/tiny/wandb_run_id").read_text()
    assert runs[0].name.endswith(identity)
    for file in (tmp_path / "outputs").rglob("*"):
        if file.is_file():
            assert canary.encode() not in file.read_bytes(), file
    assert canary not in result.stdout + result.stderr
    again = cli("train", *tiny_run, "track=wandb", "train.max_steps=6", num_ranks=2, WANDB_MODE="offline")
    assert again.returncode == 0, again.stderr  # W&B has put links to its own logs into the run folder


def readme_commands() -> list[str]:
    """Return the commands of README's bash blocks, one each."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def test_readme_commands_are_there():
    commands = readme_commands()
    assert any("torchrun" in c for c in commands) and any("generate" in c for c in commands)
    targets = re.findall(r"^make ([a-z-]+)", "\n".join(commands), flags=re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert {"train", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_readme_commands_run(real_model, cli_env, tmp_path):
    """Every command as it stands, in order, on the embedded model; training ones are cut to two steps."""
    short = "train.max_steps=2 data.max_rows=60 train.sample_prompts=[] train.eval_every=0 data.max_length=64"
    env = {
        **cli_env,
        "FSDP_QLORA_CACHE": os.environ.get("FSDP_QLORA_CACHE", str(Path("~/.cache/fsdp_qlora").expanduser())),
    }
    for folder in ("examples", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "fsdp-qlora"
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fsdp_qlora "$@"\n')
    tool.chmod(0o755)
    env["PATH"] = f"{tool.parent}{os.pathsep}{env['PATH']}"
    for written in readme_commands():
        if written.startswith(("make ", "pip ", "git ", "cd ")):
            continue
        command = written
        if re.search(r" (train|evaluate) ", written) and "--config-dir" not in written:
            command = f"{written} {short}"
        elif " generate " in written:
            command = f"{written} generate.max_new_tokens=3"
        result = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
