"""A verified release on the Hugging Face Hub: exactly the bytes that verify saw, its card, a tag. docs/releases.md."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's, or httpx2's from 2.0 on
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from fourfold.datatypes import Event, FourfoldError, Progress, ignore, shortened
from fourfold.model.files import write_text
from fourfold.model.hub import SECRET, check_repo_id
from fourfold.quantize.identity import joined_digest
from fourfold.quantize.journal import FINISHED, STATE, hold, refuse_links
from fourfold.records.release import State
from fourfold.records.results import Verdict
from fourfold.release import contents, signature

MAIN = "main"
TAG_DIGITS = 12
NOTICE = re.compile(r"<!-- fourfold: not verified -->\n.*?<!-- /fourfold -->\n\n?", re.DOTALL)
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was sent or, in a dry run, would be.

    skipped: files of OUT that neither fourfold wrote nor --include names; unverified: how it differs from what verify
    has passed; sign: as of `publish`; tag: of the weights, "" without fourfold's record of them; commit, url: "" in a
    dry run.
    """

    repo: str
    branch: str
    files: tuple[PublishedFile, ...]
    skipped: tuple[str, ...]
    unverified: tuple[str, ...]
    reason: str
    sign: str
    tag: str
    commit: str = ""
    url: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def publish(  # noqa: PLR0913 - as many as the command has options
    out: Path,
    repo: str,
    *,
    include: Collection[str] = (),
    private: bool = False,
    branch: str = MAIN,
    force: str = "",
    sign: str = "",
    dry_run: bool = False,
    progress: Progress = ignore,
) -> Published:
    """Upload the files that fourfold wrote, and those of OUT that `include` names. Resumes after an interruption.

    force: reason for publishing what verify has not passed, which the card shows; sign: "keyless" or the path of a
    private key, for a signature of all that is sent. Every file is hashed before the first is sent; a dry run sends and
    writes nothing. Raises FourfoldError, without any token in it, if OUT holds a link, has no card or another
    repository's, is not verified, does not fit the repository, cannot be signed, or if the Hub refuses.
    """
    check_repo_id("REPO", repo)
    key = None if sign == signature.KEYLESS else Path(sign)
    if sign:
        signature.check_signing(key)
    text, reason = _card_text(out, repo), " ".join(force.split())
    allowed, there = _allowed(out, include) - {contents.SIGNATURE}, contents.visible_files(out)
    with hold(out) if (out / STATE).is_dir() else nullcontext():
        hashed = {}
        for name in (name for name in there if name in allowed):
            hashed[name] = _hashed(out, name)
            progress(Event(kind="stage", stage="publish", text=name))
        problems = tuple(_unverified(out, {file.name: file.sha256 for file in hashed.values()}, allowed))
        if problems and not reason:
            fix = 'Run `fourfold verify` first, or give --force "REASON", which the card will show'
            raise FourfoldError(f"{out}: not published: {shortened(problems)}. {fix}")
        reason = reason if problems else ""
        card = _card(text, reason)
        card_bytes, shards = card.encode(), _recorded(out)[1]
        hashed[contents.CARD] = PublishedFile(
            name=contents.CARD, size_bytes=len(card_bytes), sha256=hashlib.sha256(card_bytes).hexdigest()
        )
        published = Published(
            repo=repo, branch=branch, files=tuple(hashed[name] for name in sorted(hashed)),
            skipped=tuple(name for name in there if name not in {*allowed, contents.SIGNATURE}),
            unverified=problems, reason=reason, sign=sign,
            tag=f"fourfold-{joined_digest(shards)[:TAG_DIGITS]}" if shards else "",
        )  # fmt: skip
        if dry_run:
            return published
        if card_bytes != (out / contents.CARD).read_bytes():
            write_text(out / contents.CARD, card)
        if sign:
            signature.sign(out, key, published.skipped)
            signed = _hashed(out, contents.SIGNATURE)
            published = dataclasses.replace(published, files=(*published.files, signed))
        try:
            return _send(out, published, private)
        except FourfoldError:  # a ValueError too
            raise
        except (OSError, RuntimeError, ValueError, HTTPError) as error:  # RuntimeError: hf_xet's
            raise FourfoldError(f"{repo}: {SECRET.sub('…', _explain(error, repo))}") from None


def _hashed(out: Path, name: str) -> PublishedFile:
    sha256, size = contents.hash_file(out / name)
    return PublishedFile(name=name, size_bytes=size, sha256=sha256)


def _card_text(out: Path, repo: str) -> str:
    """Read the model card. Raises FourfoldError if there is none, or if it is for another repository."""
    if not out.is_dir():
        raise FourfoldError(f"{out}: got no such folder, expected the folder of a release")
    if not (out / contents.CARD).is_file():
        raise FourfoldError(f"{out}: got no {contents.CARD}, expected a model card; `fourfold report {out}` writes it")
    text = (out / contents.CARD).read_text(encoding="utf-8")
    if contents.named_repo(text) not in (None, repo):
        fix = f"Try: fourfold report {out} --repo {repo}"
        raise FourfoldError(
            f"{out / contents.CARD}: its commands are for {contents.named_repo(text)!r}, expected {repo!r}. {fix}"
        )
    return text


def _allowed(out: Path, include: Collection[str]) -> set[str]:
    """Names that may be sent. Raises FourfoldError for a link in OUT, and for an `include` that is no file of it."""
    refuse_links(out)
    there = contents.visible_files(out)
    for path in (out / name for name in there):
        if path.is_symlink():
            fix = "Remove it, or put the file in its place"
            raise FourfoldError(f"{path}: got a link to {path.readlink()}, expected a file. {fix}")
    for name in include:
        if name not in there:
            raise FourfoldError(f"--include: got {name!r}, expected the path of a file in {out}, as in docs/notes.md")
    return contents.written_names(out, State.find(out / FINISHED)) | set(include)


