"""What fits: how a checkpoint is split over GPUs, and the KV cache beside its weights."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.serve.engines import OVERHEAD_BYTES, SGLANG, VLLM, Version
from fourfold.serve.kvcache import CPU_ALIGN, GPU_ALIGN, SglangPool, VllmPool, sglang_pool, vllm_pool
from fourfold.serve.machine import Machine
from fourfold.serve.served import Served

ELEMENT_BYTES = {"auto": 2, "fp8": 1}
CONTEXT_STEP = 1024


@dataclass(frozen=True, kw_only=True)
class Split:
    """ranks: of tensor parallel; gpus: whether they are GPUs; smallest_bytes: memory of the smallest of them."""

    ranks: int
    gpus: bool
    smallest_bytes: int
    problems: tuple[str, ...] = ()

    @classmethod
    def choose(cls, served: Served, machine: Machine, ranks: int | None, experts_apart: bool) -> Split:
        """ranks: None for as many GPUs as divide the model. experts_apart: expert parallel, which splits no group."""
        count = len(machine.gpus)
        if ranks is None:
            fitting = [n for n in (1, 2, 4, 8, 16) if n <= count and not _undivided(served, n, experts_apart)]
            ranks = max(fitting, default=1)
        problems = list(_undivided(served, ranks, experts_apart))
        if machine.gpus and ranks > count:
            problems.append(f"--tp {ranks}: this machine has {count} GPU{'s' if count > 1 else ''}")
        smallest = min((gpu.total_bytes for gpu in machine.gpus), default=machine.host_bytes)
        return cls(ranks=ranks, gpus=bool(machine.gpus), smallest_bytes=smallest, problems=tuple(problems))


def _undivided(served: Served, ranks: int, experts_apart: bool) -> list[str]:
    """Why a model does not split over so many ranks."""
    found = [f"{count} {what}" for what, count in served.splits.items() if count % ranks]
    heads = served.geometry.kv_heads
    if heads % ranks and ranks % heads:
        found.append(f"{heads} KV heads")
    problems = [f"--tp {ranks} does not divide {', '.join(found)}"] if found else []
    width, group = served.expert_width, served.group_size
    if group and not experts_apart and width % (ranks * group):
        part = f"{width} / {ranks} features of an expert on each are not divisible by group size {group}"
        largest = max((n for n in (1, 2, 4, 8, 16) if n < ranks and not width % (n * group)), default=1)
        apart = "" if found else " expert parallel (`-- --enable-expert-parallel` in vLLM, `-- --ep-size N` in SGLang),"
        problems.append(
            f"--tp {ranks}: {part}; engines refuse, halve the groups or fill scales with zeros. Try: "
            f"--tp {largest},{apart} or a release quantized with smaller groups (scheme.group_size)"
        )
    return problems


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Settings of an engine's cache.

    share: of a GPU's memory that it may take; elements: auto or fp8; context: None for as much as fits; requests:
    SGLang's --max-running-requests, 0 where it is not said; cpu_gib: vLLM's cache on a CPU.
    """

    engine: str
    version: Version
    share: float
    elements: str
    drafts: int
    context: int | None
    prefix_caching: bool
    requests: int
    cpu_gib: int

    @property
    def old(self) -> bool:
        """Whether tokens are counted as in vLLM 0.19 and SGLang 0.5.10."""
        return self.version < ((0, 32) if self.engine == VLLM else (0, 5, 23))


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """pool: None where weights leave no room; memory_bytes: on each rank; loading_bytes: of weights on each while they
    are loaded, 0 if no more than afterwards; context: of the server; exact: memory_bytes is no estimate; problems,
    doubts: what does not fit, and what may not.
    """

    split: Split
    cache: Cache
    pool: VllmPool | SglangPool | None
    memory_bytes: int
    loading_bytes: int
    context: int
    exact: bool
    problems: tuple[str, ...]
    doubts: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        what = "set" if self.exact else "estimated: activations and graphs are known only once it runs"
        lines, pool = [f"KV cache: {self.memory_bytes / 1e9:.2f} GB on each of {self.split.ranks} ({what})"], self.pool
        if isinstance(pool, VllmPool):
            blocks = f"{pool.blocks:,} blocks x {pool.block_tokens:,} tokens = {pool.blocks * pool.block_tokens:,}"
            requests = f"room for {pool.concurrency:,.1f} requests of the whole context of {self.context:,}"
            lines.append(f"{blocks}; vLLM calls it {self.logged_tokens:,} tokens")
            lines.append(f"{requests}; the longest that would fit is {pool.longest:,}")
        elif pool is not None:
            running = "" if pool.running is None else f", {pool.running:,} running requests"
            lines.append(f"max_total_num_tokens {pool.tokens:,}{running}")
        if self.loading_bytes:
            held = f"{self.loading_bytes / 1e9:.1f} of {self.split.smallest_bytes / 1e9:.1f} GB"
            lines.append(f"while loading: {held}; the draft head has its own embeddings and output head until then")
        return lines

    def brief(self) -> str:
        """To set beside the engine's own figures."""
        if isinstance(self.pool, VllmPool):
            return f"{self.pool.blocks:,} blocks of {self.pool.block_tokens:,}, {self.logged_tokens:,} tokens"
        return f"{self.logged_tokens:,} tokens"

    @property
    def longest(self) -> int:
        """Tokens of the longest request that fits alone."""
        return _longest(self.pool) if self.pool else 0

    @property
    def logged_tokens(self) -> int:
        """The engine's own figure of its pool, 0 without one."""
        if isinstance(self.pool, VllmPool):
            return self.pool.tokens_by_groups if self.cache.old else self.pool.tokens
        return self.pool.tokens if self.pool else 0


