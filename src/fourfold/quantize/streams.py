"""Two streams of rows, source and release, that go through the layers side by side: the sweep of every long job."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import metrics
from fourfold.datatypes import Batches, FourfoldError, Rows, StreamDrift, Tick
from fourfold.distributed.workers import Worker
from fourfold.model.calls import Calls
from fourfold.model.checkpoint import HOST, Checkpoint
from fourfold.model.head import Around, Ends, Head, build_head, output_name, read_ends, read_matrix
from fourfold.model.layer import DecoderLayer
from fourfold.model.processor import Processor
from fourfold.model.tensors import SLAB_ELEMENTS
from fourfold.quantize.calibrate import load_tokenizer
from fourfold.quantize.estimate import RTN_STEP
from fourfold.quantize.heap import give_back_free_memory
from fourfold.quantize.image_rows import ImageRow
from fourfold.quantize.observe import MoeInputs, advance_, attend_, own_tokens, pass_heldout_
from fourfold.quantize.reference import make_reference
from fourfold.records.release import Reference

Images = Mapping[int, ImageRow]


@dataclass(frozen=True)
class Stream:
    """Calibration rows (None once no later layer needs them) and held-out rows at the input of the next layer."""

    calibration: Rows | None
    heldout: Rows

    @property
    def calibration_tokens(self) -> int:
        return 0 if self.calibration is None else self.calibration.token_RT.numel()

    def without_calibration(self) -> Stream:
        """Drop the calibration rows after the last layer to be quantized."""
        return Stream(calibration=None, heldout=self.heldout)

    @property
    def tokens(self) -> int:
        return self.calibration_tokens + self.heldout.token_RT.numel()


@dataclass(frozen=True)
class RtnBaseline:
    """A worker's part of the held-out rows in the source with rounded experts (RTN). place: which of its rows."""

    rows: Rows
    place: slice


@dataclass(frozen=True)
class Streams:
    """All streams of a run at the input of a layer. rtn: what the release is compared with, or None."""

    source: Stream
    release: Stream
    rtn: RtnBaseline | None

    @property
    def heldout_tokens(self) -> int:
        return 2 * self.source.heldout.token_RT.numel() + (self.rtn.rows.token_RT.numel() if self.rtn else 0)


def embed(
    worker: Worker, checkpoint: Checkpoint, texts: tuple[Tensor, Tensor], *, asymmetric: bool, rtn: bool,
    images: tuple[Images, Images] = ({}, {}),
) -> Streams:  # fmt: skip
    """A worker's rows before the first layer, equal in all streams: calibration rows are shared until they differ.

    texts: token ids of all calibration and all held-out rows; images: what those with images are made of, by row;
    asymmetric: whether the release has calibration rows too; rtn: whether there is a stream of rounded experts.

    Raises FourfoldError for a model whose layers are given more than their own rows.
    """
    vision = bool(images[0] or images[1])
    around = worker.run_once(lambda: embeddings(checkpoint, worker.device if vision else HOST, towers=vision))
    processor = worker.run_once(lambda: _processor(checkpoint)) if vision else None
    plain = [row for row in range(len(texts[0])) if row not in images[0]]
    around.require_plain(texts[0][plain[:1]] if plain else torch.zeros_like(texts[0][:1]))
    calibration, heldout = (
        _embedded_rows(worker, around, processor, text_RT, found) for text_RT, found in zip(texts, images, strict=True)
    )
    source = Stream(calibration=calibration, heldout=heldout)
    release = Stream(calibration=calibration if asymmetric else None, heldout=_copied(worker, heldout))
    return Streams(source, release, _rtn_baseline(worker, heldout, len(texts[1])) if rtn else None)


def _processor(checkpoint: Checkpoint) -> Processor:
    return Processor.load(checkpoint, load_tokenizer(checkpoint.folder))


def _embedded_rows(
    worker: Worker, around: Around, processor: Processor | None, text_RT: Tensor, images: Images
) -> Rows:
    """A worker's own rows. Those with images go through the model's own towers, once, and keep their layers' calls."""
    place = worker.own_samples(len(text_RT))
    own = {row - place.start: image for row, image in images.items() if place.start <= row < place.stop}
    token_RT = text_RT[place]
    hidden_RTX = embedded(around, token_RT, worker.team.allocate, worker.heartbeat)
    calls: dict[int, Calls] = {}
    for row, image in own.items():
        assert processor is not None
        token_T, given = image.inputs(processor, token_RT.shape[1])
        assert torch.equal(token_T, token_RT[row]), "the processor made other tokens of the same images"
        found = around.calls(token_T[None], given)
        hidden_RTX[row].copy_(found.state[0])
        calls[row] = found.on_host()
        worker.heartbeat()
    return Rows(token_RT, hidden_RTX, calls=calls)


