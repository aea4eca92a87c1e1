"""Every command of README and docs: its options exist, and it runs, in the order of its page, on the example model.

A block of `bash` is run line by line. What cannot be says why in a comment before it, `<!-- not run: REASON -->`, and
then only its options are looked at. A page that says `<!-- begins with: ./release -->` finds a finished release there.
Runs are real but small: fewer and shorter rows are set after what a command itself sets. Blocks of `python` are run,
those of `toml` read as recipes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from command_line import commands, invoke
from conftest import ROOT
from fourfold.bundled import CALIBRATION_TEXTS, TEXT
from fourfold.recipe import load_recipe

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:^(?P<before>[^\n]*)\n)?^```(?P<language>[^\n`]*)\n(?P<text>.*?)\n```$", re.MULTILINE | re.DOTALL
)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")
COMMAND = re.compile(r"(?:\$ )?(?:\.venv/bin/)?(?:fourfold|pip|make|python3?|hf|vllm|curl|git|torchrun) ", re.MULTILINE)
SHELL = re.compile(r"[|<>;&$`]")  # what wants a shell
SMALL = {
    "quantize": [f"--set={key}" for key in (
        "calibration.length=48", "heldout.length=64", "heldout.windows=2", "solver.pool_rows=64", "solver.passes=1",
    )],
    "evaluate": ["--windows=2", "--length=64"],
}  # fmt: skip
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@dataclass(frozen=True)
class Block:
    """Code between fences. reason: why it is not run, empty if it is."""

    language: str
    text: str
    reason: str

    @property
    def commands(self) -> list[str]:
        """Its lines, continued ones joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#\s.*", "", line).strip())]


def blocks(page: Path) -> list[Block]:
    """Blocks of a page in order."""
    found = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        reason = NOT_RUN.fullmatch((match["before"] or "").strip())
        found.append(Block(match["language"], match["text"], reason[1] if reason else ""))
    return found


def calls(page: Path) -> list[list[str]]:
    """Words of every call of fourfold, in blocks and in the text between them."""
    text = page.read_text(encoding="utf-8")
    commands = [line for block in blocks(page) if block.language == "bash" for line in block.commands]
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )?fourfold [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    found = []
    for line in [*commands, *(code.replace("\\|", "|").translate({ord("["): "", ord("]"): ""}) for code in inline)]:
        words = shlex.split(line.partition(" > ")[0])
        places = [place for place, word in enumerate(words) if word.rpartition("/")[2] == "fourfold"]
        found += [words[place + 1 :] for place in places[:1]]
    return found


def test_pages_are_found() -> None:
    assert len(PAGES) > 15
    assert sum(len(calls(page)) for page in PAGES) > 60


@pytest.mark.parametrize("name", NAMES)
def test_commands_stand_in_blocks_that_say_so(name: str) -> None:
    for block in blocks(ROOT / name):
        assert block.language in ("bash", "python", "toml", "text", ""), block
        assert block.language or not COMMAND.match(block.text), f"a command that nobody runs: {block.text}"


@pytest.mark.parametrize("name", NAMES)
def test_options_exist(name: str) -> None:
    known = {words: (command, arguments) for words, command, arguments in commands()}
    for words in calls(ROOT / name):
        command, rest = "fourfold", words
        while rest and f"{command} {rest[0]}" in known:
            command, rest = f"{command} {rest[0]}", rest[1:]
        called, arguments = known[command]
        assert called.default_command or not rest or rest[0].startswith("-"), f"no such command: {words}"
        options = {name for argument in arguments for name in argument.names} | {*called}
        used = {word.partition("=")[0] for word in rest[: [*rest, "--"].index("--")] if re.match("--?[a-z]", word)}
        assert used <= options, f"{words}: no option {', '.join(used - options)}"


@pytest.mark.parametrize("name", NAMES)
def test_targets_and_scripts_exist(name: str) -> None:
    text, makefile = (ROOT / name).read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [command for block in blocks(ROOT / name) if block.language == "bash" for command in block.commands]
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", "\n".join([*commands, *re.findall("`[^`]+`", text)]), re.M):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for line in re.findall(r"python3? ((?:benchmarks|docs|examples|tests)/[^`\n]+)", text.replace("\\\n", " ")):
        script, *words = shlex.split(line, comments=True)
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], line


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere_in_the_repository(name: str) -> None:
    """As docs/ is read there: no page is written by `make docs` alone."""
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if ":" not in link and not (ROOT / name).parent.joinpath(link).exists()] == []


def test_every_page_has_its_place_on_the_site() -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    named = re.findall(r'= "([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(pages)


def test_recipes_are_read(tmp_path: Path) -> None:
    read = 0
    for page in PAGES:
        for block in blocks(page):
            if block.language == "toml":
                (tmp_path / "mine.toml").write_text(block.text, encoding="utf-8")
                assert load_recipe(str(tmp_path / "mine.toml")).calibration.sources
                read += 1
    assert read


# --- what is run -------------------------------------------------------------------------------------------------


def run(command: str) -> None:
    """One command in the working folder: fourfold's own in this process, where torch has been imported once."""
    words = shlex.split(command)
    if words[0] != "fourfold" or SHELL.search(command):
        environment = {**os.environ, "PATH": f"{Path.cwd() / '.bin'}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-euc", command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return
    answered = invoke(*words[1:], *SMALL.get(words[1], []))
    assert answered.exit_code == 0, f"{command}\n{answered.output}"


@pytest.fixture(scope="session")
def ready(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished release of the example model."""
    out = tmp_path_factory.mktemp("ready") / "release"
    run(f"fourfold quantize {example_model} {out}")
    return out


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example_model: Path) -> Path:
    """What a reader has at hand: ./model, text of their own, the repository's examples, fourfold on PATH."""
    (tmp_path / "model").symlink_to(example_model)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(TEXT / CALIBRATION_TEXTS["chat"].file, tmp_path / "mine.jsonl")
    (tmp_path / ".bin").mkdir()
    (tmp_path / ".bin" / "fourfold").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fourfold "$@"\n')
    (tmp_path / ".bin" / "fourfold").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = [name for name in NAMES if any(b.language in ("bash", "python") and not b.reason for b in blocks(ROOT / name))]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_page(name: str, desk: Path, request: pytest.FixtureRequest) -> None:
    if "<!-- begins with: ./release -->" in (ROOT / name).read_text(encoding="utf-8"):
        shutil.copytree(request.getfixturevalue("ready"), desk / "release")
    names: dict[str, Any] = {}
    for block in blocks(ROOT / name):
        if block.reason:
            continue
        if block.language == "bash":
            for command in block.commands:
                run(command)
        elif block.language == "python":
            exec(compile(block.text, name, "exec"), names)


@pytest.mark.slow
def test_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code cells, in order, in the folder where Jupyter runs them."""
    monkeypatch.chdir(ROOT / "examples")
    notebook = json.loads(Path("quantize.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    shutil.rmtree(names["OUT"].parent)
    said = capsys.readouterr().out
    assert "layer 3: hidden error" in said
    assert "kl_mean" in said
