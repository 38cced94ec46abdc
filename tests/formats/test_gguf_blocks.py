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
"""GGUF's blocks: byte for byte against a slow reference, against gguf's own quantizers, and read back exactly."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.formats.gguf import blocks
from hfcompress.formats.gguf.layout import GGUF, LARGEST
from hfcompress.solvers.grid import Grid, QuantizedWeight


SMALL = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def random_weight(grid, seed, rows=3, columns=128, dtype=torch.bfloat16, exponents=(-12, 4)):
    """Random codes, zero points and scales of both signs over many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // grid.columns(columns)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (rows, columns), generator=generator).to(torch.int8)
    exponent = torch.randint(*exponents, (rows, groups), generator=generator)
    signs = torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1
    scales = signs * (1 + torch.rand(rows, groups, generator=generator)).to(dtype) * 2.0**exponent
    zeros = None
    if not grid.symmetric:
        zeros = torch.randint(grid.q_min, grid.q_max + 1, (rows, groups), generator=generator).to(torch.int8)
    return QuantizedWeight(codes, scales.to(dtype), zeros, grid)


def slow_block(kind, codes, scale, offset):
    """One block of 32 from Python integers: ggml-common.h read aloud."""
    head = struct.pack("<e", scale) + (struct.pack("<e", offset) if kind == "Q4_1" else b"")
    if kind == "Q8_0":
        return head + struct.pack("32b", *codes)
    unsigned = [code + 8 if kind == "Q4_0" else code for code in codes]
    return head + bytes(unsigned[j] | (unsigned[j + 16] << 4) for j in range(16))


