"""Sources of text to rows of tokens, the same on every machine: calibration rows and held-out windows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fourfold.datatypes import Event, FourfoldError, Progress, Tick, reason
from fourfold.model.processor import Processor
from fourfold.quantize.contamination import MORE_TEXT, check_sources, heldout_lines, refuse_heldout, shingles
from fourfold.quantize.documents import OVER_READ, Document, as_file, heldout_documents, read_documents, source_name
from fourfold.quantize.image_rows import (
    ImagePacker,
    ImageRow,
    ImageWindows,
    heldout_images,
    refuse_same_images,
)
from fourfold.quantize.images import shuffled
from fourfold.quantize.template import ChatTemplate
from fourfold.recipe import Calibration, Heldout, Recipe, Source
from fourfold.records.release import CalibrationFacts, SourceRows
from fourfold.records.results import TextFacts

HELDOUT_SIZES = "heldout.windows or heldout.length (--set)"
BATCH = 64  # documents tokenized at once
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
END_OF_DOCUMENT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class CalibrationRows:
    """token_RT: int64, by source in the recipe's order; source_R: each row's source.

    notes: what differs from the recipe, for the caller to print; digest: sha256 of shape, ids and images; images: by
    row; image_RT: which tokens are of an image, windows: of held-out images; None where there are none.
    """

    token_RT: Tensor
    source_R: tuple[str, ...]
    sources: tuple[SourceRows, ...]
    notes: tuple[str, ...]
    digest: str
    images: Mapping[int, ImageRow] = field(default_factory=dict)
    image_RT: Tensor | None = None
    windows: ImageWindows | None = None

    @property
    def text_RT(self) -> Tensor:
        """The rows without images."""
        return self.token_RT[[row for row in range(len(self.token_RT)) if row not in self.images]]

    def source_digests(self) -> dict[str, str]:
        """sha256 of the rows of each source, by its name: which text has changed where `digest` has."""
        places: dict[str, list[int]] = {}
        for row, name in enumerate(self.source_R):
            places.setdefault(name, []).append(row)
        return {
            name: _digest(self.token_RT[rows], [self.images[row] for row in rows if row in self.images])
            for name, rows in places.items()
        }

    def facts(self) -> CalibrationFacts:
        """For fourfold.json and the model card: everything but the tokens."""
        rows, length = self.token_RT.shape
        return CalibrationFacts(
            digest=self.digest,
            rows=rows,
            length=length,
            shingles=shingles(self.token_RT),
            sources=list(self.sources),
            notes=list(self.notes),
        )


@dataclass(frozen=True, kw_only=True)
class HeldoutRows:
    """token_RT: int64, R windows; protocol: how those of text were made, which come first; images: by row of the
    others; image_RT: which tokens are of an image, None where there are none.
    """

    token_RT: Tensor
    digest: str
    protocol: TextFacts
    images: Mapping[int, ImageRow] = field(default_factory=dict)
    image_RT: Tensor | None = None

    @property
    def text_windows(self) -> int:
        return len(self.token_RT) - len(self.images)

    def with_images(self, windows: ImageWindows) -> HeldoutRows:
        """The same, and windows of images behind them."""
        first, token_RT = len(self.token_RT), torch.cat([self.token_RT, windows.token_RT])
        image_RT = torch.cat([torch.zeros_like(self.token_RT, dtype=torch.bool), windows.image_RT])
        images = dict(enumerate(windows.rows, start=first))
        return replace(
            self, token_RT=token_RT, digest=_digest(token_RT, windows.rows), images=images, image_RT=image_RT
        )


@dataclass(frozen=True)
class _Pool:
    """All full rows of one source, of which some will be taken. images: what they are made of, of images."""

    source: Source
    token_RT: Tensor
    documents: int
    tokens: int
    images: Sequence[ImageRow] = ()

    @property
    def name(self) -> str:
        return source_name(self.source)

    def draw(self, count: int, seed: int) -> list[int]:
        """`count` of the rows, in an order that the seed fixes."""
        return shuffled(len(self.token_RT), seed, self.name, "rows")[:count]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, from its files alone. Raises FourfoldError if there is none."""
    if not folder.is_dir():
        raise FourfoldError(f"{folder}: no such folder; a checkpoint folder with a tokenizer is wanted")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FourfoldError(
            f"{folder}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} is wanted. "
            "Way out: copy the tokenizer's files from the original model"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
        raise FourfoldError(
            f"{folder}: transformers cannot load the tokenizer: {reason(error)}. Download its files again"
        ) from error
    return tokenizer


def collect(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    processor: Processor | None = None,
    progress: Progress | None = None,
) -> CalibrationRows:
    """Rows of `calibration.length` tokens from the recipe's sources: full rows, no padding, fixed by seed. processor:
    of the model, for a recipe with images.

    The documents of a source are shuffled, put one after another and cut into rows; the wanted number of them
    is drawn. A built-in text that is too short hands its rows to the other built-in texts (a note says so).
    Raises FourfoldError for too little text, for test sets and held-out text, for whatever cannot be read.
    """
    calibration = recipe.calibration
    check_sources(recipe)
    barred = frozenset() if calibration.allow_test_sets else heldout_lines(recipe.heldout)
    pools: list[_Pool] = []
    windows = None
    with ChatTemplate(tokenizer) as template:
        if any(as_file(source).kind != "text" for source in calibration.sources):
            template.start()
        packers: list[ImagePacker] = []
        for source in calibration.sources:
            tell = partial(_tell, progress, calibration, len(pools)) if progress else None
            if source.kind == "image":
                assert processor is not None, "a recipe with images needs the model's processor"
                packers.append(ImagePacker.of(source, calibration.seed, processor, template, barred, tell))
                pools.append(_Pool(source, *packers[-1].take_all(source, calibration.length)))
            else:
                pools.append(_read_pool(source, calibration, tokenizer, template, barred, tell))
        if processor is not None and recipe.reads_images:
            windows = heldout_images(recipe, processor, template, packers)
            refuse_same_images([row for pool in pools for row in pool.images], windows.rows)
    return _joined(recipe, pools, processor, windows)


def _joined(
    recipe: Recipe, pools: Sequence[_Pool], processor: Processor | None, windows: ImageWindows | None
) -> CalibrationRows:
    """The calibration rows that are drawn from the pools."""
    calibration = recipe.calibration
    counts, notes = _share_rows(pools, calibration.length)
    if calibration.allow_test_sets:
        notes += ("test sets were allowed as calibration text: figures measured on them are not held out",)
    taken = list(zip(pools, counts, strict=True))
    drawn = [(pool, row) for pool, count in taken for row in pool.draw(count, calibration.seed)]
    token_RT = torch.stack([pool.token_RT[row] for pool, row in drawn])
    images = {place: pool.images[row] for place, (pool, row) in enumerate(drawn) if pool.images}
    image_RT = None
    if images:
        assert processor is not None
        image_RT = torch.zeros(token_RT.shape, dtype=torch.bool)
        image_RT[list(images)] = processor.is_image(token_RT[list(images)])
    return CalibrationRows(
        token_RT=token_RT,
        source_R=tuple(pool.name for pool, _ in drawn),
        sources=tuple(
            SourceRows(
                name=pool.name,
                licence=as_file(pool.source).licence,
                documents=pool.documents,
                tokens=pool.tokens,
                rows_wanted=pool.source.rows,
                rows=count,
            )
            for pool, count in taken
        ),
        notes=notes,
        digest=_digest(token_RT, list(images.values())),
        images=images,
        image_RT=image_RT,
        windows=windows,
    )


def heldout(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> HeldoutRows:
    """The held-out windows of a recipe. Raises FourfoldError if its text holds fewer."""
    return heldout_windows(recipe.heldout, tokenizer)


def heldout_windows(
    wanted: Heldout, tokenizer: PreTrainedTokenizerBase, *, fewer: bool = False, sizes: str = HELDOUT_SIZES
) -> HeldoutRows:
    """The first `windows` windows of a held-out text: one tokenization, no special tokens, no BOS.

    fewer: take what there is of a text that holds fewer, but at least one; sizes: what the user calls both numbers.
    Raises FourfoldError where it holds too few.
    """
    title, joining, documents = heldout_documents(wanted)
    with ChatTemplate(tokenizer) as template:
        text = "".join(_render(document, template) for document in documents)
    token_T = torch.tensor(_encode([text], tokenizer)[0], dtype=torch.int64)
    found = len(token_T) // wanted.length
    least = 1 if fewer else wanted.windows
    if found < least:
        raise FourfoldError(
            f"held-out text {title}: got {len(token_T):,} tokens, {found} windows of {wanted.length}, "
            f"expected {least}. Try: smaller {sizes}"
        )
    windows = min(found, wanted.windows)
    token_RT = token_T[: windows * wanted.length].view(windows, wanted.length)
    protocol = TextFacts(
        text=title,
        joining=joining,
        tokens=len(token_T),
        windows=windows,
        windows_available=found,
        window=wanted.length,
        stride=wanted.length,
        predictions_per_window=wanted.length - 1,
        bos=False,
        special_tokens=False,
        tail="dropped",
    )
    return HeldoutRows(token_RT=token_RT, digest=_digest(token_RT), protocol=protocol)


# ---- tokens


def _read_pool(
    source: Source,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    barred: frozenset[str],
    tell: Tick | None,
) -> _Pool:
    """Read and tokenize a source, as far as needed, and cut all of that into rows. tell: is told all tokens so far."""
    name, length = source_name(source), calibration.length
    wanted_tokens = source.rows * length
    documents = read_documents(source, calibration.seed)
    token_lists: list[list[int]] = []
    tokens = 0
    while batch := list(islice(documents, BATCH)):
        for document in batch:
            refuse_heldout(document, barred)
        encoded = _encode([_render(document, template) for document in batch], tokenizer)
        token_lists += encoded
        tokens += sum(map(len, encoded))
        if tell:
            tell(tokens)
        if tokens >= OVER_READ * wanted_tokens and not source.builtin:
            break
    end = _document_end(tokenizer) if as_file(source).kind == "text" else []  # templates end turns themselves
    order = shuffled(len(token_lists), calibration.seed, name, "documents")
    stream = chain.from_iterable(token_lists[index] + end for index in order)
    token_T = torch.tensor(list(stream), dtype=torch.int64)
    rows = len(token_T) // length
    if rows < source.rows and not source.builtin:
        raise FourfoldError(
            f"calibration source {name}: got {tokens:,} tokens in {len(token_lists):,} documents, {rows} samples of "
            f"{length}, expected {source.rows}. {MORE_TEXT}"
        )
    return _Pool(source, token_T[: rows * length].view(rows, length), len(token_lists), tokens)


def _tell(progress: Progress, calibration: Calibration, number: int, tokens: int) -> None:
    """Progress over all sources, when the one of this number has given so many tokens."""
    wanted = [source.rows * calibration.length for source in calibration.sources]
    progress(
        Event(
            kind="stage",
            stage="calibrate",
            done=sum(wanted[:number]) + min(tokens, wanted[number]),
            total=sum(wanted),
            unit="tokens",
            text=source_name(calibration.sources[number]),
        )
    )


def _render(document: Document, template: ChatTemplate) -> str:
    """A document as the text that is tokenized. Raises FourfoldError as ChatTemplate.render does."""
    content = document.content
    return content if isinstance(content, str) else template.render(content, document.place)


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _document_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What separates documents: <|endoftext|> where the vocabulary has it, else EOS, else nothing.

    EOS comes second: chat models (Qwen) set it to the end of a turn, which no plain document ends with.
    """
    added = tokenizer.get_added_vocab()
    if END_OF_DOCUMENT in added:
        return [added[END_OF_DOCUMENT]]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


# ---- rows


def _share_rows(pools: Sequence[_Pool], length: int) -> tuple[list[int], tuple[str, ...]]:
    """How many rows each source gives, and notes on what differs from the recipe.

    What a built-in text lacks, the other built-in texts give, in the recipe's proportions.
    Raises FourfoldError if all of them are too short.
    """
    rows = [min(pool.source.rows, len(pool.token_RT)) for pool in pools]
    for _ in range(sum(pool.source.rows for pool in pools) - sum(rows)):
        spare = [i for i, pool in enumerate(pools) if pool.source.builtin and rows[i] < len(pool.token_RT)]
        if not spare:
            raise FourfoldError(_too_little([pool for pool in pools if pool.source.builtin], length))
        fewest = min(spare, key=lambda i: (rows[i] + 1) / pools[i].source.rows)
        rows[fewest] += 1
    return rows, tuple(
        f"built-in text {pool.source.builtin} gives {count} rows of {length} tokens, not {pool.source.rows}: "
        + (f"it holds {pool.tokens:,} tokens" if count < pool.source.rows else "in place of texts too short")
        for pool, count in zip(pools, rows, strict=True)
        if count != pool.source.rows
    )


def _too_little(bundled: Sequence[_Pool], length: int) -> str:
    wanted, found = sum(pool.source.rows for pool in bundled), sum(len(pool.token_RT) for pool in bundled)
    return (
        f"built-in texts: got {sum(pool.tokens for pool in bundled):,} tokens, {found} samples of {length}, expected "
        f"{wanted}. {MORE_TEXT}"
    )


def _digest(token_RT: Tensor, images: Sequence[ImageRow] = ()) -> str:
    sha = hashlib.sha256(str(tuple(token_RT.shape)).encode() + token_RT.numpy().astype("<i8").tobytes())
    sha.update("".join(row.digest for row in images).encode())
    return sha.hexdigest()
