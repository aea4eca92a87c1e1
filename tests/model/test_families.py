"""Layer by layer from the files against transformers' whole model, for every family whose layers can be derived."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise
from families import FAMILIES, settings, tiny
from fourfold.datatypes import FourfoldError, TensorHeader
from fourfold.model import calls, internals, loader, rehearsal
from fourfold.model.arithmetic import Arithmetic
from fourfold.model.blueprint import Blueprint
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.family import DOWN, GATE, UP
from fourfold.model.tensors import TensorIndex

CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROWS, TOKENS = 3, 24  # tokens: more than an indexer's or a window's size

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint on disk."""

    index: TensorIndex
    raw: Mapping[str, Any]

    @property
    def blueprint(self) -> Blueprint:
        return Blueprint.of(self.raw, self.index.headers, self.index.folder / "config.json")

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        return self.index.read(name, out=out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Tiny]]:
    """The tiny checkpoint of a family, made once."""
    made: dict[str, Tiny] = {}

    def make(family: str) -> Tiny:
        if family not in made:
            folder = tiny(tmp_path_factory.mktemp(family), family)
            raw = json.loads((folder / "config.json").read_text())
            made[family] = Tiny(TensorIndex.open(folder), raw)
        return made[family]

    yield make


def tokens(rows: int = ROWS) -> Tensor:
    return torch.randint(3, 480, (rows, TOKENS), generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Pass:
    """One way through the layers: the state after each, the tail of each routed one, the logits."""

    states: list[Tensor]
    tails: list[float | None]
    calls: calls.Calls
    logits: Tensor


@torch.no_grad()
def layer_by_layer(checkpoint: Tiny, blueprint: Blueprint, tail: bool = False, dtype: torch.dtype = BF16) -> Pass:
    """From the files, one layer in memory at a time. tail: measure it as well."""
    layerwise.load_surroundings_(blueprint, checkpoint.read, CPU, dtype)
    recorded = calls.record(blueprint, tokens())
    state, carried = recorded.state, ()
    states, tails = [], []
    for index in range(blueprint.layers):
        loaded = loader.load(blueprint, checkpoint.read, blueprint.prefix(index), CPU, dtype)
        layer = loader.build_layer(blueprint, index, loaded, CPU)
        stacks = loader.load_stacks(blueprint, checkpoint.read, index)
        before, took = state, carried
        state, carried = calls.pass_layer(layer, recorded, index, before, took)
        if layer.arithmetic is not None and layer.tap is not None and stacks is not None:
            output = layerwise.run_experts(layer.arithmetic, stacks.to(CPU, dtype), *layer.tap.take())
            if tail:
                tails.append(calls.measure_tail(layer, recorded, index, before, took))
            with layer.tap.answering(lambda *_, output=output: output.clone()):
                state, carried = calls.pass_layer(layer, recorded, index, before, took)
        states.append(state)
    return Pass(states, tails, recorded, layerwise.finish(blueprint, recorded, state))


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_whole_model(family: str, checkpoint: Callable[[str], Tiny]) -> None:
    case, source = FAMILIES[family], checkpoint(family)
    blueprint = source.blueprint
    layerwise.require_whole(blueprint)
    claimed = [name for one in blueprint.sources.values() for name in one.all_names]
    assert sorted([*claimed, *blueprint.drafts]) == sorted(source.index.headers)  # each tensor once
    expected = rehearsal.run_whole(blueprint, tokens())
    ours = layer_by_layer(source, blueprint, tail=True)
    calls.require_independent(blueprint, tokens())
    assert ours.calls.carry == case.carry
    assert ours.tails and set(ours.tails) == {case.tail}
    for state, theirs in zip([*ours.states, ours.logits], [*expected.states, expected.logits], strict=True):
        if case.exact:
            assert torch.equal(state, theirs)
        else:  # the reference rounds each expert's output on its way into the sum
            assert_close(state, theirs)


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4", "glm5_next"])
def test_fp32_is_the_whole_model_in_fp32(family: str, checkpoint: Callable[[str], Tiny]) -> None:
    source = checkpoint(family)
    expected = rehearsal.run_whole(source.blueprint, tokens(), torch.float32)
    ours = layer_by_layer(source, source.blueprint, dtype=torch.float32)
    for state, theirs in zip([*ours.states, ours.logits], [*expected.states, expected.logits], strict=True):
        assert theirs.dtype == torch.float32 and torch.equal(state, theirs)


def assert_close(state: Tensor, expected: Tensor) -> None:
    """Equal to two units in the last place of BF16, at the size of the largest value."""
    unit = 2.0**-8 * float(expected.abs().max())
    assert float((state.float() - expected.float()).abs().max()) <= 2 * unit


ALONE = ("gpt_oss",)  # that `quantize` refuses: biases


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ALONE])
def test_experts_in_one_batch_are_the_whole_models(family: str, checkpoint: Callable[[str], Tiny]) -> None:
    """What `quantize` runs, one layer after the other, each from the whole model's own state before it: BF16 noise.

    The experts' output is added last, where transformers adds it to that of shared experts first.
    """
    weights = Checkpoint.open(checkpoint(family).index.folder)
    expected = rehearsal.run_whole(weights.blueprint, tokens())
    for off, place in rehearsal.differences(weights, expected, tokens()):
        assert off < rehearsal.NOISE, place