def _rtn_baseline(worker: Worker, heldout: Rows, count: int) -> RtnBaseline:
    """Every RTN_STEP-th of all workers' `count` held-out rows, those that are this worker's."""
    place = slice(-worker.own_samples(count).start % RTN_STEP, None, RTN_STEP)
    own = range(len(heldout.token_RT))[place]
    calls = {row: heldout.calls[number] for row, number in enumerate(own) if number in heldout.calls}
    rows = Rows(heldout.token_RT[place], heldout.hidden_RTD[place], list(heldout.carried), calls)
    return RtnBaseline(_copied(worker, rows), place)


def embeddings(checkpoint: Checkpoint, device: torch.device = HOST, *, towers: bool = False) -> Around:
    """Return the modules before the decoder layers, with the embeddings. towers: and with those that take images.

    Raises FourfoldError for NaN or Inf in them.
    """
    checkpoint.read_buffers(checkpoint.read_finite)
    return checkpoint.around(device, torch.bfloat16, checkpoint.read_finite, towers=towers)


def embedded(
    around: Around, token_RT: Tensor, room: Callable[..., Tensor], beat: Callable[[], None] = lambda: None
) -> Tensor:
    """Rows before the first layer, [R, T, ...]. room: memory for them; beat: called after each."""
    first = around.calls(token_RT.new_zeros(1, token_RT.shape[1])).state
    hidden_RTX = room((len(token_RT), *first.shape[1:]), dtype=first.dtype)
    for hidden_TX, token_T in zip(hidden_RTX, token_RT, strict=True):
        hidden_TX.copy_(around.calls(token_T[None]).state[0])
        beat()
    return hidden_RTX


def _copied(worker: Worker, rows: Rows) -> Rows:
    copied_RTD = worker.team.allocate(tuple(rows.hidden_RTD.shape), rows.hidden_RTD.dtype)
    for copied_TD, hidden_TD in zip(copied_RTD, rows.hidden_RTD, strict=True):
        copied_TD.copy_(hidden_TD)
        worker.heartbeat()
    return Rows(rows.token_RT, copied_RTD, list(rows.carried), rows.calls)


def attended_tokens(streams: Streams) -> int:
    """Tokens that `attend` goes through: calibration rows count once where the streams are still one."""
    source, release = streams.source, streams.release
    apart = release.calibration is not source.calibration
    return source.calibration_tokens + apart * release.calibration_tokens


def attend(
    worker: Worker, layer: DecoderLayer, released: Callable[[], DecoderLayer] | None, streams: Streams,
    batches: Batches, tick: Tick,
) -> tuple[MoeInputs, MoeInputs | None]:  # fmt: skip
    """Attention and router over the calibration rows of source and release; once where they are still the same.

    layer: of the source; released: that of the release, asked for when the source's rows are through; None where they
    differ in experts alone.
    Raises FourfoldError, here and in `advance`, naming the layer whose outputs are NaN or Inf.
    """
    source, release_rows = streams.source.calibration, streams.release.calibration
    assert source is not None
    if released is not None and release_rows is source:
        release_rows = _copied(worker, source)
    source_inputs = attend_(worker, layer, source, batches, tick)
    require_finite_states(worker, layer, _own_inputs(worker, source_inputs), source_inputs.rows.hidden_RTD)
    if release_rows is None:
        return source_inputs, None
    if release_rows is not source:
        other = layer if released is None else released()
        release_inputs = attend_(worker, other, release_rows, batches, tick)
        require_finite_states(worker, other, _own_inputs(worker, release_inputs), release_inputs.rows.hidden_RTD)
        return source_inputs, release_inputs
    return source_inputs, dataclasses.replace(source_inputs, rows=_copied(worker, source_inputs.rows))


def _own_inputs(worker: Worker, moe_inputs: MoeInputs) -> Tensor | None:
    return None if moe_inputs.input_TD is None else moe_inputs.input_TD[own_tokens(worker, moe_inputs.counts)]


def own_experts(worker: Worker, layer: DecoderLayer, moe_inputs: tuple[MoeInputs, MoeInputs | None]) -> DecoderLayer:
    """Return the layer with this worker's experts, assigned by the token counts of the stream that moments come from.

    A dense layer is returned unchanged.
    """
    routing = (moe_inputs[1] or moe_inputs[0]).routing
    if routing is None:
        return layer
    return layer.owning(
        worker.assigned_experts(torch.bincount(routing.index_TA.flatten().cpu(), minlength=layer.experts))
    )


def advance(
    worker: Worker, layer: DecoderLayer, moe_inputs: MoeInputs | None, stream: Stream, batches: Batches, tick: Tick
) -> Stream:
    """A stream's calibration rows, if it has any, to the next layer, in place."""
    if moe_inputs is None or stream.calibration is None:
        return stream
    rows = advance_(worker, layer, moe_inputs, batches, tick)
    require_finite_states(worker, layer, rows.hidden_RTD)
    return Stream(rows, stream.heldout)


