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
"""Every value comes back bit for bit, whatever it is, and a damaged tensor is an error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.errors import CheckpointError
from hfcompress.formats.native.lossless import LEAST, packed, unpacked


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def any_bits(dtype, seed, spread):
    """Values of all kinds, NaN and infinity among them, most of them near each other."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(64, 272, generator=generator) * spread).to(dtype)
    bits = values.view(torch.uint8)
    wild = torch.rand(bits.shape, generator=generator) < 0.01
    noise = torch.randint(256, bits.shape, generator=generator, dtype=torch.uint8)
    return torch.where(wild, noise, bits).view(dtype)


@given(st.sampled_from(DTYPES), st.integers(0, 999), st.sampled_from([0.0, 1e-40, 0.02, 1.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_bits_come_back(dtype, seed, spread):
    weight = any_bits(dtype, seed, spread)
    tensors = packed(weight)
    assert len(tensors) == 4
    assert torch.equal(unpacked(tensors).view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.66), (torch.float16, 0.842), (torch.float32, 0.83)])
def test_normal_weights_take_what_their_exponents_are_worth(dtype, share):
    weight = (torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    assert sum(tensor.nbytes for tensor in packed(weight).values()) == pytest.approx(share * weight.nbytes, rel=0.01)


def test_what_gains_nothing_is_left_as_it_is():
    few = torch.zeros(1, LEAST - 1, dtype=torch.bfloat16)
    noise = torch.randint(256, (128, 512), dtype=torch.uint8).view(torch.bfloat16)
    for weight in (few, noise, torch.zeros(LEAST), torch.zeros(128, 128, dtype=torch.int64)):
        assert list(packed(weight)) == ["weight"]
        assert packed(weight)["weight"] is weight


def test_altered_tensors_are_an_error():
    tensors = packed(any_bits(torch.bfloat16, 0, 0.02))
    for local in ("weight", "weight_index", "weight_frequencies"):
        altered = tensors[local].clone().long()
        altered.view(-1)[-1] ^= 1
        with pytest.raises(CheckpointError, match="damaged"):
            unpacked({**tensors, local: altered.to(tensors[local].dtype)})
    rest = tensors["weight_bfloat16"]
    for other in (rest[:-1], rest[:, :-1], rest[0], rest.float()):
        with pytest.raises(CheckpointError, match="damaged"):
            unpacked({**tensors, "weight_bfloat16": other})
    with pytest.raises(CheckpointError, match="not stored as such"):
        unpacked({**tensors, "weight": tensors["weight"].int()})
    with pytest.raises(CheckpointError, match="damaged"):
        unpacked({local: tensor for local, tensor in tensors.items() if local != "weight_bfloat16"})
