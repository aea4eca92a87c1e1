"""Command lines: the reference release's own four, what must not be passed, what is checked before a start."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deployments import COMPACT, CPU, OURS, REFERENCE, changed, gpus
from fourfold.datatypes import FourfoldError
from fourfold.formats import GPTQ
from fourfold.serve import engines
from fourfold.serve.command import Command, Deployment, build
from fourfold.serve.engines import REFERENCE_MACHINE, SGLANG, VLLM
from fourfold.serve.kvcache import SglangPool, VllmPool
from fourfold.serve.machine import Machine
from fourfold.serve.served import Served

# What the card of the reference release says of its four commands, rows C13 to C16 of its facts.
CARD = {
    (VLLM, 0): {
        "--tensor-parallel-size": "4", "--max-model-len": "200000", "--gpu-memory-utilization": "0.85",
        "--kv-cache-dtype": "fp8", "--dtype": "bfloat16", "--reasoning-parser": "qwen3",
        "--enable-auto-tool-choice": "", "--tool-call-parser": "qwen3_coder", "--trust-remote-code": "",
    },
    (SGLANG, 0): {
        "--quantization": "moe_wna16", "--tp-size": "4", "--mem-fraction-static": "0.89",
        "--kv-cache-dtype": "fp8_e4m3", "--context-length": "262144",
    },
    (SGLANG, 3): {
        "--quantization": "moe_wna16", "--tp-size": "4", "--mem-fraction-static": "0.80", "--dtype": "float16",
        "--speculative-algorithm": "EAGLE", "--speculative-eagle-topk": "1", "--speculative-num-steps": "3",
        "--speculative-num-draft-tokens": "4", "--mamba-scheduler-strategy": "extra_buffer",
    },
}  # fmt: skip
CARD[VLLM, 2] = {**CARD[VLLM, 0], "--speculative-config": '{"method":"mtp","num_speculative_tokens":2}'}


def make(served: Served = OURS, machine: Machine | None = None, **wanted: Any) -> Command:
    return build(served, machine or gpus(4, 80), Deployment(**{"engine": VLLM} | wanted))


def flags(command: Command) -> dict[str, str]:
    """Flag -> value; "" for one without."""
    words = command.words
    pairs = zip(words, (*words[1:], "--"), strict=True)
    return {word: "" if after.startswith("--") else after for word, after in pairs if word.startswith("--")}


@pytest.mark.parametrize(("engine", "drafts"), CARD)
def test_the_cards_commands(engine: str, drafts: int, golden: Callable[[str, str], None]) -> None:
    command = build(REFERENCE, REFERENCE_MACHINE, Deployment(engine=engine, profile="reference", drafts=drafts))
    assert CARD[engine, drafts].items() <= flags(command).items()
    if engine == VLLM:
        assert "--quantization" not in flags(command)
    said = [command.text(), *command.forecast.lines(), *(f"problem: {p}" for p in command.problems)]
    golden(f"serve-{engine}-{drafts}.txt", "\n".join([*said, *(f"note: {note}" for note in command.notes)]) + "\n")


def test_the_cards_pools() -> None:
    """From the bytes that the card's own figures leave over: each within a hundredth."""
    wanted = Deployment(engine=VLLM, profile="reference", drafts=2)
    pool = build(REFERENCE, REFERENCE_MACHINE, wanted).forecast.pool
    assert isinstance(pool, VllmPool)
    assert pool.tokens_by_groups == pytest.approx(160_800, rel=0.01)
    wanted = Deployment(engine=SGLANG, profile="reference", drafts=0)
    found = build(REFERENCE, REFERENCE_MACHINE, wanted).forecast.pool
    assert isinstance(found, SglangPool)
    assert found.tokens == pytest.approx(415_184, rel=0.01)
    assert found.running == 39


def test_sglang_of_the_card_in_its_environment() -> None:
    command = build(REFERENCE, REFERENCE_MACHINE, Deployment(engine=SGLANG, profile="reference", drafts=3))
    assert command.environment == {"SGLANG_ENABLE_SPEC_V2": "1", "SGLANG_MAMBA_CONV_DTYPE": "float16"}
    (problem,) = command.problems
    assert "skips their BF16 weights" in problem
    assert "compressed-tensors" in problem


