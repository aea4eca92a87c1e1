"""Score and continue a text in llama.cpp, with and without drafts. Runs under an interpreter that has xllamacpp.

    python llama_cpp_engine.py REQUEST.json ANSWER.json

REQUEST: model (the first GGUF file), tokens (ids), likeliest (ids whose log-probabilities are wanted, for each token
but the last), texts (to tokenize), drafts (whether the file has a draft head), candidates (so many most likely tokens
are requested at each place), wide (attention in fp32).
ANSWER: engine, logprobs (of these ids; of one that is not among the candidates, the least candidate's), best (the most
likely id at each place), ids (of the texts), and with drafts: plain and drafted (the same continuation, twice), same
(so many of their tokens), margin (how far the second best token is behind after these), draft_tokens, accepted_tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

CONTINUED, DRAFT_TOKENS, SPARE, BIAS = 48, 2, 8, 10_000


def start(request: dict[str, Any], *, drafts: bool) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = request["model"]
    settings.n_ctx = len(request["tokens"]) + CONTINUED + SPARE
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.n_threads_http = 1
    settings.fit_params = settings.warmup = settings.ui = False
    settings.port = 0
    if request["wide"]:
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if drafts:
        settings.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        settings.speculative.draft.n_max, settings.speculative.draft.p_min = DRAFT_TOKENS, 0.0
    return xllamacpp.Server(settings)


def post(server: Any, path: str, content: dict[str, Any]) -> dict[str, Any]:
    """Ask the server's own interface, not OpenAI's, which counts fewer candidates."""
    address, data = f"{server.listening_address}/{path}", json.dumps(content).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, {"Content-Type": "application/json"})) as answer:
        return dict(json.load(answer))


def complete(server: Any, prompt: list[int], tokens: int, **options: Any) -> dict[str, Any]:
    defaults = {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}
    return post(server, "completion", {"prompt": prompt, "n_predict": tokens} | defaults | options)


def score(server: Any, prompt: list[int], candidates: int) -> list[dict[str, Any]]:
    """The most likely tokens after a prompt, best first, by the logits as they are.

    A bias, which does not show in them, has a plain token chosen: after one that ends inside a character the server
    reports nothing.
    """
    plain = tokenize(server, "a")[0]
    answer = complete(server, prompt, 1, n_probs=candidates, logit_bias=[[plain, BIAS]])
    found = answer["completion_probabilities"][0]["top_logprobs"]
    return [one | {"logprob": math.nan if one["logprob"] is None else one["logprob"]} for one in found]


def score_all(server: Any, request: dict[str, Any]) -> tuple[list[list[float]], list[int]]:
    """A prompt for each place: the server reports nothing of a prompt's own tokens."""
    logprobs, best = [], []
    for place, wanted in enumerate(request["likeliest"]):
        found = score(server, request["tokens"][: place + 1], request["candidates"])
        by_id = {one["id"]: one["logprob"] for one in found}
        logprobs.append([by_id.get(token, found[-1]["logprob"]) for token in wanted])
        best.append(found[0]["id"])
    return logprobs, best


def tokenize(server: Any, text: str) -> list[int]:
    return list(post(server, "tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"])


def draft(request: dict[str, Any]) -> dict[str, Any]:
    found = complete(start(request, drafts=True), request["tokens"], CONTINUED)
    counts = found["timings"]
    drafts = {"draft_tokens": counts["draft_n"], "accepted_tokens": counts["draft_n_accepted"]}
    return {"drafted": found["tokens"]} | drafts


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    answer: dict[str, Any] = draft(request) if request["drafts"] else {}
    server = start(request, drafts=False)
    logprobs, best = score_all(server, request)
    answer |= {
        "engine": f"llama.cpp of xllamacpp {importlib.metadata.version('xllamacpp')}, CPU",
        "logprobs": logprobs,
        "best": best,
        "ids": [tokenize(server, text) for text in request["texts"]],
    }
    if request["drafts"]:
        answer["plain"] = complete(server, request["tokens"], CONTINUED)["tokens"]
        pairs = zip(answer["plain"], answer["drafted"], strict=True)
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), CONTINUED)
        first, second = score(server, request["tokens"] + answer["plain"][:same], 2)
        answer |= {"same": same, "margin": first["logprob"] - second["logprob"]}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