# --- what a blueprint says --------------------------------------------------------------------------------------------


def test_experts_are_placed_by_the_converter(checkpoint: Callable[[str], Tiny]) -> None:
    mixtral, inkling, step = (
        checkpoint(name).blueprint.experts[-1] for name in ("mixtral", "inkling_mm_model", "step3p7")
    )
    assert mixtral is not None and inkling is not None and step is not None
    prefix = "model.layers.3.block_sparse_moe.experts.7"
    assert mixtral.separate[7] == {GATE: f"{prefix}.w1.weight", UP: f"{prefix}.w3.weight", DOWN: f"{prefix}.w2.weight"}
    assert (mixtral.shape(GATE), mixtral.shape(DOWN), mixtral.stacked) == ((384, 256), (256, 384), {})
    stack = "model.llm.layers.3.mlp.experts"
    assert inkling.stacked == {GATE: f"{stack}.w13_weight", UP: f"{stack}.w13_weight", DOWN: f"{stack}.w2_weight"}
    assert {part: name.rpartition("moe.")[2] for part, name in step.stacked.items()} == {
        part: f"{part}.weight" for part in (GATE, UP, DOWN)
    }


def test_experts_without_gate_have_two_projections(checkpoint: Callable[[str], Tiny]) -> None:
    experts = checkpoint("nemotron_h+latent").blueprint.experts
    assert [one is not None for one in experts] == [False, True, False, True, False, True]
    one = experts[1]
    assert one is not None and (one.module, one.projections) == ("mixer.experts", (UP, DOWN))
    assert (one.hidden, one.output) == (128, 128)  # not the 256 of the stream


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_experts_are_read_into_their_place(dtype: str, checkpoint: Callable[[str], Tiny]) -> None:
    """Without a copy where the dtype on disk is the model's."""
    source = checkpoint("qwen3_moe")
    names = layerwise.disk_names(source.blueprint, "model.layers.1.mlp.experts.")
    other = {name: dataclasses.replace(source.index.headers[name], dtype=dtype) for name in names}
    blueprint = dataclasses.replace(source.blueprint, headers={**source.index.headers, **other})
    places = []

    def read(name: str, out: Tensor | None) -> Tensor:
        places.append(out)
        return source.read(name, out) if dtype == "BF16" else source.read(name).float()

    stacks = loader.load_stacks(blueprint, read, 1)
    expected = loader.load_stacks(source.blueprint, source.read, 1)
    assert stacks is not None and expected is not None
    assert torch.equal(stacks.gate_up_ENK, expected.gate_up_ENK) and torch.equal(stacks.down_ENK, expected.down_ENK)
    assert len(places) == 24 and all((out is not None) == (dtype == "BF16") for out in places)


def test_the_class_is_found_without_architectures(checkpoint: Callable[[str], Tiny]) -> None:
    source = checkpoint("qwen3_5_moe")
    raw = {key: value for key, value in source.raw.items() if key != "architectures"}
    found = Blueprint.of(raw, source.index.headers, source.index.folder / "config.json")
    assert type(found.model) is type(source.blueprint.model)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(
            (family, "model.layers.4.eh_proj.weight")
            for family in ("glm4_moe", "deepseek_v3", "hy_v3", "bailing_hybrid")
        ),
        ("glm5_next", "model.language_model.layers.6.eh_proj.weight"),
        ("step3p7", "model.layers.4.eh_proj.weight"),
        *((family, "mtp.fc.weight") for family in ("qwen3_5_moe", "qwen3_next", "nemotron_h", "exaone_moe")),
        ("deepseek_v4", "mtp.0.e_proj.weight"),
        ("mimo_v2_flash", "model.mtp.layers.0.eh_proj.weight"),
        ("hy_v4", "model.mtp_layers.0.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.up_proj.weight"),
    ],
)
def test_drafts_are_told_from_unknown_tensors(family: str, name: str) -> None:
    """By a layer past the last with more than a layer has, or by what the class leaves unread."""
    strange = "model.strange.99.weight"
    headers = {each: header(each, (8, 8)) for each in (name, strange)}
    blueprint = Blueprint.of(settings(family)[1], headers, Path("config.json"))
    assert (blueprint.drafts, blueprint.unknown) == ((name,), (strange,))


