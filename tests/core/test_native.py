"""Kernels where numba can keep nothing beside them nor under HOME: a container's user, a cluster, a service."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold

CODE = """
import torch
from fourfold.core.kernels import bf16, cpu, cpu_rows
print(cpu.permute(torch.eye(2)[None], torch.tensor([[1, 0]])).shape)
"""


@pytest.mark.parametrize("folder", ["absent", "another's"])
def test_a_read_only_installation_without_home(tmp_path: Path, folder: str) -> None:
    """Root may write anywhere, so that folders are files here, as good as read-only."""
    package = Path(fourfold.__file__).parent
    copied = shutil.copytree(package, tmp_path / "fourfold", ignore=shutil.ignore_patterns("__pycache__", "text"))
    (copied / "core" / "kernels" / "__pycache__").touch()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    kept = temporary / f"fourfold-numba-{os.geteuid()}"
    if folder == "another's":  # anyone could have put a pickle there
        kept.mkdir()
        kept.chmod(0o777)
    paths = {"PYTHONPATH": str(tmp_path), "HOME": os.devnull, "TMPDIR": str(temporary)}
    left = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "NUMBA_"))}
    command = [sys.executable, "-B", "-c", CODE]
    done = subprocess.run(command, env=left | paths, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bool(kept.is_dir() and list(kept.rglob("*.nbc"))) == (folder == "absent")
    assert folder != "absent" or kept.stat().st_mode & 0o777 == 0o700
