"""transformers' own classes for one checkpoint: its config, empty decoder layers, the tensors they expect."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel

from fourfold.datatypes import FourfoldError, reason
from fourfold.model.config import CONFIG, check_values, find_family, read_source_config
from fourfold.model.family import Family

CAPTURE = "fourfold_capture"
TRAFFIC = "fourfold_traffic"


def _capture(experts: nn.Module, hidden_TD: Tensor, index_TA: Tensor, weight_TA: Tensor) -> Tensor:
    """Keep what a MoE block hands to its experts, and answer with zeros: the layer's output without routed experts."""
    experts.__dict__[TRAFFIC] = (hidden_TD, index_TA, weight_TA)
    return torch.zeros_like(hidden_TD)


def take_traffic(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the last forward of a decoder layer handed to its experts: input [T, D], expert ids and weights [T, A]."""
    traffic: tuple[Tensor, Tensor, Tensor] = module.mlp.experts.__dict__.pop(TRAFFIC)
    return traffic


ALL_EXPERTS_FUNCTIONS.register(CAPTURE, _capture)


@contextmanager
def _refused(path: Path, family: Family) -> Iterator[None]:
    """Make one error of whatever transformers raises for values that no model has."""
    try:
        yield
    except Exception as error:
        raise FourfoldError(
            f"{path}: transformers does not accept it as {family.model_type}: {reason(error)}. "
            "Download the original file again"
        ) from error


@dataclass(frozen=True)
class Skeleton:
    """Everything about a checkpoint that its config.json decides, with no weight read.

    raw: config.json as it is; text: transformers' config of the text model; config: of the whole checkpoint.
    """

    family: Family
    raw: Mapping[str, Any]
    config: Any
    text: Any

    @classmethod
    def open(cls, folder: Path) -> Skeleton:
        """Read `config.json`. Raises FourfoldError for a folder that is no checkpoint fourfold can quantize."""
        return cls.of(read_source_config(folder), folder / CONFIG)

    @classmethod
    def of(cls, raw: Mapping[str, Any], path: Path) -> Skeleton:
        """The skeleton of a config.json that was read already, from `path`, without its quantization.

        Raises FourfoldError for a model that fourfold or transformers does not accept.
        """
        raw = {key: value for key, value in raw.items() if key not in ("quantization_config", "compression_config")}
        family = find_family(raw, path)
        with _refused(path, family):
            config = AutoConfig.for_model(**raw)
            text = copy.deepcopy(getattr(config, family.text_key) if family.text_key else config)
            text._attn_implementation = "sdpa"
            text._experts_implementation = CAPTURE
            skeleton = cls(family=family, raw=raw, config=config, text=text)
            completed = config.to_dict()
        check_values(completed, path)  # with transformers' defaults for what is missing
        with _refused(path, family):
            skeleton.rotary(torch.device("meta"))
            for kind in {skeleton.layer_kind(layer): layer for layer in range(skeleton.layers)}.values():
                skeleton.empty_layer(kind)
        return skeleton

    @property
    def layers(self) -> int:
        return int(self.text.num_hidden_layers)

    @property
    def experts(self) -> int:
        return int(self.text.num_experts)

    @property
    def has_mtp(self) -> bool:
        return bool(self.family.mtp_prefix) and bool(getattr(self.text, "mtp_num_hidden_layers", 0))

    def layer_kind(self, layer: int) -> str:
        kinds = getattr(self.text, "layer_types", None)
        return str(kinds[layer]) if kinds else "full_attention"

    def _class(self, name: str) -> Any:
        return getattr(importlib.import_module(self.family.modeling), name)

    def empty_layer(self, layer: int) -> nn.Module:
        """transformers' decoder layer on the meta device."""
        with torch.device("meta"):
            module: nn.Module = self._class(self.family.layer_class)(self.text, layer)
        return module

    def empty_draft_layer(self) -> nn.Module:
        """The draft head's decoder layer, on the meta device: full attention, whatever the model's layers are."""
        text = copy.deepcopy(self.text)
        text.layer_types = ["full_attention"] * self.layers
        with torch.device("meta"):
            module: nn.Module = self._class(self.family.layer_class)(text, 0)
        return module

    def empty_norm(self) -> nn.Module:
        """The norm before the output head, on the meta device."""
        with torch.device("meta"):
            module: nn.Module = self._class(self.family.norm_class)(self.text.hidden_size, eps=self.text.rms_norm_eps)
        return module

    def rotary(self, device: torch.device) -> nn.Module:
        """Rotary position embedding, of x [R, T, D] and positions [R, T]; it holds no weights of the checkpoint."""
        module: nn.Module = self._class(self.family.rotary_class)(self.text)
        if hasattr(module, "mrope_section"):  # time, height and width, the same for text; 5.17 does not expand itself
            module.register_forward_pre_hook(lambda _, given: (given[0], given[1].expand(3, -1, -1)))
        return module.to(device)

    def is_routed(self, layer: int) -> bool:
        """Whether this layer has routed experts (dense layers are copied)."""
        return hasattr(self.empty_layer(layer).mlp, "experts")

    def require_layers(self, folder: Path, names: Iterable[str]) -> None:
        """Raise FourfoldError if no tensor is of the last layer, before thousands of layers are built."""
        last = self.family.layer_prefix(self.layers - 1)
        if not any(name.startswith(last) for name in names):
            raise FourfoldError(
                f"{folder / CONFIG}: num_hidden_layers: got {self.layers:,}, expected the number of layers that the "
                f"checkpoint has: it has no tensor {last}*. Download the original file again"
            )

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor the checkpoint must hold, experts in the fused layout: (name on disk, shape).

        From transformers' own model on the meta device; the MTP head, which transformers does not build, is one of
        its full-attention layers and four tensors more (vLLM, models/qwen3_5_mtp.py).
        """
        transformers_class: type[PreTrainedModel] = getattr(
            importlib.import_module(self.family.modeling), self.family.architecture
        )
        with _refused(Path(CONFIG), self.family), torch.device("meta"):
            model = transformers_class(self.config)
        tied = set(model.all_tied_weights_keys) if self.config.tie_word_embeddings else set()
        for name, value in model.state_dict().items():
            if name not in tied:
                yield name, tuple(value.shape)
        if not self.has_mtp:
            return
        prefix, hidden = self.family.mtp_prefix, self.text.hidden_size
        yield f"{prefix}fc.weight", (hidden, 2 * hidden)
        for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
            yield f"{prefix}{norm}.weight", (hidden,)
        for name, value in self.empty_draft_layer().state_dict().items():
            yield f"{prefix}layers.0.{name}", tuple(value.shape)
