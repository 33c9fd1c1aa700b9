"""What surrounds a run must not end it: signals and variables it inherits, modules and folders it finds."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.build import metrics
from tests.processes import wait_for_step

pytestmark = pytest.mark.launch


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_nohup_outlives_its_terminal(cli_env, tiny_run, tmp_path, ranks):
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "fsdp_qlora", "train", *tiny_run, "train.max_steps=12",
         f"launcher.nproc_per_node={ranks}"],
        cwd=tmp_path, env=cli_env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    wait_for_step(tmp_path / "outputs/tiny/metrics.jsonl", 3, process)
    os.killpg(process.pid, signal.SIGHUP)  # what the kernel does when the terminal closes
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    assert metrics(tmp_path / "outputs/tiny")[-1]["step"] == 12


@pytest.mark.full
def test_leftovers_of_torchrun_do_not_make_a_run_wait(cli, tiny_run, tmp_path):
    result = cli("train", *tiny_run, MASTER_ADDR="192.0.2.1", WORLD_SIZE="2", timeout=300, cold=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("ignored") == 1 and "WORLD_SIZE='2'" in result.stderr
    assert json.loads((tmp_path / "outputs/tiny/exit.json").read_text())["code"] == 0


@pytest.mark.full
def test_a_signal_ends_the_wait_for_ranks_that_never_come(cli_env, tiny_run, tmp_path):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    for number in (signal.SIGTERM, signal.SIGINT):
        code = (
            "import sys; from fsdp_qlora.__main__ import main\n"
            "from fsdp_qlora.cli import train\n"  # with all its imports, so that the wait is what is interrupted
            "print('waiting', flush=True); sys.exit(main(sys.argv[1:]))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, "train", *tiny_run], cwd=tmp_path, env={**cli_env, **whole}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        deadline = time.monotonic() + 60
        while _catches(process.pid, signal.SIGINT) and time.monotonic() < deadline:  # Python's own, until it waits
            time.sleep(0.05)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.send_signal(number)
        assert process.wait(timeout=60) == -number


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (proc(5), SigCgt)."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


_ROWS = """
def convert(row):
    return {"prompt": row["q"], "completion": row["a"]}
"""


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_function_beside_a_file_named_as_a_package(cli, tiny_run, tmp_path, ranks):
    """README's example, in a folder whose `datasets.py` must hide nothing."""
    (tmp_path / "my_rows.py").write_text(_ROWS)
    for name in ("datasets", "tqdm", "torch", "queue"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong module')\n")
    rows = [json.dumps({"q": f"say {n}", "a": f"{n} it is"}) for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    result = cli(
        "train", *tiny_run, "data.train=rows.jsonl", "data.row_function=my_rows:convert", "data.allow_code=true",
        "train.max_steps=2", f"launcher.nproc_per_node={ranks}", cold=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.full
def test_a_changed_row_function_is_found_and_noticed_in_one_process(cli, cli_env, tiny_run, tmp_path):
    """R5: by the command `fsdp-qlora`, which does not look in the current folder, as by `python -m`."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "say", "a": "it"}) + "\n")
    settings = ["prepare", *tiny_run, "data.train=rows.jsonl", "data.row_function=my_rows:convert",
                "data.allow_code=true", "data.eval_fraction=0"]  # fmt: skip
    supervised = []
    for code in (_ROWS, _ROWS, _ROWS.replace('row["a"]', 'row["a"] * 5')):
        (tmp_path / "my_rows.py").write_text(code)
        script = subprocess.run(
            ["fsdp-qlora", *settings], cwd=tmp_path, env=cli_env, capture_output=True, text=True, check=False
        )
        module = cli(*settings, cold=True)
        assert script.returncode == module.returncode == 0, script.stderr + module.stderr
        assert script.stdout == module.stdout
        supervised.append(script.stdout)
    assert supervised[0] == supervised[1] != supervised[2]


@pytest.mark.full
def test_settings_longer_than_an_environment_variable_may_be(cli, tiny_run, tmp_path):
    (tmp_path / "own/experiment").mkdir(parents=True)
    prompts = "\n".join(f"    - {'x' * 20000}" for _ in range(10))
    text = f"# @package _global_\ntrain:\n  sample_prompts:\n{prompts}\n"
    (tmp_path / "own/experiment/long.yaml").write_text(text)
    result = cli(
        "train", "--config-dir", "own", "experiment=long", *tiny_run, "data.train=nowhere.jsonl",
        "launcher.nproc_per_node=2", cold=True,
    )  # fmt: skip
    assert result.returncode == 2 and "nowhere.jsonl" in result.stderr, result.stderr


_SPELT = ["[INST] hi [/INST]", "a\u2028b \x1b[2J", "你好 👩‍👩‍👧‍👦 שלום 🇳🇴 ﷽", 'it\'s "quoted" $HOME']


@pytest.mark.full
@pytest.mark.parametrize("closed", [False, True])
def test_a_run_does_not_die_of_what_it_prints(cli_env, tiny_run, tmp_path, closed):
    """Closed stdout, or an ASCII one, and prompts, samples and answers of any spelling."""
    lines = [json.dumps({"prompt": text, "completion": text + " " + text}) for text in _SPELT * 6]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "own/experiment").mkdir(parents=True)
    experiment = {"train": {"sample_prompts": _SPELT, "sample_at_eval": True, "sample_tokens": 4, "eval_every": 1}}
    text = "# @package _global_\n" + json.dumps(experiment)
    (tmp_path / "own/experiment/spelt.yaml").write_text(text)
    command = [
        sys.executable, "-m", "fsdp_qlora", "train", "--config-dir", "own", "experiment=spelt", *tiny_run,
        "data.train=rows.jsonl", "train.max_steps=2", "launcher.nproc_per_node=2",
    ]  # fmt: skip
    done = subprocess.run(
        ["sh", "-c", f'exec "$@"{" >&-" if closed else ""}', "sh", *command], cwd=tmp_path,
        env={**cli_env, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and b"[transformers]" not in done.stderr, done.stderr
    answers = (tmp_path / "outputs/tiny/answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["prompt"] for line in answers] == _SPELT * 3
    if not closed:
        out = done.stdout.decode("ascii")
        assert "| [INST] hi [/INST]" in out and "\\u4f60" in out
        (line,) = [line for line in out.splitlines() if line.startswith("try next: ")]
        words = shlex.split(line.removeprefix("try next: "))
        assert words[:2] == ["fsdp-qlora", "generate"] and words[-1] == "prompt=[INST] hi [/INST]"


@pytest.mark.full
def test_a_run_without_a_home_folder(cli, tiny_run, tmp_path):
    homeless = {"HOME": "/dev/null", "USER": "", "LOGNAME": ""}
    result = cli("train", *tiny_run, "launcher.nproc_per_node=2", "train.max_steps=2", cold=True, **homeless)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "~").exists()
    refused = cli("train", *tiny_run, "run.name=second", cold=True, **homeless, FSDP_QLORA_CACHE="")
    assert refused.returncode == 2 and "FSDP_QLORA_CACHE: there is no home folder" in refused.stderr
    assert "Traceback" not in refused.stderr
