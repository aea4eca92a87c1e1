"""serve, its plugin and bench with real vLLM on the CPU: one flow from the model to measured drafts, over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

import drafters
import fourfold
from fourfold.datatypes import ignore
from fourfold.distributed.devices import Machine
from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe
from fourfold.release.suite import SUITES, Servers, evaluate_servers
from fourfold.release.verify.server import verify_server
from fourfold.serve.bench import Load
from fourfold.serve.bench import bench as load_server

pytestmark = pytest.mark.engine

Find, Made = Callable[[str], Path], Callable[[str], Path]
READY_SECONDS = 300.0
CONTEXT, DRAFTS, BUDGET = 512, 2, 20
# Of each bench, at the same time; with twice the clients that are served at once, what a first token waits for is long.
CLIENTS, REQUESTED, TOKENS, TURNS = 8, 192, 16, 3
PLUGIN = f"fourfold-{fourfold.__version__}.dist-info"
REQUESTS = Path(__file__).parent / "openai_requests.py"
ROOT = Path(__file__).parents[2]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}


@dataclass(kw_only=True)
class Server:
    """A `fourfold serve` that runs. said: what it has shown until it was ready."""

    process: subprocess.Popen[str]
    url: str
    out: Path
    log: Path
    said: str

    def pool(self) -> tuple[int, int, int]:
        """Blocks, tokens of a block, tokens, as vLLM reports them."""
        text = httpx2.get(f"{self.url}/metrics", trust_env=False).text
        (line,) = (line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        values = [int(labels[name]) for name in ("num_gpu_blocks", "block_size", "kv_cache_size_tokens")]
        return values[0], values[1], values[2]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH under which vLLM's environment has the package, as installed without dependencies."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / PLUGIN).mkdir()
    metadata = f"Metadata-Version: 2.1\nName: fourfold\nVersion: {fourfold.__version__}\n"
    (folder / PLUGIN / "METADATA").write_text(metadata)
    entry = "[vllm.general_plugins]\nfourfold = fourfold.serve.vllm_plugin:register\n"
    (folder / PLUGIN / "entry_points.txt").write_text(entry)
    return os.pathsep.join([str(ROOT / "src"), str(folder)])


def command(out: Path, python: Path, log: Path, port: int, *words: object) -> list[str]:
    options = ["--engine", "vllm", "--python", python, "--port", port, "--log", log, "--context", CONTEXT, *words]
    if "--" not in words:
        options.append("--")
    return [sys.executable, "-m", "fourfold", "serve", str(out), *map(str, options), "--max-num-seqs", "8"]


@contextmanager
def running(out: Path, python: Path, log: Path, *words: object, **environment: str) -> Iterator[Server]:
    """Started, and stopped in the end whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        command(out, python, log, port, *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"} | environment,
    )
    assert process.stderr is not None
    said = ""
    try:
        for line in process.stderr:
            said += line
            if line.startswith("Ctrl-C"):
                break
        else:
            pytest.fail(f"{said}\n{log.read_text()[-3000:] if log.exists() else ''}")
        yield Server(process=process, url=f"http://127.0.0.1:{port}", out=out, log=log, said=said)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def left(python: Path) -> list[str]:
    processes = psutil.process_iter(["cmdline"])
    return [" ".join(one.info["cmdline"]) for one in processes if str(python) in (one.info["cmdline"] or ())]