def _unverified(out: Path, digests: Mapping[str, str], allowed: Collection[str]) -> Iterator[str]:
    """Why these files, of names that may be sent, are not what verify saw and passed."""
    verdict = Verdict.find(out / contents.VERDICT)
    if verdict is None:
        yield f"there is no {contents.VERDICT}: it was never verified"
        return
    if not verdict.passed:
        yield f"{contents.VERDICT} says that a check failed"
    if verdict.files is None:
        yield f"{contents.VERDICT} does not say which files it is about"
        return
    record, shards = _recorded(out)
    if joined_digest(shards) != verdict.content:
        yield f"{record} and {contents.VERDICT} are of different files"
    wanted = {**shards, **verdict.files}
    there = [
        name for name in contents.visible_files(out) if name.endswith(contents.SHARD_SUFFIX)
    ]  # a stray one too: engines load all
    loaded = [name for name in contents.loaded_files(out) if name in allowed]
    for name in sorted({*there, *loaded, *(name for name in wanted if name in allowed)}):
        if name not in wanted:
            yield f"{name} was not there when it was verified"
        elif name not in digests:
            yield f"{name} was verified and is not there"
        elif digests[name] != wanted[name]:
            yield f"{name} has changed since it was verified"


def _card(text: str, reason: str) -> str:
    """The card with the reason why it was published unverified below its front matter, or without one of before."""
    text = NOTICE.sub("", text)
    if not reason:
        return text
    said = re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", html.escape(reason, quote=False))
    warning = f"> **Published without passing `fourfold verify`.** {said}"
    notice = f"<!-- fourfold: not verified -->\n{warning}\n<!-- /fourfold -->\n\n"
    front = FRONT_MATTER.match(text)
    place = front.end() if front else 0
    return text[:place] + notice + text[place:]


def _recorded(out: Path) -> tuple[str, dict[str, str]]:
    """The file that has the digests of what engines load, and these: shards of a release; all that `convert` wrote."""
    if (export := contents.read_export(out)) is not None:
        return contents.CONVERSION, {name: file.sha256 for name, file in export.files.items()}
    state = State.find(out / FINISHED)
    return FINISHED, {name: shard.sha256 for name, shard in state.output.shards.items()} if state else {}


def _send(out: Path, published: Published, private: bool) -> Published:
    """Repository, branch, files, a look at what arrived, tag."""
    api, repo, branch = HfApi(), published.repo, published.branch
    api.create_repo(repo, private=True if private else None, exist_ok=True)
    if private and not api.model_info(repo).private:
        fix = "Change that on its page, or publish to another REPO"
        raise FourfoldError(f"{repo}: got a public repository, expected a private one (--private). {fix}")
    if branch != MAIN:
        api.create_branch(repo, branch=branch, exist_ok=True)
    ours = {file.name for file in published.files}
    others = set(api.list_repo_files(repo, revision=branch)) - ours
    if stale := sorted(name for name in others if name.endswith(contents.SHARD_SUFFIX)):
        raise FourfoldError(
            f"{repo}: has {len(stale)} shards of another release on {branch} ({stale[0]}), which engines would load "
            "too. Delete them there, or publish to another --branch or REPO"
        )
    if contents.SIGNATURE in others:
        fix = "Give --sign, or delete it there"
        raise FourfoldError(f"{repo}: has {contents.SIGNATURE} on {branch}, which is of other files than these. {fix}")
    names = [re.sub(r"([*?[])", r"[\1]", name) for name in sorted(ours)]
    done = api.upload_folder(
        repo_id=repo, folder_path=out, revision=branch, allow_patterns=names,
        commit_message=f"Release {published.tag}".strip(),
    )  # fmt: skip
    _check_arrived(api, published, done.oid)
    if published.tag:
        api.create_tag(repo, tag=published.tag, revision=done.oid, exist_ok=True)
    return dataclasses.replace(published, commit=done.oid, url=f"{constants.ENDPOINT}/{repo}/tree/{branch}")


def _check_arrived(api: HfApi, published: Published, commit: str) -> None:
    """Sizes of all files on the Hub, and hashes of the large ones, which it keeps by their sha256."""
    tree = api.list_repo_tree(published.repo, recursive=True, revision=commit)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    for file in published.files:
        found = there.get(file.name)
        if found is None or found.size != file.size_bytes or (found.lfs and found.lfs.sha256 != file.sha256):
            got = "is not there" if found is None else f"has {found.size:,} bytes, or others"
            sent = f"{file.size_bytes:,} were sent. Publish again"
            raise FourfoldError(f"{published.repo}: {file.name} {got} after the upload, {sent}")


def _explain(error: Exception, repo: str) -> str:
    page = f"{constants.ENDPOINT}/{repo}"
    resume = "Rerun the same command to resume"
    if isinstance(error, LocalTokenNotFoundError):
        return "not logged in. Try: `hf auth login` with a token that may write, or HF_TOKEN"
    if not isinstance(error, HfHubHTTPError):
        return f"the upload broke off ({type(error).__name__}: {error}). {resume}"
    status = error.response.status_code
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        fix = "Try: `hf auth login` with a token that has write access to it, or another HF_TOKEN where that is set"
        return f"the Hub answered {status}: this account may not write {page}. {fix}"
    return f"the Hub answered {status} ({error.server_message or 'no reason given'}). {resume}"
