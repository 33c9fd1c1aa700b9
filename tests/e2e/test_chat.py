"""`generate.chat` as a user has it: through a pipe, on a terminal with Ctrl-C, and on two ranks."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_many_adapters import CONFIGS, _dense_copy, make_adapters

pytestmark = [pytest.mark.launch, pytest.mark.full]


def command(model: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "fsdp_qlora", "generate", "generate.chat=true", f"model.name={model}", "precision=fp32",
        "launcher.device=cpu", "model.check=off", *more,
    ]  # fmt: skip


def said(model: Path, env: dict[str, str], folder: Path, typed: str, *more: str) -> tuple[str, str]:
    """Return the answers, after what is said of the adapters, and what was told besides."""
    done = subprocess.run(
        command(model, "generate.max_new_tokens=8", *more), input=typed, cwd=folder, env=env, text=True,
        capture_output=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("on this rank)\n")[2], done.stderr


def test_a_piped_chat_is_the_same_on_two_ranks(tiny_model, cli_env, tmp_path):
    folders = make_adapters(_dense_copy(tiny_model, "nf4"), tmp_path / "adapters", CONFIGS)
    several = "adapter={" + ", ".join(f"{name}: {folder}" for name, folder in folders.items()) + "}"
    typed = (
        "the quick brown\nthe lazy dog\n/adapter coder\nseven small ships\n/reset\n/adapter __base__\nthe quick brown"
    )
    one, told = said(tiny_model, cli_env, tmp_path, typed, several)
    assert "coder answers now; the conversation goes on" in told and "the conversation is forgotten" in told
    two, _ = said(tiny_model, cli_env, tmp_path, typed, several, "launcher.nproc_per_node=2")
    assert one == two and len(one) > 8
    sampled = ["generate.temperature=1", "generate.top_k=20", "generate.top_p=0.9", "generate.seed=3"]
    first = said(tiny_model, cli_env, tmp_path, typed, several, *sampled)[0]
    assert first == said(tiny_model, cli_env, tmp_path, typed, several, *sampled, "launcher.nproc_per_node=2")[0]
    assert first != one


class Terminal:
    """A chat whose standard input is a terminal."""

    def __init__(self, model: Path, env: dict[str, str], folder: Path) -> None:
        self.main, self.other = pty.openpty()
        more = ["generate.max_new_tokens=400"]  # the likeliest tokens of random weights go round in circles
        self.process: Any = subprocess.Popen(
            command(model, *more), cwd=folder, env=env, stdin=self.other, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self.told = self.said = ""
        for stream in (self.process.stdout, self.process.stderr):
            os.set_blocking(stream.fileno(), False)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, f"{self.told}\n{self.said}"
            self.told += (self.process.stderr.read(65536) or b"").decode(errors="replace")
            self.said += (self.process.stdout.read(65536) or b"").decode(errors="replace")
            time.sleep(0.02)

    def ask(self, text: str) -> None:
        self.told = self.said = ""
        os.write(self.main, f"{text}\n".encode())

    def close(self) -> None:
        self.process.kill()
        os.close(self.main)
        os.close(self.other)


def test_a_terminal_stops_an_answer_with_ctrl_c_and_ends_at_the_next(tiny_model, cli_env, tmp_path):
    terminal = Terminal(tiny_model, cli_env, tmp_path)
    try:
        terminal.wait(lambda: terminal.told.endswith("> ") and "/quit end" in terminal.told)
        for _ in range(2):
            terminal.ask("the quick brown")
            terminal.wait(lambda: bool(terminal.said))  # in the middle of the answer
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait(lambda: "(stopped)" in terminal.told and terminal.told.endswith("> "))
            terminal.ask("/reset")
            terminal.wait(lambda: "is forgotten" in terminal.told and terminal.told.endswith("> "))
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