def bench(server: Server, out: Path, *words: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "fourfold", "bench", server.url, "--out", str(out), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_one_flow(made: Made, python: Find, example_model: Path, tmp_path: Path) -> None:
    """Quantized -> verified -> served with drafts -> asked -> measured -> stopped."""
    out, interpreter = made("compressed-tensors"), python("vllm")
    verified = subprocess.run(
        [sys.executable, "-m", "fourfold", "verify", str(out), "--engine", "vllm", "--python", str(interpreter)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    checks = json.loads((out / "verify.json").read_text())["checks"]
    seen = next(check["data"] for check in checks if check["name"] == "drafts accepted")
    with running(out, interpreter, tmp_path / "log", "--mtp", DRAFTS) as server:
        check_alive(server, "chat", "tools", "thinking", "drafts")
        assert server.pool() == (4096, 256, 262_144)
        assert "predicted: 4,096 blocks of 256, 262,144 tokens" in server.said
        check_stream(server)
        check_load(server)
        check_tasks(server, example_model, tmp_path)
        check_suite(server)
        check_bench(server, interpreter, tmp_path, seen)
        process = server.process
    assert process.returncode == 128 + signal.SIGTERM
    assert not left(interpreter)


def test_an_external_drafter(made: Made, python: Find, example_model: Path, tmp_path: Path) -> None:
    """EAGLE-3: it drafts, some are accepted, what is written is what the model alone finds best, the cache is as
    predicted.
    """
    text = "".join(path.read_text() for path in sorted((ROOT / "src/fourfold/text/calibration").glob("*.jsonl")))
    drafter, out = drafters.eagle3(tmp_path / "drafter-EAGLE3", example_model, text), made("compressed-tensors")
    with running(out, python("vllm"), tmp_path / "log", "--mtp", DRAFTS, "--draft", drafter) as server:
        check_alive(server, "chat", "tools", "thinking", "drafts")
        assert server.pool() == (4096, 256, 174_762)
        assert "predicted: 4,096 blocks of 256, 174,762 tokens" in server.said
        check_load(server)
        found = bench(server, tmp_path / "bench.json", "--concurrency", "2", "--requests", 8, "--out-tokens", 64)
    assert found["levels"][0]["acceptance"]["rate"] > 0.1


def test_defaults_of_the_plugin(made: Made, python: Find, plugin: str, tmp_path: Path) -> None:
    words = ("--mtp", DRAFTS, "--thinking-budget", BUDGET, "--presence-penalty", 1.5)
    environment = {"PYTHONPATH": plugin, "VLLM_DEFAULT_SAMPLING_PARAMS": '{"repetition_penalty": 1.3}'}
    with running(made("compressed-tensors"), python("vllm"), tmp_path / "log", *words, **environment) as server:
        check_alive(server, "chat", "tools", "thinking", "drafts", "thinking budget")
        check_defaults(server, python("vllm"))
    (said,) = (line for line in (tmp_path / "log").read_text().splitlines() if "fourfold: " in line)
    assert "thinking_token_budget=20, repetition_penalty=1.3" in said


def check_alive(server: Server, *parts: str) -> None:
    for part in parts:
        assert any(re.match(rf"{part} +alive ", line) for line in server.said.splitlines()), server.said


def check_stream(server: Server) -> None:
    """A system prompt, a tool and thinking, streamed."""
    body = {
        "model": server.out.name,
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 2 and 3?"}],
        "tools": [TOOL],
        "max_tokens": 48,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    thought, usage = "", dict[str, Any]()
    with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                thought += "".join(choice["delta"].get("reasoning") or "" for choice in chunk["choices"])
    assert thought
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] <= usage["completion_tokens"] <= 48


def check_load(server: Server) -> None:
    """As many at once as the server runs, on text that it tokenizes and scores; it serves this release."""
    verdict = verify_server(server.url, 8, server.out, 120, ignore, tokens=24)
    answers, check = verdict.checks
    assert verdict.passed, check.evidence
    assert f"{server.out.name} at {server.url}; vllm; prompts as token ids; scores prompts" in answers.evidence
    assert (check.data["tokens"], check.data["at_once"]) == (24 * 24, 8) and check.data["alone_most"] > 0


def check_tasks(server: Server, source: Path, folder: Path) -> None:
    """lm-eval's two ways of asking: what is written, and the likelihoods of what could be."""
    questions = folder / "questions.jsonl"
    lines = [json.dumps({"q": f"{a} + 1", "wrong": str(a), "right": str(a + 1)}) for a in range(4)]
    questions.write_text("\n".join(lines) + "\n")
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {questions}}}}}\ntest_split: test\n"
    common += 'doc_to_text: "{{q}} = "\nmetadata: {version: 1}\n'
    written = 'task: written\noutput_type: generate_until\ndoc_to_target: "{{right}}"\n'
    written += "generation_kwargs: {until: [' '], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    chosen = 'task: chosen\noutput_type: multiple_choice\ndoc_to_choice: "{{[wrong, right]}}"\ndoc_to_target: 1\n'
    chosen += "metric_list: [{metric: acc}]\n"
    for name, text in (("written", written), ("chosen", chosen)):
        (folder / f"{name}.yaml").write_text(text + common)
    words = ["evaluate", server.out, "--source", source, "--windows", 1, "--length", 64, "--no-drafts", "--replace"]
    words += ["--devices", "cpu", "--url", server.url, "--tasks", f"{folder / 'written.yaml'},{folder / 'chosen.yaml'}"]
    done = subprocess.run(
        [sys.executable, "-m", "fourfold", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((server.out / "metrics.json").read_text())["tasks"]
    assert found["model"] == server.out.name
    assert {name: task["samples"] for name, task in found["tasks"].items()} == {"written": 4, "chosen": 4}
    assert 0 <= found["tasks"]["chosen"]["figures"]["acc,none"] <= 1
    assert 0 <= found["tasks"]["written"]["figures"]["exact_match,none"] <= 1


def check_suite(server: Server) -> None:
    """The server beside itself, under two names: no divergence, no flips."""
    small = replace(SUITES["quick"], tasks=replace(SUITES["quick"].tasks, limit=2, tokens=32), windows=2, length=64)
    servers = Servers(url=server.url, source_url=server.url.replace("127.0.0.1", "localhost"), suite="quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "quick", small)
        found = evaluate_servers(server.out, servers, ignore).tasks
    assert found and not found.unmeasured
    assert found.kl and (found.kl.k, found.kl.windows) == (20, 2)
    assert found.kl.kl_mean < 1e-3 and found.kl.top1_agreement > 0.95
    task = found.tasks["gsm8k_heldout"]
    assert task.usage and task.usage.answers == 2 and 0 < task.usage.thought_tokens <= task.usage.output_tokens <= 32
    assert task.paired and all(each.questions == 2 for each in task.paired.values())
    needle = found.tasks["needle at 90% of the context"]
    assert needle.prompt_tokens == pytest.approx(0.9 * CONTEXT, rel=0.2)


def check_defaults(server: Server, interpreter: Path) -> None:
    """The OpenAI client on each endpoint: defaults where nothing is sent, what is sent wins."""
    done = subprocess.run(
        [str(interpreter), str(REQUESTS), server.url, server.out.name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    thinking = {what: each.get("thinking") for what, each in found.items()}
    # One less: the newline that the prompt puts after <think> counts.
    assert thinking["chat"] == thinking["chat streamed"] == thinking["response"] == BUDGET - 1
    assert (thinking["chat, budget 5"], thinking["chat, budget 0"]) == (4, 0)
    assert thinking["chat, no limit"] == thinking["chat, null"] == found["chat streamed"]["tokens"] == 60
    assert (found["completion"]["ended"], found["completion, no limit"]["ended"]) == (True, False)
    assert found["chat"]["text"].startswith(found["messages"]["text"])
    assert found["chat, penalty 1.5"] == found["chat"]
    assert found["chat, penalty 0"]["text"] != found["chat"]["text"]
    assert found["chat, other penalty"]["text"] != found["chat"]["text"]


def check_bench(server: Server, interpreter: Path, folder: Path, seen: dict[str, Any]) -> None:
    """By itself, with drafts as verify saw them; then beside vLLM's own bench."""
    lines = (ROOT / "src/fourfold/text/heldout/chat.jsonl").read_text().splitlines()[:16]
    talks = [json.loads(line)["messages"] for line in lines]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    words = ("--prompts", prompts, "--concurrency", 2, "--requests", len(talks), "--out-tokens", 64)
    alone = bench(server, folder / "bench.json", *words)["levels"][0]
    assert alone["output_tokens"] == len(talks) * 64
    assert alone["client_core_share_at_100_tokens_per_second"] < 0.05
    # verify drafts on other text: two rates of some hundred drafts each
    was = seen["accepted_tokens"] / seen["draft_tokens"]
    assert 0 < alone["acceptance"]["rate"] == pytest.approx(was, abs=0.1), (alone["acceptance"], seen)
    shared = folder / "sharegpt.json"  # the one kind of file that vLLM's bench reads without pandas
    conversations = [{"conversations": [{"value": turn["content"]} for turn in talk]} for talk in talks]
    shared.write_text(json.dumps(conversations * (REQUESTED // len(talks))))
    with engine_apart(server):
        found = [
            ratios(*both_benches(server, interpreter, prompts, shared, folder / f"{turn}.json"))
            for turn in range(TURNS)
        ]
    middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
    assert middle == {name: pytest.approx(1, abs=0.1) for name in middle}, found


@contextmanager
def engine_apart(server: Server) -> Iterator[None]:
    """vLLM's engine and its worker on the first core, all that sends and receives on the others. Both wait for work in
    busy loops, which a kernel that does not preempt leaves on a core for half a second while chunks pile up.
    """
    cores = os.sched_getaffinity(0)
    first = {min(cores)}
    others = cores - first or first
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, first if process.name().startswith("VLLM") else others)
    os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def both_benches(
    server: Server, interpreter: Path, prompts: Path, shared: Path, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each says of as many requests of as many tokens, sent at the same time: the engine's steps are the same for
    both, whatever else the machine does. Ours runs in this process, since it must start on the instant.
    """
    words = [
        *(interpreter.parent / "vllm", "bench", "serve", "--backend", "openai-chat", "--base-url", server.url),
        *("--endpoint", "/v1/chat/completions", "--model", server.out.name, "--tokenizer", server.out),
        *("--dataset-name", "sharegpt", "--dataset-path", shared, "--sharegpt-output-len", TOKENS),
        *("--num-prompts", REQUESTED, "--disable-shuffle", "--max-concurrency", CLIENTS, "--temperature", 0),
        *("--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed", "--result-filename", out),
    ]
    load = Load(
        concurrency=(CLIENTS,), requests=REQUESTED, output_tokens=TOKENS, temperature=0, prompts=prompts,
        request_seconds=60, level_seconds=600,
    )  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as theirs:
        assert theirs.stdout is not None
        said = ""
        while "Starting main benchmark run" not in said:
            line = theirs.stdout.readline()
            assert line, said
            said += line
        ours = load_server(server.url, load, ignore).to_json()["levels"][0]
        said += theirs.communicate()[0]
    assert out.exists(), said
    return ours, json.loads(out.read_text())


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours to theirs, figure by figure; between chunks without the first, empty one that theirs counts as well."""
    assert ours["output_tokens"] == theirs["total_output_tokens"] == REQUESTED * TOKENS
    assert ours["prompt_tokens"] == theirs["total_input_tokens"]
    accepted = ours["acceptance"]  # of the server, so of both; greedy, the same prompts over and over
    assert accepted["rate"] == pytest.approx(theirs["spec_decode_acceptance_rate"] / 100, abs=0.01)
    assert accepted["mean_length"] == pytest.approx(theirs["spec_decode_acceptance_length"], abs=0.02)
    first, token, gap, whole = (
        ours[name] for name in ("time_to_first_token", "time_per_output_token", "time_between_chunks", "latency")
    )
    gaps = [each for request in theirs["itls"] for each in request[1:]]
    latencies = [start + sum(request) for start, request in zip(theirs["ttfts"], theirs["itls"], strict=True)]
    return {
        "tokens/s": ours["output_tokens_per_second"] / theirs["output_throughput"],
        "time to first token, median": first["p50"] * 1000 / theirs["median_ttft_ms"],
        "time per token, mean": token["mean"] * 1000 / theirs["mean_tpot_ms"],
        "time per token, median": token["p50"] * 1000 / theirs["median_tpot_ms"],
        "time between chunks, mean": gap["mean"] / statistics.mean(gaps),
        "time between chunks, median": gap["p50"] / statistics.median(gaps),
        "latency, mean": whole["mean"] / statistics.mean(latencies),
        "latency, median": whole["p50"] / statistics.median(latencies),
    }


# --- the cache, as predicted --------------------------------------------------------------------------------------


def test_fp8_and_no_variables(made: Made, python: Find, tmp_path: Path) -> None:
    """Without the plugin's variables nothing is cut; 8-bit cache, no drafts."""
    out = made("compressed-tensors")
    with running(out, python("vllm"), tmp_path / "log", "--mtp", 0, "--kv-cache", "fp8") as server:
        assert server.pool() == (10922, 384, 1_118_412)
        assert "predicted: 10,922 blocks of 384, 1,118,412 tokens" in server.said
        body = {
            "model": server.out.name,
            "messages": [{"role": "user", "content": "How many legs have three cats and a bird?"}],
            "max_tokens": 60,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > BUDGET
    assert not left(python("vllm"))


def test_prefix_caching_which_a_cpu_does_not_survive(made: Made, python: Find, tmp_path: Path) -> None:
    """It gets ready with the pool that was predicted, dies at the probe's request, and is explained."""
    words = command(made("compressed-tensors"), python("vllm"), tmp_path / "log", 8123, "--", "--enable-prefix-caching")
    begin = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=READY_SECONDS)
    assert done.returncode == 1, done.stderr
    assert "predicted: 4,096 blocks of 256, 209,715 tokens" in done.stderr
    assert "tokens 209,715; predicted" in done.stderr
    assert "NOT ALIVE" in done.stderr
    assert "known issue: prefix caching of a hybrid model needs Triton" in done.stderr
    assert time.monotonic() - begin < READY_SECONDS
    assert not left(python("vllm"))


def test_two_ranks(python: Find, example_model: Path, tmp_path: Path) -> None:
    """Groups of 64, since experts of 128 features are split in two."""
    small = ["calibration.length=256", "heldout.windows=4", "heldout.length=256", "solver.passes=0"]
    sources = 'calibration.sources=[{builtin="general", rows=24}, {builtin="code", rows=8}]'
    out = tmp_path / "release"
    recipe = load_recipe("fast", [sources, *small, "scheme.group_size=64"])
    quantize(example_model, out, recipe, machine=Machine(memory_bytes=2 * 2**30))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with running(out, python("vllm"), tmp_path / "log", "--tp", 2, **bound) as server:
        assert server.pool() == (8192, 256, 524_288)
        assert "predicted: 8,192 blocks of 256, 524,288 tokens" in server.said
    assert not left(python("vllm"))


# --- a malformed value --------------------------------------------------------------------------------------------


def test_a_malformed_value_stops_it(made: Made, python: Find, plugin: str, tmp_path: Path) -> None:
    words = command(made("compressed-tensors"), python("vllm"), tmp_path / "log", 8124)
    environment = {**os.environ, "PYTHONPATH": plugin, "VLLM_DEFAULT_SAMPLING_PARAMS": '{"top_k": "many"}'}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=READY_SECONDS, env=environment)
    assert done.returncode == 1
    assert "vLLM does not accept it" in (tmp_path / "log").read_text()
    assert not left(python("vllm"))