def pass_rows_(
    worker: Worker, layers: Sequence[DecoderLayer], rows: Sequence[Rows], batches: Batches, tick: Tick
) -> tuple[StreamDrift, ...]:
    """Held-out rows of the source, and of each release after it, through one layer, in place. Returns their drifts.

    Raises FourfoldError as `attend` does.
    """
    drifts = pass_heldout_(worker, layers, rows, batches, tick)
    for layer, stream in zip(layers, rows, strict=True):
        require_finite_states(worker, layer, stream.hidden_RTD)
    return drifts


def require_finite_states(worker: Worker, layer: DecoderLayer, *states: Tensor | None) -> None:
    """Weights are checked when they are read; what they put out can still be too large for BF16: a FourfoldError."""
    for state in (state for state in states if state is not None and state.numel()):
        bad = 0
        for slab in state.flatten().split(SLAB_ELEMENTS):
            if not all(math.isfinite(extreme) for extreme in slab.aminmax()):
                bad += int(slab.isfinite().logical_not().sum())
            worker.heartbeat()
        if not bad:
            continue
        raise FourfoldError(
            f"layer {layer.index}: {bad:,} of {state.numel():,} hidden states are NaN or Inf, as its outputs are too "
            "large for BF16; the checkpoint is damaged or not meant for BF16, take the published one"
        )


def load_head(worker: Worker, checkpoint: Checkpoint) -> Head:
    """Return the source's output head, on the worker's device."""

    def ends() -> tuple[Ends, Tensor]:
        worker.transfer.free_pinned_memory()  # what the layers took
        return read_head(checkpoint)

    return build_head(checkpoint.blueprint, *worker.run_once(ends), worker.device)


@dataclass(frozen=True)
class Compared:
    """Statistics over the positions of held-out rows of text, and of images, None without them."""

    text: metrics.Statistics
    images: metrics.Statistics | None


def measure(
    worker: Worker, heads: tuple[Head, Head], streams: Streams, image_RT: Tensor | None = None
) -> tuple[Compared, Compared | None, Reference | None]:
    """Compare all workers' held-out rows after the last layer. heads: of source and release; image_RT: which tokens of
    all rows are of an image, whose prediction is not compared.

    Returns the release against the source, RTN against the source (None without that stream), and a reference of the
    release's first row, from the leading worker, which has it; None from the others.
    """
    source, release = streams.source.heldout, streams.release.heldout
    reference = make_reference(heads[1], release.token_RT[0], release.hidden_RTD[0]) if worker.is_leader else None
    own_RT = None if image_RT is None else image_RT[worker.own_samples(len(image_RT))]

    def against_source(head: Head, rows: Rows, place: slice) -> Compared:
        reference = Rows(source.token_RT[place], source.hidden_RTD[place])
        skipped_RT = None if own_RT is None else own_RT[place]
        found = _compared((heads[0], head), (reference, rows), worker.heartbeat, skipped_RT)
        own = [(row in rows.calls, one) for row, one in enumerate(found)]
        parts = [part for every in worker.all_gather_object(own) for part in every]
        images = [one for has_images, one in parts if has_images]
        text = [one for has_images, one in parts if not has_images]
        return Compared(metrics.join(text), metrics.join(images) if images else None)

    rtn = None if streams.rtn is None else against_source(heads[0], streams.rtn.rows, streams.rtn.place)
    return against_source(heads[1], release, slice(None)), rtn, reference


def read_head(checkpoint: Checkpoint) -> tuple[Ends, Tensor]:
    """Return the modules outside the decoder layers, such as the final norm, and the output head [V, D].

    Raises FourfoldError for NaN or Inf in them.
    """
    blueprint, read = checkpoint.blueprint, checkpoint.read_finite
    return read_ends(blueprint, read), read_matrix(blueprint, read, output_name(blueprint))


def compare(heads: tuple[Head, Head], rows: tuple[Rows, Rows]) -> metrics.Statistics:
    """Last norm and output head over the rows of two streams (source, release), the head in vocabulary chunks."""
    return metrics.join(_compared(heads, rows, lambda: None))


def _compared(
    heads: tuple[Head, Head], rows: tuple[Rows, Rows], beat: Callable[[], None], skipped_RT: Tensor | None = None
) -> list[metrics.Statistics]:
    """Statistics of each row. beat: called after each, as a heartbeat; skipped_RT: tokens that nothing predicts."""
    device = heads[0].weight_VD.device
    release_head_VD = None if heads[1].weight_VD is heads[0].weight_VD else heads[1].weight_VD
    finish = (heads[0].finish, heads[1].finish) if any(head.changes for head in heads) else None
    parts = []
    for row, token_T in enumerate(rows[0].token_RT):
        kept = slice(None) if skipped_RT is None else ~skipped_RT[row, 1:]
        source_TD, release_TD = (
            head.norm(stream.hidden_RTD[row, :-1][kept].to(device)) for head, stream in zip(heads, rows, strict=True)
        )
        next_T = token_T[1:][kept].to(device)
        parts.append(
            metrics.token_statistics(source_TD, release_TD, heads[0].weight_VD, next_T, release_head_VD, finish)
        )
        give_back_free_memory()  # fragmentation grows to 0.6 GB in 16 rows otherwise
        beat()
    return parts
