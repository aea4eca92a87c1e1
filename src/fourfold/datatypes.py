"""The values that flow between the rooms, and the letters that name their axes.

Letters, used as suffixes (`weight_ENK` is a stack of E matrices [N, K]):

    E  routed experts          N  output features        K  input features
    G  groups, K // group_size T  tokens                 R  rows of tokens
    D  hidden size             I  expert width           V  vocabulary
    S  (token, expert) pairs, sorted by expert           A  experts per token (top-k)

Plain names are scalars. `_bytes`, `_seconds`, `_tokens` are units.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from reprlib import Repr
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_brief = Repr()  # what strangers wrote goes into messages, but not at any length
_brief.maxstring = _brief.maxother = 200
brief = _brief.repr
NO_MEMORY = re.compile("OutOfMemoryError|(?:can't allocate|not enough|out of) memory")
SYSTEM_FAULTS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENOMEM}
PROBLEMS_SHOWN = 5  # of one message


class FourfoldError(ValueError):
    """Something the user can mend: bad input, a changed source, a full disk. Exit code 2.

    The message names the thing, the value found, the value wanted and the way out.
    """


def system_fault(error: BaseException) -> str:
    """Return what an error says of the machine: memory or a disk that failed. "" for any other error, such as a bug.

    torch reports a CPU without memory as a plain RuntimeError.
    """
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", ())[:1])
    said = f"{type(error).__name__} {error}" if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or NO_MEMORY.search(said):
        return f"out of memory{where}. End other programs, or limit this one with --memory; rerun the command to resume"
    if isinstance(error, OSError) and error.errno in SYSTEM_FAULTS:
        return f"{error.filename or 'a file'}: {error.strerror}{where}. Check the disk; rerun the command to resume"
    return ""


def reason(error: Exception) -> str:
    """What a library's error says, on one short line: strangers' values may be in it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def shortened(problems: Sequence[str]) -> str:
    """The first problems, and how many more there are."""
    more = f" and {len(problems) - PROBLEMS_SHOWN:,} more" if len(problems) > PROBLEMS_SHOWN else ""
    return "; ".join(problems[:PROBLEMS_SHOWN]) + more


def nearest(word: object, known: Collection[object]) -> str:
    """The last sentence of an error: the known word that `word` looks like, or nothing."""
    match = difflib.get_close_matches(str(word), [str(item) for item in known], n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match and isinstance(word, str) else ""


class Method(StrEnum):
    """How a projection's codes were found."""

    GPTQ = "gptq"
    DIAGONAL = "diag"  # the factorization failed at every damping: diag(H) in its place
    ROW_DIAGONAL = "row-diag"  # guidance's metric of the rows has no factor: its diagonal, which guides nothing
    RTN = "rtn"  # round-to-nearest, by the recipe's fallback rule or where GPTQ has a larger output error


class Target(StrEnum):
    """Which outputs a projection was solved for. docs/numerics.md section 8."""

    PLAIN = "plain"  # the source weights' own
    RESIDUAL = "residual"  # what brings the residual stream closest to the source's


class Action(StrEnum):
    """What happens to a source tensor."""

    QUANTIZE = "quantize"
    COPY = "copy"
    SPLIT = "split"
    DROP = "drop"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a long job tells whoever watches it: the terminal, a JSON-lines reader, a test.

    kind: "start" (what the run is), "note" (text to show once), "stage" (a stage of a layer begins or advances),
    "layer" (a layer is finished), "done" (the job is finished). stage: rehearse, gauge (of a plan), calibrate, embed,
    read, attend, solve, restore, advance, measure, finish; in the sweep before the loop: forward, backward; on the
    writer's thread, beside these: copy, write, record, recorded.
    done, total: progress of the stage in `unit`s (0, 0 when unknown). data: figures for machines (JSON types only).
    """

    kind: str
    stage: str = ""
    layer: int = -1
    layers: int = 0
    done: int = 0
    total: int = 0
    unit: str = ""
    text: str = ""
    data: dict[str, object] = field(default_factory=dict)


Progress = Callable[[Event], None]
Tick = Callable[[int], None]  # so many more tokens (or experts) of a stage are through


def ignore(event: Event) -> None:
    """A progress callback for those who do not watch."""


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor of a safetensors file, as its header states it.

    dtype: safetensors' own name ("BF16", "F32", "I32", ...); shape: sizes, outermost first;
    start_byte, end_byte: absolute offsets in the file; shard: the file's name inside the checkpoint folder.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start_byte: int
    end_byte: int

    @property
    def size_bytes(self) -> int:
        return self.end_byte - self.start_byte


class Beside(NamedTuple):
    """What rows are given to a layer with beside their states: their ids, None where no layer takes them, and what the
    layer before handed on; calls: of a row with images its own model/calls.Calls, None of text.
    """

    token_RT: Tensor | None
    carried: tuple[Tensor | None, ...]
    calls: Any = None


ALONE = Beside(None, ())


@dataclass(frozen=True)
class Rows:
    """Full rows of tokens on their way through the layers; only the hidden states change from layer to layer.

    token_RT: int64 ids; hidden_RTD: as the model has them, [R, T, ...] where its stream is wider, on the host; carried:
    what each layer hands on beside, [R, ...] each, None where a layer had nothing; calls: by row with images, see
    Beside.
    """

    token_RT: Tensor
    hidden_RTD: Tensor
    carried: list[Tensor | None] = field(default_factory=list)
    calls: Mapping[int, Any] = field(default_factory=dict)

    def beside(self, place: slice, device: torch.device) -> Beside:
        """What some rows are given to a layer with: one of `batches`."""
        carried = tuple(None if value is None else value[place].to(device) for value in self.carried)
        return Beside(self.token_RT[place].to(device), carried, self.calls.get(place.start))

    def batches(self, size: int) -> list[slice]:
        """Places of rows that go through a layer at one time: at most `size`, a row with images by itself."""
        places: list[slice] = []
        for row in range(len(self.token_RT)):
            last = places[-1] if places else None
            if last and last.stop - last.start < size and row not in self.calls and last.start not in self.calls:
                places[-1] = slice(last.start, row + 1)
            else:
                places.append(slice(row, row + 1))
        return places

    def carry_(self, place: slice, handed: Sequence[Tensor | None]) -> None:
        """Keep what some rows are handed on with, for the next layer."""
        for number, value in enumerate(handed):
            kept = self.carried[number] if number < len(self.carried) else None
            if value is not None and (kept is None or kept.shape[1:] != value.shape[1:]):
                kept = value.new_empty(len(self.hidden_RTD), *value.shape[1:], device="cpu")
            self.carried[number : number + 1] = [kept if value is not None else None]
            if value is not None and kept is not None:
                kept[place] = value.to("cpu")


class Placement(StrEnum):
    """Where the expert inputs of a layer are kept until it is solved; in files all hidden states lie too."""

    DEVICE = "device"  # on every worker's device
    HOST = "host"  # in host memory; each chunk of experts copies its own
    FILE = "file"  # in a file mapped into memory, likewise


@dataclass(frozen=True)
class Batches:
    """Sizes fixed at a run's first start, so that a resumed run repeats them.

    rows: rows per attention batch; tokens: tokens per expert batch, of all workers; experts: experts of a worker whose
    moments exist at one time; inputs: where expert inputs are kept.
    """

    rows: int
    tokens: int
    experts: int
    inputs: Placement = Placement.DEVICE


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of one input site, for a stack of experts: fp32 sums, never means.

    hessian_EKK: sum of w x x^T; weight_E: sum of w; count_E: tokens (int64); energy2_E: sum of (w |x|^2)^2;
    gap_ENK: sum of w y x^T, y what the site's output lacks of what the source's residual stream has, or None;
    gap2_EN: sum of w y^2.
    """

    hessian_EKK: Tensor
    weight_E: Tensor
    count_E: Tensor
    energy2_E: Tensor
    gap_ENK: Tensor | None = None
    gap2_EN: Tensor | None = None

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            hessian_EKK=self.hessian_EKK + other.hessian_EKK,
            weight_E=self.weight_E + other.weight_E,
            count_E=self.count_E + other.count_E,
            energy2_E=self.energy2_E + other.energy2_E,
            gap_ENK=_add(self.gap_ENK, other.gap_ENK),
            gap2_EN=_add(self.gap2_EN, other.gap2_EN),
        )


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None and second is None:
        return None
    if first is None or second is None:
        raise ValueError("moments with and without a gap cannot be merged")
    return first + second


