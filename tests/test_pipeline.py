"""From a model to repositories on a small Hub of our own: all steps, resumed where they were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import releases
from command_line import invoke
from fourfold.interpreter import find_python
from fourfold.release import drafts, evaluate
from hub import TOKEN, Hub, serving

STEPS = ["quantize", "evaluate", "verify", "report", "convert gguf", "verify gguf", "convert mlx", "verify mlx",
         "publish", "publish gguf", "publish mlx"]  # fmt: skip
KILLED = ("quantize=9", "evaluate=2", "verify=1", "convert gguf=0", "verify mlx=0", "publish gguf=1")
WEIGHTS = (".safetensors", ".gguf", "config.json")  # other files have times in them


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "WINDOWS", 1)
    monkeypatch.setattr(drafts, "PROMPTS", 2)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases.make_source(tmp_path_factory.mktemp("pipeline") / "model")


def words(source: Path, out: Path, repo: str) -> list[object]:
    recipe = releases.write_recipe(source.parent)
    return ["release", source, repo, "--out", out, "--recipe", recipe, "--also", "gguf,mlx", "--memory", "2GiB"]


def weights(hub: Hub, repo: str) -> dict[str, bytes]:
    return {
        f"{end}/{name}": content
        for end in ("", "-GGUF", "-MLX")
        for name, content in hub.repos[repo + end].branches["main"].items()
        if name.endswith(WEIGHTS)
    }


def released(answer: Any) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return {step["name"]: step for step in last["data"]["steps"]}


@pytest.mark.slow
def test_killed_on_the_way_it_publishes_the_same_bytes(source: Path, hub: Hub, tmp_path: Path) -> None:
    """About a minute: a run that is killed in six steps, one that is not, and one with nothing left to do."""
    whole = invoke(*words(source, tmp_path / "model", "me/model"), "--json")
    assert whole.exit_code == 0, whole.output
    assert list(released(whole)) == STEPS and len(weights(hub, "me/model")) > 6
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN,
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
    script = Path(__file__).with_name("killed_release.py")
    (tmp_path / "again").mkdir()
    given = [source, releases.write_recipe(source.parent), tmp_path / "again" / "model", "me/again", *KILLED, "=0"]
    done = subprocess.run(
        [sys.executable, script, *map(str, given)], env=environment, capture_output=True, text=True, check=False
    )
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == ["ended -9"] * len(KILLED) + ["ended 0"], done.stdout + done.stderr
    assert weights(hub, "me/again") == weights(hub, "me/model")
    again = invoke(*words(source, tmp_path / "model", "me/model"), "--json")
    steps = released(again)
    before = [name for name in STEPS if steps[name]["seconds"] is None]
    assert before == [name for name in STEPS if name.split()[0] in ("evaluate", "verify", "convert")]
    assert weights(hub, "me/again") == weights(hub, "me/model")


def test_a_failed_check_stops_before_publishing(
    source: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words(source, tmp_path / "model", "me/model")[:7]
    with monkeypatch.context() as patched:
        patched.setattr("fourfold.api.verify", mock.Mock(side_effect=KeyboardInterrupt))
        assert invoke(*given).exit_code == 130
    shard = next((tmp_path / "model").glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    answer = invoke(*given)
    assert answer.exit_code == 1 and not hub.repos, answer.output
    assert "Not published, a check failed." in answer.stdout and shard.name in " ".join(answer.stdout.split())
    assert (tmp_path / "model" / "README.md").is_file()


def test_dry_run_names_every_step(source: Path, tmp_path: Path) -> None:
    answer = invoke(*words(source, tmp_path / "model", "me/model"), "--dry-run")
    assert answer.exit_code == 0 and not (tmp_path / "model").exists()
    table = answer.stdout[answer.stdout.index("step ") :]
    assert [line[:13].strip() for line in table.splitlines()[1 : len(STEPS) + 1]] == STEPS
    assert "sglang and vllm not installed" in table or find_python("vllm", None)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--also", "ggf"], "--also: got 'ggf', expected gguf or mlx, or both: gguf,mlx"),
        (["--layers", "0-1"], "--layers: got a trial, expected the whole model"),
        (["--base-model", "x"], "--base-model: got 'x'"),
    ],
)
def test_what_would_stop_a_later_step_is_said_at_once(
    source: Path, tmp_path: Path, more: list[str], problem: str
) -> None:
    answer = invoke("release", source, "me/model", "--out", tmp_path / "model", *more)
    assert answer.exit_code == 2 and problem in " ".join(answer.stderr.split()), answer.stderr
    assert not (tmp_path / "model").exists()
