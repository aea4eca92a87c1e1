"""Models from the Hub: the real huggingface_hub against a small Hub of our own on the loopback device."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import traceback
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import close_session
from safetensors.torch import save

from fourfold.datatypes import FourfoldError
from fourfold.model import hub
from fourfold.model.hub import resolve_headers, resolve_model
from fourfold.model.tensors import TensorIndex

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
Answer = tuple[int, dict[str, str], bytes]

SHARD = "model-00001-of-00001.safetensors"
WANTED = {
    "config.json": b'{"model_type": "qwen3_5_moe", "text_config": {"num_experts": 16}}',
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARD}}).encode(),
    SHARD: save({"a": torch.arange(1000.0)}),
    "tokenizer.json": b"{}",
    "LICENSE": b"Apache-2.0",
    "README.md": b"# card",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"GGUF",
    "consolidated.safetensors": b"again",
    "original/model.safetensors": b"again",
    "onnx/config.json": b"{}",
}


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """A repository, org/model, with branch main, tag v1 and a pull request. refuse: path's end -> answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = WANTED | UNWANTED
        self.refuse: dict[str, Answer] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.ranges, self.sent = True, 0

    def answer(self, path: str) -> Answer:
        for end, answer in self.refuse.items():
            if path.endswith(end):
                return answer
        if path.startswith("/api/models/org/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": sha1(content)}
                for name, content in self.files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith("/api/models/org/model/revision/"):
            if path.rpartition("revision/")[2] not in ("main", "v1", "refs/pr/1", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            return 200, {}, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": []}).encode()
        if path.startswith("/org/model/resolve/"):
            content = self.files[path.removeprefix(f"/org/model/resolve/{COMMIT}/")]
            return 200, {"X-Repo-Commit": COMMIT, "ETag": sha1(content)}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def downloaded(self) -> set[str]:
        return {path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve" in path}


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if "org/model" in path:  # huggingface_hub asks for other things too
            self.server.tokens.add(self.headers.get("Authorization"))
        status, headers, content = self.server.answer(path)
        wanted = self.headers.get("Range")
        if status == 200 and wanted and self.server.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, content = 206, content[int(first) : int(last) + 1]
            self.server.sent += len(content)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{fake.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits before it asks again
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield fake
        fake.shutdown()
        close_session()


def refused(model: str) -> str:
    """The message of the error, which must be one short line; no token may show, nor in a traceback."""
    with pytest.raises(FourfoldError) as raised:
        resolve_model(model, progress=False)
    message = str(raised.value)
    assert len(message) < 600 and "\n" not in message
    assert TOKEN not in "".join(traceback.format_exception(raised.value))
    return message


# Folders and names


def test_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(tmp_path / "org")) == tmp_path / "org"
    assert resolve_model("org/model@v1") == Path("org/model@v1")
    assert resolve_model("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "model",
    [
        "",
        "model",
        "./model",
        "../model",
        "/no/such/folder",
        "org/model/main",
        "org//x",
        "org/",
        "org/model@",
        "@v1",
        "org/mo del",
        "org/a--b",
        "x" * 300,
        "a\0/b",
    ],
)
def test_what_can_be_no_id_is_a_missing_folder(server: FakeHub, model: str) -> None:
    assert refused(model).startswith(f"{model!r}: no such folder; expected a folder, or a Hub ID as org/name")
    assert server.asked == []


def test_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "GGUF, expected a safetensors checkpoint" in refused(str(tmp_path / "model.gguf"))


# Downloads


@pytest.mark.parametrize("model", ["org/model", "org/model@v1", "org/model@refs/pr/1", f"org/model@{COMMIT}"])
def test_download_takes_the_files_needed(server: FakeHub, model: str) -> None:
    folder = resolve_model(model, progress=False)
    assert {path.name for path in folder.iterdir()} == set(WANTED)
    assert server.downloaded() == set(WANTED)
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert torch.equal(TensorIndex.open(folder).read("a"), torch.arange(1000.0))


def test_second_run_downloads_nothing(server: FakeHub) -> None:
    folder = resolve_model("org/model", progress=False)
    server.asked.clear()
    assert resolve_model("org/model", progress=False) == folder
    assert server.downloaded() == set()


def test_broken_download_goes_on_where_it_was(server: FakeHub) -> None:
    headers = {"X-Repo-Commit": COMMIT, "ETag": '"shard"', "Content-Length": "9999"}
    server.refuse = {SHARD: (200, headers, b"half")}
    message = refused("org/model")
    assert message.startswith("org/model: the download broke off")
    assert message.endswith("the same command goes on")
    server.refuse = {}
    server.asked.clear()
    folder = resolve_model("org/model", progress=False)
    assert server.downloaded() == {SHARD}
    assert {path.name for path in folder.iterdir()} == set(WANTED)


@pytest.mark.parametrize("progress", [True, False])
def test_bars_only_where_they_are_wanted(server: FakeHub, capfd: pytest.CaptureFixture[str], progress: bool) -> None:
    resolve_model("org/model", progress=progress)
    printed = capfd.readouterr()
    assert ("Fetching" in printed.err) == progress
    assert progress or not printed.err
    assert not printed.out


def test_headers_alone_by_ranges(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TensorIndex.open(resolve_model("org/model@v1", progress=False))
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    monkeypatch.setattr(hub, "HEADER_BYTES", 30)  # of a header of some 60: a second request
    folder = resolve_headers("org/model@v1", progress=False)
    shard = folder / SHARD
    assert TensorIndex.open(folder).digest == whole.digest and hub.hub_name(folder) == "org/model"
    assert shard.stat().st_size == len(WANTED[SHARD]) and server.sent == len(WANTED[SHARD]) - 4000
    server.asked.clear()
    assert resolve_headers("org/model@v1", progress=False) == folder and SHARD not in server.downloaded()
    assert resolve_model("org/model@v1", progress=False) != folder
    assert resolve_headers("org/model@v1", progress=False) != folder  # weights are here: no headers of their own


def test_a_server_without_ranges_is_not_asked_for_gigabytes(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.ranges = False
    monkeypatch.setattr(hub, "HEADER_BYTES", 30)
    with pytest.raises(FourfoldError, match="does not send a part of a file"):
        resolve_headers("org/model", progress=False)


def test_headers_of_a_model_that_is_not_there(server: FakeHub) -> None:
    with pytest.raises(FourfoldError, match="org/other: no such folder, and no model at"):
        resolve_headers("org/other", progress=False)
    server.refuse = {SHARD: (403, {"X-Error-Code": "GatedRepo"}, b"")}
    with pytest.raises(FourfoldError, match="a gated model"):
        resolve_headers("org/model", progress=False)


# Errors


def test_repository_that_is_not_there(server: FakeHub) -> None:
    message = refused("org/other")
    assert message.startswith("org/other: no such folder, and no model at http://127.0.0.1")
    assert "hf auth login" in message


def test_private_repository_without_login(server: FakeHub) -> None:
    server.refuse = {"/main": (401, {"X-Error-Code": "RepoNotFound"}, b"")}
    assert "no model at" in refused("org/model")


def test_gated_repository(server: FakeHub) -> None:
    server.refuse = {name: (403, {"X-Error-Code": "GatedRepo"}, b"") for name in WANTED}
    message = refused("org/model")
    assert "a gated model. Ask for access at http://127.0.0.1" in message and "/org/model" in message
    assert "hf auth login" in message


def test_token_that_is_wrong(server: FakeHub) -> None:
    server.refuse = {"/main": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"")}
    message = refused("org/model")
    assert "does not accept the token" in message and "hf auth login" in message and "HF_TOKEN" in message


def test_revision_that_is_not_there(server: FakeHub) -> None:
    message = refused("org/model@v2")
    assert message.startswith("org/model@v2: the model has no branch, tag or commit 'v2'")


def test_repository_without_safetensors(server: FakeHub) -> None:
    server.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    assert "no *.safetensors" in refused("org/model")
    assert server.downloaded() == set()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b'{"model_type": "llama"}', "a dense model"),
        (b'{"model_type": "qwen3_moe", "quantization_config": {"quant_method": "awq"}}', "already quantized"),
    ],
)
def test_what_config_json_rules_out_is_not_downloaded(server: FakeHub, config: bytes, said: str) -> None:
    server.files = server.files | {"config.json": config}
    assert said in refused("org/model")
    assert server.downloaded() == {"config.json"}


