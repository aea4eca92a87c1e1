"""verify of what `convert --format gguf|mlx` wrote: its files, every weight beside OUT, a run in the engine."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fourfold.bundled import HELDOUT_TEXTS, TEXT
from fourfold.datatypes import Event, FourfoldError, Progress, ignore
from fourfold.quantize.calibrate import load_tokenizer
from fourfold.quantize.identity import joined_digest
from fourfold.quantize.journal import hold
from fourfold.quantize.reference import make_reference
from fourfold.records.release import Export, Reference
from fourfold.records.results import Check, Level, Verdict
from fourfold.release.contents import CONVERSION, DOCUMENT_SUFFIXES, DOCUMENTS, hash_file, visible_files
from fourfold.release.conversion import Job, open_job
from fourfold.release.signature import Signer
from fourfold.release.sweep import Compute, embed, sweep_
from fourfold.release.verify.check import check_signature, first_difference, judge, skip, write_verdict
from fourfold.release.verify.engine import Answer, Engine
from fourfold.release.verify.reading import Reading, count_changes, open_reading
from fourfold.release.verify.run import windows

HASHES, COMPLETE, SETTINGS, EXPERTS, OTHERS = "sha256", "complete", "settings", "codes and scales", "other tensors"
LOADS, DIVERGENCE, TOKENS, DRAFTS = "starts", "KL divergence", "tokenizer", "same tokens with MTP"
# Nats, mean over the text of the reference. Seen with the example model: 0.0001 with llama.cpp, 0.0002 with MLX; at
# least 0.1 with V heads in another order, norms without their one, nibbles in another order, gate and up exchanged.
MOST_DIVERGENCE = 0.02
ROUNDING = 1e-6  # of log-probabilities in reference.json
SCRIPTS = {"llama.cpp": "llama_cpp_engine.py", "mlx": "mlx_engine.py"}
CANDIDATES = 200  # most likely tokens requested of llama.cpp: all of a reference's should be among them
TEXT_CHARACTERS = 20_000
NEAR_TIE = 0.05  # nats between the two best tokens: kernels for several tokens at a time sum in another order
# Combining marks, which the expressions of two tokenizers treat differently; digits, spaces, contractions.
ODD_TEXT = "नमस्ते दुनिया ก็ดี  \n\n  x\t 1234567 they'Ll I'D ©️ 日本語。\r\n"


def verify_export(
    new: Path, record: Export, *, out: Path | None, engine: Engine | None, signer: Signer | None = None,
    progress: Progress = ignore,
) -> Verdict:  # fmt: skip
    """Check what `convert` wrote into `new` and write verify.json into it. record: its conversion.json; out: the
    release it was made from, which the engine's numbers are compared with; signer: whose signature `new` must have.

    Raises FourfoldError, before any work, if `out` is not that release, or is wanted and not given.
    """
    if engine is not None and out is None:
        raise FourfoldError("--engine: got no --source, expected OUT: the engine's numbers are compared with OUT's")
    job = None if out is None else open_job(out, ignore)
    if job is not None and record.content and job.content != record.content:
        digests = f"got digest {job.content[:16]}..., expected {record.content[:16]}... as in {CONVERSION}"
        fix = "Give the release that was converted with --source"
        raise FourfoldError(f"{out}: {new} was not made from this release: {digests}. {fix}")
    with hold(new):
        seconds, begin = dict[str, float](), time.perf_counter()
        hashes = {name: hash_file(new / name) for name in visible_files(new) if not name.endswith(DOCUMENT_SUFFIXES)}
        checks = [*check_signature(new, signer), _check_hashes(record, hashes)]
        if job is not None:
            checks += check_source(job, open_reading(new, job, record), progress)
        seconds["files and source"], begin = time.perf_counter() - begin, time.perf_counter()
        if engine is not None and job is not None:
            progress(Event(kind="stage", stage="engine"))
            checks += check_engine(new, job, engine, record)
            seconds["engine"] = time.perf_counter() - begin
        content = {name: sha256 for name, (sha256, _) in hashes.items() if name in record.files}
        beside = {name: sha256 for name, (sha256, _) in hashes.items() if name not in DOCUMENTS}
        return write_verdict(
            new, job, engine, checks, content=joined_digest(content), files=beside, seconds=seconds,
            bytes_read=sum(size for _, size in hashes.values()),
        )  # fmt: skip


def _check_hashes(record: Export, hashes: Mapping[str, tuple[str, int]]) -> Check:
    wanted = record.files
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - hashes.keys())]
    for name in sorted(wanted.keys() & hashes.keys()):
        sha256, size = hashes[name]
        if size != wanted[name].bytes:
            problems.append(f"{name} has {size:,} bytes, {CONVERSION} has {wanted[name].bytes:,}")
        elif sha256 != wanted[name].sha256:
            problems.append(f"{name} has another sha256 than {CONVERSION}")
    return judge(Level.FILES, HASHES, problems, f"{len(wanted):,} files as `convert` wrote them")


def check_source(job: Job, reading: Reading, progress: Progress) -> Iterator[Check]:
    """All codes dequantized by NEW's layout and by OUT's; every other tensor made again from OUT's."""
    wanted = reading.wanted()
    try:
        names = reading.names()
    except FourfoldError as error:
        yield judge(Level.SOURCE, COMPLETE, [str(error)], "")
        yield from (skip(Level.SOURCE, name, "tensors cannot be found") for name in (SETTINGS, EXPERTS, OTHERS))
        return
    missing, extra = sorted(wanted.keys() - names), sorted(names - wanted.keys())
    problems = [f"{name} is missing" for name in missing] + [f"{name} is extra" for name in extra]
    yield judge(Level.SOURCE, COMPLETE, problems, f"{len(wanted):,} tensors, no other")
    yield judge(Level.SOURCE, SETTINGS, reading.settings_problems(), "as OUT makes them")
    if missing:
        yield from (skip(Level.SOURCE, name, "tensors are missing") for name in (EXPERTS, OTHERS))
        return

    def report(done: int) -> None:
        progress(Event(kind="stage", stage="verify", done=done, total=len(job.out.projections), unit="projections"))

    found = count_changes(reading, report)
    wrong = [
        f"{name}: {one.changed:,} of {one.weights:,} weights are not OUT's"
        for name, one in found.items()
        if one.changed
    ]
    weights = sum(one.weights for one in found.values())
    yield judge(Level.SOURCE, EXPERTS, wrong, f"{weights:,} weights dequantized, each exactly OUT's")
    others = sorted(name for name, has_codes in wanted.items() if not has_codes)
    different = [f"{name} is not what OUT makes" for name in others if reading.differs(name)]
    yield judge(Level.SOURCE, OTHERS, different, f"{len(others):,} tensors, bit for bit what OUT makes")


