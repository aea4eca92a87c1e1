"""What verify refuses before any work, with exit code 2 and the way out; engines that are missing, crash or hang."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import checkpoints
import releases
from broken import Copy
from command_line import invoke
from fourfold import interpreter, process
from fourfold.quantize.journal import hold

Broken = Callable[[str], Copy]
CT, GPTQ, V2 = releases.FORMATS


def verify(*arguments: object) -> Any:
    return invoke("verify", *arguments)


def refused(*arguments: object) -> str:
    answered = verify(*arguments)
    assert answered.exit_code == 2, answered.output
    return " ".join(answered.stderr.split())


# --- OUT ----------------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")


def test_no_release_of_ours(tmp_path: Path) -> None:
    assert "no release of fourfold" in refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_trial(copy: Broken) -> None:
    out = copy(CT).json("fourfold.json", lambda state: state.update(partial=True, layers="0-0")).folder
    assert "partial, a trial on layers 0-0" in refused(out)
    assert not (out / "verify.json").exists()


def test_an_interrupted_run(copy: Broken) -> None:
    out = copy(CT).folder
    (out / "fourfold.json").unlink()
    assert "not finished. Rerun the same" in refused(out)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_is_on(copy: Broken, finished: bool) -> None:
    """Also over a finished release: `quantize --restart` may be about to drop it."""
    out = copy(CT).folder
    if not finished:
        (out / "fourfold.json").unlink()
    with (out / ".fourfold" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "works on this OUT right now" in refused(out)


def test_another_recipe(copy: Broken) -> None:
    out = copy(CT).folder
    text = (out / "recipe.toml").read_text()
    (out / "recipe.toml").write_text(text.replace("passes = 0", "passes = 1"))
    assert "which made the release" in refused(out)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "awq"}, "quantized by 'awq', which is not read; expected 4 bits by"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "quantized by 'gptq' with 'marlin'"),
        ({"quant_method": None}, "quantized by None, which is not read"),
        (None, "no quantization_config"),
    ],
)
def test_an_unsupported_method(copy: Broken, settings: dict[str, Any] | None, said: str) -> None:
    out = copy(CT).json("config.json", lambda config: config.update(quantization_config=settings)).folder
    assert said in refused(out)


def test_a_pattern_that_would_match_for_ever(copy: Broken) -> None:
    out = copy(CT).json("config.json", lambda raw: raw["quantization_config"].update(ignore=["re:(.*.){25}!"])).folder
    assert "quantization_config.ignore: a pattern among 1 cannot be matched: it takes more than 5 s" in refused(out)
    assert not (out / "verify.json").exists()


# --- source -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("tokenizer", "other digests of tokenizer_config.json."),
        ("config", "other digests of config.json."),
        ("tensors", "other digests of names, dtypes and shapes of tensors."),
    ],
)
def test_another_source(made: dict[str, Path], source: Path, tmp_path: Path, change: str, named: str) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    if change == "tokenizer":
        (other / "tokenizer_config.json").write_text("{}")
    elif change == "config":
        checkpoints.edit_json(other / "config.json", lambda config: config["text_config"].update(rms_norm_eps=1e-5))
    else:
        checkpoints.edit(other, lambda tensors: tensors.pop("mtp.norm.weight"))
    before = (made[CT] / "verify.json").read_bytes() if (made[CT] / "verify.json").exists() else b""
    assert f"was not made from this source: {named}" in refused(made[CT], "--source", other)
    after = (made[CT] / "verify.json").read_bytes() if (made[CT] / "verify.json").exists() else b""
    assert after == before


def test_a_source_that_is_not_there(made: dict[str, Path], tmp_path: Path) -> None:
    assert "no such folder" in refused(made[CT], "--source", tmp_path / "nowhere")


def test_the_release_itself_as_source(made: dict[str, Path]) -> None:
    assert "was not made from this source" in refused(made[CT], "--source", made[CT])


# --- the engine's interpreter -------------------------------------------------------------------------------------


def fake_python(folder: Path, body: str) -> Path:
    """Stands in for an interpreter that has every engine; what it does with a script is `body`."""
    path = folder / "python"
    head = f"#!{sys.executable}\nimport os, subprocess, sys, time, mmap\nif sys.argv[1] == '-c': sys.exit(0)\n"
    path.write_text(head + textwrap.dedent(body))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_python_without_an_engine(made: dict[str, Path]) -> None:
    said = refused(made[CT], "--python", sys.executable)
    assert "--python is of use with --engine only" in said


@pytest.mark.parametrize("kind", ["missing", "no program", "folder"])
def test_a_broken_interpreter(made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "python"
    if kind == "no program":
        path.write_text("#!/bin/sh\necho no Python here >&2\nexit 9\n")
        path.chmod(0o755)
    elif kind == "folder":
        path.mkdir()
    assert "runs no Python" in refused(made[CT], "--engine", "vllm", "--python", path)


def test_an_engine_that_is_not_installed(copy: Broken) -> None:
    """A verdict that was reached before stays."""
    out = copy(CT).folder
    assert verify(out).exit_code == 0
    before = (out / "verify.json").read_bytes()
    (out / "model-00001-of-00003.safetensors").unlink()  # no byte is read
    for engine in ("vllm", "sglang"):
        said = refused(out, "--engine", engine, "--python", sys.executable)
        assert f"{engine}: not installed in {sys.executable}. Name the interpreter" in said
    assert (out / "verify.json").read_bytes() == before


def test_no_interpreter_on_the_path_has_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shim = tmp_path / "python3"  # as pyenv leaves one that runs nothing
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert interpreter.find_python("fourfold_no_such_engine", None) is None


def test_the_interpreter_beside_the_engines_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = fake_python(tmp_path, "")
    command = tmp_path / "vllm"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert interpreter.find_python("vllm", None) == python


def test_an_engine_is_not_run_on_files_that_are_not_sound(copy: Broken, tmp_path: Path) -> None:
    out = copy(CT).json("config.json", lambda config: config["quantization_config"].update(ignore=None)).folder
    answered = verify(out, "--engine", "vllm", "--python", fake_python(tmp_path, "raise SystemExit('was run')"))
    assert answered.exit_code == 1
    assert "fix them first" in " ".join(answered.stdout.split())
    assert not list((out / ".fourfold").glob("verify-*.log"))


def test_json_is_what_lands_in_the_file(copy: Broken, source: Path) -> None:
    out = copy(CT).folder
    answered = verify(out, "--source", source, "--json")
    assert answered.exit_code == 0, answered.output
    assert json.loads(answered.stdout) == json.loads((out / "verify.json").read_text())


# --- crash, hang, and what is left --------------------------------------------------------------------------------


def test_an_engine_that_crashes(copy: Broken, tmp_path: Path) -> None:
    out = copy(CT).folder
    python = fake_python(
        tmp_path,
        """
        print("ValueError: the first error says why")
        for line in range(40): print("stack", line)
        sys.exit("RuntimeError: Engine core initialization failed.")
        """,
    )
    answered = verify(out, "--engine", "vllm", "--python", python)
    assert answered.exit_code == 1
    check = next(c for c in json.loads((out / "verify.json").read_text())["checks"] if c["name"] == "starts")
    assert check["status"] == "fail"
    for said in ("exit code 1", "the first error says why", "stack 39", "Engine core initialization failed"):
        assert said in check["evidence"]
    assert "stack 20" not in check["evidence"]
    assert "stack 20" in (out / ".fourfold" / "verify-vllm-mtp.log").read_text()


HANG = """
    import signal
    name = "/dev/shm/fourfold-test-" + os.environ["FOURFOLD_TEST"]
    with open(name, "wb") as file: file.truncate(4096)
    with open(name, "r+b") as file: held = mmap.mmap(file.fileno(), 4096)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" not in sys.argv:
        for session in (False, True):  # one child in our session, one in its own; both orphans' parents soon
            subprocess.Popen([sys.argv[0], "x", "child"], start_new_session=session)
    os.write(1, (os.environ["TMPDIR"] + "\\n").encode())  # in one piece: several processes write here
    time.sleep(600)
