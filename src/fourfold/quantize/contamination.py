"""Keeps calibration and measurement apart: each by the other's text, test sets by name before anything is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.bundled import HELDOUT_TEXTS, TEXT
from fourfold.datatypes import FourfoldError
from fourfold.quantize.documents import (
    OVER_READ,
    Document,
    check_file,
    heldout_documents,
    read_documents,
    source_name,
)
from fourfold.quantize.images import check_images, heldout_source
from fourfold.recipe import Calibration, Heldout, Recipe, Source

if TYPE_CHECKING:
    from torch import Tensor

# Benchmarks whose every split is scored, whatever its name (gpqa, ifeval and aime call theirs "train").
SCORED_WHOLE = (
    r"aime|alpaca[-_]?eval|arena[-_]?hard|bbh|big[-_]?bench\w*|gpqa|hle|human[-_]?eval\w*|ifeval"
    r"|live[-_]?code[-_]?bench|math[-_]?500|mt[-_]?bench|simple[-_]?qa|swe[-_]?bench|truthful[-_]?qa"
)
# Benchmarks that are scored on validation as well as on test: only their training split is free.
SCORED_BUT_TRAIN = (
    r"arc|boolq|common[-_]?sense[-_]?qa|gsm8k|hellaswag|lambada|mbpp|[cm]?mmlu|openbook[-_]?qa|piqa"
    r"|social[-_]?i[-_]?qa|winogrande"
)
FRAGMENT_CHARACTERS = 80  # lines shorter than this are shared by chance
SHINGLE_TOKENS = 32  # runs of tokens so long are not shared by chance
SHINGLES_KEPT = 64  # of so many, one: the one whose digest says so, wherever it stands
OVERLAP_ALLOWED = 0.01  # phrases of a chat template and the like
TEMPLATE_TOKENS = 512  # of a conversation, at most: a system prompt of the template, markers of turns
_WHY = "What is calibrated on it cannot be measured on it."
MORE_TEXT = "Try: more text, or smaller --samples or --sequence-length"
_ALLOW = "set calibration.allow_test_sets = true, which the release will state"


def check_sources(recipe: Recipe) -> None:
    """What can be checked before anything is read: test sets by name, files that are not there.

    Raises FourfoldError.
    """
    refuse_test_sets(recipe.calibration)
    for path in (recipe.heldout.path, recipe.heldout.images, *(source.path for source in recipe.calibration.sources)):
        if path:
            check_file(path)


def check_texts(recipe: Recipe) -> None:
    """Read the files of text as far as `collect` surely does, without tokenizing them. Datasets are not read.

    Raises FourfoldError as `collect` does for text that cannot be read or is held out, and for text with fewer bytes
    than its samples have tokens.
    """
    calibration = recipe.calibration
    barred = frozenset() if calibration.allow_test_sets else heldout_lines(recipe.heldout)
    bundled = [source for source in calibration.sources if source.builtin]
    for source in image_files(recipe):
        check_images(source, calibration.seed)
    for sources in [bundled, *([source] for source in calibration.sources if source.path and source.kind != "image")]:
        wanted, most = calibration.length * sum(source.rows for source in sources), 0
        for document in chain.from_iterable(read_documents(source, calibration.seed) for source in sources):
            refuse_heldout(document, barred)
            most += _most_tokens(document)
            if most >= OVER_READ * wanted:
                break
        if most < wanted:
            raise FourfoldError(
                f"calibration text {', '.join(map(source_name, sources))}: got at most {most:,} tokens, expected "
                f"{wanted:,} ({wanted // calibration.length:,} samples of {calibration.length:,}). "
                f"{MORE_TEXT}"
            )


def image_files(recipe: Recipe) -> list[Source]:
    """All files of images that a recipe reads, as sources."""
    held = [heldout_source(recipe.heldout)] if recipe.heldout.images else []
    return [source for source in recipe.image_sources if source.path] + held


def _most_tokens(document: Document) -> int:
    """A bound: each token has a byte, but for what ends a document and what a chat template adds."""
    more = 1 if isinstance(document.content, str) else TEMPLATE_TOKENS
    return len(str(document.content).encode(errors="replace")) + more


def heldout_lines(wanted: Heldout) -> frozenset[str]:
    """The long lines of all bundled held-out texts and of the recipe's own."""
    texts = [Heldout(builtin=name) for name in HELDOUT_TEXTS] + ([wanted] if wanted.path else [])
    documents = chain.from_iterable(heldout_documents(text)[2] for text in texts)
    return frozenset().union(*(fragments(document.plain_text()) for document in documents))


