"""Words of int4 codes against docs/formats.md, an unpacker written from it, and compressed-tensors' own code."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from fourfold.core import pack

WORKED_EXAMPLE = [0, 7, -8, -1, 1, -7, 4, -5]


def test_the_worked_example() -> None:
    words = pack.pack_codes(torch.tensor(WORKED_EXAMPLE, dtype=torch.int8)[None, None])
    assert words.dtype == torch.int32 and words.flatten().tolist() == [1008300280]
    assert words.view(torch.uint8).flatten().tolist() == [0xF8, 0x70, 0x19, 0x3C]
    assert reference.unpack_word(1008300280) == WORKED_EXAMPLE
    assert pack.unpack_codes(words).flatten().tolist() == WORKED_EXAMPLE


def test_the_worked_example_of_int8() -> None:
    words = pack.pack_codes(torch.tensor([0, 127, -128, -1], dtype=torch.int8)[None, None], 8)
    assert words.dtype == torch.int32 and words.flatten().tolist() == [0x7F00FF80]
    assert pack.unpack_codes(words, 8).flatten().tolist() == [0, 127, -128, -1]


def test_a_top_nibble_of_8_or_more_is_a_negative_word() -> None:
    for top in range(-8, 8):
        codes = [*WORKED_EXAMPLE[:7], top]
        word = pack.pack_codes(torch.tensor(codes, dtype=torch.int8)[None, None]).item()
        assert word == reference.pack_word(codes) and (word < 0) == (top >= 0)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**16), st.booleans())
def test_packing_and_back(experts: int, outputs: int, words: int, seed: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes_ENK = torch.randint(-8, 8, (experts, outputs, 8 * words), generator=generator, dtype=torch.int8)
    if transposed:  # the same codes, not contiguous
        codes_ENK = codes_ENK.mT.contiguous().mT
    before = codes_ENK.clone()
    words_ENW = pack.pack_codes(codes_ENK)
    assert words_ENW.shape == (experts, outputs, words) and words_ENW.dtype == torch.int32
    assert [reference.unpack_compressed_tensors(rows) for rows in words_ENW.tolist()] == codes_ENK.tolist()
    found = pack.unpack_codes(words_ENW)
    assert found.dtype == torch.int8 and torch.equal(found, codes_ENK) and torch.equal(codes_ENK, before)
    assert torch.equal(pack.unpack_codes(words_ENW.mT.contiguous().mT), codes_ENK)
    for expert in range(experts):
        theirs = pack_to_int32(codes_ENK[expert].contiguous(), 4)
        assert torch.equal(words_ENW[expert], theirs)
        assert torch.equal(unpack_from_int32(words_ENW[expert], 4, codes_ENK[expert].shape), codes_ENK[expert])


@pytest.mark.parametrize("inputs", [1, 7, 12])
def test_inputs_that_fill_no_word_are_refused(inputs: int) -> None:
    with pytest.raises(ValueError, match=f"{inputs} input features.*multiple of 8"):
        pack.pack_codes(torch.zeros(1, 2, inputs, dtype=torch.int8))
