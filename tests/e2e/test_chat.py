"""`generate.chat` as a user has it: through a pipe, on a terminal with Ctrl-C, and on two ranks."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.test_many_adapters import CONFIGS, _dense_copy, make_adapters

pytestmark = [pytest.mark.launch, pytest.mark.full]


def command(model: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "fsdp_qlora", "generate", "generate.chat=true", f"model.name={model}", "precision=fp32",
        "launcher.device=cpu", "model.check=off", *more,
    ]  # fmt: skip


def said(model: Path, env: dict[str, str], folder: Path, typed: str, *more: str) -> tuple[list[str], str]:
    """Return the lines of answers, and what was told besides."""
    done = subprocess.run(
        command(model, "generate.max_new_tokens=8", *more), input=typed, cwd=folder, env=env, text=True,
        capture_output=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_piped_chat_is_the_same_on_two_ranks(tiny_model, cli_env, tmp_path):
    folders = make_adapters(_dense_copy(tiny_model, "nf4"), tmp_path / "adapters", CONFIGS)
    several = "adapter={" + ", ".join(f"{name}: {folder}" for name, folder in folders.items()) + "}"
    typed = (
        "the quick brown\nthe lazy dog\n/adapter coder\nseven small ships\n/reset\n/adapter __base__\nthe quick brown"
    )
    one, told = said(tiny_model, cli_env, tmp_path, typed, several)
    assert "coder answers now; the conversation goes on" in told and "the conversation is forgotten" in told
    two, _ = said(tiny_model, cli_env, tmp_path, typed, several, "launcher.nproc_per_node=2")
    assert one[-4:] == two[-4:] and len(set(one[-4:])) == 4
    sampled = ["generate.temperature=1", "generate.top_k=20", "generate.top_p=0.9", "generate.seed=3"]
    first = said(tiny_model, cli_env, tmp_path, typed, several, *sampled)[0][-4:]
    assert first == said(tiny_model, cli_env, tmp_path, typed, several, *sampled, "launcher.nproc_per_node=2")[0][-4:]
    assert first != one[-4:]


def test_a_terminal_stops_an_answer_with_ctrl_c_and_ends_at_the_next(tiny_model, cli_env, tmp_path):
    main, other = pty.openpty()
    process = subprocess.Popen(
        command(tiny_model, "generate.max_new_tokens=450", "generate.stop=[]", "generate.temperature=3"), cwd=tmp_path,
        env=cli_env, stdin=other, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert process.stderr is not None and process.stdout is not None
    os.set_blocking(process.stderr.fileno(), False)

    def wait_for(text: str) -> None:
        deadline, seen = time.monotonic() + 400, ""
        while text not in seen:
            assert time.monotonic() < deadline and process.poll() is None, seen
            seen += process.stderr.read() or ""  # type: ignore[union-attr]
            time.sleep(0.05)

    wait_for("/quit end")
    wait_for("> ")
    for _ in range(2):
        os.write(main, b"the quick brown\n")
        time.sleep(0.3)  # in the middle of an answer, or before it
        process.send_signal(signal.SIGINT)
        wait_for("(stopped)")
        wait_for("> ")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    os.close(main)
    os.close(other)
