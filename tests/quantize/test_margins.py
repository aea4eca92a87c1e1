"""Router margins in the sweep: the field is the slope of the whole model's margins; it resumes; what it changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import silu

import checkpoints
import families
import releases
from fourfold.core import margins as core_margins
from fourfold.datatypes import Action, FourfoldError
from fourfold.distributed.team import alone
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.layer import DecoderLayer, build_layer
from fourfold.quantize import margins
from fourfold.quantize.fits import check_guidance
from fourfold.quantize.margins import RoutingTerm, pilot_places, push_back_both, random_signs
from fourfold.quantize.plan import make_plan
from fourfold.quantize.sweep_files import read_margin
from fourfold.recipe import Recipe, load_recipe
from fourfold.records.release import MarginRecord
from quantize.test_guide import ROWS, curvature, guided, kept, run_sweep, token_rows

CPU = torch.device("cpu")
LAYERS, DENSE, WIDTH = 4, 1, 128
ERROR = 0.05
STEP = 1e-3  # of the state, in a finite difference


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of full attention, the second one dense."""
    folder = tmp_path_factory.mktemp("margins") / "model"
    return checkpoints.tiny(folder, family="qwen3_moe", layers=LAYERS, dense_layers=[DENSE])


# ---- the field, against finite differences of transformers' model in float64


class Reference:
    """transformers' whole model in float64: router logits by layer, and what experts and layers are given."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.model = getattr(transformers, config["architectures"][0]).from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        )
        self.logits: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self.moved: tuple[int, Tensor] | None = None
        for number, layer in enumerate(self.model.eval().model.layers):
            layer.register_forward_pre_hook(lambda _, args, at=number: self._enter(at, args))
            if hasattr(layer.mlp, "gate"):
                layer.mlp.register_forward_hook(lambda block, args, _, at=number: self._route(at, block, args[0]))
        self.inputs: dict[int, Tensor] = {}

    def _enter(self, layer: int, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state, rest = args[0], args[1:]
        if self.moved is not None and self.moved[0] == layer:
            state = state + self.moved[1]
        self.states[layer] = state
        return state, *rest

    def _route(self, layer: int, block: Any, input_RTD: Tensor) -> None:
        self.inputs[layer] = input_RTD.flatten(0, 1)
        self.logits[layer] = self.inputs[layer] @ block.gate.weight.T

    @torch.no_grad()
    def run(self, token_RT: Tensor, moved: tuple[int, Tensor] | None = None) -> None:
        self.moved = moved
        self.model(input_ids=token_RT, use_cache=False)

    def expert(self, layer: int, expert: int, input_D: Tensor) -> Tensor:
        experts = self.model.model.layers[layer].mlp.experts
        gate_I, up_I = (experts.gate_up_proj[expert].detach() @ input_D).chunk(2)
        return experts.down_proj[expert].detach() @ (silu(gate_I) * up_I)


@dataclass
class Weighted:
    """Margins of a layer, each times its coefficient: a and b of each token near a tie."""

    tokens: list[int]
    last: list[int]
    following: list[int]
    coefficient: Tensor

    def total(self, logits_TE: Tensor) -> float:
        return float(self.coefficient @ (logits_TE[self.tokens, self.last] - logits_TE[self.tokens, self.following]))


def weighted(reference: Reference, layer: int, curvature_DD: Tensor, sign_T: Tensor, near: float) -> Weighted:
    """By the definition, a token at a time."""
    found = Weighted([], [], [], torch.zeros(0))
    coefficients = []
    for token, row in enumerate(reference.logits[layer]):
        falling = row.argsort(descending=True).tolist()
        last, following, margin = falling[1], falling[2], float(row[falling[1]] - row[falling[2]])
        if margin < near:
            share = float(row[falling[:2]].softmax(0)[1])
            inputs = reference.inputs[layer][token]
            change_D = share * (reference.expert(layer, following, inputs) - reference.expert(layer, last, inputs))
            cost = 0.5 * float(change_D @ curvature_DD.double() @ change_D)
            mu = cost / near / ((2 * torch.pi) ** 0.5 * ERROR)
            coefficients.append(float(sign_T[token]) * mu**0.5)
            found.tokens.append(token)
            found.last.append(last)
            found.following.append(following)
    found.coefficient = torch.tensor(coefficients, dtype=torch.float64)
    return found


def layers_of(folder: Path) -> tuple[list[DecoderLayer], Any]:
    plan = make_plan(folder, load_recipe("best"))
    layers = []
    for layer in plan.layers:
        names = [claim.header.name for claim in layer.claims if claim.action is Action.COPY]
        tensors = plan.source.read_layer(layer.index, names)
        layers.append(build_layer(plan.source, layer.index, tensors, CPU, torch.float32))
    return layers, plan


def test_the_field_is_the_slope_of_later_margins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each layer: d/du of all weighted margins from there on, choices fixed; nothing clipped."""
    monkeypatch.setattr(core_margins, "clip", lambda field_RTD: field_RTD)
    token_RT, reference = token_rows(), Reference(model)
    reference.run(token_RT)
    layers, _ = layers_of(model)
    states = [reference.states[layer].float() for layer in range(LAYERS)]
    generator = torch.Generator().manual_seed(3)
    field_RTD, parts = torch.zeros(states[0].shape), dict[int, Weighted]()
    for number in reversed(range(LAYERS)):
        term = None
        if number != DENSE:
            some_DD = torch.randn(WIDTH, WIDTH, generator=generator)
            curvature_DD, sign_RT = some_DD @ some_DD.T, random_signs(0, number, *token_RT.shape)
            chosen = reference.logits[number].sort(dim=1, descending=True).values
            near = float((chosen[:, 1] - chosen[:, 2]).quantile(0.5))
            parts[number] = weighted(reference, number, curvature_DD, sign_RT.flatten(), near)
            term = RoutingTerm("gate.weight", MarginRecord(number, near, ERROR), curvature_DD, sign_RT)
        rows = states[number], torch.zeros(states[0].shape), field_RTD
        _, field_RTD, _ = push_back_both(layers[number], term, rows, slice(0, ROWS))
        for _ in range(2):
            move_RTD = torch.randn(field_RTD.shape, generator=generator, dtype=torch.float64)
            move_RTD *= STEP * reference.states[number].norm() / move_RTD.norm()
            slope = difference(reference, token_RT, number, move_RTD, parts)
            found = float((field_RTD.double() * move_RTD).sum())
            size = float(field_RTD.norm() * move_RTD.norm()) / move_RTD.numel() ** 0.5
            assert abs(found - slope) < 0.01 * size, f"layer {number}"
        reference.run(token_RT)