@dataclass(frozen=True)
class QuantizedGroup:
    """Codes and scales of a stack of expert projections that share one input site. Knows no storage format.

    codes_ENK: int8, of `bits` bits; scale_ENG: fp32 values that the format holds exactly.
    """

    codes_ENK: Tensor
    scale_ENG: Tensor
    bits: int = 4


@dataclass(frozen=True, kw_only=True)
class ProjectionStatistics:
    """One row of quant_log.csv: one projection of one expert."""

    layer: int
    expert: int
    projection: str
    method: Method
    weight_error: float  # |W - Wq|_F / |W|_F
    relative_error: float  # of the output: tr(Err H Err^T) / tr(W H W^T), own mean H (the pool when no token came)
    error_over_rtn: float  # tr(Err H' Err^T) over that of round-to-nearest, H' shrunk and damped
    target: Target
    gptqmodel_loss: float | None  # what GPTQModel 7.7 logs when tokens are unweighted; None without tokens
    tokens: int
    effective_tokens: float
    damping: float
    passes: int
    scale_min: float  # of the magnitudes
    scale_max: float
    scale_negative_share: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StreamDrift:
    """How far the release stream is from the source stream after one layer, on the held-out rows.

    hidden_error: |release - source|_F / |source|_F of the hidden states after the layer;
    router_agreement: share of a token's top-k experts that both streams chose (None for a layer without experts).
    """

    layer: int
    hidden_error: float
    router_agreement: float | None


@dataclass(frozen=True)
class LayerResult:
    """A solved layer: what goes to disk, and what the release stream multiplies by from here on.

    tensors: final tensor names -> packed tensors; gate_up_ENK, down_ENK: dequantized from exactly those tensors, in
    the compute dtype (None of them is written); projections: a row of the log each; seconds: by stage; chunk: experts
    that were solved at a time at the end, 0 where there was nothing to solve; guided: by input site, what the errors of
    a few experts cost in the metric of their rows, with guidance and without it.
    """

    tensors: dict[str, Tensor]
    gate_up_ENK: Tensor | None
    down_ENK: Tensor | None
    projections: tuple[ProjectionStatistics, ...]
    seconds: dict[str, float]
    chunk: int
    guided: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the journal keeps of a written shard; added after the shard is durable.

    layer: the decoder layer in it, -1 for a shard of the rest; sha256: of the file; source_digest: sha256 of the
    source tensors' bytes as they were read; projections: rows of quant_log.csv; seconds: by stage; guided: by input
    site, the share of the error that guidance left, measured on a few experts.
    """

    shard: str
    layer: int
    size_bytes: int
    sha256: str
    source_digest: str
    seconds: dict[str, float] = field(default_factory=dict)
    projections: tuple[ProjectionStatistics, ...] = ()
    guided: dict[str, float] = field(default_factory=dict)
