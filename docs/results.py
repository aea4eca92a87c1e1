"""What benchmarks/results/*.json say, by name and unit, and which command makes each of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
PEER = "gptqmodel"
TOKENS = 65_536  # of calibration, where a table shows one size
SIZES = {4_096: "4k", 16_384: "16k", TOKENS: "64k"}
KLD, MEDIAN = "forced_kl_mean", "kl_median"
REAL = {"quality_real": "prose", "quality_real_code": "code", "quality_real_chat": "chat"}  # of `make bench-real`: text
METHODS = {  # of README's results, a row each; in braces a package, for its version
    "rtn": "round-to-nearest (RTN)",
    PEER: "GPTQModel {gptqmodel}",
    "llmcompressor": "llm-compressor {llmcompressor} GPTQ",
    "llmcompressor-routed": "llm-compressor {llmcompressor} GPTQ, routed tokens only",
    "autoround": "AutoRound {auto-round}",
    "autoround-alg-ext": "AutoRound {auto-round} with `enable_alg_ext`",
    "fast": "fourfold `fast`",
    "best": "fourfold `best`",
    "guided": "fourfold `guided`",
}


@cache
def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").is_file()


def sizes(name: str) -> list[int]:
    """Calibration tokens of a result of benchmarks/quality.py."""
    return sorted({row["tokens"] for row in result(name)["means"]})


def methods(name: str) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in result(name)["means"]))


def find(name: str, method: str, tokens: int = TOKENS) -> dict[str, Any] | None:
    """What `mean` returns, None for a method that the result does not have."""
    rows = result(name)["means"]
    return next((dict(row) for row in rows if (row["method"], row["tokens"]) == (method, tokens)), None)


def mean(name: str, method: str, tokens: int = TOKENS) -> dict[str, Any]:
    """A method's figures in a result of benchmarks/quality.py, the mean of its seeds."""
    if row := find(name, method, tokens):
        return row
    raise SystemExit(
        f"{name}.json: got no {method!r} with {tokens:,} tokens, expected it among `means`. "
        f"Run {commands()[f'{name}.json']}"
    )


def curves(name: str) -> dict[str, dict[int, float]]:
    """Mean KLD with free routing by method and calibration tokens: of a result, and of those with other sizes.

    Another size has a file of its own, `NAME_256k.json`. Methods are those of README that look at tokens.
    """
    files = [path.stem for path in RESULTS.glob(f"{name}*.json") if re.fullmatch(rf"{name}(_\d+k(_\w+)?)?", path.stem)]
    rows = [row for file in sorted(files) for row in result(file)["means"]]
    found = {method: {row["tokens"]: row["kl_mean"] for row in rows if row["method"] == method} for method in METHODS}
    return {method: values for method, values in found.items() if values and method != "rtn"}


def ratio(name: str, method: str, other: str, key: str, tokens: int = TOKENS) -> float:
    """A figure of one method over that of another."""
    return float(mean(name, method, tokens)[key] / mean(name, other, tokens)[key])


def kld(value: float, digits: int = 2) -> str:
    return f"{1e3 * value:.{digits}f}"


def gigabytes(value: float, digits: int = 1) -> str:
    return f"{value / 1e9:,.{digits}f} GB"


def percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def fallback(row: dict[str, Any]) -> str:
    """Projections rounded to nearest; empty for a tool that does not say."""
    if "rounded" not in row:
        return ""
    return f"{row['rounded']:g} of {row['projections']:.0f}" if row["rounded"] else "none"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(method: str) -> str:
    return METHODS.get(method, f"`{method}`").format_map(result("quality_peers")["peer_versions"])


def options(name: str) -> dict[str, str]:
    """Flags of the recorded command, each with its value."""
    words = result(name)["command"].split()
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}


def predicted(machine: str, workers: int | str) -> dict[str, Any]:
    """A row of benchmarks/predictions.py."""
    rows = result("predictions")["predictions"]
    return next(row for row in rows if (row["machine"], row["workers"]) == (machine, int(workers)))


def headline(summary: dict[str, Any]) -> list[str]:
    """Of a release's metrics, as `fourfold quantize` prints them."""
    return [f"{summary['perplexity_release']:.4f}", f"{summary['kl_mean']:.5f} nats"]


def tested_on(name: str) -> str:
    found = result(name)
    made_on = found.get("machine") or found["runs"][0]["devices"]["cpu"]
    return made_on["cpu"] if isinstance(made_on, dict) else made_on.split(",")[0].removesuffix(" x86_64")


# --- how they are made ---------------------------------------------------------------------------------------------


def commands() -> dict[str, str]:
    """The command that makes each file: a target of the Makefile, or a line of a benchmark's docstring.

    Raises SystemExit for a file that no command makes.
    """
    found, target = dict[str, str](), ""
    for script in sorted([*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("vision/*.py")]):
        text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        for command in re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE):
            shown = " ".join(command.partition("#")[0].split())
            found |= dict.fromkeys(re.findall(r"results/(\w+\.json)", command), shown)
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines():
        target = match[1] if (match := re.match(r"([a-z-]+):", line)) else target
        found |= {name: f"make {target}" for name in re.findall(r"results/(\w+\.json)", line)}
    files = sorted(path.name for path in RESULTS.glob("*.json"))
    if nameless := [name for name in files if name not in found]:
        raise SystemExit(
            f"benchmarks/results: got {', '.join(nameless)}, which no target of the Makefile and no docstring in "
            "benchmarks/ makes. Name the command there, or delete the file"
        )
    return {name: found[name] for name in files}


def cpu_minutes(file: str) -> str:
    """CPU time as the file records it, judging and start-up left out; empty where it records none."""
    found = result(file.removesuffix(".json"))
    seconds = 0.0
    if file.startswith("quality"):
        seconds = sum(row["cpu_seconds"] for row in found["runs"])
    elif "cores" in found:
        seconds = sum(row["seconds"] for row in found["runs"]) * found["cores"]
    elif file == "ingredients.json":
        seconds = sum(row["measured_cpu_seconds"] for row in found["runs"])
    elif file == "plan.json":
        seconds = sum(row["cpu_seconds"] for row in found["runs"])
    elif file == "speed.json":
        seconds = 2 * sum(sum(tool["cpu_seconds_of_each_run"]) for tool in found["tools"].values())
    elif file == "workers.json":
        seconds = sum(sum(row["wall_seconds_of_each_run"]) for row in found["runs"].values())
    elif file == "reference_machine.json":
        seconds = 2 * found["run"]["wall_seconds"]
    elif file.startswith("full_layer"):
        seconds = found["seconds"] * found["options"]["threads"]
    return f"{seconds / 60:.0f}" if seconds else ""
