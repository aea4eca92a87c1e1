"""A model as the user names it: a folder, or a Hub id, downloaded into the Hub's own cache."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import DryRunFileInfo, constants, get_session, hf_hub_url, metadata_load, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's, or httpx2's from 2.0 on
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id  # type: ignore[attr-defined]  # not in its __all__
from huggingface_hub.utils.tqdm import tqdm
from yaml import YAMLError  # type: ignore[import-untyped]

from fourfold.datatypes import FourfoldError
from fourfold.model.config import CONFIG, local_folder, no_such_folder, read_source_config
from fourfold.model.files import SIDECARS
from fourfold.model.headers import INDEX_NAME

CARD = "README.md"
WANTED = [CONFIG, INDEX_NAME, "*.safetensors", CARD, *SIDECARS]
WITHOUT_WEIGHTS = [name for name in WANTED if name != "*.safetensors"]
UNWANTED = ["*/*", "consolidated*.safetensors"]  # other formats in subfolders, Mistral's second copy
HEADERS = ".fourfold-headers"  # in the Hub's cache: folders whose shards have headers and no data
HEADER_BYTES, HEADERS_AT_ONCE = 2**17, 8  # asked for at first, of a shard; shards
SECRET = re.compile(r"hf_[\w.-]{16,}|(?<=bearer )\S+|(?<=\?)\S+", re.IGNORECASE)  # "?": signed addresses


def hub_name(folder: Path) -> str | None:
    """Return org/name of a folder in the Hub's cache, or a link to one: models--org--name/snapshots/REVISION."""
    parts = folder.resolve().parts
    match = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", parts[-3]) if len(parts) > 3 else None
    return f"{match[1]}/{match[2]}" if match and parts[-2] == "snapshots" else None


def check_repo_id(given: str, name: str) -> None:
    """Raise FourfoldError unless `name` is org/name as the Hub takes it. given: the argument that it came in."""
    try:
        validate_repo_id(name)
        refused = "/" not in name
    except HFValidationError:
        refused = True
    if refused:
        raise FourfoldError(
            f"{given}: got {name!r}, expected org/name as the Hub takes it: letters, digits, '-', '_' and '.'"
        )


def stated_terms(folder: Path) -> dict[str, Any]:
    """Return licence and languages from the model's card: license, license_name, license_link, language.

    Values that the Hub does not take are left out; a card that cannot be read states nothing. An engine downloads no
    card, so one of the same model's other snapshots in the Hub's cache is read where this one has none.
    """
    others = sorted(folder.resolve().parent.glob(f"*/{CARD}")) if hub_name(folder) else []
    card = next((path for path in (folder / CARD, *others) if path.is_file()), folder / CARD)
    try:
        stated = metadata_load(card) or {}
    except (OSError, ValueError, YAMLError):  # no card, or not one of the Hub's
        return {}
    names = ("license", "license_name", "license_link")
    terms: dict[str, Any] = {name: stated[name] for name in names if isinstance(stated.get(name), str)}
    languages = stated.get("language")
    if isinstance(languages, str | list):
        spoken = [one for one in ([languages] if isinstance(languages, str) else languages) if isinstance(one, str)]
        terms |= {"language": spoken} if spoken else {}
    return terms


class _Silent(tqdm):
    """No progress bar: huggingface_hub shows one of its bars also where nobody looks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]


def resolve_model(model: str, *, progress: bool = True) -> Path:
    """The folder of a model: an existing folder as it is, or `org/name` or `org/name@revision` of the Hub.

    Files that the cache has are not downloaded again, and a complete model in the cache needs no network.
    progress: show download bars on stderr. Raises FourfoldError, without any token in it, if there is no such
    folder or repository, it may not be read, the Hub cannot be reached or the disk is too small.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    repo, _, revision = model.partition("@")
    try:
        return _download(repo, revision or None, progress)
    except HFValidationError:
        raise no_such_folder(model) from None


def resolve_headers(model: str, *, progress: bool = True) -> Path:
    """As `resolve_model`, for whoever reads no weight: of a model that is not in the cache, shards' headers alone.

    They are fetched by range requests, some 100 kB of a shard. The folder's shards have their true sizes and holes in
    place of data, which take no room on the disk; it lies beside the Hub's own cache, where no other tool looks.
    """
    if local_folder(model) is not None:
        return resolve_model(model, progress=progress)
    repo, _, revision = model.partition("@")
    asked = f"{repo}@{revision}" if revision else repo
    options: dict[str, Any] = {"revision": revision or None, "ignore_patterns": UNWANTED, "tqdm_class": _Silent}
    try:
        planned = snapshot_download(repo, dry_run=True, allow_patterns=WANTED, **options)
        missing = [file for file in planned if file.filename.endswith(".safetensors") and file.will_download]
        if not missing:
            return resolve_model(model, progress=progress)
        small = Path(snapshot_download(repo, allow_patterns=WITHOUT_WEIGHTS, **options))
        read_source_config(small)
        return _fetch_headers(repo, small, planned)
    except HFValidationError:
        raise no_such_folder(model) from None
    except DryRunError:
        return resolve_model(model, progress=progress)  # the cache may do, or it says why not
    except (OSError, RuntimeError, HTTPError) as error:
        raise FourfoldError(f"{asked}: {SECRET.sub('…', _explain(error, repo, revision or None))}") from None