def test_hub_that_is_down(server: FakeHub) -> None:
    server.refuse = {"/main": (503, {}, b"")}
    message = refused("org/model")
    assert "the Hub answered 503 (no reason given)" in message and "again later" in message


def test_token_without_a_permission(server: FakeHub) -> None:
    server.refuse = {SHARD: (403, {"X-Error-Message": "Enable gated repositories for your token"}, b"")}
    message = refused("org/model")
    assert "the Hub answered 403 (Enable gated repositories for your token)" in message
    assert "hf auth login" in message


def test_hub_out_of_reach(server: FakeHub) -> None:
    server.shutdown()
    server.server_close()
    message = refused("org/model")
    assert message.startswith("org/model: no such folder, not all of it in the cache")
    assert "(ConnectError)" in message and "local folder" in message


def test_cache_does_without_the_hub_when_it_has_all(server: FakeHub) -> None:
    folder = resolve_model("org/model", progress=False)
    server.shutdown()
    server.server_close()
    assert resolve_model("org/model", progress=False) == folder
    (folder / SHARD).unlink()
    assert "not all of it in the cache" in refused("org/model")


def test_offline_mode(tmp_path: Path) -> None:
    script = (
        "from fourfold.datatypes import FourfoldError\nfrom fourfold.model.hub import resolve_model\n"
        "try:\n    resolve_model('org/model')\nexcept FourfoldError as error:\n    print(error)\n"
    )
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | settings
    )
    assert said.stdout.startswith(f"org/model: no such folder, not all of it in the cache {tmp_path}, and ")
    assert said.stdout.endswith("(HF_HUB_OFFLINE is set). Give a local folder with the model, or go online\n")
    assert not said.stderr


