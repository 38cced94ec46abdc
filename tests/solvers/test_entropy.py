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
from hfcompress.solvers.entropy import CHUNK, TOTAL, Stream, decode, encode, entropy, frequencies_of


def drawn(count: int, spread: float, seed: int = 0, most: int = 255) -> torch.Tensor:
    """Rounded normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * spread + most / 2).round().clamp(0, most).to(torch.uint8)


def obvious_decode(stream: Stream) -> list[int]:
    """The definition, for a stream of one chunk."""
    words, frequencies = stream.words.tolist(), stream.frequencies.tolist()
    starts = [sum(frequencies[:symbol]) for symbol in range(len(frequencies))]
    states = [words[2 * lane] + (words[2 * lane + 1] << 16) for lane in range(LANES)]
    place, found = STATES, []
    for i in range(stream.count):
        x = states[i % LANES]
        slot = x % 2**PRECISION
        symbol = max(s for s in range(len(frequencies)) if frequencies[s] and starts[s] <= slot)
        x = frequencies[symbol] * (x // 2**PRECISION) + slot - starts[symbol]
        if x < LOWEST:
            x, place = (x << 16) + words[place], place + 1
        states[i % LANES] = x
        found.append(symbol)
    assert place == len(words)
    assert states == [LOWEST] * LANES
    return found


@given(count=st.integers(1, 3 * LANES * 9), spread=st.sampled_from([0.01, 0.4, 1.5, 40.0]), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_it_is_what_the_definition_says(count, spread, seed):
    symbols = drawn(count, spread, seed)
    stream = encode(symbols)
    assert obvious_decode(stream) == symbols.tolist()
    assert torch.equal(decode(stream), symbols)


@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 12345])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 60.0])
def test_whole_tensors_come_back(count, spread):
    symbols = drawn(count, spread)
    stream = encode(symbols)
    assert torch.equal(decode(stream), symbols)
    assert stream.index.shape == (2, math.ceil(count / CHUNK))


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (3, 4), (2, None)])
def test_a_part_is_decoded_by_itself(first, last):
    symbols = drawn(3 * CHUNK + 500, 2.0)
    wanted = symbols[first * CHUNK : None if last is None else last * CHUNK]
    assert torch.equal(decode(encode(symbols), first, last), wanted)


@pytest.mark.parametrize(("spread", "most"), [(0.6, 7), (1.5, 15), (3.0, 31), (20.0, 255)])
def test_it_takes_less_than_one_part_in_a_hundred_above_the_entropy(spread, most):
    symbols = drawn(1_000_000, spread, most=most)
    least = entropy(torch.bincount(symbols)) * len(symbols) / 8
    assert least < encode(symbols).nbytes < 1.01 * least


def test_what_is_always_the_same_takes_nothing():
    assert encode(torch.full((CHUNK,), 200, dtype=torch.uint8)).nbytes < 600  # a table, and where the states begin


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


@given(place=st.integers(0, 10**9), bit=st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_an_altered_bit_is_an_error(place, bit):
    stream = encode(drawn(2 * CHUNK + 99, 2.0, most=15))
    tensors = {"words": stream.words, "frequencies": stream.frequencies, "index": stream.index}
    name = list(tensors)[place % 3]
    altered = tensors[name].clone().long()
    altered.view(-1)[place % altered.numel()] ^= 1 << bit
    with pytest.raises(CheckpointError, match="damaged; download or copy its file again"):
        decode(replace(stream, **{name: altered.to(tensors[name].dtype)}))


@pytest.mark.parametrize("cut", [1, 7, 5000])
@pytest.mark.parametrize("name", ["words", "frequencies", "index", "count"])
def test_a_stream_cut_short_is_an_error(cut, name):
    stream = encode(drawn(2 * CHUNK + 5001, 2.0))
    shorter = stream.count - cut if name == "count" else getattr(stream, name)[..., :-cut]
    with pytest.raises(CheckpointError, match="damaged"):
        decode(replace(stream, **{name: shorter}))


@pytest.mark.parametrize("place", [0, 3, STATES, STATES + 50, -1])
def test_an_alteration_that_has_the_right_checksum_ends_otherwise_than_it_has_to(place, monkeypatch):
    stream = encode(drawn(5000, 2.0))
    words = stream.words.clone()
    words[place] = int(words[place]) ^ 0x0210
    monkeypatch.setattr("hfcompress.solvers.entropy._checksum", lambda *_: int(stream.index[1, 0]))
    with pytest.raises(CheckpointError, match="damaged"):
        decode(replace(stream, words=words))


def test_nothing_cannot_be_encoded():
    with pytest.raises(InvalidValueError, match="no symbols"):
        encode(torch.empty(0, dtype=torch.uint8))
