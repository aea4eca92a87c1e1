"""Any checkpoint, whoever made it: what is quantized and how, its draft head, engines, traps. docs/releases.md."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourfold import formats
from fourfold.datatypes import FourfoldError, TensorHeader
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.config import quantization, read_config
from fourfold.model.family import kept_group
from fourfold.model.sources import SourceIndex, layout_problems, open_source, weights_kind
from fourfold.model.stored import StoredWeight
from fourfold.quantize.advice import format_advice, tensor_parallel_advice, width_advice
from fourfold.quantize.claims import GROUPS
from fourfold.quantize.journal import FINISHED, STATE
from fourfold.release.peer_faults import DRAFT, index_faults, quantized_draft, rounded_norms, zero_experts
from fourfold.release.verify.rules import config_problems, linear_modules
from fourfold.serve.command import Deployment, smallest
from fourfold.serve.engines import DRAFTS_BY_NAME, ENGINES, KERNEL_ISSUES
from fourfold.serve.machine import MACHINES, Machine
from fourfold.serve.served import Served, describe

SOLD = [Machine.of(count, gib, (8, 6), 64 * 2**30) for count, gib in MACHINES]
NO_DRAFT = "config.json names a draft head that is not there: vLLM starts with MTP all the same and accepts 0 drafts"
TRANSFORMERS_BF16 = "loads it as any BF16 model; the draft head is ignored"


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """Tensors of one part of the model. stored: what they are kept as, most bytes first."""

    group: str
    tensors: int
    projections: int
    size_bytes: int
    stored: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """How projections are stored. method: config.json's word; by_group: how many are in which group of tensors;
    by_width: the same of each width, "int4" or "int8"; group_sizes: of inputs that share a scale; looked_at:
    projections whose values were read; of these: negative, share of scales below zero; rounded, of scales that a BF16
    engine rounds.
    """

    method: str
    format: str
    projections: int
    by_group: Mapping[str, int]
    by_width: Mapping[str, Mapping[str, int]]
    group_sizes: tuple[int, ...]
    scale_dtypes: tuple[str, ...]
    looked_at: int
    negative: float
    rounded: float


@dataclass(frozen=True, kw_only=True)
class EngineRow:
    """Whether an engine takes it. gpus: the smallest machine of MACHINES that it fits, "" where it does not."""

    engine: str
    takes: bool
    gpus: str
    command: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """draft: layout of the draft head's experts, "fused" or "per expert"; "" without one. made_by: what its files say.
    engines: empty where the model or its quantization is not known, `unknown` says why then.
    """

    folder: str
    model_type: str
    tensors: int
    shards: int
    size_bytes: int
    groups: tuple[GroupRow, ...]
    quantized: Quantized | None
    draft: str
    draft_bytes: int
    made_by: str
    engines: tuple[EngineRow, ...]
    unknown: str
    traps: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect(folder: Path) -> Inspection:
    """Look at a checkpoint: config.json, headers, norms, one expert of each layer, a few bytes of every expert.

    Raises FourfoldError for a folder that holds no safetensors checkpoint; what is unusual about one that does, a model
    or a quantization that is not known too, is said in the result.
    """
    raw = read_config(folder)
    unknown = _why_unread(raw, folder)
    stored = open_source(folder, {} if unknown else raw)
    index = stored.disk
    traps = list(_traps_of_files(folder))
    sample = _Sample.of(stored)
    traps += sample.problems
    draft = _draft_layout(index.headers)
    traps += filter(None, _traps_of_quantizers(folder, raw, stored, draft))
    engines: tuple[EngineRow, ...] = ()
    if problem := stored.group_size_problem():
        traps.append(f"{problem}: engines stop, or multiply by the wrong scales")
        unknown = "config.json does not fit the scales"
    if not unknown and stored.kind and stored.format is None:
        unknown = f"{stored.kind}: known is which engines take int4 and BF16"
    if not unknown:
        try:
            checkpoint = Checkpoint.open(folder)
            served = describe(checkpoint)
        except FourfoldError as error:
            unknown = str(error)
        else:
            engines = tuple(_engines(served))
            traps += _traps(checkpoint, served, draft)
    return Inspection(
        folder=str(folder),
        model_type=str(raw.get("model_type")),
        tensors=len(index.headers),
        shards=len({header.shard for header in index.headers.values()}),
        size_bytes=sum(header.size_bytes for header in index.headers.values()),
        groups=tuple(_groups(stored)),
        quantized=_quantized(stored, sample),
        draft=draft,
        draft_bytes=sum(header.size_bytes for name, header in index.headers.items() if _in_draft(name)),
        made_by=_maker(folder, raw),
        engines=engines,
        unknown=unknown,
        traps=tuple(traps),
    )


def _why_unread(raw: Mapping[str, Any], folder: Path) -> str:
    """Why its format is not read; "" where it is."""
    try:
        weights_kind(raw, folder)
    except FourfoldError as error:
        return str(error)
    return ""


def _maker(folder: Path, raw: Mapping[str, Any]) -> str:
    """Who made it, by what lies there."""
    if (folder / FINISHED).is_file():
        return "fourfold"
    if (folder / STATE).is_dir():
        return "fourfold, not finished"
    meta = quantization(raw).get("meta")
    maker = meta.get("quantizer") if isinstance(meta, dict) else None
    return ", ".join(map(str, maker)) if isinstance(maker, list) else str(maker or "")


# --- what is stored -----------------------------------------------------------------------------------------------


def _in_draft(name: str) -> bool:
    return name.startswith(DRAFT)


def _draft_layout(headers: Mapping[str, TensorHeader]) -> str:
    draft = [name for name in headers if _in_draft(name)]
    fused = any(name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")) for name in draft)
    return "" if not draft else "fused" if fused else "per expert"


def _group(name: str) -> str:
    """The group of quantize/claims.GROUPS that a tensor is in, by its name."""
    if ".experts." in name and not _in_draft(name):
        return "experts"
    return kept_group(name)[0]


def _groups(stored: SourceIndex) -> Iterator[GroupRow]:
    parts = {part.name: _width(stored, one.bits) for one in stored.projections.values() for part in one.parts.values()}
    members: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    for name, header in stored.disk.headers.items():
        group = _group(name)
        kind = parts.get(name, header.dtype)
        sizes = members.setdefault(group, {})
        sizes[kind] = sizes.get(kind, 0) + header.size_bytes
        counts[group] = counts.get(group, 0) + 1
    projections = _by_group(stored.projections)
    for group in GROUPS:
        if group in members:
            sizes = members[group]
            yield GroupRow(
                group=group,
                tensors=counts[group],
                projections=projections.get(group, 0),
                size_bytes=sum(sizes.values()),
                stored=tuple(sorted(sizes, key=lambda kind: -sizes[kind])),
            )


def _by_group(projections: Iterable[str]) -> dict[str, int]:
    return dict(Counter(map(_group, projections)))


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Values of one projection of each kind in each layer. scales: how many; of these, below zero; no BF16 values."""

    looked_at: int
    scales: int
    negative: int
    rounded: int
    problems: tuple[str, ...]

    @classmethod
    def of(cls, stored: SourceIndex) -> _Sample:
        looked_at = scales = negative = rounded = 0
        odd: list[str] = []
        for projection in _first_of_each(stored) if stored.format else ():
            assert stored.format is not None
            tensors = stored.read_parts(projection)
            scale = tensors[stored.format.scales].float()
            scales += scale.numel()
            negative += int((scale < 0).sum())
            rounded += int((scale.to(torch.bfloat16).float() != scale).sum())
            problems = list(layout_problems(tensors, projection, stored.format))
            odd += [f"{projection.name.rstrip('.')}: {problem}" for problem in problems]
            looked_at += 1
        more = f" (the same in {len(odd) - 1:,} more of {looked_at:,} that were looked at)" if len(odd) > 1 else ""
        found = [f"{odd[0]}{more}; convert and verify do not take it"] if odd else []
        if rounded:
            found.append(
                f"{rounded / scales:.0%} of the scales are no BF16 values: a BF16 engine rounds them, so that "
                "what it runs is not what was measured; `fourfold convert` rounds them once, and says by how much"
            )
        return cls(looked_at=looked_at, scales=scales, negative=negative, rounded=rounded, problems=tuple(found))


