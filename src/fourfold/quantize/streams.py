"""Two streams of rows, source and release, that go through the layers side by side: the sweep of every long job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import metrics
from fourfold.datatypes import FourfoldError, Rows, StreamDrift, Tick
from fourfold.model.checkpoint import SLAB_ELEMENTS, TensorIndex, require_finite
from fourfold.model.head import Head, build_head
from fourfold.model.layer import DecoderLayer
from fourfold.model.skeleton import Skeleton
from fourfold.quantize.observe import Batches, Observed, Traffic, advance_, attend_, pass_heldout_


@dataclass(frozen=True)
class Stream:
    """Calibration rows (None where nothing is learnt from them) and held-out rows at the input of the next layer."""

    calibration: Rows | None
    heldout: Rows

    @property
    def calibration_tokens(self) -> int:
        return 0 if self.calibration is None else self.calibration.token_RT.numel()

    def without_calibration(self) -> Stream:
        """What goes on behind the last layer that is solved: nothing more is learnt."""
        return Stream(calibration=None, heldout=self.heldout)

    @property
    def tokens(self) -> int:
        return self.calibration_tokens + self.heldout.token_RT.numel()


def embed(
    index: TensorIndex, skeleton: Skeleton, calibration_RT: Tensor, heldout_RT: Tensor, asymmetric: bool
) -> tuple[Stream, Stream]:
    """Both streams before the first layer, where they are equal: calibration rows are shared until they differ."""
    name = f"{skeleton.family.text_prefix}embed_tokens.weight"
    embedding_VD = index.read(name)
    require_finite(embedding_VD, name)
    calibration = Rows(calibration_RT, embedding_VD[calibration_RT])
    source = Stream(calibration=calibration, heldout=Rows(heldout_RT, embedding_VD[heldout_RT]))
    release = Stream(
        calibration=calibration if asymmetric else None,
        heldout=Rows(heldout_RT, source.heldout.hidden_RTD.clone()),
    )
    return source, release


def attended_tokens(source: Stream, release: Stream) -> int:
    """Tokens that `attend` goes through: calibration rows count once where the streams are still one."""
    both = () if release.calibration is source.calibration else (release,)
    return sum(stream.calibration_tokens for stream in (source, *both))


def attend(
    layer: DecoderLayer, source: Stream, release: Stream, batches: Batches, tick: Tick
) -> tuple[Traffic, Traffic | None]:
    """Attention and router once per stream; once in all where the streams are still one.

    Raises FourfoldError, here and in `advance`, naming the layer whose outputs are no numbers any more.
    """
    assert source.calibration is not None
    source_traffic = attend_(layer, source.calibration, batches, tick)
    _require_numbers(layer, source_traffic.input_TD, source_traffic.rows.hidden_RTD)
    if release.calibration is None:
        return source_traffic, None
    if release.calibration is not source.calibration:
        release_traffic = attend_(layer, release.calibration, batches, tick)
        _require_numbers(layer, release_traffic.input_TD, release_traffic.rows.hidden_RTD)
        return source_traffic, release_traffic
    rows = Rows(source.calibration.token_RT, source_traffic.rows.hidden_RTD.clone())
    return source_traffic, Traffic(rows, source_traffic.input_TD, source_traffic.routing, source_traffic.pairs)


def observed(source: Traffic, release: Traffic | None) -> Observed:
    """What the layer's moments come from: the release stream where there is one, with the source as its target."""
    return Observed(traffic=source, target_TD=None) if release is None else Observed(release, source.input_TD)


def advance(
    layers: tuple[DecoderLayer, DecoderLayer],
    traffic: tuple[Traffic, Traffic | None],
    streams: tuple[Stream, Stream],
    batches: Batches,
    tick: Tick,
) -> tuple[Stream, Stream, StreamDrift]:
    """Both streams to the next layer; held-out rows pass here too. layers, traffic, streams: (source, release)."""
    source, release = (
        Stream(advance_(layer, own, batches, tick), stream.heldout) if own and stream.calibration else stream
        for layer, own, stream in zip(layers, traffic, streams, strict=True)
    )
    (drift,) = pass_rows_(layers, (source.heldout, release.heldout), batches, tick)
    for layer, stream in zip(layers, (source, release), strict=True):
        _require_numbers(layer, None if stream.calibration is None else stream.calibration.hidden_RTD)
    return source, release, drift


def pass_rows_(
    layers: Sequence[DecoderLayer], rows: Sequence[Rows], batches: Batches, tick: Tick
) -> tuple[StreamDrift, ...]:
    """Held-out rows of the source, and of each release after it, through one layer, in place. Returns their drifts.

    Raises FourfoldError as `attend` does.
    """
    drifts = pass_heldout_(layers, rows, batches, tick)
    for layer, stream in zip(layers, rows, strict=True):
        _require_numbers(layer, stream.hidden_RTD)
    return drifts


def _require_numbers(layer: DecoderLayer, *states: Tensor | None) -> None:
    """Weights are checked when they are read; what they put out can still be too large for BF16."""
    for state in states:
        if state is None or all(math.isfinite(extreme) for extreme in state.aminmax()):
            continue
        bad = sum(int(slab.isfinite().logical_not().sum()) for slab in state.flatten().split(SLAB_ELEMENTS))
        raise FourfoldError(
            f"layer {layer.index}: {bad:,} of {state.numel():,} hidden states are no numbers, as its outputs are too "
            "large for BF16; the checkpoint is damaged or not meant for BF16, take the published one"
        )


def measure(
    index: TensorIndex, skeleton: Skeleton, source: Rows, release: Rows, device: torch.device
) -> metrics.Statistics:
    """The held-out rows of both streams after the last layer, compared; the output head is the source's for both."""
    tied = skeleton.config.tie_word_embeddings
    head_VD = index.read(f"{skeleton.family.text_prefix}embed_tokens.weight" if tied else "lm_head.weight")
    require_finite(head_VD, "lm_head.weight")
    head = build_head(skeleton, index.read(f"{skeleton.family.text_prefix}norm.weight"), head_VD, device)
    return compare((head, head), (source, release))


def compare(heads: tuple[Head, Head], rows: tuple[Rows, Rows]) -> metrics.Statistics:
    """Last norm and output head over the rows of two streams (source, release), the head in vocabulary chunks."""
    device = heads[0].weight_VD.device
    release_head_VD = None if heads[1].weight_VD is heads[0].weight_VD else heads[1].weight_VD
    parts = []
    for row, token_T in enumerate(rows[0].token_RT):
        source_TD, release_TD = (
            head.norm(stream.hidden_RTD[row, :-1].to(device)) for head, stream in zip(heads, rows, strict=True)
        )
        next_T = token_T[1:].to(device)
        parts.append(metrics.token_statistics(source_TD, release_TD, heads[0].weight_VD, next_T, release_head_VD))
    return metrics.join(parts)