def test_a_flag_by_version() -> None:
    wanted = {"engine": SGLANG, "profile": "reference", "drafts": 3}
    new = make(**wanted, version=(0, 5, 23))
    assert flags(new)["--mamba-radix-cache-strategy"] == "extra_buffer"
    assert "--mamba-scheduler-strategy" not in flags(new)
    assert "SGLANG_ENABLE_SPEC_V2" not in new.environment
    assert flags(make(thinking_budget=9, drafts=0, version=(0, 19, 1)))["--reasoning-config"] == "{}"
    assert "--reasoning-config" not in flags(make(thinking_budget=9))


def test_version_numbers() -> None:
    assert engines.version("0.32.0+cpu") == (0, 32, 0)
    assert engines.version("0.5.10.post1") == (0, 5, 10)
    assert engines.version("0.33.0rc1") == (0, 33, 0)
    assert any("was not looked at" in note for note in make(version=(0, 31, 0)).notes)
    assert not any("was not looked at" in note for note in make(version=(0, 32, 0)).notes)


def test_by_itself_it_drafts_where_that_works() -> None:
    assert json.loads(flags(make())["--speculative-config"])["num_speculative_tokens"] == 2
    assert flags(make(engine=SGLANG))["--speculative-num-steps"] == "3"
    assert "--speculative-config" not in flags(make(changed(OURS, draft_bytes=0)))
    left = make(REFERENCE, engine=SGLANG)
    assert "--speculative-algorithm" not in flags(left)
    assert not left.problems
    assert any(note.startswith("no drafts") for note in left.notes)
    with pytest.raises(FourfoldError, match="has no MTP head"):
        make(changed(OURS, draft_bytes=0), drafts=2)


def test_quantization_flags() -> None:
    assert flags(make(REFERENCE, engine=SGLANG))["--quantization"] == "moe_wna16"
    assert "--quantization" not in flags(make(OURS, engine=SGLANG))
    (problem,) = make(extra=("--quantization", "moe_wna16")).problems
    assert "KeyError experts.w2_weight" in problem


def test_parsers_by_family_and_template() -> None:
    plain = changed(OURS, model_type="qwen3_moe", template="{{ messages }}", draft_bytes=0)
    assert "--reasoning-parser" not in flags(make(plain))
    assert flags(make(plain))["--tool-call-parser"] == "hermes"
    assert flags(make(plain, engine=SGLANG))["--tool-call-parser"] == "qwen25"
    coder = changed(plain, template="<think> <function=name>")
    assert flags(make(coder))["--tool-call-parser"] == "qwen3_coder"
    assert flags(make(coder))["--reasoning-parser"] == "qwen3"


# --- a release with int8 weights beside the experts ---------------------------------------------------------------

FULL_24_GB: dict[str, Any] = {"kv_cache": "fp8", "extra": ("--gpu-memory-utilization", "0.95")}


def test_compact_drafts_on_a_24_gb_card() -> None:
    found = make(COMPACT, gpus(1, 24), **FULL_24_GB)
    assert not found.problems and found.forecast.cache.drafts == 2
    assert found.forecast.longest == 174_496
    assert found.forecast.memory_bytes == pytest.approx(2.27e9, rel=0.01)
    assert make(COMPACT, gpus(1, 24), drafts=0, **FULL_24_GB).forecast.longest == pytest.approx(253_616, rel=0.01)
    assert make(OURS, gpus(1, 24), **FULL_24_GB).problems


def test_a_second_embedding_counts_while_loading_alone() -> None:
    loaded = make(COMPACT, gpus(1, 24), **FULL_24_GB).forecast
    assert loaded.loading_bytes - COMPACT.weight_bytes - COMPACT.draft_bytes == pytest.approx(1.53e9, rel=0.01)
    more = changed(COMPACT, ends_bytes=5 * 10**9)
    (problem,) = make(more, gpus(1, 24), **FULL_24_GB).problems
    assert problem.startswith("while loading with drafts weights take 26.0 GB on each GPU of 25.8 GB")
    for wanted in ({"drafts": 0}, {"drafts": 0, "engine": SGLANG}):
        alone = make(more, gpus(1, 24), **FULL_24_GB | wanted)
        assert not alone.forecast.loading_bytes and not any("while loading" in one for one in alone.problems)
    assert make(more, gpus(1, 24), **FULL_24_GB).forecast.memory_bytes == loaded.memory_bytes


