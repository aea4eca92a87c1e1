"""A model by its config.json and headers: its family, transformers' own model without weights, names on disk."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourfold.core import widening
from fourfold.datatypes import FourfoldError, TensorHeader
from fourfold.model import calls, internals
from fourfold.model.arithmetic import BIAS
from fourfold.model.blueprint import Blueprint
from fourfold.model.calls import Calls
from fourfold.model.config import check_values, find_family
from fourfold.model.experts import Experts, release_prefix
from fourfold.model.family import DOWN, Family
from fourfold.model.head import Around, Read, blank_ends, input_name, read_buffers
from fourfold.model.loader import Layer

TOPK = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")  # keys of configs, as they differ
TAIL_TOKENS = 4  # that a tail is measured on


@dataclass(frozen=True)
class Skeleton:
    """Everything about a model that config.json and headers decide, with no weight read.

    raw: config.json as it is, without its quantization. What a run finds out about calls and tails is kept, for all
    threads; the few values on disk that calls depend on must be read before (`read_buffers`).
    """

    family: Family
    raw: Mapping[str, Any]
    blueprint: Blueprint
    _: KW_ONLY
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _recorded: dict[Any, Calls] = field(default_factory=dict, repr=False, compare=False)
    _tails: list[float | None] = field(default_factory=list, repr=False, compare=False)
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(raw: Mapping[str, Any], path: Path, headers: Mapping[str, TensorHeader] | None = None) -> Skeleton:
        """The skeleton of a config.json that was read already, from `path`. headers: as a BF16 checkpoint has them;
        None: those that transformers would write, a tensor for each expert.

        Raises FourfoldError for a model that fourfold or transformers does not accept.
        """
        raw = {key: value for key, value in raw.items() if key not in ("quantization_config", "compression_config")}
        family = find_family(raw, path)
        blueprint = Blueprint.of(raw, headers, path)
        check_values(blueprint.model.config.to_dict(), path)  # with transformers' defaults for what is missing
        if any(name.endswith(BIAS) for one in blueprint.experts if one is not None for name in one.parameters):
            raise FourfoldError(
                f"{path}: experts of {family.model_type} have biases, which no engine applies to int4 experts: SGLang "
                "leaves them out, vLLM leaves the experts unwritten. This family cannot be quantized"
            )
        return Skeleton(family=family, raw=raw, blueprint=blueprint)

    @property
    def text(self) -> Any:
        """transformers' config of the text model."""
        return self.blueprint.decoder.config

    @property
    def architecture(self) -> str:
        """The class of transformers."""
        return type(self.blueprint.model).__name__

    @property
    def layers(self) -> int:
        return self.blueprint.layers

    @cached_property
    def widest(self) -> Experts:
        """The routed experts of the layer that has most of their weights."""
        found = filter(None, self.blueprint.experts)
        return max(found, key=lambda one: one.count * one.width * (one.hidden + one.output))

    @property
    def vocabulary(self) -> int:
        return int(self.blueprint.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def state_width(self) -> int:
        """Values of a token on its way through the layers: the hidden size, or more where its stream is wider."""
        return self.calls((1, TAIL_TOKENS), torch.device("cpu"), torch.bfloat16).state.numel() // TAIL_TOKENS

    @property
    def topk(self) -> int:
        """How many experts a token goes to."""
        value = next(getattr(self.text, name) for name in TOPK if getattr(self.text, name, None))
        return int(max(value) if isinstance(value, list) else value)  # one for each layer, as some families write it

    @property
    def attention_width(self) -> int:
        """Of all heads' queries, in the layer where they are widest."""
        own = (getattr(module, "head_dim", None) for module in self.blueprint.decoder.layers.modules())
        head_dim = max((size for size in own if isinstance(size, int)), default=0)
        heads = self.text.num_attention_heads
        return int(heads * (head_dim or getattr(self.text, "head_dim", None) or self.text.hidden_size // heads))

    @property
    def expert_bytes(self) -> int:
        """Of a layer's routed experts in BF16."""
        return max(2 * one.count * sum(math.prod(one.shape(part)) for part in one.projections)
                   for one in self.blueprint.experts if one is not None)  # fmt: skip

    def is_fused(self, layer: int) -> bool:
        """Whether a layer's routed experts are stacks on disk."""
        experts = self.blueprint.experts[layer]
        return experts is not None and bool(experts.stacked)

    @property
    def embedding_names(self) -> tuple[str, ...]:
        """Of the embeddings on disk."""
        return self.blueprint.sources[input_name(self.blueprint)].all_names

    def router_names(self) -> Iterator[str]:
        """Of all routers' matrices on disk: E rows, beside the experts."""
        for layer in self.routed:
            experts = self.experts_of(layer)
            beside = f"{self.blueprint.prefix(layer)}{experts.module.rpartition('.')[0]}"
            for _, source in self.blueprint.within(beside):
                shape = self.blueprint.headers[source.all_names[0]].shape
                if source.converter is None and len(shape) == 2 and shape[0] == experts.count:
                    yield from source.all_names

    @property
    def experts(self) -> int:
        """Of the layer that has most."""
        return max(one.count for one in self.blueprint.experts if one is not None)

    @property
    def routed(self) -> tuple[int, ...]:
        """Layers with routed experts."""
        return tuple(layer for layer, experts in enumerate(self.blueprint.experts) if experts is not None)

    def is_routed(self, layer: int) -> bool:
        return self.blueprint.experts[layer] is not None

    def layer_kind(self, layer: int) -> str:
        """As the family names its kinds of layers."""
        kinds = getattr(self.text, "layer_types", None)
        return str(kinds[layer]) if kinds else "full_attention"

    def read_buffers(self, read: Read) -> None:
        """Read what of the modules around the layers decides their calls. read: a tensor by its name on disk."""
        found = read_buffers(self.blueprint, read)
        with self._lock:
            self._buffers.update(found)
            if found:
                self._recorded.clear()

    def calls(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Calls:
        """The layers' calls for so many rows of so many tokens, recorded once."""
        key = shape, device, dtype
        with self._lock:
            if key not in self._recorded:
                token_RT = torch.zeros(shape, dtype=torch.int64, device=device)
                ends = blank_ends(self.blueprint) | self._buffers
                around = Around(self.blueprint, ends, device, dtype)
                found = around.calls(token_RT)
                blank = found.state.new_zeros(()).expand(found.state.shape)  # or a batch of each shape stays
                self._recorded[key] = replace(found, state=blank)
            return self._recorded[key]

    def is_plain(self, device: torch.device) -> bool:
        """Whether layers are given nothing but the state of the layer before."""
        call = self.calls((1, TAIL_TOKENS), device, torch.bfloat16)
        return not call.carry and not call.ids

    def tail(self, layer: Layer, index: int, device: torch.device, dtype: torch.dtype) -> float | None:
        """How the experts' output comes to the output of a layer, see calls.measure_tail; measured on the first."""
        call = self.calls((1, TAIL_TOKENS), device, dtype)
        with self._lock:
            if not self._tails:
                generator = torch.Generator().manual_seed(0)
                state = torch.randn(call.state.shape, generator=generator).to(device, dtype)
                with widening.products(device):
                    self._tails.append(calls.measure_tail(layer, call, index, state))
            return self._tails[0]

    def experts_of(self, layer: int) -> Experts:
        """The routed experts of a layer that has them."""
        experts = self.blueprint.experts[layer]
        assert experts is not None, f"layer {layer} has no routed experts"
        return experts

    def stems(self, layer: int) -> tuple[Mapping[str, str], ...]:
        """By expert, what a release's tensors of each projection are named, with a dot at the end."""
        experts = self.experts_of(layer)
        if experts.separate:
            return tuple({part: name.removesuffix("weight") for part, name in names.items()}
                         for names in experts.separate)  # fmt: skip
        prefix = self.experts_prefix(layer)
        return tuple({part: f"{prefix}{expert}.{part}." for part in experts.projections}
                     for expert in range(experts.count))  # fmt: skip

    def experts_prefix(self, layer: int) -> str:
        """What the names of a layer's experts begin with in a release."""
        experts = self.experts_of(layer)
        if experts.stacked:
            return release_prefix(experts.stacked[DOWN])
        return experts.separate[0][DOWN].rpartition(".0.")[0] + "."

    # --- the draft head that fourfold can run -------------------------------------------------------------------------

    @property
    def has_mtp(self) -> bool:
        """Whether config.json has one."""
        return bool(self.family.mtp_prefix) and bool(getattr(self.text, "mtp_num_hidden_layers", 0))

    def has_draft(self, names: Iterable[str]) -> bool:
        """Whether any tensor of it is there: fine-tunes saved by transformers have lost it."""
        return self.has_mtp and any(name.startswith(self.family.mtp_prefix) for name in names)

    def draft_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name on disk, shape) of the draft head, its experts in stacks: a full-attention layer of transformers' own
        and four tensors more (vLLM, models/qwen3_5_mtp.py).
        """
        prefix, hidden = self.family.mtp_prefix, self.text.hidden_size
        yield f"{prefix}fc.weight", (hidden, 2 * hidden)
        for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
            yield f"{prefix}{norm}.weight", (hidden,)
        for name, value in self.empty_draft_layer().state_dict().items():
            yield f"{prefix}layers.0.{name}", tuple(value.shape)

    def empty_draft_layer(self) -> nn.Module:
        """The draft head's decoder layer, on the meta device: full attention, whatever the model's layers are."""
        text = copy.deepcopy(self.text)
        text.layer_types = ["full_attention"] * self.layers
        with internals.building():
            module: nn.Module = type(self.blueprint.decoder.layers[0])(text, 0)
        return module
