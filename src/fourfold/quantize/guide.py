"""The sweep before the loop: what the rest of the source makes of a layer's outputs, by the gradient of the end loss.

Guidance rows go forward through the source, every layer's input kept in OUT; then, from the last layer to the first,
the gradient rows go back through each layer, recomputed from its kept input. What stays is a matrix for each layer with
routed experts, its curvature: docs/numerics.md, section 13. An interrupted sweep goes on at the layer it reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fourfold.core import guidance, moments
from fourfold.datatypes import FourfoldError, Tick
from fourfold.distributed.workers import Worker
from fourfold.model.head import build_head, sampled_gradient
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer, pass_rows, push_back
from fourfold.model.shards import OutputTensor, write_shard
from fourfold.model.tensors import DTYPES, TensorIndex, raw_bytes
from fourfold.quantize.determinism import repeatable
from fourfold.quantize.estimate import damping_by_rule
from fourfold.quantize.journal import Journal, sweep_folder
from fourfold.quantize.output import ReadAhead, Writer, damage
from fourfold.quantize.plan import Plan
from fourfold.quantize.streams import embedded, embeddings, read_head, require_finite_states
from fourfold.records.record import read_entry, write_entry
from fourfold.records.release import CurvatureRecord, GuidanceFacts, GuidedLayer

INPUT, GRADIENT, CURVATURE = "input", "gradient", "curvature"
HIDDEN, MATRIX = "hidden_RTD", "curvature_DD"  # tensors in these files
LONGEST = 10.0  # of a row's median: a token's gradient is made no longer

Stage = Callable[[str, int, int, str], AbstractContextManager[Tick]]  # name, layer, how many, of what


@dataclass(frozen=True)
class Left:
    """Layers that are still to be gone through, in this order. A sweep that is done has none.

    from_head: no gradient has left the head yet; problem: why finished curvatures are computed again.
    """

    forward: range
    backward: range
    from_head: bool
    problem: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """In the order in which they are read."""
        return *self.forward, *self.backward


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A sweep. token_RT: guidance rows, of all workers; batch_rows: that go through a layer at one time."""

    plan: Plan
    out: Path
    token_RT: Tensor
    batch_rows: int
    remaining_sweep: Left
    ahead: ReadAhead
    writer: Writer

    @property
    def folder(self) -> Path:
        return sweep_folder(self.out)


def guided_layers(plan: Plan) -> tuple[int, ...]:
    """Layers whose curvature is wanted: those whose experts are solved. None where the recipe has no guidance."""
    return tuple(layer for layer in plan.solve if plan.layers[layer].routed and plan.work.guidance_tokens)


def find_remaining_sweep(plan: Plan, out: Path) -> Left:
    """What an earlier run has left of the sweep, from the files in OUT. Makes their folder.

    A damaged curvature is dropped, and all gradients: the sweep goes back from the head again.
    """
    folder, layers, wanted = sweep_folder(out), len(plan.layers), guided_layers(plan)
    folder.mkdir(exist_ok=True)
    recorded = [layer for layer in wanted if _record_path(folder, layer).is_file()]
    problems = {layer: problem for layer in recorded if (problem := _damage(out, layer))}
    if recorded == list(wanted) and not problems:
        return Left(range(0), range(0), False)
    if problems:
        for path in [*folder.glob(f"{GRADIENT}-*"), *(_record_path(folder, layer) for layer in problems)]:
            path.unlink()  # records last: what is killed in between finds the damage again
    gradients, inputs = (
        [place for place in range(layers + 1) if _path(folder, kind, place).is_file()] for kind in (GRADIENT, INPUT)
    )
    if gradients:
        return Left(range(0), range(gradients[0] - 1, wanted[0] - 1, -1), False)
    forward, backward = range(max(inputs, default=0), layers), range(layers - 1, wanted[0] - 1, -1)
    return Left(forward, backward, True, "; ".join(problems.values()))