def test_sglang_makes_no_drafts_with_a_quantized_head() -> None:
    left = make(COMPACT, engine=SGLANG)
    assert not left.problems and "--speculative-algorithm" not in flags(left)
    assert any(note.startswith("no drafts: SGLang 0.5.23") and "ParallelLMHead" in note for note in left.notes)
    (problem,) = make(COMPACT, engine=SGLANG, drafts=3).problems
    assert "compact-sglang" in problem and "--mtp 0" in problem
    assert "--speculative-algorithm" in flags(make(changed(COMPACT, quantized_head=False), engine=SGLANG))
    (why,) = engines.explain(SGLANG, "AttributeError: 'ParallelLMHead' object has no attribute 'weight'")
    assert "compact-sglang" in why


def test_sglang_needs_room_for_the_states_of_a_request() -> None:
    wanted = {"engine": SGLANG, "kv_cache": "fp8", "extra": ("--mem-fraction-static", "0.95")}
    plain = changed(COMPACT, quantized_head=False, weight_bytes=21_016_656_512)
    (problem,) = make(plain, gpus(1, 24), drafts=3, **wanted).problems
    assert problem.startswith("2 states of linear attention fit") and "--mtp 0" in problem
    alone = make(plain, gpus(1, 24), drafts=0, **wanted)
    assert not alone.problems and alone.forecast.longest == 97_302


def test_sglang_does_not_serve_a_quantized_head_in_gptq() -> None:
    (problem,) = make(changed(COMPACT, format=GPTQ), engine=SGLANG).problems
    assert "unwritten" in problem
    plain = make(changed(COMPACT, format=GPTQ, quantized_head=False), engine=SGLANG)
    assert not plain.problems and "--speculative-algorithm" in flags(plain)


def test_an_old_vllm_does_not_load_a_quantized_head() -> None:
    (problem,) = make(COMPACT, version=(0, 19, 1)).problems
    assert "vLLM 0.19.1 does not load a quantized output head, 0.20.2 does" in problem
    assert not make(COMPACT, version=(0, 20, 2)).problems
    assert not make(changed(COMPACT, quantized_head=False), version=(0, 19, 1)).problems


def test_int8_weights_have_no_kernel_on_a_cpu() -> None:
    (problem,) = make(COMPACT, CPU).problems
    assert problem == engines.NO_CPU_INT8
    log = "ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons: ..."
    assert engines.explain(VLLM, log) == [engines.NO_CPU_INT8]


def test_groups_of_modules_beside_the_experts() -> None:
    problems = make(COMPACT, gpus(8, 80), ranks=8, extra=("--enable-expert-parallel",)).problems
    assert problems == ("--tp 8 does not divide 4 groups of 128 inputs of shared_expert.down_proj",)
    assert not any("expert parallel" in problem for problem in make(COMPACT, gpus(8, 80), ranks=8).problems)
    assert make(COMPACT, gpus(8, 80)).forecast.split.ranks == 4


# --- how it is split ----------------------------------------------------------------------------------------------


def test_families_that_an_engine_must_not_serve() -> None:
    laguna, gemma = (changed(OURS, model_type=name, draft_bytes=0) for name in ("laguna", "gemma4"))
    (problem,) = make(laguna, engine="vllm").problems
    assert "selection bias" in problem and problem.endswith("Try: --engine sglang")
    (problem,) = make(gemma, engine="sglang").problems
    assert "SiLU" in problem and problem.endswith("Try: --engine vllm")
    assert not make(laguna, engine="sglang").problems and not make(gemma, engine="vllm").problems


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (2, 2), (3, 2), (4, 4), (6, 4), (8, 4)])
def test_as_many_gpus_as_divide_the_groups(count: int, ranks: int) -> None:
    assert make(machine=gpus(count, 80)).forecast.split.ranks == ranks


def test_groups_that_do_not_divide() -> None:
    (problem,) = make(machine=gpus(8, 80), ranks=8).problems
    assert "not divisible by group size 128" in problem
    assert "--tp 4" in problem
    assert not make(machine=gpus(8, 80), ranks=8, extra=("--enable-expert-parallel",)).problems
    assert not make(changed(OURS, group_size=64), gpus(8, 80), ranks=8).problems
    assert not make(changed(OURS, format=None, group_size=0), gpus(8, 80), ranks=8).problems


