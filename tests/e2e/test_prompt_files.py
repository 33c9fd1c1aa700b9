"""`generate.prompts` as a user runs it: 500 prompts, killed in the middle, and resumed on another number of ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_prompt_files import one_by_one, read, write_prompts
from tests.tiny import make_model

pytestmark = [pytest.mark.launch, pytest.mark.full]
NUM, NEW_TOKENS = 500, 12


def command(model: Path, file: Path, to: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "fsdp_qlora", "generate", f"model.name={model}", f"generate.prompts={file}",
        f"generate.to={to}", f"generate.max_new_tokens={NEW_TOKENS}", "generate.batch_size=10", "quant=none",
        "precision=fp32", "launcher.device=cpu", "model.check=off", *more,
    ]  # fmt: skip


def whole_lines(part: Path) -> list[str]:
    """Return the lines that are written to their end."""
    return part.read_text().split("\n")[:-1] if part.exists() else []


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_no_prompt_is_lost_or_answered_twice(cli_env, tmp_path, ranks):
    model = make_model(tmp_path / "model", initializer_range=0.4)  # with the usual one, all answers are empty
    file, to = write_prompts(tmp_path, NUM), tmp_path / "answers.jsonl"
    part = to.with_name(to.name + ".part")
    first, second = (command(model, file, to, f"launcher.nproc_per_node={count}") for count in ranks)
    process: Any = subprocess.Popen(first, cwd=tmp_path, env=cli_env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 1500
    while len(whole_lines(part)) < 60:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(3 if ranks[0] > 1 else 0)  # the ranks of a launcher that is killed end themselves
    kept = whole_lines(part)
    assert 60 <= len(kept) < NUM and not to.exists(), "the kill came too late to show anything"
    done = subprocess.run(
        second, cwd=tmp_path, env=cli_env, text=True, capture_output=True, timeout=3000, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of {NUM} prompts are answered already" in done.stderr
    assert f"{NUM} answers -> {to}" in done.stdout
    lines = read(to)
    assert [line["index"] for line in lines] == list(range(NUM)) and not part.exists()
    assert [line["id"] for line in lines] == [f"row {number}" for number in range(NUM)]
    assert [line["answer"] for line in lines] == one_by_one(model, file, NEW_TOKENS)
    assert len({line["answer"] for line in lines}) > 50
