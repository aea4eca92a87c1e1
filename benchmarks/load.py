"""How often `verify --load` is wrong: a sound release many times in vLLM, and one with a kernel that is rarely wrong.

    python benchmarks/load.py --python .engines/vllm/bin/python --json benchmarks/results/load.json

The example model, quantized by `fast` on little text; 16 requests at once, with texts of the length that verify takes.
Sound: vLLM's own kernel for this CPU (or fourfold's exact one where it has none), with MTP and without. Faulty:
fourfold's exact kernel; in one of 50 expert passes over more than 8 tokens, one token gets its neighbour's output
(tests/engines/faulty_vllm.py). Each run starts an engine and has its requests in an order of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from msgspec import convert

from fourfold.distributed.devices import Machine
from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe
from fourfold.records.results import Status
from fourfold.release.verify import run as verify
from fourfold.release.verify import vllm
from fourfold.release.verify.engine import Engine, environment
from fourfold.release.verify.load import Loaded, judge_load

ROOT = Path(__file__).parents[1]
FAULTY = ROOT / "tests" / "engines" / "faulty_vllm.py"
SHARE = 0.02
SMALL = ("calibration.length=256", "heldout.windows=4", "heldout.length=256", "solver.passes=0", "solver.pool_rows=512")
SOURCES = 'calibration.sources=[{builtin="general", rows=24}, {builtin="code", rows=8}]'
BATCH = 4  # runs in one process: vLLM does not give all of its memory back


def requests(out: Path, at_once: int, draft_tokens: int, runs: range, exact: bool) -> list[dict[str, Any]]:
    """A run for each, the second round shuffled by its number."""
    asked = []
    for number in runs:
        load = verify.load_request(out, at_once)
        random.Random(number).shuffle(load["rounds"][1]["order"])
        options = {"draft_tokens": draft_tokens, "load": load, "exact_experts": exact, "tokens": 2}
        asked.append(vllm.request(out, verify.windows(out)[:2], **options))
    return asked


def measure(engine: Engine, out: Path, options: argparse.Namespace, drafts: int, script: str, title: str) -> list[Any]:
    """Figures of each run."""
    rows: list[Any] = []
    for first in range(0, options.runs, BATCH):
        runs = range(first, min(first + BATCH, options.runs))
        asked = requests(out, options.at_once, drafts, runs, exact=script != vllm.SCRIPT)
        answer = engine.ask(script, f"{title}-{first}", asked)
        assert not answer.failure, answer.failure
        parts = answer.log.read_text(errors="replace").split(f"[fourfold] {out.resolve()}")[1:]
        for number, content, log in zip(runs, answer.content, parts, strict=True):
            check = judge_load(title, convert(content["load"], Loaded), list)
            row = {"title": title, "run": number, "passed": check.status is Status.PASS, "faults": log.count("[fault]")}
            rows.append(row | check.data | {"device": content["device"], "engine": content["engine"]})
            print(f"{title} {number}: {check.status}, {row['faults']} faults; {check.evidence[:160]}", flush=True)
    return rows


def summary(rows: list[Any]) -> dict[str, Any]:
    names = ("largest_regret", "largest_margin", "most", "alone_most", "twins")
    return {
        "runs": len(rows),
        "passed": sum(row["passed"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "parted": sum(row["parted"] for row in rows),
        "faults": [min(row["faults"] for row in rows), max(row["faults"] for row in rows)],
        **{name: max(row[name] for row in rows) for name in names},
        "mean": max(row["mean"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of vLLM's environment")
    parser.add_argument("--runs", type=int, default=10, help="of each kind")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["FAULT_SHARE"] = str(SHARE)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="load-") as name:
        folder = Path(name)
        recipe = load_recipe("fast", [SOURCES, *SMALL])
        model = ROOT / "examples" / "tiny-qwen3.6-moe"
        quantize(model, folder / "out", recipe, machine=Machine(memory_bytes=2 * 2**30))
        engine = Engine(
            name="vllm", python=options.python, logs=folder, limit_seconds=3600,
            environment=environment(folder / "cache"),
        )  # fmt: skip
        sound = measure(engine, folder / "out", options, vllm.DRAFT_TOKENS, vllm.SCRIPT, "sound, with MTP")
        sound += measure(engine, folder / "out", options, 0, vllm.SCRIPT, "sound")
        faulty = measure(engine, folder / "out", options, 0, str(FAULTY), "faulty")
        kernels = [line for line in vllm.kernels(vllm.Answer(log=folder / "verify-vllm-sound-0.log")) if "MoE" in line]
    result = {
        "at_once": options.at_once,
        "fault_share": SHARE,
        "sound": summary(sound),
        "faulty": summary(faulty),
        "kernels": kernels,
        "rows": sound + faulty,
        "seconds": time.perf_counter() - begin,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(result, indent=1)
    print(json.dumps({key: result[key] for key in ("sound", "faulty", "kernels")}, indent=1))
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
