"""Child process of test_many_devices.py, a rank under torchrun: quantize, or die on the way.

    torchrun ... ranks_run.py MODEL RECIPE.toml OUT [RANK]

RANK: kills itself (SIGKILL) when layer 1 is to be solved.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fourfold.quantize import run
from fourfold.quantize.devices import Machine
from fourfold.recipe import load_recipe


def main() -> None:
    model, recipe, out, *dying = sys.argv[1:]
    original = run.solve_layer

    def solve_layer(worker: Any, layer: Any, *rest: Any) -> Any:
        if [str(worker.rank)] == dying and layer.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(worker, layer, *rest)

    run.solve_layer = solve_layer  # type: ignore[assignment]
    torch.set_num_threads(1)
    run.quantize(Path(model), Path(out), load_recipe(recipe), machine=Machine(memory_bytes=2 * 2**30))


if __name__ == "__main__":
    main()