def test_a_layer_like_the_others_is_no_draft() -> None:
    """One too many is a sign of another config.json; a draft head has a projection of its own beside it."""
    name, own = "model.layers.4.mlp.experts.0.gate_proj.weight", "model.layers.4.eh_proj.weight"
    for names, drafts, unknown in (((name,), (), (name,)), ((name, own), (own, name), ())):
        headers = {each: header(each, (8, 8)) for each in names}
        blueprint = Blueprint.of(settings("glm4_moe")[1], headers, Path("config.json"))
        assert (blueprint.drafts, blueprint.unknown) == (drafts, unknown)


def test_calls_with_token_ids_are_found(checkpoint: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ids are handed on as they are; where they are not, calls vary with the text."""
    for family, ids in (("deepseek_v4", {"input_ids"}), ("qwen4_exp", {"ple_input_ids"}), ("qwen3_moe", set())):
        source = checkpoint(family)
        blueprint = source.blueprint
        layerwise.load_surroundings_(blueprint, source.read, CPU)
        assert calls.record(blueprint, tokens(rows=1)).ids == ids and not calls.varies(blueprint, tokens(rows=1)), (
            family
        )
        with monkeypatch.context() as patch:
            patch.setattr(calls._Stubs, "given", lambda stubs, token_RT: frozenset())
            assert calls.varies(blueprint, tokens(rows=1)) is bool(ids), family


def test_one_row_gives_the_same_calls(checkpoint: Callable[[str], Tiny]) -> None:
    """A state of one row unpacks neither as a pair nor as three values."""
    for family in ("qwen3_moe", "glm_moe_dsa", "zaya"):
        source = checkpoint(family)
        blueprint = source.blueprint
        layerwise.load_surroundings_(blueprint, source.read, CPU)
        one, three = calls.record(blueprint, tokens(rows=1)), calls.record(blueprint, tokens())
        assert (one.answers, one.carry) == (three.answers, three.carry)


def test_a_large_checkpoint_costs_seconds() -> None:
    """The names of DeepSeek-V3: 45,000."""
    raw = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    path = Path("config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in Blueprint.of(raw, {}, path).model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            shape = (value.shape[1] // 2, value.shape[2])
            names = [f"{expert}.{part}.weight" for expert in range(len(value)) for part in (GATE, UP)]
            shapes |= {name.replace("gate_up_proj", each): shape for each in names}
        elif name.endswith("experts.down_proj"):
            names = [f"{expert}.{DOWN}.weight" for expert in range(len(value))]
            shapes |= {name.replace(DOWN, each): tuple(value.shape[1:]) for each in names}
        else:
            shapes[name] = tuple(value.shape)
    blueprint = Blueprint.of(raw, {name: header(name, shape) for name, shape in shapes.items()}, path)
    layerwise.require_whole(blueprint)
    assert len(shapes) > 45_000 and len(layerwise.disk_names(blueprint, "model.layers.60.")) == 782
    last = blueprint.experts[-1]
    assert last is not None and last.separate[255][UP] == "model.layers.60.mlp.experts.255.up_proj.weight"


# --- what is refused --------------------------------------------------------------------------------------------------


def header(name: str, shape: tuple[int, ...]) -> TensorHeader:
    size = 2 * torch.Size(shape).numel()
    return TensorHeader(name=name, dtype="BF16", shape=shape, shard="model.safetensors", start_byte=0, end_byte=size)


def changed(source: Tiny, more: Mapping[str, tuple[int, ...]], without: str = "") -> Blueprint:
    """The blueprint of a checkpoint with other headers."""
    headers = {name: value for name, value in source.index.headers.items() if name != without}
    headers |= {name: header(name, shape) for name, shape in more.items()}
    return Blueprint.of(source.raw, headers, source.index.folder / "config.json")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("ernie4_5_vl_moe", r"layer 1 has 2 stacks of experts \(mlp.text_moe.experts, mlp.vision_moe.experts\)"),
        ("jetmoe", "no layer of JetMoeForCausalLM has routed experts"),
        ("llama4", r"layer 0: feed_forward.experts \(Llama4TextExperts\): experts are called with \(hidden_states\)"),
        ("longcat_flash", r"mlp.experts has 12 experts in gate_up_proj and 8 in down_proj.*identity"),
    ],
)
def test_families_with_code_of_their_own_are_refused(family: str, expected: str) -> None:
    with pytest.raises(FourfoldError, match=expected):
        Blueprint.of(settings(family)[1], {}, Path("config.json"))


def test_state_that_skips_layers_is_refused(checkpoint: Callable[[str], Tiny]) -> None:
    source = checkpoint("inkling2")
    blueprint = source.blueprint
    layerwise.load_surroundings_(blueprint, source.read, CPU)
    with pytest.raises(FourfoldError, match="is given earlier layers' states as argument 1"):
        calls.require_independent(blueprint, tokens())


@pytest.mark.parametrize(
    ("more", "without", "expected"),
    [
        ({"model.layers.0.mlp.gate.strange": (8,)}, "", "model.layers.0.mlp.gate.strange is not known to transformers"),
        ({}, "model.norm.weight", "model.norm.weight is missing"),
        ({"model.norm.weight": (8,)}, "", r"model.norm.weight is \[8\], expected \[256\]"),
        (
            {"model.layers.1.mlp.experts.3.up_proj.weight": (128, 64)},
            "",
            r"model.layers.1.mlp.experts.3.up_proj.weight is \[128, 64\], expected \[128, 256\]",
        ),
        (
            {},
            "model.layers.2.mlp.experts.5.down_proj.weight",
            r"experts\.5\.down_proj\.weight is missing; expected one tensor for each of 8 experts and projection",
        ),
        ({"model.layers.4.input_layernorm.bias": (8,)}, "model.layers.3.mlp.gate.weight", "mlp.gate.weight is missing"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    more: Mapping[str, tuple[int, ...]], without: str, expected: str, checkpoint: Callable[[str], Tiny]
) -> None:
    with pytest.raises(FourfoldError, match=expected):
        layerwise.require_whole(changed(checkpoint("qwen3_moe"), more, without))


EXPERTS = "model.layers.1.mlp.experts"


def without(headers: dict[str, TensorHeader], *names: str) -> None:
    for name in list(headers):
        if any(part in name for part in names):
            del headers[name]


def stack_alone(headers: dict[str, TensorHeader]) -> None:
    """Experts of layer 1 as stacks, one of the two missing."""
    without(headers, EXPERTS)
    headers[f"{EXPERTS}.down_proj"] = header(f"{EXPERTS}.down_proj", (8, 256, 128))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda headers: without(headers, f"{EXPERTS}.2.gate_proj", f"{EXPERTS}.2.up_proj"),
            rf"{EXPERTS}\.2\.gate_proj\.weight is missing; {EXPERTS}\.2\.up_proj\.weight is missing; expected one",
        ),
        (
            lambda headers: without(headers, *(f"{EXPERTS}.{expert}.up_proj" for expert in range(8))),
            rf"{EXPERTS}\.0\.up_proj\.weight is missing; .* and 3 more; expected one tensor for each of 8 experts",
        ),
        (lambda headers: without(headers, EXPERTS), rf"{EXPERTS}\.\d\.\w+\.weight is missing.* and 19 more; expected"),
        (stack_alone, rf": {EXPERTS}\.gate_up_proj is missing; expected the tensors of"),
    ],
    ids=["one expert", "one projection", "all experts", "one stack"],
)
def test_missing_experts_are_named(
    change: Callable[[dict[str, TensorHeader]], object], expected: str, checkpoint: Callable[[str], Tiny]
) -> None:
    source = checkpoint("qwen3_moe")
    headers = dict(source.index.headers)
    change(headers)
    with pytest.raises(FourfoldError, match=expected):
        layerwise.require_whole(Blueprint.of(source.raw, headers, Path("config.json")))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"num_local_experts": 6},
            r"layers\.0\.mlp\.experts\.6\.gate_proj\.weight is one too many; .*each of 6 experts",
        ),
        ({"num_local_experts": 9}, r"layers\.0\.mlp\.experts\.8\.gate_proj\.weight is missing; .*each of 9 experts"),
        ({"num_hidden_layers": 3}, r"model\.layers\.3\.input_layernorm\.weight is not known to transformers"),
        ({"num_hidden_layers": 5}, "num_hidden_layers: got 5, expected .* no tensor is of a layer past 3"),
    ],
)
def test_a_config_of_another_size_is_refused(
    settings: Mapping[str, int], expected: str, checkpoint: Callable[[str], Tiny]
) -> None:
    source = checkpoint("qwen3_moe")
    with pytest.raises(FourfoldError, match=expected):
        layerwise.require_whole(Blueprint.of({**source.raw, **settings}, source.index.headers, Path("config.json")))


def test_too_many_layers_are_refused_before_one_is_built(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Tiny]
) -> None:
    source = checkpoint("qwen3_5_moe")
    raw = json.loads(json.dumps(source.raw))
    raw["text_config"] |= {"num_hidden_layers": 1000, "layer_types": ["full_attention"] * 1000}
    monkeypatch.setattr(internals, "build_model", None)
    with pytest.raises(FourfoldError, match="num_hidden_layers: got 1,000"):
        Blueprint.of(raw, source.index.headers, Path("config.json"))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"model_type": "no_such_moe"}, "model_type: got 'no_such_moe', expected one that transformers"),
        ({"model_type": None}, "model_type: got None"),
        ({"model_type": "clip"}, "architectures: got None, expected a class with an output head"),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeModel"]},
            "architectures: got .*, expected a class with",
        ),
        ({"model_type": "clip", "architectures": ["pipeline"]}, "architectures: got .*, expected a class with"),
        ({"model_type": "qwen3_moe", "hidden_size": "wide"}, "does not accept it as qwen3_moe"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(raw: Mapping[str, Any], expected: str) -> None:
    with pytest.raises(FourfoldError, match=expected):
        Blueprint.of(raw, {}, Path("config.json"))


# --- mistakes that the comparison must see ----------------------------------------------------------------------------


def swap_halves(gate_up_SN: Tensor) -> Tensor:
    return torch.cat(gate_up_SN.chunk(2, dim=-1)[::-1], dim=-1)


def test_a_swapped_gate_and_up_is_seen(monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Tiny]) -> None:
    hidden = Arithmetic.hidden
    monkeypatch.setattr(Arithmetic, "hidden", lambda self, rows: hidden(self, swap_halves(rows)))
    assert differs(checkpoint("qwen3_moe"))


def test_swapped_names_of_gate_and_up_are_seen(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Tiny]
) -> None:
    monkeypatch.setattr("fourfold.model.experts.Experts.projections", (UP, GATE, DOWN))
    assert differs(checkpoint("mixtral"))


def test_an_interleaved_stack_read_as_concatenated_is_seen(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Tiny]
) -> None:
    def canonical(self: Arithmetic, name: str, stack: Tensor) -> Tensor:
        return stack if name.endswith("_bias") else stack.transpose(1, 2)

    monkeypatch.setattr(Arithmetic, "canonical", canonical)
    assert differs(checkpoint("gpt_oss"))


def test_a_router_bias_cast_to_bf16_is_seen(monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Tiny]) -> None:
    monkeypatch.setattr(internals.Mapper, "dtype", lambda self, name: torch.bfloat16)
    assert differs(checkpoint("lfm2_moe"))


def test_a_dropped_carry_is_seen(monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Tiny]) -> None:
    pass_layer, first = calls.pass_layer, []

    def stale(*given: Any) -> tuple[Tensor, calls.Carried]:
        state, carried = pass_layer(*given)
        first.append(carried)
        return state, first[0]

    monkeypatch.setattr(calls, "pass_layer", stale)
    assert differs(checkpoint("zaya"))


@torch.no_grad()
def differs(source: Tiny) -> bool:
    """Whether logits layer by layer are others than the whole model's."""
    blueprint = source.blueprint
    ours = layer_by_layer(source, blueprint).logits
    return not torch.equal(ours, rehearsal.run_whole(blueprint, tokens()).logits)


@torch.no_grad()
def test_a_constant_taken_as_one_is_seen(checkpoint: Callable[[str], Tiny]) -> None:
    source = checkpoint("cohere2_moe")
    blueprint = source.blueprint
    layerwise.load_surroundings_(blueprint, source.read, CPU)
    recorded = calls.record(blueprint, tokens())
    layer = loader.build_layer(blueprint, 0, loader.load(blueprint, source.read, blueprint.prefix(0), CPU), CPU)
    without, _ = calls.pass_layer(layer, recorded, 0, recorded.state)
    assert layer.tap is not None
    experts = torch.randn_like(layer.tap.take()[0])
    with layer.tap.answering(lambda *_: experts.clone()):
        expected, _ = calls.pass_layer(layer, recorded, 0, recorded.state)
    factor = calls.measure_tail(layer, recorded, 0, recorded.state)
    assert factor == FAMILIES["cohere2_moe"].tail
    assert_close(without + factor * experts.view_as(without), expected)
    with pytest.raises(AssertionError):
        assert_close(without + experts.view_as(without), expected)