def forecast(served: Served, split: Split, cache: Cache) -> Forecast:
    """What the cache will hold. On a CPU its memory is set; on GPUs it is what weights and OVERHEAD_BYTES leave."""
    weights = (served.weight_bytes + (served.draft_bytes if cache.drafts else 0)) // split.ranks
    exact = not split.gpus
    room = int(cache.share * split.smallest_bytes) - weights if split.gpus else cache.cpu_gib * 2**30
    memory = room if exact else room - OVERHEAD_BYTES[cache.engine]
    problems, doubts = list[str](), list[str]()
    if room <= 0:
        usable = f"{cache.share:.2f} of the smallest is {cache.share * split.smallest_bytes / 1e9:.1f} GB"
        problems.append(f"weights take {weights / 1e9:.1f} GB on each GPU, {usable}: more GPUs (--tp), or larger ones")
    loading = 0
    if cache.engine == VLLM and cache.drafts and split.gpus:  # v1/spec_decode/llm_base_proposer.py:1398 in 0.32
        loading = weights + served.ends_bytes // split.ranks
    if room > 0 and loading > split.smallest_bytes:
        held = f"{loading / 1e9:.1f} GB on each GPU of {split.smallest_bytes / 1e9:.1f} GB"
        problems.append(f"while loading with drafts weights take {held}. Try: --mtp 0, or more GPUs (--tp)")
    context = cache.context or served.context
    pool = _pool(served, split, cache, memory, context)
    if cache.context is None and pool is not None and _longest(pool) < context:
        context = max(CONTEXT_STEP, _longest(pool) // CONTEXT_STEP * CONTEXT_STEP)
        pool = _pool(served, split, cache, memory, context)
    if room > 0 and (pool is None or _longest(pool) < context):
        best = _pool(served, split, cache, room, context)
        most = 0 if best is None else _longest(best)
        problem = (
            f"a context of {context:,} tokens does not fit: {max(memory, 0) / 1e9:.2f} GB remain for the cache on "
            f"each, enough for {_longest(pool) if pool else 0:,} tokens. Try: a smaller --context, "
            "--kv-cache fp8, --mtp 0, more GPUs"
        )
        (problems if exact or most < context else doubts).append(problem)
    if isinstance(pool, SglangPool) and pool.running == 0:
        states = f"{pool.slots} states of linear attention fit, a request needs more"
        problems.append(f"{states}: SGLang would run none. Try: --mtp 0, more GPUs (--tp), or vLLM")
    if cache.engine == SGLANG and cache.old and cache.drafts and not cache.requests:
        doubts.append("SGLang 0.5.10 sets states aside for --max-running-requests when drafting: not subtracted here")
    return Forecast(
        split=split, cache=cache, pool=pool, memory_bytes=max(memory, 0), loading_bytes=loading, context=context,
        exact=exact, problems=tuple(problems), doubts=tuple(doubts),
    )  # fmt: skip


def _longest(pool: VllmPool | SglangPool) -> int:
    return pool.longest if isinstance(pool, VllmPool) else pool.tokens


def _pool(served: Served, split: Split, cache: Cache, memory: int, context: int) -> VllmPool | SglangPool | None:
    if memory <= 0:
        return None
    element_bytes = ELEMENT_BYTES[cache.elements]
    if cache.engine == SGLANG:
        drafts, strategy = (cache.drafts + 1, "extra_buffer") if cache.drafts else (0, "no_buffer")
        return sglang_pool(
            served.geometry, memory, ranks=split.ranks, element_bytes=element_bytes, drafts=drafts, strategy=strategy,
            old=cache.old, requests=cache.requests,
        )  # fmt: skip
    return vllm_pool(
        served.geometry, memory, ranks=split.ranks, element_bytes=element_bytes, drafts=cache.drafts, context=context,
        align=GPU_ALIGN if split.gpus else CPU_ALIGN, prefix_caching=cache.prefix_caching,
    )  # fmt: skip
