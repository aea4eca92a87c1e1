"""fourfold verify: three levels of checks on a finished release, and verify.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msgspec import convert

from fourfold.datatypes import Event, Progress, ignore
from fourfold.quantize.calibrate import load_tokenizer
from fourfold.quantize.journal import hold
from fourfold.records.results import Check, EngineFacts, Level, Status, Verdict
from fourfold.release.contents import hash_file, loaded_files
from fourfold.release.release import Release
from fourfold.release.signature import Signer
from fourfold.release.verify import files, sglang, source, vllm
from fourfold.release.verify.byte_checks import ByteChecker
from fourfold.release.verify.check import check_signature, skip, write_verdict
from fourfold.release.verify.engine import Engine
from fourfold.release.verify.expected import expected_tensors
from fourfold.release.verify.image import IMAGE, check_image
from fourfold.release.verify.load import heldout_text, lengths
from fourfold.release.verify.load import windows as cut
from fourfold.release.verify.projection import Storage
from fourfold.release.verify.source import Source, open_source

PROMPTS, PROMPT_TOKENS = 16, 64


def verify(
    out: Path, *, model: Path | None = None, engine: Engine | None = None, load: int | None = None,
    signer: Signer | None = None, progress: Progress = ignore,
) -> Verdict:  # fmt: skip
    """Check a finished release and write verify.json into it. model: its source, for level 2 and comparisons.

    load: requests at once, for vLLM; None to send none. signer: whose signature OUT must have; None to look at none.

    Raises FourfoldError, before any work, if `out` is no finished release, is being written, or was not made from
    `model`.
    """
    release = Release.open(out)
    origin = None if model is None else open_source(release, model)
    with hold(out):
        seconds, begin = dict[str, float](), time.perf_counter()
        checks, bytes_read = check_bytes(release, origin, progress)
        checks = [*check_signature(out, signer), *checks]
        seconds["files and source"], begin = time.perf_counter() - begin, time.perf_counter()
        facts = None
        if engine is not None:
            progress(Event(kind="stage", stage="engine"))
            if any(check.status is Status.FAIL for check in checks):
                ran = [skip(Level.ENGINE, engine.name, "the files are not sound: fix them first")]
            else:
                ran = list(check_engine(release, model, engine, load))
            data = next((check.data for check in ran if check.name == vllm.LOADS and check.data), None)
            facts = None if data is None else convert(data, EngineFacts)
            checks += ran
            seconds["engine"] = time.perf_counter() - begin
        digests = {name: hash_file(out / name)[0] for name in loaded_files(out)}
        return write_verdict(
            out, model, engine, checks, content=release.state.output.content, files=digests, engine=facts,
            bytes_read=bytes_read, seconds=seconds,
        )  # fmt: skip


def check_bytes(release: Release, origin: Source | None, progress: Progress) -> tuple[list[Check], int]:
    """Levels 1 and 2, in one pass over all bytes. Returns how many were read, the source's too."""
    model = None if origin is None else origin.index.folder
    first, index = files.check_index(release)
    expected = expected_tensors(release, {} if index is None else index.headers)
    around = [files.check_config(release, expected), files.check_sidecars(release, model)]
    if index is None:
        names = {Level.FILES: files.AFTER_INDEX, Level.SOURCE: source.AFTER_INDEX if origin else ()}
        skipped = [skip(level, name, "the index is not sound") for level in names for name in names[level]]
        return [first, *around, *skipped], 0
    prefix = release.family.mtp_prefix
    storage = Storage(format=release.format, scheme=release.recipe.scheme, draft_prefix=prefix)
    beside, origins = (None, {}) if origin is None else (origin.index, origin.origins)
    checker = ByteChecker(index=index, expected=expected, storage=storage, source=beside, origins=origins)
    total = sum(header.size_bytes for header in index.headers.values())
    results = checker.run(_byte_progress(progress, total))
    checks = [first, files.check_tensors(release, index, expected), *around]
    checks += files.check_bytes(release, expected, results)
    if origin is not None:
        checks += source.check_source(release, origin, index, expected, results)
    return checks, results.bytes_read


def _byte_progress(progress: Progress, total_bytes: int) -> Callable[[int], None]:
    done, megabyte = 0, 10**6

    def tick(count: int) -> None:
        nonlocal done
        done = min(done + count, total_bytes)  # headers are read too
        total = max(total_bytes // megabyte, 1)
        progress(Event(kind="stage", stage="verify", done=done // megabyte, total=total, unit="MB"))

    return tick


def check_engine(release: Release, model: Path | None, engine: Engine, load: int | None) -> Iterator[Check]:
    """Level 3: the release in a real engine, or in the loader of one."""
    with engine.with_cache() as cached:
        if engine.name == "sglang":
            yield from sglang.checks(cached, release)
        else:
            yield from check_vllm(cached, release, model, load)


def check_vllm(engine: Engine, release: Release, model: Path | None, load: int | None) -> Iterator[Check]:
    texts = prompts(release)
    draft = release.has_draft(release.tensors.headers)
    runs = vllm.run(engine, release, model, texts, draft, load_request(release.folder, load) if load else None)
    kl_mean = release.state.metrics.get("kl_mean")
    yield from vllm.checks(runs, kl_mean, release.reference)
    if kl_mean is None or runs.plain.failure:
        yield skip(Level.ENGINE, IMAGE, "nothing to judge it by")
    else:
        yield check_image(release, model, texts, vllm.score_limit(kl_mean, 0), engine)


def prompts(release: Release) -> list[list[int]]:
    """Token ids of text that is never calibrated on, and last the text of the release's reference, if it has one."""
    found = windows(release.folder)
    return found if release.reference is None else [*found, release.reference.tokens]


def load_request(folder: Path, at_once: int, tokens: int = 0) -> dict[str, Any]:
    """Requests under load, of `vllm.load_request`: held-out text in the tokens of a checkpoint."""
    return vllm.load_request(cut(_tokens(folder, at_once), lengths(at_once // 2)), at_once, tokens)


def windows(folder: Path) -> list[list[int]]:
    """Windows of the bundled held-out text, far from each other, in the tokens of a checkpoint."""
    return cut(_tokens(folder), [PROMPT_TOKENS] * PROMPTS)


def _tokens(folder: Path, at_once: int = 0) -> list[int]:
    return list(load_tokenizer(folder).encode(heldout_text(at_once), add_special_tokens=False))