def test_heads_that_do_not_divide() -> None:
    (problem,) = make(changed(OURS, group_size=0), gpus(3, 80), ranks=3).problems
    assert "16 attention heads, 16 key heads of linear attention, 32 value heads" in problem
    assert "2 KV heads" in problem


def test_more_gpus_than_there_are() -> None:
    (problem,) = make(machine=gpus(2, 80), ranks=4).problems
    assert "this machine has 2 GPUs" in problem


# --- what fits ----------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit() -> None:
    (problem,) = make(machine=gpus(1, 24)).problems
    assert "weights take 24.4 GB on each GPU, 0.90 of the smallest is 23.2 GB" in problem


def test_a_context_that_does_not_fit() -> None:
    machine = gpus(4, 9)  # 2.6 GB beside the weights, half of it for the cache by estimate
    assert not make(machine=machine, context=65_536).problems
    doubtful = make(machine=machine, context=200_000)
    assert not doubtful.problems
    assert any("does not fit" in note for note in doubtful.notes)
    (problem,) = make(machine=machine, context=262_144).problems
    assert "does not fit" in problem
    left_out = make(machine=machine)
    assert not left_out.problems
    assert 65_536 < left_out.forecast.context < 200_000
    with pytest.raises(FourfoldError, match=r"at most 262,144 tokens"):
        make(context=300_000)


def test_the_users_words_for_the_engine_count() -> None:
    lower = make(extra=("--gpu-memory-utilization", "0.5"))
    assert lower.forecast.memory_bytes < make().forecast.memory_bytes
    assert lower.words.count("--gpu-memory-utilization") == 1
    assert lower.words[-2:] == ("--gpu-memory-utilization", "0.5")
    off = make(extra=("--no-enable-prefix-caching",)).forecast.pool
    on = make().forecast.pool
    assert isinstance(on, VllmPool) and isinstance(off, VllmPool)
    assert on.state_blocks - off.state_blocks == 3
    with pytest.raises(FourfoldError, match="memory share 'half'"):
        make(extra=("--gpu-memory-utilization=half",))


@pytest.mark.parametrize(
    ("word", "option"), [("--max-model-len=9", "--context"), ("--tensor-parallel-size", "--tp"), ("--port", "--port")]
)
def test_words_that_have_an_option(word: str, option: str) -> None:
    (problem,) = make(extra=(word, "9")).problems
    assert f"use {option}" in problem


def test_fp8_on_ampere_and_after() -> None:
    machine = gpus(4, 80, (8, 6))
    notes = make(machine=machine, kv_cache="fp8").notes
    assert any("stored only" in note for note in notes)
    assert any("FlashInfer" in note for note in notes)
    assert not any("FlashInfer" in note for note in make(machine=machine, kv_cache="fp8", version=(0, 19, 1)).notes)
    assert not any("stored only" in note for note in make(kv_cache="fp8").notes)
    assert flags(make(kv_cache="fp8", engine=SGLANG))["--kv-cache-dtype"] == "fp8_e4m3"


# --- on a CPU -----------------------------------------------------------------------------------------------------


def test_a_trial_on_the_cpu() -> None:
    command = make(machine=CPU, context=4096, inherited={"VLLM_CPU_KVCACHE_SPACE": "3"})
    given = flags(command)
    assert {"--enforce-eager", "--no-enable-prefix-caching", "--limit-mm-per-prompt"} <= given.keys()
    assert not {"--gpu-memory-utilization", "--tensor-parallel-size"} & given.keys()
    assert command.environment == {"VLLM_CPU_KVCACHE_SPACE": "3"}
    assert (command.forecast.exact, command.forecast.memory_bytes) == (True, 3 * 2**30)
    with pytest.raises(FourfoldError, match="VLLM_CPU_KVCACHE_SPACE 'much'"):
        make(machine=CPU, inherited={"VLLM_CPU_KVCACHE_SPACE": "much"})
    assert any("CPU" in problem for problem in make(machine=CPU, engine=SGLANG).problems)


# --- defaults -----------------------------------------------------------------------------------------------------


