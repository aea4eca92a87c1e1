"""The arithmetic of both engines' caches against what real engines reported."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments import LARGE
from fourfold.serve.kvcache import CPU_ALIGN, GPU_ALIGN, Geometry, SglangPool, sglang_pool, vllm_pool

GIB = 2**30
# The example model, with a drafter of more heads, too, and one of two layers whose linear attention is twice as wide.
TINY = Geometry(
    attention=1, linear=3, kv_heads=2, head_dim=64, conv=4, key_heads=2, key_dim=64, value_heads=4, value_dim=64
)
DRAFTED = replace(TINY, drafter=Geometry(attention=1, linear=0, kv_heads=4, head_dim=64))
SHORT = Geometry(
    attention=1, linear=1, kv_heads=2, head_dim=64, conv=4, key_heads=4, key_dim=64, value_heads=8, value_dim=64
)


@pytest.mark.parametrize(
    ("geometry", "ranks", "elements", "drafts", "prefix", "wanted"),
    [
        (TINY, 1, 2, 0, False, (256, 8192, 838_860)),
        (TINY, 1, 1, 0, False, (384, 10922, 1_118_412)),
        (TINY, 1, 2, 2, False, (256, 4096, 262_144)),
        (TINY, 1, 2, 2, True, (256, 4096, 209_715)),
        (DRAFTED, 1, 2, 2, False, (256, 4096, 174_762)),
        (SHORT, 2, 2, 2, False, (384, 10922, 798_866)),
    ],
)
def test_vllm_as_it_reported(
    geometry: Geometry, ranks: int, elements: int, drafts: int, prefix: bool, wanted: tuple[int, int, int]
) -> None:
    """vLLM 0.32.0 on a CPU with 1 GiB and a context of 512: block size, blocks, tokens, each exact."""
    budget = dict(memory_bytes=GIB, ranks=ranks, element_bytes=elements, drafts=drafts, context=512)
    pool = vllm_pool(geometry, **budget, align=CPU_ALIGN, prefix_caching=prefix)
    assert (pool.block_tokens, pool.blocks, pool.tokens) == wanted


@pytest.mark.parametrize(
    ("elements", "drafts", "block_tokens", "megabytes"), [(1, 2, 1072, 6.04), (1, 0, 1056, 5.41), (2, 2, 544, 6.13)]
)
def test_vllm_blocks_of_the_reference_machine(elements: int, drafts: int, block_tokens: int, megabytes: float) -> None:
    budget = dict(memory_bytes=3_620_000_000, ranks=4, element_bytes=elements, drafts=drafts, context=200_000)
    pool = vllm_pool(LARGE, **budget, align=GPU_ALIGN, prefix_caching=True)
    assert pool.block_tokens == block_tokens
    assert pool.block_bytes / 1e6 == pytest.approx(megabytes, abs=0.005)


def test_vllm_pool_of_the_reference_machine() -> None:
    """The card's 160,800 tokens are 150 rounds of 4 groups of 1,072: 600 to 603 blocks."""
    block_bytes = 6_037_504
    for blocks in (600, 603):
        budget = dict(memory_bytes=blocks * block_bytes, ranks=4, element_bytes=1, drafts=2, context=200_000)
        pool = vllm_pool(LARGE, **budget, align=GPU_ALIGN, prefix_caching=True)
        assert (pool.blocks, pool.groups, pool.tokens_by_groups) == (blocks, 4, 160_800)
        assert pool.request_blocks == 199
    assert pool.tokens == pytest.approx(606_000, rel=0.001)
    assert 3.9 < pool.longest / 160_800 < 4  # what one request could really use


def test_sglang_pool_of_the_reference_machine() -> None:
    budget = dict(memory_bytes=4_025_221_120, ranks=4, element_bytes=1, drafts=0)
    pool = sglang_pool(LARGE, **budget, strategy="no_buffer", old=True)
    assert pool == SglangPool(tokens=415_184, slots=118, running=39)


