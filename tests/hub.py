"""A stand-in for the Hugging Face hub on the loopback: the endpoints that uploading and reading back take.

Large files go through the LFS protocol; hf_xet's is not spoken here (set HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "x9Q" * 11 + "z"
USER = "ann"


@dataclass
class Hub:
    """What the hub holds."""

    role: str = "write"
    """What the token may do."""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> file -> content."""
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS: sha256 -> content."""
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    fails_at: str = ""
    """Requests to a path that has this in it get a 500."""
    url: str = ""

    def env(self, folder: Any, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment of a command that uses this hub, with a hub cache of its own in ``folder``."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token or ""}
        return own


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf")) or name == "tokenizer.json"


def _entry(name: str, content: bytes) -> dict[str, Any]:
    sha = hashlib.sha256(content).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if _is_large(name):
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _reply(self, value: Any, code: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refused(self, path: str) -> bool:
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.fails_at and self.hub.fails_at in path:
            self._reply({"error": "out of order"}, 500)
        elif path.startswith("/lfs/") or self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        else:
            self._reply({"error": "Invalid credentials"}, 401, X_Error_Message="Invalid credentials in headers")
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self._refused(path):
            return
        words = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            token = {"displayName": "tests", "role": self.hub.role}
            self._reply({"name": USER, "type": "user", "orgs": [{"name": "zoo"}], "auth": {"accessToken": token}})
            return
        if words[:2] == ["api", "models"]:
            repo, rest = "/".join(words[2:4]), words[4:]
            files = self.hub.repos.get(repo)
            if files is None:
                self._reply({"error": "not there"}, 404, X_Error_Code="RepoNotFound")
            elif rest[:1] == ["tree"] and len(rest) > 2:
                self._reply({"error": "no such folder"}, 404, X_Error_Code="EntryNotFound")
            elif rest[:1] == ["tree"]:
                self._reply([_entry(name, content) for name, content in files.items()])
            else:
                sha = self.hub.commits[-1] if self.hub.commits else "0" * 40
                names = [{"rfilename": name} for name in files]
                self._reply({"id": repo, "sha": sha, "private": True, "siblings": names, "tags": [], "downloads": 0})
            return
        repo, name = "/".join(words[:2]), "/".join(words[4:])  # /owner/name/resolve/revision/file
        content = self.hub.repos.get(repo, {}).get(name)
        if content is None:
            self._reply({"error": "not there"}, 404, X_Error_Code="EntryNotFound")
            return
        entry = _entry(name, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        self._reply(content, ETag=f'"{etag}"', X_Repo_Commit=self.hub.commits[-1])

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if self._refused(path):
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.repos:
                self._reply({"error": "it exists", "url": f"{self.hub.url}/{repo}"}, 409)
                return
            self.hub.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.hub.private[repo] = asked.get("private") is True or asked.get("visibility") == "private"
            self._reply({"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})
        elif path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [_upload(self.hub, item) for item in json.loads(body)["objects"]]
            self._reply({"transfer": "basic", "objects": objects})
        elif "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if _is_large(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._reply({"files": modes})
        elif "/paths-info/" in path:
            repo = "/".join(path.strip("/").split("/")[2:4])
            names = parse_qs(body.decode()).get("paths", [])
            there = self.hub.repos[repo]
            self._reply([_entry(name, there[name]) for name in names if name in there])
        elif "/commit/" in path:
            self._commit("/".join(path.strip("/").split("/")[2:4]), body)
        else:
            self._reply({"error": f"no such endpoint: {path}"}, 404)

    def _commit(self, repo: str, body: bytes) -> None:
        files = dict(self.hub.repos[repo])
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        self.hub.repos[repo] = files
        self.hub.commits.append(oid)
        self._reply(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""}
        )

    def do_PUT(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if self._refused(path):
            return
        oid = path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._reply({})


def _upload(hub: Hub, item: dict[str, Any]) -> dict[str, Any]:
    known = {"oid": item["oid"], "size": item["size"]}
    if item["oid"] in hub.objects:
        return known
    return {**known, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}}}


@contextmanager
def running(**settings: Any) -> Iterator[Hub]:
    """Run a hub."""
    hub = Hub(**settings)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
