"""Whole runs on a base model that is bad, or on the hub: one message, the true code, nobody waits for long."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import tiny, warm

NAMED = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_nan_that_one_rank_alone_reads(cli_env, tiny_run, tiny_model, tmp_path, verb):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tiny.poison(model, NAMED, (351, 127))  # the last rank's rows
    codes, text = warm.run([verb, *tiny_run, f"model.name={model}"], tmp_path, cli_env, timeout=180)
    ended = time.time()
    assert codes == [2, 2], text
    assert (
        text.count("values that are not finite") == text.count("fsdp-qlora, rank") == 1 and "Traceback" not in text
    ), text
    assert f"rank 1: {model / 'model.safetensors'}: tensor {NAMED}" in text
    if verb == "train":
        told = json.loads((tmp_path / "outputs/tiny/exit.json").read_text())
        assert told["code"] == 2 and NAMED in told["message"] and ended - told["time"] < 10


class Hub(ThreadingHTTPServer):
    """The three requests of huggingface_hub's snapshot_download, answered from a folder, slowly."""

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _HubRequest)
        self.folder, self.seconds = folder, seconds
        self.asked: Counter[str] = Counter()


class _HubRequest(BaseHTTPRequestHandler):
    server: Hub
    sha = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> tuple[int, bytes, dict[str, str]]:
        files = {f.name: f.read_bytes() for f in self.server.folder.iterdir()}
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/tiny/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": f"{len(n):040x}"} for n, d in files.items()]
            return 200, json.dumps(tree).encode(), {}
        if path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": n} for n in files]
            return 200, json.dumps({"id": "owner/tiny", "sha": self.sha, "siblings": siblings}).encode(), {}
        name = path.rpartition("/")[2]
        if path.startswith("/owner/tiny/resolve/") and name in files:
            return 200, files[name], {"ETag": f'"{hash(name) & (2**64 - 1):040x}"', "X-Repo-Commit": self.sha}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        status, data, headers = self._answer()
        if body and status == 200 and "resolve" in self.path:
            self.server.asked[self.path.rpartition("/")[2]] += 1
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            if "safetensors" in self.path:
                for part in range(4):  # in pieces: huggingface_hub waits 10 s for the next byte
                    self.wfile.write(data[part : part + 1])
                    time.sleep(self.server.seconds / 4)
                data = data[4:]
            self.wfile.write(data)


@pytest.fixture
def hub(tiny_model):
    server = Hub(tiny_model, seconds=11.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.full
@pytest.mark.launch
def test_the_hub_is_asked_by_one_process_for_longer_than_a_collective_may_wait(hub, cli, tiny_run, tmp_path):
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    run = [*tiny_run, "train.max_steps=1", "launcher.timeout_seconds=10", "launcher.nproc_per_node=2"]
    result = cli("train", *run, "model.name=owner/tiny", cold=True, **env)
    assert result.returncode == 0, result.stderr
    assert hub.asked["model.safetensors"] == 1 and set(hub.asked.values()) == {1}
    result = cli("train", *run, "model.name=owner/nothing", "run.name=other", cold=True, **env)
    assert result.returncode == 2
    assert result.stderr.count("owner/nothing is not a local folder, and the hub did not provide it") == 1, (
        result.stderr
    )
