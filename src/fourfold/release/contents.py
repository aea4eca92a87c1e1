"""Files of a release: their names, which of them fourfold writes, their digests. Needs no torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fourfold.datatypes import FourfoldError
from fourfold.formats import EXPORTS
from fourfold.model.headers import Headers
from fourfold.model.json_object import read_object
from fourfold.quantize.journal import METRICS, WRITTEN
from fourfold.records.release import Export, State

VERDICT, SIGNATURE = "verify.json", "model.sig"
SHARD_SUFFIX = ".safetensors"
DOCUMENT_SUFFIXES = (".md", ".html", ".png", ".svg")
BENCH, LICENCE = "bench.json", "LICENSE"
EVAL_RESULTS = ".eval_results/lm-eval.yaml"  # what the Hub puts on leaderboards
DOCUMENTS = (VERDICT, METRICS, BENCH, EVAL_RESULTS, SIGNATURE)  # may be made after verify, no engine reads them
CARD, PAGE, FIGURES = "README.md", "report.html", "figures"
PLOTS = ("drift.png", "errors.png", "experts.png", "rivals.png")  # in FIGURES
CONVERSION = "conversion.json"  # of GGUF and MLX, and of another tool's release; fourfold.json has it of ours


def visible_files(folder: Path) -> list[str]:
    """All files of a release, by paths in it. Hidden files are not of the release, except EVAL_RESULTS."""
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path == EVAL_RESULTS or not re.search(r"(^|/)\.", path))


def loaded_files(folder: Path) -> list[str]:
    """Those beside the shards that engines may read or that fourfold goes by."""
    return [
        name
        for name in visible_files(folder)
        if not name.endswith((SHARD_SUFFIX, *DOCUMENT_SUFFIXES)) and name not in DOCUMENTS
    ]


def written_names(folder: Path, state: State | None) -> set[str]:
    """Every name that fourfold may write into a release, its shards and the source's LICENSE among them.

    state: fourfold.json; None for another tool's release, whose shards are those that its index names, and for what
    `convert` wrote as GGUF or for MLX.
    """
    if (export := read_export(folder)) is not None:
        return {*export.files, CONVERSION, VERDICT, CARD, SIGNATURE}
    if state:
        shards = set(state.output.shards)
    else:
        shards = {header.shard for header in Headers.open(folder).headers.values()}
    return {*shards, *WRITTEN, *DOCUMENTS, CONVERSION, CARD, PAGE, *(f"{FIGURES}/{name}" for name in PLOTS)}


def read_export(folder: Path) -> Export | None:
    """conversion.json of what `convert` wrote for an engine that reads no release; None for any other folder.

    Raises FourfoldError for one that is not as convert writes it.
    """
    path = folder / CONVERSION
    return Export.read(path) if path.is_file() and read_object(path).get("after") in EXPORTS else None


def hash_file(path: Path) -> tuple[str, int]:
    """sha256 and size of a file. Raises FourfoldError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        raise FourfoldError(f"{path}: cannot be read: {error.strerror}") from None


def named_repo(text: str) -> str | None:
    """The repository that the commands of a card of ours are for; None of another card."""
    found = re.search(r"AutoTokenizer\.from_pretrained\((['\"])(.+?)\1\)|<!-- fourfold: for (\S+) -->", text)
    return (found[2] or found[3]) if found else None
