"""Samples of images as rows of tokens: whole samples one after another, full rows, no padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, Tick
from fourfold.model.processor import Processor
from fourfold.quantize.contamination import MORE_TEXT, refuse_heldout
from fourfold.quantize.documents import Document, source_name
from fourfold.quantize.images import ImageSample, heldout_source, image_samples
from fourfold.quantize.template import ChatTemplate
from fourfold.recipe import Recipe, Source

FILLERS = 64  # samples whose words fill the ends of rows


@dataclass(frozen=True)
class ImageRow:
    """What a processor makes a row of, again at each start. text: rendered; samples: whose images are in it."""

    text: str
    samples: tuple[ImageSample, ...]

    def inputs(self, processor: Processor, length: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ids [T] of the row, cut to `length`, and what the model is given beside them."""
        images = [image for sample in self.samples for image in sample.decoded()]
        token_T, given = processor.inputs(self.text, images, self.samples[0].place)
        whole = (1, len(token_T))
        return token_T[:length], {
            name: value[:, :length] if value.shape == whole else value for name, value in given.items()
        }

    @property
    def digest(self) -> str:
        """sha256 of text and images."""
        sha = hashlib.sha256(self.text.encode())
        for sample in self.samples:
            for image in sample.images:
                sha.update(hashlib.sha256(image).digest())
        return sha.hexdigest()


@dataclass
class ImagePacker:
    """Makes rows of samples, in their order. A row ends where the next sample's last image has no room: the rest of it
    is filled with the words of samples, without images. documents, tokens: of what was taken so far.
    """

    samples: Iterator[ImageSample]
    processor: Processor
    template: ChatTemplate
    tell: Tick = lambda count: None
    documents: int = 0
    tokens: int = 0
    _words: list[str] = field(default_factory=list)
    _next: tuple[ImageSample, str, Tensor] | None = None

    @classmethod
    def of(
        cls, source: Source, seed: int, processor: Processor, template: ChatTemplate, barred: frozenset[str],
        tell: Tick | None = None,
    ) -> ImagePacker:  # fmt: skip
        """barred: lines of held-out text, which no sample may have."""

        def allowed() -> Iterator[ImageSample]:
            for sample in image_samples(source, seed):
                refuse_heldout(Document(sample.place, sample.plain_text()), barred)
                yield sample

        return cls(allowed(), processor, template, tell or (lambda count: None))

    def take_all(self, source: Source, length: int) -> tuple[Tensor, int, int, list[ImageRow]]:
        """All rows of a calibration source: ids, documents, tokens, what they are made of. Raises FourfoldError where
        it gives fewer.
        """
        token_RT, rows = self.take(source.rows, length)
        if len(rows) < source.rows:
            raise FourfoldError(
                f"calibration source {source_name(source)}: got {self.documents:,} samples, {len(rows)} rows of "
                f"{length} tokens, expected {source.rows}. {MORE_TEXT}"
            )
        return token_RT, self.documents, self.tokens, rows

    def take(self, count: int, length: int) -> tuple[Tensor, list[ImageRow]]:
        """Token ids [R, length] of so many rows, as many as there are samples for, and what they are made of."""
        rows = list(islice(self._rows(length), count))
        token_RT = torch.stack([token_T for token_T, _ in rows]) if rows else torch.empty(0, length, dtype=torch.int64)
        return token_RT, [row for _, row in rows]

    def _rows(self, length: int) -> Iterator[tuple[Tensor, ImageRow]]:
        text, taken, used = "", list[ImageSample](), 0
        while (found := self._peek()) is not None:
            sample, rendered, token_T = found
            needed = int(self.processor.is_image(token_T).nonzero().max()) + 2  # with what ends an image
            if needed > length:
                raise FourfoldError(
                    f"{sample.place}: its images end at token {needed:,}, expected at most {length:,}, the length of "
                    "a row. Try: a smaller `pixels` of the source, or a larger --sequence-length"
                )
            if used + needed > length:
                yield self._finish(text, taken, used, length)
                text, taken, used = "", [], 0
                continue
            self._next, self.documents, self.tokens = None, self.documents + 1, self.tokens + len(token_T)
            text, taken, used = text + rendered, [*taken, sample], used + len(token_T)
            self.tell(self.tokens)
            if used >= length:
                yield self._finish(text, taken, used, length)
                text, taken, used = "", [], 0

    def _peek(self) -> tuple[ImageSample, str, Tensor] | None:
        """The next sample with its text and tokens, None behind the last."""
        if self._next is None and (sample := next(self.samples, None)) is not None:
            rendered = self.template.render(sample.messages, sample.place)
            token_T, _ = self.processor.inputs(rendered, sample.decoded(), sample.place)
            if not self.processor.is_image(token_T).any():
                raise FourfoldError(
                    f"{sample.place}: the model's chat template drops the images of this conversation. Take the "
                    "original model's chat_template.jinja"
                )
            self._words = [*self._words[-FILLERS:], sample.plain_text()]
            self._next = sample, rendered, token_T
        return self._next

    def _finish(self, text: str, samples: Sequence[ImageSample], used: int, length: int) -> tuple[Tensor, ImageRow]:
        words = "\n".join(self._words) or "\n"
        row = ImageRow(text, tuple(samples))
        while used < length:  # a word of a token at least, so that it ends
            row = ImageRow(row.text + words, row.samples)
            token_T, _ = row.inputs(self.processor, length)
            used, words = len(token_T), words * 2
        token_T, _ = row.inputs(self.processor, length)
        return token_T, row


@dataclass(frozen=True)
class ImageWindows:
    """Held-out windows of images. image_RT: which tokens are of an image; rows: what each is made of."""

    token_RT: Tensor
    image_RT: Tensor
    rows: list[ImageRow]


def heldout_images(
    recipe: Recipe, processor: Processor, template: ChatTemplate, packers: Sequence[ImagePacker]
) -> ImageWindows:
    """Windows of the recipe's own images, or of what calibration has not taken from the first of the packers.

    Raises FourfoldError where they give fewer.
    """
    wanted, packer = recipe.heldout, packers[0] if packers else None
    if wanted.images or packer is None:
        packer = ImagePacker.of(heldout_source(wanted), 0, processor, template, frozenset())  # the same for all seeds
    token_RT, rows = packer.take(wanted.image_windows, wanted.length)
    if len(rows) < wanted.image_windows:
        raise FourfoldError(
            f"held-out images: got {len(rows)} windows of {wanted.length} tokens, expected {wanted.image_windows}. "
            "Try: more samples, heldout.images, or a smaller heldout.image_windows or heldout.length (--set)"
        )
    return ImageWindows(token_RT, processor.is_image(token_RT), rows)


def refuse_same_images(calibration: Sequence[ImageRow], heldout: Sequence[ImageRow]) -> None:
    """Raise FourfoldError for an image that is calibrated on and measured."""
    held = {image: sample.place for row in heldout for sample in row.samples for image in sample.images}
    for sample in (sample for row in calibration for sample in row.samples):
        for image in sample.images:
            if image in held:
                raise FourfoldError(
                    f"{sample.place}: this image is held out too ({held[image]}). What is calibrated on it cannot be "
                    "measured on it. Take it out of one of them"
                )