def test_defaults_by_flag_or_by_plugin() -> None:
    command = make(thinking_budget=512, presence_penalty=1.5, plugin=True)
    assert command.environment == {"VLLM_DEFAULT_THINKING_BUDGET": "512"}
    assert flags(command)["--override-generation-config"] == '{"presence_penalty":1.5}'
    old = make(presence_penalty=1.5, version=(0, 19, 1), plugin=True)
    assert old.environment == {"VLLM_DEFAULT_PRESENCE_PENALTY": "1.5"}
    assert "--override-generation-config" not in flags(old)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"thinking_budget": 9, "plugin": False}, "-m pip install --no-deps "),
        ({"presence_penalty": 1.0, "plugin": False, "version": (0, 19, 1)}, "-m pip install --no-deps "),
        ({"thinking_budget": 9, "version": (0, 19, 1)}, "drops a thinking budget under MTP"),
        ({"thinking_budget": 9, "engine": SGLANG}, "SGLang has no server-wide defaults"),
        ({"presence_penalty": 1.0, "engine": SGLANG}, "SGLang has no server-wide defaults"),
    ],
)
def test_defaults_that_would_not_hold(wanted: dict[str, Any], said: str) -> None:
    (problem,) = make(**wanted).problems
    assert said in problem


def test_no_plugin_is_needed_where_a_flag_does_it() -> None:
    assert not make(presence_penalty=1.0, plugin=False).problems


# --- as text ------------------------------------------------------------------------------------------------------


def test_docker() -> None:
    command = make(extra=("--max-num-seqs", "8"), machine=gpus(2, 80), thinking_budget=9)
    words = shlex.split(command.docker(OURS.folder))
    assert words[words.index("-p") + 1] == "127.0.0.1:8000:8000", "not on every interface"
    image = words.index("vllm/vllm-openai:v0.32.0")
    assert words[image + 1] == "/model"  # the image begins with `vllm serve` itself
    assert words[words.index("--host") + 1] == "0.0.0.0"
    assert {"--gpus", f"{OURS.folder.resolve()}:/model:ro", "VLLM_DEFAULT_THINKING_BUDGET=9"} <= set(words)
    assert words[-2:] == ["--max-num-seqs", "8"]
    sglang = shlex.split(make(engine=SGLANG).docker(OURS.folder))
    assert sglang[sglang.index("lmsysorg/sglang:v0.5.23") + 1 :][:3] == ["python3", "-m", "sglang.launch_server"]
    served = changed(OURS, name=str(OURS.folder))  # `serve release`, in the folder beside it
    words = shlex.split(make(served).docker(served.folder))
    assert words[words.index("--served-model-name") + 1] == served.name and words.count("/model") == 1


@pytest.mark.parametrize(
    ("host", "published"), [("0.0.0.0", "0.0.0.0:8000:8000"), ("::1", "[::1]:8000:8000"), ("10.0.0.7", "10.0.0.7:80")]
)
def test_docker_publishes_on_the_address_asked_for(host: str, published: str) -> None:
    words = shlex.split(make(host=host, port=80 if host == "10.0.0.7" else None).docker(OURS.folder))
    assert words[words.index("-p") + 1].startswith(published)
    with pytest.raises(FourfoldError, match=r"--host: got 'box\.lan', expected an IP address"):
        make(host="box.lan").docker(OURS.folder)
    (problem,) = make(extra=("--host", "0.0.0.0")).problems
    assert "use --host" in problem


def test_docker_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, arch in (("x86_64", "x86_64"), ("aarch64", "arm64")):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        words = shlex.split(make(machine=CPU).docker(OURS.folder))
        assert f"vllm/vllm-openai-cpu:v0.32.0-{arch}" in words and "--gpus" not in words
    with pytest.raises(FourfoldError, match=r"SGLang publishes no image\. .* --engine vllm"):
        make(machine=CPU, engine=SGLANG).docker(OURS.folder)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(FourfoldError, match=r"without a GPU \(riscv64\), for which vLLM publishes no image"):
        make(machine=CPU).docker(OURS.folder)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("box.lan", "http://box.lan:8000"),
    ],
)
def test_where_it_is_reached(host: str, url: str) -> None:
    command = make(host=host)
    assert (command.url, flags(command)["--host"]) == (url, host)