def _fetch_headers(repo: str, small: Path, planned: Sequence[DryRunFileInfo]) -> Path:
    """small: the snapshot in the Hub's cache, without shards."""
    folder = Path(constants.HF_HUB_CACHE) / HEADERS / small.parent.parent.name / "snapshots" / small.name
    folder.mkdir(parents=True, exist_ok=True)
    for path in small.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    shards = [file for file in planned if file.filename.endswith(".safetensors")]
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        for _ in pool.map(lambda file: _fetch_header(repo, file, folder / file.filename), shards):
            pass
    return folder


def _fetch_header(repo: str, file: DryRunFileInfo, path: Path) -> None:
    size = file.file_size or 0
    if path.is_file() and path.stat().st_size == size:
        return
    start = _range(repo, file, 0, HEADER_BYTES)
    wanted = 8 + int.from_bytes(start[:8], "little")  # safetensors: the header's length, then the header
    if len(start) < wanted <= size:
        start += _range(repo, file, len(start), wanted - len(start))
    part = path.with_name(f".{path.name}.tmp")
    part.write_bytes(start[:wanted])
    os.truncate(part, size)
    part.replace(path)


def _range(repo: str, file: DryRunFileInfo, start: int, count: int) -> bytes:
    """Bytes of a file of the Hub; fewer where it ends. Raises RuntimeError for a server that would send all of it."""
    url = hf_hub_url(repo, file.filename, revision=file.commit_hash)
    asked = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=asked, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != 206 and (file.file_size or 0) > count:
            raise RuntimeError(f"{file.filename}: the server does not send a part of a file")
        return answer.read()[:count]


def _download(repo: str, revision: str | None, progress: bool) -> Path:
    options: dict[str, Any] = {"revision": revision, "allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        try:
            planned = snapshot_download(repo, dry_run=True, tqdm_class=_Silent, **options)
        except DryRunError:
            planned = None  # the Hub cannot be asked; the cache may do, or else the next call says why
        if planned is not None:
            _check_planned(repo, planned)
            first = snapshot_download(repo, revision=revision, allow_patterns=[CONFIG], tqdm_class=_Silent)
            read_source_config(Path(first))  # gigabytes are not fetched for a model that will be refused
        return Path(snapshot_download(repo, tqdm_class=None if progress else _Silent, **options))
    except (OSError, RuntimeError, HTTPError) as error:  # RuntimeError: hf_xet's
        asked = f"{repo}@{revision}" if revision else repo
        raise FourfoldError(f"{asked}: {SECRET.sub('…', _explain(error, repo, revision))}") from None


def _check_planned(repo: str, planned: list[DryRunFileInfo]) -> None:
    """Whether there are weights that can be read, and room for what is not in the cache yet."""
    if not any(file.filename.endswith(".safetensors") for file in planned):
        raise FourfoldError(f"{repo}: this repository has no *.safetensors; pickles and GGUF are not read")
    wanted = sum(file.file_size or 0 for file in planned if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if wanted > free:
        raise FourfoldError(
            f"{repo}: {wanted:,} bytes are to be downloaded to {cache}, where {free:,} are "
            "free; make room, or set HF_HUB_CACHE to a folder on a larger disk"
        )


def _explain(error: Exception, repo: str, revision: str | None) -> str:
    """What went wrong and the way out. Order matters: GatedRepoError is a RepositoryNotFoundError too."""
    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the Hub did answer, and the cache was only the way out
    if isinstance(error, GatedRepoError):
        return f"a gated model. Ask for access at {page}, then log in with `hf auth login` and run this again"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no such folder, and no model at {page} for this account. If it is private, log in with "
            "`hf auth login` under an account that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the model has no branch, tag or commit {revision!r}; see {page}/commits"
    if isinstance(error, LocalEntryNotFoundError):
        offline = isinstance(error.__cause__, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else type(error.__cause__ or error).__name__
        return (
            f"no such folder, not all of it in the cache {constants.HF_HUB_CACHE}, and the Hub cannot be "
            f"asked ({reason}). Give a local folder with the model, or go online"
        )
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code == 401:
            return (
                "the Hub does not accept the token: it is wrong or has expired. Log in with "
                "`hf auth login`, or mend HF_TOKEN where that is set"
            )
        reason = error.server_message or "no reason given"
        return (
            f"the Hub answered {error.response.status_code} ({reason}). If that is about access, see "
            f"{page} and `hf auth login`; if not, run this again later"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of the cache {constants.HF_HUB_CACHE} is full; make room, or set HF_HUB_CACHE to "
            "a folder on a larger disk. Complete files are kept, the same command goes on"
        )
    return (
        f"the download broke off ({type(error).__name__}: {error}). Complete files are kept, the same command goes on"
    )
