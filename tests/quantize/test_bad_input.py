"""Wrong input is one clear error: before any work where headers tell it, and never at the cost of what is done."""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

import checkpoints
import releases
from fourfold.datatypes import Event, FourfoldError
from fourfold.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
Tensors = dict[str, Tensor]
TEXT = "model.language_model."
GATE_UP = f"{TEXT}layers.1.mlp.experts.gate_up_proj"
FIRST_SHARD, SECOND_SHARD = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    """A copy of `source`, to be spoiled."""
    return shutil.copytree(source, tmp_path / "model")


# --- what is seen before any work -----------------------------------------------------------------


def edited(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    return lambda model: checkpoints.edit(model, change)


def configured(**values: object) -> Callable[[Path], None]:
    return lambda model: checkpoints.edit_json(model / "config.json", lambda config: config.update(values))


def truncate(model: Path) -> None:
    (shard,) = model.glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 1)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        edited(lambda found: found.pop(GATE_UP)),  # the other stack is there: the layout is known
        rf"missing: {TEXT}layers\.1\.mlp\.experts\.gate_up_proj\n",
    ),
    "missing vector": (edited(lambda found: found.pop("mtp.norm.weight")), r"missing: mtp\.norm\.weight"),
    "unexpected tensor": (
        edited(lambda found: found.update({f"{TEXT}layers.1.norm.weight": found["mtp.norm.weight"].clone()})),
        rf"unexpected: {TEXT}layers\.1\.norm\.weight",
    ),
    "wrong shape": (
        edited(lambda found: found.update({GATE_UP: found[GATE_UP][:3].clone()})),
        r"gate_up_proj is \[3, 256, 128\], wanted \[4, 256, 128\]",
    ),
    "wrong dtype": (edited(lambda found: found.update({GATE_UP: found[GATE_UP].float()})), "is F32, wanted BF16"),
    "truncated shard": (truncate, "is the download complete"),
    "missing shard": (lambda model: next(model.glob("*.safetensors")).unlink(), "missing; is the download complete"),
    "quantized already": (configured(quantization_config={"quant_method": "awq"}), r"already quantized \(.awq.\)"),
    "unknown model_type": (
        configured(model_type="new_moe"),
        "model_type: got .new_moe., expected one that transformers",
    ),
    "no config": (lambda model: (model / "config.json").unlink(), r"no config\.json"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "neither tokenizer.json nor vocab.json"),
    "no model": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint_leaves_out_untouched(
    model: Path, small: MakeRecipe, tmp_path: Path, case: str, there: bool
) -> None:
    spoil, message = BAD[case]
    spoil(model)
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(FourfoldError, match=message):
        releases.run(model, out, small())
    assert out.exists() == there
    assert not there or not list(out.iterdir())


def test_a_layer_without_its_experts_is_named_as_on_disk(small: MakeRecipe, tmp_path: Path) -> None:
    model = checkpoints.tiny(tmp_path / "model", family="qwen3_moe")
    gone = "model.layers.1.mlp.experts."

    def drop(found: Tensors) -> None:
        for name in [name for name in found if name.startswith(gone)]:
            del found[name]

    checkpoints.edit(model, drop)
    expected = r"missing: (model\.layers\.1\.mlp\.experts\.\d\.\w+\.weight; ){2}model\S+\.weight and 9 more\n"
    with pytest.raises(FourfoldError, match=expected):
        releases.run(model, tmp_path / "out", small())