def check_engine(new: Path, job: Job, engine: Engine, record: Export) -> Iterator[Check]:
    """Compare next-token distributions with OUT's; of llama.cpp its tokenizer and greedy text with drafts, too."""
    reference = (job.release and job.release.reference) or made_reference(job)
    files = [name for name in sorted(record.files) if name.endswith(".gguf")]
    request: dict[str, Any] = {
        "model": str(new.resolve() / files[0] if files else new.resolve()),
        "tokens": reference.tokens,
        "likeliest": reference.likeliest,
    }
    texts = _texts(job.out.folder) if files else {}
    if files:
        request |= {"texts": [*texts], "drafts": record.has_drafts, "candidates": CANDIDATES, "wide": False}
    with engine.with_cache() as cached:
        answer = cached.ask(SCRIPTS[engine.name], "run", request)
    if answer.failure:
        yield judge(Level.ENGINE, LOADS, [answer.failure], "")
        return
    yield judge(Level.ENGINE, LOADS, [], str(answer.content["engine"]))
    yield check_divergence(answer, reference)
    if files:
        yield check_tokens(texts, answer.content["ids"])
        yield check_drafts(answer.content)


def _texts(folder: Path) -> dict[str, list[int]]:
    """Held-out text, odd text, all special tokens: what they are in the tokens of OUT."""
    tokenizer = load_tokenizer(folder)
    text = (TEXT / HELDOUT_TEXTS["wikitext-2-test"].file).read_text(encoding="utf-8")[:TEXT_CHARACTERS]
    added = "".join(tokenizer.get_added_vocab())
    return {one: list(tokenizer.encode(one, add_special_tokens=False)) for one in (text, ODD_TEXT, added)}


