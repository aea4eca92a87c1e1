"""GPTQ's two formats: what AutoGPTQ, GPTQModel and AutoRound write. docs/formats.md."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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

METHOD, AUTO_ROUND = "gptq", "auto-round"
AUTO_ROUND_PACKING = "auto_round:auto_gptq"
REQUIRED = {"bits": 4, "sym": True, "desc_act": False}  # with group_size, all that vLLM requires
# vLLM asks for the fused experts of a layer, `...mlp.experts`, GPTQModel for each projection of each expert.
OTHERS = rf"-:^(?!{EXPERT}|.*\.experts$).*$"


@dataclass(frozen=True, kw_only=True)
class Gptq(Format):
    """Layout: qlinear of AutoGPTQ and GPTQModel. zero_offset: what a stored zero point lacks: 1 in v1, 0 in v2."""

    zero_offset: int

    def zero_word(self, bits: int = 4) -> int:
        """Return zero points in the middle of the grid, as many as an int32 holds."""
        ones = 0x11111111 if bits == 4 else 0x01010101
        word: int = ones * ((1 << bits - 1) - self.zero_offset)
        return word - 2**32 if word >= 2**31 else word

    def tensor_shapes(self, outputs: int, inputs: int, groups: int, bits: int = 4) -> dict[str, tuple[str, Shape]]:
        return {
            self.codes: ("I32", (inputs * bits // 32, outputs)),
            self.scales: (self.scale_dtype, (groups, outputs)),
            self.zeros: ("I32", (groups, outputs * bits // 32)),
            self.index: ("I32", (inputs,)),
        }

    def companions(self, outputs: int, inputs: int, groups: int, bits: int = 4) -> dict[str, Tensor]:
        import torch

        return {
            self.zeros: torch.full((groups, outputs * bits // 32), self.zero_word(bits), dtype=torch.int32),
            self.index: group_index(inputs, inputs // groups),
        }

    def zero_points(self, tensors: Mapping[str, Tensor], outputs: int, bits: int = 4) -> Tensor | None:
        """Stored as int32 [..., G, N * bits / 32], packed along N."""
        from fourfold.core.pack import unpack_codes

        stored = tensors.get(self.zeros)
        return None if stored is None else (unpack_codes(stored, bits) + self.zero_offset).mT

    def companion_problems(self, tensors: Mapping[str, Tensor], group_size: int, bits: int = 4) -> Iterator[str]:
        import torch

        zeros, index_K, expected = tensors[self.zeros], tensors[self.index], self.zero_word(bits)
        wrong = zeros != expected
        if wrong.any():
            yield (
                f"{int(wrong.sum()):,} of {zeros.numel():,} words of {self.zeros} are not "
                f"{expected % 2**32:#010x} as checkpoint_format {self.name} has them, "
                f"one is {int(zeros[wrong][0]) % 2**32:#010x}"
            )
        if not torch.equal(index_K, group_index(index_K.numel(), group_size)):
            yield f"{self.index} is not k // {group_size}: groups would be taken for others"

    def named_by(self, config: Mapping[str, Any]) -> bool:
        method = config.get("quant_method")
        if method == AUTO_ROUND:
            return AUTO_ROUND in self.methods and config.get("packing_format") == AUTO_ROUND_PACKING
        return method == METHOD and config.get("checkpoint_format", METHOD) == self.name

    def unreadable(self, config: Mapping[str, Any]) -> str:
        bits, word = config.get("bits"), config.get("pack_dtype", "int32")
        if bits == 4 and word == "int32":
            return ""
        return f"{brief(bits)} bits packed in {brief(word)}; expected 4 bits packed in int32"

    def quantization_config(
        self, group_size: int, drafts: Sequence[str], more: MoreModules | None = None
    ) -> dict[str, Any]:
        # vLLM's qwen3_5_mtp.py builds the draft head unquantized if a key of `dynamic` starts with "-:" and names mtp.
        return {
            "quant_method": METHOD,
            "bits": 4,
            "group_size": group_size,
            "sym": True,
            "desc_act": False,
            "lm_head": more is not None and "lm_head" in more.dense,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "dynamic": _with_more(drafts, more)
            if more
            else {OTHERS: {}, **{f"-:{draft_pattern(prefix)}": {} for prefix in drafts}},
        }

    def settings(self, config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
        """By the first key of `dynamic` that matches, as vLLM goes by it."""
        found = (settings for pattern, settings in _chosen(config) if matches(pattern, module))
        return {**config, **next(found, {})}

    def patterns(self, config: Mapping[str, Any]) -> list[str]:
        return [pattern for pattern, _ in _chosen(config)]

    def excluding(self, config: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
        return config | {"dynamic": {f"-:{pattern}": {} for pattern in patterns}}

    def config_problems(
        self, config: Mapping[str, Any], group_size: int, draft: bool, quantized: Collection[str] = ()
    ) -> Iterator[str]:
        yield from differences(config, REQUIRED | {"group_size": group_size})
        selection = self.selection(config)
        if selection is None:
            found = brief(config.get("dynamic"))
            yield f"dynamic is {found}, expected the modules that are not quantized: vLLM stops at null"
        elif any("mtp" in module for module in quantized):
            if any("mtp" in pattern for pattern in selection.excluded):
                yield 'dynamic has a "-:" key that names mtp, so vLLM would build the whole draft head in BF16'
        elif draft and not any("mtp" in pattern for pattern in selection.excluded):
            yield 'dynamic has no key that starts with "-:" and names mtp, so vLLM would build the draft head quantized'

    def selection(self, config: Mapping[str, Any]) -> Selection | None:
        dynamic = config.get("dynamic")
        if not isinstance(dynamic, dict):
            return None
        return Selection(key="dynamic", excluded=tuple(key[2:] for key in dynamic if key.startswith("-:")))


def _chosen(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Patterns of modules that have settings of their own, with these."""
    dynamic = config.get("dynamic")
    for key, settings in dynamic.items() if isinstance(dynamic, dict) else ():
        if not key.startswith("-:") and isinstance(settings, dict):
            yield key.removeprefix("+:"), settings