def refuse_test_sets(calibration: Calibration) -> None:
    """Raises FourfoldError for the first source whose name says that it is a test set, unless allowed."""
    if calibration.allow_test_sets:
        return
    for source in calibration.sources:
        reason = _reason_to_refuse(source)
        if reason:
            raise FourfoldError(
                f"calibration source {source_name(source)}: {reason}. {_WHY} "
                f"Way out: take a training split, or {_ALLOW}"
            )


def _reason_to_refuse(source: Source) -> str:
    if source.path:
        path = Path(source.path).resolve()
        if path.is_relative_to((TEXT / "heldout").resolve()):
            return "the file is held-out text that ships with fourfold"
        if re.match(r"test-\d+-of-\d+", path.name):  # how the Hub names the file of a split
            return "the file is the test split of a Hub dataset"
    if source.dataset:
        split, name = (
            source.split.lower(),
            source.dataset.partition("@")[0].rstrip("/").rpartition("/")[2].lower(),
        )
        if re.search(r"(?<![a-z])test", split):
            return f"split {source.split!r} is a test set"
        if _is_named(name, SCORED_WHOLE):
            return "it is a benchmark that is scored on all of its splits"
        if _is_named(name, SCORED_BUT_TRAIN) and "train" not in split:
            return f"split {source.split!r} of this benchmark is scored"
    return ""


def _is_named(name: str, pattern: str) -> bool:
    return re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z])", name) is not None


def fragments(text: str) -> frozenset[str]:
    """The lines of a text that are long enough to be its own, with white space evened out."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return frozenset(line for line in lines if len(line) >= FRAGMENT_CHARACTERS)


def refuse_heldout(document: Document, heldout: frozenset[str]) -> None:
    """Raises FourfoldError if half of a document's long lines, by length, are lines of the held-out text.

    Half, not one: licence headers and the like are shared by documents that have nothing else in common.
    """
    own = fragments(document.plain_text())
    shared = own & heldout
    if shared and 2 * sum(map(len, shared)) >= sum(map(len, own)):
        raise FourfoldError(
            f'{document.place}: this document is held-out text ("{min(shared)[:60]}..."). {_WHY} '
            f"Way out: take it out of the source, or {_ALLOW}"
        )


def shingles(token_RT: Tensor) -> list[str]:
    """Digests of runs of SHINGLE_TOKENS tokens, one run in SHINGLES_KEPT, chosen by the digest itself.

    Two texts that share a stretch share its digests, wherever it stands in either and however they are cut into rows.
    """
    length = token_RT.shape[1] - SHINGLE_TOKENS + 1
    if length < 1:
        return []
    digest_RT = token_RT.new_zeros(len(token_RT), length)
    for place in range(SHINGLE_TOKENS):  # a product for each place, modulo 2^64: int64 wraps around
        odd = int.from_bytes(hashlib.sha256(str(place).encode()).digest()[:8], "little", signed=True) | 1
        digest_RT += token_RT[:, place : place + length] * odd
    kept_N = digest_RT[(digest_RT >> 32) % SHINGLES_KEPT == 0]
    return sorted({f"{digest % 2**64:016x}" for digest in kept_N.tolist()})


def refuse_calibrated(token_RT: Tensor, calibrated: Collection[str], title: str, place: Path) -> float:
    """The share of a text's shingles that are among the calibration's, from fourfold.json at `place`.

    Raises FourfoldError where it is more than chance gives.
    """
    found = shingles(token_RT)
    share = len(set(calibrated).intersection(found)) / len(found) if found else 0.0
    if share > OVERLAP_ALLOWED:
        raise FourfoldError(
            f"{title}: {share:.0%} of this text was calibrated on, says {place}. {_WHY} "
            "Way out: measure on other text (--text)"
        )
    return share
