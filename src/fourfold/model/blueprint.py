"""All that config.json and the headers decide about a Mixture-of-Experts checkpoint, with no weight read.

Nothing here is written by family: transformers' own model on the meta device, its mapping of names, and the shapes of
its modules say where the decoder, its layers and their routed experts are, in memory and on disk.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from fourfold.datatypes import FourfoldError, TensorHeader, brief, nearest, reason
from fourfold.model import internals
from fourfold.model.experts import Experts, find_experts, place_experts, release_prefix
from fourfold.model.family import FAMILIES
from fourfold.model.internals import Source

FIRST_NUMBER = re.compile(r"\.(\d{1,9})\.")  # in a tensor's name: its layer


@dataclass(frozen=True)
class Blueprint:
    """A checkpoint as transformers would load it in BF16.

    model: on the meta device; decoder: the module whose `layers` are run; layers_path: their name in the model.
    sources: by the (first) name in memory. experts: by layer, None where it has no routed experts.
    absent: names in memory that nothing on disk makes. drafts: names on disk of draft layers past the end, and what
    the class leaves unread; unknown: names on disk that nothing claims; missing: of `absent`, what the model needs.
    """

    path: Path
    model: Any
    decoder: Any
    layers_path: str
    headers: Mapping[str, TensorHeader]
    sources: Mapping[str, Source]
    experts: tuple[Experts | None, ...]
    absent: frozenset[str]
    drafts: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any], headers: Mapping[str, TensorHeader] | None, path: Path) -> Blueprint:
        """raw: what config.json holds, without its quantization; headers: of all tensors, by name, None for those that
        transformers would write; path: of config.json.

        Raises FourfoldError for a model that transformers does not have or accept, whose layers or experts are not
        found, and whose experts are not computed as transformers' experts interface has it.
        """
        model = _model(raw, headers or (), path)
        headers = internals.written_headers(model) if headers is None else headers
        decoder, layers_path = _decoder(model, path)
        mapper = internals.Mapper.of(model)
        sources, unclaimed = _sources(mapper, headers)
        claimed = {to for name, source in sources.items() for to in source.targets(name)}
        absent = frozenset(mapper.meta.keys() - claimed)
        missing = absent - internals.absent_without_harm(model, set(absent))
        drafts, unknown = _drafts_and_unknown(unclaimed, model, layers_path, len(decoder.layers))
        found = (find_experts(layer, f"{path}: layer {index}") for index, layer in enumerate(decoder.layers))
        experts = tuple(
            one and place_experts(one, model, f"{layers_path}.{index}.{one.module}", sources, headers, path)
            for index, one in enumerate(found)
        )
        if any(one is not None and not one.separate and not one.stacked for one in experts):
            experts, released = _unstacked(experts, mapper, layers_path, headers)
            unknown = tuple(name for name in unknown if name not in released)
            missing = frozenset(name for name in missing if name not in _parameters(experts, layers_path))
        if not any(experts):
            raise FourfoldError(f"{path}: no layer of {type(model).__name__} has routed experts; fourfold needs them")
        return cls(
            path=path,
            model=model,
            decoder=decoder,
            layers_path=layers_path,
            headers=headers,
            sources=sources,
            experts=experts,
            absent=absent,
            drafts=drafts,
            unknown=unknown,
            missing=tuple(sorted(missing)),
        )

    @property
    def layers(self) -> int:
        return len(self.decoder.layers)

    def prefix(self, layer: int) -> str:
        """What names in memory of a layer begin with."""
        return f"{self.layers_path}.{layer}."

    def layer_module(self, layer: int) -> nn.Module:
        """A copy of transformers' layer, on the meta device."""
        module: nn.Module = copy.deepcopy(self.decoder.layers[layer])
        return module

    def within(self, prefix: str) -> Iterator[tuple[str, Source]]:
        """The sources of names in memory under a prefix."""
        return ((name, source) for name, source in self.sources.items() if name.startswith(prefix))

    def lacking(self, inside: tuple[str, ...] = ("",)) -> list[str]:
        """Names on disk of what is missing, of names in memory that begin with `inside`: as transformers would write
        it, experts in stacks if some are.
        """
        missing = {name for name in self.missing if name.startswith(inside)}
        present = [self.sources[name].all_names[0] for name in self.expert_parameters if name in self.sources]
        stacks = set[str]()
        if any(len(self.headers[name].shape) == 3 for name in present):
            stacks = missing & self.expert_parameters.keys()
        others = missing - stacks
        return [*sorted(stacks), *(internals.written_headers(self.model, others) if others else ())]

    @cached_property
    def expert_parameters(self) -> Mapping[str, int]:
        """Names in memory of all routed experts' tensors, with their layer."""
        return {
            f"{self.prefix(layer)}{one.module}.{parameter}": layer
            for layer, one in enumerate(self.experts)
            if one is not None
            for parameter in one.parameters
        }

    def shapes(self, inside: tuple[str, ...] = ("",)) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name on disk, shape) of the tensors whose shapes are known, of names in memory that begin with `inside`."""
        meta = self.model.state_dict()
        for name, source in self.sources.items():
            if source.converter is None and name.startswith(inside):
                yield source.all_names[0], tuple(meta[name].shape)
        for one in filter(None, self.experts):
            for names in one.separate:
                yield from ((name, one.shape(part)) for part, name in names.items())

    def drafts_among(self, names: Iterable[str]) -> tuple[str, ...]:
        """Which names on disk are of draft heads."""
        mapper = internals.Mapper.of(self.model)
        found = [(name, to) for name, to, _ in mapper.find(names) if to not in mapper.meta]
        return _drafts_and_unknown(found, self.model, self.layers_path, self.layers)[0]

    def kept_names(self, layer: int) -> list[str]:
        """Names on disk of all of a layer but its routed experts' own tensors."""
        prefix, one = self.prefix(layer), self.experts[layer]
        own = {f"{prefix}{one.module}.{parameter}" for parameter in one.parameters} if one is not None else set()
        return sorted(each for name, source in self.within(prefix) if name not in own for each in source.all_names)