def difference(
    reference: Reference, token_RT: Tensor, layer: int, move_RTD: Tensor, parts: dict[int, Weighted]
) -> float:
    totals = []
    for sign in (1, -1):
        reference.run(token_RT, (layer, sign * move_RTD))
        totals.append(sum(part.total(reference.logits[number]) for number, part in parts.items()))
    return (totals[0] - totals[1]) / 2


# ---- the sweep


def with_routing(*overrides: str) -> Recipe:
    return guided("guidance.routing=true", *overrides)


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept")
    run_sweep(model, out, with_routing())
    return out


def test_margins_add_to_curvatures_before_the_last(model: Path, swept: Path, tmp_path: Path) -> None:
    """The last layer's outputs reach no router. The field adds a positive semidefinite part to all others."""
    run_sweep(model, tmp_path, guided())
    assert kept(tmp_path).keys() == kept(swept).keys()
    for layer in (0, 2, 3):
        more_DD = (curvature(swept, layer) - curvature(tmp_path, layer)).double()
        if layer == LAYERS - 1:
            assert not more_DD.any()
            continue
        level = curvature(tmp_path, layer).diagonal().mean()
        assert torch.linalg.eigvalsh(more_DD).min() > -1e-5 * level
        assert more_DD.diagonal().sum() > 1e-3 * level


@pytest.mark.parametrize("last", [0, 1, 3, 4, 5, 7, 8])
def test_an_interrupted_sweep_resumes_with_both_fields(model: Path, swept: Path, tmp_path: Path, last: int) -> None:
    """Nine stages: four layers forward, the head, four layers back."""
    stopped: list[tuple[str, int]] = []
    resumed: list[tuple[str, int]] = []

    def stop(name: str, layer: int) -> None:
        if len(stopped) == last:
            raise KeyboardInterrupt
        stopped.append((name, layer))

    with pytest.raises(KeyboardInterrupt):
        run_sweep(model, tmp_path, with_routing(), stop)
    run_sweep(model, tmp_path, with_routing(), lambda name, layer: resumed.append((name, layer)))
    assert kept(tmp_path) == kept(swept)
    order = [*(("forward", layer) for layer in range(4)), *(("backward", layer) for layer in (-1, 3, 2, 1, 0))]
    assert resumed in (order[last:], order[max(last - 1, 0) :])


def test_workers_resume_each_with_its_rows_of_the_pilot(model: Path, tmp_path: Path) -> None:
    def stop(name: str, layer: int) -> None:
        if (name, layer) == ("forward", 2):
            raise KeyboardInterrupt

    run_sweep(model, tmp_path / "whole", with_routing(), workers=2)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(model, tmp_path / "parts", with_routing(), stop, workers=2)
    run_sweep(model, tmp_path / "parts", with_routing(), workers=2)
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")


