"""A real ``transformers serve`` in a process of its own, asked by the real ``openai`` client."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("openai", "fastapi", "uvicorn")


def require_server() -> None:
    """Skip the test where the server's packages are not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install 'fsdp-qlora[serve]'")


@contextmanager
def served(folder: Path, env: dict[str, str], home: Path, seconds: float = 400) -> Iterator[Any]:
    """Serve ``folder`` and yield a client; the server's log is ``home/serve.log``."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "hub").mkdir(parents=True, exist_ok=True)  # the server lists the models of the cache, which must exist
    words = ["serve", str(folder), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words], env={**env, "HF_HOME": str(home)},
            stdout=log, stderr=subprocess.STDOUT, cwd=home,
        )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, home / "serve.log", seconds)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=seconds, max_retries=0)
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[Any], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start: {log.read_text()}")


def ask(client: Any, folder: Path, prompt: str, max_tokens: int, stream: bool = False) -> str:
    """Return the greedy answer; with ``stream``, put together from what came piece by piece."""
    reply = client.chat.completions.create(
        model=str(folder), messages=[{"role": "user", "content": prompt}], temperature=0.0, max_tokens=max_tokens,
        stream=stream,
    )  # fmt: skip
    if not stream:
        return str(reply.choices[0].message.content)
    pieces = [part.choices[0].delta.content for part in reply if part.choices]
    assert sum(1 for piece in pieces if piece) > 1, pieces
    return "".join(piece or "" for piece in pieces)
