"""Files between stages, damaged by hand: every command that reads one ends with the same clear error, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import invoke
from fourfold.records.bench import Bench
from fourfold.records.record import Record
from fourfold.records.release import Export, Reference, Run, State
from fourfold.records.results import Metrics, Verdict

Change = Callable[[Any], object]
# Commands by the file that they read: OUT is a release, MODEL its source, TEXTS has its recipe.
COMMANDS: dict[str, tuple[type[Record], list[str]]] = {
    "fourfold.json": (State, [
        "quantize MODEL OUT --recipe TEXTS/small.toml", "evaluate OUT --source MODEL",
        "evaluate MODEL --source MODEL --against OUT", "verify OUT", "report OUT", "convert OUT NEW --format gptq",
        "convert OUT NEW --format mlx", "serve OUT --engine vllm --print", "publish OUT me/small --dry-run",
    ]),
    "metrics.json": (Metrics, ["evaluate OUT --source MODEL", "report OUT", "compare OUT OUT",
                               "convert OUT NEW --format mlx"]),
    "verify.json": (Verdict, ["report OUT", "publish OUT me/small --dry-run"]),
    "bench.json": (Bench, ["report OUT"]),
    "reference.json": (Reference, ["verify OUT", "report OUT", "convert OUT NEW --format gptq"]),
    "conversion.json": (Export, [
        "inspect OUT", "verify OUT", "report OUT", "compare OUT MODEL", "serve OUT --print",
        "publish OUT me/small --dry-run",
    ]),
    ".fourfold/run.json": (Run, ["quantize MODEL OUT --recipe TEXTS/small.toml"]),
}  # fmt: skip
WRONG: dict[str, tuple[Change, str]] = {  # a key of another type in each file, and what the error says of it
    "fourfold.json": (lambda raw: raw["output"].update(tensor_bytes="many"), "output.tensor_bytes: got 'many'"),
    "metrics.json": (lambda raw: raw["layers"][0].update(hidden_error=None), "layers.0.hidden_error: got None"),
    "verify.json": (lambda raw: raw.update(passed="yes"), "passed: got 'yes', expected bool"),
    "bench.json": (lambda raw: raw.update(levels={}), "levels: got {}, expected array"),
    "reference.json": (lambda raw: raw["tokens"].__setitem__(0, "a"), "tokens.0: got 'a', expected int"),
    "conversion.json": (lambda raw: raw["files"].update(x=3), "files.x: got 3, expected object"),
    ".fourfold/run.json": (lambda raw: raw["settings"].update(threads=[]), "settings.threads: got [], expected int"),
}
GONE = {  # a key that is taken away
    "fourfold.json": "identity", "metrics.json": "protocol", "verify.json": "checks", "bench.json": "levels",
    "reference.json": "logprobs", "conversion.json": "files", ".fourfold/run.json": "settings",
}  # fmt: skip
VERSIONED = ("fourfold.json", "bench.json", "conversion.json")


@pytest.fixture
def place(release: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A release with each of the files, in the working folder of the commands."""
    monkeypatch.chdir(tmp_path)
    Path("OUT").symlink_to(release)
    Path("MODEL").symlink_to(finished.parent / "models--Qwen--FromTheHub" / "snapshots" / "b")
    Path("TEXTS").symlink_to(finished.parent)
    (release / "README.md").write_text("# A card\n", encoding="utf-8")
    state = json.loads((release / "fourfold.json").read_text(encoding="utf-8"))
    run = {"identity": state["identity"], "settings": state["settings"]}
    export = {
        "fourfold": state["fourfold"], "before": "gptq", "after": "mlx", "projections": 24, "group_size": 32,
        "content": "", "settings": {}, "release": None, "files": {},
    }  # fmt: skip
    load = {"output_tokens": 8, "temperature": 0.0, "prompts": "built-in"}
    bench = {
        "url": "u", "model": "m", "fourfold": state["fourfold"], "engine": "", "metrics": "off", "pool": {},
        "load": load, "levels": [], "card": None,
    }  # fmt: skip
    for name, content in ((".fourfold/run.json", run), ("conversion.json", export), ("bench.json", bench)):
        (tmp_path / name.replace("/", "-")).write_text(json.dumps(content), encoding="utf-8")
    return release


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_file_key_and_fix(place: Path, name: str, tmp_path: Path) -> None:
    kind, commands = COMMANDS[name]
    path, aside = place / name, tmp_path / name.replace("/", "-")
    sound = (aside if aside.exists() else path).read_text(encoding="utf-8")
    if name == ".fourfold/run.json":
        (place / "fourfold.json").unlink()

    def changed(change: Change) -> str:
        content = json.loads(sound)
        change(content)
        return json.dumps(content)

    damaged = {
        changed(WRONG[name][0]): WRONG[name][1],
        changed(lambda raw: raw.pop(GONE[name])): f"{GONE[name]}: missing",
    }
    if name != "conversion.json":  # a file of that name which is no JSON is of another tool
        damaged[sound[: len(sound) // 2]] = "not JSON ("
    if name in VERSIONED:
        damaged[changed(lambda raw: raw.update(fourfold="99.0.0"))] = "fourfold: got '99.0.0', expected"
    for text, said in damaged.items():
        path.write_text(text, encoding="utf-8")
        for command in commands:
            answered = invoke(*command.split())
            words = " ".join(answered.stderr.split())
            assert answered.exit_code == 2, (command, said, answered.output, answered.exception)
            assert name in words and said in words, (command, words)
            assert kind.FIX in words or "Update fourfold" in words, (command, words)
            assert "Traceback" not in answered.output and not (tmp_path / "NEW").exists()


def test_a_damaged_log_is_named_by_its_line(place: Path) -> None:
    path = place / "quant_log.csv"
    header, first, *rest = path.read_text(encoding="utf-8").splitlines()
    for lines, said in (
        (["layer,expert", first], "columns: got layer,expert, expected layer,expert,projection,"),
        ([header, first, "1,2"], "line 3: "),
        ([header, first.replace("gptq", "magic"), *rest], "line 2: Invalid enum value 'magic'"),
    ):
        path.write_text("\n".join(lines), encoding="utf-8")
        for command in ("report OUT", "verify OUT --source MODEL"):
            answered = invoke(*command.split())
            words = " ".join(answered.stderr.split())
            assert answered.exit_code == 2 and "quant_log.csv" in words and said in words, (command, answered.output)
