"""A release as GGUF: which tensors the file has, and what it says of itself. docs/formats.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fourfold
from fourfold.core.pack import pack_codes, unpack_codes
from fourfold.datatypes import FourfoldError, shortened
from fourfold.formats import gguf
from fourfold.formats.fixed import unsupported
from fourfold.formats.format import Shape
from fourfold.formats.gguf import GgufTensor
from fourfold.formats.gguf_names import ARCHITECTURES, ENDS, EXPERTS, WIDE, Architecture, Row, settings
from fourfold.formats.gguf_tokenizer import read_tokenizer
from fourfold.model.config import CONFIG
from fourfold.model.family import PROJECTIONS
from fourfold.model.stored import StoredWeight
from fourfold.release.conversion import Job
from fourfold.release.stacks import Quantized, Stack, dequantized, read_part

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
FUSED = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")
MMPROJ = "python convert_hf_to_gguf.py --mmproj {folder} (of llama.cpp, on the release) writes the file for images"


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What a tensor of blocks is made from. parts: experts of a stack, or one module, of which it is `row`."""

    parts: tuple[StoredWeight, ...]
    row: Row | None


class GgufPlan:
    """Everything about the file but its bytes. Raises FourfoldError for what llama.cpp has no name or code for.

    placed: tensors that hold codes and scales unchanged, by name; rounded: modules whose codes cannot be moved exactly.
    """

    def __init__(self, job: Job, quantized: Quantized, *, rest: str, mtp: bool) -> None:
        self.job, self.rest, self.mtp = job, rest, mtp
        self.placed: dict[str, Placed] = {}
        self.rounded: list[str] = []
        model_type = job.out.family.model_type
        if model_type not in ARCHITECTURES:
            raise FourfoldError(
                f"{job.out.folder}: model_type: got {model_type!r}, expected one that --format gguf has a table of "
                f"names for: {', '.join(ARCHITECTURES)}"
            )
        self.architecture = ARCHITECTURES[model_type]
        _check_settings(job, self.architecture)
        first = quantized.stacks[0].first.name
        self.prefix = first[: first.index("layers.")]  # of the text model on disk
        kept = [name for name in job.out.kept if not name.startswith(self.architecture.skipped or ("\0",))]
        self.vision = len(kept) < len(job.out.kept)
        self.drafts = len({block for name in kept if (block := self._draft_block(name)) is not None}) if mtp else 0
        self.tensors = [self._stack(stack) for stack in quantized.stacks if self._is_wanted(stack.first.name)]
        for module in quantized.modules:
            if self._is_wanted(module.name):
                self.tensors += self._module(module)
        experts: dict[tuple[int, str], dict[int, str]] = {}
        for name in filter(self._is_wanted, kept):
            if (match := EXPERT.fullmatch(name)) and match[3] in PROJECTIONS:
                block = self._draft_block(name)
                assert block is not None, name
                experts.setdefault((block, match[3]), {})[int(match[2])] = name
            else:
                self.tensors += self._kept(name)
        for (block, part), names in experts.items():
            self.tensors.append(self._draft_stack(block, part, [names[expert] for expert in sorted(names)]))
        self.tensors.sort(key=lambda one: _order(one.name))
        self.keys = self._keys()

    # --- tensors ----------------------------------------------------------------------------------------------------

    def _is_wanted(self, name: str) -> bool:
        """Whether a tensor or module on disk is in the file."""
        tied = self.job.out.text.tie_word_embeddings and name.startswith("lm_head.")
        skipped = name.startswith(self.architecture.skipped or ("\0",))
        return not (skipped or tied or (self._is_draft(name) and not self.mtp))

    def _is_draft(self, name: str) -> bool:
        one, layers = self.architecture, self.job.out.layers
        if one.draft:
            return name.startswith(one.draft)
        match = re.match(rf"{re.escape(self.prefix)}layers\.(\d+)\.", name)
        return match is not None and int(match[1]) >= layers

    def _draft_block(self, name: str) -> int | None:
        """The block of a draft layer's tensor, None for others; what is beside the layers goes with the first."""
        if not self._is_draft(name):
            return None
        match = re.search(r"layers\.(\d+)\.", name)
        number = int(match[1]) if match else 0
        return number + self.job.out.layers if self.architecture.draft else number

    def _kept(self, name: str) -> Iterator[GgufTensor]:
        block, _ = self._place(name)
        header = self.job.out.disk.header(name)
        if (fused := FUSED.fullmatch(name)) and len(header.shape) == 3:  # of a draft head, as another tool left it
            parts = PROJECTIONS[:2] if fused[1] == "gate_up_proj" else PROJECTIONS[2:]
            for place, part in enumerate(parts):
                rows = header.shape[1] // len(parts)
                shape = (header.shape[0], rows, header.shape[2])
                make = partial(self._rows, name, slice(place * rows, (place + 1) * rows))
                yield self._matrix(f"blk.{block}.{EXPERTS[part]}.weight", shape, header.dtype, make)
            return
        for full, row in self._named(name):
            make = partial(self._changed, partial(self._read, name), row)
            yield self._float(full, row, self._shape(header.shape, row), header.dtype, make)

    def _module(self, part: StoredWeight) -> Iterator[GgufTensor]:
        """A module with codes: blocks of them, if what llama.cpp wants otherwise only moves blocks of one scale."""
        shape = part.outputs, part.inputs
        for full, row in self._named(f"{part.name}weight"):
            changed = self._shape(shape, row)
            if row.name not in WIDE and self._keeps_blocks(part, row):
                self.placed[full] = Placed(parts=(part,), row=row)
                yield GgufTensor(
                    name=full, shape=changed, kind=gguf.KINDS[part.bits], make=partial(self._blocks, part, row)
                )
                continue
            make = partial(self._changed, lambda: torch.cat([*dequantized(self.job, part)]), row)
            found = self._float(full, row, changed, "BF16", make)
            if found.kind != "F32":
                self.rounded.append(part.name.rstrip("."))
            yield found

    def weights(self, placed: Placed, part: StoredWeight) -> Iterator[Tensor]:
        """Yield OUT's weights of a part in the order that the file has, fp32; a module's in slabs of rows."""
        slabs = dequantized(self.job, part)
        if placed.row is not None and not placed.row.changes:
            yield from slabs
            return
        whole = torch.cat([*slabs])
        yield whole if placed.row is None else self._changed(lambda: whole, placed.row)

    def _named(self, name: str) -> Iterator[tuple[str, Row]]:
        """What a tensor on disk becomes, by the names in the file."""
        block, below = self._place(name)
        for row in self._rows_of(name, block, below):
            yield row.name if block is None else f"blk.{block}.{row.name}", row

    def _float(self, name: str, row: Row, shape: Shape, dtype: str, make: Callable[[], Tensor]) -> GgufTensor:
        if len(shape) == 1 or row.name in WIDE:
            return GgufTensor(name=name, shape=shape, kind="F32", make=partial(_as, name, make, "F32"))
        return self._matrix(name, shape, dtype, make)

    def _keeps_blocks(self, part: StoredWeight, row: Row) -> bool:
        """Whether codes and scales can be moved as weights are: each block of the result has one scale."""
        if not row.changes:
            return True
        if not row.only_moves:
            return False
        group_K = torch.arange(part.groups, dtype=torch.int32).repeat_interleave(part.group_size)
        changed_NK = self._changed(lambda: group_K.expand(part.outputs, -1), row)
        if changed_NK.shape[1] % gguf.BLOCK:
            return False
        block_NBJ = changed_NK.unflatten(1, (-1, gguf.BLOCK))
        return bool((block_NBJ == block_NBJ[..., :1]).all())

    def _blocks(self, part: StoredWeight, row: Row) -> Tensor:
        words, scale_NG = read_part(self.job, part)
        if not row.changes:
            return gguf.blocks(words, scale_NG, part.bits)
        codes_NK = self._changed(lambda: unpack_codes(words, part.bits), row)
        scale_NK = self._changed(lambda: scale_NG.half().repeat_interleave(part.group_size, dim=1), row)
        return gguf.blocks(pack_codes(codes_NK, part.bits), scale_NK[:, :: gguf.BLOCK], part.bits)

    def _place(self, name: str) -> tuple[int | None, str]:
        """The block that a tensor goes to, None for one outside of them, and its name below it."""
        one = self.architecture
        for prefix, shift in ((f"{self.prefix}layers.", 0), (f"{one.draft}layers.", self.job.out.layers)):
            if prefix != "layers." and (match := re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.*)", name)):
                return int(match[1]) + shift, match[2]
        if one.draft and name.startswith(one.draft):
            return self.job.out.layers, name.removeprefix(one.draft)
        return None, name.removeprefix(self.prefix)

    def _rows_of(self, name: str, block: int | None, below: str) -> tuple[Row, ...]:
        one = self.architecture
        if block is None:
            ends = {f"{end}.weight": Row(name=f"{to}.weight") for end, to in (ENDS | {"lm_head": "output"}).items()}
            ends["norm.weight"] = Row(name="output_norm.weight", changes=one.norm)
            rows: tuple[Row, ...] = (ends[below],) if below in ends else ()
        else:
            beside = one.draft and name.startswith(one.draft) and not name.startswith(f"{one.draft}layers.")
            rows = (one.draft_ends if beside else one.layer).get(below, ())
        if not rows:
            raise FourfoldError(
                f"{self.job.out.folder}: {name}: llama.cpp has no name for it in {one.name}, expected the tensors of "
                f"a plain {self.job.out.family.model_type}. This model cannot be written as GGUF"
            )
        return rows

    def _shape(self, shape: Shape, row: Row) -> Shape:
        """Of the changed tensor, from one without values."""
        return tuple(self._changed(lambda: torch.empty(shape, device="meta"), row).shape)

    def _matrix(self, name: str, shape: tuple[int, ...], dtype: str, make: Callable[[], Tensor]) -> GgufTensor:
        kind = gguf.RESTS[self.rest] or dtype
        if kind not in ("BF16", "F16", "F32", "Q8_0"):
            raise FourfoldError(f"{self.job.out.folder}: {name} is {dtype}, expected BF16, F16 or F32")
        if kind == "Q8_0" and shape[-1] % gguf.BLOCK:
            raise FourfoldError(
                f"--rest: got q8_0, expected bf16: {name} has {shape[-1]} inputs, no multiple of {gguf.BLOCK}"
            )
        return GgufTensor(name=name, shape=shape, kind=kind, make=partial(_as, name, make, kind))

    def _changed(self, read: Callable[[], Tensor], row: Row) -> Tensor:
        value = read()
        for change in row.changes:
            value = change(value, self.job.out.text)
        return value

    def _read(self, name: str) -> Tensor:
        value = self.job.out.disk.read(name)
        self.job.tick(value.nbytes)
        return value

    def _rows(self, name: str, place: slice) -> Tensor:
        return self._read(name)[:, place]

    def _stack(self, stack: Stack) -> GgufTensor:
        count, outputs, inputs, _ = stack.sizes
        block, _ = self._place(stack.first.name)
        name = f"blk.{block}.{EXPERTS[stack.projection]}.weight"
        self.placed[name] = Placed(parts=stack.parts, row=None)
        make, kind = partial(_stacked, self.job, stack), gguf.KINDS[stack.first.bits]
        return GgufTensor(name=name, shape=(count, outputs, inputs), kind=kind, make=make)

    def _draft_stack(self, block: int, part: str, names: list[str]) -> GgufTensor:
        header = self.job.out.disk.header(names[0])

        def make() -> Tensor:
            return torch.stack([self._read(name) for name in names])

        return self._matrix(f"blk.{block}.{EXPERTS[part]}.weight", (len(names), *header.shape), header.dtype, make)

    # --- what the file says of itself -------------------------------------------------------------------------------

    def _keys(self) -> tuple[dict[str, Any], Any]:
        """Metadata, and the tokenizer's special tokens. Raises FourfoldError for a tokenizer that
        llama.cpp does not have.
        """
        job, skeleton, one = self.job, self.job.out, self.architecture
        described = settings(
            one,
            skeleton.text,
            experts=skeleton.experts,
            topk=skeleton.topk,
            width=skeleton.widest.width,
            dense=skeleton.routed[0],
            drafts=self.drafts,
        )
        tokens, special = read_tokenizer(job.out.folder, skeleton.vocabulary, one.special)
        return _general(job, self.name) | {
            "fourfold.rest": self.rest, **{f"{one.name}.{key}": value for key, value in described.items()}, **tokens,
        }, special  # fmt: skip

    def write(self, folder: Path, *, shard_bytes: int) -> None:
        """Write the file or its shards into a folder."""
        keys, special = self.keys
        file = folder / f"{self.name}-{gguf.Q4_0}.gguf"
        gguf.write_file(file, self.architecture.name, keys, special, self.tensors, shard_bytes)

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self.tensors)

    @property
    def name(self) -> str:
        """Of the model, as general.name and in the file's name."""
        hub = self.job.release and self.job.release.state.source.hub
        return str(hub).partition("@")[0].rpartition("/")[2] if hub else self.job.out.folder.resolve().name

    def notes(self) -> tuple[str, ...]:
        said = []
        if self.vision:
            said.append("text only: " + MMPROJ.format(folder=self.job.out.folder))
        if self.rest != "bf16":
            said.append(f"matrices without codes were rounded to {self.rest}: not exact, codes and scales alone are")
        if self.rounded:
            said.append(
                f"{len(self.rounded):,} modules with codes were dequantized and rounded to {self.rest}, as llama.cpp's "
                f"order of their weights divides groups: {shortened(self.rounded)}"
            )
        if self.job.group_size > gguf.BLOCK:
            said.append(
                f"a GGUF is no larger with groups of {gguf.BLOCK} than with these of {self.job.group_size}: "
                "`fourfold quantize --recipe gguf` makes them"
            )
        return tuple(said)