def _first_of_each(stored: SourceIndex) -> list[StoredWeight]:
    """One projection for each name that is left without numbers of experts."""
    seen: dict[str, StoredWeight] = {}
    for name, projection in stored.projections.items():
        head, mark, tail = name.partition(".experts.")
        seen.setdefault(head + mark + tail.partition(".")[2] if mark else name, projection)
    return list(seen.values())


def _quantized(stored: SourceIndex, sample: _Sample) -> Quantized | None:
    if not stored.projections:
        return None
    widths = sorted({one.bits for one in stored.projections.values()})
    return Quantized(
        method=str(stored.settings.get("quant_method")),
        format=stored.format.name if stored.format else stored.kind,
        projections=len(stored.projections),
        by_group=_by_group(stored.projections),
        by_width={
            _width(stored, bits): _by_group(name for name, one in stored.projections.items() if one.bits == bits)
            for bits in widths
        },
        group_sizes=tuple(sorted({projection.group_size for projection in stored.projections.values()})),
        scale_dtypes=tuple(sorted({_scales(stored, one).dtype for one in stored.projections.values()})),
        looked_at=sample.looked_at,
        negative=sample.negative / max(sample.scales, 1),
        rounded=sample.rounded / max(sample.scales, 1),
    )


def _width(stored: SourceIndex, bits: int) -> str:
    return f"int{bits}" if stored.format or stored.kind == "AWQ" else f"fp{bits}"


