"""Samples of images as documents: local files and data sets of the Hub, checked before anything is made of them."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.datatypes import FourfoldError, reason
from fourfold.quantize.documents import conversation, file_records, hub_records, source_name
from fourfold.recipe import Heldout, Source
from fourfold.recipe_table import DEFAULT_FIELDS

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow reads more, some of them by other programs
MOST_PIXELS, MOST_BYTES = 2**26, 2**26  # of one image: 256 MB when it is decoded
MOST_READ = 4096  # samples of a source that are shuffled


@dataclass(frozen=True)
class ImageSample:
    """A conversation about images. place: where it was read, for errors; messages: parts of type `image` stand for the
    images, in order; images: their files' bytes; pixels: see recipe.Source.
    """

    place: str
    messages: list[dict[str, Any]]
    images: tuple[bytes, ...]
    pixels: int

    def plain_text(self) -> str:
        """The words alone, without images and without what a chat template adds."""
        contents = (message["content"] for message in self.messages)
        parts = [part.get("text") for content in contents for part in content if part.get("type") == "text"]
        return "\n".join(part for part in parts if isinstance(part, str))

    def decoded(self) -> list[Image]:
        """The images in RGB, none with more than `pixels`. Raises FourfoldError for one that cannot be decoded."""
        return [decode(self.place, data, self.pixels) for data in self.images]


def image_samples(source: Source, seed: int) -> Iterator[ImageSample]:
    """Samples of a source, in an order that the seed fixes.

    Raises FourfoldError naming the place: a record without its fields, an image that is missing, animated, too large or
    no image, a conversation with another number of images.
    """
    if source.dataset:
        records = hub_records(source, seed)
    else:
        read = list(islice(file_records(source.path, source.fields), MOST_READ))
        records = (read[place] for place in shuffled(len(read), seed, source_name(source), "samples"))
    folder: Path | None = Path(source.path or source.dataset).parent
    if source.dataset and not Path(source.dataset).is_dir():
        folder = None  # a stranger's data set names no files here
    for place, record in records:
        yield _sample(place, record, source, folder)


def heldout_source(heldout: Heldout) -> Source:
    """The file of held-out images as a source."""
    return Source(rows=heldout.image_windows, path=heldout.images, kind="image", fields=DEFAULT_FIELDS["image"])


def check_images(source: Source, seed: int) -> None:
    """Look at all images of a file, without decoding them. Raises FourfoldError as `image_samples` does."""
    for _ in image_samples(source, seed):
        pass


def shuffled(count: int, seed: int, *salt: str) -> list[int]:
    """0..count-1 in an order that depends on seed and salt alone: by sha256, not by a library's generator."""
    prefix = "/".join([str(seed), *salt])
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{prefix}/{index}".encode()).digest())


def _sample(place: str, record: Mapping[str, Any], source: Source, folder: Path | None) -> ImageSample:
    for field in source.fields:
        if field not in record:
            raise FourfoldError(
                f"{place}: no field {field!r}; it has {', '.join(sorted(record)) or 'none'}. Name the fields of images "
                "and of messages in the source's `fields`"
            )
    given, said = (record[field] for field in source.fields)
    values = given if isinstance(given, list) else [given]
    images = tuple(_bytes(place, value, folder) for value in values)
    if not images:
        raise FourfoldError(f"{place}: field {source.fields[0]!r} is empty, expected an image. Leave this sample out")
    for data in images:
        _open(place, data)
    if isinstance(said, str):
        said = [{"role": "user", "content": []}, {"role": "assistant", "content": said}]
    messages = [_with_parts(place, message) for message in conversation(place, {"messages": said}, ("messages",))]
    parts = [part for message in messages for part in message["content"] if part.get("type") == "image"]
    if messages and not parts:
        parts = [{"type": "image"}] * len(images)
        messages[0] |= {"content": [*parts, *messages[0]["content"]]}
    if len(parts) != len(images):
        raise FourfoldError(f"{place}: got {len(images)} images, expected {len(parts)}, as the messages have")
    return ImageSample(place, messages, images, source.pixels)


def _with_parts(place: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts, parts of images without anything else."""
    content = message.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise FourfoldError(f"{place}: content: got {type(content).__name__}, expected text, or a list of parts")
    parts = [{"type": "image"} if part.get("type") == "image" else part for part in parts]
    return {"role": message["role"], "content": parts}


def _bytes(place: str, value: object, folder: Path | None) -> bytes:
    """The bytes of an image file, given by its path or as data sets store it. folder: None: paths are not followed."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return bytes(value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value or folder is None:
        raise FourfoldError(f"{place}: got {type(value).__name__}, expected an image: its path, or its file's bytes")
    path = folder / value
    try:
        if path.stat().st_size > MOST_BYTES:
            raise FourfoldError(f"{place}: {path} has {path.stat().st_size:,} bytes, expected at most {MOST_BYTES:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise FourfoldError(
            f"{place}: image {value!r} cannot be read: {why}. Paths count from the folder of the file that names them"
        ) from None


def _open(place: str, data: bytes) -> Image:
    """An image whose header is fine: not decoded yet."""
    from PIL import Image  # noqa: PLC0415  only sources of images need it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is looked at below
            image = Image.open(BytesIO(data), formats=FORMATS)
            frames = getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        raise FourfoldError(f"{place}: the image is too large, expected at most {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's readers raise whatever a damaged header makes them
        raise FourfoldError(f"{place}: {_damaged(error)}") from error
    if image.width * image.height > MOST_PIXELS:
        size = f"{image.width:,} x {image.height:,}"
        raise FourfoldError(f"{place}: the image has {size} pixels, expected at most {MOST_PIXELS:,} in all")
    if frames > 1:
        raise FourfoldError(f"{place}: the image has {frames:,} frames, expected one. Leave animated images out")
    return image


def decode(place: str, data: bytes, pixels: int) -> Image:
    """The image in RGB, upright, with at most `pixels`. Raises FourfoldError for one that is damaged."""
    from PIL import Image, ImageOps  # noqa: PLC0415  only sources of images need it

    image = _open(place, data)
    try:
        image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # as in _open
        raise FourfoldError(f"{place}: {_damaged(error)}") from error
    shrink = math.sqrt(pixels / (image.width * image.height))
    if shrink >= 1:
        return image
    size = max(int(image.width * shrink), 1), max(int(image.height * shrink), 1)
    return image.resize(size, Image.Resampling.BICUBIC)


def _damaged(error: Exception) -> str:
    said = "no image that Pillow reads" if type(error).__name__ == "UnidentifiedImageError" else reason(error)
    return f"the image cannot be decoded: {said}. Expected one of {', '.join(FORMATS)}; leave this sample out"