def test_margins_that_cannot_be_read_are_measured_again(model: Path, swept: Path, tmp_path: Path) -> None:
    def stop(name: str, layer: int) -> None:
        if (name, layer) == ("backward", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(model, tmp_path, with_routing(), stop)
    (tmp_path / ".fourfold/guidance/margin-00000.json").write_text("{")
    run_sweep(model, tmp_path, with_routing())
    assert kept(tmp_path) == kept(swept)


def test_workers_agree(model: Path, swept: Path, tmp_path: Path) -> None:
    for workers in (2, 4):  # of three rows: two and one, then one worker without any
        run_sweep(model, tmp_path / str(workers), with_routing(), workers=workers)
        for layer in (0, 2, 3):
            one_DD, many_DD = curvature(swept, layer), curvature(tmp_path / str(workers), layer)
            assert (one_DD - many_DD).norm() < 1e-3 * one_DD.norm()


def test_another_seed_is_another_field(model: Path, swept: Path, tmp_path: Path) -> None:
    assert not torch.equal(random_signs(0, 1, 3, 40), random_signs(0, 2, 3, 40))
    assert abs(float(random_signs(0, 1, 100, 100).mean())) < 0.05
    run_sweep(model, tmp_path, with_routing("calibration.seed=1"))
    assert not torch.equal(curvature(swept, 0), curvature(tmp_path, 0))


# ---- the pilot


def stop_at_head(name: str, layer: int) -> None:
    if (name, layer) == ("backward", -1):
        raise KeyboardInterrupt


def margins_of(model: Path, out: Path) -> dict[int, MarginRecord | None]:
    with pytest.raises(KeyboardInterrupt):
        run_sweep(model, out, with_routing(), stop_at_head)
    return {layer: read_margin(out / ".fourfold/guidance", layer) for layer in range(LAYERS)}


def test_margins_are_those_of_the_model(model: Path, tmp_path: Path) -> None:
    found, reference = margins_of(model, tmp_path), Reference(model)
    reference.run(token_rows())
    assert found[DENSE] is None
    for layer, record in found.items():
        if record is not None:
            chosen = reference.logits[layer].sort(dim=1, descending=True).values
            assert record.near == pytest.approx(float((chosen[:, 1] - chosen[:, 2]).quantile(0.25)), rel=0.1)


def test_errors_of_margins_are_those_of_rounded_experts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first router sees none of them, the others do; without rounding there are none."""
    found = margins_of(model, tmp_path / "rounded")
    assert found[0] is not None and found[0].error == core_margins.LEAST_ERROR
    assert all(record is not None and 1e-4 < record.error < record.near for record in (found[2], found[3]))
    monkeypatch.setattr(margins, "round_experts_", lambda *_: None)
    found = margins_of(model, tmp_path / "exact")
    assert {record.error for record in found.values() if record is not None} == {core_margins.LEAST_ERROR}


def test_a_pilot_is_spread_over_all_workers_rows() -> None:
    places = pilot_places(alone(CPU), 64, 1024)
    assert places.tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert pilot_places(alone(CPU), 3, 1024).tolist() == [0, 1, 2]
    assert pilot_places(alone(CPU), 3, 10**6).tolist() == [0]


# ---- whole runs


def test_a_run_with_routing_changes_what_lies_before_a_router(
    source: Path, small: Callable[..., Recipe], tmp_path: Path
) -> None:
    for name, value in (("with", "true"), ("without", "false")):
        releases.run(source, tmp_path / name, small("guidance.tokens=512", f"guidance.routing={value}"))
    one, other = (releases.tensors(tmp_path / name) for name in ("with", "without"))
    assert one.keys() == other.keys()
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    layers = {int(re.findall(r"layers\.(\d+)\.", name)[0]) for name in changed}
    assert 0 in layers and all("experts" in name for name in changed)


@pytest.mark.parametrize("family", ["deepseek_v3", "lfm2_moe"])
def test_other_routers_are_refused(tmp_path: Path, family: str) -> None:
    skeleton = Checkpoint.open_source(families.tiny(tmp_path, family))
    check_guidance(skeleton, load_recipe("guided", ["guidance.routing=false"]))
    wanted = rf"guidance.routing is not available for {family}: its routers .* take guidance.routing = false"
    with pytest.raises(FourfoldError, match=wanted):
        check_guidance(skeleton, load_recipe("guided", ["guidance.routing=true"]))
    check_guidance(skeleton, load_recipe("best", ["guidance.routing=true"]))  # without tokens there is no guidance
