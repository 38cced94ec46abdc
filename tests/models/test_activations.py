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
"""Activations rounded as compressed-tensors does it, block by block."""

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids

from hfcompress.formats.compressed_tensors import CompressedTensors
from hfcompress.models.activations import (
    dense_twin,
    find_attentions,
    rounded_input,
    rounds_caches,
    set_scales,
    unrounded,
)
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.solvers.grid import Grid


def make_streamed(llama, activations="dynamic", kv_cache=None):
    streamed = StreamedModel(Checkpoint.open(llama))
    grids = {"every linear": Grid(8, activations=activations)}
    streamed.will_round_activations(CompressedTensors().quantization_config(grids, ["lm_head"], kv_cache))
    return streamed, streamed.embed([Batch(torch.from_numpy(token_ids(2, 12)))])[0]


@torch.no_grad()
def test_a_block_waits_for_its_scales_and_then_rounds(llama):
    """Only when the last scale is there does everything round; until then the block is the dense one."""
    plain = StreamedModel(Checkpoint.open(llama))
    streamed, stream = make_streamed(llama, "static", "int")
    with plain.block(0) as dense, streamed.block(0) as block:
        expected = plain.call(dense, 0, stream)
        assert torch.equal(streamed.call(block, 0, stream), expected)
        set_scales(block.mlp.down_proj, {"input_scale": torch.tensor([0.01])})
        first = streamed.call(block, 0, stream)
        scales = {"k_scale": torch.tensor([0.05]), "v_scale": torch.tensor([0.05])}
        set_scales(block.self_attn, scales)
        second = streamed.call(block, 0, stream)
        assert not torch.equal(first, expected)
        assert not torch.equal(second, first)
        with unrounded(block):
            assert torch.equal(streamed.call(block, 0, stream), expected)
        assert torch.equal(streamed.call(block, 0, stream), second)


@torch.no_grad()
def test_the_dense_twin_stays_dense_and_its_cache_is_its_own(llama):
    streamed, stream = make_streamed(llama, "dynamic", "float")
    plain = StreamedModel(Checkpoint.open(llama))
    with plain.block(0) as dense, streamed.block(0) as block:
        twin = dense_twin(block)
        set_scales(block.self_attn, {"k_scale": torch.tensor([0.05]), "v_scale": torch.tensor([0.05])})
        expected = plain.call(dense, 0, stream)
        assert torch.equal(streamed.call(twin, 0, stream), expected)
        assert not torch.equal(streamed.call(block, 0, stream), expected)


@torch.no_grad()
def test_the_rounded_input_is_what_the_linear_multiplies(llama):
    streamed, stream = make_streamed(llama)
    with streamed.block(0) as block:
        linear, inputs = block.mlp.gate_proj, stream.hidden
        rounded = rounded_input(linear, inputs)
        scale = inputs.abs().amax(-1, keepdim=True) / 127.5
        torch.testing.assert_close(rounded, (inputs / scale).round().clamp(-128, 127) * scale, rtol=1e-6, atol=1e-6)
        assert torch.equal(linear(inputs), torch.nn.functional.linear(rounded, linear.weight))
        with unrounded(block):
            assert rounded_input(linear, inputs) is inputs


@pytest.mark.parametrize(
    ("name", "heads", "known"), [("llama", 3, True), ("phi3", 3, True), ("opt", 3, False), ("gpt2", 0, True)]
)
def test_whose_caches_can_be_rounded(name, heads, known):
    model = make_model(CONFIGS[name]())
    assert len(find_attentions(model, "")) == heads
    assert rounds_caches(model) == known or heads == 0
