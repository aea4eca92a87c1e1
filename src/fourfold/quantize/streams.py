"""Two streams of rows, source and release, that go through the layers side by side: the sweep of every long job."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import metrics
from fourfold.datatypes import Rows, StreamDrift, Tick
from fourfold.model.checkpoint import TensorIndex, require_finite
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


def attend(
    layer: DecoderLayer, source: Stream, release: Stream, batches: Batches, tick: Tick
) -> tuple[Traffic, Traffic | None]:
    """Attention and router once per stream; once in all where the streams are still one."""
    assert source.calibration is not None
    source_traffic = attend_(layer, source.calibration, batches, tick)
    if release.calibration is None:
        return source_traffic, None
    if release.calibration is not source.calibration:
        return source_traffic, attend_(layer, release.calibration, batches, tick)
    rows = Rows(source.calibration.token_RT, source_traffic.rows.hidden_RTD.clone())
    return source_traffic, Traffic(rows, source_traffic.input_TD, source_traffic.routing, source_traffic.pairs)


def observed(source: Traffic, release: Traffic | None) -> Observed:
    """What the layer's moments come from: the release stream where there is one, with the source as its target."""
    if release is None:
        return Observed(traffic=source, target_TD=None)
    return Observed(traffic=release, target_TD=source.input_TD)


def advance(
    layers: tuple[DecoderLayer, DecoderLayer],
    traffic: tuple[Traffic, Traffic | None],
    streams: tuple[Stream, Stream],
    batches: Batches,
    tick: Tick,
) -> tuple[Stream, Stream, StreamDrift]:
    """Both streams to the next layer; held-out rows pass here too. layers, traffic, streams: (source, release)."""
    source = Stream(advance_(layers[0], traffic[0], batches, tick), streams[0].heldout)
    calibration = None if traffic[1] is None else advance_(layers[1], traffic[1], batches, tick)
    release = Stream(calibration, streams[1].heldout)
    drift = pass_heldout_(layers, (source.heldout, release.heldout), batches, tick)
    return source, release, drift


def measure(
    index: TensorIndex, skeleton: Skeleton, source: Rows, release: Rows, device: torch.device
) -> metrics.Statistics:
    """Last norm and output head over the held-out rows of both streams, the head in vocabulary chunks."""
    norm_name = f"{skeleton.family.text_prefix}norm.weight"
    norm = skeleton.empty_norm()
    norm.load_state_dict({"weight": index.read(norm_name).to(device, torch.bfloat16)}, assign=True)
    tied = skeleton.config.tie_word_embeddings
    head_VD = index.read(f"{skeleton.family.text_prefix}embed_tokens.weight" if tied else "lm_head.weight")
    require_finite(head_VD, "lm_head.weight")
    head_VD = head_VD.to(device)
    parts = []
    for row in range(len(source.token_RT)):
        source_TD, release_TD = (norm(rows.hidden_RTD[row, :-1].to(device)) for rows in (source, release))
        parts.append(metrics.token_statistics(source_TD, release_TD, head_VD, source.token_RT[row, 1:].to(device)))
    return metrics.join(parts)