def spread_rows(token_RT: Tensor, tokens: int) -> Tensor:
    """Whole rows of so many tokens in all, evenly from all rows, which lie by source."""
    count = tokens // token_RT.shape[1]
    return token_RT[torch.arange(count) * len(token_RT) // count]


def sweep(worker: Worker, guide: Guide, stage: Stage) -> None:
    """The curvature of every layer that is to be solved, durable in OUT; the work is where `guide.left` says.

    Rows are split over workers, each with all experts of the layer in work. Raises FourfoldError naming the layer
    whose outputs or gradients are NaN or Inf.
    """
    _forward(worker, guide, stage)
    _backward(worker, guide, stage)
    if worker.is_leader:
        guide.writer.join()
        for path in [*guide.folder.glob(f"{INPUT}-*"), *guide.folder.glob(f"{GRADIENT}-*")]:
            path.unlink()  # what the last layer to be gone through needed
    worker.all_gather_object(None)


def _forward(worker: Worker, guide: Guide, stage: Stage) -> None:
    hidden_RTD = _inputs(worker, guide, guide.remaining_sweep.forward.start) if guide.remaining_sweep.forward else None
    for number in guide.remaining_sweep.forward:
        assert hidden_RTD is not None
        output_RTD = torch.empty_like(hidden_RTD)
        with stage("forward", number, guide.token_RT.numel(), "tokens") as tick:
            layer = _take(worker, guide, number)[0]
            for batch in _batches(guide, hidden_RTD):
                passed_RTD, *_ = pass_rows(layer, hidden_RTD[batch].to(layer.device))
                output_RTD[batch] = passed_RTD.to(output_RTD.device)
                tick(passed_RTD.shape[0] * passed_RTD.shape[1])
        require_finite_states(worker, layer, output_RTD)
        hidden_RTD = output_RTD
        all_RTD, _ = worker.all_gather([hidden_RTD])
        if worker.is_leader:
            guide.writer.submit(partial(_write_rows, guide.folder, INPUT, number + 1, all_RTD))
        del layer, all_RTD  # or they lie beside the next ones
    if worker.is_leader:
        guide.writer.join()
    worker.all_gather_object(None)


def _backward(worker: Worker, guide: Guide, stage: Stage) -> None:
    if not guide.remaining_sweep.backward:
        return
    if guide.remaining_sweep.from_head:
        gradient_RTD = _from_head(worker, guide, stage)
    else:
        gradient_RTD = _own_rows(worker, guide, GRADIENT, guide.remaining_sweep.backward.start + 1)
    for number in guide.remaining_sweep.backward:
        with stage("backward", number, guide.token_RT.numel(), "tokens") as tick, repeatable(worker):
            layer, tensors = _take(worker, guide, number)
            hidden_RTD = _inputs(worker, guide, number)
            pushed_RTD, weight_T = _through_layer(layer, guide, hidden_RTD, gradient_RTD, tick)
        curvature_DD = None
        if weight_T is not None and number in guided_layers(guide.plan):
            curvature_DD = _curvature(worker, layer, gradient_RTD, weight_T)
        all_RTD, _ = worker.all_gather([pushed_RTD])
        if worker.is_leader:
            guide.writer.submit(partial(_write_layer, guide, number, tensors.digest, curvature_DD, all_RTD))
        gradient_RTD = pushed_RTD
        del layer, tensors, hidden_RTD, pushed_RTD, all_RTD  # or they lie beside the next ones


def _through_layer(
    layer: DecoderLayer, guide: Guide, hidden_RTD: Tensor, gradient_RTD: Tensor, tick: Tick
) -> tuple[Tensor, Tensor | None]:
    """A worker's gradient rows at the input of a layer, from those at its output; and what each token weighs in the
    layer's curvature: the sum of its experts' squared router weights, fp32 [T]. None of a dense layer.
    """
    pushed_RTD = torch.empty_like(gradient_RTD)
    weights: list[Tensor] = []
    for batch in _batches(guide, hidden_RTD):
        rows = hidden_RTD[batch].to(layer.device), gradient_RTD[batch].to(layer.device)
        batch_RTD, routing = push_back(layer, *rows)
        pushed_RTD[batch] = clip(batch_RTD).to(pushed_RTD.device)
        if routing is not None:
            weights.append(routing.weight_TA.float().square().sum(dim=1))
        tick(batch_RTD.shape[0] * batch_RTD.shape[1])
    if not layer.is_routed:
        return pushed_RTD, None
    return pushed_RTD, torch.cat(weights) if weights else torch.zeros(0, device=layer.device)


def clip(gradient_RTD: Tensor) -> Tensor:
    """Gradients [..., T, D] clipped: one longer than LONGEST times the median of its row's tokens is shortened to that.

    A token whose hidden state is next to nothing, as one that was never trained, is blown up by every norm: a thousand
    times with an epsilon of 1e-6, in every layer again. That is so for errors smaller than the state only, and such a
    token would be all that a curvature knows.
    """
    length_RT1 = gradient_RTD.float().norm(dim=-1, keepdim=True)
    most_R11 = LONGEST * length_RT1.median(dim=-2, keepdim=True).values
    factor_RT1 = torch.where(length_RT1 > most_R11, most_R11 / length_RT1, 1.0)
    return (gradient_RTD.float() * factor_RT1).to(gradient_RTD.dtype)


def _curvature(worker: Worker, layer: DecoderLayer, gradient_RTD: Tensor, weight_T: Tensor) -> Tensor:
    """Weighted mean of delta delta^T over all workers' tokens, fp32 [D, D].

    delta, the gradient at what a MoE block puts out, is the gradient at the layer's output: what comes before the block
    is added to it.
    """
    gradient_TD = gradient_RTD.flatten(0, 1).to(layer.device)
    total_DD = worker.all_reduce(moments.pool(gradient_TD, weight_T))
    curvature_DD = total_DD / worker.all_reduce(weight_T.sum())
    if not curvature_DD.diagonal().sum().isfinite():
        raise FourfoldError(
            f"layer {layer.index}: gradients of the loss at its output are NaN or Inf, so that it cannot be "
            "guided; take a recipe with guidance.tokens = 0"
        )
    return curvature_DD


def _from_head(worker: Worker, guide: Guide, stage: Stage) -> Tensor:
    """A worker's gradient rows behind the last layer. One random number for each position decides its label."""
    plan, place = guide.plan, len(guide.plan.layers)
    hidden_RTD = _inputs(worker, guide, place)
    gradient_RTD = torch.empty_like(hidden_RTD)
    generator = torch.Generator().manual_seed(plan.recipe.calibration.seed)
    uniform_RT = torch.rand(guide.token_RT.shape, dtype=torch.float64, generator=generator)
    uniform_RT = uniform_RT[worker.own_samples(len(uniform_RT))]
    with stage("backward", -1, guide.token_RT.numel(), "tokens") as tick:
        ends, head_VD = worker.run_once(lambda: read_head(plan.source))
        head = build_head(plan.source.blueprint, ends, head_VD, worker.device)
        for row, uniform_T in enumerate(uniform_RT):
            row_TD = sampled_gradient(head, hidden_RTD[row].to(worker.device), uniform_T.to(worker.device))
            gradient_RTD[row] = clip(row_TD).to(gradient_RTD.device)
            tick(len(row_TD))
    all_RTD, _ = worker.all_gather([gradient_RTD])
    if worker.is_leader:
        guide.writer.submit(partial(_replace_rows, guide.folder, place, all_RTD))
    return gradient_RTD


def _take(worker: Worker, guide: Guide, number: int) -> tuple[DecoderLayer, LayerTensors]:
    """The next layer with all its experts, on the worker's device."""
    taken = guide.ahead.take(worker, number)
    layer = build_layer(guide.plan.source, number, taken.at(worker), worker.device)
    if layer.tail is None or not layer.skeleton.is_plain(worker.device):
        raise FourfoldError(
            f"{layer.skeleton.blueprint.path}: guidance is not available for {layer.skeleton.family.model_type}: what "
            "its experts put out is not added to the residual stream as it is; take a recipe without, as best"
        )
    return layer.owning(layer.owned) if layer.is_routed else layer, taken.tensors


def _batches(guide: Guide, hidden_RTD: Tensor) -> Iterator[slice]:
    for first in range(0, len(hidden_RTD), guide.batch_rows):
        yield slice(first, first + guide.batch_rows)


def _inputs(worker: Worker, guide: Guide, place: int) -> Tensor:
    """A worker's rows before layer `place`: embedded, or kept."""
    if place:
        return _own_rows(worker, guide, INPUT, place)
    token_RT = guide.token_RT[worker.own_samples(len(guide.token_RT))]
    around = worker.run_once(lambda: embeddings(guide.plan.source))
    return embedded(around, token_RT, torch.empty)


# ---- files


def _path(folder: Path, kind: str, place: int) -> Path:
    return folder / f"{kind}-{place:05d}.safetensors"


def _open(folder: Path, kind: str, place: int) -> TensorIndex:
    return TensorIndex.open_shards(folder, [_path(folder, kind, place).name])


def _record_path(folder: Path, layer: int) -> Path:
    return _path(folder, CURVATURE, layer).with_suffix(".json")


def _own_rows(worker: Worker, guide: Guide, kind: str, place: int) -> Tensor:
    index, own = _open(guide.folder, kind, place), worker.own_samples(len(guide.token_RT))
    header = index.header(HIDDEN)
    rows_RTD = torch.empty(own.stop - own.start, *header.shape[1:], dtype=DTYPES[header.dtype])
    index.read_range(HIDDEN, own.start * (header.size_bytes // header.shape[0]), raw_bytes(rows_RTD))
    return rows_RTD


def _write_rows(folder: Path, kind: str, place: int, hidden_RTD: Tensor) -> None:
    write_shard(folder, _path(folder, kind, place).name, [OutputTensor.of(HIDDEN, hidden_RTD)])


def _replace_rows(folder: Path, place: int, gradient_RTD: Tensor) -> None:
    """The gradient before layer `place` takes the place of what it was made from."""
    _write_rows(folder, GRADIENT, place, gradient_RTD)
    for path in (_path(folder, INPUT, place), _path(folder, GRADIENT, place + 1)):
        path.unlink(missing_ok=True)


def _write_layer(
    guide: Guide, number: int, source_digest: str, curvature_DD: Tensor | None, gradient_RTD: Tensor
) -> None:
    """On the writer's thread: a layer's curvature, its record when that is durable, then the gradient before it."""
    if curvature_DD is not None:
        name = _path(guide.folder, CURVATURE, number).name
        written = write_shard(guide.folder, name, [OutputTensor.of(MATRIX, curvature_DD)])
        record = CurvatureRecord(
            layer=number,
            sha256=written.sha256,
            source_digest=source_digest,
            predicted_share=guidance.predicted_share(curvature_DD, row_damping(guide.plan)),
        )
        write_entry(_record_path(guide.folder, number), record)
    _replace_rows(guide.folder, number, gradient_RTD)


def read_records(plan: Plan, out: Path) -> tuple[CurvatureRecord, ...]:
    """Of guided layers whose curvature is finished and whose record can be read."""
    return tuple(filter(None, (_read_record(out, layer) for layer in guided_layers(plan))))


def predicted_shares(plan: Plan, out: Path | None) -> dict[int, float]:
    """By layer, what the sweep of an unfinished run in OUT predicts; nothing before it is done."""
    records = read_records(plan, out) if out else ()
    shares = {record.layer: record.predicted_share for record in records}
    return shares if len(shares) == len(guided_layers(plan)) else {}


def _read_record(out: Path, layer: int) -> CurvatureRecord | None:
    return read_entry(_record_path(sweep_folder(out), layer), CurvatureRecord)


def _damage(out: Path, layer: int) -> str:
    """Return why a layer's curvature is not the one that was recorded; empty if it is."""
    record, folder = _read_record(out, layer), sweep_folder(out)
    if record is None:
        return f"{_record_path(folder, layer).name}: cannot be read"
    return damage(_path(folder, CURVATURE, layer), record.sha256)


def read_curvature(out: Path, layer: int, source_digest: str) -> Tensor:
    """A layer's finished curvature, fp32 [D, D]. source_digest: of the layer as it is now.

    Raises FourfoldError if the file or the source is not what it was.
    """
    record, path = _read_record(out, layer), _path(sweep_folder(out), CURVATURE, layer)
    if problem := _damage(out, layer):
        raise FourfoldError(f"{path.parent}: {problem}. Rerun the same command: it computes the curvatures again")
    assert record is not None
    if source_digest != record.source_digest:
        raise FourfoldError(
            f"layer {layer}: the source holds not the bytes that its curvature was made from; bring the first source "
            "back, or start over with --restart"
        )
    return _open(path.parent, CURVATURE, layer).read(MATRIX)


# ---- what is said of it


def facts(plan: Plan, journal: Journal) -> GuidanceFacts | None:
    """What guidance promised and what it came to, by layer; None of a recipe without."""
    if not guided_layers(plan):
        return None
    measured = {record.layer: record.guided for record in journal.records}
    return GuidanceFacts(
        tokens=plan.work.guidance_tokens,
        sites=plan.recipe.guidance.sites,
        damping=row_damping(plan),
        layers=[
            GuidedLayer(layer=one.layer, predicted=one.predicted_share, measured=measured.get(one.layer, {}))
            for one in read_records(plan, journal.out)
        ],
    )


def row_damping(plan: Plan) -> float:
    """What is added to the diagonal of the rows' metric, of itself."""
    return plan.recipe.guidance.damp or damping_by_rule(plan.work)
