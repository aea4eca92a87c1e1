"""Sources of text as documents: bundled texts, .jsonl, .txt and .parquet files, datasets of the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourfold.bundled import CALIBRATION_TEXTS, HELDOUT_TEXTS, TEXT
from fourfold.datatypes import FourfoldError
from fourfold.recipe import Heldout, Recipe, Source

OVER_READ = 4  # a file or dataset is read until it gave so many times the tokens wanted; rows are drawn from all
SHUFFLE_BUFFER = 256  # documents read ahead of a Hub dataset: its first ones are often of one kind


@dataclass(frozen=True)
class Document:
    """One document. place: where it was read, for errors; content: text, or a conversation as a list."""

    place: str
    content: Any

    def plain_text(self) -> str:
        """The words alone, without what a chat template adds."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(message.get("content") or "") for message in self.content)


def source_name(source: Source) -> str:
    """How results and messages call a source; free of folders, since the choice of rows is seeded with it."""
    if source.path:
        return Path(source.path).name
    dataset = Path(source.dataset).name if Path(source.dataset).is_absolute() else source.dataset
    return source.builtin or dataset + (f":{source.config}" if source.config else "")


def as_file(source: Source) -> Source:
    """A built-in source as its file in the package; other sources unchanged."""
    if not source.builtin:
        return source
    text = CALIBRATION_TEXTS[source.builtin]
    path = str(TEXT / text.file)
    return replace(source, builtin="", path=path, kind=text.kind, fields=text.fields, licence=text.licence)


def heldout_path(heldout: Heldout) -> str:
    """The file of a held-out text."""
    return str(TEXT / HELDOUT_TEXTS[heldout.builtin].file) if heldout.builtin else heldout.path


def text_digests(recipe: Recipe) -> dict[str, str] | None:
    """sha256 of each file of text that a recipe reads; None if it also reads a dataset or images, more than these."""
    if recipe.reads_images or any(source.dataset for source in recipe.calibration.sources):
        return None
    paths = [heldout_path(recipe.heldout), *(as_file(source).path for source in recipe.calibration.sources)]
    with _read_errors():
        return {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


@contextmanager
def _read_errors(path: str = "calibration or held-out text") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FourfoldError(f"{path}: cannot be read: {error.strerror}") from None


def check_file(path: str) -> None:
    """Raises FourfoldError if there is no such file."""
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FourfoldError(
            f"{path} {what}; a .jsonl, .txt or .parquet file is wanted "
            "(a relative path counts from the recipe's folder)"
        )


def read_documents(source: Source, seed: int) -> Iterator[Document]:
    """Documents of a source one by one; those without text are passed over. seed: order of a Hub dataset.

    Raises FourfoldError naming the place: text that cannot be read, a missing field, one of the wrong type.
    """
    source = as_file(source)
    records = hub_records(source, seed) if source.dataset else file_records(source.path, source.fields)
    extract = conversation if source.kind == "chat" else _joined_fields
    for place, record in records:
        content = extract(place, record, source.fields)
        if content:
            yield Document(place, content)


def heldout_documents(wanted: Heldout) -> tuple[str, str, list[Document]]:
    """(title, how its parts are joined, the parts ready to be joined) of the held-out text."""
    bundled = HELDOUT_TEXTS.get(wanted.builtin)
    path = heldout_path(wanted)
    check_file(path)
    title = bundled.title if bundled else Path(path).name
    if bundled and bundled.kind == "chat":
        source = Source(rows=1, path=path, kind=bundled.kind, fields=bundled.fields)
        joining = "conversations in the model's chat template, one after another"
        return title, joining, list(read_documents(source, seed=0))
    if path.endswith(".txt"):
        # wikitext-2-test.txt is one row of the data set a line, blank rows among them. Taken like this, the
        # example model's perplexity on every sixth window of 512 is 28.8 (its makers measured about 28 on
        # all of them); with rows joined by "\n\n" it is 31.0.
        try:
            with _read_errors(path):
                text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FourfoldError(f"{path}: not UTF-8 text: {error}") from None
        return title, "one row a line, blank rows included, as in the file", [Document(path, text)]
    texts = []
    for place, record in file_records(path, ["text"]):
        if not isinstance(record.get("text"), str):  # an empty string is a row: wikitext has blank ones
            raise FourfoldError(f"{place}: field 'text' is wanted in held-out text, with a string in it")
        texts.append(record["text"])
    return title, "rows joined with a blank line", [Document(path, "\n\n".join(texts))]


def file_records(path: str, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of a file by its suffix; a .txt file gives its paragraphs as the first of `fields`."""
    check_file(path)
    reader = {".jsonl": _jsonl_records, ".txt": _paragraph_records, ".parquet": _parquet_records}
    try:
        with _read_errors(path):
            yield from reader[Path(path).suffix](path, fields)
    except UnicodeDecodeError as error:
        raise FourfoldError(f"{path}: not UTF-8 text: {error}") from None


def _jsonl_records(path: str, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # also a UnicodeDecodeError
                raise FourfoldError(f"{place}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise FourfoldError(f"{place}: a JSON object is wanted, found {type(record).__name__}")
            yield place, record


def _paragraph_records(path: str, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8") as lines:
        paragraph: list[str] = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield f"{path}, before line {number}", {fields[0]: "".join(paragraph)}
                paragraph = []
        if paragraph:
            yield f"{path}, at its end", {fields[0]: "".join(paragraph)}


def _parquet_records(path: str, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowInvalid  # noqa: PLC0415  only .parquet sources need it
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415

    try:
        with ParquetFile(path) as file:
            _require_fields(path, file.schema_arrow.names, fields)
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=list(fields)):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except ArrowInvalid as error:
        raise FourfoldError(f"{path}: not a Parquet file that pyarrow reads: {error}") from None


def hub_records(source: Source, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of a Hub dataset (or a folder in a layout that `datasets` knows), streamed, shuffled by seed.

    "name@revision" pins a revision.
    """
    # datasets takes a second to import, and only Hub sources need it.
    from datasets import load_dataset  # noqa: PLC0415
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    # httpx.HTTPError or httpx2.HTTPError, by the version of huggingface_hub
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # noqa: PLC0415

    name, _, revision = source.dataset.partition("@")
    options = {"split": source.split, "revision": revision or None, "streaming": True}
    try:
        stream = load_dataset(name, source.config or None, **options)
        if stream.column_names:
            _require_fields(_described(source), stream.column_names, source.fields)
            stream = stream.select_columns(list(source.fields))
        if source.kind == "image":
            stream = stream.decode(False)  # files as they are: they are checked before they are decoded
        for number, record in enumerate(stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), start=1):
            yield f"{_described(source)}, document {number}", record
    except FourfoldError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError, HTTPError) as error:
        raise FourfoldError(_hub_problem(source, error)) from error


