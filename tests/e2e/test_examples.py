"""Every example runs as its header says, and shows what it promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.test_merged import lora, write_adapter
from tests.serving import ask, require_server, served
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.launch


def run(command: list[str], environment: dict[str, str], folder: Path, timeout: float = 400) -> str:
    """Run a command in ``folder``; return what it printed, and fail with all it said if it failed."""
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def numbers(line: str) -> list[int]:
    return [int(word.replace(",", "")) for word in re.findall(r"\d[\d,]*", line)]


def table(output: str) -> dict[str, list[int]]:
    """Return the rows of a printed table by their first word."""
    return {line.split()[0]: numbers(line) for line in output.splitlines() if line.strip()}


def require_adapter(folder: Path, base: Path) -> None:
    """Check that ``folder`` is a PEFT adapter for ``base`` and that it was trained (B starts at zero)."""
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    trained = [name for name, tensor in tensors.items() if ".lora_B." in name and bool(tensor.any())]
    assert tensors
    assert 2 * len(trained) == len(tensors)


def test_own_data_rows_are_varied_and_well_formed():
    rows = [json.loads(line) for line in (EXAMPLES / "own_data" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) >= 40
    first_questions = {next(m["content"] for m in row["messages"] if m["role"] == "user") for row in rows}
    assert len(first_questions) == len(rows)
    for row in rows:
        roles = [m["role"] for m in row["messages"] if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in row["messages"])


@pytest.mark.full
def test_own_data(tiny_model: Path, cli_env: dict[str, str], tmp_path: Path):
    command = [sys.executable, "-m", "fsdp_qlora", "train", "--config-dir", "examples/own_data", "experiment=my_run"]
    changes = [f"model.name={tiny_model}", f"run.output_root={tmp_path}", "train.max_steps=2"]
    changes += ["data.max_length=384", "launcher.device=cpu"]  # the tiny tokenizer makes more tokens of a row
    output = run([*command, *changes], cli_env, ROOT)
    assert "larkbox: done" in output
    folder = tmp_path / "larkbox"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["data"] == {"train": ["examples/own_data/rows.jsonl"], "rows": 36}
    asked, *held_out = summary["samples"]
    assert asked["prompt"] == "How warm does the Larkbox get?" and len(held_out) == 3
    assert all(sample["wanted"] for sample in held_out) and summary["verdict"]["text"] in " ".join(output.split())
    assert len(summary["ranks"]) == 2
    require_adapter(folder / "adapter", tiny_model)


def test_plan_on_a_laptop(tiny_model: Path, cli_env: dict[str, str], tmp_path: Path):
    bare = tmp_path / "only-config"
    bare.mkdir()
    (bare / "config.json").write_text((tiny_model / "config.json").read_text())
    output = run([sys.executable, str(EXAMPLES / "plan_on_a_laptop.py"), str(bare)], cli_env, tmp_path)
    rows = table(output)
    assert rows["bytes"] == [1, 2, 4, 8]
    for kind in ("adapters", "optimizer", "base_kept"):
        one, two, four, eight = rows[kind]
        assert one > two > four > eight >= one // 8, kind
    kinds = [
        values for name, values in rows.items() if name.startswith(("base_", "adapters", "gradients", "optimizer"))
    ]
    kinds += [rows["activations"], rows["logits"], rows["gather"]]
    assert rows["total"] == [sum(column) for column in zip(*kinds, strict=True)]
    assert all(held <= total for held, total in zip(rows["held"], rows["total"], strict=True))
    assert rows["micro-batches"] == [16, 8, 4, 2]


def test_quantize_one_tensor(cli_env: dict[str, str], tmp_path: Path):
    output = run([sys.executable, str(EXAMPLES / "quantize_one_tensor.py")], cli_env, tmp_path)
    for what in ("codes", "statistics", "dequantized"):
        assert f"{what} equal to bitsandbytes: True" in output
    assert "packed   (36, 4096) torch.bfloat16: 294,912 bytes" in output
    cuts = re.findall(r"rank (\d): rows (\d+) to (\d+) of 36, ([\d,]+) weights, equal: True", output)
    assert [cut[:3] for cut in cuts] == [("0", "0", "12"), ("1", "12", "24"), ("2", "24", "36")]
    assert sum(int(cut[3].replace(",", "")) for cut in cuts) == 576 * 1000


@pytest.mark.full
def test_shard_own_model(cli_env: dict[str, str], tmp_path: Path):
    output = run([*TORCHRUN, str(EXAMPLES / "shard_own_model.py")], cli_env, tmp_path)
    held = [numbers(line) for line in output.splitlines() if line.startswith("rank ")]
    rows_per_rank, row_bytes = 4 * 64 // 2, 8192 + 256 * 4  # codes and float32 absmax
    assert [(rank, frozen) for rank, frozen, _, _ in held] == [(rank, rows_per_rank * row_bytes) for rank in (0, 1)]
    before, after = map(float, re.search(r"loss ([\d.]+), after one step ([\d.]+)", output).groups())
    assert after < before


@pytest.mark.full
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_library_run(num_ranks: int, tiny_model: Path, chat_rows: Path, cli_env: dict[str, str], tmp_path: Path):
    start = TORCHRUN if num_ranks == 2 else [sys.executable]
    script = [str(EXAMPLES / "library_run.py"), str(tiny_model), str(chat_rows), "out", "--steps", "2"]
    output = run([*start, *script], cli_env, tmp_path)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert [rank["rank"] for rank in summary["ranks"]] == list(range(num_ranks))
    for rank in summary["ranks"]:
        assert f"rank {rank['rank']}: read {rank['bytes_read']:,} bytes" in output
    assert f"held-out loss {summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f}" in output
    require_adapter(tmp_path / "out" / "adapter", tiny_model)


@pytest.mark.full
def test_serve(cli_env: dict[str, str], tmp_path: Path):
    """The served folder answers examples/serve/ask.py as it answers any client; vLLM needs a GPU."""
    require_server()
    adapter = write_adapter(make_model(tmp_path / "base", intermediate_size=384), tmp_path / "adapter", lora())
    export = [sys.executable, "-m", "fsdp_qlora", "export", "what=served", f"adapter={adapter}", "export.to=served"]
    assert "transformers serve served" in run([*export, "launcher.device=cpu"], cli_env, tmp_path)
    with served(tmp_path / "served", cli_env, tmp_path / "home") as client:
        script = [sys.executable, str(EXAMPLES / "serve" / "ask.py"), str(tmp_path / "served"), "the fox"]
        output = run([*script, str(client.base_url)], cli_env, tmp_path)
        assert output.rstrip("\n") == ask(client, tmp_path / "served", "the fox", 1024).rstrip("\n") != ""


@pytest.mark.launch
@pytest.mark.full
def test_the_steps_benchmark_runs_at_a_small_size(cli_env, real_model, tmp_path):
    """As it would on a GPU; TRL is not there in `make test`."""
    command = [sys.executable, "-m", "benchmarks.step", "large", "--small", "--rounds", "1", "--out", str(tmp_path)]
    command += ["--ways", "ours", "ours, bf16 base", "matrix products alone"]
    env = {**cli_env, "FSDP_QLORA_CACHE": str(real_model.parent.parent)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    rows = {r["way"]: r for r in json.loads((tmp_path / "step_large.json").read_text())["rows"]}
    assert len(rows) == 3 and all(r["tokens_per_second"] > 0 for r in rows.values())
    assert "| ours |" in (tmp_path / "step.md").read_text()


@pytest.mark.full
def test_evaluate(tiny_model: Path, cli_env: dict[str, str], tmp_path: Path):
    pytest.importorskip("lm_eval")
    readme = (EXAMPLES / "evaluate" / "README.md").read_text()
    asked = re.search(r"evaluate.task_path=\S+ 'evaluate.tasks=\[(\S+)\]'", readme)
    assert asked is not None
    result = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "fsdp_qlora", "evaluate", f"model.name={tiny_model}", "launcher.device=cpu",
        "evaluate.chat_template=true", "evaluate.task_path=examples/evaluate/tasks", f"evaluate.tasks=[{asked[1]}]",
        "evaluate.prompts=examples/evaluate/prompts.jsonl", "generate.max_new_tokens=8", f"evaluate.json={result}",
    ]  # fmt: skip
    output = run(command, cli_env, ROOT)
    values = json.loads(result.read_text())
    assert 0 <= values["tasks"]["larkbox_choice"]["acc,none"] <= 1
    assert values["tasks"]["larkbox_answer"]["chrf,none"] >= 0
    assert len(values["answers"]) == 3 and "larkbox_choice" in output and "What is the capital of France?" in output
