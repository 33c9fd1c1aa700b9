"""S3, S6: secrets of the environment, of a URL and of a row's metadata are in no file and on no screen, however it ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import warm

pytestmark = [pytest.mark.launch, pytest.mark.full]
ENVIRONMENT = {
    "HF_TOKEN": "hf_canary0environment",
    "WANDB_API_KEY": "c" * 28 + "a11a5e2b4c6d",
    "MY_SECRET": "canary0own",
}
IN_URL, IN_ROW = "canary0signature", "canary0metadata"
CANARIES = [*ENVIRONMENT.values(), IN_URL, IN_ROW]


@pytest.fixture
def url(chat_rows: Path) -> Iterator[str]:
    """A presigned URL of rows with metadata; the server gives them to who has the signature."""
    rows = [json.loads(line) for line in chat_rows.read_text().splitlines()]
    content = "".join(json.dumps({**row, "metadata": {"user": IN_ROW}}) + "\n" for row in rows).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.path == f"/rows.jsonl?signature={IN_URL}"
            self.send_response(200 if allowed else 403)
            self.send_header("Content-Length", str(len(content) if allowed else 0))
            self.end_headers()
            self.wfile.write(content if allowed else b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/rows.jsonl?signature={IN_URL}"
    server.shutdown()


def _require_none(folder: Path, cache: Path, *outputs: str) -> None:
    for place in (folder, cache):
        for file in place.rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert [c for c in CANARIES if c.encode() in content] == [], file
    for output in outputs:
        assert [c for c in CANARIES if c in output] == [], output


def _run(url: str, tiny_run: list[str]) -> list[str]:
    rest = [words for words in tiny_run if not words.startswith("data.train=")]
    return ["train", *rest, f"data.train={url}", "data.ignore_keys=[metadata]", "track=wandb"]


def test_no_secret_is_kept_or_shown(cli_env, tiny_run, tmp_path, url):
    cache = tmp_path / "cache"
    env = {**cli_env, **ENVIRONMENT, "WANDB_MODE": "offline", "FSDP_QLORA_CACHE": str(cache)}
    run = _run(url, tiny_run)
    codes, output = warm.run(run, tmp_path, env)
    assert codes == [0, 0], output
    _require_none(tmp_path / "outputs", cache, output)
    folder = tmp_path / "outputs/tiny"
    after = [
        ["export", f"run_from={folder}", f"export.to={tmp_path / 'outputs/given'}"],
        ["generate", f"run_from={folder}", f"adapter={folder / 'adapter'}", "prompt=hello"],
        ["doctor"],
        ["inspect", str(folder)],
    ]
    for words in after:
        done = warm.command(words, tmp_path, env, 200)
        assert done.returncode == 0, done.stderr
        _require_none(tmp_path / "outputs", cache, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["optim.lr=nonsense"], 2), (["optim.lr=${oc.env:MY_SECRET}"], 2), (["data.format=rubbish"], 2),
        (["model.name=${oc.env:HF_TOKEN}"], 2), (["lora.target_modules=[nothing_like_it]"], 2),
    ],
)  # fmt: skip
def test_a_bad_value_shows_no_secret(cli_env, tiny_run, tmp_path, url, more, code):
    cache = tmp_path / "cache"
    env = {**cli_env, **ENVIRONMENT, "WANDB_MODE": "offline", "FSDP_QLORA_CACHE": str(cache)}
    done = warm.command([*_run(url, tiny_run), *more], tmp_path, env, 100)
    assert done.returncode == code, done.stderr
    _require_none(tmp_path / "outputs", cache, done.stdout, done.stderr)


def test_a_crash_keeps_and_shows_no_secret(cli_env, tiny_run, tmp_path, url):
    cache = tmp_path / "cache"
    env = {**cli_env, **ENVIRONMENT, "WANDB_MODE": "offline", "FSDP_QLORA_CACHE": str(cache)}
    fault = warm.Fault(0, str(tmp_path / "outputs"), file_limit=20_000)
    codes, output = warm.run([*_run(url, tiny_run), "checkpoint.every_steps=1"], tmp_path, env, fault=fault)
    assert any(codes), output
    _require_none(tmp_path / "outputs", cache, output)


def test_a_url_that_gives_nothing_is_named_without_its_query(cli_env, tiny_run, tmp_path, url):
    cache = tmp_path / "cache"
    env = {**cli_env, **ENVIRONMENT, "WANDB_MODE": "offline", "FSDP_QLORA_CACHE": str(cache)}
    codes, output = warm.run(_run(url.replace("rows", "gone"), tiny_run), tmp_path, env)
    assert codes == [2, 2] and "/gone.jsonl" in output, output
    _require_none(tmp_path / "outputs", cache, output)
