"""Faults of the system under `fourfold quantize`: how many are survived, of which kind.

    python benchmarks/faults.py --every 5 --json benchmarks/results/faults.json

A model of two layers, quantized by one worker, by two, and by two ranks (tests/faults.py, tests/faults.c). At the start
of every stage of every worker: kill -9, SIGTERM, a clock that jumps, memory that is not to be had. On every file of the
run, at its first and its last read, write, sync and rename: a full disk, an I/O error, a write that is cut short; and
each file of an unfinished run cut in half, as a crash of the machine may leave it. Then the same command runs again. A
fault is survived if the release is byte-identical to an undisturbed run's, or if the command says in one error why it
cannot be.
--every N takes every Nth fault, so that each stage and file meets one kind or another; all of them take hours. A file
keeps the suites that this call does not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import faults  # noqa: E402

SUITES: dict[str, dict[str, Any]] = {
    "one worker": {},
    "two workers": {"devices": "cpu*2"},
    "two ranks": {"ranks": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--only", default="", help="faults whose name has this text")
    parser.add_argument("--every", type=int, default=1, help="try every Nth fault")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    begin, found = time.perf_counter(), kept.get("suites", {})
    for title in options.suites:
        with tempfile.TemporaryDirectory(prefix="faults-") as name, faults.suite(Path(name), **SUITES[title]) as suite:
            chosen = [fault for fault in suite.faults() if options.only in str(fault)][:: options.every]
            failures, results = list[str](), {kind: Counter[str]() for kind in faults.KINDS}
            for place, fault in enumerate(chosen, 1):
                outcome = suite.attempt(fault)
                results[fault.kind]["tried"] += 1
                results[fault.kind][outcome.result] += 1
                print(f"{title} {place}/{len(chosen)} {fault}: {outcome.result} {outcome.problem}", flush=True)
                for line in "\n".join(outcome.said).splitlines() if outcome.result != "unharmed" else ():
                    print(f"    {line}", flush=True)
                if outcome.problem:
                    failures.append(f"{fault}: {outcome.problem}")
            found[title] = {
                "stages": sum(map(len, suite.points.values())), "files": len({path for _, _, path, _ in suite.calls}),
                "every": options.every, "kinds": {kind: dict(counts) for kind, counts in results.items() if counts},
                "failures": failures,
            }  # fmt: skip
        result = {
            "suites": found,
            "seconds": time.perf_counter() - begin,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            "date": time.strftime("%Y-%m-%d"),
        }
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("suites", "seconds")}, indent=1))
    sys.exit(any(one["failures"] for one in found.values()))


if __name__ == "__main__":
    main()
