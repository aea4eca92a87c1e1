"""What nvidia-smi says, and a machine without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.serve import machine

TABLE = """0, GPU-aaaa, NVIDIA GeForce RTX 3060, 12288, 12000, 8.6
1, GPU-bbbb, NVIDIA GeForce RTX 3060, 12288, 11000, 8.6
2, GPU-cccc, NVIDIA H200, 143771, 143000, 9.0
"""


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["3060", "3060", "H200"]),
        ("2,0", ["H200", "3060"]),
        ("GPU-c", ["H200"]),
        ("0,9,1", ["3060"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_that_a_process_would_see(visible: str | None, names: list[str]) -> None:
    assert [gpu.name.split()[-1] for gpu in machine.parse(TABLE, visible)] == names


def test_figures_of_a_gpu() -> None:
    gpu = machine.parse(TABLE, None)[1]
    assert (gpu.total_bytes, gpu.free_bytes, gpu.capability) == (12 * 2**30, 11000 * 2**20, (8, 6))


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> machine.Machine:
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{body}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return machine.look()


def test_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = smi(tmp_path, monkeypatch, f"cat <<'END'\n{TABLE}END")
    said = "2 x NVIDIA GeForce RTX 3060, 1 x NVIDIA H200, 12 GiB each, compute capability 8.6"
    assert found.describe() == said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "leaves none" in machine.look().no_gpu


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'No devices were found'; exit 6", "No devices were found"),
        ("echo '0, GPU-a, NVIDIA GB10, [N/A], [N/A], 12.1'", "not understood"),
        ("true", "lists none"),
    ],
)
def test_no_gpu_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    found = smi(tmp_path, monkeypatch, body)
    assert not found.gpus
    assert said in found.no_gpu
    assert said in found.describe()


def test_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.look().no_gpu == "there is no nvidia-smi"
