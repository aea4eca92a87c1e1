"""The plan: exact on the full shape of Qwen3.6-35B-A3B, complete on every layout, clear on wrong input."""

from __future__ import annotations

import json
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import families
from fourfold.core.kernels import cuda
from fourfold.datatypes import Action, FourfoldError
from fourfold.distributed.devices import expand_devices
from fourfold.formats import named
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.tensors import TensorIndex
from fourfold.quantize import advice, footprint, memory, pinned
from fourfold.quantize import plan as plan_module
from fourfold.quantize.claims import claim_tensors
from fourfold.quantize.estimate import Workload
from fourfold.quantize.memory import MemoryPlan
from fourfold.quantize.plan import GroupRow, Plan, make_plan
from fourfold.recipe import Recipe, Source, load_recipe

RECIPE, GUIDED = load_recipe("best"), load_recipe("guided")
WITH_ROUTING = load_recipe("guided", ["guidance.routing=true"])
GB = 10**9
LAYER = "model.language_model.layers."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.full_shape(tmp_path_factory.mktemp("full"))


def rows(plan: Plan) -> dict[str, GroupRow]:
    return {row.group: row for row in plan.groups()}


def grouped(size: int, storage: str = "compressed-tensors") -> Recipe:
    return replace(RECIPE, format=storage, scheme=replace(RECIPE.scheme, group_size=size))


def claimed_once(plan: Plan) -> bool:
    return Counter(claim.header.name for claim in plan.claims) == Counter(list(plan.source.headers))


# --- the full shape: FORMAT.md's arithmetic -------------------------------------------------------


def test_counts_of_the_full_shape(full: Path) -> None:
    plan = make_plan(full, RECIPE)
    table = rows(plan)
    assert plan.projections == 30_720
    assert [row.group for row in plan.groups()] == [
        "experts", "attention", "linear attention", "router", "shared experts", "MTP", "vision", "embeddings",
        "norms",
    ]  # fmt: skip
    assert (table["experts"].tensors_before, table["experts"].tensors_after) == (40 * 2, 30_720 * 3)
    assert (table["MTP"].tensors_before, table["MTP"].tensors_after) == (19, 785)
    assert table["attention"].tensors_before == 10 * 6
    assert table["linear attention"].tensors_before == 30 * 9
    assert table["router"].tensors_before == 40
    assert table["shared experts"].tensors_before == 40 * 4
    assert table["embeddings"].tensors_before == 2
    assert table["norms"].tensors_before == 40 * 2 + 1
    assert claimed_once(plan)
    assert all(claim.reason for claim in plan.claims)


def test_bytes_of_the_full_shape(full: Path) -> None:
    plan = make_plan(full, RECIPE)
    table = rows(plan)
    assert table["experts"].bytes_before == 40 * 256 * 3 * 512 * 2048 * 2
    assert table["embeddings"].bytes_after == 2 * 248_320 * 2048 * 2
    assert table["router"].bytes_after == 40 * 256 * 2048 * 2
    assert table["MTP"].bytes_after == table["MTP"].bytes_before
    for group, row in table.items():
        assert group == "experts" or row.bytes_after == row.bytes_before
    assert sum(part.bytes_after for part in plan.parts) == plan.disk.tensor_bytes
    assert sum(row.bytes_after for row in table.values()) == plan.disk.tensor_bytes


GATE_UP_WORDS, DOWN_WORDS = 512 * 2048 // 8 * 4, 2048 * 512 // 8 * 4
COMPRESSED = {  # FORMAT.md 3: words, BF16 scales, shape
    "gate_up": GATE_UP_WORDS + 512 * 16 * 2 + 2 * 8,
    "down": DOWN_WORDS + 2048 * 4 * 2 + 2 * 8,
}
GPTQ = {  # FORMAT.md 2: qweight, scales, qzeros, g_idx
    "gate_up": GATE_UP_WORDS + 16 * 512 * 2 + 16 * 64 * 4 + 2048 * 4,
    "down": DOWN_WORDS + 4 * 2048 * 2 + 4 * 256 * 4 + 512 * 4,
}


@pytest.mark.parametrize(
    ("storage", "each", "suffixes"),
    [("compressed-tensors", COMPRESSED, 3), ("gptq", GPTQ, 4), ("gptq_v2", GPTQ, 4)],
)
def test_bytes_of_the_experts_in_each_format(full: Path, storage: str, each: dict[str, int], suffixes: int) -> None:
    experts = rows(make_plan(full, grouped(128, storage)))["experts"]
    assert experts.action == "quantize"
    assert experts.tensors_after == 30_720 * suffixes
    assert experts.bytes_after == 40 * 256 * (2 * each["gate_up"] + each["down"])


def test_the_reference_card_size(full: Path) -> None:
    plan = make_plan(full, grouped(128, "gptq_v2"))
    assert round(plan.disk.tensor_bytes / GB, 1) == 24.4  # CARD.md C6


def test_experts_one_by_one_come_to_the_same(full: Path, tmp_path: Path) -> None:
    stacked, single = (
        make_plan(full, RECIPE),
        make_plan(checkpoints.full_shape(tmp_path, per_expert=True), RECIPE),
    )
    assert claimed_once(single)
    assert rows(single)["experts"] == replace(rows(stacked)["experts"], tensors_before=30_720)
    assert rows(single)["MTP"] == replace(rows(stacked)["MTP"], tensors_before=785, action="copy")
    assert [part.bytes_after for part in single.parts] == [part.bytes_after for part in stacked.parts]
    assert (single.layers[0].fused, stacked.layers[0].fused) == (False, True)


