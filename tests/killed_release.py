"""Child process of test_pipeline.py: `release`, each time in a fork of its own, killed (SIGKILL) in one of its steps.

    python killed_release.py MODEL RECIPE.toml OUT REPO STEP=N [STEP=N ...]

N: events of the step before it is killed; a last run, `=0`, is not killed. Prints how each ended, and the last one's
steps as JSON. Forks, because importing torch takes longer than a small run.
"""

import json
import os
import signal
import sys
from pathlib import Path

from fourfold import pipeline
from fourfold.datatypes import Event
from fourfold.recipe import load_recipe
from fourfold.release import drafts, evaluate, export, publish  # noqa: F401  before the fork


def run(model: str, recipe: str, out: Path, repo: str, step: str, limit: int) -> None:
    """Release, or die at event `limit` of a step."""
    evaluate.WINDOWS, drafts.PROMPTS = 1, 2
    left, inside = limit, False

    def die(event: Event) -> None:
        nonlocal left, inside
        if event.kind == "note" and event.text.startswith("step "):
            inside = bool(step) and event.text.endswith(f": {step}")
        if inside and not event.done:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    wanted = pipeline.Wanted(
        model=model,
        repo=repo,
        out=out,
        recipe=load_recipe(recipe),
        also=("gguf", "mlx"),
        run={"memory_bytes": 2 * 2**30},
    )
    print(json.dumps(pipeline.release(wanted, die).to_json()), flush=True)


def main() -> None:
    model, recipe, out, repo = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    for word in sys.argv[5:]:
        step, _, limit = word.partition("=")
        child = os.fork()
        if child == 0:
            run(model, recipe, out, repo, step, int(limit))
            os._exit(0)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
