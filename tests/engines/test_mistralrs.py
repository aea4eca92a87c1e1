"""GGUF files in mistral.rs, a second engine that reads them: the text that llama.cpp gives. Both on a CPU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
from torch import Tensor

import releases
from fourfold.release.export import export

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
INTERPRETER = HERE.parents[1] / ".engines/mistralrs/bin/python"
# Of those that are written as GGUF. mistral.rs 0.9.5 has no qwen2moe and no olmoe, and its cache for qwen3next does not
# hold the few positions that a small checkpoint has.
FAMILIES = ["qwen3_5_moe", "qwen3_moe", "glm4_moe"]
WORDS = "The game was released in 1913 and a number of people read the book about it in the first year".split()
PROMPTS = [" ".join(WORDS[: count + 1]) for count in range(16)]
TOKENS, ENOUGH = 4, 12  # of a prompt; prompts: where two tokens are about as likely, arithmetic decides
Made, Find, Rounded = Callable[[str], Path], Callable[[str], Path], Callable[[str], tuple[Path, Tensor]]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if not INTERPRETER.exists():
        pytest.skip(f"{INTERPRETER} is not there: make_mistralrs.sh builds it, where PyPI has a wheel")


def continued(python: Path, engine: str, file: Path, scratch: Path) -> list[str]:
    (scratch / "prompts.json").write_text(json.dumps(PROMPTS))
    files = [str(file), str(scratch / "prompts.json"), str(scratch / "texts.json")]
    command = [str(python), str(HERE / "gguf_text.py"), engine, *files, str(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[str] = json.loads((scratch / "texts.json").read_text())
    assert len(found) == len(PROMPTS) and all(found)
    return found


def agreed(python: Find, file: Path, scratch: Path) -> int:
    """So many prompts have the same text after them in both engines."""
    wanted = continued(python("llama.cpp"), "xllamacpp", file, scratch)
    found = continued(INTERPRETER, "mistralrs", file, scratch)
    return sum(one == other for one, other in zip(wanted, found, strict=True))


def test_the_example(made: Made, python: Find, tmp_path: Path) -> None:
    """And with the nibbles of its experts turned, another text than before."""
    export(made(releases.FORMATS[0]), tmp_path / "new", "gguf")
    (file,) = (tmp_path / "new").glob("*.gguf")
    assert agreed(python, file, tmp_path) >= ENOUGH
    right = continued(INTERPRETER, "mistralrs", file, tmp_path)
    for tensor in gguf.GGUFReader(file, "r+").tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            block = tensor.data.reshape(-1, 18)
            block[:, 2:] = block[:, 2:] >> 4 | block[:, 2:] << 4
            tensor.data[:] = numpy.asarray(block).reshape(tensor.data.shape)
    wrong = continued(INTERPRETER, "mistralrs", file, tmp_path)
    assert sum(one == other for one, other in zip(right, wrong, strict=True)) < ENOUGH


@pytest.mark.parametrize("family", FAMILIES)
def test_families(python: Find, rounded: Rounded, tmp_path: Path, family: str) -> None:
    export(rounded(family)[0], tmp_path / "new", "gguf")
    (file,) = (tmp_path / "new").glob("*.gguf")
    assert agreed(python, file, tmp_path) >= ENOUGH
