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
"""Linears on torch's integer kernels: against the unpacked weight, in float64, for few tokens and for many."""

from pathlib import Path

import pytest
import torch
from conftest import in_fresh_process
from torch import nn

from hfcompress.formats import get_format
from hfcompress.runtime import integer_linear
from hfcompress.runtime.integer_linear import (
    FEW,
    Int4Linear,
    Int8Linear,
    RoundingInt8Linear,
    kind_of,
    tile_of_kernel,
    width_of,
)
from hfcompress.solvers.grid import Grid, QuantizedWeight


pytestmark = pytest.mark.skipif(tile_of_kernel() is None, reason="torch has no such kernel on this CPU")
PACKED = get_format("compressed-tensors").of(Grid(4))


def quantized(bits: int, group_size: int, symmetric: bool, rows: int, columns: int = 256) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits * rows + group_size)
    half, groups = 2 ** (bits - 1), 1 if group_size == -1 else columns // group_size
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5) * torch.randn(rows, 1, generator=generator).sign()
    zeros = None if symmetric else torch.randint(-half, half, (rows, groups), generator=generator).to(torch.int8)
    return QuantizedWeight(codes, scales.half(), zeros, Grid(bits, group_size, symmetric))


def inputs(tokens: int, columns: int = 256):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)


def relative(found, wanted) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


CASES = [
    (Int4Linear, 4, 32, True, 64),
    (Int4Linear, 4, 64, False, 48),
    (Int4Linear, 4, -1, True, 200),
    (Int4Linear, 4, -1, False, 1),
    (Int4Linear, 3, 128, True, 130),
    (Int4Linear, 2, 64, False, 64),
    (Int8Linear, 8, -1, True, 130),
]


@pytest.mark.parametrize(("kind", "bits", "group_size", "symmetric", "rows"), CASES)
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_are_those_of_the_unpacked_weight(kind, bits, group_size, symmetric, rows, biased, monkeypatch):
    monkeypatch.setattr(integer_linear, "CHUNK", 64 * 256)  # several parts
    weight = quantized(bits, group_size, symmetric, rows)
    bias = nn.Parameter(torch.randn(rows)) if biased else None
    linear = kind(weight, PACKED, bias)
    dense = weight.dequantize().double()
    assert torch.equal(linear.weight.double(), dense)
    for tokens, most in ((1, 0.006), (FEW, 0.006), (FEW + 1, 0.003), (200, 0.003)):
        given = inputs(tokens)
        wanted = given.double() @ dense.T + (0 if bias is None else bias.detach().double())
        found = linear(given)
        assert found.dtype == torch.bfloat16
        assert relative(found, wanted) < most
    exact = linear(inputs(200).float())
    assert relative(exact, inputs(200).double() @ dense.T + (0 if bias is None else bias.detach().double())) < 1e-6
    batched = inputs(12).view(2, 6, 256)
    assert torch.equal(linear(batched).view(12, rows), linear(batched.view(12, 256)))


@pytest.mark.parametrize("kind", [Int4Linear, Int8Linear, RoundingInt8Linear])
def test_elsewhere_it_is_unpacked(kind):
    linear = kind(quantized(4 if kind is Int4Linear else 8, -1, True, 64), PACKED, None).to("meta")
    found = linear(torch.empty(3, 256, dtype=torch.float16, device="meta"))
    assert (found.shape, found.dtype) == ((3, 64), torch.float16)


def test_what_is_no_number_stays_none():
    """Where inputs are rounded to integers, which have no such thing."""
    weight = QuantizedWeight(torch.ones(8, 32, dtype=torch.int8), torch.ones(8, 1), None, Grid(8))
    values = torch.ones(3, 32)
    values[0, 3], values[1, 4] = float("nan"), float("inf")
    found = RoundingInt8Linear(weight, get_format("int-quantized"), None)(values)
    assert found[:2].isnan().all()
    assert (found[2] - 32).abs().max() < 0.3  # half a step of every input at most


@pytest.mark.parametrize(("kind", "bits", "group_size", "symmetric", "rows"), [case for case in CASES if case[4] > 1])
def test_what_is_stored_comes_back_bit_by_bit(kind, bits, group_size, symmetric, rows):
    weight = quantized(bits, group_size, symmetric, rows)
    linear = kind(weight, PACKED, None)
    wanted, found = PACKED.pack(weight), linear.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_kernels_are_chosen_where_torch_has_them(monkeypatch):
    class Stored:
        def __init__(self, grid, shape=(64, 256)):
            self.grid, self.shape = grid, shape

    cpu, bfloat16 = torch.device("cpu"), torch.bfloat16
    assert kind_of(Stored(Grid(4, 64)), cpu, bfloat16) is Int4Linear
    assert kind_of(Stored(Grid(3, -1)), cpu, bfloat16) is Int4Linear
    assert kind_of(Stored(Grid(8)), cpu, bfloat16) is Int8Linear
    for grid in (Grid(4, 16), Grid(8, 64), Grid(8, symmetric=False), Grid(8, type="float"), Grid(8, type="coded")):
        assert kind_of(Stored(grid), cpu, bfloat16) is None
    assert kind_of(Stored(Grid(4, 64)), cpu, torch.float32) is None
    assert kind_of(Stored(Grid(4, 64)), torch.device("cuda"), bfloat16) is None
    assert [width_of(Grid(4, group), 768) for group in (-1, 384, 256, 96, 48)] == [256, 128, 256, 32, None]
    monkeypatch.setattr(integer_linear, "tile_of_kernel", lambda: None)  # another CPU
    assert kind_of(Stored(Grid(4, 64)), cpu, bfloat16) is None


AS_ELSEWHERE = """
import json, sys, torch
sys.path[:0] = sys.argv[1:]
from test_integer_linear import PACKED, inputs, quantized, relative
from hfcompress.runtime.integer_linear import Int4Linear, tile_of_kernel
weight = quantized(4, 64, False, 130)
linear, dense = Int4Linear(weight, PACKED, None), weight.dequantize().double()
errors = [relative(linear(inputs(n)), inputs(n).double() @ dense.T) for n in (1, 24, 200)]
found, wanted = linear.state_dict(), PACKED.pack(weight)
print(json.dumps([tile_of_kernel(), *errors, all(torch.equal(found[name], wanted[name]) for name in wanted)]))
"""


def test_it_is_the_same_on_a_cpu_with_avx2_alone(monkeypatch):
    """Torch packs other rows together there."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    tile, *errors, same = in_fresh_process(AS_ELSEWHERE, *map(str, Path(__file__).parents[:2]))
    assert tile == 32
    assert max(errors) < 0.006
    assert same


PRODUCTS = """
import json, torch
from hfcompress.runtime.integer_linear import multiplies_exactly
worst = torch.full((2, 64), -128, dtype=torch.int8)
right = all(
    torch.equal(torch._int_mm(torch.full_like(worst, value), worst.T), torch.full((2, 2), -128 * value * 64, dtype=torch.int32))
    for value in (-128, -1, 1, 127)
)
print(json.dumps({"said": multiplies_exactly(), "right": right}))
"""


@pytest.mark.parametrize("instructions", [None, "AVX2", "AVX512_CORE"])
def test_integers_are_multiplied_only_where_that_is_right(instructions, monkeypatch):
    """Older instructions are asked for by oneDNN's own switch."""
    if instructions is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", instructions)
    found = in_fresh_process(PRODUCTS)
    assert found["right"] or not found["said"]
