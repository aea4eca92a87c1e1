"""The sweep before the loop: its gradients are those of the whole model; it goes on where it was; what comes of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import checkpoints
import fourfold
import releases
from fourfold.datatypes import Action, Event, FourfoldError, Tick
from fourfold.distributed.devices import Machine
from fourfold.distributed.team import Team, alone
from fourfold.distributed.workers import Worker
from fourfold.model.head import build_head, sampled_gradient
from fourfold.model.layer import DecoderLayer, build_layer, pass_rows, push_back
from fourfold.model.router import find_router
from fourfold.quantize import calibrate, guide
from fourfold.quantize.determinism import Switches, repeatable
from fourfold.quantize.guide import Guide, find_remaining_sweep, spread_rows, sweep
from fourfold.quantize.output import ReadAhead, Writer
from fourfold.quantize.plan import Plan, make_plan
from fourfold.quantize.streams import embedded, embeddings, read_head
from fourfold.quantize.sweep_files import read_curvature
from fourfold.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
ROWS, LENGTH = 3, 40
TOKENS = ROWS * LENGTH


def token_rows(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """Ordinary tokens, none that stands for an image."""
    return torch.randint(100, 2000, (rows, length), generator=torch.Generator().manual_seed(5))


def uniform(token_RT: Tensor, seed: int = 0) -> Tensor:
    return torch.rand(token_RT.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the whole model, by transformers and autograd


@dataclass(frozen=True)
class Whole:
    """Of a whole model: the end loss's gradient at what each MoE block puts out [T, D], and each token's weight in the
    layer's curvature [T]; by layer, dense ones left out.
    """

    delta: dict[int, Tensor]
    weight: dict[int, Tensor]

    def curvature(self, layer: int) -> Tensor:
        """By definition, float64."""
        delta_TD, weight_T = self.delta[layer].double(), self.weight[layer].double()
        return torch.einsum("t,td,te->de", weight_T, delta_TD, delta_TD) / weight_T.sum()


def whole_model(folder: Path, token_RT: Tensor, uniform_RT: Tensor, dtype: torch.dtype) -> Whole:
    """Labels by the definition of a cumulative distribution, the loss as torch has it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=dtype).eval()
    outputs: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        found = re.fullmatch(r".*layers\.(\d+)\.mlp", name)
        if found and "visual" not in name and hasattr(module, "experts"):
            layer = int(found[1])
            module.register_forward_hook(lambda _, __, out, at=layer: outputs.__setitem__(at, out))
            module.gate.register_forward_hook(lambda _, __, out, at=layer: weights.__setitem__(at, out[1]))
    logits_NV = model(input_ids=token_RT, use_cache=False).logits.flatten(0, 1)
    below_NV = logits_NV.detach().double().softmax(dim=1).cumsum(dim=1)
    label_N = (below_NV <= uniform_RT.flatten()[:, None]).sum(dim=1)
    loss = cross_entropy(logits_NV.float(), label_N, reduction="sum")
    deltas = torch.autograd.grad(loss, list(outputs.values()))
    return Whole(
        delta={layer: delta.reshape(-1, delta.shape[-1]) for layer, delta in zip(outputs, deltas, strict=True)},
        weight={layer: value.detach().float().square().sum(dim=1) for layer, value in weights.items()},
    )


def through_layers(folder: Path, token_RT: Tensor, uniform_RT: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
    """The gradient behind each layer, all rows at once, layer by layer: [T, D]."""
    plan = make_plan(folder, load_recipe("best"))
    source = plan.source
    layers = []
    for layer in plan.layers:
        kept = [claim.header.name for claim in layer.claims if claim.action is Action.COPY]
        layers.append(build_layer(source, layer.index, source.read_layer(layer.index, kept), CPU, dtype))
    hidden = [embedded(embeddings(source), token_RT, torch.empty).to(dtype)]
    with torch.no_grad():
        for each in layers:
            hidden.append(pass_rows(each, hidden[-1])[0])
        head = build_head(source.blueprint, *read_head(source), CPU, dtype)
        gradient_ND = sampled_gradient(head, hidden[-1].flatten(0, 1), uniform_RT.flatten())
        gradients = {len(layers) - 1: gradient_ND.view(hidden[-1].shape)}
        for place in range(len(layers) - 1, 0, -1):
            gradients[place - 1], _ = push_back(layers[place], hidden[place], gradients[place])
    return {layer: value.flatten(0, 1) for layer, value in gradients.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
        {"family": "qwen3_moe", "layers": 3, "dense_layers": [1]},
    ],
    ids=["qwen3_5_moe", "qwen3_moe"],
)
def test_gradients_are_those_of_the_whole_model(tmp_path: Path, options: dict[str, Any]) -> None:
    folder, token_RT = checkpoints.tiny(tmp_path, **options), token_rows()
    uniform_RT = uniform(token_RT)
    found = through_layers(folder, token_RT, uniform_RT, torch.float32)
    wanted = whole_model(folder, token_RT, uniform_RT, torch.float32)
    routed = set(range(options["layers"])) - set(options.get("dense_layers", []))
    assert set(wanted.delta) == routed
    for layer in routed:
        error_TD = found[layer] - wanted.delta[layer]
        assert error_TD.norm() < 1e-4 * wanted.delta[layer].norm(), f"layer {layer}"


