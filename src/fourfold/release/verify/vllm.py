"""Level 3 with vLLM: every parameter written, drafts accepted, tokens and log-probabilities as they should be."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import convert, to_builtins

from fourfold.quantize.journal import REFERENCE
from fourfold.records.release import Reference
from fourfold.records.results import Check, Level
from fourfold.release.release import Release
from fourfold.release.verify.check import first_difference, judge, skip
from fourfold.release.verify.engine import Answer, Engine, load_problems
from fourfold.release.verify.image import NO_IMAGES, compare, prompt_around, takes_images
from fourfold.release.verify.load import Loaded, judge_load, schedules
from fourfold.serve.engines import VLLM, kernel_issues
from fourfold.serve.machine import look

SCRIPT = "vllm_engine.py"
DRAFT_TOKENS = 2
DEFAULTS = {"tokens": 32, "draft_tokens": 0, "noise": False, "image": None, "exact_experts": False, "load": None}
LOADS, WRITTEN, IMAGE = "starts", "every parameter written", "image prompt, vLLM"
TIES, ACCEPTED = "same tokens with MTP", "drafts accepted"
SCORES, STORED = "log-probabilities", "reference log-probabilities"
UNDER_LOAD, UNDER_LOAD_MTP = "under load", "under load, with MTP"
LOAD_BEGINS = "[fourfold] under load"  # in the log, where vllm_load.py begins
# How far log-probabilities are from the dequantized release's on average where kernels round activations to int8. Seen
# with the example model: 0.013 there, 0.007 with an exact kernel, 0.14 with zero points read one too low.
KERNEL_ERROR = 0.02
KERNEL = re.compile(r"\] (Using (?!max model len).*(?:[Bb]ackend|[Kk]ernel|Experts|MoEMethod).*)$", re.MULTILINE)
ENGINE = Level.ENGINE


@dataclass(frozen=True, kw_only=True)
class Runs:
    """drafting: None without a draft head; source: None without --source; no_image: why no image prompt was run."""

    plain: Answer
    drafting: Answer | None
    source: Answer | None
    no_image: str = ""


def run(
    engine: Engine, release: Release, source: Path | None, prompts: Sequence[Sequence[int]], draft: bool,
    load: Mapping[str, Any] | None = None,
) -> Runs:  # fmt: skip
    """Run the release with MTP, without, and the source, until one fails. An image that fails it is retried without.

    load: of `load_request`, for the release.
    """
    drafting = ask(engine, release.folder, prompts, "mtp", draft_tokens=DRAFT_TOKENS, load=load) if draft else None
    if drafting is not None and drafting.failure:
        return Runs(plain=drafting, drafting=drafting, source=None)
    no_image = "--source is wanted to compare with" if takes_images(release) else NO_IMAGES
    around = prompt_around(prompts) if takes_images(release) and source is not None else None
    plain = ask(engine, release.folder, prompts, "image", noise=True, image=around, load=load)
    if (
        around is not None and plain.failure and not _died_under_load(plain)
    ):  # it may be the vision path: without it the rest can still be seen
        no_image, around = f"vLLM does not run with images here: {plain.failure}", None
        plain = ask(engine, release.folder, prompts, "plain", noise=True, load=load)
    original = None if source is None or plain.failure else ask(engine, source, prompts, "source", image=around)
    return Runs(plain=plain, drafting=drafting, source=original, no_image="" if around else no_image)


def ask(engine: Engine, folder: Path, prompts: Sequence[Sequence[int]], title: str, **options: Any) -> Answer:
    """One model in a process of its own. options: of `request`."""
    (answer,) = ask_each(engine, [request(folder, prompts, **options)], title)
    return answer


def ask_each(engine: Engine, requests: Sequence[Mapping[str, Any]], title: str) -> list[Answer]:
    """Several small models in one process, which starts once: an answer for each, with its loads even if it fails."""
    whole = engine.ask(SCRIPT, title, requests)
    if whole.failure:
        return [whole] * len(requests)
    return [Answer(log=whole.log, content=one, failure=one.get("failure", "")) for one in whole.content]


def request(folder: Path, prompts: Sequence[Sequence[int]], **options: Any) -> dict[str, Any]:
    """A request to engines/vllm_engine.py. options: other values than DEFAULTS."""
    return {"model": str(folder.resolve()), "prompts": prompts, **DEFAULTS, **options}


def load_request(prompts: Sequence[Sequence[int]], at_once: int, tokens: int = 0) -> dict[str, Any]:
    """Of vllm_load.run. tokens: of each text, 0 for as many as suit the device."""
    rounds = [to_builtins(each) for each in schedules(at_once)]
    return {"prompts": prompts, "at_once": at_once, "tokens": tokens, "rounds": rounds}


def checks(runs: Runs, kl_mean: float | None, reference: Reference | None) -> Iterator[Check]:
    """kl_mean: of the release as quantize measured it, None if it did not; reference: its text is the last prompt."""
    first = runs.drafting or runs.plain
    started = next((answer for answer in (first, runs.plain) if answer.failure), None)
    if started is not None:
        name, said = LOADS, "the engine did not start"
        if _died_under_load(started):
            name, said = UNDER_LOAD, "the engine ended under load"
        yield judge(ENGINE, name, ["\n".join([started.failure, *(known_issues() if name != LOADS else ())])], "")
        others = (LOADS, WRITTEN, TIES, ACCEPTED, SCORES, STORED, IMAGE)
        yield from (skip(ENGINE, other, said) for other in others if other != name)
        return
    yield judge(ENGINE, LOADS, [], _started(first), **facts(runs))
    yield check_written(first)
    if runs.drafting is None:
        yield from (skip(ENGINE, name, "the release has no draft head") for name in (TIES, ACCEPTED))
    else:
        yield check_ties(runs.plain.content, runs.drafting.content)
        yield check_accepted(runs.drafting.content)
    if runs.source is None:
        yield skip(ENGINE, SCORES, "--source is wanted to compare with")
    elif runs.source.failure:
        fix = f"If the source does not fit this machine, verify without --source: '{STORED}' is for that"
        yield judge(ENGINE, SCORES, [f"the source did not run: {runs.source.failure}\n{fix}"], "")
    else:
        yield check_scores(runs.plain.content, runs.source.content, kl_mean)
    yield check_reference(runs.plain.content, reference)
    yield _check_image(runs, kl_mean)
    for name, answer in ((UNDER_LOAD_MTP, runs.drafting), (UNDER_LOAD, runs.plain)):
        if answer is not None and "load" in answer.content:
            yield judge_load(name, convert(answer.content["load"], Loaded), known_issues)


def _died_under_load(answer: Answer) -> bool:
    return bool(answer.failure) and LOAD_BEGINS in answer.log.read_text(encoding="utf-8", errors="replace")


def known_issues() -> list[str]:
    """Of vLLM's int4 expert kernels on this machine's GPUs."""
    return kernel_issues(VLLM, look().gpus, os.environ)


def _check_image(runs: Runs, kl_mean: float | None) -> Check:
    if runs.no_image or kl_mean is None:
        return skip(ENGINE, IMAGE, runs.no_image or "fourfold.json has no divergence to judge by")
    if runs.source is None or runs.source.failure:
        return skip(ENGINE, IMAGE, "the source did not run")
    limit = score_limit(kl_mean, engine_noise(runs.plain.content)[0])
    return compare(IMAGE, runs.source.content["image"], runs.plain.content["image"], limit)


def kernels(answer: Answer) -> list[str]:
    """What the engine's log says of the kernels that it chose, each once."""
    text = answer.log.read_text(encoding="utf-8", errors="replace")
    return list(dict.fromkeys(line.strip() for line in KERNEL.findall(text)))


