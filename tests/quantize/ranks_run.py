"""Child process of test_many_devices.py, a rank under torchrun: quantize, or die on the way.

    torchrun ... ranks_run.py MODEL RECIPE.toml OUT [RANK [hang]]

RANK: kills itself (SIGKILL) when layer 1 is to be solved; or hangs then, which is said after ten seconds.
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import blocks
from fourfold.distributed import team as teams
from fourfold.distributed.devices import Machine
from fourfold.quantize import run
from fourfold.recipe import load_recipe


def main() -> None:
    model, recipe, out, *dying = sys.argv[1:]
    original = run.solve_layer

    def solve_layer(worker: Any, layer: Any, *rest: Any) -> Any:
        if [str(worker.rank)] == dying[:1] and layer.index == 1:
            if dying[1:]:
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(worker, layer, *rest)

    if dying[1:]:
        teams.GRACE_SECONDS, teams.LONGEST_STAGES = 1.0, 0
        run.Team = partial(teams.Team, patience_seconds=10.0)  # type: ignore[misc, assignment]
    run.solve_layer = solve_layer  # type: ignore[assignment]
    torch.set_num_threads(1)
    run.quantize(Path(model), Path(out), load_recipe(recipe), machine=Machine(memory_bytes=2 * 2**30))


if __name__ == "__main__":
    with blocks.shrunk(*blocks.ROOMS["quantize"]):  # as in the tests that compare with it
        main()
