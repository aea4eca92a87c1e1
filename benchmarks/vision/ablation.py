"""Calibration on text, on images, and on both, of the small vision model: KLD on held-out text and images.

    python benchmarks/vision/ablation.py --json benchmarks/results/vision.json

Every run has as many calibration tokens; scenes of calibration and of measurement are drawn from different seeds.
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
# calibration: (rows of images, calibration.image_share)
VARIANTS = {
    "text": (0, 0.0),
    "images": (ROWS, 0.0),
    "both": (ROWS // 2, 0.0),
    "both, image_share 0.1": (ROWS // 2, 0.1),
    "both, image_share 0.3": (ROWS // 2, 0.3),
    "both, image_share 0.5": (ROWS // 2, 0.5),
}


def recipe_text(images: int, share: float, samples: Path, heldout: Path, seed: int) -> str:
    sources = ""
    for name in TEXTS if images < ROWS else ():
        sources += f'[[calibration.sources]]\nbuiltin = "{name}"\nrows = {(ROWS - images) // len(TEXTS)}\n'
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
    images, share = VARIANTS[name]
    samples, heldout = (folder / part / "samples.jsonl" for part in (f"scenes-{seed}", "heldout"))
    path = folder / "recipe.toml"
    path.write_text(recipe_text(images, share, samples, heldout, seed), encoding="utf-8")
    out = folder / "release"
    quantize(MODEL, out, load_recipe(str(path)), restart=True)
    found = Metrics.read(out / "metrics.json")
    assert found.summary is not None and found.images is not None and found.images.rtn is not None
    record: dict[str, object] = {"calibration": name, "seed": seed}
    for kind, figures in (("text", found.summary), ("images", found.images.summary)):
        keys = ("kl_mean", "kl_median", "top1_agreement")
        record[kind] = {key: getattr(figures, key) for key in keys}
    assert found.rtn is not None
    record["rtn"] = {"text": found.rtn.summary.kl_mean, "images": found.images.rtn.kl_mean}
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
