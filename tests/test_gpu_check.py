"""benchmarks/gpu_check.py: every step ends with a verdict, whatever becomes of it, and the report has it at once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
HANGS = "import subprocess; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); child.wait()"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return benchmark("gpu_check")


def test_functions_that_a_layer_is_timed_by_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    places = [place for places, _ in benchmark("full_layer").STEPS.values() for place in places]
    assert [name for module, name in places if not hasattr(module, name)] == []


def run(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, steps: list[Any], *words: str) -> Any:
    """The lines of a check that has these steps."""
    monkeypatch.setattr(gpu_check, "steps", lambda options, done: iter(steps))
    lines = gpu_check.check(gpu_check.parse(["--out", str(out), *words]))
    assert json.loads((out / "gpu_check.json").read_text())["steps"] == lines
    return lines


def test_every_step_has_a_verdict(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hanging step is killed with what it started; one that fails stops nothing; each is in the report at once."""
    python, last_line = gpu_check.python, gpu_check.last_line
    report = f"print(open({str(tmp_path / 'gpu_check.json')!r}).read().replace(chr(10), ''))"

    def wrong(text: str) -> Any:
        raise gpu_check.Wrong("KL is 9 % off", {"kl": 0.09})

    steps = [
        gpu_check.Step("hangs", 4.0, python("-c", HANGS), last_line),
        gpu_check.Step("fails", 20, python("-c", "print('{}'); raise SystemExit('no such device')"), wrong),
        gpu_check.Step("no figures", 20, python("-c", "print('not JSON')"), last_line),
        gpu_check.Step("needs it", 20, python("-c", "print(1)"), last_line, needs="fails"),
        gpu_check.Step("sees the report", 20, python("-c", report), last_line),
    ]
    lines = run(gpu_check, monkeypatch, tmp_path, steps)
    assert [line["verdict"] for line in lines] == ["timed out", "failed", "failed", "skipped", "ok"]
    hangs, fails, silent, needs, sees = lines
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(hangs["error"].split()[-1])).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    assert fails["figures"] == {"kl": 0.09}
    assert fails["error"].startswith("KL is 9 % off") and "no such device" in fails["error"]
    assert "JSONDecodeError" in silent["error"] and needs["error"] == "fails is not ok"
    assert sees["figures"]["steps"] == lines[:4]


def test_no_step_outlasts_the_budget(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleeps = gpu_check.Step("sleeps", 60, gpu_check.python("-c", "import time; time.sleep(60)"), gpu_check.last_line)
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 1.0)
    lines = run(gpu_check, monkeypatch, tmp_path, [sleeps, sleeps], "--budget", "1.5")
    assert [line["verdict"] for line in lines] == ["timed out", "skipped"]


def test_only_missing_wheels_are_installed(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not there; there but too old for fourfold; there; there, and fourfold itself does not ask for it."""
    for name in ("nowhere-1.0", "rich-999.0", "typer-999.0", "click-999.0"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    monkeypatch.setattr(gpu_check, "requirements", lambda: ["rich>=999", "typer>=0.1"])
    missing = [path.name.partition("-")[0] for path in gpu_check.missing_wheels(tmp_path)]
    assert missing == ["nowhere", "rich"]


def steps_of(report: Path) -> Iterator[tuple[str, str, str]]:
    for line in json.loads(report.read_text(encoding="utf-8"))["steps"]:
        yield line["step"], line["verdict"], line.get("error", "")


@pytest.mark.slow
def test_the_whole_check_passes_small_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(tmp_path), "--budget", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(steps_of(tmp_path / "gpu_check.json"))
    assert done.returncode == 0 and {verdict for _, verdict, _ in found} == {"ok"}, found
    assert len(found) >= 14
