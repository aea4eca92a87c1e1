"""Rows of text through all layers of one or more checkpoints side by side; the next layer is read ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.datatypes import Batches, Rows, StreamDrift, Tick
from fourfold.distributed.team import alone
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.layer import DecoderLayer
from fourfold.quantize.memory import ATTEND_TOKENS, EXPERT_TOKENS
from fourfold.quantize.streams import embedded, pass_rows_


@dataclass(frozen=True)
class Compute:
    """Where the arithmetic is done, and in what type."""

    device: torch.device
    dtype: torch.dtype


def embed(checkpoint: Checkpoint, token_RT: Tensor, compute: Compute) -> Rows:
    """Rows of one checkpoint before its first layer; they lie on the host."""
    around = checkpoint.around(torch.device("cpu"), compute.dtype)
    return Rows(token_RT, embedded(around, token_RT, torch.empty))


def sweep_(
    checkpoints: Sequence[Checkpoint],
    rows: Sequence[Rows],
    compute: Compute,
    stage: Callable[[int], AbstractContextManager[Tick]],
    finished: Callable[[int, tuple[StreamDrift, ...]], None] = lambda layer, drifts: None,
) -> tuple[tuple[StreamDrift, ...], ...]:
    """Pass each checkpoint's rows through its layers, in place. The first is the source of the others.

    stage: entered for each layer, its tick receives tokens; finished: receives a layer's drifts.
    Returns by layer the drift of each checkpoint after the first.
    """
    layers, worker = checkpoints[0].layers, alone(compute.device)
    batches = Batches(rows=max(ATTEND_TOKENS // rows[0].token_RT.shape[1], 1), tokens=EXPERT_TOKENS, experts=1)

    def read(layer: int) -> list[DecoderLayer]:
        modules = [checkpoint.layer(layer, compute.device, compute.dtype) for checkpoint in checkpoints]
        return [module.owning(module.owned) if module.is_routed else module for module in modules]

    drifts = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as pool:
        ahead = pool.submit(read, 0)
        for layer in range(layers):
            with stage(layer) as tick:
                modules = ahead.result()
                if layer + 1 < layers:
                    ahead = pool.submit(read, layer + 1)
                drifts.append(pass_rows_(worker, modules, rows, batches, tick))
            finished(layer, drifts[-1])
    return tuple(drifts)
