"""Links inside OUT: no command writes through one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import invoke

Altered = Callable[[Path], Path]
COMMANDS = {
    "quantize": ("quantize", "SOURCE", "OUT"),
    "restart": ("quantize", "SOURCE", "OUT", "--restart"),
    "evaluate": ("evaluate", "OUT", "--source", "SOURCE", "--windows", "2", "--length", "64", "--no-drafts"),
    "verify": ("verify", "OUT"),
    "report": ("report", "OUT"),
    "publish": ("publish", "OUT", "me/model", "--force", "a test"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("link", ["figures", ".fourfold", ".fourfold/run.log"])
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_written_through_a_link(
    shipped: dict[str, Path], shipped_source: Path, altered: Altered, tmp_path: Path, link: str, command: str
) -> None:
    out, outside = altered(shipped["compressed-tensors"]), tmp_path / "outside"
    (out / "README.md").write_text("# A release\n")
    place = out / link
    if place.exists():
        place.rename(outside)
    else:
        outside.mkdir()
    place.symlink_to(outside)
    before = contents(tmp_path)
    places = {"OUT": str(out), "SOURCE": str(shipped_source)}
    done = invoke(*(places.get(word, word) for word in COMMANDS[command]))
    said = " ".join(done.stderr.split())
    assert done.exit_code == 2 and f"{place}: got a link to {outside}" in said, done.output
    assert contents(tmp_path) == before


def test_a_conversion_does_not_write_through_a_link(shipped: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / ".new.converting").symlink_to(tmp_path / "mine")
    words = ["convert", str(shipped["gptq"]), str(tmp_path / "new"), "--format", "compressed-tensors"]
    done = invoke(*words)
    assert done.exit_code == 2 and "got a link" in done.stderr, done.output
    assert (tmp_path / "mine" / "thesis.txt").exists()