def test_a_shard_per_layer_and_then_the_rest(full: Path) -> None:
    plan = make_plan(full, RECIPE)
    total = len(plan.parts)
    assert [part.shard for part in plan.parts] == [
        f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)
    ]
    assert [layer.index for layer in plan.layers] == list(range(40))
    for layer in plan.layers:
        assert layer.routed and layer.kind == ("full_attention" if layer.index % 4 == 3 else "linear_attention")
        assert all(claim.header.name.startswith(f"{LAYER}{layer.index}.") for claim in layer.claims)
        assert all(claim.layer == layer.index for claim in layer.claims)
    assert not any(claim.header.name.startswith(LAYER) for part in plan.rest for claim in part.claims)


def test_no_weight_and_no_device_is_touched(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plan reads headers only")

    monkeypatch.setattr(TensorIndex, "read", touched)
    monkeypatch.setattr(TensorIndex, "chunks", touched)
    for name in ("mem_get_info", "device_count", "is_available", "init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert make_plan(full, RECIPE).projections == 30_720


# --- small checkpoints: layouts, families, shards -------------------------------------------------


@pytest.mark.parametrize("mtp", ["fused", "split", None])
@pytest.mark.parametrize("per_expert", [False, True])
def test_both_layouts(tmp_path: Path, per_expert: bool, mtp: str | None) -> None:
    plan = make_plan(checkpoints.tiny(tmp_path, per_expert=per_expert, mtp=mtp, layers=3, experts=4), RECIPE)
    table = rows(plan)
    assert claimed_once(plan)
    assert plan.projections == 3 * 4 * 3
    assert table["experts"].tensors_before == (36 if per_expert else 6)
    assert table["experts"].tensors_after == 36 * 3
    assert all(layer.fused is not per_expert for layer in plan.layers)
    if mtp is None:
        assert "MTP" not in table
    else:
        assert (table["MTP"].tensors_before, table["MTP"].tensors_after) == (19 if mtp == "fused" else 29, 29)
        assert table["MTP"].action == ("copy + split" if mtp == "fused" else "copy")


def test_layouts_may_differ_between_layers(tmp_path: Path) -> None:
    checkpoints.tiny(tmp_path)

    def split_layer_1(tensors: Tensors) -> None:
        prefix = f"{LAYER}1.mlp.experts."
        stacks = tensors.pop(f"{prefix}gate_up_proj"), tensors.pop(f"{prefix}down_proj")
        for expert, (gate_up, down) in enumerate(zip(*stacks, strict=True)):
            gate, up = gate_up.chunk(2)
            for name, value in (("gate", gate), ("up", up), ("down", down)):
                tensors[f"{prefix}{expert}.{name}_proj.weight"] = value.clone()

    checkpoints.edit(tmp_path, split_layer_1)
    plan = make_plan(tmp_path, RECIPE)
    assert [layer.fused for layer in plan.layers] == [True, False]
    assert plan.layers[0].bytes_before - plan.layers[1].bytes_before == sum(
        (1 if claim.layer == 0 else -1) * claim.header.size_bytes
        for claim in plan.claims
        if claim.layer is not None and claim.group != "experts"
    )


def test_the_dense_family(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.tiny(tmp_path, family="qwen3_moe", layers=3, dense_layers=(1,)), RECIPE)
    routed = make_plan(checkpoints.tiny(tmp_path / "routed", family="qwen3_moe", layers=2), RECIPE)
    table = rows(plan)
    assert claimed_once(plan)
    assert [layer.routed for layer in plan.layers] == [True, False, True]
    assert [layer.fused for layer in plan.layers] == [False, False, False]
    assert {claim.action for claim in plan.layers[1].claims} == {Action.COPY}
    assert (table["dense MLP"].tensors_before, table["dense MLP"].action) == (3, "copy")
    assert plan.projections == routed.projections == 2 * 4 * 3
    assert plan.time.solve_seconds == routed.time.solve_seconds
    assert plan.time.forward_seconds > routed.time.forward_seconds
    assert not any("MTP" in warning for warning in plan.warnings)


def test_tied_embeddings(tmp_path: Path) -> None:
    checkpoints.tiny(tmp_path, tied=True)
    assert rows(make_plan(tmp_path, RECIPE))["embeddings"].tensors_before == 1
    head = torch.zeros(2048, 128).bfloat16()
    checkpoints.edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    plan = make_plan(tmp_path, RECIPE)
    assert rows(plan)["embeddings"].tensors_after == 2
    assert claimed_once(plan)


def test_rotary_buffers_are_dropped(tmp_path: Path) -> None:
    checkpoints.tiny(tmp_path)
    before = make_plan(tmp_path, RECIPE)
    layers = {
        "model.language_model.": None,
        f"{LAYER}1.self_attn.": 1,
        f"{LAYER}7.self_attn.": None,
    }  # there is no 7
    names = {f"{prefix}rotary_emb.inv_freq": layer for prefix, layer in layers.items()}
    checkpoints.edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(8) for name in names}))
    plan = make_plan(tmp_path, RECIPE)
    dropped = {claim.header.name: claim.layer for claim in plan.claims if claim.action is Action.DROP}
    assert dropped == names
    assert claimed_once(plan)
    assert rows(plan)["buffers"].tensors_after == rows(plan)["buffers"].bytes_after == 0
    assert [part.bytes_after for part in plan.parts] == [part.bytes_after for part in before.parts]


