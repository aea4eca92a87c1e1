"""Samples of images: read, checked, packed into rows, calibrated on."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image

import releases
from fourfold.api import plan as plan_model
from fourfold.datatypes import FourfoldError
from fourfold.distributed.devices import Machine
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.processor import Processor
from fourfold.quantize.calibrate import CalibrationRows, collect, load_tokenizer
from fourfold.quantize.fits import check_images
from fourfold.quantize.images import decode, image_samples
from fourfold.quantize.journal import LOG, METRICS
from fourfold.quantize.plan import make_plan
from fourfold.recipe import Recipe, Source, dump_recipe, load_recipe
from fourfold.records.log import read_log
from fourfold.records.results import Metrics
from fourfold.release.report.about import About
from fourfold.release.report.card import card
from fourfold.release.report.page import page
from fourfold.release.report.quality import image_grid, image_text, routing_grid
from fourfold.release.report.records import Records

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "vision"))
from scenes import write

LENGTH = 96
WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scenes"), 24, seed=3)


def recipe_of(samples: Path, *overrides: str) -> Recipe:
    path = samples.parent / f"{random.Random(str(overrides)).randrange(2**32)}.toml"
    path.write_text(f"""
        [solver]
        passes = 0
        [calibration]
        length = {LENGTH}
        image_share = 0.3
        [[calibration.sources]]
        builtin = "math"
        rows = 4
        [[calibration.sources]]
        path = "{samples.name}"
        kind = "image"
        rows = 4
        [heldout]
        windows = 2
        length = {LENGTH}
        image_windows = 2
        """)
    return load_recipe(str(path), overrides)


@pytest.fixture(scope="module")
def processor(vision_model: Path) -> Processor:
    return Processor.load(Checkpoint.open_source(vision_model), load_tokenizer(vision_model))


def rows_of(recipe: Recipe, processor: Processor, vision_model: Path) -> CalibrationRows:
    return collect(recipe, load_tokenizer(vision_model), processor=processor)


# ---- rows


def test_rows_hold_whole_images_and_no_padding(samples: Path, processor: Processor, vision_model: Path) -> None:
    rows = rows_of(recipe_of(samples), processor, vision_model)
    assert rows.image_RT is not None and rows.windows is not None
    assert sorted(rows.images) == [4, 5, 6, 7] and rows.token_RT.shape == (8, LENGTH)
    assert not (rows.token_RT[4:] == 0).any(), "<|endoftext|> is what this tokenizer pads with"
    for row, made in rows.images.items():
        token_T, given = made.inputs(processor, LENGTH)
        assert torch.equal(token_T, rows.token_RT[row])
        tokens = int(given["image_grid_thw"].prod(1).sum()) // 4
        assert int(rows.image_RT[row].sum()) == tokens, "each image is in its row as a whole"
        assert (token_T == 5).sum() == (token_T == 6).sum() == len(made.samples)
        assert given["mm_token_type_ids"].shape == (1, LENGTH)
    calibrated = {image for row in rows.images.values() for one in row.samples for image in one.images}
    held = {image for row in rows.windows.rows for one in row.samples for image in one.images}
    assert held and not calibrated & held


def test_rows_are_fixed_by_seed_and_images(samples: Path, processor: Processor, vision_model: Path) -> None:
    first = rows_of(recipe_of(samples), processor, vision_model)
    assert rows_of(recipe_of(samples), processor, vision_model).digest == first.digest
    other = rows_of(recipe_of(samples, "calibration.seed=1"), processor, vision_model)
    assert other.digest != first.digest
    smaller = rows_of(recipe_of(samples, "calibration.sources.1.pixels=4096"), processor, vision_model)
    assert smaller.image_RT is not None and max(smaller.image_RT.sum(1)) < LENGTH


def test_a_recipe_with_images_comes_back_from_its_file(samples: Path, tmp_path: Path) -> None:
    recipe = recipe_of(samples, "heldout.images=" + str(samples))
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "recipe.toml")).digest() == recipe.digest()
    assert "image" not in dump_recipe(load_recipe("best")) and "pixels" not in dump_recipe(load_recipe("best"))


# ---- bad input


def image(path: Path, size: tuple[int, int] = (32, 32)) -> dict[str, Any]:
    Image.new("RGB", size, (200, 20, 20)).save(path)
    return {"image": path.name, "messages": "A red square."}


def damage(path: Path) -> dict[str, Any]:
    record = image(path, (256, 256))
    path.write_bytes(path.read_bytes()[:150])
    return record


def animated(path: Path) -> dict[str, Any]:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    return {"image": path.with_suffix(".gif").name, "messages": "It blinks."}


def huge(path: Path) -> dict[str, Any]:
    Image.new("1", (2**14, 2**13)).save(path)  # 16 kB, and 400 MB in RGB
    return {"image": path.name, "messages": "Nothing."}


def no_image(path: Path) -> dict[str, Any]:
    path.write_text("text")
    return {"image": path.name, "messages": "x"}


def two_images(path: Path) -> dict[str, Any]:
    names = [image(path)["image"]] * 2
    return {"image": names, "messages": [{"role": "user", "content": [{"type": "image"}]}]}


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "missing": (lambda path: {"image": "gone.png", "messages": "x"}, "'gone.png' cannot be read: No such file"),
    "no image": (no_image, "no image that Pillow"),
    "damaged": (damage, "the image cannot be decoded: .*truncated"),
    "animated": (animated, "2 frames, expected one"),
    "huge": (huge, r"16,384 x 8,192 pixels, expected at most 67,108,864"),
    "field": (lambda path: {"picture": 1}, "no field 'image'; it has picture"),
    "number": (lambda path: image(path) | {"image": 7}, "got int, expected an image"),
    "two images": (two_images, "got 2 images, expected 1"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD.keys())
def test_bad_images_are_one_error(make: Callable[[Path], dict[str, Any]], said: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(make(tmp_path / "one.png")) + "\n")
    source = Source(rows=1, path=str(path), kind="image", fields=("image", "messages"))
    with pytest.raises(FourfoldError, match=f"samples.jsonl, line 1: .*{said}"):
        for sample in image_samples(source, 0):
            sample.decoded()


def test_images_lie_in_parquet_files_and_data_sets(tmp_path: Path) -> None:
    record = image(tmp_path / "one.png")
    data = (tmp_path / "one.png").read_bytes()
    rows = [{"pictures": [{"bytes": data, "path": None}], "said": record["messages"]}] * 3
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    of = {"kind": "image", "fields": ("pictures", "said"), "rows": 1}
    for source in (
        Source(path=str(tmp_path / "set" / "train.parquet"), **of), Source(dataset=str(tmp_path / "set"), **of)
    ):  # fmt: skip
        found = list(image_samples(source, 0))
        assert len(found) == 3 and found[0].images == (data,) and found[0].plain_text() == "A red square."


def test_a_large_image_is_scaled_down(tmp_path: Path) -> None:
    image(tmp_path / "wide.png", (400, 100))
    found = decode("here", (tmp_path / "wide.png").read_bytes(), 10_000)
    assert found.size == (200, 50) and found.mode == "RGB"


def test_a_bad_image_is_said_before_any_work(samples: Path, vision_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"image": "gone.png", "messages": "x"}) + "\n")
    with pytest.raises(FourfoldError, match="'gone\\.png'"):
        plan_model(vision_model, recipe=recipe_of(samples, f"calibration.sources.1.path={path}"))


def test_an_image_is_not_calibrated_on_and_measured(samples: Path, processor: Processor, vision_model: Path) -> None:
    with pytest.raises(FourfoldError, match="this image is held out too"):
        rows_of(recipe_of(samples, f"heldout.images={samples}"), processor, vision_model)


def test_an_image_that_does_not_fit_a_row(samples: Path, processor: Processor, vision_model: Path) -> None:
    with pytest.raises(FourfoldError, match=r"its images end at token .*expected at most 16"):
        rows_of(recipe_of(samples, "calibration.length=16"), processor, vision_model)


def test_shares_need_images(samples: Path) -> None:
    with pytest.raises(FourfoldError, match=r"calibration.image_share.*0.2.*source of kind 'image'"):
        load_recipe("best", ["calibration.image_share=0.2"])


# ---- runs


@pytest.fixture(scope="module")
def release(samples: Path, vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vision") / "release"
    releases.run(vision_model, out, recipe_of(samples))
    return out


def test_a_run_measures_images(release: Path) -> None:
    images = Metrics.read(release / METRICS).images
    assert images is not None and images.windows == 2 and images.samples >= 2 and images.rtn is not None
    assert images.summary.kl_mean < images.rtn.kl_mean and images.summary.top1_agreement > 0.9
    assert images.summary.positions < 2 * (LENGTH - 1), "image tokens are not predicted"
    assert [one.layer for one in images.routing] == [0, 1, 2, 3]
    assert all(0 < one.overlap < 0.7 for one in images.routing) and any(one.image_experts for one in images.routing)


def test_a_run_that_is_cut_off_gives_the_same(release: Path, samples: Path, vision_model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        releases.run(vision_model, tmp_path, recipe_of(samples), progress=releases.stop_at("solve", 2))
    releases.run(vision_model, tmp_path, recipe_of(samples))
    assert releases.tensors(tmp_path).keys() == releases.tensors(release).keys()
    for name in ("model-00003-of-00005.safetensors", METRICS):
        assert (tmp_path / name).read_bytes() == (release / name).read_bytes()


def test_the_share_of_images_changes_each_experts_moments(
    release: Path, samples: Path, vision_model: Path, tmp_path: Path
) -> None:
    """Effective tokens and codes of experts that see both kinds are others without a share."""
    releases.run(vision_model, tmp_path, recipe_of(samples, "calibration.image_share=0"))
    first, second = (read_log(folder / LOG) for folder in (release, tmp_path))
    changed = [one.effective_tokens != other.effective_tokens for one, other in zip(first, second, strict=True)]
    assert sum(changed) > len(changed) / 2
    codes = [
        {name: part for name, part in releases.tensors(at).items() if "packed" in name} for at in (release, tmp_path)
    ]
    assert any(not torch.equal(part, codes[1][name]) for name, part in codes[0].items())


def test_two_workers_share_rows_with_images(release: Path, samples: Path, vision_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(samples, "format=gptq_v2")
    releases.run(vision_model, tmp_path, recipe, machine=Machine(devices="cpu*2", host_bytes=2**34))
    one, two = (Metrics.read(folder / METRICS).images for folder in (release, tmp_path))
    assert one is not None and two is not None and two.routing == one.routing
    assert two.summary.positions == one.summary.positions and two.samples == one.samples
    assert two.summary.perplexity_source == pytest.approx(one.summary.perplexity_source, rel=1e-2)


def test_draft_experts_are_solved_on_text_beside_images(
    example_model: Path, vision_model: Path, samples: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(example_model, model)
    shutil.copy(vision_model / "chat_template.jinja", model)
    recipe = recipe_of(samples, "scheme.rest.draft_experts=int4", "scheme.rest.draft_dense=int4", "solver.passes=0")
    releases.run(model, tmp_path / "out", recipe)
    assert Metrics.read(tmp_path / "out" / METRICS).images is not None
    assert any(name.startswith("mtp.") and "packed" in name for name in releases.tensors(tmp_path / "out"))


@pytest.mark.parametrize("override", ["guidance.tokens=1024", "scheme.rest.draft_experts=int4"])
def test_images_alone_do_not_solve_what_needs_text(override: str, samples: Path, vision_model: Path) -> None:
    recipe = recipe_of(samples, override)
    images = replace(recipe.calibration, sources=recipe.image_sources)
    with pytest.raises(FourfoldError, match=f"{override.partition('=')[0]}: this is solved on rows of text"):
        check_images(Checkpoint.open_source(vision_model), replace(recipe, calibration=images))


def test_a_plan_counts_images_and_their_tower(samples: Path, vision_model: Path) -> None:
    plan = make_plan(vision_model, recipe_of(samples), memory_bytes=2**34)
    tower = sum(one.size_bytes for name, one in plan.source.headers.items() if ".visual." in name)
    assert plan.work.tower_bytes == tower > 0 and plan.work.image_tokens == 6 * LENGTH
    assert plan.work.heldout_tokens == 4 * LENGTH
    assert "4 of the samples, 30% of the weight" in dict(plan.headline)["images"]
    text = make_plan(vision_model, load_recipe("best"), memory_bytes=2**34)
    assert text.work.tower_bytes == text.work.image_tokens == 0 and "images" not in dict(text.headline)


def test_card_and_page_have_figures_of_images(release: Path) -> None:
    found = Metrics.read(release / METRICS)
    images, routing = image_grid(found), routing_grid(found)
    assert images is not None and [row[:2] for row in images.rows] == [
        (kind, who) for kind in ("text", "images") for who in ("this release", "RTN")
    ]
    assert routing is not None and len(routing.rows) == 4 and "samples of images in 2 windows" in image_text(found)
    records = Records.open(release)
    text = card(records, About(name="someone/model"), [], {})
    assert "### Images" in text and "image experts" in text and "Calibrated on text alone" not in text
    assert "Routing of images" in page(records, About(name="someone/model"))