def test_sglang_of_today() -> None:
    """One slot is kept back; with drafts the slots pay for their steps, and the draft head's layer is counted."""
    slot, total = 30 * LARGE.state_bytes(4, 0), 4_025_221_120
    plain = sglang_pool(
        LARGE,
        memory_bytes=total,
        ranks=4,
        element_bytes=1,
        drafts=0,
        strategy="no_buffer",
        old=False,
    )
    assert (plain.slots, plain.tokens) == (117, (total - 117 * slot) // 5120)
    drafting = sglang_pool(
        LARGE,
        memory_bytes=total,
        ranks=4,
        element_bytes=1,
        drafts=4,
        strategy="extra_buffer",
        old=False,
    )
    slots = int((total * 0.9 / 1.9 - 5 * slot) / (slot * 1.8))
    assert (drafting.slots, drafting.running) == (slots, slots // 5)
    assert drafting.tokens == (total - slots * slot) // (11 * 512)


def test_attention_alone() -> None:
    """No states: blocks of the kernel's own size, one group, any number of requests."""
    geometry = Geometry(attention=4, linear=0, kv_heads=4, head_dim=128)
    budget = dict(memory_bytes=GIB, ranks=1, element_bytes=2, drafts=0, context=1000)
    pool = vllm_pool(geometry, **budget, align=GPU_ALIGN, prefix_caching=True)
    assert (pool.block_tokens, pool.groups, pool.request_blocks) == (16, 1, 63)
    assert pool.blocks == GIB // (4 * 16 * 2 * 4 * 128 * 2)
    unlimited = sglang_pool(geometry, GIB, ranks=1, element_bytes=2, drafts=0, strategy="no_buffer", old=False)
    assert unlimited.running is None


def test_a_drafter_like_the_models_own_layers() -> None:
    """It is one layer more of the model; with smaller tokens its blocks have more of them."""
    budget = dict(memory_bytes=GIB, ranks=1, element_bytes=2, drafts=2, context=512)
    like = replace(TINY, drafter=Geometry(attention=1, linear=0, kv_heads=2, head_dim=64))
    small = replace(TINY, drafter=Geometry(attention=1, linear=0, kv_heads=1, head_dim=64))
    own, alike, smaller = (
        vllm_pool(one, **budget, align=CPU_ALIGN, prefix_caching=False) for one in (TINY, like, small)
    )
    assert alike == own
    assert smaller.attention == ((1, 256), (1, 512)) and smaller.request_blocks == 2 + 1 + 9


def test_more_ranks_than_kv_heads_keep_a_copy_each() -> None:
    assert LARGE.token_bytes(4, 1) == LARGE.token_bytes(2, 1) == LARGE.token_bytes(1, 1) // 2


def test_the_longest_request_fits_and_one_block_more_does_not() -> None:
    budget = dict(memory_bytes=GIB, ranks=1, element_bytes=2, drafts=2, context=512)
    longest = vllm_pool(TINY, **budget, align=CPU_ALIGN, prefix_caching=False).longest
    for tokens, fits in ((longest, True), (longest + 1, False)):
        again = dict(memory_bytes=GIB, ranks=1, element_bytes=2, drafts=2, context=tokens)
        pool = vllm_pool(TINY, **again, align=CPU_ALIGN, prefix_caching=False)
        assert (pool.request_blocks <= pool.blocks) is fits


def test_kinds_of_layers_that_are_nearly_as_many_are_padded() -> None:
    """vLLM's rule: below one and a half times as many, a group is of the more frequent kind's size."""
    for attention, linear, size, groups in ((8, 10, 10, 2), (6, 9, 6, 3), (9, 6, 6, 3), (1, 3, 1, 4)):
        geometry = Geometry(
            attention=attention, linear=linear, kv_heads=2, head_dim=64, conv=4, key_heads=2, key_dim=64, value_heads=4,
            value_dim=64,
        )  # fmt: skip
        budget = dict(memory_bytes=GIB, ranks=1, element_bytes=2, drafts=0, context=512)
        pool = vllm_pool(geometry, **budget, align=CPU_ALIGN, prefix_caching=False)
        assert (pool.block_bytes, pool.groups) == (size * 256 * 512, groups)
