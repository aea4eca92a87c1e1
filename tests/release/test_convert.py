"""Between storages: codes to the bit, scales rounded once, whatever tool made the release."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints
import exports
import foreign
import releases
from fourfold.datatypes import FourfoldError
from fourfold.model.shards import write_shard
from fourfold.quantize.summary import read_summary
from fourfold.recipe import load_recipe
from fourfold.records.results import Status
from fourfold.release.convert import convert
from fourfold.release.verify.run import verify

CT, GPTQ, V2 = releases.FORMATS
O_PROJ = "model.layers.0.self_attn.o_proj"
PROJECTION = "model.language_model.layers.0.mlp.experts.1.up_proj."
Altered = Callable[[Path], Path]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("after", releases.FORMATS)
@pytest.mark.parametrize("before", releases.FORMATS)
def test_as_if_it_had_been_quantized_so(shipped: dict[str, Path], tmp_path: Path, before: str, after: str) -> None:
    """Every file is what quantize wrote in that format, to the byte; fourfold.json says what was done."""
    found = convert(shipped[before], tmp_path / "new", after)
    wanted, made = files(shipped[after]), files(tmp_path / "new")
    states = [json.loads(content.pop("fourfold.json")) for content in (wanted, made)]
    # What quantize measured of time is its own run's; verify may have been there.
    for content in (wanted, made):
        table = [line.rsplit(b",", 1)[0] for line in content["quant_log.csv"].splitlines()]
        content["quant_log.csv"] = b"\n".join(table)
        content.pop("verify.json", None)
    assert made == wanted
    for state in states:
        for name in (*releases.RECORDED, "converted"):
            state.pop(name, None)
    assert states[0] == states[1]
    assert (found.scales.changed, found.split, found.projections) == (0, 0, 24)
    assert not (tmp_path / ".new.converting").exists() and not (tmp_path / "new" / ".fourfold").exists()


def test_a_converted_release_passes_beside_its_source(
    shipped: dict[str, Path], shipped_source: Path, tmp_path: Path
) -> None:
    convert(shipped[V2], tmp_path / "ct", CT)
    verdict = verify(tmp_path / "ct", model=shipped_source)
    assert {check.status for check in verdict.checks} == {Status.PASS}
    state = json.loads((tmp_path / "ct" / "fourfold.json").read_text())
    before = json.loads((shipped[V2] / "fourfold.json").read_text())
    (step,) = state["converted"]
    assert (step["before"], step["after"], step["content"]) == (V2, CT, before["output"]["content"])
    assert state["identity"]["recipe"] == load_recipe(str(tmp_path / "ct" / "recipe.toml")).digest()
    assert read_summary(tmp_path / "ct").metrics == before["metrics"]
    convert(tmp_path / "ct", tmp_path / "back", V2)
    assert releases.shards(tmp_path / "back").keys() == releases.shards(shipped[V2]).keys()
    steps = json.loads((tmp_path / "back" / "fourfold.json").read_text())["converted"]
    assert [step["after"] for step in steps] == [CT, V2]


def test_scales_that_are_rounded(shipped: dict[str, Path], shipped_source: Path, tmp_path: Path) -> None:
    """What was measured before holds no more: it is left out, and verify does not judge by the log."""
    found = convert(shipped["fp16"], tmp_path / "new", CT)
    old, new = releases.tensors(shipped["fp16"]), releases.tensors(tmp_path / "new")
    changed, largest = 0, 0.0
    for *_, name in releases.expert_names("model.language_model.", range(2), 4):
        (codes, scales), (codes_after, scales_after) = (releases.codes_and_scales(one, name) for one in (old, new))
        assert torch.equal(codes, codes_after)
        assert torch.equal(scales_after, scales.bfloat16().double())
        changed += int((scales != scales_after).sum())
        largest = max(largest, float(((scales_after - scales) / scales).abs().max()))
    assert changed > 1000
    assert found.scales.changed == changed
    assert found.scales.largest == pytest.approx(largest, rel=1e-5) and largest <= 2**-8
    verdict = verify(tmp_path / "new", model=shipped_source)
    assert verdict.passed
    (errors,) = [check for check in verdict.checks if check.name == "weight errors"]
    assert errors.status is Status.NOT_RUN and f"{changed:,} scales" in errors.evidence
    assert not (tmp_path / "new" / "metrics.json").exists()
    assert json.loads((tmp_path / "new" / "fourfold.json").read_text())["metrics"] == {}
    assert "metrics.json" in found.left_out


@pytest.mark.parametrize("form", releases.FORMATS)
@pytest.mark.parametrize("v2", [False, True])
def test_a_release_of_gptqmodel(tmp_path: Path, form: str, v2: bool) -> None:
    """A published release whose draft experts are stacks: codes to the bit, drafts split, config that engines take."""
    old = foreign.make(tmp_path / "old", "symmetric")
    if v2:
        foreign.to_v2(old)
    found = convert(old, tmp_path / "new", form)
    before, after = releases.tensors(old), releases.tensors(tmp_path / "new")
    for *_, name in releases.expert_names("model.language_model.", range(1), 4):
        (codes, scales), (codes_after, scales_after) = (releases.codes_and_scales(one, name) for one in (before, after))
        assert torch.equal(codes, codes_after)
        assert torch.equal(scales_after, scales.bfloat16().double())
    for *_, name in releases.expert_names("mtp.", range(1), 4):
        assert torch.equal(after[f"{name}weight"].double(), releases.source_weight(before, name))
    experts = ".mlp.experts."
    assert {name for name in before if experts not in name} == {name for name in after if experts not in name}
    assert all(torch.equal(before[name], after[name]) for name in before if experts not in name)
    assert (found.split, found.projections) == (2, 12)
    assert found.left_out == ("quantize_config.json",)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"] == expected_config(form, 64)
    assert json.loads((tmp_path / "new" / "conversion.json").read_text())["scales"]["total"] == found.scales.total
    assert (tmp_path / "new" / "model.safetensors.index.json").is_file()
    assert convert(tmp_path / "new", tmp_path / "again", form).scales.changed == 0
    assert releases.tensors(tmp_path / "again").keys() == after.keys()


def expected_config(form: str, size: int) -> dict[str, Any]:
    golden = Path(__file__).parents[1] / "golden" / f"example-{form}.json"
    config: dict[str, Any] = json.loads(golden.read_text())["quantization_config"]
    if form == CT:
        config["config_groups"]["group_0"]["weights"]["group_size"] = size
    else:
        config["group_size"] = size
    return config


def test_more_than_experts_is_quantized(tmp_path: Path) -> None:
    """Attention in int4 too: no exclusion may match it, and each kept module needs one."""
    old = foreign.make(tmp_path / "old", "symmetric")
    stem = "model.language_model.layers.0.self_attn."

    def quantize_attention(tensors: dict[str, Tensor]) -> None:
        name = "model.language_model.layers.0.mlp.experts.0.gate_proj."
        for projection in ("k_proj", "v_proj"):
            outputs = tensors.pop(f"{stem}{projection}.weight").shape[0]
            for suffix in ("qweight", "scales", "qzeros", "g_idx"):
                width = {"qzeros": outputs // 8, "g_idx": None}.get(suffix, outputs)
                tensors[f"{stem}{projection}.{suffix}"] = tensors[name + suffix][..., :width].clone()

    checkpoints.edit(old, quantize_attention)
    for form in releases.FORMATS:
        found = convert(old, tmp_path / form, form)
        assert found.projections == 14
        settings = json.loads((tmp_path / form / "config.json").read_text())["quantization_config"]
        assert excluded_by(settings, f"{stem}q_proj", "mtp.layers.0.mlp.experts.0.up_proj", "lm_head")
        assert not excluded_by(settings, f"{stem}k_proj", f"{stem}v_proj", PROJECTION.rstrip("."))


def excluded_by(settings: dict[str, Any], *modules: str) -> bool:
    """Whether exclusions match all of some modules; none if not."""
    patterns = [one[3:] for one in settings.get("ignore") or ()]
    patterns += [key[2:] for key in settings.get("dynamic") or () if key.startswith("-:")]
    found = {any(re.match(pattern, module) for pattern in patterns) for module in modules}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("form", releases.FORMATS)
def test_one_layer_has_more_than_experts(tmp_path: Path, form: str) -> None:
    """Names alone cannot tell the module of one layer from that of another: exclusions one by one."""
    old = exports.release(tmp_path / "old", "qwen3_moe", 64)

    def attention(tensors: dict[str, Tensor]) -> None:
        tensors |= exports.rounded(f"{O_PROJ}.", tensors.pop(f"{O_PROJ}.weight"), 64)

    checkpoints.edit(old, attention)
    assert convert(old, tmp_path / "new", form).projections == 25
    settings = releases.read_json(tmp_path / "new" / "config.json")["quantization_config"]
    assert excluded_by(settings, O_PROJ.replace("0", "1"), "model.layers.0.self_attn.q_proj", "lm_head")
    assert not excluded_by(settings, O_PROJ, "model.layers.1.mlp.experts.0.up_proj")

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors |= exports.rounded(f"{O_PROJ}.", releases.dequantize(tensors, f"{O_PROJ}."), 64, bits=8)

    checkpoints.edit(old, widen)
    group = {"group_1": {"targets": [f"re:{re.escape(O_PROJ)}"], "weights": {"num_bits": 8, "group_size": 64}}}
    group["group_1"]["weights"] |= {"type": "int", "symmetric": True, "strategy": "group"}
    checkpoints.edit_json(old / "config.json", lambda raw: raw["quantization_config"]["config_groups"].update(group))
    assert "no quantization_config of" in refused(old, tmp_path / "int8", form)


# --- int8 beside int4 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", releases.FORMATS[1:])
def test_compact_there_and_back(compact: Path, tmp_path: Path, form: str) -> None:
    """The same codes of 4 and 8 bits and scales in the other format; the way back gives the same bytes."""
    found = convert(compact, tmp_path / "new", form)
    assert found.scales.changed == 0
    before, after = releases.tensors(compact), releases.tensors(tmp_path / "new")
    stems = [name.removesuffix("weight_packed") for name in before if name.endswith("weight_packed")]
    assert found.projections == len(stems) and "lm_head." in stems and any(name.startswith("mtp.") for name in stems)
    widths = set()
    for stem in stems:
        codes, scales = releases.codes_and_scales(before, stem)
        widths.add(int(codes.min()))
        assert all(map(torch.equal, (codes, scales), releases.codes_and_scales(after, stem))), stem
    assert min(widths) < -100 and max(widths) == -8
    assert verify(tmp_path / "new").passed
    convert(tmp_path / "new", tmp_path / "back", CT)
    for name in ("config.json", *(path.name for path in compact.glob("*.safetensors"))):
        assert (tmp_path / "back" / name).read_bytes() == (compact / name).read_bytes(), name


def test_drafts_of_which_vllm_takes_all_or_none(tmp_path: Path) -> None:
    out = exports.release(tmp_path / "out", "qwen3_5_moe", compact=True)
    stem = "mtp.layers.0.self_attn.q_proj."

    def keep(tensors: dict[str, Tensor]) -> None:
        tensors[f"{stem}weight"] = releases.dequantize(tensors, stem).bfloat16()
        for suffix in ("packed", "scale", "shape"):
            del tensors[f"{stem}weight_{suffix}"]

    checkpoints.edit(out, keep)
    assert "mtp" in refused(out, tmp_path / "new", GPTQ)


def test_a_projection_over_two_shards(tmp_path: Path) -> None:
    old = foreign.make(tmp_path / "old", "symmetric")
    wanted = convert(old, tmp_path / "one", CT)
    (path,) = old.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, value in tensors.items():
        parts[name.endswith((".scales", "embed_tokens.weight"))][name] = value
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, parts, strict=True):
        save_file(part, old / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (old / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = convert(old, tmp_path / "two", CT)
    assert found.scales == wanted.scales
    one, two = releases.tensors(tmp_path / "one"), releases.tensors(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert list(releases.shards(tmp_path / "two")) == names


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(out: Path, new: Path, form: str = CT) -> str:
    before = new.exists()
    with pytest.raises(FourfoldError) as raised:
        convert(out, new, form)
    assert new.exists() == before
    assert not new.with_name(f".{new.name}.converting").exists()
    return str(raised.value)


def test_an_asymmetric_release(gptqmodel: dict[str, Path], tmp_path: Path) -> None:
    assert "zero points are not 8: it was quantized asymmetrically" in refused(
        gptqmodel["asymmetric"], tmp_path / "new"
    )


def on_projection(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[PROJECTION + suffix] = change(tensors[PROJECTION + suffix])

    return edit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (on_projection("g_idx", lambda value: value.flip(0)), "in an order of its own"),
        (on_projection("qzeros", lambda value: value + 0x11111111), "all zero points are 9, wanted 8"),
        (on_projection("scales", lambda value: value.repeat_interleave(2, 0)), "groups are of 32, 64 inputs"),
        (on_projection("scales", lambda value: value.index_fill(0, torch.tensor([0]), torch.inf)), "infinite"),
        (lambda tensors: tensors.pop(f"{PROJECTION}scales"), "is missing"),
        (lambda tensors: tensors.pop("mtp.fc.weight"), "mtp.fc.weight is missing"),
    ],
)
def test_what_is_not_as_it_should_be(tmp_path: Path, change: Any, said: str) -> None:
    old = foreign.make(tmp_path / "old", "symmetric")
    checkpoints.edit(old, change)
    if "32, 64" in said:
        checkpoints.edit(old, on_projection("qzeros", lambda value: value.repeat_interleave(2, 0)))
        checkpoints.edit(old, on_projection("g_idx", lambda _: (torch.arange(256) // 32).int()))
        assert "group_size: got 64, expected 32, as model" in refused(old, tmp_path / "new")
        some = {"dynamic": {"+:.*up_proj": {"group_size": 32}}}
        checkpoints.edit_json(old / "config.json", lambda raw: raw["quantization_config"].update(some))
    assert said in refused(old, tmp_path / "new")


def test_places(shipped: dict[str, Path], tmp_path: Path, example_model: Path) -> None:
    assert "nothing in it is int4" in refused(example_model, tmp_path / "new")
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path / "new")
    assert "NEW is inside OUT" in refused(shipped[CT], shipped[CT] / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "NEW is not empty" in refused(shipped[CT], tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_trial_is_no_release(shipped: dict[str, Path], altered: Altered, tmp_path: Path) -> None:
    out = altered(shipped[CT])
    checkpoints.edit_json(out / "fourfold.json", lambda state: state.update(partial=True))
    assert "a trial on layers" in refused(out, tmp_path / "new")


def test_nothing_is_left_of_one_that_fails(
    shipped: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def fail(folder: Path, name: str, tensors: Any) -> Any:
        if written:
            raise FourfoldError("the disk is full")
        written.append(name)
        return write_shard(folder, name, tensors)

    monkeypatch.setattr("fourfold.release.convert.write_shard", fail)
    assert "the disk is full" in refused(shipped[CT], tmp_path / "new", GPTQ)
    monkeypatch.undo()
    left = tmp_path / ".new.converting"
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"of a conversion that was killed")
    assert convert(shipped[CT], tmp_path / "new", GPTQ).projections == 24
    assert not (tmp_path / "new" / "half.safetensors").exists()