def test_labels_come_from_the_whole_vocabulary_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token can be a label too: nothing is rounded away at the end."""
    plan = make_plan(checkpoints.tiny(tmp_path), load_recipe("best"))
    head = build_head(plan.source.blueprint, *read_head(plan.source), CPU, torch.float32)
    hidden_ND = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    uniform_N = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1 - 2**-53], dtype=torch.float64)
    whole_ND = sampled_gradient(head, hidden_ND, uniform_N)
    monkeypatch.setattr("fourfold.model.head.VOCABULARY_CHUNK", 300)
    monkeypatch.setattr("fourfold.model.head.LOGITS_KEPT", 1)  # of a few positions
    torch.testing.assert_close(sampled_gradient(head, hidden_ND, uniform_N), whole_ND, rtol=1e-4, atol=1e-5)
    assert whole_ND.isfinite().all() and (whole_ND.norm(dim=1) > 0).all()


# ---- the sweep


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers: linear, full and linear attention."""
    types = ["linear_attention", "full_attention", "linear_attention"]
    return checkpoints.tiny(tmp_path_factory.mktemp("guide") / "model", layers=3, layer_types=types)


def guided(*overrides: str) -> Recipe:
    return load_recipe("best", [f"calibration.length={LENGTH}", f"guidance.tokens={TOKENS}", *overrides])


Told = Callable[[str, int], None]


def stages(tell: Told) -> guide.Stage:
    @contextmanager
    def stage(name: str, layer: int, total: int, unit: str) -> Iterator[Tick]:
        tell(name, layer)
        done = []
        yield done.append
        assert sum(done) <= total

    return stage


def run_sweep(
    model: Path, out: Path, recipe: Recipe, tell: Told = lambda name, layer: None, workers: int = 1,
    layers: range | None = None,
) -> Plan:  # fmt: skip
    """A sweep, or what is left of one."""
    plan = make_plan(model, recipe, layers=layers)
    (out / ".fourfold").mkdir(parents=True, exist_ok=True)
    left, team = find_remaining_sweep(plan, out), Team([CPU] * workers)
    token_RT = token_rows(plan.work.guidance_tokens // LENGTH)
    router = find_router(plan.source) if plan.work.guidance_routing else ""
    with ReadAhead(plan, team.trace, left.layers, team.transfers) as ahead, Writer(team.trace) as writer:
        job = Guide(
            plan=plan,
            out=out,
            token_RT=token_RT,
            batch_rows=1,
            remaining_sweep=left,
            ahead=ahead,
            writer=writer,
            router=router,
        )
        team.run(lambda worker: sweep(worker, job, stages(tell if worker.is_leader else lambda *_: None)))
    return plan


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept")
    run_sweep(model, out, guided())
    return out


def kept(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / ".fourfold/guidance").iterdir()}


def curvature(out: Path, layer: int) -> Tensor:
    record = json.loads((out / f".fourfold/guidance/curvature-{layer:05d}.json").read_text())
    return read_curvature(out, layer, record["source_digest"])


def test_a_sweep_leaves_curvatures_alone(swept: Path) -> None:
    names = [f"curvature-{layer:05d}" for layer in range(3)]
    assert set(kept(swept)) == {name + suffix for name in names for suffix in (".json", ".safetensors")}


def test_curvatures_are_symmetric_and_positive(swept: Path) -> None:
    for layer in range(3):
        found_DD = curvature(swept, layer)
        assert found_DD.shape == (128, 128) and found_DD.dtype == torch.float32
        assert torch.equal(found_DD, found_DD.T)
        assert torch.linalg.eigvalsh(found_DD.double()).min() > -1e-6 * found_DD.diagonal().max()
        assert found_DD.diagonal().min() > 0


