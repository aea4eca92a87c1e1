"""Real engines, built by `make test-engine` into .engines, and the example model quantized for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

import exports
from broken import Copy
from fourfold.distributed.devices import Machine
from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe

ENGINES = Path(__file__).parents[2] / ".engines"
# Little text, one stream: it is the loading and running that is looked at here.
SMALL = ("calibration.length=256", "heldout.windows=4", "heldout.length=256", "solver.passes=0", "solver.pool_rows=512")
SOURCES = 'calibration.sources=[{builtin="general", rows=24}, {builtin="code", rows=8}]'


@pytest.fixture(scope="session")
def python() -> Callable[[str], Path]:
    """python(engine): the interpreter of its environment. Not there is a failure: never skipped in silence."""

    def find(engine: str) -> Path:
        path = ENGINES / engine / "bin" / "python"
        assert path.exists(), f"{path} is not there: `make test-engine` builds it"
        return path

    return find


@pytest.fixture(scope="session", autouse=True)
def vllm_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What makes small starts quick. vLLM asks a process of its own about each model class and keeps the answer: once
    is enough for all tests. Threads that are bound to cores wait for each other where others are at work, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm-cache")))
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def made(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made(format, recipe, *changes): the example quantized, once."""
    folder = tmp_path_factory.mktemp("releases")

    def make(form: str, recipe: str = "fast", *changes: str) -> Path:
        out = folder / "-".join([form, recipe, *changes])
        if not out.exists():
            loaded = load_recipe(recipe, [f"format={form}", SOURCES, *SMALL, *changes])
            quantize(example_model, out, loaded, machine=Machine(memory_bytes=2 * 2**30))
        return out

    return make


@pytest.fixture(scope="session")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """rounded(family): a small release of it, and what transformers gives for exports.TOKENS in fp32; made once.

    "compact FAMILY" has int8 beside the experts.
    """
    folder, found = tmp_path_factory.mktemp("families"), dict[str, tuple[Path, Tensor]]()

    def make(family: str) -> tuple[Path, Tensor]:
        if family not in found:
            kind, compact = family.removeprefix("compact "), family.startswith("compact ")
            out = exports.release(folder / family, kind, compact=compact)
            found[family] = out, exports.logprobs(out, folder / "fp32")
        return found[family]

    return make


@pytest.fixture
def copy(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Copy]:
    """copy(format): a release to break."""
    return lambda form: Copy(shutil.copytree(made(form), tmp_path / "release"))