@pytest.mark.parametrize("override", ['heldout.path="absent.txt"', 'calibration.sources.0.path="absent.txt"'])
def test_text_that_is_not_there_leaves_out_untouched(
    source: Path, small: MakeRecipe, tmp_path: Path, override: str
) -> None:
    with pytest.raises(FourfoldError, match=r"absent\.txt does not exist"):
        releases.run(source, tmp_path / "out", small(override))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.sources.0.rows=9999", r"expected 9999\. Try: more text"),
        ("heldout.windows=9999", r"expected 9999\. Try: smaller"),
    ],
)
def test_too_little_text_leaves_out_untouched(
    source: Path, small: MakeRecipe, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(FourfoldError, match=message):
        releases.run(source, tmp_path / "out", small(override))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("storage", ["compressed-tensors"])
def test_scales_that_the_storage_cannot_hold_are_refused(
    source: Path, small: MakeRecipe, tmp_path: Path, storage: str
) -> None:
    """weight_scale is BF16 (docs/formats.md): codes solved for FP16 scales would be stored with other ones."""
    with pytest.raises(FourfoldError, match="scale_dtype"):
        releases.run(source, tmp_path / "out", small('scheme.scale_dtype="fp16"', f'format="{storage}"'))


# --- an OUT that cannot be written ----------------------------------------------------------------


def test_out_under_a_file(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FourfoldError, match=r"OUT cannot be written \(Not a directory\)"):
        releases.run(source, tmp_path / "file" / "out", small())
    with pytest.raises(FourfoldError, match="OUT is a file"):
        releases.run(source, tmp_path / "file", small())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_in_a_read_only_folder(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o555)
    with pytest.raises(FourfoldError, match=r"OUT cannot be written \(Permission denied\)"):
        releases.run(source, tmp_path / "folder" / "out", small())


# --- values that are seen when they are read ------------------------------------------------------

VALUES = {
    "experts of layer 1": (GATE_UP, math.nan),
    "down of layer 0": (f"{TEXT}layers.0.mlp.experts.down_proj", math.inf),
    "router": (f"{TEXT}layers.1.mlp.gate.weight", math.nan),
    "F32 vector": (f"{TEXT}layers.0.linear_attn.A_log", -math.inf),
    "embeddings": (f"{TEXT}embed_tokens.weight", math.nan),
    "output head": ("lm_head.weight", math.nan),
    "draft experts": ("mtp.layers.0.mlp.experts.down_proj", math.nan),
    "vision": ("model.visual.patch_embed.proj.weight", math.inf),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_is_no_number_is_named_and_the_mended_source_goes_on(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path, model: Path, case: str
) -> None:
    name, value = VALUES[case]

    def spoil(found: Tensors) -> None:
        found[name].view(-1)[5 % found[name].numel()] = value

    checkpoints.edit(model, spoil)
    threads = set(threading.enumerate())
    with pytest.raises(FourfoldError, match=rf"tensor '{name}': .*1 (NaN|infinite)") as error:
        releases.run(model, tmp_path / "out", small())
    assert set(threading.enumerate()) <= threads
    assert str(error.value) in (tmp_path / "out/.fourfold/run.log").read_text(encoding="utf-8")
    assert not (tmp_path / "out/fourfold.json").exists()
    assert (tmp_path / "out" / FIRST_SHARD).exists() == (case in ("experts of layer 1", "router"))
    releases.run(source, tmp_path / "out", small())
    assert releases.tree(tmp_path / "out") == releases.tree(release)


def test_a_bad_expert_of_its_own_is_named_as_on_disk(small: MakeRecipe, tmp_path: Path) -> None:
    model = checkpoints.tiny(tmp_path / "model", per_expert=True, mtp=None)
    name = f"{TEXT}layers.1.mlp.experts.2.up_proj.weight"
    checkpoints.edit(model, lambda found: found[name].view(-1)[3].fill_(math.nan))
    with pytest.raises(FourfoldError, match=rf"tensor '{name}': 1 NaN"):
        releases.run(model, tmp_path / "out", small())


@pytest.mark.parametrize("layer", [0, 1])
def test_states_that_overflow_are_an_error(model: Path, small: MakeRecipe, tmp_path: Path, layer: int) -> None:
    """Finite weights whose outputs are not: nothing that is measured or solved behind them means anything."""
    checkpoints.edit(model, lambda found: found[f"{TEXT}layers.{layer}.mlp.experts.down_proj"][0].fill_(3e38))
    with pytest.raises(FourfoldError, match=rf"layer {layer}"):
        releases.run(model, tmp_path / "out", small())


# --- a disk that is full (more: test_faults.py) ---------------------------------------------------


def test_a_log_that_cannot_be_written_stops_nothing(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path
) -> None:
    """The log is the first to feel a full disk; it must not hide the error that says so, nor end a run."""
    (tmp_path / "out/.fourfold/run.log").mkdir(parents=True)
    releases.run(source, tmp_path / "out", small())
    assert releases.tree(tmp_path / "out") == releases.tree(release)


def test_disk_too_small_is_said_before_any_work(
    source: Path, small: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    events: list[Event] = []
    with pytest.raises(FourfoldError, match="disk"):
        releases.run(source, tmp_path / "out", small(), progress=events.append)
    assert not events and not (tmp_path / "out").exists()
