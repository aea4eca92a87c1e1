"""Calibration on text, on images, and on both, of the small vision model: KLD on held-out text and images.

    python benchmarks/vision/ablation.py --json benchmarks/results/vision.json

All runs but one have as many calibration tokens. Scenes of calibration and of measurement have different seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path

from scenes import write

from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe
from fourfold.records.results import Metrics

MODEL = Path(__file__).parent / "model"
ROWS, LENGTH, WINDOWS = 32, 256, 16
SCENES, HELDOUT_SCENES = 200, 120
SEEDS = (0, 1)
TEXTS = ("general", "chat")
KEYS = ("kl_mean", "kl_median", "top1_agreement")
HALF = ROWS // 2
# calibration: (rows of text, rows of images, calibration.image_share)
VARIANTS = {
    "text": (ROWS, 0, 0.0),
    "half the text": (HALF, 0, 0.0),
    "images": (0, ROWS, 0.0),
    "half the text, half the images": (HALF, HALF, 0.0),
    "the same, image_share 0.1": (HALF, HALF, 0.1),
    "the same, image_share 0.3": (HALF, HALF, 0.3),
    "the same, image_share 0.5": (HALF, HALF, 0.5),
}


def recipe_text(name: str, samples: Path, heldout: Path, seed: int) -> str:
    text, images, share = VARIANTS[name]
    sources = ""
    for source in TEXTS if text else ():
        sources += f'[[calibration.sources]]\nbuiltin = "{source}"\nrows = {text // len(TEXTS)}\n'
    if images:
        sources += f'[[calibration.sources]]\npath = "{samples}"\nkind = "image"\nrows = {images}\n'
    return f"""
[calibration]
length = {LENGTH}
seed = {seed}
image_share = {share}
{sources}
[heldout]
windows = {WINDOWS}
length = {LENGTH}
images = "{heldout}"
image_windows = {WINDOWS}
"""


def measure(name: str, seed: int, folder: Path) -> dict[str, object]:
    samples, heldout = (folder / part / "samples.jsonl" for part in (f"scenes-{seed}", "heldout"))
    path = folder / "recipe.toml"
    path.write_text(recipe_text(name, samples, heldout, seed), encoding="utf-8")
    out = folder / "release"
    quantize(MODEL, out, load_recipe(str(path)), restart=True)
    found = Metrics.read(out / "metrics.json")
    assert found.summary is not None and found.images is not None and found.images.rtn is not None
    record: dict[str, object] = {"calibration": name, "seed": seed}
    for kind, figures in (("text", found.summary), ("images", found.images.summary)):
        record[kind] = {key: getattr(figures, key) for key in KEYS}
    assert found.rtn is not None
    for kind, figures in (("text", found.rtn.summary), ("images", found.images.rtn)):
        record[f"rtn {kind}"] = {key: getattr(figures, key) for key in KEYS}
    record["overlap"] = [one.overlap for one in found.images.routing]
    record["image_experts"] = [one.image_experts for one in found.images.routing]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "heldout", HELDOUT_SCENES, seed=100)
        for seed in SEEDS:
            write(folder / f"scenes-{seed}", SCENES, seed=200 + seed)
        runs = []
        for seed in SEEDS:
            for variant in VARIANTS:
                runs.append(measure(variant, seed, folder))
                print(json.dumps(runs[-1]), flush=True)
    sizes = {"calibration_tokens": ROWS * LENGTH, "heldout_tokens": WINDOWS * LENGTH}
    sizes |= {"date": f"{datetime.date.today()}"}
    if options.json:
        options.json.write_text(json.dumps(sizes | {"runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