def _described(source: Source) -> str:
    parts = [f"config {source.config}"] if source.config else []
    return f"dataset {source.dataset} ({', '.join([*parts, f'split {source.split}'])})"


def _hub_problem(source: Source, error: Exception) -> str:
    """One sentence on why a dataset gave no text, and what to do."""
    said = str(error).strip().partition("\n")[0]
    if "gated" in said:
        way_out = "accept its terms on its page on the Hub, then log in with `hf auth login`"
    elif isinstance(error, ConnectionError):
        way_out = "the Hub cannot be reached: go on line, or take built-in texts or files (path = ...)"
    elif isinstance(error, FileNotFoundError):
        way_out = "check the name on the Hub (a private dataset wants `hf auth login`)"
    elif isinstance(error, ValueError):
        way_out = "check config and split on the dataset's page"
    else:
        way_out = "download it and give its file as path = ..., or take another source"
    return f"{_described(source)} cannot be read: {said or type(error).__name__}. Way out: {way_out}"


def _require_fields(place: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise FourfoldError(
            f"{place}: no field {missing[0]!r}; it has {', '.join(sorted(found)) or 'none'}. "
            "Way out: name the right ones in the source's `fields`"
        )


def _joined_fields(place: str, record: dict[str, Any], fields: Sequence[str]) -> str:
    """The fields of a record, joined by a blank line; empty and null ones are left out."""
    _require_fields(place, list(record), fields)
    for name in fields:
        if not isinstance(record[name], str | None):
            found = type(record[name]).__name__
            hint = " (kind = 'chat' reads conversations)" if found == "list" else ""
            raise FourfoldError(f"{place}: field {name!r} is of type {found}; text is wanted{hint}")
    return "\n\n".join(record[name] for name in fields if record[name] and record[name].strip())


def conversation(place: str, record: Mapping[str, Any], fields: Sequence[str]) -> list[dict[str, Any]]:
    """The messages in the one field of a record; none for null."""
    _require_fields(place, list(record), fields)
    messages = record[fields[0]] or []
    if not isinstance(messages, list) or not all(isinstance(item, dict) and "role" in item for item in messages):
        wanted = "a list of messages with `role` and `content`"
        raise FourfoldError(f"{place}: field {fields[0]!r} is no conversation; {wanted} is wanted")
    return messages
