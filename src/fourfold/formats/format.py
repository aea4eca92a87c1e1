"""What a format is: tensors of a projection, `quantization_config`, layout, engines that read it. docs/formats.md.

Imports torch only inside of functions on tensors: arguments are checked before torch is there.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fourfold.datatypes import QuantizedGroup, brief

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = r".*\.experts\.\d+\."  # how the name of a routed expert's projection begins, in every engine
FUSED = {  # modules of engines, by the modules on disk that they join
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which modules a quantization_config quantizes: those that `targets` names and `excluded` does not.

    Entries are regular expressions, matched from the start; exact: module names that are excluded as they are;
    targets: None if every linear module is one. key: where the exclusions stand.
    """

    key: str
    excluded: tuple[str, ...]
    exact: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MoreModules:
    """What a release quantizes beside the routed experts of its layers, each in groups of `group_size` inputs.

    Ends of module names, such as "self_attn.q_proj", to their bits: dense, of the model; draft, of its draft heads.
    draft_experts: bits of the draft heads' experts, 16 where they are not quantized; their groups are those of experts.
    """

    group_size: int
    dense: Mapping[str, int]
    draft: Mapping[str, int]
    draft_experts: int

    @classmethod
    def of(cls, bits: Mapping[str, int], drafts: Sequence[str], group_size: int) -> MoreModules | None:
        """Return what the modules of these names (on disk) are; None if there are none. bits: by name."""
        dense: dict[str, int] = {}
        draft: dict[str, int] = {}
        draft_experts = 16
        for name, width in bits.items():
            in_draft = name.startswith(tuple(drafts))
            if in_draft and re.match(EXPERT, name):
                draft_experts = width
            elif not re.match(EXPERT, name):
                (draft if in_draft else dense)[module_end(name)] = width
        if not dense and not draft and draft_experts == 16:
            return None
        return cls(group_size=group_size, dense=dense, draft=draft, draft_experts=draft_experts)


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """How projections [N, K] are stored, and what engines make of it.

    methods: config.json's `quant_method`: the first is written, all are read; read_as: the same for messages.
    codes, scales, zeros, index: suffixes of packed codes, scales, zero points and each input's group; the last two may
    be absent. by_row: codes and scales have a row for each output feature, otherwise a column. scale_dtype: "BF16" or
    "F16". transformers_*: whether transformers loads the format, how, and the package that it needs ("": none).
    sglang_method: SGLang's --quantization; sglang_drafts: whether it loads the draft head's experts; mixed_drafts:
    whether vLLM loads a draft head of which only a part is quantized. sglang_note,
    vllm_cpu (vLLM on a CPU): known issues, "" without one. split_groups: what engines do if tensor parallel splits a
    group.
    """

    name: str
    methods: tuple[str, ...]
    read_as: str
    codes: str
    scales: str
    zeros: str
    index: str
    by_row: bool
    scale_dtype: str
    transformers_loads: bool
    transformers_note: str
    transformers_package: str
    sglang_method: str
    sglang_drafts: bool
    mixed_drafts: bool
    sglang_note: str
    split_groups: str
    vllm_cpu: str

    def __str__(self) -> str:
        return self.name

    @property
    def method(self) -> str:
        return self.methods[0]

    @property
    def inputs_axis(self) -> int:
        """Along which axis of one projection's codes and scales input features and their groups lie."""
        return 1 if self.by_row else 0

    @property
    def suffixes(self) -> tuple[str, str, str, str]:
        """What is read of a projection, required ones first."""
        return self.codes, self.scales, self.zeros, self.index

    # --- tensors --------------------------------------------------------------------------------------------------

    @abstractmethod
    def tensor_shapes(self, outputs: int, inputs: int, groups: int, bits: int = 4) -> dict[str, tuple[str, Shape]]:
        """Return what a projection [N, K] becomes: suffix -> (safetensors dtype, shape)."""

    def read_shapes(self, outputs: int, inputs: int, groups: int, bits: int = 4) -> dict[str, Shape]:
        """Return the shapes, by suffix, of all that is read."""
        return {suffix: shape for suffix, (_, shape) in self.tensor_shapes(outputs, inputs, groups, bits).items()}

    @abstractmethod
    def companions(self, outputs: int, inputs: int, groups: int, bits: int = 4) -> dict[str, Tensor]:
        """Return what is stored beside codes and scales, by suffix: the same for every projection of a shape."""

    @abstractmethod
    def zero_points(self, tensors: Mapping[str, Tensor], outputs: int, bits: int = 4) -> Tensor | None:
        """Return zero points as codes, int8 [..., N, G]: 0 is the middle of the grid. None if none are stored."""

    def oriented(self, stored: Tensor) -> Tensor:
        """Return a view of stored codes or scales with a row for each output feature, or the inverse of that."""
        return stored if self.by_row else stored.mT

    def stored_scales(self, scale_ENG: Tensor) -> Tensor:
        """Return scales [..., N, G] as they are stored: contiguous, in the format's dtype."""
        import torch

        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[self.scale_dtype]
        return self.oriented(scale_ENG).contiguous().to(dtype)

    def pack(self, group: QuantizedGroup) -> dict[str, Tensor]:
        """Return a stack of projections as a release stores it: suffix -> stack [E, ...]. See tensor_shapes."""
        from fourfold.core.pack import pack_codes

        experts, outputs, inputs = group.codes_ENK.shape
        stored = {
            self.codes: self.oriented(pack_codes(group.codes_ENK, group.bits)).contiguous(),
            self.scales: self.stored_scales(group.scale_ENG),
        }
        beside = self.companions(outputs, inputs, group.scale_ENG.shape[-1], group.bits)
        return stored | {suffix: value.expand(experts, *value.shape).clone() for suffix, value in beside.items()}

    def unpack(self, tensors: Mapping[str, Tensor], bits: int = 4) -> QuantizedGroup:
        """Return the inverse of `pack`. tensors: by suffix; only codes and scales are read."""
        from fourfold.core.pack import unpack_codes

        codes_ENK = unpack_codes(self.oriented(tensors[self.codes]), bits)
        return QuantizedGroup(codes_ENK, self.oriented(tensors[self.scales]).float(), bits)

    def dequantize(self, tensors: Mapping[str, Tensor], bits: int = 4) -> Tensor:
        """Return the weights fp32 [E, N, K] that stacks of stored tensors stand for, whoever made them.

        tensors: by suffix, as `pack` gives them. Absent zero points are the middle of the grid; an absent index (int32
        [E, K], the group of each input) stands for groups of consecutive inputs.
        """
        import torch

        group = self.unpack(tensors, bits)
        codes_ENK, scale_ENG = group.codes_ENK, group.scale_ENG
        experts, outputs, inputs = codes_ENK.shape
        zero_ENG = self.zero_points(tensors, outputs, bits)
        if zero_ENG is None:
            zero_ENG = torch.zeros(1, 1, 1, dtype=torch.int8, device=codes_ENK.device).expand(scale_ENG.shape)
        index_EK = tensors.get(self.index)
        if index_EK is None:
            size = inputs // scale_ENG.shape[-1]
            index_EK = (torch.arange(inputs, device=codes_ENK.device) // size).expand(experts, inputs)
        index_ENK = index_EK.to(torch.int64)[:, None, :].expand(experts, outputs, inputs)
        centred_ENK = codes_ENK.float() - zero_ENG.float().gather(2, index_ENK)
        return centred_ENK * scale_ENG.gather(2, index_ENK)

    @abstractmethod
    def companion_problems(self, tensors: Mapping[str, Tensor], group_size: int, bits: int = 4) -> Iterator[str]:
        """Yield how tensors beside codes and scales of one projection differ from `companions`."""

    # --- config.json ----------------------------------------------------------------------------------------------

    @abstractmethod
    def named_by(self, config: Mapping[str, Any]) -> bool:
        """Return whether a quantization_config means this format. Width and layout are for `unreadable`."""

    @abstractmethod
    def unreadable(self, config: Mapping[str, Any]) -> str:
        """Return why a quantization_config that means this format is not read; "" if it is."""

    @abstractmethod
    def quantization_config(
        self, group_size: int, drafts: Sequence[str], more: MoreModules | None = None
    ) -> dict[str, Any]:
        """Return config.json's `quantization_config` of a release whose routed experts are quantized.

        group_size: of experts; drafts: what the names of the draft heads' tensors begin with, as in "mtp."; empty
        without one; more: what else is quantized, None for experts alone.
        """

    @abstractmethod
    def settings(self, config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
        """Return what holds for a module, by its name on disk or in an engine: `group_size`, and bits as `bits` has it.
        For a checkpoint that has codes for it.
        """

    @abstractmethod
    def patterns(self, config: Mapping[str, Any]) -> list[str]:
        """Return the regular expressions that `settings` matches, in its order: see formats/patterns.py before use."""

    def bits(self, config: Mapping[str, Any], module: str) -> int:
        """Return the width of a module's codes."""
        found = self.settings(config, module)
        return int(found.get("num_bits") or found.get("bits") or 4)

    @abstractmethod
    def excluding(self, config: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
        """Return `config` with every linear module quantized that matches no pattern."""

    @abstractmethod
    def config_problems(
        self, config: Mapping[str, Any], group_size: int, draft: bool, quantized: Collection[str] = ()
    ) -> Iterator[str]:
        """Yield what engines would take amiss of a quantization_config. group_size: of experts; draft: the release has
        a draft head; quantized: names of modules with codes.
        """

    @abstractmethod
    def selection(self, config: Mapping[str, Any]) -> Selection | None:
        """Return which modules it quantizes; None if it does not say, which is a config problem."""


def module_end(name: str) -> str:
    """Return the last two parts of a module's name, the same in every layer and engine: "self_attn.q_proj"."""
    *_, parent, last = ("", *name.split("."))
    return f"{parent}.{last}" if parent and not parent.isdecimal() and name.count(".") > 1 else last


def fused(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Return engines' names of modules beside experts that they join, by their parts' name on disk, with what the parts
    have in common. A quantization_config is asked for these names too, and `ignore` for them first.
    """
    found = {}
    for parent in dict.fromkeys(module.rpartition(".")[0] for module in modules if not matches(EXPERT, module)):
        for name, parts in FUSED.items():
            values = [modules.get(f"{parent}.{part}") for part in parts]
            if values[0] is not None and all(value == values[0] for value in values):
                found[f"{parent}.{name}"] = values[0]
    return found


def one_of(ends: Iterable[str]) -> str:
    """Return a regular expression for any of these ends of names, and for what engines join of them."""
    plain = dict.fromkeys(ends, True)
    return f"(?:{'|'.join(map(re.escape, sorted({**plain, **fused(plain)})))})$"


def draft_pattern(prefix: str) -> str:
    """Return the regular expression for modules of a draft head. prefix: of its tensors."""
    return f".*{re.escape(prefix.rstrip('.'))}.*"


def matches(pattern: str, module: str) -> bool:
    """Return whether a regular expression matches a name from its start; one that is none matches nothing."""
    try:
        return re.match(pattern, module) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield the keys whose values are not the expected ones, of the same type."""
    for key, value in expected.items():
        if key not in found:
            yield f"{where}{key} is missing, expected {value!r}"
        elif found[key] != value or type(found[key]) is not type(value):
            yield f"{where}{key} is {brief(found[key])}, expected {value!r}"
