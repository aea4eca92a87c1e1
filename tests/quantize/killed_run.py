"""Child process of the resume tests: a real run that is killed (SIGKILL) at its n-th event.

    python killed_run.py MODEL OUT RECIPE.toml N      N = 0: never; prints the number of events at the end
"""

import os
import signal
import sys
import threading
from pathlib import Path

from fourfold.datatypes import Event
from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe


def main() -> None:
    model, out, recipe, limit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    lock, seen = threading.Lock(), 0

    def die_at_limit(event: Event) -> None:
        nonlocal seen
        with lock:
            seen += 1
            if seen == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    quantize(model, out, load_recipe(recipe), memory_bytes=2 * 2**30, progress=die_at_limit)
    print(seen)


if __name__ == "__main__":
    main()
