"""An engine as a child: waited for, told of signals, ended; and what is said when it fails. The engine is a script."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from command_line import invoke
from deployments import CPU, OURS
from fourfold.datatypes import FourfoldError
from fourfold.serve import server
from fourfold.serve.command import Command, Deployment, build
from fourfold.serve.probe import Probed

# Stands for an engine's interpreter: answers what it has installed, else serves or fails as its body says.
HEAD = (
    f"#!{sys.executable}\n"
    + """
import http.server, json, os, signal, subprocess, sys, time
if sys.argv[1] == "-c":
    if "find_spec" not in sys.argv[2]:
        print(json.dumps(["0.32.0+cpu", False]))
    sys.exit(0)
port = int(sys.argv[sys.argv.index("--port") + 1])
"""
)
SERVES = """
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", os.environ["MARK"]], start_new_session=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for delta in ({"role": "assistant"}, {"reasoning": "so"}, {"content": "hi"}):
            self.wfile.write(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\\n\\n")
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 1}}
        self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\\n\\ndata: [DONE]\\n\\n")
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
def stop(number, frame):
    print("told", number, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
server.serve_forever()
"""
FAILS = """
print("ValueError: FP8 KV cache is not supported by the Triton attention backend on NVIDIA GeForce RTX 3060")
print("\\n".join(f"line {number}" for number in range(40)))
print("RuntimeError: Engine core initialization failed.")
sys.exit(1)
"""


def fake(folder: Path, body: str) -> Path:
    python = folder / "python"
    python.write_text(HEAD + body)
    python.chmod(0o755)
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(**wanted: Any) -> Command:
    return build(OURS, CPU, Deployment(engine="vllm", port=free_port(), **wanted))


def marked(mark: str) -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if mark in (one.info["cmdline"] or ())]


def test_it_is_waited_for_probed_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to us reaches it; a child in a session of its own is gone too."""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("MARK", mark)
    seen: list[Probed] = []

    def ready(seconds: float, found: Probed) -> None:
        seen.append(found)
        assert len(marked(mark)) == 1
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    outcome = server.run(command(thinking_budget=50), fake(tmp_path, SERVES), tmp_path / "log", 20, ready)
    assert (outcome.failure, outcome.signal) == ("", signal.SIGTERM)
    assert "told 15" in (tmp_path / "log").read_text()
    assert not marked(mark)
    assert signal.getsignal(signal.SIGTERM) is before
    findings = {finding.what: finding.alive for finding in seen[0].findings}
    assert findings == {"chat": True, "tools": True, "thinking": True, "drafts": None, "thinking budget": True}


def test_it_ends_before_it_is_ready(tmp_path: Path) -> None:
    outcome = server.run(command(), fake(tmp_path, FAILS), tmp_path / "log", 20, lambda *_: pytest.fail("not ready"))
    assert "exit code 1" in outcome.failure
    assert "first error: ValueError: FP8 KV cache" in outcome.failure
    assert "known issue: below compute capability 8.9" in outcome.failure


def test_it_is_never_ready(tmp_path: Path) -> None:
    python = fake(tmp_path, "time.sleep(60)")
    outcome = server.run(command(), python, tmp_path / "log", 0.5, lambda *_: pytest.fail("not ready"))
    assert "no answer within 0 s" in outcome.failure or "no answer within 1 s" in outcome.failure


def test_it_ends_by_itself_later(tmp_path: Path) -> None:
    alone = "\n".join(line for line in SERVES.splitlines() if not line.startswith("subprocess.Popen"))
    body = alone.replace("server.serve_forever()", "[server.handle_request() for _ in range(4)]; os._exit(3)")
    outcome = server.run(command(), fake(tmp_path, body), tmp_path / "log", 20, lambda *_: None)
    assert "exit code 3" in outcome.failure
    assert outcome.signal == 0


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="name another file with --log"):
        server.run(command(), fake(tmp_path, SERVES), tmp_path / "no" / "folder" / "log", 1, lambda *_: None)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(FourfoldError, match="use another with --port"):
            server.check_port("127.0.0.1", other.getsockname()[1])


# --- the command --------------------------------------------------------------------------------------------------


def fourfold(*arguments: object) -> Any:
    return invoke("serve", *arguments)


def test_print_is_the_command_alone_on_stdout(tmp_path: Path, example_model: Path) -> None:
    python = fake(tmp_path, "")
    shown = fourfold(example_model, "--engine", "vllm", "--print", "--python", python, "--context", "512")
    assert shown.exit_code == 0, shown.stderr
    assert "vllm serve" in shown.stdout and len(shown.stdout.splitlines()) == 1
    assert "4,096 blocks x 256 tokens" in " ".join(shown.stderr.split())


def test_docker_serves_the_same_name(tmp_path: Path, example_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "release").symlink_to(example_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "look", lambda: CPU)
    shown = fourfold("release", "--docker", "--mtp", 0)
    words = shown.stdout.split()
    assert shown.exit_code == 0, shown.stderr
    assert words[words.index("--served-model-name") + 1] == "release"
    assert words[words.index("-p") + 1] == "127.0.0.1:8000:8000"
    refused = fourfold("release", "--engine", "sglang", "--docker")
    assert refused.exit_code == 2 and "publishes no image" in refused.stderr and not refused.stdout


@pytest.mark.parametrize(("has", "chosen"), [({"vllm", "sglang"}, "vllm"), ({"sglang"}, "sglang"), (set(), None)])
def test_the_engine_is_the_one_that_is_installed(
    example_model: Path, monkeypatch: pytest.MonkeyPatch, has: set[str], chosen: str | None
) -> None:
    monkeypatch.setattr(server, "find_python", lambda name, given: Path(sys.executable) if name in has else None)
    if chosen:
        assert server.choose_engine(None, starts=True, container=False) == chosen
    else:
        done = fourfold(example_model)
        assert done.exit_code == 2 and "neither vllm nor sglang is installed" in " ".join(done.stderr.split())
    assert server.choose_engine(None, starts=False, container=False) == (chosen or "vllm")
    assert server.choose_engine(None, starts=False, container=True) == "vllm"


def test_problems_stop_it_before_a_start(tmp_path: Path, example_model: Path) -> None:
    arguments = (example_model, "--engine", "vllm", "--python", fake(tmp_path, FAILS), "--log", tmp_path / "log")
    asked = ("--thinking-budget", 5)  # the environment has no plugin
    done = fourfold(*arguments, *asked)
    assert done.exit_code == 2
    assert "-m pip install --no-deps " in done.stderr
    assert not (tmp_path / "log").exists()
    printed = fourfold(*arguments, *asked, "--print")
    assert (printed.exit_code, len(printed.stdout.splitlines())) == (1, 1)
    assert "problem: " in printed.stderr


@pytest.mark.slow
def test_interrupted_it_leaves_nothing(tmp_path: Path, example_model: Path) -> None:
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    words = [example_model, "--engine", "vllm", "--port", free_port(), "--log", tmp_path / "log", "--mtp", 0]
    words += ["--python", fake(tmp_path, SERVES)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fourfold", "serve", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "MARK": mark},
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    assert any("ready after" in line for line in lines), lines
    assert marked(mark)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT" in err
    assert not marked(mark)


def test_what_an_environment_has(tmp_path: Path) -> None:
    assert server.installed(fake(tmp_path, ""), "vllm") == ((0, 32, 0), False)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'PackageNotFoundError: vllm' >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(FourfoldError, match="PackageNotFoundError: vllm"):
        server.installed(broken, "vllm")
