"""`scheme.rest`: int8 beside the experts, draft experts solved; what stays BF16 and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoints
import deployments
import families
import family_releases
import releases
from fourfold.core import grid
from fourfold.datatypes import FourfoldError, QuantizedGroup
from fourfold.distributed.devices import Machine
from fourfold.model.checkpoint import Checkpoint
from fourfold.quantize import dense
from fourfold.quantize import plan as plan_module
from fourfold.quantize.plan import Plan, make_plan
from fourfold.recipe import Recipe, Rest, load_recipe
from fourfold.release.evaluate import Protocol, evaluate
from fourfold.serve.cards import planned_fits, smallest
from fourfold.serve.served import open_served, planned_served

MakeRecipe = Callable[..., Recipe]
COMPACT = load_recipe("compact").scheme.rest
DENSE = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj", "up_proj",
         "down_proj", "lm_head"}  # fmt: skip
KEPT = {"gate", "shared_expert_gate", "in_proj_a", "in_proj_b", "fc", "embed_tokens", "conv1d"}
HALF = 0.51  # of a step: rounding, and the scale in BF16
SOLVED = 3.0  # steps: a solved code makes up for what others left


def with_rest(recipe: Recipe, **parts: str) -> Recipe:
    return replace(recipe, scheme=replace(recipe.scheme, rest=replace(COMPACT, **parts)))


@pytest.fixture(scope="module")
def compact(source: Path, small: MakeRecipe) -> Path:
    out = source.parent / "compact"
    releases.run(source, out, with_rest(small()))
    return out


@pytest.fixture(scope="module")
def stored(compact: Path) -> dict[str, Tensor]:
    return releases.tensors(compact)


def int8_weight(stored: dict[str, Tensor], stem: str) -> tuple[Tensor, Tensor]:
    """Codes and scale of each weight, float64, byte by byte as docs/formats.md has them."""
    words, scale_NG = stored[f"{stem}weight_packed"], stored[f"{stem}weight_scale"]
    bytes_NK = torch.stack([words >> 8 * place & 255 for place in range(4)], dim=-1).flatten(1)
    outputs, inputs = stored[f"{stem}weight_shape"].tolist()
    assert bytes_NK.shape == (outputs, inputs)
    return bytes_NK.double() - 128, scale_NG.double().repeat_interleave(inputs // scale_NG.shape[1], dim=1)


def test_dense_weights_are_int8_and_close_to_the_source(source: Path, stored: dict[str, Tensor]) -> None:
    tensors, found = releases.tensors(source), set()
    for name, weight in tensors.items():
        stem = name.removesuffix("weight")
        if ".experts." in name or f"{stem}weight_packed" not in stored:
            continue
        code_NK, scale_NK = int8_weight(stored, stem)
        error_NK = (code_NK * scale_NK - weight.double()).abs()
        clipped = (code_NK == 127) | (code_NK == -128)
        most = HALF if name.startswith("mtp.") else SOLVED
        assert (error_NK <= most * scale_NK)[~clipped].all(), name
        assert name.startswith("mtp.") or (error_NK > HALF * scale_NK)[~clipped].any(), name
        assert clipped.double().mean() < 0.02, name
        found.add(stem.rstrip(".").rpartition(".")[2])
    assert found == DENSE


def test_everything_else_is_bit_identical(source: Path, stored: dict[str, Tensor]) -> None:
    kept = {name: value for name, value in releases.tensors(source).items() if name in stored}
    assert KEPT <= {name.removesuffix(".weight").rpartition(".")[2] for name in kept}
    assert all(torch.equal(value, stored[name]) for name, value in kept.items())


def test_searched_scales_are_closer_than_absmax() -> None:
    weight_NK = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight_NK[:, ::50] *= 6
    group = dense.round_weight(weight_NK, 8, 128, load_recipe("compact"))
    onto = grid.Grid(levels=grid.INT8, group_size=128, scale_dtype="bf16")
    scale_1NG = grid.absmax_scales(weight_NK.float()[None], onto)
    plain = QuantizedGroup(grid.round_to_nearest(weight_NK.float()[None], scale_1NG, onto), scale_1NG, 8)
    found, absmax = (
        (one.codes_ENK.double() * one.scale_ENG.double().repeat_interleave(128, dim=2) - weight_NK.double()).norm()
        for one in (group, plain)
    )
    assert found < 0.99 * absmax


def test_slabs_change_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK = torch.randn(70, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = dense.round_weight(weight_NK, 8, 32, load_recipe("compact"))
    monkeypatch.setattr(dense, "SLAB_ROWS", 13)
    parts = dense.round_weight(weight_NK, 8, 32, load_recipe("compact"))
    assert torch.equal(whole.codes_ENK, parts.codes_ENK) and torch.equal(whole.scale_ENG, parts.scale_ENG)
    assert torch.equal(dense.dequantized(whole), dense.dequantized(parts))


def test_draft_experts_are_solved(source: Path, compact: Path, stored: dict[str, Tensor]) -> None:
    """Each in the log, none with outputs worse than RTN's, in the layout of the model's experts."""
    layers = releases.read_json(source / "config.json")["text_config"]["num_hidden_layers"]
    rows = list(csv.DictReader((compact / "quant_log.csv").open(encoding="utf-8")))
    drafts = [row for row in rows if int(row["layer"]) == layers]
    experts = releases.read_json(source / "config.json")["text_config"]["num_experts"]
    assert len(drafts) == 3 * experts
    assert {(int(row["expert"]), row["projection"]) for row in drafts} == {
        (expert, projection) for expert in range(experts) for projection in releases.PROJECTIONS
    }
    assert all(float(row["error_over_rtn"]) <= 1 and row["method"] == "gptq" for row in drafts)
    names = {f"mtp.layers.0.mlp.experts.{expert}.{projection}.weight_packed"
             for expert in range(experts) for projection in releases.PROJECTIONS}  # fmt: skip
    assert names <= stored.keys()
    assert not [name for name in stored if name.startswith("mtp.layers.0.mlp.experts") and name.endswith(".weight")]


def test_the_release_stream_has_the_weights_that_are_served(source: Path, compact: Path, release: Path) -> None:
    """Experts are solved behind rounded dense weights, and the reference is of them: another one than of `best`."""
    other = json.loads((release / "fourfold.json").read_text())
    mine = json.loads((compact / "fourfold.json").read_text())
    assert mine["metrics"] != other["metrics"]
    experts = [name for name in releases.tensors(release) if ".experts." in name and name.startswith("model.")]
    packed = [name for name in experts if name.endswith("weight_packed")]
    both = [releases.tensors(folder) for folder in (compact, release)]
    assert any(not torch.equal(both[0][name], both[1][name]) for name in packed)


def test_the_measured_kld_is_that_of_the_files(source: Path, compact: Path) -> None:
    """Weights, head and experts read back from OUT give the figures that the run measured."""
    run = releases.read_json(compact / "metrics.json")["summary"]
    recipe = load_recipe(str(compact / "recipe.toml"))
    assert recipe.scheme.rest == COMPACT
    protocol = Protocol(text=Path(recipe.heldout.path), windows=2, length=128, drafts=False)
    found = evaluate(compact, source, protocol=protocol).summary
    assert found is not None
    assert found.kl_mean == pytest.approx(run["kl_mean"], rel=0.05)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_int8_draft_experts(source: Path, tmp_path: Path, small: MakeRecipe, form: str) -> None:
    recipe = replace(with_rest(small("solver.passes=0"), draft_experts="int8"), format=form)
    machine = Machine(devices="cpu*2" if form == "gptq" else "cpu", memory_bytes=releases.MEMORY_BYTES)
    releases.run(source, tmp_path / "out", recipe, machine=machine)
    weights = Checkpoint.open(tmp_path / "out")
    stacks = weights.draft_experts(torch.device("cpu"), torch.float32)
    tensors = releases.tensors(source)
    for stack, name in zip(stacks, ("gate_up_proj", "down_proj"), strict=True):
        wanted = tensors[f"mtp.layers.0.mlp.experts.{name}"].float()
        assert (stack - wanted).norm() / wanted.norm() < 0.01


def test_several_workers_share_the_drafts(source: Path, compact: Path, tmp_path: Path, small: MakeRecipe) -> None:
    machine = Machine(devices="cpu*2", memory_bytes=releases.MEMORY_BYTES)
    releases.run(source, tmp_path / "out", with_rest(small()), machine=machine)
    mine, other = releases.tensors(tmp_path / "out"), releases.tensors(compact)
    assert mine.keys() == other.keys()
    dense_names = [name for name in mine if ".experts." not in name]
    assert all(torch.equal(mine[name], other[name]) for name in dense_names)
    rows = list(csv.DictReader((tmp_path / "out/quant_log.csv").open(encoding="utf-8")))
    assert len(rows) == len(list(csv.DictReader((compact / "quant_log.csv").open(encoding="utf-8"))))


# ---- plans


def planned(folder: Path, **parts: str) -> Plan:
    return make_plan(folder, with_rest(load_recipe("best"), **parts), memory_bytes=2**33)


def test_presets_other_than_compact_quantize_experts_alone(source: Path) -> None:
    for name in ("best", "guided", "fast", "card", "gguf"):
        claims = make_plan(source, load_recipe(name), memory_bytes=2**33).claims
        assert {claim.group for claim in claims if claim.bits} == {"experts"}


def test_35b_with_its_draft_head_fits_a_24_gb_card(tmp_path: Path) -> None:
    """The sizes of docs/compact.md, from headers."""
    checkpoints.full_shape(tmp_path / "model")
    names = ("best", "compact", "compact-sglang")
    plans = [make_plan(tmp_path / "model", load_recipe(name), memory_bytes=2**34) for name in names]
    sizes = [sum(part.bytes_after for part in plan.parts) for plan in plans]
    vision = 893_000_000  # what the test's checkpoint has less than the model: its tower is smaller
    assert sizes[0] - sizes[1] == pytest.approx(3.109e9, rel=1e-3)
    assert sizes[2] - sizes[1] == pytest.approx(0.5006e9, rel=1e-3)
    assert sizes[1] < 21.1e9 and sizes[1] + vision > 20.9e9
    served = [replace(planned_served(plan), context=262_144) for plan in plans]
    sizes_of = ("weight_bytes", "draft_bytes", "ends_bytes", "splits", "int8", "quantized_head", "int4_drafts")
    assert all(getattr(served[1], name) == getattr(deployments.COMPACT, name) for name in sizes_of)
    fits = [[(fit.gpus, fit.gib) for fit in (smallest(one, 2), smallest(one, 0))] for one in served]
    assert fits == [[(1, 32), (1, 24)], [(1, 24), (1, 24)], [(1, 24), (1, 24)]]
    assert str(smallest(served[1], 2)) == "1 x 24 GiB with 2 drafts (context 174,496)"


def test_a_server_sees_what_was_planned(source: Path, compact: Path, small: MakeRecipe) -> None:
    plan = planned_served(make_plan(source, with_rest(small()), memory_bytes=2**33))
    found = open_served(compact)
    same = {name: getattr(found, name) for name in ("folder", "name", "template", "sampling")}
    assert replace(plan, **same) == found
    assert found.int8 and found.quantized_head and found.int4_drafts


def test_no_machine_is_named_where_the_cache_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "check_tokenizer", lambda *_: None)
    for family, fits in (("deepseek_v32", 0), ("qwen3_moe", 1)):
        families.tiny(tmp_path / family, family)
        assert len(planned_fits(make_plan(tmp_path / family, load_recipe("best"), memory_bytes=2**33))) == fits


def test_a_plan_names_bits(source: Path) -> None:
    rows = {row.group: row for row in planned(source).groups()}
    what = {group: row.what for group, row in rows.items()}
    assert (what["experts"], what["attention"], what["MTP"]) == ("int4", "int8 + copy", "int4 + int8 + copy")
    assert (what["router"], rows["MTP"].action, rows["MTP"].bits) == ("copy", "quantize + copy", (4, 8))


def test_a_group_divides_every_dense_width(tmp_path: Path) -> None:
    folder = checkpoints.tiny(tmp_path / "model", hidden=96, width=96)
    plan = make_plan(folder, with_rest(load_recipe("best")), memory_bytes=2**33)
    assert plan.dense.group_size == 32 and plan.dense.bits
    shapes = {claim.header.name: claim.header.shape for claim in plan.claims}
    assert all(shapes[name][0] % dense.OUTPUTS == 0 for name in plan.dense.bits)


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("qwen2_moe", {"self_attn.q_proj", "mlp.shared_expert.up_proj"}),
        (
            "deepseek_v3",
            {"self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj", "mlp.shared_experts.up_proj"},
        ),
        ("nemotron_h", {"mixer.out_proj", "mixer.q_proj", "mixer.shared_experts.down_proj"}),
    ],
)
def test_other_families(tmp_path: Path, family: str, ends: set[str]) -> None:
    """What is joined in engines has one width: of deepseek_v3 q_a_proj has 96 outputs, so kv_a_proj stays BF16 too."""
    model = family_releases.make_source(tmp_path / "model", family)
    recipe = family_releases.recipe(releases.write_recipe(tmp_path).parent, "fast")
    releases.run(model, tmp_path / "out", with_rest(recipe, draft_experts="bf16", draft_dense="bf16"))
    stored = Checkpoint.open(tmp_path / "out").stored
    int8 = {name.removesuffix(".weight").partition("layers.")[2].partition(".")[2]
            for name, weight in stored.items() if weight.bits == 8 and "layers." in name}  # fmt: skip
    assert ends <= int8 and "self_attn.kv_a_proj_with_mqa" not in int8


# ---- refused


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.tiny(tmp_path / "model", tied=True)
    with pytest.raises(FourfoldError, match=r"scheme\.rest\.head: got 'int8', but this model's output head is tied"):
        planned(folder)
    assert "lm_head.weight" not in planned(folder, head="bf16").dense.bits


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("embeddings", "no engine loads quantized embeddings"),
        ("draft_fc", "mtp.fc unwritten"),
        ("router", "stay BF16"),
        ("shared_expert_gate", "one output"),
        ("in_proj_a", "one output for each head"),
    ],
)
def test_what_never_is_quantized_is_refused_with_its_reason(part: str, reason: str) -> None:
    with pytest.raises(FourfoldError, match=rf"--set scheme.rest.{part}=int8: scheme.rest.{part}: .*{reason}"):
        load_recipe("best", [f"scheme.rest.{part}=int8"])


def test_gptq_takes_no_mixed_draft_head(source: Path) -> None:
    recipe = replace(with_rest(load_recipe("best"), draft_experts="bf16"), format="gptq")
    with pytest.raises(FourfoldError, match="quantized whole, or not at all"):
        make_plan(source, recipe, memory_bytes=2**33)


def test_rest_is_left_out_of_a_recipe_that_has_none() -> None:
    best = load_recipe("best")
    assert best.scheme.rest == Rest()
    assert not any(key.startswith("scheme.rest") for key in best.values())