def _with_more(drafts: Sequence[str], more: MoreModules) -> dict[str, dict[str, int]]:
    """Return `dynamic`: what stays BF16, then what has other bits. vLLM matches its own names of fused modules too; the
    first key that matches counts, and a "-:" key that names mtp makes its whole draft head BF16.
    """
    in_draft = f".*(?:{'|'.join(re.escape(prefix.rstrip('.')) for prefix in drafts)}).*"
    ends = {*more.dense, *more.draft}
    dynamic: dict[str, dict[str, int]] = {}
    if drafts and not more.draft and more.draft_experts == 16:
        dynamic |= {f"-:{draft_pattern(prefix)}": {} for prefix in drafts}
    elif drafts and more.draft_experts != 4:
        dynamic[f"+:{in_draft}experts.*"] = {"bits": more.draft_experts}
    dynamic[rf"-:^(?!{EXPERT}|.*\.experts$|.*{one_of(ends)}).*$" if ends else OTHERS] = {}
    for where, found in ((in_draft, more.draft if drafts else {}), (".*", more.dense)):
        for bits in sorted({*found.values()}):
            named = one_of(end for end, width in found.items() if width == bits)
            dynamic[f"+:{where}{named}"] = {"bits": bits, "group_size": more.group_size}
    return dynamic


@functools.lru_cache(maxsize=8)
def group_index(inputs: int, group_size: int) -> Tensor:
    """Return the group of each input, int32 [K]. Not to be written to: calls share it."""
    import torch

    return torch.arange(inputs, dtype=torch.int32) // group_size


def _gptq(
    name: Literal["gptq", "gptq_v2"], *, zero_offset: int, methods: tuple[str, ...], read_as: str, vllm_cpu: str
) -> Gptq:
    return Gptq(
        name=name,
        methods=methods,
        read_as=read_as,
        codes="qweight",
        scales="scales",
        zeros="qzeros",
        index="g_idx",
        by_row=False,
        scale_dtype="F16",
        transformers_loads=False,
        transformers_note="asks for optimum and gptqmodel, and fails on fused experts with them",
        transformers_package="",
        sglang_method="moe_wna16",
        sglang_drafts=False,
        mixed_drafts=False,
        sglang_note=(
            "SGLang takes it with --quantization moe_wna16 only: its own choice, gptq_marlin, asserts FP16 activations"
        ),
        split_groups=(
            "vLLM falls back from Marlin to the slower moe_wna16 (on CPUs it refuses), SGLang is right with "
            "--quantization moe_wna16 only"
        ),
        vllm_cpu=vllm_cpu,
        zero_offset=zero_offset,
    )


GPTQ = _gptq("gptq", zero_offset=1, methods=(METHOD, AUTO_ROUND), read_as="gptq, auto-round (auto_gptq)", vllm_cpu="")
GPTQ_V2 = _gptq(
    "gptq_v2",
    zero_offset=0,
    methods=(METHOD,),
    read_as="gptq_v2",
    vllm_cpu=(
        "vLLM's kernel for Intel AMX reads gptq_v2's zero points as gptq's: wrong numbers, with no error; gptq is right"
    ),
)
