"""Child process of faults.py: `fourfold` command lines, each rank in a fork of its own, with one fault in the system.

    python faulty_run.py WORDS      # of a command that is run first, in this process

Then reads a job as a line of JSON from stdin and answers with one: the exit codes by rank. Forks of a process that has
run the command once, because imports take ten times as long as a small run.

Kinds: kill, term, clock, memory come at a point: the start of a stage of a worker, or a file's turn. The others are
those of faults.c: a call on a file fails or is cut short.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import blocks
from fourfold.cli.app import main as fourfold
from fourfold.cli.app import script
from fourfold.datatypes import Event
from fourfold.distributed.team import Team
from fourfold.quantize import run

HOW = {"full": "f", "fail": "e", "short": "s", "torn": "t"}
AGENT_SECONDS = 5.0  # torchrun is faster: a rank that notices by itself should have the time to say so
system = ctypes.CDLL(os.environ.get("LD_PRELOAD"))  # without a library: kill and term alone


def strike(fault: dict[str, Any], came: Path) -> None:
    kind = fault["kind"]
    if kind in ("kill", "term"):
        came.touch()
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
    elif kind == "clock":
        system.fault_clock(ctypes.c_long(fault["seconds"]))
    else:
        system.fault_memory(ctypes.c_size_t(4096))


def at_points(meet: Callable[[int, str], None]) -> None:
    """meet(worker, name): is called at every point, where another run of the same command has it, too."""
    quantize, enter, seen = run.quantize, Team.enter, set[tuple[int, str]]()

    def report(*arguments: Any, progress: Callable[[Event], None], **named: Any) -> Any:
        def tell(event: Event) -> None:
            if not event.done:
                meet(0, f"{event.stage or event.kind} {event.layer if event.layer >= 0 else event.text[:24]}".strip())
            progress(event)

        return quantize(*arguments, progress=tell, **named)

    def arrive(team: Team, place: int, stage: str, layer: int) -> tuple[str, int]:
        name = f"{stage} {layer if layer >= 0 else ''}".strip()
        if (worker := team.first + place) and stage not in ("start", "wait") and (worker, name) not in seen:
            seen.add((worker, name))
            meet(worker, name)
        return enter(team, place, stage, layer)

    run.quantize, Team.enter = report, arrive  # type: ignore[assignment, method-assign]


def start(job: dict[str, Any], rank: int) -> None:
    """The command line in this process, which ends with its exit code."""
    torch.set_num_threads(1)  # replaces the parent's pool of threads, which is not here, before two threads try to
    os.environ |= job["environment"] | {"RANK": str(rank)}
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    fault, lock, met = job["fault"], threading.Lock(), dict[int, int]()
    if job["record"]:
        record = os.open(f"{job['record']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if "LD_PRELOAD" in os.environ:
            system.fault_record(job["below"].encode(), record)
    elif fault and fault["op"] and fault["rank"] == rank:
        how = ord(HOW[fault["kind"]])
        system.fault_arm(ord(fault["op"]), fault["path"].encode(), ctypes.c_long(fault["at"]), how)

    def meet(worker: int, name: str) -> None:
        if job["record"]:
            os.write(record, f"p {worker} {name}\n".encode())
        with lock:
            met[worker] = met.get(worker, 0) + 1
            here = fault and not fault["op"] and (worker, met[worker]) == (fault["worker"], fault["at"])
        if here:
            strike(fault, Path(f"{job['log']}.came"))

    at_points(meet)
    sys.argv = ["fourfold", *job["words"]]
    code: Any = 1
    try:
        script()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  as Python would
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    for printed in (sys.stdout, sys.stderr):
        printed.flush()
    if "LD_PRELOAD" in os.environ and system.fault_fired():
        Path(f"{job['log']}.came").touch()
    os._exit(code)


def follow(children: list[int], limit: float) -> list[int | None]:
    """Exit codes; None: still running after `limit` seconds. As torchrun does, ends all others when one has failed:
    these may wait for it where no signal reaches Python.
    """
    codes: dict[int, int | None] = {}
    deadline, failed = time.monotonic() + limit, float("inf")
    while waiting := [child for child in children if child not in codes]:
        now = time.monotonic()
        for child in waiting:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                failed = min(failed, now) if codes[child] else failed
            elif now > deadline or now > failed + 2 * AGENT_SECONDS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = None if now > deadline else -signal.SIGKILL
            elif now > failed + AGENT_SECONDS:
                os.kill(child, signal.SIGTERM)
        time.sleep(0.01)
    return [codes[child] for child in children]


def main() -> None:
    assert fourfold(sys.argv[1:]) == 0
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in range(job["ranks"]):
            child = os.fork()
            if child == 0:
                start(job, rank)
            children.append(child)
        print(json.dumps(follow(children, job["limit"])), flush=True)


if __name__ == "__main__":
    with blocks.shrunk(*blocks.ROOMS["quantize"]):
        main()
