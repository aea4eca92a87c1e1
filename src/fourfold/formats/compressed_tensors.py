"""compressed-tensors, `pack-quantized`: what llm-compressor writes. docs/formats.md."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from fourfold.datatypes import brief
from fourfold.formats.format import (
    EXPERT,
    Format,
    MoreModules,
    Selection,
    Shape,
    differences,
    draft_pattern,
    matches,
    one_of,
)

if TYPE_CHECKING:
    from torch import Tensor

METHOD, LAYOUT = "compressed-tensors", "pack-quantized"
SHAPE = "weight_shape"
FLOATS = {"float-quantized": "FP8", "naive-quantized": "FP8", "nvfp4-pack-quantized": "NVFP4"}  # read, never written
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

    def tensor_shapes(self, outputs: int, inputs: int, groups: int, bits: int = 4) -> dict[str, tuple[str, Shape]]:
        return {
            self.codes: ("I32", (outputs, inputs * bits // 32)),
            self.scales: (self.scale_dtype, (outputs, groups)),
            SHAPE: ("I64", (2,)),
        }

    def read_shapes(self, outputs: int, inputs: int, groups: int, bits: int = 4) -> dict[str, Shape]:
        written = super().read_shapes(outputs, inputs, groups, bits)
        return written | {self.zeros: (-(-outputs * bits // 32), groups), self.index: (inputs,)}

    def companions(self, outputs: int, inputs: int, groups: int, bits: int = 4) -> dict[str, Tensor]:
        import torch

        return {SHAPE: torch.tensor([outputs, inputs])}

    def zero_points(self, tensors: Mapping[str, Tensor], outputs: int, bits: int = 4) -> Tensor | None:
        """Stored as int32 [..., N * bits / 32, G], packed along N."""
        from fourfold.core.pack import unpack_codes

        stored = tensors.get(self.zeros)
        return None if stored is None else unpack_codes(stored.mT, bits).mT[..., :outputs, :]

    def companion_problems(self, tensors: Mapping[str, Tensor], group_size: int, bits: int = 4) -> Iterator[str]:
        outputs, packed = tensors[self.codes].shape
        if tensors[SHAPE].tolist() != [outputs, packed * 32 // bits]:
            yield f"{SHAPE} is {tensors[SHAPE].tolist()}, expected {[outputs, packed * 32 // bits]}"

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
            if found[1] not in (4, 8) or found[::2] != (LAYOUT, "int") or found[3] not in ("group", "channel"):
                layout, bits, kind, strategy = map(brief, found)
                return (
                    f"{where} is {layout} with {bits} bits of type {kind} by {strategy}; "
                    f"expected {LAYOUT!r} with 4 or 8 bits of 'int' by 'group' or 'channel'"
                )
        return "" if groups else f"{METHOD} without config_groups"

    def quantization_config(
        self, group_size: int, drafts: Sequence[str], more: MoreModules | None = None
    ) -> dict[str, Any]:
        ignore, groups = [OTHERS], [_group([LINEAR], 4, group_size)]
        if more is None:
            ignore += [*(f"re:{draft_pattern(prefix)}" for prefix in drafts), *([DECODER] if drafts else [])]
        else:
            ignore, groups = _with_more(group_size, drafts, more)
        return {
            "quant_method": METHOD,
            "format": LAYOUT,
            "quantization_status": "compressed",
            "ignore": ignore,
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        }

    def settings(self, config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
        """Of the first group that names the module, as compressed-tensors and vLLM go by it; by class otherwise."""
        groups = _groups(config)
        named = (group for group in groups if any(matches(one, module) for one in _patterns(_targets(group))))
        by_class = (group for group in groups if LINEAR in _targets(group))
        group = groups[0] if len(groups) == 1 else next(itertools.chain(named, by_class), {})
        weights = group.get("weights")
        return weights if isinstance(weights, dict) else {}

    def patterns(self, config: Mapping[str, Any]) -> list[str]:
        groups = _groups(config)
        return [] if len(groups) == 1 else [one for group in groups for one in _patterns(_targets(group))]

    def excluding(self, config: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
        groups = {name: group | {"targets": [LINEAR]} for name, group in config["config_groups"].items()}
        return config | {"ignore": [f"re:{pattern}" for pattern in patterns], "config_groups": groups}

    def config_problems(
        self, config: Mapping[str, Any], group_size: int, draft: bool, quantized: Collection[str] = ()
    ) -> Iterator[str]:
        yield from differences(config, {"format": LAYOUT})
        groups = _groups(config)
        if not groups or not all(isinstance(group.get("weights"), dict) for group in groups):
            yield f"config_groups is {brief(config.get('config_groups'))}, expected groups with weights"
        else:
            for group in groups:
                yield from _group_problems(group, group_size, alone=len(groups) == 1)
        if not isinstance(config.get("ignore"), list):
            yield f"ignore is {brief(config.get('ignore'))}, expected the modules that are not quantized"

    def selection(self, config: Mapping[str, Any]) -> Selection | None:
        ignored, targets = config.get("ignore"), [target for group in _groups(config) for target in _targets(group)]
        if not isinstance(ignored, list):
            return None
        return Selection(
            key="ignore",
            excluded=tuple(entry[3:] for entry in ignored if entry.startswith("re:")),
            exact=tuple(ignored),
            targets=_patterns(targets) if targets and LINEAR not in targets else None,
        )


def float_kind(config: Mapping[str, Any]) -> str:
    """Return "NVFP4" or "FP8" if weights of a quantization_config are stored as that, and others as integers; or ""."""
    kinds = []
    for group in _groups(config):
        layout, weights = group.get("format") or config.get("format"), group.get("weights") or {}
        kinds.append(FLOATS.get(str(layout), "") if weights.get("type") == "float" else "int" * (layout == LAYOUT))
    return "" if "" in kinds else next((kind for kind in ("NVFP4", "FP8") if kind in kinds), "")


def _group(targets: list[str], bits: int, group_size: int) -> dict[str, Any]:
    rest = {"group_size": group_size, "dynamic": False, "actorder": None, "observer": "minmax"}
    weights = WEIGHTS | {"num_bits": bits} | rest
    return {"targets": targets, "input_activations": None, "output_activations": None, "weights": weights}


def _with_more(group_size: int, drafts: Sequence[str], more: MoreModules) -> tuple[list[str], list[dict[str, Any]]]:
    """Return `ignore` and the groups: regular expressions alone. Beside a class in another group's targets SGLang, and
    vLLM up to 0.24, take fused modules (qkv_proj) for that class.
    """
    ends, in_draft = {*more.dense, *more.draft}, _in_draft(drafts)
    ignore = [f"re:^(?!{EXPERT}|.*{one_of(ends)}).*$" if ends else OTHERS]
    experts = {4: [f"{EXPERT}.*"]}
    if drafts and more.draft_experts == 16:
        ignore.append(f"re:{in_draft}.*experts.*")
    elif drafts and more.draft_experts != 4:
        experts = {4: [f"(?!{in_draft}){EXPERT}.*"], more.draft_experts: [rf"{in_draft}.*experts\.\d+\..*"]}
    groups = [_group([f"re:{pattern}" for pattern in found], bits, group_size) for bits, found in experts.items()]
    if drafts and more.dense and not more.draft:
        ignore.append(f"re:{in_draft}.*{one_of(more.dense)}")
    for bits in sorted({*more.dense.values(), *more.draft.values()}):
        model, draft = ({end for end, width in found.items() if width == bits} for found in (more.dense, more.draft))
        shared = {end for end in model if more.draft.get(end, bits) == bits}
        found = [f"re:.*{one_of(shared)}"] if shared else []
        found += [f"re:(?!{in_draft}).*{one_of(model - shared)}"] if model - shared else []
        found += [f"re:{in_draft}.*{one_of(draft - shared)}"] if draft - shared else []
        groups.append(_group(found, bits, more.group_size))
    return ignore, groups


def _in_draft(drafts: Sequence[str]) -> str:
    """How the names of modules of draft heads begin, on disk and in engines."""
    names = "|".join(re.escape(prefix.rstrip(".")) for prefix in drafts)
    return rf".*(?:{names}|decoder)\."


def _targets(group: Mapping[str, Any]) -> list[str]:
    targets = group.get("targets")
    return targets if _texts(targets) else []


def _groups(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = config.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _group_problems(group: Mapping[str, Any], group_size: int, alone: bool) -> Iterator[str]:
    """alone: its bits and group size are those of experts; several groups are held against what is stored."""
    targets = group.get("targets")
    if not _texts(targets):
        yield f"config_groups: targets is {brief(targets)}, expected a list of texts"
    elif not alone and (named := [target for target in targets if not target.startswith("re:")]):
        yield (
            f"config_groups: targets has {named[0]!r} beside another group, expected regular expressions alone: SGLang "
            "and vLLM up to 0.24 take fused modules (qkv_proj) for a class, whichever group names their parts"
        )
    of_experts = ("num_bits", "group_size")
    expected = WEIGHTS | {"group_size": group_size}
    wanted = {key: value for key, value in expected.items() if alone or key not in of_experts}
    yield from differences(group["weights"], wanted, "config_groups: weights: ")
    if group.get("input_activations") or group.get("output_activations"):
        yield "config_groups: activations are quantized, expected weights alone"


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
    mixed_drafts=True,
    sglang_note="",
    split_groups="vLLM refuses to load it, SGLang loads empty scales without an error",
    vllm_cpu="",
)
