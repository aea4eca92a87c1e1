"""Moments to codes and scales for one layer, a chunk of experts at a time: gate_up, then down on its activations."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import gptq, grid, metrics, moments
from fourfold.datatypes import FourfoldError, Method, Moments, ProjectionStatistics, QuantizedGroup
from fourfold.model.layer import DecoderLayer
from fourfold.quantize.observe import (
    Batches,
    Chunk,
    Observed,
    chunks,
    down_moments,
    down_pool,
    gate_up_moments,
    gate_up_pool,
    make_chunk,
    random_tokens,
)
from fourfold.recipe import Recipe
