"""Faults of the system under `fourfold quantize`, one at a time, at every stage and on every file; what came of each.

A Suite makes a small model, runs it undisturbed once (stages and files are those of that run), and then tries faults:
the command with the fault, and the same command again without. benchmarks/faults.py tries all, tests a sample.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import releases

HERE = Path(__file__).parent
TEN_YEARS = 10 * 365 * 86_400
LIMIT_SECONDS = 120.0  # of a run that takes two; more counts as a hang
KINDS = {  # title of each, as the documentation has it
    "kill": "kill -9",
    "term": "SIGTERM",
    "full": "disk full (ENOSPC)",
    "fail": "I/O error (EIO)",
    "short": "write cut short, process lives",
    "torn": "write cut short, process killed",
    "lost": "file cut short after a crash",
    "clock": "clock jump",
    "memory": "out of memory",
}
CALLS = {"r": "read", "w": "write", "s": "sync", "m": "rename"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. at: number of the point or call, from 1; name: of the stage or file; late: in a resumed run that had
    only its last files to write; op: of a call on a file (CALLS), else empty.
    """

    kind: str
    name: str
    at: int
    rank: int = 0
    worker: int = 0
    op: str = ""
    path: str = ""
    late: bool = False
    seconds: int = 0

    def __str__(self) -> str:
        where = f"{CALLS[self.op]} of {self.name}" if self.op else self.name
        who = f", rank {self.rank}" * bool(self.rank) or f", worker {self.worker}" * bool(self.worker)
        return f"{self.kind} at {where} ({self.at}){who}{', resumed' * self.late}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """result: unharmed (the run ended as if nothing were), resumed (the same command gave the same bytes), refused (it
    said why not), or failed, with the problem.
    """

    fault: Fault
    result: str
    problem: str
    said: list[str]


def compile_faults(folder: Path) -> dict[str, str]:
    """The library of faults.c, as a variable of the environment; none without a C compiler."""
    if shutil.which("cc") is None:
        return {}
    library = folder / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


class Suite:
    """Runs of one command on one small model, in a child process."""

    def __init__(self, folder: Path, *, devices: str = "cpu", ranks: int = 1, recipe: str = "") -> None:
        """recipe: added to that of releases.py."""
        self.folder, self.ranks, self.devices = folder.resolve(), ranks, devices
        folder.mkdir(exist_ok=True)
        self.model, self.recipe = self.folder / "model", releases.write_recipe(self.folder)
        self.recipe.write_text(self.recipe.read_text(encoding="utf-8") + recipe, encoding="utf-8")
        checkpoints.tiny(self.model, layers=2)
        self.options = ["--recipe", str(self.recipe), "--devices", devices, "--memory", "2GiB", "--quiet"]
        environment = os.environ | compile_faults(folder) | {
            "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE), *sys.path]),
        }  # fmt: skip
        command = [sys.executable, str(HERE / "faulty_run.py"), *self._words(self.folder / "first")]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._child = subprocess.Popen(command, env=environment, **pipes)
        self.points: dict[tuple[int, int], list[str]] = {}  # by rank and worker
        self.calls: dict[tuple[int, str, str, bool], int] = {}  # by rank, op, path, late
        whole = self.folder / "whole"
        self._record(whole, late=False)
        self.wanted = releases.tree(whole)
        self.late = self.folder / "late"
        last = next(at for at, name in enumerate(self.points[0, 0], 1) if name.startswith("finish"))
        self.run(self.late, Fault(kind="kill", name="finish", at=last))
        shutil.copytree(self.late, self.folder / "again")
        self._record(self.folder / "again", late=True)
        shutil.rmtree(self.folder / "again")

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def run(self, out: Path, fault: Fault | None = None, record: str = "") -> tuple[list[int | None], list[str], bool]:
        """Exit code and text by rank (None: hung), and whether the fault came."""
        log = self.folder / "log"
        came = Path(f"{log}.came")
        came.unlink(missing_ok=True)
        job = {
            "words": self._words(out), "ranks": self.ranks, "log": str(log),
            "environment": _rendezvous(self.ranks), "record": record and str(self.folder / record),
            "below": f"{self.folder}/", "limit": LIMIT_SECONDS,
            "fault": fault and asdict(replace(fault, path=fault.path.replace("OUT", str(out)))),
        }  # fmt: skip
        assert self._child.stdin is not None and self._child.stdout is not None
        print(json.dumps(job), file=self._child.stdin, flush=True)
        codes = json.loads(self._child.stdout.readline())
        said = [Path(f"{log}.{rank}").read_text(encoding="utf-8") for rank in range(self.ranks)]
        return codes, said, came.exists() or -signal.SIGKILL in codes

    def _words(self, out: Path) -> list[str]:
        return ["quantize", str(self.model), str(out), *self.options]

    def _record(self, out: Path, *, late: bool) -> None:
        codes, said, _ = self.run(out, record="record")
        assert set(codes) == {0}, said
        for rank in range(self.ranks):
            path = self.folder / f"record.{rank}"
            for line in path.read_text(encoding="utf-8").splitlines():
                op, _, rest = line.partition(" ")
                if op == "p" and not late:
                    worker, _, name = rest.partition(" ")
                    self.points.setdefault((rank, int(worker)), []).append(name)
                elif op in CALLS:
                    key = (rank, op, rest.replace(str(out), "OUT"), late)
                    self.calls[key] = self.calls.get(key, 0) + 1
            path.unlink()

    def faults(self) -> Iterator[Fault]:
        """All of them."""
        for (rank, worker), names in self.points.items():
            for at, name in enumerate(names, 1):
                place: Any = {"name": name, "at": at, "rank": rank, "worker": worker}
                yield from (Fault(kind=kind, **place) for kind in ("kill", "term", "memory"))
                yield Fault(kind="clock", seconds=TEN_YEARS if at % 2 else -TEN_YEARS, **place)
        for (rank, op, path, late), count in self.calls.items():
            kinds = ("full", "fail", "short", "torn") if op == "w" else ("fail",)
            if late and not (op == "r" and path.startswith("OUT/")):
                continue  # as in the first run
            for at in sorted({1, count}):
                name = path.removeprefix(f"{self.folder}/")
                yield from (Fault(kind=kind, name=name, at=at, rank=rank, op=op, path=path, late=late)
                            for kind in kinds)  # fmt: skip
        for path in sorted(self.late.rglob("*")):
            if path.is_file() and path.name != "lock":
                yield Fault(kind="lost", name=str(path.relative_to(self.late)), at=1, late=True)

    def attempt(self, fault: Fault) -> Outcome:
        """The command with the fault, then without, in a folder of its own."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        if fault.late:
            shutil.copytree(self.late, out)
        if fault.kind == "lost":
            path = out / fault.name
            os.truncate(path, path.stat().st_size // 2)
            codes, said, came = [-signal.SIGKILL], [""], True
        else:
            codes, said, came = self.run(out, fault)
        problem = self._judge(out, fault, codes, said) if came else "the fault did not come"
        if problem or set(codes) == {0}:
            return Outcome(fault=fault, result="failed" if problem else "unharmed", problem=problem, said=said)
        codes, again, _ = self.run(out)
        result = "resumed" if 0 in codes else "refused"
        if problem := self._judge(out, None, codes, again):
            result, problem = "failed", f"resumed: {problem}"
        return Outcome(fault=fault, result=result, problem=problem, said=[*said, *again])

    def _judge(self, out: Path, fault: Fault | None, codes: list[int | None], said: list[str]) -> str:
        """What is wrong with how a command ended, nothing if all is well."""
        kind, killed = fault.kind if fault else "", -signal.SIGKILL in codes
        for rank, code in enumerate(codes):
            text = said[rank]
            struck = fault is not None and fault.rank == rank
            if code is None:
                return f"rank {rank} hangs"
            if struck and code == -signal.SIGKILL and kind in ("kill", "torn", "lost"):
                continue
            if not struck and any(said) and code in (-signal.SIGKILL, 128 + signal.SIGTERM):
                continue  # ended with the other rank, which said why
            if "Traceback" in text or "bug in fourfold" in text:
                return f"rank {rank}: a traceback"
            if struck and code == 128 + signal.SIGTERM and kind == "term" and "Terminated." in text:
                continue
            if code not in (0, 2):
                return f"rank {rank}: exit code {code}"
            if code == 2 and len(re.findall("^Error: ", text, re.MULTILINE)) != 1:
                return f"rank {rank}: not one error"
        if set(codes) == {0}:
            found = releases.tree(out)
            differing = [name for name in {*found, *self.wanted} if not _equal(name, found, self.wanted)]
            return f"other bytes: {', '.join(sorted(differing))}" if differing else ""
        half = [] if killed else [path.name for path in out.rglob("*.tmp")]
        return f"left {', '.join(half)}" if half else ""


def _equal(name: str, found: dict[str, bytes], wanted: dict[str, bytes]) -> bool:
    """Byte for byte; but a run whose memory was short keeps the smaller chunks that it took."""
    if name != "fourfold.json" or name not in found:
        return found.get(name) == wanted.get(name)
    first, second = (json.loads(tree[name]) for tree in (found, wanted))
    for state in (first, second):
        del state["settings"]["batches"]["experts"]
    return bool(first == second)


def _rendezvous(ranks: int) -> dict[str, str]:
    """What torchrun would set."""
    if ranks == 1:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextmanager
def suite(folder: Path, **options: Any) -> Iterator[Suite]:
    """A Suite whose child process ends with the block."""
    made = Suite(folder, **options)
    try:
        yield made
    finally:
        made.close()