def facts(runs: Runs) -> dict[str, Any]:
    """Fields of EngineFacts."""
    first = runs.drafting or runs.plain
    names = ("engine", "torch", "device", "start_seconds", "kv_cache_tokens", "decode_tokens_per_second")
    return {name: runs.plain.content[name] for name in names} | {
        "kernels": kernels(first),
        "load_seconds": sum(load["seconds_of_two_loads"] / 2 for load in first.content["loads"].values()),
        "decode_tokens_per_second_mtp": runs.drafting.content["decode_tokens_per_second"] if runs.drafting else None,
    }


def _started(answer: Answer) -> str:
    chosen = [line for line in kernels(answer) if "WNA16 MoE backend" in line or "exact" in line]
    return f"{answer.content['engine']} on {answer.content['device']}; {'; '.join(chosen)}"


def check_written(answer: Answer) -> Check:
    """Target and draft: the loader wrote every element, and no scale is zero or missing."""
    loads: Mapping[str, Any] = answer.content["loads"]
    problems = [f"{model}: {problem}" for model, load in loads.items() for problem in load_problems(load)]
    wrote = (f"{load['parameters']:,} of {model} ({load['elements']:,} elements)" for model, load in loads.items())
    return judge(ENGINE, WRITTEN, problems, f"parameters: {', '.join(wrote)}", loads=dict(loads))


