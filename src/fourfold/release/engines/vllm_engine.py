"""Load a model in real vLLM, prove the load, generate and measure. Runs under the interpreter of vLLM's environment.

    python vllm_engine.py REQUEST.json ANSWER.json

REQUEST: a list of runs, each with model (folder), prompts (lists of token ids), tokens (to generate for each),
draft_tokens (0: no MTP), noise (score what was generated once more, one sequence at a time), image (one more prompt,
with an image: its tokens before and after; null for none), exact_experts (the reference kernel in any case), load (of
vllm_load.run; null for none). With load the engine runs as it is served, otherwise eager and without prefix caching.
ANSWER: a list with what each run gave. Whatever goes wrong in a single run is a traceback on stderr and an exit code
other than 0. Of several runs each answers for itself: failure says why it gave no more than its loads.
Several runs in one process are for small models on a CPU: vLLM does not give all of its memory back.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the loader must run in this process to be watched

import numpy
import PIL.Image
import poison
import torch
import vllm
import vllm_load
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models import registry
from vllm_load import CANDIDATES, margin

# Parameters that vLLM registers with a value of its own, whether or not a checkpoint has them.
DEFAULTED = (
    "w13_bias", "w2_bias", "g_idx_sort_indices", "weight_g_idx", ".q_scale", ".k_scale", ".v_scale", ".prob_scale",
    "q_zero_point", "k_zero_point", "v_zero_point",
)  # fmt: skip
IMAGE_SIDE, IMAGE_ROOM = 96, 384  # pixels of noise; tokens, for processors that enlarge small images
TOP_LOGPROBS = 20  # per prompt position: the most that vLLM returns by default


def watch_loader(loads: dict[str, Any]) -> None:
    """Make vLLM's loader load each model, target and draft, over poison."""
    load_weights = DefaultModelLoader.load_weights

    def watched(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        start = time.perf_counter()
        loads[type(model).__name__] = poison.load_twice(
            model, lambda: load_weights(self, model, model_config), DEFAULTED
        ) | {"seconds_of_two_loads": time.perf_counter() - start}

    DefaultModelLoader.load_weights = watched


def start(request: dict[str, Any]) -> LLM:
    drafts, load = request["draft_tokens"], request["load"]
    longest, most = max(map(len, request["prompts"])) + request["tokens"], len(request["prompts"])
    longest += IMAGE_ROOM if request["image"] else 0
    if load:
        longest = max(longest, max(map(len, load["prompts"])) + vllm_load.text_tokens(load))
        most = max(most, load["at_once"])
    options: dict[str, Any] = {}
    if drafts:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    config = json.loads(Path(request["model"], "config.json").read_text())
    if "vision_config" in config:
        options["limit_mm_per_prompt"] = {"image": 1 if request["image"] else 0, "video": 0}
    if not load or not vllm_load.on_gpu():  # a CPU has no graphs; prefix caching was seen to run in these models alone
        hybrid = "linear_attention" in config.get("text_config", config).get("layer_types", ())
        options |= {"enforce_eager": True, "enable_prefix_caching": bool(load) and hybrid and not drafts}
    return LLM(
        model=request["model"], dtype="bfloat16", max_model_len=-(-(longest + drafts + 1) // 128) * 128,
        max_num_seqs=most, seed=0, disable_log_stats=False, **options,
    )  # fmt: skip


def prompts(sequences: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": sequence} for sequence in sequences]


def scores(output: Any) -> list[float]:
    """Log-probability of each prompt token but the first."""
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    return [step[token].logprob for token, step in pairs if step]


def likeliest(output: Any) -> list[list[int]]:
    """At each prompt token but the first, the most likely ones, best first. vLLM adds the token that is there."""
    return [sorted(step, key=lambda token: step[token].rank)[:TOP_LOGPROBS] for step in output.prompt_logprobs if step]


def generate(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """Score the prompts, then continue each greedily."""
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP_LOGPROBS)
    scored = llm.generate(prompts(request["prompts"]), sampling, use_tqdm=False)
    sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, logprobs=CANDIDATES)
    outputs = llm.generate(prompts(request["prompts"]), sampling, use_tqdm=False)
    generated = [output.outputs[0] for output in outputs]
    return {
        "prompt_logprobs": [scores(output) for output in scored],
        "prompt_likeliest": [likeliest(output) for output in scored],
        "tokens": [list(output.token_ids) for output in generated],
        "logprobs": [
            [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            for output in generated
        ],
        "margins": [[margin(step) for step in output.logprobs] for output in generated],
        "decode_tokens_per_second": decode_speed([output.metrics for output in outputs]),
    }


def decode_speed(statistics: list[Any]) -> float:
    """Tokens per second of the whole batch, from the first first token to the last last one."""
    seconds = max(one.last_token_ts for one in statistics) - min(one.first_token_ts for one in statistics)
    return float(sum(one.num_generation_tokens - 1 for one in statistics) / seconds)


def score_again(llm: LLM, request: dict[str, Any], tokens: list[list[int]]) -> list[list[float]]:
    """The generated tokens' log-probabilities once more: as parts of a prompt, each sequence on its own."""
    again = []
    for prompt, continuation in zip(request["prompts"], tokens, strict=True):
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        (output,) = llm.generate(prompts([prompt + continuation]), sampling, use_tqdm=False)
        again.append(scores(output)[len(prompt) - 1 :])
    return again


def after_image(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens after a prompt with an image of noise."""
    noise = numpy.random.default_rng(0).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=numpy.uint8)
    config = json.loads(Path(request["model"], "config.json").read_text())
    marks = [config[name] for name in ("vision_start_token_id", "image_token_id", "vision_end_token_id")]
    ids = [*request["image"]["before"], *marks, *request["image"]["after"]]
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": PIL.Image.fromarray(noise)}}
    tokens = request["image"]["tokens"]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=CANDIDATES)
    (output,) = llm.generate([prompt], sampling, use_tqdm=False)
    step = output.outputs[0]
    return {"tokens": list(step.token_ids), "margins": [margin(each) for each in step.logprobs]}


def draft_counters(llm: LLM) -> dict[str, Any]:
    metrics = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in llm.get_metrics()}
    counted = {name: metrics[f"num_{name}"].value for name in ("drafts", "draft_tokens", "accepted_tokens")}
    return counted | {"accepted_by_position": list(metrics["num_accepted_tokens_per_pos"].values)}


def run(request: dict[str, Any], loads: dict[str, Any]) -> dict[str, Any]:
    """Start an engine and ask it everything. loads: of its models, filled by watch_loader."""
    loads.clear()
    begin = time.perf_counter()
    llm = start(request)
    started = time.perf_counter() - begin
    answer = generate(llm, request)
    if request["noise"]:
        answer["logprobs_again"] = score_again(llm, request, answer["tokens"])
    if request["image"]:
        answer["image"] = after_image(llm, request)
    if request["draft_tokens"]:
        answer["drafts"] = draft_counters(llm)
    if request["load"]:
        answer["load"] = vllm_load.run(llm, request["load"])
    cache = llm.llm_engine.vllm_config.cache_config
    return answer | {
        "engine": f"vLLM {vllm.__version__}",
        "torch": importlib.metadata.version("torch"),
        "device": vllm.platforms.current_platform.device_name,
        "loads": dict(loads),
        "start_seconds": started,
        "kv_cache_tokens": cache.kv_cache_size_tokens,
    }


def attempt(request: dict[str, Any], loads: dict[str, Any]) -> dict[str, Any]:
    """One of several runs: what goes wrong is its answer, after what had been loaded."""
    print(f"[fourfold] {request['model']}", flush=True)
    try:
        return run(request, loads)
    except Exception as error:  # noqa: BLE001 - an engine may raise anything, and the others are still to be run
        traceback.print_exc()
        return {"failure": f"{type(error).__name__}: {error}", "loads": dict(loads)}
    finally:
        gc.collect()


def main() -> None:
    requests = json.loads(Path(sys.argv[1]).read_text())
    loads: dict[str, Any] = {}
    if vllm.platforms.current_platform.is_cpu():
        import vllm_reference_experts
        import vllm_reference_linear

        vllm_reference_experts.install(only=any(request["exact_experts"] for request in requests))
        vllm_reference_linear.install()
        registry._run_in_subprocess = lambda look: look()  # it spares this process CUDA
    platform = vllm.platforms.current_platform
    platform.register_triton_kernel_overrides = functools.cache(platform.register_triton_kernel_overrides)
    watch_loader(loads)
    one = len(requests) == 1
    answers = [run(request, loads) if one else attempt(request, loads) for request in requests]
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
