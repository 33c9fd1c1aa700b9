"""R7: files of the web are read as installed, named without their query, and noticed when they change."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from fsdp_qlora.config.schema import DataSettings
from fsdp_qlora.data.prepare import prepare_data
from fsdp_qlora.data.sources import fingerprint, read_source, stated
from fsdp_qlora.errors import DataError

ROWS = [{"text": f"row {n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(self.path)
        if path == "/moved.jsonl":
            self._answer(302, b"", Location="/rows.jsonl?CANARY=2")
        elif path not in self.server.files:
            self._answer(404, b"gone")
        else:
            content = self.server.files[path]
            etag = {} if path.startswith("/plain") else {"ETag": hashlib.md5(content).hexdigest()}
            length = len(content) + (100 if path == "/cut.jsonl" else 0)
            self._answer(200, content, length, **etag)

    def _answer(self, code, content, length=None, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content) if length is None else length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """A server of files in memory; its URL and the files."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.asked = []
    server.files = {
        "/rows.jsonl": LINES, "/rows.json": json.dumps(ROWS).encode(), "/rows.jsonl.gz": gzip.compress(LINES),
        "/rows.parquet": (tmp_path / "rows.parquet").read_bytes(), "/rows.csv": b"text\nrow 0\nrow 1\nrow 2\n",
        "/cut.jsonl": LINES, "/plain.jsonl": LINES, "/bad.jsonl": LINES + b"{broken\n", "/empty.jsonl": b"",
    }  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("query", ["", "?X-Amz-Signature=CANARY&x=/a.csv", "#CANARY"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet", "rows.csv"])
def test_every_kind_of_file(web, name, query):
    """R7: a query does not hide the ending; it is sent, and in no message."""
    url, server = web
    rows = list(read_source(f"{url}/{name}{query}"))
    assert [dict(row.values or {}) for row in rows] == ROWS
    assert not any("CANARY" in row.where for row in rows)
    assert any("CANARY" in path for path in server.asked) == query.startswith("?")


@pytest.mark.parametrize(("name", "said"), [
    ("gone.jsonl", "the server answered 404"), ("cut.jsonl", "cannot be read: RemoteProtocolError"),
    ("empty.jsonl", "is empty"), ("rows.unknown", "unknown file type"),
])  # fmt: skip
def test_what_cannot_be_read_is_an_error_without_the_query(web, name, said):
    """R7: a file that ends too early is no shorter file."""
    with pytest.raises(DataError, match=said) as refused:
        list(read_source(f"{web[0]}/{name}?CANARY"))
    assert "CANARY" not in str(refused.value) and name in str(refused.value)


def test_no_server_and_a_redirect(web):
    with pytest.raises(DataError, match="cannot be read: ConnectError"):
        list(read_source("http://127.0.0.1:9/rows.jsonl"))
    assert len(list(read_source(f"{web[0]}/moved.jsonl"))) == 3
    with pytest.raises(DataError, match="cannot be read"):
        list(read_source("http://127.0.0.1:notaport/rows.jsonl"))


@pytest.mark.parametrize("name", ["rows.jsonl", "plain.jsonl"])
def test_changed_content_is_noticed(web, name):
    """R7: by its etag, or its length where there is none."""
    url, server = web
    before = fingerprint(f"{url}/{name}"), stated(f"{url}/{name}")
    assert (fingerprint(f"{url}/{name}"), stated(f"{url}/{name}")) == before
    server.files[f"/{name}"] = LINES + b'{"text": "more"}\n'
    after = fingerprint(f"{url}/{name}"), stated(f"{url}/{name}")
    assert after[0] != before[0] and after[1] != before[1]


def test_a_key_that_changes_is_no_other_content(web):
    """A presigned URL has another query each time; without an etag the query may choose the rows."""
    assert fingerprint(f"{web[0]}/rows.jsonl?a=1") == fingerprint(f"{web[0]}/rows.jsonl?a=2")
    assert fingerprint(f"{web[0]}/plain.jsonl?a=1") != fingerprint(f"{web[0]}/plain.jsonl?a=2")


def test_the_token_cache_of_a_url(web, tmp_path, tiny_model):
    url, server = web
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def start(name):
        settings = DataSettings(train=f"{url}/{name}?CANARY", max_length=64, on_bad_row="skip")
        return prepare_data(settings, 0, tokenizer, tmp_path / "cache")

    assert (start("bad.jsonl").train_counts.kept, start("bad.jsonl").num_bad) == (3, 1)
    server.files["/bad.jsonl"] = LINES
    assert start("bad.jsonl").num_bad == 0
    written = [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert written and not any(b"CANARY" in content for content in written)
