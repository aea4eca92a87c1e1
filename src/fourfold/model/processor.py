"""The processor of a vision model: image processor and tokenizer, as transformers joins them. No video, no sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from fourfold.datatypes import FourfoldError, reason
from fourfold.model.skeleton import Skeleton

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Processor:
    """inner: transformers' processor; image_ids: tokens that stand for a part of an image."""

    inner: Any
    image_ids: frozenset[int]

    @classmethod
    def load(cls, skeleton: Skeleton, tokenizer: PreTrainedTokenizerBase) -> Processor:
        """The processor that transformers has for the model, from the files of its folder.

        Image processors of Pillow are taken, so that pixels do not depend on torchvision being there.
        Raises FourfoldError for a model without a vision tower, and for one whose processor cannot be loaded.
        """
        folder, model_type = skeleton.blueprint.path.parent, skeleton.family.model_type
        require_vision(skeleton)
        try:
            kind = PROCESSOR_MAPPING[type(skeleton.blueprint.model.config)]
            images = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]  # transformers' own
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
            inner = _without_video(kind, folder, {"image_processor": images, "tokenizer": tokenizer})
            ids = frozenset(int(token) for token in inner.image_token_ids if token is not None)
        except Exception as error:  # transformers' own code, on files that nobody has checked
            raise FourfoldError(
                f"{folder}: transformers cannot load the processor of {model_type}: {reason(error)}. Download "
                "preprocessor_config.json and the tokenizer's files again, or leave images out"
            ) from error
        if not ids:
            raise FourfoldError(f"{folder}: the processor of {model_type} names no token of images; leave images out")
        return cls(inner, ids)

    def inputs(self, text: str, images: Sequence[Image], place: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ids [T] of a rendered text with its images, and what the model is given beside them.

        Raises FourfoldError for images that the processor refuses, naming `place`.
        """
        try:
            found = self.inner(
                text=[text], images=list(images), return_tensors="pt", add_special_tokens=False,
                return_mm_token_type_ids=True,
            )  # fmt: skip
        except Exception as error:  # transformers' own code, on images that nobody has tried
            raise FourfoldError(f"{place}: the model's processor refuses it: {reason(error)}. Leave it out") from error
        given = {name: value for name, value in found.items() if name not in ("input_ids", "attention_mask")}
        return found["input_ids"][0].long(), {name: value for name, value in given.items() if torch.is_tensor(value)}

    def is_image(self, token_T: Tensor) -> Tensor:
        """Which tokens stand for a part of an image. bool, of the same shape."""
        return torch.isin(token_T, torch.tensor(sorted(self.image_ids)))


def require_vision(skeleton: Skeleton) -> None:
    """Raise FourfoldError for a model that takes no images."""
    model = skeleton.blueprint.model
    if not hasattr(model, "get_image_features") or type(model.config) not in PROCESSOR_MAPPING:
        raise FourfoldError(
            f"{skeleton.blueprint.path}: {type(model).__name__} takes no images, and the recipe has some. Leave out "
            "sources of kind 'image' and heldout.images"
        )


def _without_video(kind: Any, folder: Path, parts: Mapping[str, Any]) -> Any:
    """A processor of a kind from its settings, None in place of parts that are not given: video needs torchvision."""

    class OfImages(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    settings, _ = kind.get_processor_dict(folder, local_files_only=True)
    return OfImages.from_args_and_dict([parts.get(name) for name in kind.get_attributes()], settings)
