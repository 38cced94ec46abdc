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
"""Experts with linears of their own: the model's own function, and who is told what."""

import copy

import pytest
import torch
from conftest import MIXTURES, VOCABULARY, make_model, token_ids
from transformers import DbrxConfig, JetMoeConfig, LlamaConfig

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.experts import ExpertLinear, Routed, find_experts, find_routers, take_apart
from hfcompress.models.roles import find_linears, shared_inputs, watch_inputs
from hfcompress.models.streaming import StreamedModel


def logits_of(streamed: StreamedModel, batch: Batch) -> torch.Tensor:
    [stream] = streamed.forward_blocks(streamed.embed([batch]))
    with streamed.outside(head=True) as outside:
        return streamed.logits(outside, stream)


def biased(model, expert: int = 0, bias: float = -10.0):
    """A DeepSeek-V3 to one of whose experts no token is sent."""
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[expert] = bias
    return model


@pytest.mark.parametrize("saved", [False, True])
@torch.no_grad()
def test_a_mixture_streams_like_plain_transformers(any_mixture, tmp_path, saved):
    ids = torch.from_numpy(token_ids(4, 24))
    mask = torch.ones(4, 24, dtype=torch.bool)
    mask[1, :5] = mask[2, :11] = False
    expected = any_mixture(input_ids=ids, attention_mask=mask.long()).logits
    if saved:
        any_mixture.save_pretrained(tmp_path)
    streamed = StreamedModel(Checkpoint.open(tmp_path if saved else any_mixture))
    torch.testing.assert_close(logits_of(streamed, Batch(ids, mask))[mask], expected[mask], rtol=0, atol=1e-5)
    assert not streamed.converts  # every matrix has a parameter of its own


