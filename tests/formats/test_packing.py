# Copyright 2026 The hfcompress authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Dense packing into 32-bit words, bit for bit as compressed-tensors does it."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfcompress.formats.packing import pack, unpack


def make_codes(rows, columns, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 5), columns=st.integers(1, 140), bits=st.integers(1, 8), seed=st.integers(0, 2**31))
@example(rows=1, columns=1, bits=1, seed=0)
@example(rows=2, columns=31, bits=3, seed=0)
@example(rows=2, columns=33, bits=3, seed=0)
@example(rows=2, columns=11, bits=3, seed=1)
@example(rows=3, columns=100, bits=5, seed=0)
@example(rows=3, columns=64, bits=8, seed=0)
def test_words_are_those_of_compressed_tensors_and_both_read_both(rows, columns, bits, seed):
    codes = make_codes(rows, columns, bits, seed)
    packed = pack(codes, bits)
    theirs = pack_to_int32(codes, bits)
    assert packed.dtype == theirs.dtype == torch.int32
    assert torch.equal(packed, theirs)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_at_its_extremes(bits):
    half = 2 ** (bits - 1)
    for columns in (1, 7, 31, 32, 33, 65):
        least = torch.full((2, columns), -half, dtype=torch.int8)
        greatest = torch.full((2, columns), half - 1, dtype=torch.int8)
        assert pack(least, bits).eq(0).all()  # stored as code + half
        for codes in (least, greatest):
            packed = pack(codes, bits)
            assert torch.equal(packed, pack_to_int32(codes, bits))
            assert torch.equal(unpack(packed, bits, columns), codes)


def test_least_significant_bits_come_first():
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0xF6543210 - 2**32]]


def test_a_code_of_three_bits_crosses_into_the_next_word():
    codes = torch.full((1, 12), -4, dtype=torch.int8)
    codes[0, 10] = 3  # bits 30 to 32
    assert pack(codes, 3).tolist() == [[0xC0000000 - 2**32, 1]]


def test_padding_at_the_end_of_a_row_is_zero_bits():
    codes = torch.full((1, 3), 7, dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0x00000FFF]]


def test_result_and_input_share_nothing():
    codes = make_codes(2, 64, 8, 0)
    before = codes.clone()
    packed = pack(codes, 8)
    unpacked = unpack(packed, 8, 64)
    unpacked.zero_()
    assert torch.equal(codes, before)
    assert torch.equal(unpack(packed, 8, 64), before)


def test_columns_of_a_transposed_tensor_pack_as_its_copy_does():
    codes = make_codes(40, 3, 4, 0)
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
    packed = pack(codes, 4)
    assert torch.equal(unpack(packed.T.contiguous().T, 4, 3), codes)