def engine_noise(content: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and maximum difference of log-probabilities of the same tokens, decoded in a batch and scored as prompts."""
    return differences(content["logprobs"], content["logprobs_again"])


def differences(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean and maximum of |a - b|, element by element."""
    pairs = [pair for rows in zip(first, second, strict=True) for pair in zip(*rows, strict=True)]
    apart = [abs(one - other) for one, other in pairs]
    return sum(apart) / len(apart), max(apart)


def check_ties(plain: Mapping[str, Any], drafting: Mapping[str, Any]) -> Check:
    """Greedy tokens with and without MTP: the same up to a place where the two best are nearer than the noise."""
    _, noise = engine_noise(plain)
    problems, ties = [], 0
    for row, (ours, theirs) in enumerate(zip(plain["tokens"], drafting["tokens"], strict=True)):
        place = first_difference(ours, theirs)
        if place is None:
            continue
        margin = plain["margins"][row][place]
        ties += 1
        if margin > 2 * noise:  # either of the two may be off by it
            apart = f"the two best are {margin:.3f} apart and the engine's noise is {noise:.3f}"
            tokens = f"{theirs[place]} with MTP and {ours[place]} without"
            problems.append(f"prompt {row + 1}: token {place + 1} is {tokens}, where {apart}")
    count = len(plain["tokens"])
    seen = f"{count - ties} of {count} sequences the same, {ties} differ from a near tie on (noise {noise:.3f} at most)"
    return judge(ENGINE, TIES, problems, seen, sequences=count, near_ties=ties, noise=noise)


def check_accepted(drafting: Mapping[str, Any]) -> Check:
    """The engine's own counters. No accepted draft means that the head is there and knows nothing."""
    counters = drafting["drafts"]
    drafts, tokens, accepted = (counters[name] for name in ("drafts", "draft_tokens", "accepted_tokens"))
    problems = [] if drafts else ["no token was drafted"]
    if drafts and not accepted:
        problems = [f"0 of {tokens:,} draft tokens accepted: the draft head is missing or wrong"]
    shares = ", ".join(f"{count / max(drafts, 1):.1%}" for count in counters["accepted_by_position"])
    seen = f"{accepted:,} of {tokens:,} in {drafts:,} drafts; by position {shares}"
    return judge(ENGINE, ACCEPTED, problems, seen, **counters)


def score_limit(kl_mean: float, noise_mean: float) -> float:
    """How far log-probabilities of the text's tokens may be from the source's, on average.

    Differences with variance s^2 make a divergence of s^2 / 2, and are s sqrt(2 / pi) large on average if normal. Twice
    that, for another text and few tokens, and twice the engine's own noise. It catches kernels and layouts that are
    wrong; what is wrong with one expert is for the checks before.
    """
    return 2 * math.sqrt(4 * kl_mean / math.pi) + 2 * noise_mean


def check_scores(plain: Mapping[str, Any], source: Mapping[str, Any], kl_mean: float | None) -> Check:
    """Log-probabilities of the prompts' tokens against the source's in the same engine; greedy tokens are counted."""
    mean, most = differences(plain["prompt_logprobs"], source["prompt_logprobs"])
    said = f"differ by {mean:.4f} on average"
    if kl_mean is None:
        return skip(ENGINE, SCORES, f"{said}; fourfold.json has no divergence to judge by")
    rows = zip(plain["tokens"], source["tokens"], strict=True)
    same = sum(ours == theirs for row in rows for ours, theirs in zip(*row, strict=True))
    count = sum(map(len, plain["tokens"]))
    scored = sum(map(len, plain["prompt_logprobs"]))
    limit = score_limit(kl_mean, engine_noise(plain)[0])
    said += f" from the source's, {limit:.4f} allowed"
    seen = f"of {scored:,} tokens {said}; {same} of {count} greedy tokens the same"
    data = {"mean": mean, "most": most, "limit": limit, "same_tokens": same, "generated_tokens": count}
    return judge(ENGINE, SCORES, [said] if mean > limit else [], seen, **data)


def check_reference(plain: Mapping[str, Any], reference: Reference | None) -> Check:
    """Log-probabilities of the last prompt's tokens against those that quantize stored of the release itself.

    Needs no source. Allowed is twice the error of kernels that round activations and the engine's own noise.
    """
    if reference is None:
        return skip(ENGINE, STORED, f"no {REFERENCE}: a version of fourfold made the release that did not write it")
    mean, most = differences(plain["prompt_logprobs"][-1:], [reference.logprobs])
    limit = 2 * (KERNEL_ERROR + engine_noise(plain)[0])
    found, wanted = plain["prompt_likeliest"][-1], reference.likeliest
    count, size = len(wanted), len(wanted[0])
    best = sum(ours[0] == theirs[0] for ours, theirs in zip(found, wanted, strict=True))
    shared = sum(len({*ours} & {*theirs}) for ours, theirs in zip(found, wanted, strict=True)) / (count * size)
    said = f"differ by {mean:.4f} on average, {most:.4f} at most, from those quantize stored, {limit:.4f} allowed"
    seen = f"of {count} tokens {said}; best token the same at {best}, {shared:.0%} of the {size} best"
    data = {"mean": mean, "most": most, "limit": limit, "positions": count, "same_best": best, "shared_best": shared}
    return judge(ENGINE, STORED, [said] if mean > limit else [], seen, **data)