@torch.no_grad()
def test_what_corrects_the_routing_is_read_too():
    model = biased(make_model(MIXTURES["deepseek-v3"]()))
    ids = torch.from_numpy(token_ids(2, 24))
    found = logits_of(StreamedModel(Checkpoint.open(model)), Batch(ids))
    torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_changing_the_last_token_changes_nothing_earlier_that_an_expert_is_given(any_mixture):
    streamed = StreamedModel(Checkpoint.open(any_mixture))
    ids = torch.from_numpy(token_ids(2, 24))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    seen: list[dict[str, Routed]] = []
    for tokens in (ids, changed):
        [stream] = streamed.embed([Batch(tokens)])
        given = {}
        for index, name in enumerate(streamed.block_names):
            with streamed.block(index) as block:
                experts = {n: m for n, m in find_linears(block, name).items() if isinstance(m, ExpertLinear)}
                with watch_inputs(experts, lambda n, x, given=given: given.__setitem__(n, x.sent)):
                    stream = stream.advanced(streamed.call(block, index, stream))
        seen.append(given)
    assert len(seen[0]) >= 24
    for name, before in seen[0].items():
        after = seen[1][name]
        early = [routed.tokens % 24 < 23 for routed in (before, after)]
        assert torch.equal(before.tokens[early[0]], after.tokens[early[1]])
        torch.testing.assert_close(before.inputs[early[0]], after.inputs[early[1]], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_watched_expert_is_told_its_tokens_its_gates_and_a_sample_of_the_others():
    model = make_model(MIXTURES["mixtral"]())
    streamed = StreamedModel(Checkpoint.open(model))
    ids = torch.from_numpy(token_ids(2, 128))
    [stream] = streamed.embed([Batch(ids)])
    routed: dict[str, Routed] = {}
    routing = []
    with streamed.block(0) as block:
        plain = streamed.call(block, 0, stream)
        handle = block.mlp.gate.register_forward_hook(lambda module, args, output: routing.append((args[0], output)))
        experts = {n: m for n, m in find_linears(block, "model.layers.0").items() if isinstance(m, ExpertLinear)}
        with watch_inputs(experts, routed.__setitem__):
            watched = streamed.call(block, 0, stream)
        handle.remove()
    assert torch.equal(plain, watched)  # being looked at changes nothing
    hidden, (_, weights, chosen) = routing[0]
    hidden = hidden.reshape(-1, 64)
    for number in range(4):
        given = routed[f"model.layers.0.mlp.experts.{number}.w1"]
        tokens, place = (chosen == number).nonzero(as_tuple=True)
        assert torch.equal(given.sent.tokens, tokens)
        assert torch.equal(given.sent.gates, weights[tokens, place])
        assert torch.equal(given.sent.inputs, hidden[tokens])
        shown = torch.arange(256)[torch.arange(256) % 128 % 2 == number % 2]
        assert torch.equal(given.beside, hidden[shown])
        assert given.total == 256
        assert routed[f"model.layers.0.mlp.experts.{number}.w3"].inputs is given.inputs  # one Gram matrix for both


@torch.no_grad()
def test_what_an_expert_is_shown_does_not_depend_on_how_many_rows_go_together():
    streamed = StreamedModel(Checkpoint.open(make_model(MIXTURES["mixtral"]())))
    ids = torch.from_numpy(token_ids(3, 200))
    shown, ways = [], [streamed.embed(batches) for batches in ([Batch(ids)], Batch(ids).split(1))]
    with streamed.block(0) as block:
        linear = block.get_submodule("mlp.experts.1.w1")
        for streams in ways:
            found: list[torch.Tensor] = []
            for stream in streams:
                with watch_inputs({"": linear}, lambda _, given, found=found: found.append(given.beside)):
                    streamed.call(block, 0, stream)
            shown.append(torch.cat(found))
    torch.testing.assert_close(*shown)
    assert len(shown[0]) > 100


@torch.no_grad()
def test_gate_and_up_of_an_expert_share_an_input_and_no_other_does(any_mixture):
    streamed = StreamedModel(Checkpoint.open(any_mixture))
    probe = streamed.probe()
    with streamed.block(2) as block:
        groups = shared_inputs(streamed, block, 2, probe)
        experts = [name for name, m in find_linears(block, "model.layers.2").items() if isinstance(m, ExpertLinear)]
    of_experts = [group for group in groups if group[0] in experts]
    assert sorted(name for group in of_experts for name in group) == sorted(experts)
    assert sorted(map(len, of_experts)) == [1] * (len(experts) // 3) + [2] * (len(experts) // 3)
    assert all(len({name.rpartition(".")[0] for name in group}) == 1 for group in of_experts)


def test_who_decides_where_tokens_go_is_found():
    found = {
        name: find_routers(StreamedModel(Checkpoint.open(make_model(c()))).skeleton) for name, c in MIXTURES.items()
    }
    gates = [f"model.layers.{index}.mlp.gate" for index in range(3)]
    assert found["mixtral"] == found["olmoe"] == gates
    assert found["qwen3-moe"] == [gates[0], gates[2]]
    assert found["deepseek-v3"] == gates[1:]
    assert sorted(found["qwen2-moe"]) == sorted(gates + [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(3)])


def test_a_copy_of_a_block_has_experts_of_its_own():
    streamed = StreamedModel(Checkpoint.open(make_model(MIXTURES["mixtral"]())))
    probe = streamed.probe()
    with streamed.block(0) as block:
        twin = copy.deepcopy(block)
        before = streamed.call(twin, 0, probe)
        block.get_submodule("mlp.experts.0.w1").weight.data.zero_()
        assert torch.equal(streamed.call(twin, 0, probe), before)


def test_experts_in_a_form_of_their_own_are_refused():
    config = JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16, intermediate_size=32,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(
        UnsupportedModelError, match=r"has 4 experts per block \(num_local_experts\) in a form of its own"
    ):
        StreamedModel(Checkpoint.open(make_model(config)))


def test_experts_whose_matrices_lie_behind_one_another_are_refused():
    config = DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=128, rope_theta=10000.0,
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
    )  # fmt: skip
    with pytest.raises(
        UnsupportedModelError, match=r"in one parameter \(transformer\.blocks\.0\.ffn\.experts\.mlp\.w1\)"
    ):
        StreamedModel(Checkpoint.open(make_model(config)))


def test_a_dense_model_has_nothing_to_take_apart():
    model = make_model(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    before = [name for name, _ in model.named_parameters()]
    take_apart(model, [])
    assert [name for name, _ in model.named_parameters()] == before
    assert find_experts(model) == {}
    assert find_routers(model) == []