"""


def marked(mark: str) -> list[psutil.Process]:
    """Processes whose environment bears the mark."""
    found = []
    for candidate in psutil.process_iter():
        try:
            if candidate.environ().get("FOURFOLD_TEST") == mark and candidate.status() != psutil.STATUS_ZOMBIE:
                found.append(candidate)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(process, "LOOK_SECONDS", 0.1)
    return f"{os.getpid()}-{tmp_path.name}"


@pytest.mark.slow
def test_a_hanging_engine_is_ended_with_all_it_started(mark: str, tmp_path: Path) -> None:
    command = [str(fake_python(tmp_path, HANG)), "script"]
    ended = process.run(command, tmp_path / "log", 3, {"FOURFOLD_TEST": mark})
    assert ended.timed_out and not ended.ok
    assert "no answer within 3 s" in ended.why(3)
    assert marked(mark) == []
    assert not Path(f"/dev/shm/fourfold-test-{mark}").exists()
    scratch = {Path(line) for line in (tmp_path / "log").read_text().splitlines()}
    assert len(scratch) == 1  # they share one, and it is gone
    assert not scratch.pop().exists()


def test_a_killed_engine_leaves_no_orphans(mark: str, tmp_path: Path) -> None:
    """As by the kernel when memory runs out: the parent has no time to tidy up."""
    ending = "time.sleep(600 if 'child' in sys.argv else 1)\n    os.kill(os.getpid(), 9)"
    body = HANG.replace("time.sleep(600)", ending)
    ended = process.run([str(fake_python(tmp_path, body)), "script"], tmp_path / "log", 30, {"FOURFOLD_TEST": mark})
    assert "ended by SIGKILL" in ended.why(30)
    assert marked(mark) == []
    assert not Path(f"/dev/shm/fourfold-test-{mark}").exists()


def test_orphans_that_nobody_had_seen_are_found_by_their_session(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOOK_SECONDS", 1000)  # one look, before the child is there
    ending = "time.sleep(600 if 'child' in sys.argv else 1)"
    body = HANG.replace("(False, True)", "(False,)").replace("time.sleep(600)", ending)
    ended = process.run([str(fake_python(tmp_path, body)), "script"], tmp_path / "log", 30, {"FOURFOLD_TEST": mark})
    assert ended.ok
    assert marked(mark) == []
    assert not Path(f"/dev/shm/fourfold-test-{mark}").exists()


def test_shared_memory_that_others_hold_stays(mark: str, tmp_path: Path) -> None:
    path = Path(f"/dev/shm/fourfold-test-{mark}")
    path.write_bytes(bytes(4096))
    try:
        with path.open("rb"):
            process.run([str(fake_python(tmp_path, HANG)), "script"], tmp_path / "log", 2, {"FOURFOLD_TEST": mark})
            assert path.exists()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
@pytest.mark.slow
def test_a_signal_to_the_command_ends_the_engine_too(
    copy: Broken, mark: str, tmp_path: Path, number: int, code: int
) -> None:
    """Ctrl-C or `kill`, twice: no traceback, nothing of the engine left, the lock free."""
    out = copy(CT).folder
    command = [sys.executable, "-m", "fourfold", "verify", str(out), "--engine", "vllm"]
    environment = {**os.environ, "PYTHONPATH": str(Path(process.__file__).parents[1]), "FOURFOLD_TEST": mark}
    with subprocess.Popen(
        [*command, "--python", str(fake_python(tmp_path, HANG))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        limit = time.monotonic() + 120
        while len(marked(mark)) < 4:  # the command, the engine and its two children
            assert child.poll() is None and time.monotonic() < limit
            time.sleep(0.2)
        time.sleep(1.5)  # longer than LOOK_SECONDS
        child.send_signal(number)
        time.sleep(0.5)  # the engine ignores SIGTERM: the command is at its grace period
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    assert "Traceback" not in said
    assert marked(mark) == []
    assert not Path(f"/dev/shm/fourfold-test-{mark}").exists()
    (scratch,) = {Path(line) for line in (out / ".fourfold" / "verify-vllm-mtp.log").read_text().splitlines()}
    assert not scratch.exists()
    with hold(out):
        pass


def test_quiet(copy: Broken) -> None:
    out = copy(CT).folder
    assert (verify(out, "--quiet").exit_code, verify(out, "-q").output) == (0, "")
    (out / "model-00001-of-00003.safetensors").unlink()
    assert (verify(out, "--quiet").exit_code, verify(out, "-q").output) == (1, "")
    assert not json.loads((out / "verify.json").read_text())["passed"]


def test_the_time_limit_of_the_command(
    copy: Broken, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURFOLD_TEST", mark)
    out = copy(CT).folder
    answered = verify(out, "--engine", "vllm", "--python", fake_python(tmp_path, HANG), "--timeout", "0.03")
    assert answered.exit_code == 1, answered.output
    assert "no answer within 2 s" in " ".join(answered.stdout.split())
    assert len(marked(mark)) == 0
