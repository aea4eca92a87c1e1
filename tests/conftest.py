"""What all tests share: the example model, and golden files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import blocks

if not torch.cuda.is_available():
    # Read by triton when it is imported, which any part of core may do: its kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

# Processes that tests start run this source too, whatever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])

# A run in a shell's background ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what is found into tests/golden")
    parser.addoption("--devices", default="cpu", help="what end-to-end runs take that name no device, such as cpu*4")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--devices") != "cpu":
        import releases  # noqa: PLC0415 (it imports all of fourfold, which most runs of one file need not wait for)

        releases.machine = replace(releases.machine, devices=config.getoption("--devices"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Small blocks for the tests of the numbers, and for fixtures that they make, whichever test asks first. A hook, as
    fixtures of a session are made before any fixture of a test. GPUs are tested with real sizes.
    """
    room = item.path.relative_to(ROOT / "tests").parts[0]
    if room not in blocks.ROOMS or item.get_closest_marker("gpu"):
        return (yield)
    with blocks.shrunk(*blocks.ROOMS[room]):
        return (yield)


@pytest.fixture(scope="session")
def example_model() -> Path:
    """The small trained MoE checkpoint that ships with the repository."""
    return ROOT / "examples" / "tiny-qwen3.6-moe"


@pytest.fixture(scope="session")
def vision_model() -> Path:
    """The small trained vision model of the benchmarks."""
    return ROOT / "benchmarks" / "vision" / "model"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """compare(name, text): the text must be that of tests/golden/<name>. `pytest --update-golden` writes it anew."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path.name}: if this is meant, pytest --update-golden"

    return compare