def slow_pack(kind, weight):
    rows = []
    per_group = weight.grid.columns(weight.codes.shape[1])
    for row, scales in enumerate(weight.scales.float().tolist()):
        written = b""
        for start in range(0, weight.codes.shape[1], 32):
            scale, offset = scales[start // per_group], 0.0
            codes = weight.codes[row, start : start + 32].tolist()
            if kind == "Q4_1":
                offset = -scale * (int(weight.zero_points[row, start // per_group]) - weight.grid.q_min)
                codes = [code - weight.grid.q_min for code in codes]
            written += slow_block(kind, codes, scale, offset)
        rows.append(list(written))
    return np.array(rows, dtype=np.uint8)


def read(packed):
    return torch.from_numpy(gguf.dequantize(packed.data, gguf.GGMLQuantizationType[packed.type]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@SMALL
@given(seed=seeds)
def test_blocks_are_the_slow_references(bits, group_size, symmetric, seed):
    grid = Grid(bits, group_size, symmetric)
    if bits == 8 and not symmetric:
        assert blocks.block_type(grid, 128) is None
        return
    packed = blocks.pack(weight := random_weight(grid, seed))
    assert packed.type == ("Q8_0" if bits == 8 else "Q4_0" if symmetric else "Q4_1")
    np.testing.assert_array_equal(packed.data, slow_pack(packed.type, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@SMALL
@given(seed=seeds)
def test_gguf_reads_the_solved_values(bits, dtype, seed):
    weight = random_weight(Grid(bits, 32), seed, dtype=dtype)
    assert blocks.is_exact(weight) == (True, True)
    assert torch.equal(read(blocks.pack(weight)), weight.dequantize())


@SMALL
@given(seed=seeds)
def test_an_offset_is_exact_or_said_not_to_be(seed):
    """Scales of 4 significant bits have offsets of 8; with 8 bits the product may need 12, one more than float16 has."""
    weight = random_weight(Grid(4, 32, symmetric=False), seed)
    short = (weight.scales.view(torch.int16) & ~0xF).view(torch.bfloat16)
    exact = QuantizedWeight(weight.codes, short, weight.zero_points, weight.grid)
    assert blocks.is_exact(exact) == (True, True)
    assert torch.equal(read(blocks.pack(exact)), exact.dequantize())
    held, same = blocks.is_exact(weight)
    difference = read(blocks.pack(weight)) - weight.dequantize()
    assert held
    assert same == bool((difference == 0).all())
    step = weight.scales.float().abs().repeat_interleave(32, dim=1)
    assert (difference.abs() <= step * 15 * 2.0**-11).all()  # half a unit of the offset's last place


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@SMALL
@given(seed=seeds)
def test_the_packing_is_that_of_ggufs_quantizer(kind, seed):
    """Their bytes, taken apart into codes and scales, and packed here, are the same bytes again."""
    values = np.random.default_rng(seed).normal(size=(4, 96)).astype(np.float32)
    theirs = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    apart = theirs.reshape(4, 3, -1)
    scales = np.ascontiguousarray(apart[..., :2]).view("<f2")[..., 0]
    body = apart[..., 2:]
    if kind == "Q4_0":
        codes = (np.concatenate([body & 15, body >> 4], axis=-1).astype(np.int8) - 8).reshape(4, 96)
        np.testing.assert_array_equal(blocks.pack_q4_0(codes, scales), theirs)
    else:
        np.testing.assert_array_equal(blocks.pack_q8_0(body.view(np.int8).reshape(4, 96), scales), theirs)


def test_the_packing_of_q4_1_is_that_of_ggufs_quantizer():
    values = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    theirs = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    apart = theirs.reshape(5, 2, 20)
    scales, offsets = (np.ascontiguousarray(apart[..., i : i + 2]).view("<f2")[..., 0] for i in (0, 2))
    codes = np.concatenate([apart[..., 4:] & 15, apart[..., 4:] >> 4], axis=-1).reshape(5, 64)
    np.testing.assert_array_equal(blocks.pack_q4_1(codes, scales, offsets), theirs)


@pytest.mark.parametrize(
    ("grid", "width", "kind"),
    [
        (Grid(4, 32), 64, "Q4_0"),
        (Grid(2, 128), 128, "Q4_0"),
        (Grid(4, -1), 96, "Q4_0"),
        (Grid(8, 64), 64, "Q8_0"),
        (Grid(5, 64), 64, "Q8_0"),
        (Grid(4, 32, symmetric=False), 64, "Q4_1"),
        (Grid(8, 32, symmetric=False), 64, None),
        (Grid(4, -1), 80, None),
        (Grid(4, 16), 64, None),
    ],
)
def test_which_type_holds_which_grid(grid, width, kind):
    assert blocks.block_type(grid, width) == kind


def test_scales_that_float16_does_not_hold_are_noticed():
    codes = torch.ones(1, 32, dtype=torch.int8)

    def fits(scale, dtype=torch.bfloat16):
        return blocks.is_exact(QuantizedWeight(codes, torch.tensor([[scale]], dtype=dtype), None, Grid(4, 32)))

    assert fits(2.0**-24) == (True, True)
    assert fits(2.0**-25) == (True, False)
    assert fits(255 * 2.0**-25) == (True, False)  # an odd multiple of half of float16's least step
    assert fits(2.0**17) == (False, False)
    assert fits(0.1, torch.float32) == (True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@SMALL
@given(seed=seeds)
def test_the_layouts_scales_are_held_by_both(bits, dtype, seed):
    exponents = (-23, 15) if dtype == torch.float16 else (-40, 20)
    weight = random_weight(Grid(bits, 32), seed, dtype=dtype, exponents=exponents)
    layout = GGUF()
    packed = layout.pack(weight)
    values = layout.values(weight)
    kept = layout.unpack(packed, weight.grid)
    assert kept.scales.dtype == dtype
    assert (kept.scales != 0).all()
    assert torch.equal(kept.dequantize(), values)
    assert blocks.is_exact(kept) == (True, True)
    assert torch.equal(read(blocks.pack(kept)), values)
    groups = weight.scales.float().abs().repeat_interleave(32, dim=1)
    moved = (values - weight.dequantize()).abs()
    inside = groups <= LARGEST
    step = torch.maximum(groups * 2.0**-11, torch.tensor(2.0**-24)) * 2 ** (bits - 1)  # half of it, or a bit more
    assert (moved <= step)[inside].all()
    if dtype == torch.bfloat16:
        assert (moved == 0)[inside & (groups >= 2.0**-17)].all()
