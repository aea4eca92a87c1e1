"""Draft depths compared: a server of a release for each, one after another, under the same load."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from msgspec import structs

from fourfold.datatypes import Event, FourfoldError, Progress
from fourfold.quantize.journal import check_checkpoint
from fourfold.records.bench import Bench
from fourfold.serve.bench import Load, bench
from fourfold.serve.server import STOP_SECONDS
from fourfold.units import READY


def bench_depths(out: str, depths: Sequence[int], load: Load, words: Sequence[str], progress: Progress) -> Bench:
    """Measure `fourfold serve OUT --mtp DEPTH WORDS` at each depth.

    Raises FourfoldError if OUT is no whole checkpoint or a server does not start.
    """
    check_checkpoint(out, whole=True)
    found: list[Bench] = []
    for depth in depths:
        progress(Event(kind="note", text=f"drafts {depth}: starting a server"))
        with serving(out, depth, words) as address:
            one = bench(address, load, progress)
        found.append(structs.replace(one, levels=[structs.replace(level, drafts=depth) for level in one.levels]))
    return structs.replace(found[-1], url=out, levels=[level for one in found for level in one.levels])


@contextmanager
def serving(out: str, depth: int, words: Sequence[str]) -> Iterator[str]:
    """The address of a server that has answered its first request; it has ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fourfold", "serve", out, "--mtp", str(depth), "--port", str(port), *words]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said: list[str] = []
    try:
        for line in server.stderr:
            said.append(line.strip())
            if READY in line:
                break
        else:
            problem = next((line for line in reversed(said) if line), "nothing was said")
            raise FourfoldError(f"--drafts {depth}: no server: {problem.removeprefix('Error: ')}")
        yield f"http://127.0.0.1:{port}"
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        try:
            server.communicate(timeout=2 * STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
