"""S22: which server W&B's key goes to: never one that a file of the current folder or of the run names."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

_SINK = """
import sys
from pathlib import Path
from fsdp_qlora.config.schema import TrackSettings
from fsdp_qlora.track.sink import Ended, State
from fsdp_qlora.track.wandb import open_wandb
sink = open_wandb(Path(sys.argv[1]), "r", TrackSettings({"wandb": True}), {})
sink.log(1, {"loss": 1.0}); sink.end(Ended(State.FINISHED))
"""


@pytest.fixture
def canary():
    """Serve on loopback; return the address and the list of the requests' authorisations."""
    heard: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(self.headers.get("Authorization"))
            self.send_error(401)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()


def _run(cli_env, folder, **more):
    """Log one step from a folder; W&B's own server is out of reach."""
    env = {k: v for k, v in cli_env.items() if not k.lower().endswith("_proxy")}
    env |= {
        "HOME": str(folder / "home"), "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5", **more,
        "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", _SINK, str(folder / "run")]
    (folder / "run").mkdir(exist_ok=True)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.full
@pytest.mark.parametrize("place", ["wandb", ".wandb", "run/wandb", "scratch/wandb"])
def test_a_server_that_a_folder_names_gets_no_key(cli_env, tmp_path, canary, place):
    url, heard = canary
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "settings").write_text(f"[default]\nbase_url = {url}\napi_key = {'1' * 40}\n")
    done = _run(cli_env, tmp_path, WANDB_DIR=str(tmp_path / "scratch"))
    assert done.returncode == 0 and "logged offline" in done.stderr, done.stderr
    assert not heard and url not in done.stderr
    assert (f"{tmp_path / place / 'settings'} is ignored" in done.stderr) == (place in ("wandb", ".wandb"))


@pytest.mark.full
@pytest.mark.parametrize("way", ["environment", "own settings"])
def test_a_server_of_the_users_own_is_used_and_shown(cli_env, tmp_path, canary, way):
    url, heard = canary
    own = tmp_path / "home/.config/wandb"
    own.mkdir(parents=True)
    if way == "own settings":
        (own / "settings").write_text(f"[default]\nbase_url = {url}\n")
    done = _run(cli_env, tmp_path, **({"WANDB_BASE_URL": url} if way == "environment" else {}))
    assert done.returncode == 0 and heard, done.stderr
    assert f"W&B: API key and metrics go to {url}" in done.stderr