# --- the model -------------------------------------------------------------------------------------------------------


@contextmanager
def _refused(path: Path, model_type: object) -> Iterator[None]:
    """Make one error of whatever transformers raises for values that no model has."""
    try:
        yield
    except Exception as error:
        raise FourfoldError(
            f"{path}: transformers does not accept it as {model_type}: {reason(error)}. "
            "Download the original file again"
        ) from error


def _model(raw: Mapping[str, Any], names: Iterable[str], path: Path) -> Any:
    model_type = raw.get("model_type")
    if not internals.known_type(model_type):
        raise FourfoldError(
            f"{path}: model_type: got {brief(model_type)}, expected one that transformers {transformers.__version__} "
            f"has. Install a newer transformers.{nearest(model_type, FAMILIES)}"
        )
    named = (getattr(transformers, name, None) for name in internals.class_names(raw))
    classes = [found for found in named if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)]
    with _refused(path, model_type):
        settings = internals.read_settings(raw)
        expected = internals.hidden_layers(settings)
    _require_layers(expected, names, path)
    with _refused(path, model_type):
        model = internals.build_model(classes[0], settings) if classes else None
    if model is None or model.get_output_embeddings() is None:
        raise FourfoldError(
            f"{path}: architectures: got {brief(raw.get('architectures'))}, expected a class with an output head that "
            f"transformers {transformers.__version__} has for {model_type}"
        )
    return model


def _require_layers(expected: int, names: Iterable[str], path: Path) -> None:
    """Raise FourfoldError if no tensor is of the last layer, before thousands of layers are built."""
    numbers = [int(match[1]) for match in map(FIRST_NUMBER.search, names) if match]
    if numbers and max(numbers) + 1 < expected:
        raise FourfoldError(
            f"{path}: num_hidden_layers: got {expected:,}, expected the number of layers that the checkpoint has: no "
            f"tensor is of a layer past {max(numbers)}. Download the original file again"
        )