def test_disk_too_small_is_said_before_the_download(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sum(len(content) for content in WANTED.values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, wanted - 1))
    message = refused("org/model")
    assert f"{wanted:,} bytes are to be downloaded" in message and f"{wanted - 1:,} are free" in message
    assert server.downloaded() == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, wanted))
    resolve_model("org/model", progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    resolve_model("org/model", progress=False)  # all there: no room is needed


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk of the cache"),
        (RuntimeError(f"CAS: Bearer {TOKEN} https://cas/x?X-Amz-Signature=abc"), "broke off (RuntimeError: CAS"),
        (ConnectionError(f"{TOKEN} rejected"), "broke off (ConnectionError"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/cache"), "Permission denied: '/cache'"),
    ],
    ids=["disk full", "xet", "connection", "cache not writable"],
)
def test_failures_in_the_middle(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    message = refused("org/model")
    assert said in message and "Amz" not in message


@pytest.mark.parametrize(
    ("card", "terms"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# M", {"license": "apache-2.0", "language": ["en"]}),
        (
            "---\nlicense: other\nlicense_name: their-own\nlicense_link: LICENSE\nlanguage: [en, zh]\n---\n",
            {"license": "other", "license_name": "their-own", "license_link": "LICENSE", "language": ["en", "zh"]},
        ),
        ("---\nlicense: [1, 2]\nlanguage: {a: 1}\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("# No front matter", {}),
        (None, {}),
    ],
)
def test_terms_are_those_of_the_models_card(tmp_path: Path, card: str | None, terms: dict[str, object]) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert hub.stated_terms(tmp_path) == terms


def test_a_snapshot_in_the_hubs_cache(tmp_path: Path) -> None:
    """Its model's name, also by a link; terms from another snapshot's card, if it has none itself."""
    model = tmp_path / "models--Qwen--Qwen3.6-35B-A3B" / "snapshots"
    bare, older = model / "b", model / "a"
    for folder in (bare, older):
        folder.mkdir(parents=True)
    (older / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    (tmp_path / "link").symlink_to(bare)
    for folder in (bare, tmp_path / "link"):
        assert hub.hub_name(folder) == "Qwen/Qwen3.6-35B-A3B"
        assert hub.stated_terms(folder) == {"license": "apache-2.0"}
    (bare / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert hub.stated_terms(bare) == {"license": "mit"}
    assert hub.hub_name(older.parent) is None and hub.hub_name(tmp_path) is None
