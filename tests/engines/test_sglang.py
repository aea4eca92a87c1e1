"""Level 3 of verify with SGLang's own loader: what it takes whole, and the draft experts that it drops in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import invoke

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("form", "code"), [("compressed-tensors", 0), ("gptq", 1)])
def test_what_the_loader_writes(
    made: Callable[[str], Path], python: Callable[[str], Path], form: str, code: int
) -> None:
    out = made(form)
    arguments = ["verify", str(out), "--engine", "sglang", "--python", str(python("sglang"))]
    done = invoke(*arguments)
    assert done.exit_code == code, done.output
    check = next(c for c in json.loads((out / "verify.json").read_text())["checks"] if c["name"] == "loader")
    loads = check["data"]["loads"]
    assert check["data"]["engine"] == "SGLang 0.5.23"
    assert loads["Qwen3_5MoeForConditionalGeneration"]["unwritten"] == {}
    unwritten = loads["Qwen3_5ForCausalLMMTP"]["unwritten"]
    if form == "compressed-tensors":
        assert unwritten == {}
        return
    assert {name.rpartition(".")[2] for name in unwritten} >= {"w13_qweight", "w2_qweight", "w13_scales", "w2_scales"}
    assert "a release in format compressed-tensors" in check["evidence"]