def test_text_survives_a_shell() -> None:
    command = make(changed(OURS, folder=OURS.folder / "it's here"))
    assert tuple(shlex.split(command.text())) == command.words


def test_what_is_known_of_failures() -> None:
    log = "ValueError: FP8 KV cache is not supported by the Triton attention backend on NVIDIA GeForce RTX 3060"
    (why,) = engines.explain(VLLM, log)
    assert "FlashInfer" in why
    assert engines.explain(SGLANG, log) == []
    assert engines.explain(VLLM, "all is well") == []


@pytest.mark.parametrize(
    ("capability", "name", "variable", "said"),
    [
        ((12, 0), "NVIDIA GeForce RTX 5090", "", "vLLM PR #43730, 2026-05-27"),
        ((12, 1), "NVIDIA GB10", "FP8", "vLLM #49546, 2026-07"),
        ((12, 1), "NVIDIA GB10", "", ""),
        ((8, 9), "NVIDIA L40S", "", "README of IST-DASLab/GSQ, 2026-07-05"),
        ((8, 9), "NVIDIA GeForce RTX 4090", "", ""),
        ((9, 0), "NVIDIA H200", "", "prefers Humming to Marlin"),
        ((8, 6), "NVIDIA GeForce RTX 3060", "", ""),
    ],
)
def test_known_issues_of_kernels_by_gpu(capability: tuple[int, int], name: str, variable: str, said: str) -> None:
    gpu = replace(gpus(1, 80, capability).gpus[0], name=name)
    machine, inherited = replace(gpus(1, 80), gpus=(gpu,)), {"VLLM_MARLIN_INPUT_DTYPE": variable}
    found = [note for note in make(machine=machine, inherited=inherited).notes if note.startswith("known issue on")]
    assert [said in note for note in found] == ([True] if said else [])
    unquantized = make(changed(OURS, format=None, group_size=0), machine, inherited=inherited)
    for other in (unquantized, make(machine=machine, inherited=inherited, engine=SGLANG)):
        assert not [note for note in other.notes if note.startswith("known issue on")]


def test_drafts_that_a_config_excludes_by_name() -> None:
    """Of SGLang before 0.5.23, which takes their fused modules for quantized."""
    named = changed(OURS, drafts_by_name=True)
    old = {"engine": SGLANG, "version": (0, 5, 10)}
    assert engines.DRAFTS_BY_NAME in make(named, **old).notes
    for command in (make(named, engine=SGLANG), make(named, **old, drafts=0), make(**old), make(named)):
        assert engines.DRAFTS_BY_NAME not in command.notes


# --- what docs/serving.md says, by task ---------------------------------------------------------------------------

TASKS: dict[str, tuple[Machine, dict[str, Any]]] = {
    "24 GB card, vLLM": (
        gpus(1, 24, (8, 9)),
        {"drafts": 0, "kv_cache": "fp8", "extra": ("--gpu-memory-utilization", "0.95", "--max-num-seqs", "16")},
    ),
    "24 GB card, recipe compact, vLLM": (gpus(1, 24, (8, 9)), FULL_24_GB | {"served": COMPACT}),
    "32 GB card, vLLM": (gpus(1, 32, (12, 0)), {"kv_cache": "fp8"}),
    "4 x 12 GB, vLLM": (gpus(4, 12, (8, 6)), {}),
    "4 x 12 GB, SGLang": (gpus(4, 12, (8, 6)), {"engine": SGLANG, "kv_cache": "fp8"}),
    "one H200, vLLM": (gpus(1, 140.4, (9, 0)), {}),
    "one H200, SGLang": (gpus(1, 140.4, (9, 0)), {"engine": SGLANG}),
    "CPU trial, vLLM": (CPU, {"inherited": {"VLLM_CPU_KVCACHE_SPACE": "4"}}),
}


def test_tasks_of_the_docs(golden: Callable[[str, str], None]) -> None:
    said = []
    for task, (machine, settings) in TASKS.items():
        wanted = dict(settings)
        command = make(changed(wanted.pop("served", OURS), sampling={}), machine, **wanted)
        said += [f"## {task}", command.text(), *command.forecast.lines()]
        said += [*(f"problem: {problem}" for problem in command.problems), *(f"note: {n}" for n in command.notes), ""]
    golden("serve-tasks.txt", "\n".join(said))