def _decoder(model: Any, path: Path) -> tuple[Any, str]:
    """The module that holds the layers, and the layers' name in the model."""
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers"):
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        inner = inner if inner is not decoder else getattr(decoder, "model", None)
        if inner is None:
            raise FourfoldError(f"{path}: {type(model).__name__} has no decoder with layers; fourfold needs one")
        decoder = inner
    name = next(name for name, module in model.named_modules() if module is decoder)
    return decoder, f"{name}.layers".lstrip(".")


def _parameters(experts: Sequence[Experts | None], layers_path: str) -> set[str]:
    """Names in memory of the experts that have a place on disk."""
    return {
        f"{layers_path}.{layer}.{one.module}.{parameter}"
        for layer, one in enumerate(experts)
        if one is not None and (one.separate or one.stacked)
        for parameter in one.parameters
    }


def _unstacked(
    experts: tuple[Experts | None, ...], mapper: internals.Mapper, layers_path: str,
    headers: Mapping[str, TensorHeader],
) -> tuple[tuple[Experts | None, ...], set[str]]:  # fmt: skip
    """Experts of a release whose source has stacks: a tensor for each, which transformers' mapping does not know, under
    the stacks' own prefix. Also the names on disk.
    """
    written = {to: name for name, to, _ in mapper.find(internals.written_headers(mapper.model))}
    found: set[str] = set()
    placed = list(experts)
    for layer, one in enumerate(experts):
        if one is None or one.separate or one.stacked:
            continue
        stack = written.get(f"{layers_path}.{layer}.{one.module}.down_proj")
        if stack is None:
            continue
        prefix = release_prefix(stack)
        names = tuple(
            {part: f"{prefix}{expert}.{part}.weight" for part in one.projections} for expert in range(one.count)
        )
        each = {name for parts in names for name in parts.values()}
        if each <= headers.keys():
            placed[layer] = dataclasses.replace(one, separate=names)
            found |= each
    return tuple(placed), found


# --- names -----------------------------------------------------------------------------------------------------------


def _sources(
    mapper: internals.Mapper, headers: Mapping[str, TensorHeader]
) -> tuple[dict[str, Source], list[tuple[str, str]]]:
    """Sources by the (first) name in memory, and unclaimed tensors: (name on disk, the name in memory)."""
    grouped: dict[str, dict[str, list[str]]] = {}
    converters: dict[str, Any] = {}
    unclaimed = []
    for name, to, pattern in mapper.find(headers):
        if to not in mapper.meta:
            unclaimed.append((name, to))
            continue
        grouped.setdefault(to, {}).setdefault(pattern or name, []).append(name)
        if pattern is not None:
            converters[to] = mapper.converter(pattern)
    sources = {
        to: Source({pattern: tuple(found) for pattern, found in names.items()}, converters.get(to), mapper.dtype(to))
        for to, names in grouped.items()
    }
    return sources, unclaimed


def _drafts_and_unknown(
    unclaimed: list[tuple[str, str]], model: Any, layers_path: str, layers: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names on disk of draft heads, and those that nobody knows."""
    ignored = internals.ignored_pattern(model)
    numbered = re.compile(re.escape(layers_path) + r"\.(\d{1,9})\.(.*)")
    matches = {to: numbered.fullmatch(to) for _, to in unclaimed}
    own = {match[2] for match in map(numbered.fullmatch, model.state_dict()) if match}
    # A layer like all others is one too many; a draft head joins embeddings and states as well.
    heads = {int(match[1]) for match in matches.values() if match and int(match[1]) >= layers and match[2] not in own}
    drafts: list[str] = []
    unknown: list[str] = []
    for name, to in unclaimed:
        match = matches[to]
        in_head = match is not None and int(match[1]) in heads
        is_draft = in_head or (ignored is not None and ignored.search(to) is not None)
        (drafts if is_draft else unknown).append(name)
    return tuple(drafts), tuple(unknown)