def check_tokens(texts: Mapping[str, list[int]], found: Sequence[Sequence[int]]) -> Check:
    """Identical ids; where they differ first, what each makes of it."""
    problems = []
    for (text, wanted), ids in zip(texts.items(), found, strict=True):
        if list(ids) != wanted:
            place = 1 + (first_difference(ids, wanted) or 0)
            problems.append(f"{text[:20]!r}...: token {place} of {len(wanted):,} is another than OUT's tokenizer has")
    return judge(Level.ENGINE, TOKENS, problems, f"{sum(map(len, texts.values())):,} tokens of text, marks and special")


def check_drafts(content: Mapping[str, Any]) -> Check:
    """Greedy text with drafts is the same, and some are accepted."""
    if "drafted" not in content:
        return skip(Level.ENGINE, DRAFTS, "the file has no draft head")
    accepted, drafted = content["accepted_tokens"], content["draft_tokens"]
    same, count, margin = content["same"], len(content["plain"]), content["margin"]
    problems = []
    if same < count and margin > NEAR_TIE:
        problems.append(f"token {same + 1} is another with drafts, where the two best are {margin:.3f} nats apart")
    if not accepted:
        problems.append(f"0 of {drafted:,} draft tokens accepted: the draft head is missing or wrong")
    seen = f"{same} of {count} greedy tokens the same{', then a near tie' if same < count else ''}, "
    seen += f"{accepted:,} of {drafted:,} draft tokens accepted"
    return judge(Level.ENGINE, DRAFTS, problems, seen, accepted=accepted, drafted=drafted)


def made_reference(job: Job) -> Reference:
    """What OUT gives for a text, where it has no reference.json: layer by layer, in BF16."""
    compute = Compute(torch.device("cpu"), torch.bfloat16)
    token_RT = torch.tensor(windows(job.out.folder)[:1])
    with torch.no_grad():
        rows = embed(job.out, token_RT, compute)
        sweep_([job.out], [rows], compute, lambda _: contextlib.nullcontext(lambda count: None))
        head = job.out.head(compute.device, compute.dtype)
        return make_reference(head, token_RT[0], rows.hidden_RTD[0])


def divergence(wanted: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> list[float]:
    """KL divergence in nats at each position, over the tokens that have log-probabilities, and all others as one."""

    def whole(row: Sequence[float]) -> list[float]:
        return [*row, math.log(max(1 - sum(map(math.exp, row)), ROUNDING))]

    pairs = (zip(whole(one), whole(other), strict=True) for one, other in zip(wanted, found, strict=True))
    return [sum(math.exp(p) * (p - q) for p, q in pair) for pair in pairs]


def check_divergence(answer: Answer, reference: Reference) -> Check:
    """Mean over the text."""
    if not all(math.isfinite(value) for row in answer.content["logprobs"] for value in row):
        return judge(Level.ENGINE, DIVERGENCE, ["the engine's log-probabilities are NaN or infinite"], "")
    values = divergence(reference.likeliest_logprobs, answer.content["logprobs"])
    mean = sum(values) / len(values)
    best = sum(ours == row[0] for ours, row in zip(answer.content["best"], reference.likeliest, strict=True))
    seen = f"{mean:.2e} nats from OUT on average, {MOST_DIVERGENCE:g} allowed"
    seen += f"; top-1 agreement {best} of {len(values)} positions"
    data = {"mean": mean, "most": max(values), "limit": MOST_DIVERGENCE, "positions": len(values), "same_best": best}
    return judge(Level.ENGINE, DIVERGENCE, [] if mean <= MOST_DIVERGENCE else [seen], seen, **data)
