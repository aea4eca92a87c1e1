"""Greedy texts of prompts alone and many at once, for vllm_engine.py. release/verify/load.py judges them."""

from __future__ import annotations

import time
from typing import Any

import vllm
from vllm import LLM, SamplingParams

TOKENS = {"cpu": 64, "gpu": 256}  # of each text: faults are caught by their rate
CANDIDATES = 2


def on_gpu() -> bool:
    return not vllm.platforms.current_platform.is_cpu()


def text_tokens(load: dict[str, Any]) -> int:
    """How many tokens each text has. load: of a request, with `tokens` 0 for as many as suit the device."""
    return int(load["tokens"] or TOKENS["gpu" if on_gpu() else "cpu"])


def run(llm: LLM, load: dict[str, Any]) -> dict[str, Any]:
    """The fields of load.Loaded. load: prompts (lists of token ids), at_once, rounds (of load.Schedule), tokens."""
    prompts, tokens = load["prompts"], text_tokens(load)
    print(f"[fourfold] under load: {load['at_once']} requests at once", flush=True)  # verify looks for it
    _, texts = serve(llm, prompts, {"order": [*range(len(prompts))], "joining": False}, 1, tokens)
    alone = [
        {"prompt": number, "text": text, "scores": score(llm, prompts[number], text)}
        for number, text in enumerate(texts)
    ]
    rounds = []
    for each in load["rounds"]:
        begin = time.perf_counter()
        steps, found = serve(llm, prompts, each, load["at_once"], tokens)
        seconds, replies = time.perf_counter() - begin, []
        for number, text in zip(each["order"], found, strict=True):
            same = text["tokens"] == texts[number]["tokens"]
            replies.append(
                {"prompt": number, "text": text, "scores": None if same else score(llm, prompts[number], text)}
            )
        rounds.append({"name": each["name"], "seconds": seconds, "replies": replies})
        print(f"[fourfold] {each['name']}: {len(found)} requests, {steps} steps, {seconds:.1f} s", flush=True)
    return {"at_once": load["at_once"], "alone": alone, "rounds": rounds, "on_gpu": on_gpu()}


def serve(
    llm: LLM, prompts: list[list[int]], schedule: dict[str, Any], at_once: int, tokens: int
) -> tuple[int, list[dict[str, Any]]]:
    """Run requests, at most `at_once` in flight; with `joining` at most one more joins at each step.

    Returns the steps, and the texts in the order of the schedule.
    """
    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=CANDIDATES)
    order, places, texts, steps, sent = schedule["order"], dict[str, int](), dict[int, dict[str, Any]](), 0, 0
    while len(texts) < len(order):
        while sent < len(order) and sent - len(texts) < at_once:
            name = f"load-{time.monotonic_ns()}"
            engine.add_request(name, {"prompt_token_ids": prompts[order[sent]]}, sampling)
            places[name] = sent
            sent += 1
            if schedule["joining"]:
                break
        for output in engine.step():
            if output.finished:
                texts[places[output.request_id]] = generated(output.outputs[0])
        steps += 1
    return steps, [texts[place] for place in range(len(order))]


def generated(output: Any) -> dict[str, Any]:
    """The fields of load.Text."""
    pairs = list(zip(output.token_ids, output.logprobs, strict=True))
    return {
        "tokens": list(output.token_ids),
        "logprobs": [step[token].logprob for token, step in pairs],
        "margins": [margin(step) for _, step in pairs],
    }


def margin(step: dict[int, Any]) -> float:
    """How far the second best token is behind the best."""
    best = sorted((candidate.logprob for candidate in step.values()), reverse=True)
    return float(best[0] - best[1])


def score(llm: LLM, prompt: list[int], text: dict[str, Any]) -> dict[str, list[float]]:
    """The fields of load.Scores: the text as a part of a prompt that runs alone."""
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    whole = {"prompt_token_ids": prompt + text["tokens"]}
    (output,) = llm.generate([whole], sampling, use_tqdm=False)
    steps = output.prompt_logprobs[len(prompt) :]
    return {
        "logprobs": [step[token].logprob for token, step in zip(text["tokens"], steps, strict=True)],
        "best": [max(candidate.logprob for candidate in step.values()) for step in steps],
    }