def test_curvatures_are_those_of_the_whole_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole sweep in float32: in BF16 a label that lies on the edge becomes its neighbour."""
    for name, build in (("build_layer", build_layer), ("build_head", build_head)):
        monkeypatch.setattr(guide, name, partial(build, dtype=torch.float32))
    monkeypatch.setattr(guide, "embedded", lambda *where: embedded(*where).float())
    run_sweep(model, tmp_path, guided())
    whole = whole_model(model, token_rows(), uniform(token_rows()), torch.float32)
    for layer in range(3):
        wanted_DD, found_DD = whole.curvature(layer), curvature(tmp_path, layer).double()
        assert (found_DD - wanted_DD).norm() < 0.005 * wanted_DD.norm(), f"layer {layer}"  # gradients are rounded once


@pytest.mark.parametrize("last", range(8))
def test_an_interrupted_sweep_goes_on_at_the_layer_it_reached(
    model: Path, swept: Path, tmp_path: Path, last: int
) -> None:
    """Seven stages: three layers forward, the head, three layers back. Stopped where one begins, and gone on with."""
    stopped: list[tuple[str, int]] = []
    resumed: list[tuple[str, int]] = []

    def stop(name: str, layer: int) -> None:
        if len(stopped) == last:
            raise KeyboardInterrupt
        stopped.append((name, layer))

    if last < 7:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(model, tmp_path, guided(), stop)
    else:
        run_sweep(model, tmp_path, guided(), stop)
    run_sweep(model, tmp_path, guided(), lambda name, layer: resumed.append((name, layer)))
    assert kept(tmp_path) == kept(swept)
    order = [*(("forward", layer) for layer in (0, 1, 2)), *(("backward", layer) for layer in (-1, 2, 1, 0))]
    # What was being written when the stage began is lost at most: a stage is repeated, none before it.
    assert stopped == order[:last] and resumed in (order[last:], order[max(last - 1, 0) :])


def test_two_workers_agree_with_one(model: Path, swept: Path, tmp_path: Path) -> None:
    for workers in (2, 4):  # of three rows: two and one, then one worker without any
        run_sweep(model, tmp_path / str(workers), guided(), workers=workers)
        for layer in range(3):
            one_DD, many_DD = curvature(swept, layer), curvature(tmp_path / str(workers), layer)
            assert (one_DD - many_DD).norm() < 1e-3 * one_DD.norm()


def test_a_trial_sweeps_what_lies_behind_its_layers(model: Path, swept: Path, tmp_path: Path) -> None:
    run_sweep(model, tmp_path, guided(), layers=range(1, 2))
    name = "curvature-00001.safetensors"
    assert kept(tmp_path).keys() == {name, "curvature-00001.json"}
    assert kept(tmp_path)[name] == kept(swept)[name]


def test_curvatures_of_another_source_are_refused(swept: Path) -> None:
    with pytest.raises(FourfoldError, match=r"layer 1: the source holds not the bytes"):
        read_curvature(swept, 1, "another")


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(
    ("suffix", "problem"),
    [
        ("safetensors", r"sha256 \w{16}, expected \w{16}"),
        ("json", "cannot be read"),
        (None, "No such file or directory"),
    ],
    ids=["flipped", "record", "missing"],
)
def test_damaged_curvatures_are_made_again(
    model: Path, swept: Path, tmp_path: Path, suffix: str | None, problem: str, interrupted: bool
) -> None:
    """Of a finished sweep, and of one that was stopped at its last layer."""

    def stop_at_last(name: str, layer: int) -> None:
        if (name, layer) == ("backward", 0):
            raise KeyboardInterrupt

    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(model, tmp_path, guided(), stop_at_last)
    else:
        shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    path = tmp_path / ".fourfold/guidance/curvature-00002.safetensors"
    damaged = path.with_suffix(f".{suffix or 'safetensors'}")
    content = damaged.read_bytes()
    damaged.write_bytes(bytes([content[0] ^ 255]) + content[1:])
    if suffix is None:
        damaged.unlink()
    if suffix != "json":
        with pytest.raises(FourfoldError, match=f"{path.name}: {problem}.*Rerun"):
            curvature(tmp_path, 2)
    found = find_remaining_sweep(make_plan(model, guided()), tmp_path).problem
    assert re.fullmatch(rf"{damaged.name}: {problem}", found)
    run_sweep(model, tmp_path, guided())
    assert kept(tmp_path) == kept(swept)


def test_long_gradients_are_shortened_alone() -> None:
    """To ten times the median of their own row, direction and all others as they were."""
    gradient_RTD = torch.zeros(2, 5, 4)
    gradient_RTD[0, :, 0] = torch.tensor([1.0, 2.0, 3.0, 30.0, 31.0])
    gradient_RTD[1, :, 1] = torch.tensor([0.1, 0.1, 0.1, -7.0, 0.0])
    clipped_RTD = guide.clip(gradient_RTD)
    torch.testing.assert_close(clipped_RTD[0, :, 0], torch.tensor([1.0, 2.0, 3.0, 30.0, 30.0]))
    torch.testing.assert_close(clipped_RTD[1, :, 1], torch.tensor([0.1, 0.1, 0.1, -1.0, 0.0]))


def test_one_loud_gradient_does_not_make_a_curvature() -> None:
    """10^4 times as long as the others: of the trace it would be all, clipped it is less than half."""
    gradient_TD = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    gradient_TD[77] *= 1e4

    def share(some_TD: Tensor) -> float:
        layer = cast(DecoderLayer, SimpleNamespace(device=CPU, index=0))
        curvature_DD = guide._curvature(alone(CPU), layer, some_TD[None], torch.ones(256))
        own_DD = torch.outer(some_TD[77].float(), some_TD[77].float()) / 256
        return float(own_DD.trace() / curvature_DD.trace())

    assert share(gradient_TD) > 0.99 and 0.2 < share(guide.clip(gradient_TD[None])[0]) < 0.5


def test_a_token_without_an_embedding_does_not_take_a_curvature_over(model: Path, swept: Path, tmp_path: Path) -> None:
    """Its state is next to nothing, and a norm makes a thousand times as much of it."""
    silent = shutil.copytree(model, tmp_path / "model")
    tokens = token_rows()[:, 7]

    def silence(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("embed_tokens.weight")]:
            tensors[name][tokens] = 0

    checkpoints.edit(silent, silence)
    whole = whole_model(silent, token_rows(), uniform(token_rows()), torch.float32)
    run_sweep(silent, tmp_path, guided())
    usual, found = (curvature(out, 0).diagonal().sum() for out in (swept, tmp_path))
    assert whole.curvature(0).trace() > 1000 * usual and found < 4 * usual


def test_guidance_rows_are_spread_over_all_sources() -> None:
    token_RT = torch.arange(10)[:, None].expand(10, 4)
    assert spread_rows(token_RT, 12)[:, 0].tolist() == [0, 3, 6]
    assert spread_rows(token_RT, 40)[:, 0].tolist() == [*range(10)]


def test_gradients_that_are_no_numbers_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*arguments: Any) -> Any:
        pushed_RTD, routing = push_back(*arguments)
        return pushed_RTD * torch.inf, routing

    monkeypatch.setattr(guide, "push_back", overflow)
    with pytest.raises(FourfoldError, match="layer 1: gradients of the loss at its output are NaN or Inf"):
        run_sweep(model, tmp_path, guided())


# ---- whole runs


@pytest.fixture(scope="module")
def with_guidance(source: Path, small: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guided") / "out"
    releases.run(source, out, small("guidance.tokens=512"))
    return out


def test_a_run_says_what_guidance_promised_and_gained(
    source: Path, release: Path, with_guidance: Path, small: MakeRecipe, tmp_path: Path
) -> None:
    state = releases.read_json(with_guidance / "fourfold.json")["guidance"]
    assert (state["tokens"], state["sites"], state["damping"]) == (512, "both", 0.3)
    assert [row["layer"] for row in state["layers"]] == [0, 1]
    for row in state["layers"]:
        assert 0 < row["predicted"] <= 1
        assert set(row["measured"]) == {"gate_up", "down"} and all(0 < left < 1 for left in row["measured"].values())
    assert not (with_guidance / ".fourfold/guidance").exists()
    assert "guidance" not in releases.read_json(release / "fourfold.json")
    plain, found = releases.tensors(release), releases.tensors(with_guidance)
    packed = [name for name in plain if name.endswith("weight_packed")]
    assert all(not torch.equal(plain[name], found[name]) for name in packed)


@pytest.mark.parametrize("overrides", [("guidance.sites=down",), ("solver.asymmetric=false",)])
def test_variants_run(source: Path, small: MakeRecipe, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    notes: list[str] = []

    def listen(event: Event) -> None:
        notes.extend([event.text] if event.kind == "note" else [])

    releases.run(source, tmp_path / "out", small("guidance.tokens=512", *overrides), progress=listen)
    measured = [row["measured"] for row in releases.read_json(tmp_path / "out/fourfold.json")["guidance"]["layers"]]
    sites = {"down"} if "guidance.sites=down" in overrides else {"gate_up", "down"}
    assert all(set(row) == sites for row in measured)
    assert any(note.startswith("few gradients: 512 guidance tokens are 4.0 for each of 128") for note in notes)
    assert any(note.startswith("guidance is predicted to leave") for note in notes)


def test_a_plan_tells_what_the_sweep_of_an_unfinished_run_predicts(
    source: Path, small: MakeRecipe, tmp_path: Path
) -> None:
    recipe, out, told = small("guidance.tokens=512"), tmp_path / "out", list[str]()

    def listen(event: Event) -> None:
        if event.kind == "note" and "predicted_share" in event.data:
            told.append(event.text)
            raise KeyboardInterrupt

    before = fourfold.plan(source, recipe=recipe, devices="cpu", out=out)
    assert before.predicted_shares == {} and "known after the sweep" in before.prediction
    with pytest.raises(KeyboardInterrupt):
        releases.run(source, out, recipe, progress=listen)
    plan = fourfold.plan(source, recipe=recipe, devices="cpu", out=out)
    assert [plan.prediction] == told and all(0 < share <= 1 for share in plan.predicted_shares.values())
    assert plan.to_json()["predicted_share"] == {str(layer): s for layer, s in plan.predicted_shares.items()}
    assert fourfold.plan(source, recipe=small(), devices="cpu", out=out).predicted_shares == {}


def test_two_workers_guide_alike(source: Path, with_guidance: Path, small: MakeRecipe, tmp_path: Path) -> None:
    machine = Machine(devices="cpu*2", memory_bytes=releases.MEMORY_BYTES)
    releases.run(source, tmp_path / "out", small("guidance.tokens=512"), machine=machine)
    one, two = releases.tensors(with_guidance), releases.tensors(tmp_path / "out")
    names = [name for name in one if "layers.0." in name and name.endswith("weight_packed")]
    same = [releases.unpack_words(one[name]) == releases.unpack_words(two[name]) for name in names]
    assert torch.cat([part.flatten() for part in same]).float().mean() > 0.99


# ---- what it is for


def judge_of_benchmarks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("heldout", Path(__file__).parents[2] / "benchmarks/heldout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_guidance_loses_a_fifth_less_on_the_example(example_model: Path, tmp_path: Path) -> None:
    """KL with the source's choice of experts, at 16k calibration tokens, beside the same recipe without guidance."""
    rows = [("general", 12), ("chat", 10), ("code", 6), ("math", 4)]
    text = [f"calibration.sources.{place}.rows={count}" for place, (_, count) in enumerate(rows)]
    text += ["calibration.length=512", "heldout.windows=2", "heldout.length=512"]
    windows = load_recipe("best", ["heldout.windows=24", "heldout.length=512"])
    heldout = calibrate.heldout(windows, calibrate.load_tokenizer(example_model))
    judge = judge_of_benchmarks().Judge(example_model, heldout.token_RT)
    lost = {}
    for preset in ("best", "guided"):
        releases.run(example_model, tmp_path / preset, load_recipe(preset, text))
        lost[preset] = judge.judge(tmp_path / preset)["forced_kl_mean"]
    assert lost["guided"] <= 0.80 * lost["best"]


@pytest.fixture(params=[(False, False, True), (True, False, False), (True, True, True)])
def switched(request: pytest.FixtureRequest) -> Iterator[Switches]:
    """What a caller may have set."""
    before = Switches.now()
    Switches(*request.param).set()
    yield Switches(*request.param)
    before.set()


@pytest.mark.parametrize("fails", [False, True])
def test_the_switches_of_a_repeatable_backward_are_put_back(fails: bool, switched: Switches) -> None:
    """By two workers on GPUs, which come and go one after the other; no GPU is needed for the switches."""
    team = Team([CPU] * 2)

    def sweeps(worker: Worker) -> None:
        on_gpu: Any = SimpleNamespace(
            device=torch.device("cuda"), all_gather_object=worker.all_gather_object, run_once=worker.run_once
        )
        with contextlib.suppress(ZeroDivisionError), repeatable(on_gpu):
            assert Switches.now() == (True, True, False)
            assert 1 / (not fails)
        worker.all_gather_object(None)

    team.run(sweeps)
    assert Switches.now() == switched
