"""All that fourfold calls of transformers beyond its public interface: names, dtypes, buffers, ties.

Written for transformers 5.23. A checkpoint's names and dtypes follow `convert_and_load_state_dict_in_model` of
core_model_loading.py there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fourfold.datatypes import TensorHeader
from fourfold.model.tensors import DTYPE_NAMES

MARK = "_is_hf_initialized"
# Classes with an output head, the ones with other inputs than text first.
_MAPPINGS = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


def class_names(raw: Mapping[str, Any]) -> Iterator[str]:
    """Names of classes that config.json may mean, best first: its `architectures`, then the auto classes'."""
    yield from (name for name in raw.get("architectures") or () if isinstance(name, str))
    for mapping in _MAPPINGS:
        if name := mapping.get(str(raw.get("model_type"))):
            yield name


def known_type(model_type: object) -> bool:
    """Whether transformers has a config class for config.json's `model_type`."""
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def read_settings(raw: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json, for a BF16 model. Raises whatever transformers raises."""
    config_class = CONFIG_MAPPING[raw["model_type"]]
    config = config_class.from_dict(config_class._decode_special_floats(copy.deepcopy(dict(raw))))
    for settings in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if settings is not None:
            settings.dtype = torch.bfloat16
    return config


@contextmanager
def building(device: str = "meta") -> Iterator[None]:
    """Parameters on a device, in the dtype that a loader of BF16 makes them with; none's value is computed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device), initialization.no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(model_class: Any, config: Any, device: str = "meta") -> Any:
    """transformers' model, its parameters without values. Raises whatever transformers raises."""
    with building(device):
        return model_class(config).eval().requires_grad_(False)


def absent_without_harm(model: Any, absent: set[str]) -> set[str]:
    """Names in memory that no file need have: tied to one that is there, or optional by the class."""
    ties: Mapping[str, str] = model.all_tied_weights_keys
    both = ties.items() | {(source, target) for target, source in ties.items()}
    tied = {name for name, other in both if name in absent and other not in absent}
    optional = _any_of(getattr(model, "_keys_to_ignore_on_load_missing", None))
    return tied | {name for name in absent if optional is not None and optional.search(name)}


def tie(model: Any, absent: set[str]) -> None:
    """Tie the weights of a model whose own are loaded, as from_pretrained does. absent: names that no file has."""
    model.tie_weights(missing_keys=set(absent), recompute_mapping=False)


def ignored_pattern(model: Any) -> re.Pattern[str] | None:
    """What of a checkpoint the class leaves unread on purpose: draft heads, mostly."""
    return _any_of(model._keys_to_ignore_on_load_unexpected)


def _any_of(patterns: Iterable[str] | None) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None


@dataclass(frozen=True)
class Source:
    """The tensors on disk that one or more tensors in memory are made from.

    names: by the converter's pattern, in the order it relies on; converter: transformers' own, None for one tensor
    that is taken as it is; dtype: what they are cast to before they are converted.
    """

    names: Mapping[str, tuple[str, ...]]
    converter: Any
    dtype: torch.dtype

    @property
    def all_names(self) -> tuple[str, ...]:
        return tuple(name for names in self.names.values() for name in names)

    def targets(self, name: str) -> tuple[str, ...]:
        """All names in memory that are made from it, by the first of them."""
        if self.converter is None:
            return (name,)
        first, *others = self.converter.target_patterns
        return (name, *(name.replace(first, other) for other in others))


@dataclass(frozen=True)
class Mapper:
    """From names on disk to names in memory, as transformers' loader finds them. meta: the model's state_dict."""

    model: Any
    meta: dict[str, Tensor]
    renamings: list[Any]
    converters: list[Any]
    strict: re.Pattern[str] | None
    strict_dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: Any) -> Mapper:
        mapping = get_model_conversion_mapping(model)
        plan: dict[str, torch.dtype] = model._get_dtype_plan(torch.bfloat16)
        strict, groups, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})
        return cls(
            model=model,
            meta=model.state_dict(),
            renamings=[entry for entry in mapping if isinstance(entry, WeightRenaming)],
            converters=[entry for entry in mapping if isinstance(entry, WeightConverter)],
            strict=strict,
            strict_dtypes={group: plan[pattern] for group, pattern in groups.items()},
        )

    def find(self, names: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
        """(name on disk, name in memory, the converter's pattern or None), in the order that converters rely on.

        The name in memory is the first of the converter's targets; the model may not have it.
        """
        prefix = self.model.base_model_prefix
        for name in sorted(names, key=dot_natural_key):
            found, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.meta)
            if found not in self.meta and name in self.meta:
                found, pattern = rename_source_key(name, [], [], prefix, self.meta)
            yield name, found, pattern

    def converter(self, pattern: str) -> Any:
        """The converter of a pattern; the last of several, as the loader takes it."""
        return next(entry for entry in reversed(self.converters) if pattern in entry.source_patterns)

    def dtype(self, name: str) -> torch.dtype:
        """What the loader casts a tensor to before it is converted, by the (first) name in memory."""
        match = self.strict.search(name) if self.strict is not None else None
        if match is not None and match.lastgroup is not None:
            return self.strict_dtypes[match.lastgroup]
        return self.meta[name].dtype


def convert(converter: Any, model: Any, name: str, tensors: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Tensors in memory by name, from those on disk by the converter's pattern. name: the first in memory."""
    fresh = copy.deepcopy(converter)
    for pattern, values in tensors.items():
        fresh.collected_tensors[pattern] = list(values)
    made = fresh.convert(name, model=model, config=model.config)
    return {to: value[0] if isinstance(value, list) else value for to, value in made.items()}


def make_buffers(owner: Any, module: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no file holds (rotary frequencies, slopes), in place, as the loader does.

    owner: the transformers model that the module is of. What is loaded already is marked, else `_init_weights` of the
    model would write over it; single values of a loaded buffer it does write over, in the loader too (Zaya's router).
    """
    for part in module.modules():
        if not part._buffers:
            continue
        empty = {name: value for name, value in part._buffers.items() if value is not None and value.is_meta}
        for name, value in part._buffers.items():
            if value is not None:  # a copy: the tensor that was loaded may still be written to a release
                part._buffers[name] = torch.empty_like(value, device=device) if name in empty else value.clone()
        loaded = {**part._parameters, **part._buffers}
        for name, kept in loaded.items():
            if kept is not None and name not in empty:
                setattr(kept, MARK, True)
        with torch.no_grad():
            owner._init_weights(part)


def hidden_layers(config: Any) -> int:
    """How many layers the text model has."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def written_headers(model: Any, among: Container[str] | None = None) -> dict[str, TensorHeader]:
    """The tensors that save_pretrained would write, by name: their shapes and dtypes, in no file.

    among: names in memory that it would write them of, None for all but those that are tied to another.
    """
    tied = set(model.all_tied_weights_keys)
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if (name not in tied if among is None else name in among)
    }
    found = {}
    for name, value in revert_weight_conversion(model, kept).items():
        dtype = DTYPE_NAMES[value.dtype]
        found[name] = TensorHeader(
            name=name, dtype=dtype, shape=tuple(value.shape), shard="", start_byte=0, end_byte=value.nbytes
        )
    return found
