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
"""Entropy coding: the symbols come back, in as few bits as they are worth, and a damaged stream is an error."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.kernels.rans import LANES, LOWEST, PRECISION, STATES
from hfcompress.solvers.coded import MAGNITUDES, symbols_of
from hfcompress.solvers.entropy import (
    CHUNK,
    TABLES,
    TOTAL,
    Classes,
    Stream,
    bits_of,
    classes_of,
    counted,
    decode,
    encode,
    entropy,
    frequencies_of,
    index_bits,
)


def drawn(rows: int, columns: int, spread: float, seed: int = 0, most: int = 255) -> torch.Tensor:
    """Rounded normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * spread + most / 2).round().clamp(0, most).to(torch.uint8)


def any_classes(rows: int, columns: int, tables: int, seed: int = 0) -> Classes:
    generator = torch.Generator().manual_seed(seed)
    half = (tables + 1) // 2
    per_row, per_column = (torch.randint(half, (size,), generator=generator) for size in (rows, columns))
    return Classes(per_row.to(torch.uint8), per_column.to(torch.uint8))


def obvious_decode(stream: Stream) -> list[list[int]]:
    """The definition, for a stream of one chunk."""
    words, stored, tables = stream.words.tolist(), stream.frequencies.tolist(), []
    while stored:
        tables.append(stored[1 : 1 + stored[0]])
        stored = stored[1 + stored[0] :]
    states = [words[2 * lane] + (words[2 * lane + 1] << 16) for lane in range(LANES)]
    place, found = STATES, []
    for row in stream.classes.rows.tolist():
        found.append([])
        for j, column in enumerate(stream.classes.columns.tolist()):
            frequencies = tables[row + column]
            starts = [sum(frequencies[:symbol]) for symbol in range(len(frequencies))]
            x = states[j % LANES]
            slot = x % 2**PRECISION
            symbol = max(s for s in range(len(frequencies)) if frequencies[s] and starts[s] <= slot)
            x = frequencies[symbol] * (x // 2**PRECISION) + slot - starts[symbol]
            if x < LOWEST:
                x, place = (x << 16) + words[place], place + 1
            states[j % LANES] = x
            found[-1].append(symbol)
    assert place == len(words)
    assert states == [LOWEST] * LANES
    return found


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5 * LANES),
    tables=st.sampled_from([1, 2, 5]),
    spread=st.sampled_from([0.01, 0.4, 1.5, 40.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_it_is_what_the_definition_says(rows, columns, tables, spread, seed):
    symbols, classes = drawn(rows, columns, spread, seed), any_classes(rows, columns, tables, seed)
    stream = encode(symbols, classes)
    assert obvious_decode(stream) == symbols.tolist()
    assert torch.equal(decode(stream), symbols)


@pytest.mark.parametrize("shape", [(1, CHUNK - 1), (1, CHUNK + 1), (64, 1024), (65, 1024), (700, 300), (5, 40_000)])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 60.0])
def test_whole_tensors_come_back(shape, spread):
    symbols = drawn(*shape, spread)
    stream = encode(symbols, any_classes(*shape, 7))
    assert torch.equal(decode(stream), symbols)
    assert stream.index.shape == (2, math.ceil(shape[0] / max(1, CHUNK // shape[1])))
    assert 8 * stream.index.nbytes == index_bits(shape)


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (3, 4), (2, None)])
def test_a_part_is_decoded_by_itself(first, last):
    symbols, classes = drawn(200, 1024, 2.0), any_classes(200, 1024, 5)
    wanted = symbols[first * 64 : None if last is None else last * 64]
    assert torch.equal(decode(encode(symbols, classes), first=first, last=last), wanted)


@pytest.mark.parametrize(("spread", "most"), [(0.6, 7), (1.5, 15), (3.0, 31), (20.0, 255)])
def test_it_takes_less_than_one_part_in_a_hundred_above_the_entropy(spread, most):
    symbols = drawn(1000, 1000, spread, most=most)
    least = entropy(torch.bincount(symbols.flatten())) * symbols.numel() / 8
    assert least < encode(symbols).nbytes < 1.01 * least


def uneven(rows: int = 768, columns: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes whose rows and columns are spread over octaves, and how widely each is."""
    generator = torch.Generator().manual_seed(0)
    spreads = (0.6 * torch.randn(rows, 1, generator=generator)).exp()
    spreads = spreads * (0.6 * torch.randn(columns, generator=generator)).exp()
    codes = torch.randn(rows, columns, generator=generator) * spreads
    return codes.round().clamp(-127, 127).to(torch.int8), spreads


def test_rows_and_columns_of_their_own_spread_take_fewer_bits():
    """Those of a code that knows every entry's spread, but for three parts in a hundred, most of them for the tables."""
    codes, spreads = uneven()
    symbols = symbols_of(codes)
    classes = classes_of(symbols, MAGNITUDES)
    bits = bits_of(counted(symbols, classes))
    assert 8 * encode(symbols, classes).nbytes == pytest.approx(bits + index_bits(symbols.shape), rel=0.005)
    assert bits < 0.93 * bits_of(counted(symbols, Classes.single(symbols.shape)))
    edges = (torch.arange(-30, 31) + 0.5).double()
    shares = torch.distributions.Normal(0.0, 1.0).cdf(edges / spreads.double().unsqueeze(-1)).diff(dim=-1)
    least = -(shares * shares.clamp(min=1e-300).log2()).sum().item()
    assert bits < 1.03 * least


def test_the_classes_are_few_and_zeros_have_one():
    assert classes_of(symbols_of(uneven()[0]), MAGNITUDES).tables <= TABLES
    assert classes_of(torch.zeros(30, 40, dtype=torch.uint8), MAGNITUDES).tables == 1
    few = torch.zeros(30, 40, dtype=torch.uint8)
    few[3, 5] = 2  # a second table would take more than it saves
    assert classes_of(few, MAGNITUDES).tables == 1


def test_what_is_always_the_same_takes_nothing():
    assert encode(torch.full((64, 1024), 200, dtype=torch.uint8)).nbytes < 600  # a table, and where the states begin


def test_entropy_is_the_definition():
    assert entropy(torch.tensor([1, 1, 2])) == pytest.approx(1.5)
    assert entropy(torch.tensor([0, 5])) == 0


def bits(counts: torch.Tensor, frequencies: torch.Tensor) -> float:
    occurs = counts > 0
    return -(counts[occurs].double() * (frequencies[occurs].double() / TOTAL).log2()).sum().item()


@given(counts=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 10**6)), min_size=1, max_size=256))
@settings(max_examples=80, deadline=None)
def test_no_other_frequencies_take_fewer_bits(counts):
    counts = torch.tensor(counts)
    assume(counts.sum() > 0)
    found = frequencies_of(counts)
    assert found.sum() == TOTAL
    assert torch.equal(found > 0, counts > 0)
    cost = bits(counts, found)
    for gives in torch.nonzero(found > 1).flatten()[:8].tolist():  # moving one from any to any
        for takes in torch.nonzero(found > 0).flatten()[-8:].tolist():
            other = found.clone()
            other[gives] -= 1
            other[takes] += 1
            assert bits(counts, other) >= cost * (1 - 1e-9)


