"""A small Hub of our own on the loopback device, for the real huggingface_hub: repositories that are published to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub import hf_api
from huggingface_hub.utils import close_session

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
LARGE = (".safetensors", ".gguf")  # files that the Hub keeps by their sha256


class Repo:
    """Branches with files, kept as the Hub keeps them: small ones in commits, large ones by their sha256 (LFS)."""

    def __init__(self, large: dict[str, bytes]) -> None:
        self.large = large
        self.branches: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, str] = {}
        self.private = False
        self.lose = ""

    def tree(self, revision: str) -> list[dict[str, Any]]:
        files = self.branches.get(revision, self.commits.get(revision, {}))
        entries = []
        for name, content in files.items():
            if name == self.lose:
                continue
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 1}
            entries.append(entry)
        return entries

    def commit(self, revision: str, lines: list[dict[str, Any]]) -> str:
        files = dict(self.branches[revision])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        self.branches[revision] = files
        oid = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
        self.commits[oid] = files
        return oid


class Hub(ThreadingHTTPServer):
    """Repositories by name; the attributes of a Repo are those of me/model. refuse: a status for every POST."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.large: dict[str, bytes] = {}
        self.repos: defaultdict[str, Repo] = defaultdict(lambda: Repo(self.large))
        self.asked: list[str] = []
        self.refuse = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.repos["me/model"], name)

    def named(self, path: str) -> tuple[str, Repo]:
        found = re.search(r"me/[^/]+?(?=\.git/|/|$)", path)
        name = found[0] if found else "me/model"
        return name, self.repos[name]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        content = self._body()
        self.server.large[self.path.rpartition("/")[2]] = content
        self._answer(200, {})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"GET {path}")
        name, hub = self.server.named(path)
        if path.startswith(f"/api/models/{name}/tree/"):
            self._answer(200, hub.tree(path.rpartition("/tree/")[2]))
        elif path.startswith(f"/api/models/{name}"):
            revision = path.partition("/revision/")[2] or "main"
            names = [{"rfilename": entry["path"]} for entry in hub.tree(revision)]
            self._answer(200, {"id": name, "sha": "a" * 40, "private": hub.private, "siblings": names})
        else:
            self._answer(404, {})

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.server.asked.append(f"POST {path}")
        created = json.loads(body) if path == "/api/repos/create" else {}
        name, hub = self.server.named(f"{created['organization']}/{created['name']}" if created else path)
        if self.server.refuse:
            self._answer(self.server.refuse, {"error": f"refused, said with Bearer {TOKEN}"})
        elif path == "/api/repos/create":
            if hub.branches:
                self._answer(409, {"error": "there already", "url": f"http://{self.headers['Host']}/{name}"})
                return
            hub.branches, hub.private = {"main": {}}, created.get("visibility") == "private"
            self._answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/branch/" in path:
            hub.branches.setdefault(path.rpartition("/branch/")[2], dict(hub.branches["main"]))
            self._answer(200, {})
        elif "/tag/" in path:
            hub.tags[json.loads(body)["tag"]] = path.rpartition("/tag/")[2]
            self._answer(200, {})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(LARGE) else "regular" for name in names]
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer(
                200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]}
            )
        elif "/commit/" in path:
            revision = path.rpartition("/commit/")[2]
            oid = hub.commit(revision, [json.loads(line) for line in body.splitlines()])
            self._answer(200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{oid}", "commitOid": oid})
        else:
            self._answer(404, {})

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.large:
            return wanted
        href = f"http://{self.headers['Host']}/large/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href, "header": {}}}}

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on the loopback device that huggingface_hub goes to."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(hf_api.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # large files by LFS, which we speak
        monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits before it asks again
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield server
        server.shutdown()
        close_session()
