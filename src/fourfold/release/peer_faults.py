"""Known faults of quantizers: rounded norms, experts that are zeros or RTN, a lost or quantized draft head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fourfold.formats.format import Format
from fourfold.model.headers import INDEX_NAME
from fourfold.model.sources import SourceIndex
from fourfold.model.stored import StoredWeight

PROBED_BYTES = 512  # of a weight that may be zeros, before all of it is read
DISTINCT = 8  # values of a norm that tell rounding from chance: half of them are lost with each
RTN_SHARE = 0.995  # of weights within half a step of the source's: GPTQ moves more than that to other codes
DRAFT = "mtp."
NORMS = (
    "norm weights hold 1 + w rounded to BF16, less 1 (llm-compressor 0.14 on Qwen3.5, Qwen3.6, Qwen3-Next): copy them "
    "from the source"
)


def index_faults(folder: Path) -> Iterator[str]:
    """Of the index beside the shards."""
    with suppress(OSError, ValueError):
        content = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        metadata = content.get("metadata") if isinstance(content, dict) else None
        if isinstance(metadata, dict) and metadata.get("total_size") == 0:
            yield f"{INDEX_NAME}: total_size is 0: the Hub and loaders that plan memory by it see an empty model"


def is_norm(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 and "norm" in name and name.endswith("weight")


def is_rounded_norm(value_D: Tensor, source_D: Tensor | None = None) -> bool:
    """Whether a norm is the source's rounded about 1; without a source: whether all its values are such."""
    value_D = value_D.float()
    about_D = value_D if source_D is None else source_D.float()
    rounded_D = (1 + about_D).bfloat16().float() - 1
    if source_D is None and len(value_D[value_D != 0].unique()) < DISTINCT:
        return False
    return torch.equal(rounded_D.to(torch.bfloat16).float(), value_D)


def rounded_norms(stored: SourceIndex) -> str:
    """Norms of a checkpoint whose values are all multiples of BF16's step about 1."""
    norms = [name for name, header in stored.kept.items() if is_norm(name, header.shape) and header.dtype == "BF16"]
    found = [name for name in norms if is_rounded_norm(stored.disk.read(name))]
    return f"{len(found):,} of {len(norms):,} {NORMS} ({found[0]})" if found else ""


def zero_experts(weights: Mapping[str, StoredWeight], stored: SourceIndex) -> str:
    """Quantized weights of experts that are zero. A few bytes of each are read, and the whole of those alike."""
    experts = [name for name in weights if ".experts." in name]
    found = [name for name in experts if _is_suspect(weights[name], stored) and is_zero(weights[name], stored)]
    if not found:
        return ""
    return f"{len(found):,} of {len(experts):,} projections of experts are zeros ({found[0].rstrip('.')})"


def _is_suspect(weight: StoredWeight, stored: SourceIndex) -> bool:
    for part in weight.parts.values():
        probe = bytearray(min(PROBED_BYTES, part.size_bytes))
        stored.disk.read_range(part.name, 0, memoryview(probe))
        if len(probe) > 2 and probe == probe[:2] * (len(probe) // 2):  # one BF16 value, or two bytes of codes
            return True
    return False


def is_zero(weight: StoredWeight, stored: SourceIndex) -> bool:
    return not weight.dequantize(stored.read_parts(weight)).any()


def is_rtn(
    weight_NK: Tensor, stored_NK: Tensor, parts: Mapping[str, Tensor], projection: StoredWeight, format: Format
) -> bool:
    """Whether weights are the source's rounded to nearest with the scales they have. stored_NK: dequantized."""
    scale_NG = format.oriented(parts[format.scales]).float().abs()
    index_K = parts.get(format.index, torch.arange(projection.inputs) // projection.group_size).long().flatten()
    near = (weight_NK - stored_NK).abs() <= 0.502 * scale_NG[:, index_K]
    return bool(near.float().mean() >= RTN_SHARE)


def quantized_draft(stored: SourceIndex) -> str:
    """Of a draft head, of which another maker's release is to have every weight as the source has it."""
    found = [name for name in stored.projections if name.startswith(DRAFT)]
    if not found:
        return ""
    return (
        f"draft head: {len(found):,} of its projections are quantized ({found[0].rstrip('.')}): fewer drafts are "
        "accepted; take its tensors from the source"
    )
