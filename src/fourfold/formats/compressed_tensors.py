"""compressed-tensors, `pack-quantized`: what llm-compressor writes. docs/formats.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from fourfold.datatypes import brief
from fourfold.formats.format import EXPERT, Format, Selection, Shape, differences, draft_pattern

if TYPE_CHECKING:
    from torch import Tensor

METHOD, LAYOUT = "compressed-tensors", "pack-quantized"
SHAPE = "weight_shape"
# A target that is a class: every linear module. SGLang 0.5.10 takes the experts' bits from the group that has it.
LINEAR = "Linear"
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
# SGLang refuses a linear module that is neither a target nor ignored, so all but routed experts are ignored.
OTHERS = f"re:^(?!{EXPERT}).*$"
# SGLang's classes of draft heads call their one layer `model.decoder`, whatever it is called on disk.
DECODER = r"re:.*decoder\..*"


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Format):
    """Layout: compressed-tensors' pack_quantized and vLLM's compressed_tensors_moe_wna16.py."""

    def tensor_shapes(self, outputs: int, inputs: int, groups: int) -> dict[str, tuple[str, Shape]]:
        return {
            self.codes: ("I32", (outputs, inputs // 8)),
            self.scales: (self.scale_dtype, (outputs, groups)),
            SHAPE: ("I64", (2,)),
        }

    def read_shapes(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        written = super().read_shapes(outputs, inputs, groups)
        return written | {self.zeros: (-(-outputs // 8), groups), self.index: (inputs,)}

    def companions(self, outputs: int, inputs: int, groups: int) -> dict[str, Tensor]:
        import torch

        return {SHAPE: torch.tensor([outputs, inputs])}

    def zero_points(self, tensors: Mapping[str, Tensor], outputs: int) -> Tensor | None:
        """Stored as int32 [..., N / 8, G], packed along N."""
        from fourfold.core.pack import unpack_codes

        stored = tensors.get(self.zeros)
        return None if stored is None else unpack_codes(stored.mT).mT[..., :outputs, :]

    def companion_problems(self, tensors: Mapping[str, Tensor], group_size: int) -> Iterator[str]:
        outputs, packed = tensors[self.codes].shape
        if tensors[SHAPE].tolist() != [outputs, packed * 8]:
            yield f"{SHAPE} is {tensors[SHAPE].tolist()}, expected {[outputs, packed * 8]}"

    def named_by(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") in self.methods

    def unreadable(self, config: Mapping[str, Any]) -> str:
        groups = config.get("config_groups") or {}
        for name, group in groups.items():
            where = f"config group {brief(name)}"
            if not isinstance(group, dict):
                return f"{where}: got {brief(group)}, expected an object"
            weights = group.get("weights") or {}
            layout = group.get("format") or config.get("format")
            found = (layout, weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
            if found[:3] != (LAYOUT, 4, "int") or found[3] not in ("group", "channel"):
                layout, bits, kind, strategy = map(brief, found)
                return (
                    f"{where} is {layout} with {bits} bits of type {kind} by {strategy}; "
                    f"expected {LAYOUT!r} with 4 bits of 'int' by 'group' or 'channel'"
                )
        return "" if groups else f"{METHOD} without config_groups"

    def quantization_config(self, group_size: int, drafts: Sequence[str]) -> dict[str, Any]:
        weights = WEIGHTS | {"group_size": group_size, "dynamic": False, "actorder": None, "observer": "minmax"}
        group = {
            "targets": [LINEAR], "input_activations": None, "output_activations": None, "weights": weights,
        }  # fmt: skip
        ignored = [f"re:{draft_pattern(prefix)}" for prefix in drafts]
        return {
            "quant_method": METHOD,
            "format": LAYOUT,
            "quantization_status": "compressed",
            "ignore": [OTHERS, *ignored, *([DECODER] if drafts else [])],
            "config_groups": {"group_0": group},
        }

    def excluding(self, config: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
        groups = {name: group | {"targets": [LINEAR]} for name, group in config["config_groups"].items()}
        return config | {"ignore": [f"re:{pattern}" for pattern in patterns], "config_groups": groups}

    def config_problems(self, config: Mapping[str, Any], group_size: int, draft: bool) -> Iterator[str]:
        yield from differences(config, {"format": LAYOUT})
        group = _only_group(config)
        if group is None:
            yield f"config_groups is {brief(config.get('config_groups'))}, expected one group with weights"
        else:
            if not _texts(group.get("targets")):
                yield f"config_groups: targets is {brief(group.get('targets'))}, expected a list of texts"
            expected = WEIGHTS | {"group_size": group_size}
            yield from differences(group["weights"], expected, "config_groups: weights: ")
            if group.get("input_activations") or group.get("output_activations"):
                yield "config_groups: activations are quantized, expected weights alone"
        if not isinstance(config.get("ignore"), list):
            yield f"ignore is {brief(config.get('ignore'))}, expected the modules that are not quantized"

    def selection(self, config: Mapping[str, Any]) -> Selection | None:
        ignored, targets = config.get("ignore"), (_only_group(config) or {}).get("targets")
        if not isinstance(ignored, list):
            return None
        return Selection(
            key="ignore",
            excluded=tuple(entry[3:] for entry in ignored if entry.startswith("re:")),
            exact=tuple(ignored),
            targets=_patterns(targets) if _texts(targets) and LINEAR not in targets else None,
        )


def _only_group(config: Mapping[str, Any]) -> dict[str, Any] | None:
    groups = config.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) and len(groups) == 1 else None
    return group if isinstance(group, dict) and isinstance(group.get("weights"), dict) else None


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)


def _patterns(entries: Sequence[str]) -> tuple[str, ...]:
    return tuple(entry[3:] if entry.startswith("re:") else f"{re.escape(entry)}$" for entry in entries)


COMPRESSED_TENSORS = CompressedTensors(
    name="compressed-tensors",
    methods=(METHOD,),
    read_as=f"{METHOD} ({LAYOUT})",
    codes="weight_packed",
    scales="weight_scale",
    zeros="weight_zero_point",
    index="weight_g_idx",
    by_row=True,
    scale_dtype="BF16",
    transformers_loads=True,
    transformers_note="loads it, with the compressed-tensors package; exact; the draft head is ignored",
    transformers_package="compressed-tensors",
    sglang_method=METHOD,
    sglang_drafts=True,
    sglang_note="",
    split_groups="vLLM refuses to load it, SGLang loads empty scales without an error",
    vllm_cpu="",
)
