"""How many tokens an engine's KV cache holds, from config.json alone. Pure functions of numbers.

In a hybrid model the full-attention layers keep keys and values of every token, the linear-attention layers one state
of fixed size per request. Both engines put the two kinds into one budget, each by rules of its own, given below with
their places in the sources; docs/serving.md derives the figures of the reference machine. All bytes are per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

GPU_ALIGN, CPU_ALIGN = 16, 128  # tokens; vLLM's smallest kernel blocks
EVEN = 1.5  # vLLM pads the rarer kind of layers where the other one has fewer than this many times as many
RATIO = 0.9  # SGLang's --mamba-full-memory-ratio by default
PER_REQUEST = {"no_buffer": 3, "extra_buffer": 5}  # slots of states that SGLang counts for a running request


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What of a model decides its cache. attention, linear: layers of each kind, the draft head not counted.

    latent: values of a token that all heads share (MLA), on every rank, 0 without; conv: width of the convolution
    before linear attention; key_heads ... value_dim: of linear attention; drafter: of an external one, None where
    drafts come from one attention layer more of the model.
    """

    attention: int
    linear: int
    kv_heads: int
    head_dim: int
    latent: int = 0
    conv: int = 0
    key_heads: int = 0
    key_dim: int = 0
    value_heads: int = 0
    value_dim: int = 0
    drafter: Geometry | None = None

    def attention_layers(self, ranks: int, element_bytes: int, drafting: bool) -> dict[int, int]:
        """How many attention layers take so many bytes for a token, the drafter's among them."""
        layers = {self.token_bytes(ranks, element_bytes): self.attention}
        if drafting:
            drafter = self.drafter or replace(self, attention=1)
            token = drafter.token_bytes(ranks, element_bytes)
            layers[token] = layers.get(token, 0) + drafter.attention
        return layers

    def token_bytes(self, ranks: int, element_bytes: int) -> int:
        """Keys and values of a token in one attention layer. Ranks beyond the KV heads hold copies."""
        if self.latent:
            return self.latent * element_bytes
        return 2 * max(1, self.kv_heads // ranks) * self.head_dim * element_bytes

    def state_bytes(self, ranks: int, drafts: int) -> int:
        """Of one linear layer's state: the convolution's inputs in two bytes, the recurrent matrix in fp32."""
        if not self.linear:
            return 0
        width = (2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim) // ranks
        return (self.conv - 1 + drafts) * width * 2 + self.value_heads // ranks * self.value_dim * self.key_dim * 4


@dataclass(frozen=True, kw_only=True)
class VllmPool:
    """attention: of each kind of attention layer, how many groups share a table of blocks, and tokens of their blocks;
    groups: these, and those of linear attention; block_tokens: as vLLM reports them, of the model's own attention.
    """

    blocks: int
    block_tokens: int
    block_bytes: int
    groups: int
    attention: tuple[tuple[int, int], ...]
    state_blocks: int
    context: int

    @property
    def request_blocks(self) -> int:
        """Of one request of the whole context."""
        return sum(groups * -(-self.context // tokens) for groups, tokens in self.attention) + self.state_blocks

    @property
    def concurrency(self) -> float:
        """Requests of the whole context that fit."""
        return self.blocks / self.request_blocks

    @property
    def tokens(self) -> int:
        """`GPU KV cache size` in vLLM's log: it depends on the context. Compare blocks * block_tokens instead."""
        return int(self.blocks / self.request_blocks * self.context)

    @property
    def tokens_by_groups(self) -> int:
        """The same line in vLLM 0.19: the blocks dealt out evenly to all groups of layers."""
        return self.blocks // self.groups * self.block_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest request that fits alone."""
        largest = max(tokens for _, tokens in self.attention)
        blocks = sum(groups * largest // tokens for groups, tokens in self.attention)
        return max(0, (self.blocks - self.state_blocks) // blocks * largest)


def vllm_pool(
    geometry: Geometry, memory_bytes: int, *, ranks: int, element_bytes: int, drafts: int, context: int, align: int,
    prefix_caching: bool,
) -> VllmPool:  # fmt: skip
    """vLLM 0.32: block size, platforms/interface.py:1060; pages and groups, v1/core/kv_cache_utils.py:1292 and 1437.

    memory_bytes: for the cache, on each rank; element_bytes: 2 (BF16), 1 (fp8); drafts: tokens per step, 0 for none;
    align: GPU_ALIGN or CPU_ALIGN. All layers' blocks have the bytes of the largest: more tokens where a token is
    smaller, padding where the sizes do not divide each other.
    """
    layers = geometry.attention_layers(ranks, element_bytes, bool(drafts))
    token, linear = geometry.token_bytes(ranks, element_bytes), geometry.linear
    block = align * max(1, -(-geometry.state_bytes(ranks, drafts) // (align * token)))
    largest = max(layers)
    size = _group_size([*layers.values(), *([linear] if linear else [])])
    attention = tuple(
        (-(-count // size), block * (1 if largest % each else largest // each)) for each, count in layers.items()
    )
    linear_groups = -(-linear // size)
    return VllmPool(
        blocks=memory_bytes // (size * block * largest), block_tokens=block, block_bytes=size * block * largest,
        groups=sum(groups for groups, _ in attention) + linear_groups, attention=attention,
        state_blocks=linear_groups * ((2 if prefix_caching else 1) + drafts), context=context,
    )  # fmt: skip


def _group_size(counts: Sequence[int]) -> int:
    """Layers of each group, from those of each kind."""
    fewest, most = min(counts), max(counts)
    return most if most < EVEN * fewest else fewest


@dataclass(frozen=True, kw_only=True)
class SglangPool:
    """tokens: max_total_num_tokens; slots: of states; running: requests at one time that those allow, None: any."""

    tokens: int
    slots: int
    running: int | None


def sglang_pool(
    geometry: Geometry, memory_bytes: int, *, ranks: int, element_bytes: int, drafts: int, strategy: str, old: bool,
    requests: int = 0,
) -> SglangPool:  # fmt: skip
    """SGLang, mem_cache/kv_cache_configurator.py:3062 and 3349 in 0.5.23; old: as 0.5.10 counted.

    drafts: draft tokens of a step (steps + 1), 0 for none; strategy: of --mamba-radix-cache-strategy; requests:
    --max-running-requests, for which 0.5.10 reserves states when drafting. Others as of `vllm_pool`.
    """
    layers = geometry.attention_layers(ranks, element_bytes, bool(drafts) and not old)
    token = sum(each * count for each, count in layers.items())
    slot = geometry.linear * geometry.state_bytes(ranks, 0)
    if not slot:
        return SglangPool(tokens=memory_bytes // token, slots=0, running=None)
    share, each, memory = RATIO / (1 + RATIO), PER_REQUEST[strategy], memory_bytes
    if old:
        memory -= slot * requests * drafts
        slots = int(memory * share / slot)
    else:  # without drafts one slot is padding
        slots = int((memory * share - slot * (1 + drafts)) / (slot * (1 + drafts / each)))
    slots = max(0, slots)
    return SglangPool(tokens=max(0, (memory - slots * slot) // token), slots=slots, running=slots // each)
