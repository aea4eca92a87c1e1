"""doctor on machines that are made up here: a GPU that torch cannot use, a full disk, a token, an engine."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from command_line import invoke

TABLE = "0, GPU-1234, NVIDIA GeForce RTX 3090, 24576, 24000, 8.6"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all of PATH, but for the shell's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_machine_without_a_gpu_is_sound(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - 5, 5 * 10**9))
    answer = invoke("doctor", tmp_path / "not" / "there", "--json")
    assert answer.exit_code == 0, answer.output
    found = {one["name"]: one for one in json.loads(answer.stdout)["findings"]}
    assert found["GPU"]["found"] == "none (there is no nvidia-smi): quantize runs on the CPU"
    assert found["disk"]["fix"] == "Name an OUT on a larger disk" and "5.0 GB free" in found["disk"]["found"]
    assert found["Hub"]["found"] == "a token is present" and "hf_secret" not in answer.output
    assert f"of {psutil.virtual_memory().total / 1e9:.1f} GB" in found["memory"]["found"]
    assert found["vllm"]["found"].startswith("not found on PATH")


def test_a_gpu_that_torch_cannot_use_is_broken(path: Path) -> None:
    script(path / "nvidia-smi", f'case "$1" in *driver*) echo 550.54;; *) echo "{TABLE}";; esac')
    answer = invoke("doctor")
    assert answer.exit_code == 1, answer.output
    shown = " ".join(answer.stdout.split())
    assert "NVIDIA GeForce RTX 3090, compute capability 8.6, 25.2 of 25.8 GB free" in shown
    assert "driver 550.54" in shown and "there is a GPU -> Install a build of torch" in shown
    assert shown.endswith("Something is broken: see the arrows.")


def test_an_engine_on_path_has_its_version(path: Path) -> None:
    script(path / "vllm", "exit 0")
    script(path / "python", f'case "$2" in *find_spec*) exit 0;; *) exec {sys.executable} -c "print(9.9)";; esac')
    shown = " ".join(invoke("doctor").stdout.split())
    assert f"vllm 9.9 ({path}/python)" in shown