def test_kept_vectors_may_be_f32(tmp_path: Path) -> None:
    checkpoints.tiny(tmp_path)
    name = f"{LAYER}0.linear_attn.A_log"
    checkpoints.edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].float()}))
    claim = next(claim for claim in make_plan(tmp_path, RECIPE).claims if claim.header.name == name)
    assert (claim.action, claim.bytes_after) == (Action.COPY, 4 * 4)


def test_the_rest_is_packed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.tiny(tmp_path)
    whole = make_plan(tmp_path, RECIPE)
    assert len(whole.rest) == 1
    monkeypatch.setattr(plan_module, "SHARD_BYTES", 600_000)
    plan = make_plan(tmp_path, RECIPE)
    assert len(plan.rest) > 2
    assert [claim for shard in plan.rest for claim in shard.claims] == list(whole.rest[0].claims)
    for shard, following in zip(plan.rest, plan.rest[1:], strict=False):
        assert shard.bytes_after <= 600_000 or len(shard.claims) == 1
        assert shard.bytes_after + following.claims[0].bytes_after > 600_000
    assert [part.shard for part in plan.parts][
        -1
    ] == f"model-{len(plan.parts):05d}-of-{len(plan.parts):05d}.safetensors"


# --- wrong input ----------------------------------------------------------------------------------


