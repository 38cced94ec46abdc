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
"""Law 1: what is calibrated is what runs."""

import pytest
import torch
from conftest import VOCABULARY, token_ids

from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import find_linears, shared_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.statistics import Statistics


def streamed_logits(model, batch: Batch) -> torch.Tensor:
    streamed = StreamedModel(Checkpoint.open(model))
    [stream] = streamed.forward_blocks(streamed.embed([batch]))
    with streamed.outside(head=True) as outside:
        return streamed.logits(outside, stream)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_pass_with_no_steps_gives_the_models_own_logits(any_model, padded):
    ids = torch.from_numpy(token_ids(4, 24))
    mask = torch.ones(4, 24, dtype=torch.bool)
    if padded:
        mask[1, :5] = mask[2, :11] = False
    expected = any_model(input_ids=ids, attention_mask=mask.long() if padded else None).logits
    found = streamed_logits(any_model, Batch(ids, mask if padded else None))
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_folder_streams_like_the_model_in_memory(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    ids = torch.from_numpy(token_ids(2, 20))
    torch.testing.assert_close(
        streamed_logits(tmp_path, Batch(ids)), any_model(input_ids=ids).logits, rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_calibration_is_causal(any_model):
    """Changing the last token changes no earlier input of any linear."""
    streamed = StreamedModel(Checkpoint.open(any_model))
    ids = torch.from_numpy(token_ids(2, 24))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    streams = streamed.embed([Batch(ids), Batch(changed)])
    for index in range(len(streamed)):
        with streamed.block(index) as block:
            outputs = [streamed.call(block, index, stream) for stream in streams]
        assert torch.equal(outputs[0][:, :-1], outputs[1][:, :-1])
        assert not torch.equal(outputs[0][:, -1], outputs[1][:, -1])
        streams = [s.advanced(o) for s, o in zip(streams, outputs, strict=True)]


@torch.no_grad()
def test_layers_with_different_masks_each_get_their_own(any_model):
    config = any_model.config
    kinds = getattr(config, "layer_types", None)
    if not kinds or len(set(kinds)) < 2:
        pytest.skip("all layers of this model have one mask")
    streamed = StreamedModel(Checkpoint.open(any_model))
    [stream] = streamed.embed([Batch(torch.from_numpy(token_ids(1, 24)))])
    masks = [kwargs["attention_mask"] for _, kwargs in stream.calls]
    sliding = masks[kinds.index("sliding_attention")]
    full = masks[kinds.index("full_attention")]
    assert sliding is not None
    assert full is None or not torch.equal(full, sliding)
    assert not sliding[0, 0, -1, 0]  # the first token is beyond the window of the last


@torch.no_grad()
def test_padding_never_enters_a_statistic(llama):
    """What stands on padding is of no consequence for the Gram matrix."""
    streamed = StreamedModel(Checkpoint.open(llama))
    ids = torch.from_numpy(token_ids(3, 20))
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :7] = mask[2, :3] = False
    other = torch.where(mask, ids, (ids + 1) % VOCABULARY)
    grams = []
    for given in (ids, other):
        [stream] = streamed.embed([Batch(given, mask)])
        statistics = Statistics(llama.config.hidden_size, torch.device("cpu"))
        with streamed.block(0) as block:
            inputs = []
            handle = block.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, seen=inputs: seen.append(args[0])
            )
            streamed.call(block, 0, stream)
            handle.remove()
        statistics.add(inputs[0], mask)
        grams.append(statistics.gram)
        assert statistics.tokens == int(mask.sum()) == 50
    torch.testing.assert_close(grams[0], grams[1], rtol=1e-6, atol=1e-7)


def test_linears_that_share_an_input_are_found(any_model):
    streamed = StreamedModel(Checkpoint.open(any_model))
    probe = streamed.probe()
    with streamed.block(1) as block:
        groups = shared_inputs(streamed, block, 1, probe)
        names = find_linears(block, streamed.block_names[1])
    found = [[name.rpartition(".")[2] for name in group] for group in groups]
    expected = {
        "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
        "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
        "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    }
    usual = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert found == expected.get(any_model.config.model_type, usual)
    assert sorted(n for g in groups for n in g) == sorted(names)