def _as(name: str, make: Callable[[], Tensor], kind: str) -> Tensor:
    value = make()
    found = gguf.to_kind(value, kind)
    if kind == "F16" and (lost := int((found.isinf() & ~value.isinf()).sum())):
        raise FourfoldError(f"--rest: got f16, expected bf16 or q8_0: {lost:,} values of {name} are too large for FP16")
    return found


def _stacked(job: Job, stack: Stack) -> Tensor:
    count, outputs, inputs, _ = stack.sizes
    row_bytes = inputs // gguf.BLOCK * gguf.block_bytes(stack.first.bits)
    block_ENB = torch.empty(count, outputs, row_bytes, dtype=torch.uint8)
    for expert, part in enumerate(stack.parts):
        block_ENB[expert] = gguf.blocks(*read_part(job, part), part.bits)
    return block_ENB


def _order(name: str) -> tuple[int, int, str]:
    """Embeddings, blocks by number, the output head: as a loader reads them."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (1, int(match[1]), name) if match else (0 if name.startswith("token") else 2, 0, name)


def _check_settings(job: Job, one: Architecture) -> None:
    path, skeleton = job.out.folder / CONFIG, job.out
    fixed = one.fixed if one.grouped else {**one.fixed, "num_key_value_heads": skeleton.text.num_attention_heads}
    if problem := unsupported(skeleton.text, fixed):
        raise FourfoldError(f"{path}: {problem}: llama.cpp computes {one.name} in this way alone")
    dense = [layer for layer in range(skeleton.layers) if not skeleton.is_routed(layer)]
    if dense and not (one.dense_layers and dense == list(range(len(dense)))):
        where = "after the first layers" if one.dense_layers else "anywhere"
        raise FourfoldError(
            f"{path}: layer {dense[-1]} has no routed experts, expected none such {where}: llama.cpp's {one.name} "
            "cannot express it. Use another format"
        )


def _general(job: Job, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.quantized_by": f"fourfold {fourfold.__version__}",
        "general.file_type": gguf.MOSTLY_Q4_0,
        "general.quantization_version": gguf.QUANTIZATION_VERSION,
        "fourfold.version": fourfold.__version__,
        "fourfold.group_size": job.group_size,
    }
    if job.release is None:
        return found
    state = job.release.state
    if licence := state.source.terms.get("license"):
        found["general.license"] = str(licence)
    if hub := state.source.hub:
        owner, _, base = hub.partition("@")[0].rpartition("/")
        found |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": base,
            "general.base_model.0.organization": owner,
            "general.base_model.0.repo_url": f"https://huggingface.co/{owner}/{base}",
        }
    found |= {"fourfold.content": job.content, "fourfold.source": state.identity.source}
    if "kl_mean" in state.metrics:
        found["fourfold.kl_mean"] = float(state.metrics["kl_mean"])
    return found