def _scales(stored: SourceIndex, one: StoredWeight) -> TensorHeader:
    return one.parts[stored.format.scales if stored.format else "scales"]


# --- who takes it -------------------------------------------------------------------------------------------------


def _engines(served: Served) -> Iterator[EngineRow]:
    for engine in ENGINES.values():
        machine, command = smallest(served, SOLD, Deployment(engine=engine.name))
        takes = not command.problems
        yield EngineRow(
            engine=f"{engine.title} {'.'.join(map(str, command.version))}",
            takes=takes,
            gpus=f"{len(machine.gpus)} x {machine.gpus[0].total_bytes >> 30} GiB" if takes else "",
            command=command.text() if takes else "",
            notes=(*command.problems, *command.notes, *(_kernel_notes(engine.name) if served.format else ())),
        )
    form = served.format
    takes, said = (form.transformers_loads, form.transformers_note) if form else (True, TRANSFORMERS_BF16)
    yield EngineRow(engine="transformers", takes=takes, gpus="", command="", notes=(said,))


def _kernel_notes(engine: str) -> list[str]:
    """Known issues of its int4 expert kernels, of any GPU: the one that will serve may not be here."""
    return [str(issue) for issue in KERNEL_ISSUES if issue.engine == engine]


# --- traps --------------------------------------------------------------------------------------------------------


def _traps_of_files(folder: Path) -> Iterator[str]:
    """Of what lies beside the weights."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        yield f"{pickles[0]} lies beside the safetensors: loading a pickle can run any code; nothing here reads it"
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        yield "no tokenizer: engines do not start without one"


def _traps_of_quantizers(folder: Path, raw: Mapping[str, Any], stored: SourceIndex, draft: str) -> Iterator[str]:
    """Known faults of other makers' files. "" for none."""
    yield from index_faults(folder)
    yield rounded_norms(stored)
    yield zero_experts(stored.projections, stored)
    if (raw.get("text_config") or raw).get("mtp_num_hidden_layers") and not draft:
        yield NO_DRAFT
    if not (folder / FINISHED).is_file():
        yield quantized_draft(stored)


def _traps(stored: Checkpoint, served: Served, draft: str) -> Iterator[str]:
    """Of how it is quantized, for engines that would load it."""
    if stored.format is None or not stored.projections:
        return
    if stored.settings.get("quant_method") == stored.format.method:
        said = config_problems(
            stored.format,
            stored.settings,
            served.group_size,
            quantized=stored.quantized_modules,
            kept=linear_modules({name: header.shape for name, header in stored.kept.items()}),
            draft=bool(draft),
            tied=bool(stored.blueprint.model.all_tied_weights_keys),
        )
        yield from (f"quantization_config: {problem}" for problem in said)
    in_int4 = any(_in_draft(name) and ".experts." in name and one.bits == 4 for name, one in stored.projections.items())
    if served.drafts_by_name:
        yield DRAFTS_BY_NAME
    if served.group_size:
        yield from tensor_parallel_advice(served.expert_width, served.group_size, stored.format)
        yield from format_advice(stored, bool(draft), stored.format, in_int4)
    yield from width_advice({name: bits for name, (bits, _) in stored.quantized_modules.items()})
    if draft and not in_int4 and not stored.format.sglang_drafts:
        fix = f"`fourfold convert OUT NEW --format {formats.DRAFTS_IN_SGLANG}` makes a release whose drafts"
        if draft == "fused":
            yield (
                "draft experts in one stack: SGLang stops at KeyError 'model.layers.0.mlp.experts.w2_weight' if it "
                f"drafts; {fix} it loads"
            )
        else:
            yield f"{fix} SGLang loads"
    yield from filter(None, (stored.format.vllm_cpu, stored.format.sglang_note))
