"""Facts of the engines, as data: what settings are called by version, what must not be passed, known issues.

Known: vLLM 0.19.1 and 0.32.0, SGLang 0.5.10 and 0.5.23. A fact that holds "from" a version was seen at that version and
not at the known one before it. A new version is added here alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourfold.serve.machine import Gpu, Machine

Version = tuple[int, ...]
Spellings = tuple[tuple[Version, str], ...]  # from which version on; "" where it is gone

VLLM, SGLANG = "vllm", "sglang"
EVER: Version = (0,)


def version(text: str) -> Version:
    """ "0.32.0+cpu" is (0, 32, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", text)[0])) or EVER


def version_text(found: Version) -> str:
    return ".".join(map(str, found))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """launch: words before the folder, to be shown; module: the same after the interpreter; flags: setting ->
    spellings; known: versions that these facts are of, oldest first; image, cpu_image: of containers, "" for none.
    """

    name: str
    title: str
    launch: tuple[str, ...]
    module: tuple[str, ...]
    known: tuple[Version, ...]
    image: str
    cpu_image: str
    port: int
    flags: Mapping[str, Spellings]

    def flag(self, setting: str, at: Version) -> str:
        """What a setting is called in a version; "" if it has none there."""
        return next((spelling for since, spelling in reversed(self.flags[setting]) if at >= since), "")


def _always(**flags: str) -> dict[str, Spellings]:
    return {setting: ((EVER, flag),) for setting, flag in flags.items()}


VLLM_FLAGS = _always(
    name="--served-model-name", host="--host", port="--port", ranks="--tensor-parallel-size",
    context="--max-model-len", share="--gpu-memory-utilization", kv_cache="--kv-cache-dtype",
    drafts="--speculative-config", reasoning="--reasoning-parser", tools_on="--enable-auto-tool-choice",
    tools="--tool-call-parser", quantization="--quantization", dtype="--dtype", trust="--trust-remote-code",
    eager="--enforce-eager", no_prefix_caching="--no-enable-prefix-caching", images="--limit-mm-per-prompt",
    experts="--enable-expert-parallel", sampling="--override-generation-config",
)  # fmt: skip
SGLANG_FLAGS = _always(
    name="--served-model-name", host="--host", port="--port", ranks="--tp-size", context="--context-length",
    share="--mem-fraction-static", kv_cache="--kv-cache-dtype", drafts="--speculative-algorithm",
    draft_steps="--speculative-num-steps", draft_topk="--speculative-eagle-topk",
    draft_tokens="--speculative-num-draft-tokens", drafter="--speculative-draft-model-path",
    reasoning="--reasoning-parser", tools="--tool-call-parser", quantization="--quantization", dtype="--dtype",
    metrics="--enable-metrics", experts="--ep-size",
)  # fmt: skip
ENGINES = {
    VLLM: Engine(
        name=VLLM,
        title="vLLM",
        launch=("vllm", "serve"),
        module=("-m", "vllm.entrypoints.cli.main", "serve"),
        known=((0, 19, 1), (0, 32, 0)),
        image="vllm/vllm-openai:v{version}",
        cpu_image="vllm/vllm-openai-cpu:v{version}-{arch}",  # its docs: getting_started/installation/cpu.*.inc.md
        port=8000,
        flags=VLLM_FLAGS
        # 0.32 makes a reasoning config of the parser; 0.19 needs one, or it answers 400 to each budget.
        | {"reasoning_config": ((EVER, "--reasoning-config"), ((0, 32), ""))},
    ),
    SGLANG: Engine(
        name=SGLANG,
        title="SGLang",
        launch=("python3", "-m", "sglang.launch_server", "--model-path"),
        module=("-m", "sglang.launch_server", "--model-path"),
        known=((0, 5, 10), (0, 5, 23)),
        image="lmsysorg/sglang:v{version}",
        cpu_image="",  # its docs have one built from docker/xeon.Dockerfile
        port=30000,
        flags=SGLANG_FLAGS
        | {"strategy": ((EVER, "--mamba-scheduler-strategy"), ((0, 5, 23), "--mamba-radix-cache-strategy"))},
    ),
}

KV_CACHES = {VLLM: {"fp8": "fp8", "auto": "auto"}, SGLANG: {"fp8": "fp8_e4m3", "auto": "auto"}}

# Names of the parsers, by model_type: (thinking, tool calls). Where a template writes tool calls as <function=...>, it
# is qwen3_coder's form whatever the family.
PARSERS = {
    ("qwen3_5_moe", VLLM): ("qwen3", "qwen3_coder"), ("qwen3_5_moe", SGLANG): ("qwen3", "qwen3_coder"),
    ("qwen3_moe", VLLM): ("qwen3", "hermes"), ("qwen3_moe", SGLANG): ("qwen3", "qwen25"),
    ("qwen2_moe", VLLM): ("qwen3", "hermes"), ("qwen2_moe", SGLANG): ("qwen3", "qwen25"),
}  # fmt: skip
XML_CALL, XML_PARSER, THINKING = "<function=", "qwen3_coder", "<think>"

QUANTIZED_HEAD: Version = (0, 20, 2)  # the first vLLM read that loads a quantized output head; 0.19.1 does not
NO_CPU_INT8 = "vLLM has no kernel for int8 weights on a CPU: serve on a GPU, or a release with int4 experts alone"
NO_DRAFTS_WITH_HEAD = (
    "SGLang 0.5.23 makes no drafts with a quantized output head: it stops at start with "
    "\"'ParallelLMHead' object has no attribute 'weight'\""
)

DRAFTS = {VLLM: 2, SGLANG: 3}  # tokens that the MTP head drafts at a time, as the reference found best

# Bytes of each GPU that are neither weights nor cache: activations, context, NCCL. Derived from the reference's own
# figures, 4 x 12 GiB: 0.85 * 12 GiB - 24.4 GB / 4 - 3.62 GB (vLLM), 0.89 * 12 GiB - 22.7 GB / 4 - 4.03 GB (SGLang).
OVERHEAD_BYTES = {VLLM: 1_230_000_000, SGLANG: 1_760_000_000}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Values where the user names none. settings: more of them, by name and value; measured: what its maker saw."""

    share: float
    ranks: int | None = None
    context: int | None = None
    kv_cache: str = "auto"
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    version: Version | None = None
    measured: str = ""


DEFAULT, REFERENCE = "default", "reference"
# Shares of memory: below vLLM's own default (0.92), and where SGLang leaves room for graphs on cards of 12 to 141 GB.
SHARES = {VLLM: 0.90, SGLANG: 0.85}

RTX_3060 = Gpu(name="NVIDIA GeForce RTX 3060", total_bytes=12 * 2**30, free_bytes=12 * 2**30, capability=(8, 6))
REFERENCE_MACHINE = Machine(gpus=(RTX_3060,) * 4, host_bytes=32 * 2**30)


_CARD: dict[str, Any] = {"ranks": 4, "kv_cache": "fp8"}
_CARD_VLLM = _CARD | {
    "share": 0.85, "context": 200_000, "settings": {"dtype": "bfloat16", "trust": ""}, "version": (0, 19, 1),
}  # fmt: skip
_CARD_SGLANG = _CARD | {"context": 262_144, "version": (0, 5, 10)}
CARD = {  # the four commands on the card of the reference release, measured on 4 x RTX 3060: by engine, with drafts
    (VLLM, False): Profile(**_CARD_VLLM),
    (VLLM, True): Profile(
        **_CARD_VLLM,
        measured="pool 160,800 tokens (600 to 603 blocks of 1,072); 56-82 tokens/s, 70-89 % of drafts accepted",
    ),
    (SGLANG, False): Profile(**_CARD_SGLANG, share=0.89, measured="415,184 tokens, 39 running requests"),
    (SGLANG, True): Profile(
        **_CARD_SGLANG,
        share=0.80,
        settings={"dtype": "float16", "strategy": "extra_buffer"},
        environment={"SGLANG_MAMBA_CONV_DTYPE": "float16"},
        measured="52-141 tokens/s, 34-70 % of drafts accepted: the draft's experts were not loaded",
    ),
}


def profile(name: str, engine: str, drafting: bool) -> Profile:
    return Profile(share=SHARES[engine]) if name == DEFAULT else CARD[engine, drafting]


FP8_CACHE = (
    r"FP8 KV cache is not supported by the Triton attention backend",
    "below compute capability 8.9 vLLM stores an fp8 cache only with FlashInfer. Install flashinfer-python into its "
    "environment and add `-- --attention-backend FLASHINFER`, or use --kv-cache auto",
)
NO_PARSER = "this version lacks the parser: name another after `--`"
KNOWN_ISSUES = {  # by engine: a regular expression of its log, the cause with what to do
    VLLM: (
        FP8_CACHE,
        (r"KeyError: '?[\w.]*experts\.w2_weight",
         "--quantization moe_wna16 breaks the MTP loader: leave it out, vLLM reads the method from config.json"),
        (r"has no parameter 'w2_weight' for checkpoint weight 'mtp\.",
         'config.json\'s quantization_config.dynamic has no "-:" rule for mtp: `fourfold verify OUT` says which'),
        (r"To serve at least one request with the model's max seq len",
         "the KV cache that fits beside the weights is smaller than one request of this length: a smaller "
         "--context, --kv-cache fp8, more GPUs (--tp), or --mtp 0"),
        (r"MoE intermediate size per tensor-parallel partition \(\d+\) to be divisible by group_size",
         "groups do not divide by this many GPUs: fewer (--tp), `-- --enable-expert-parallel`, or smaller groups"),
        (r"Weight input_size_per_partition ?= ?\d+ is not divisible by group_size",
         "groups of inputs do not divide by this many GPUs: fewer (--tp), or smaller groups (scheme.group_size)"),
        (r"Failed to find a kernel that can implement the WNA16 linear layer", NO_CPU_INT8),
        (r"Marlin does not support weight_bits = uint8b128", NO_CPU_INT8),
        (r"No WNA16 MoE backend supports the deployment configuration",
         "no int4 expert kernel for this CPU (AMD with AVX-512 and zentorch, Intel with AMX) or for this split"),
        (r"TypeError: 'function' object is not subscriptable",
         "prefix caching of a hybrid model needs Triton, which a CPU lacks: leave --enable-prefix-caching out"),
        (r"max\(\): Expected reduction dim to be specified for input.numel\(\) == 0",
         "vLLM 0.32 on a CPU stops at the first request that samples with top_k under MTP: --mtp 0, or top_k -1 in "
         "requests and, where generation_config.json has a top_k, `-- --generation-config vllm`"),
        (r"invalid tool call parser:", NO_PARSER),
        (r"Reasoning parser '.*' not found", NO_PARSER),
        (r"ipc path .* is longer than 107 characters",
         "the folder for temporary files has too long a name: set TMPDIR to a short one"),
    ),
    SGLANG: (
        (r"KeyError: 'model\.layers\.0\.mlp\.experts\.w2_weight'",
         "SGLang does not load a gptq release's draft experts: a release in format compressed-tensors, or --mtp 0"),
        (r"'ParallelLMHead' object has no attribute 'weight'",
         f"{NO_DRAFTS_WITH_HEAD}: --mtp 0, or a release with scheme.rest.head = \"bf16\" (recipe compact-sglang)"),
        (r"start \(\d+\) \+ length \(\d+\) exceeds dimension size",
         "gptq_marlin is right on one GPU only: --quantization moe_wna16, which serve passes, or compressed-tensors"),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KernelIssue:
    """Wrong results or a crash of an engine's int4 expert kernels on one kind of GPU. Never seen by fourfold itself.

    capability: of the GPU; gpu: a part of its name, "" for any; variable: of the environment, with the value that
    brings it on; source, date: of the report.
    """

    engine: str
    capability: tuple[int, int]
    kind: str
    seen: str
    fix: str
    source: str
    date: str
    gpu: str = ""
    variable: tuple[str, str] | None = None

    def applies(self, gpu: Gpu, environment: Mapping[str, str]) -> bool:
        if self.variable and environment.get(self.variable[0], "").lower() != self.variable[1]:
            return False
        return gpu.capability == self.capability and self.gpu in gpu.name

    def __str__(self) -> str:
        return f"known issue on {self.kind}: {self.seen}. Try: {self.fix} ({self.source}, {self.date})"


KERNEL_ISSUES = (
    KernelIssue(
        engine=VLLM, capability=(12, 0), kind="compute capability 12.0 (RTX 50, RTX PRO 6000)",
        seen="Marlin's int4 experts give corrupted text from several thinking requests at once, or stop with an "
        "illegal memory access; one request at a time is right",
        fix="a vLLM that has PR #40923 and #43730, or `-- --max-num-seqs 1`; test with `fourfold verify URL --load 16`",
        source="vLLM PR #43730", date="2026-05-27",
    ),
    KernelIssue(
        engine=VLLM, capability=(12, 1), kind="GB10 (DGX Spark) with VLLM_MARLIN_INPUT_DTYPE=fp8",
        seen="Marlin's int4 experts with fp8 activations repeat `</think>` without end",
        fix="unset VLLM_MARLIN_INPUT_DTYPE", source="vLLM #49546", date="2026-07",
        variable=("VLLM_MARLIN_INPUT_DTYPE", "fp8"),
    ),
    KernelIssue(
        engine=VLLM, capability=(8, 9), gpu="L40S", kind="L40S",
        seen="vLLM finds no Marlin kernel for compressed-tensors int4 experts and stops in moe_sum of its Triton path",
        fix="a newer vLLM", source="README of IST-DASLab/GSQ", date="2026-07-05",
    ),
    KernelIssue(
        engine=VLLM, capability=(9, 0), kind="compute capability 9.0 (H100, H200)",
        seen="vLLM 0.32 prefers Humming to Marlin for int4 experts where the package humming is installed; it was "
        "read, not run, with negative scales as fourfold writes them",
        fix="`-- --moe-backend marlin` if `fourfold verify OUT --engine vllm --load 16` fails",
        source="vLLM 0.32.0, quantization/utils/humming/priority.py", date="2026-11",
    ),
)  # fmt: skip
# Fixed in 0.5.23, which was read; sgl-project/sglang #35797, 2026-08.
NAMED_DRAFTS: Version = (0, 5, 23)
DRAFTS_BY_NAME = (
    "quantization_config.ignore names parts of the draft head's fused modules one by one: SGLang before 0.5.23 takes "
    "the fused ones for quantized and skips their weights without an error, so drafts are hardly ever accepted "
    "(sgl-project/sglang #35797, 2026-08). Try: a newer SGLang, or a regular expression as in re:.*mtp.*"
)


def kernel_issues(engine: str, gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[str]:
    """Return the known issues of an engine's int4 expert kernels on these GPUs."""
    known = (issue for issue in KERNEL_ISSUES if issue.engine == engine)
    return [str(issue) for issue in known if any(issue.applies(gpu, environment) for gpu in gpus)]


def explain(engine: str, log: str) -> list[str]:
    """Return the causes of the known failures in a log."""
    return [cause for pattern, cause in KNOWN_ISSUES[engine] if re.search(pattern, log)]
