"""Child process of the resume tests: real runs, each in a fork of its own, killed (SIGKILL) at their n-th event.

    python killed_run.py MODEL RECIPE.toml OUT=N [OUT=N ...]

N = 0: not killed. Prints a line per run: OUT, how it ended (0, or minus the signal), and how many events it saw. Forks,
because importing torch takes longer than a small run. Ticks inside a stage are no events of their own here.
"""

import os
import signal
import sys
import threading
from pathlib import Path

import blocks
from fourfold.datatypes import Event
from fourfold.distributed.devices import Machine
from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe


def run(model: Path, recipe: str, out: Path, limit: int) -> int:
    """Quantize, or die at event `limit`. Returns the number of events."""
    lock, seen = threading.Lock(), 0

    def die_at_limit(event: Event) -> None:
        nonlocal seen
        if event.done:
            return
        with lock:
            seen += 1
            if seen == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    quantize(model, out, load_recipe(recipe), machine=Machine(memory_bytes=2 * 2**30), progress=die_at_limit)
    return seen


def main() -> None:
    model, recipe = Path(sys.argv[1]), sys.argv[2]
    for job in sys.argv[3:]:
        out, _, limit = job.rpartition("=")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(run(model, recipe, Path(out), int(limit))).encode())
            os._exit(0)
        os.close(writing)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(out, ended, os.read(reading, 100).decode() or "-", flush=True)
        os.close(reading)


if __name__ == "__main__":
    with blocks.shrunk(*blocks.ROOMS["quantize"]):  # as in the tests that compare with it
        main()