SYMBOLS = drawn(140, 1024, 2.0, most=15)
STREAM = encode(SYMBOLS, any_classes(140, 1024, 3), b"beside")


def with_tensor(name: str, tensor: torch.Tensor) -> Stream:
    if name in ("rows", "columns"):
        return replace(STREAM, classes=replace(STREAM.classes, **{name: tensor}))
    return replace(STREAM, **{name: tensor})


TENSORS = {
    "words": STREAM.words,
    "frequencies": STREAM.frequencies,
    "index": STREAM.index,
    "rows": STREAM.classes.rows,
    "columns": STREAM.classes.columns,
}


@given(place=st.integers(0, 10**9), bit=st.integers(0, 15))
@settings(max_examples=100, deadline=None)
def test_an_altered_bit_is_an_error(place, bit):
    name = list(TENSORS)[place % len(TENSORS)]
    tensor = TENSORS[name]
    altered = tensor.clone().long()
    altered.view(-1)[place % altered.numel()] ^= 1 << (bit % (8 * tensor.dtype.itemsize))
    with pytest.raises(CheckpointError, match="damaged; download or copy its file again"):
        decode(with_tensor(name, altered.to(tensor.dtype)), b"beside")


@pytest.mark.parametrize("cut", [1, 3, 100])
@pytest.mark.parametrize("name", TENSORS)
def test_a_stream_cut_short_is_an_error(cut, name):
    with pytest.raises(CheckpointError, match="damaged"):
        decode(with_tensor(name, TENSORS[name][..., :-cut]), b"beside")


def test_what_belongs_to_another_stream_is_an_error():
    assert torch.equal(decode(STREAM, b"beside"), SYMBOLS)
    with pytest.raises(CheckpointError, match="damaged"):
        decode(STREAM, b"besides")


@pytest.mark.parametrize("place", [0, 3, STATES, STATES + 50, -1])
def test_an_alteration_that_has_the_right_checksum_ends_otherwise_than_it_has_to(place, monkeypatch):
    stream = encode(drawn(5, 1000, 2.0))
    words = stream.words.clone()
    words[place] = int(words[place]) ^ 0x0210
    monkeypatch.setattr("hfcompress.solvers.entropy.zlib.crc32", lambda *_: int(stream.index[1, 0]))
    with pytest.raises(CheckpointError, match="damaged"):
        decode(replace(stream, words=words))


def test_nothing_cannot_be_encoded():
    with pytest.raises(InvalidValueError, match="no symbols"):
        encode(torch.empty(0, 4, dtype=torch.uint8))