def delete(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def change(name: str, function: Any) -> Any:
    return lambda tensors: tensors.update({name: function(tensors[name])})


NORM, GATE_UP = f"{LAYER}0.input_layernorm.weight", f"{LAYER}0.mlp.experts.gate_up_proj"
WRONG = {
    "missing norm": (delete(NORM), rf"missing: {NORM}$"),
    "missing stack": (
        delete(f"{LAYER}1.mlp.experts.down_proj"),
        rf"missing: {LAYER}1\.mlp\.experts\.down_proj",
    ),
    "missing part of MTP": (delete("mtp.fc.weight"), r"missing: mtp\.fc\.weight"),
    "unexpected": (lambda tensors: tensors.update(extra=torch.ones(1)), "unexpected: extra$"),
    "layer too many": (
        lambda tensors: tensors.update({f"{LAYER}7.input_layernorm.weight": torch.ones(1)}),
        rf"unexpected: {LAYER}7\.input_layernorm\.weight",
    ),
    "shape": (change(NORM, lambda t: t[:64].clone()), rf"{NORM} is \[64\], wanted \[128\]"),
    "experts too few": (
        change(GATE_UP, lambda t: t[:3].clone()),
        r"gate_up_proj is \[3, 256, 128\], wanted \[4, 256, 128\]",
    ),
    "expert dtype": (change(GATE_UP, torch.Tensor.float), r"gate_up_proj is F32, wanted BF16"),
    "matrix dtype": (
        change(f"{LAYER}0.mlp.shared_expert.up_proj.weight", torch.Tensor.half),
        rf"{LAYER}0\.mlp\.shared_expert\.up_proj\.weight is F16, wanted BF16",
    ),
    "kept dtype": (change(NORM, torch.Tensor.double), rf"{NORM} is F64, wanted BF16 or F32 or F16"),
    "embedding dtype": (change("lm_head.weight", torch.Tensor.float), r"lm_head\.weight is F32, wanted BF16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_headers_that_do_not_fit(tmp_path: Path, case: str) -> None:
    wrong, message = WRONG[case]
    checkpoints.edit(checkpoints.tiny(tmp_path), wrong)
    with pytest.raises(FourfoldError, match=f"(?m){message}"):
        make_plan(tmp_path, RECIPE)


def test_one_message_names_every_kind_of_problem(tmp_path: Path) -> None:
    checkpoints.tiny(tmp_path)

    def spoil(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".mlp.shared_expert." in name and name.startswith(LAYER)]:
            del tensors[name]
        tensors["extra"] = tensors[NORM]
        tensors[NORM] = tensors[NORM][:3].clone()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].half()

    checkpoints.edit(tmp_path, spoil)
    with pytest.raises(FourfoldError) as error:
        make_plan(tmp_path, RECIPE)
    text = str(error.value)
    assert all(f"\n  {kind}: " in text for kind in ("missing", "unexpected", "wrong shape", "wrong dtype"))
    assert f"{LAYER}0.mlp.shared_expert.gate_proj.weight" in text and "and 3 more" in text


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    checkpoints.tiny(tmp_path, per_expert=True)
    checkpoints.edit(tmp_path, delete(f"{LAYER}1.mlp.experts.2.up_proj.weight"))
    with pytest.raises(FourfoldError, match=r"layers\.1\.mlp\.experts.*expected one tensor for each of 4 experts"):
        make_plan(tmp_path, RECIPE)


def test_a_stack_that_transformers_transposes_has_as_many_values(tmp_path: Path) -> None:
    """Its shape on disk is not the one in memory."""
    families.tiny(tmp_path, "qwen3_vl_moe")
    stack = f"{LAYER}1.mlp.experts.gate_up_proj"
    recipe = load_recipe("best", ["scheme.group_size=128"])
    claim_tensors(Checkpoint.open_source(tmp_path), recipe)
    checkpoints.edit(tmp_path, change(stack, lambda t: t[:7].clone()))
    with pytest.raises(FourfoldError, match=r"1\.mlp\.experts\.gate_up_proj is \[7, 256, 256\], wanted \[8, "):
        claim_tensors(Checkpoint.open_source(tmp_path), recipe)


def test_mtp_that_config_does_not_announce(tmp_path: Path) -> None:
    """Nobody runs it: it is kept as it lies there."""
    checkpoints.tiny(tmp_path)
    checkpoints.edit_json(tmp_path / "config.json", lambda config: config["text_config"].pop("mtp_num_hidden_layers"))
    plan = make_plan(tmp_path, RECIPE)
    assert claimed_once(plan) and not plan.source.has_draft(plan.source.headers)
    assert (rows(plan)["MTP"].tensors_before, rows(plan)["MTP"].action) == (19, "copy")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 64}, "group_size = 128 does not divide the experts' width 64; take 64"),
        ({"hidden": 160, "width": 128}, "group_size = 128 does not divide the experts' hidden size 160; take 32"),
        ({"hidden": 136, "width": 128}, "no group size of 128, 64, 32 divides the experts' hidden size 136"),
    ],
)
def test_groups_that_do_not_divide(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        make_plan(checkpoints.tiny(tmp_path, **sizes), load_recipe("best", ["scheme.group_size=128"]))


@pytest.mark.parametrize(
    ("sizes", "gpus", "size"),
    [({}, 1, 128), ({"width": 64}, 1, 64), ({"width": 192}, 1, 64), ({"width": 192}, 6, 32), ({}, 4, 32)],
)
def test_the_largest_group_that_divides_is_taken(tmp_path: Path, sizes: dict[str, int], gpus: int, size: int) -> None:
    recipe = load_recipe("best", [f"scheme.tensor_parallel={gpus}"])
    plan = make_plan(checkpoints.tiny(tmp_path, **sizes), recipe)
    assert plan.recipe == replace(recipe, scheme=replace(recipe.scheme, group_size=size))
    same = load_recipe("best", [f"scheme.group_size={size}"])
    assert plan.recipe.digest() == same.digest()  # a run that was begun goes on with either


def test_experts_that_gpus_cannot_share(tmp_path: Path) -> None:
    model = checkpoints.tiny(tmp_path)
    with pytest.raises(FourfoldError, match=r"scheme.tensor_parallel = 3 does not divide the experts' width \d+"):
        make_plan(model, load_recipe("best", ["scheme.tensor_parallel=3"]))
    with pytest.raises(FourfoldError, match=r"no group size of .* divides .* hidden size 128 and width 128 / 8"):
        make_plan(model, load_recipe("best", ["scheme.tensor_parallel=8"]))


def test_a_model_without_routed_experts(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="no layer of Qwen3MoeForCausalLM has routed experts"):
        make_plan(checkpoints.tiny(tmp_path, family="qwen3_moe", dense_layers=(0, 1)), RECIPE)


def test_tokenizer(tmp_path: Path) -> None:
    checkpoints.tiny(tmp_path)
    path = tmp_path / "tokenizer.json"
    checkpoints.edit_json(path, lambda content: content["added_tokens"].append({"id": 2048, "content": "x"}))
    with pytest.raises(FourfoldError, match=r"got token id 2048, expected less than config\.json's vocab_size 2048"):
        make_plan(tmp_path, RECIPE)
    for content, message in (
        (b"{}", "not a tokenizer"),
        (b'{"model": {"vocab": {"a": 1e999}}}', "not a tokenizer"),
        (b'{"model": {"vocab": {}}}', "not a tokenizer"),
        (b"[" * 100_000, "not JSON"),
        (bytes(range(128, 256)) * 100, "not JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(FourfoldError, match=message) as error:
            make_plan(tmp_path, RECIPE)
        assert len(str(error.value)) < 500
    path.unlink()
    with pytest.raises(FourfoldError, match=r"neither tokenizer\.json nor vocab\.json"):
        make_plan(tmp_path, RECIPE)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    assert make_plan(tmp_path, RECIPE).projections


@pytest.mark.parametrize("layers", [range(0, 3), range(2, 2), range(-1, 1), range(0, 2, 2)])
def test_layers_that_are_not_there(tmp_path: Path, layers: range) -> None:
    with pytest.raises(FourfoldError, match="this model has layers 0-1"):
        make_plan(checkpoints.tiny(tmp_path), RECIPE, layers=layers)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:", "cpu:0", ""])
def test_devices_that_do_not_exist(device: str) -> None:
    with pytest.raises(FourfoldError, match=r"wanted auto, all, cpu, cpu\*N, cuda:N"):
        expand_devices(device)


def test_cuda_devices_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FourfoldError, match="shows torch 1 CUDA devices"):
        expand_devices("cuda:1")


# --- trials ---------------------------------------------------------------------------------------


def test_a_trial_writes_its_layers_only(full: Path) -> None:
    plan, whole = make_plan(full, RECIPE, layers=range(1, 3)), make_plan(full, RECIPE)
    assert (plan.partial, plan.solve, whole.partial, whole.solve) == (True, range(1, 3), False, range(40))
    assert plan.projections == 2 * 256 * 3
    assert plan.parts == whole.parts
    assert plan.groups() == whole.groups()
    assert plan.disk.tensor_bytes == sum(layer.bytes_after for layer in plan.layers[1:3])
    assert plan.time.solve_seconds == pytest.approx(whole.time.solve_seconds * 2 / 40)
    assert plan.time.forward_seconds < whole.time.forward_seconds / 4  # three layers, and the head
    assert not make_plan(full, RECIPE, layers=range(40)).partial


# --- warnings -------------------------------------------------------------------------------------


def warned(plan: Plan, start: str) -> list[str]:
    return [warning for warning in plan.warnings if warning.startswith(start)]


def test_tensor_parallel_sizes_that_groups_do_not_divide(full: Path, tmp_path: Path) -> None:
    """Said of as many GPUs as the run has: a server on fewer never meets it. One line of a terminal."""

    def on_gpus(count: int, group: int, model: Path = full) -> list[str]:
        gpus = tuple(f"cuda:{number}" for number in range(count))
        return warned(make_plan(model, grouped(group), devices=gpus, memory_bytes=100 * GB), "tensor parallel")

    assert on_gpus(8, 128) == ["tensor parallel 8: width 512 / 8 not divisible by group size 128"]
    assert on_gpus(4, 128) == on_gpus(8, 64) == warned(make_plan(full, grouped(128)), "tensor parallel") == []
    narrow = on_gpus(8, 128, checkpoints.tiny(tmp_path, width=128))
    assert narrow == ["tensor parallel 2, 4, 8: width 128 / 2 not divisible by group size 128"]
    assert len(f"warning: {narrow[0]}") <= 80
    (packed,) = advice.tensor_parallel_advice(512, 128, named("compressed-tensors"))  # as inspect has it
    assert "vLLM refuses to load" in packed and "expert parallel, a smaller group size" in packed
    (gptq,) = advice.tensor_parallel_advice(512, 128, named("gptq"))
    assert "moe_wna16" in gptq and "refuses to load" not in gptq


def test_the_headline_says_what_runs_where(full: Path, tmp_path: Path) -> None:
    plan = make_plan(full, RECIPE, devices=("cuda:0", "cuda:1", "cuda:2"), memory_bytes=100 * GB, layers=range(2, 4))
    event = advice.start_event(plan, tmp_path / "out")
    facts = dict(event.data)
    assert str(facts.pop("model")).startswith(str(full)) and facts.pop("output") == str(tmp_path / "out")
    assert facts == {
        "recipe": "best: compressed-tensors, group size 128, 256 samples of 1,024 tokens",
        "tokens": "4 per expert and input of gate and up, 16 of down; KLD falls with more, up to 32",
        "devices": "cuda:0 to cuda:2",
        "layers": "2-3: a trial, the output is partial",
    }
    assert event.text.splitlines()[1].startswith("recipe   best: ")
    assert [advice.devices_text(names) for names in (("cpu",), ("cpu",) * 4, ("cuda:0", "cuda:1"))] == [
        "cpu", "cpu*4", "cuda:0, cuda:1",
    ]  # fmt: skip


def test_calibration_too_small_for_the_experts(full: Path) -> None:
    def calibrated(rows: int) -> Recipe:
        return replace(RECIPE, calibration=replace(RECIPE.calibration, sources=(Source(builtin="general", rows=rows),)))

    # 1,024 tokens per expert, half of hidden_size, are rows * 1,024 * 8 / 256
    assert not warned(make_plan(full, calibrated(32)), "small calibration")
    (warning,) = warned(make_plan(full, calibrated(31)), "small calibration")
    assert "992 tokens per expert" in warning and "1,024" in warning


def test_mtp_and_sglang(full: Path, tmp_path: Path) -> None:
    trap = "SGLang drops the draft head's experts"
    for storage, trapped in (("gptq", True), ("gptq_v2", True), ("compressed-tensors", False)):
        warnings = " ".join(make_plan(full, grouped(128, storage)).warnings)
        assert (trap in warnings) is trapped
    plan = make_plan(checkpoints.tiny(tmp_path, mtp=None), grouped(128, "gptq"))
    assert trap not in " ".join(plan.warnings)
    assert warned(plan, "no MTP tensors")


def test_fine_tunes_that_lost_their_mtp(tmp_path: Path) -> None:
    checkpoints.tiny(tmp_path)

    def lose(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    checkpoints.edit(tmp_path, lose)
    plan = make_plan(tmp_path, RECIPE)
    assert warned(plan, "no MTP tensors") and claimed_once(plan)


def test_hidden_size_that_marlin_does_not_take(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.tiny(tmp_path, hidden=192, width=64), grouped(64))
    assert warned(plan, "hidden_size = 192")


# --- memory ---------------------------------------------------------------------------------------


def test_everything_at_once_where_it_fits(full: Path) -> None:
    found = make_plan(full, RECIPE, devices=("cuda",), memory_bytes=100 * GB).memory
    assert (found.chunk_experts, found.fits, found.budget_bytes) == (256, True, 100 * GB)
    assert [stage.stage for stage in found.stages] == [
        "read", "attend", "moments", "solve", "advance", "write", "measure",
    ]  # fmt: skip


def one_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 6)) -> None:
    """What is asked of a GPU before it is used: that it is there, and what it can."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")


def test_gpus_without_bf16_or_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one_gpu(monkeypatch, (7, 5))
    with pytest.raises(FourfoldError, match="Old GPU has no BF16"):
        expand_devices("cuda:0")
    one_gpu(monkeypatch)
    monkeypatch.setattr(cuda, "AVAILABLE", False)
    with pytest.raises(FourfoldError, match="triton is not installed"):
        expand_devices("cuda:0")


def test_chunks_shrink_with_the_budget(full: Path) -> None:
    chunks = []
    for budget in (100, 40, 20, 16, 14):
        found = make_plan(full, RECIPE, devices=("cuda:0",), memory_bytes=budget * GB).memory
        assert found.fits and found.device_peak_bytes <= budget * GB
        chunks.append(found.chunk_experts)
    assert chunks == sorted(chunks, reverse=True)
    assert len(set(chunks)) > 2 and chunks[-1] > 1


def test_chunks_on_a_cpu_stay_near_its_caches(full: Path, tmp_path: Path) -> None:
    """Full-width experts one at a time, small ones all at once."""
    assert make_plan(full, RECIPE, memory_bytes=100 * GB).memory.chunk_experts == 1
    small = checkpoints.tiny(tmp_path / "model", experts=16)
    assert make_plan(small, RECIPE, memory_bytes=100 * GB).memory.chunk_experts == 16
    assert make_plan(small, GUIDED, memory_bytes=100 * GB).memory.chunk_experts == 16


def test_memory_of_an_expert_is_that_by_hand(full: Path) -> None:
    """262,144 tokens to 8 of 256 experts: 8,192 for each, and half as many again for a busy one. K is 2048 and 512."""
    recipes = RECIPE, load_recipe("fast")
    best, fast = (make_plan(full, recipe, devices=("cuda",), memory_bytes=100 * GB) for recipe in recipes)
    square, gap = 2048**2 * 4, 2048 * 512 * 4
    pool = 2048 * 512 * (3 * 2 + 4) + 2 * 512**2 * 4  # 2,560 rows, 2,048 at one time; and sums of these and of all
    assert best.work.pool_rows == 5 * 512
    for plan, streams in ((best, 2), (fast, 1)):
        assert footprint.gap_bytes(plan.work) == (gap if plan is best else 0)
        assert footprint.activation_bytes(plan.work) == streams * 12_288 * 512 * 2 + pool
    stages = {stage.stage: stage.worker_bytes for stage in best.memory.stages}
    down = 512**2 * 4 + 2 * 12_288 * 512 * 2 + pool + gap
    assert down > square, "the dearer site of the moments"
    solve = best.memory.chunk_experts * (footprint.chunk_bytes(best.work) - down)
    assert stages["solve"] - stages["moments"] == solve - footprint.gather_bytes(best.work)


def test_chunks_are_even_and_as_few_as_fit(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[Workload] = []

    def spy(work: Workload, *rest: Any) -> MemoryPlan:
        works.append(work)
        return memory.plan_memory(work, *rest)

    monkeypatch.setattr(plan_module, "plan_memory", spy)
    make_plan(full, RECIPE)
    (work,) = works
    assert footprint.chunk_bytes(work) == (4 * 2048**2 + 6 * 1024 * 2048) * 4
    for budget in range(15, 38):
        found = memory.plan_memory(work, ["cuda"], budget * GB)
        chunks = -(-256 // found.chunk_experts)
        assert found.chunk_experts == -(-256 // chunks)
        solve = next(stage for stage in found.stages if stage.stage == "solve").device_bytes
        one_chunk_less = -(-256 // (chunks - 1))
        more = (one_chunk_less - found.chunk_experts) * footprint.chunk_bytes(work) + footprint.gather_bytes(work)
        assert solve + more > budget * GB


def test_a_budget_that_is_too_small(full: Path) -> None:
    plan = make_plan(full, RECIPE, memory_bytes=2 * GB)
    assert (plan.memory.chunk_experts, plan.memory.row_batch, plan.memory.fits) == (1, 1, False)
    assert plan.memory.token_batch > 0
    assert warned(plan, "memory: ")
    assert not warned(make_plan(full, RECIPE, memory_bytes=100 * GB), "memory: ")


def test_on_the_cpu_the_device_is_the_host(full: Path) -> None:
    cpu = make_plan(full, RECIPE, memory_bytes=20 * GB).memory
    gpu = make_plan(full, RECIPE, memory_bytes=20 * GB, devices=("cuda",)).memory
    assert all(stage.host_bytes == stage.device_bytes for stage in cpu.stages)
    assert gpu.chunk_experts > cpu.chunk_experts
    assert gpu.host_peak_bytes < cpu.host_peak_bytes


def test_four_small_gpus_keep_to_their_budgets(full: Path) -> None:
    """Beside them, in pinned memory: rows, layers, results twice, sums; inputs that do not stay on a device."""
    work = make_plan(full, RECIPE).work
    devices = [f"cuda:{number}" for number in range(4)]
    found = memory.plan_memory(work, devices, 10 * 2**30, 17 * 2**29)
    assert (found.inputs, found.problems) == ("file", ())
    held = memory.plan_memory(work, devices, 10 * 2**30)
    whole, on_device = 2**30, held.stages[1].shared_bytes
    packed = (pinned.packed_bytes(work, plan.chunk_experts) for plan in (held, found))
    # BF16 inputs of 256 x 1024 tokens, one stream on its way; and results, as chunks are larger.
    rows = footprint.spilled_bytes(work) - memory.inputs_bytes(work)
    assert on_device - found.stages[1].shared_bytes == whole + rows + next(packed) - next(packed)
    assert memory.plan_memory(work, devices, 3 * 2**30).inputs == "host"
    assert pinned.inputs_bytes(work, "host") == 3 * whole  # of both streams, and the gap between them
    ranks = memory.plan_memory(work, devices, 10 * 2**30, exchange_bytes=2**31)  # which is not there for experts
    assert ranks.chunk_experts < held.chunk_experts and ranks.fits
    assert [stage.worker_bytes for stage in ranks.stages][5] == held.stages[5].worker_bytes + 2**31  # while it writes
    three = memory.plan_memory(work, devices[:3], 10 * 2**30).stages[1].shared_bytes
    assert three - on_device > 2 * (3 * 2**29 - whole)  # a third of a stream's rows takes half a GiB


@pytest.mark.parametrize("workers", [1, 4, 8, 64])
def test_sums_on_their_way_stay_small(full: Path, workers: int) -> None:
    work = make_plan(full, RECIPE).work
    tokens = memory.plan_memory(work, [f"cuda:{number}" for number in range(workers)], 20 * GB).token_batch
    assert tokens >= 4096
    assert tokens == 4096 or pinned.sums_bytes(work, tokens, workers) <= 600 * 10**6
    each = 4096 * 2048 * 4  # fp32, two of each worker and their sum; a worker alone gives BF16, which is the sum
    assert pinned.sums_bytes(work, 4096, workers) == ((2 * workers + 1) * each if workers > 1 else each)


def test_one_stream_takes_less(full: Path) -> None:
    recipes = [load_recipe(name) for name in ("best", "fast")]
    both, one = (make_plan(full, recipe, devices=("cuda",), memory_bytes=14 * GB).memory for recipe in recipes)
    assert one.chunk_experts > both.chunk_experts
    both, one = (make_plan(full, recipe, memory_bytes=20 * GB).memory for recipe in recipes)
    attend = [next(stage.host_bytes for stage in plan.stages if stage.stage == "attend") for plan in (both, one)]
    tokens = 256 * 1024
    kept = 3 * (2048 * 2) + 8 + 8 * (8 + 2) + 8 * (8 + 8 + 2)  # hidden, MoE input and gap; id, routing, pairs
    assert attend[0] - attend[1] == tokens * kept


# --- disk -----------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoints.tiny(tmp_path / "model")
    asked: list[Path] = []
    free = 10**12

    def usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(0, 0, free)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert make_plan(model, RECIPE).disk.free_bytes is None and not asked
    roomy = make_plan(model, RECIPE, out=tmp_path / "not" / "there")
    assert asked == [tmp_path]
    assert roomy.disk.enough and not warned(roomy, "disk")
    roomy.require_disk()
    free = roomy.disk.needed_bytes - 1
    tight = make_plan(model, RECIPE, out=tmp_path / "out")
    assert warned(tight, "disk: ") and "Make room" in warned(tight, "disk: ")[0]
    with pytest.raises(FourfoldError, match="Make room"):
        tight.require_disk()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / tight.layers[0].shard).write_bytes(bytes(1000))
    resumed = make_plan(model, RECIPE, out=tmp_path / "out")
    assert resumed.disk.present_bytes == 1000 and resumed.disk.enough


# --- text ------------------------------------------------------------------------------------------


def test_a_plan_knows_texts_that_are_missing_or_test_sets(tmp_path: Path) -> None:
    model = checkpoints.tiny(tmp_path)
    for source, message in (
        (Source(rows=1, path=str(tmp_path / "absent.txt")), "absent.txt does not exist"),
        (Source(rows=1, dataset="some/data", split="test"), "is a test set"),
    ):
        calibration = replace(RECIPE.calibration, sources=(source,))
        with pytest.raises(FourfoldError, match=message):
            make_plan(model, replace(RECIPE, calibration=calibration))


# --- guidance --------------------------------------------------------------------------------------


def test_a_sweep_is_planned(full: Path) -> None:
    """65,536 tokens: 10.7 GB of hidden states and 0.7 GB of curvatures; layers and ends are read twice more."""
    plan, best = make_plan(full, GUIDED), make_plan(full, RECIPE)
    assert plan.time.seconds > best.time.seconds
    assert plan.work.read_bytes - best.work.read_bytes == pytest.approx(2 * 67e9, rel=0.1)
    assert plan.disk.swept_bytes == 65_536 * 2048 * 2 * 41
    assert plan.disk.curvature_bytes == 40 * 2048**2 * 4
    assert plan.disk.needed_bytes == best.disk.needed_bytes + plan.disk.curvature_bytes
    assert (best.disk.swept_bytes, best.disk.curvature_bytes) == (0, 0)


def test_margins_take_more_of_everything(full: Path) -> None:
    """Two fields, the pilot's rows before and behind a layer; twice the time of a sweep, and the same shards."""
    plan, plain, best = (make_plan(full, recipe) for recipe in (WITH_ROUTING, GUIDED, RECIPE))
    assert plan.disk.swept_bytes == 65_536 * 2048 * 2 * 45
    assert plan.disk.output_bytes == plain.disk.output_bytes
    swept = plain.time.forward_seconds - best.time.forward_seconds
    assert 1.8 * swept < plan.time.forward_seconds - best.time.forward_seconds < 2.1 * swept
    assert make_plan(full, load_recipe("best", ["guidance.routing=true"])).work == best.work
    for workers in (("cpu",), ("cuda:0", "cuda:1")):
        sweeps = [
            make_plan(full, recipe, devices=workers, memory_bytes=20 * GB).memory.stages[0]
            for recipe in (WITH_ROUTING, GUIDED)
        ]
        assert sweeps[0].shared_bytes - sweeps[1].shared_bytes == 4 * 65_536 * (2048 * 2 + 8)
        assert sweeps[0].worker_bytes > sweeps[1].worker_bytes + 2048**2 * 4


def test_a_sweep_larger_than_the_release_decides_the_disk(tmp_path: Path) -> None:
    model, out = checkpoints.tiny(tmp_path / "model"), tmp_path / "out"
    plan = make_plan(model, GUIDED, out=out)
    assert plan.disk.needed_bytes == plan.disk.swept_bytes + plan.disk.curvature_bytes > plan.disk.output_bytes
    (out / ".fourfold/guidance").mkdir(parents=True)
    (out / ".fourfold/guidance/input-00001.safetensors").write_bytes(bytes(1000))
    assert make_plan(model, GUIDED, out=out).disk.swept_bytes == plan.disk.swept_bytes - 1000
    (out / plan.layers[0].shard).write_bytes(bytes(1000))
    assert make_plan(model, GUIDED, out=out).disk.swept_bytes == 0


def test_memory_of_a_guided_run(full: Path) -> None:
    for workers in (("cpu",), ("cuda:0", "cuda:1")):
        plans = [make_plan(full, recipe, devices=workers, memory_bytes=20 * GB) for recipe in (RECIPE, GUIDED)]
        best, guided = (plan.memory for plan in plans)
        assert guided.fits and [stage.stage for stage in guided.stages] == ["sweep", *(s.stage for s in best.stages)]
        assert guided.chunk_experts <= best.chunk_experts
    work = plans[1].work
    gate_up, down = footprint.row_metric_bytes(work)
    assert gate_up > 5 * 1024**2 * 4 + down and footprint.row_metric_bytes(plans[0].work) == (0, 0)
    assert footprint.curvature_bytes(work) == 5 * 2048**2 * 4 and footprint.curvature_bytes(plans[0].work) == 0


@pytest.mark.parametrize(
    ("tokens", "damping"), [(65_536, None), (65_535, "0.2"), (16_384, "0.2"), (16_383, "0.3"), (1, "0.3")]
)
def test_few_gradients_are_damped_more_and_it_is_said(full: Path, tokens: int, damping: str | None) -> None:
    """Of 2048 dimensions; tokens are those of whole rows of 1024."""
    plan = make_plan(full, load_recipe("guided", [f"guidance.tokens={tokens}"]))
    assert plan.work.guidance_tokens == max(tokens // 1024, 1) * 1024
    said = warned(plan, "few gradients: ")
    assert bool(said) == (damping is not None)
    if damping:
        assert f"damped by {damping} rather than 0.05" in said[0]
    chosen = load_recipe("guided", [f"guidance.tokens={tokens}", "guidance.damp=0.1"])
    assert not warned(make_plan(full, chosen), "few gradients: ")


def test_there_are_no_more_guidance_rows_than_calibration_rows(full: Path) -> None:
    assert make_plan(full, load_recipe("guided", ["guidance.tokens=10000000"])).work.guidance_tokens == 256 * 1024


def test_another_activation_is_guided_at_down_alone(tmp_path: Path) -> None:
    model = checkpoints.tiny(tmp_path, family="qwen3_moe")
    checkpoints.edit_json(model / "config.json", lambda config: config.update(hidden_act="gelu"))
    with pytest.raises(FourfoldError, match=r"do not compute silu.*; take guidance.sites = 'down'"):
        make_plan(model, GUIDED)
    make_plan(model, load_recipe("guided", ["guidance.sites=down"]))


# --- as data --------------------------------------------------------------------------------------


def test_json_says_the_same(tmp_path: Path) -> None:
    plan = make_plan(checkpoints.tiny(tmp_path), RECIPE, memory_bytes=GB, out=tmp_path / "out")
    data = json.loads(json.dumps(plan.to_json()))
    assert data["projections"] == plan.projections
    assert data["warnings"] == list(plan.warnings)
    assert data["shards"] == {part.shard: part.bytes_after for part in plan.parts}
    assert [row["group"] for row in data["groups"]] == [row.group for row in plan.groups()]
    assert data["memory"]["chunk_experts"] == plan.memory.chunk_experts
    assert data["memory"]["device_peak_bytes"] == max(stage["device_bytes"] for stage in data["memory"]["stages"])
    assert data["disk"]["enough"] is plan.disk.enough
    assert data["time"]["seconds"] == plan.time.seconds
    assert [(entry["name"], entry["action"]) for entry in data["tensors"]] == [
        (claim.header.name, claim.action.value) for claim in plan.claims
    ]
    assert set(data["tensors"][0]) == {
        "name", "dtype", "shape", "bytes_before", "action", "reason", "group", "layer", "tensors_after",
        "bytes_after", "shard",
    }  # fmt: skip


def test_json_of_the_full_shape_names_each_tensor(full: Path) -> None:
    plan = make_plan(full, RECIPE)
    assert {entry["name"] for entry in plan.to_json()["tensors"]} == set(plan.source.headers)
