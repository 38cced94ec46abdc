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
"""Who feeds whom: found on every architecture, exact, and whatever would change the block is left alone."""

import dataclasses

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from torch import nn

from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.folds import TOLERANCE, apply_fold, error_of, find_folds
from hfcompress.models.roles import shared_inputs
from hfcompress.models.streaming import StreamedModel


USUAL = {
    ("q_proj", "k_proj", "v_proj"): "input_layernorm",
    ("o_proj",): "v_proj",
    ("gate_proj", "up_proj"): "post_attention_layernorm",
    ("down_proj",): "up_proj",
}
EXPECTED = {
    "gemma3": USUAL | {("gate_proj", "up_proj"): "pre_feedforward_layernorm"},
    "phi3": {
        ("qkv_proj",): "input_layernorm",
        ("o_proj",): "qkv_proj",
        ("gate_up_proj",): "post_attention_layernorm",
        ("down_proj",): "gate_up_proj",
    },
    "gpt2": {("c_attn",): "ln_1", ("c_proj",): "c_attn", ("c_fc",): "ln_2"},
    "opt": {
        ("q_proj", "k_proj", "v_proj"): "self_attn_layer_norm",
        ("out_proj",): "v_proj",
        ("fc1",): "final_layer_norm",
        ("fc2",): "fc1",
    },
}


class Seen:
    """A model's block 1, and what is found there."""

    def __init__(self, model, change=None, dtype=torch.float32):
        self.streamed = StreamedModel(Checkpoint.open(model), dtype=dtype)
        self.probe = self.streamed.embed([Batch(torch.from_numpy(token_ids(4, 8)))])[0]
        self.name = self.streamed.block_names[1]
        with self.streamed.block(1) as block:
            if change is not None:
                change(block)
            self.groups = shared_inputs(self.streamed, block, 1, self.probe)
            before = {name: p.clone() for name, p in block.named_parameters()}
            self.folds, self.alone = find_folds(self.streamed, block, 1, self.probe, self.groups)
            assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
            self.errors = [error_of(self.streamed, block, 1, self.probe, fold) for fold in self.folds]

    def error(self, fold) -> float:
        with self.streamed.block(1) as block:
            return error_of(self.streamed, block, 1, self.probe, fold)


def last(name: str) -> str:
    return name.rpartition(".")[2]


def random_scales(width: int) -> torch.Tensor:
    return 4 ** (2 * torch.rand(width, generator=torch.Generator().manual_seed(7)) - 1)


def test_every_pair_is_found_and_nothing_else(any_model):
    seen = Seen(any_model)
    found = {tuple(map(last, fold.consumers)): last(fold.producer) for fold in seen.folds}
    assert found == EXPECTED.get(any_model.config.model_type.removesuffix("_text"), USUAL)
    assert max(seen.errors) < TOLERANCE / 100
    assert len(seen.folds) + len(seen.alone) == len(seen.groups)
    alone = {tuple(map(last, group)): reason for group, reason in seen.alone.items()}
    if any_model.config.model_type == "gpt2":  # behind a GELU
        assert alone == {("c_proj",): "nothing in the block makes its input channel by channel"}
    else:
        assert alone == {}


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_in_float64_the_folds_are_exact(name):
    """Where the model has no float32 of its own inside."""
    seen = Seen(make_model(CONFIGS[name](), torch.float64), dtype=torch.float64)
    assert len(seen.folds) == 3 + (name == "opt")
    assert max(seen.errors) < 1e-13


@torch.no_grad()
def test_all_folds_of_all_blocks_at_once_leave_the_logits(any_model):
    model = any_model.double()
    ids = torch.from_numpy(token_ids(3, 24))
    expected = model(input_ids=ids).logits
    streamed = StreamedModel(Checkpoint.open(model), dtype=torch.float64)
    probe = streamed.embed([Batch(ids[:, :8])])[0]
    modules = dict(model.named_modules())
    count = 0
    for index, name in enumerate(streamed.block_names):
        block = model.get_submodule(name)
        groups = shared_inputs(streamed, block, index, probe)
        for fold in find_folds(streamed, block, index, probe, groups)[0]:
            before = modules[fold.consumers[0]].weight.clone()
            changed = apply_fold(fold, modules, random_scales(fold.width))
            assert f"{fold.producer}.weight" in changed
            assert not torch.allclose(modules[fold.consumers[0]].weight, before, rtol=0.1)
            count += 1
    assert count >= 9
    off = model(input_ids=ids).logits - expected
    assert off.norm() / expected.norm() < 1e-6  # RMS norms compute in float32 whatever the model's dtype


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-mixed"])
@torch.no_grad()
def test_a_rounded_gain_costs_nothing(name):
    """The readers take the quotient of the old gain and the stored one."""
    model = make_model(CONFIGS[name]())
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    streamed = StreamedModel(Checkpoint.open(model))
    probe = streamed.embed([Batch(torch.from_numpy(token_ids(4, 8)))])[0]
    with streamed.block(1) as block:
        expected = streamed.call(block, 1, probe)
        groups = shared_inputs(streamed, block, 1, probe)
        modules = {f"{streamed.block_names[1]}.{n}": m for n, m in block.named_modules()}
        norms = [f for f in find_folds(streamed, block, 1, probe, groups)[0] if f.offset is not None]
        assert [fold.offset for fold in norms] == [1.0 if name == "gemma3" else 0.0] * 2
        for fold in norms:
            before = modules[fold.producer].weight.clone()
            apply_fold(fold, modules, random_scales(fold.width), lambda _, values: values.bfloat16())
            weight = modules[fold.producer].weight
            assert not torch.equal(weight, before)
            assert torch.equal(weight, weight.bfloat16().float())
        off = streamed.call(block, 1, probe) - expected
        assert off.norm() / (expected - probe.hidden).norm() < 1e-6


def test_a_gain_that_rounding_would_take_away_stays():
    model = make_model(CONFIGS["gemma3"]())
    seen = Seen(model)
    fold = next(f for f in seen.folds if f.offset == 1.0)
    with seen.streamed.block(1) as block:
        modules = {f"{seen.name}.{n}": m for n, m in block.named_modules()}
        modules[fold.producer].weight.data[3] = -0.998  # a gain of 0.002, and bfloat16 has no step so small near one
        before = {n: p.clone() for n, p in block.named_parameters()}
        apply_fold(fold, modules, torch.full((fold.width,), 8.0), lambda _, values: values.bfloat16())
        assert modules[fold.producer].weight[3] == before[fold.producer.removeprefix(f"{seen.name}.") + ".weight"][3]
        for name in fold.consumers:
            local = name.removeprefix(f"{seen.name}.")
            assert torch.equal(modules[name].weight[:, 3], before[f"{local}.weight"][:, 3])
            assert torch.isfinite(modules[name].weight).all()


def test_queries_of_a_group_share_their_value_channels(llama):
    fold = next(f for f in Seen(llama).folds if last(f.producer) == "v_proj")
    head_dim, per_group = 16, 2
    expected = [(head // per_group) * head_dim + d for head in range(4) for d in range(head_dim)]
    assert fold.channels.tolist() == expected
    values = torch.arange(64.0)
    heads = values.view(2, per_group, head_dim)
    assert torch.equal(fold.gathered(values, "mean"), heads.mean(1).flatten())
    assert torch.equal(fold.gathered(values, "amax"), heads.amax(1).flatten())
    assert torch.equal(fold.spread(torch.arange(32.0)), torch.tensor(expected, dtype=torch.float32))


def test_only_the_value_rows_of_a_fused_projection_are_scaled():
    seen = Seen(make_model(CONFIGS["phi3"]()))
    fold = next(f for f in seen.folds if last(f.producer) == "qkv_proj")
    assert fold.used.nonzero().flatten().tolist() == list(range(96, 128))
    with seen.streamed.block(1) as block:
        before = block.self_attn.qkv_proj.weight.clone()
        apply_fold(fold, {f"{seen.name}.{n}": m for n, m in block.named_modules()}, torch.full((128,), 2.0))
        ratio = block.self_attn.qkv_proj.weight / before
        assert torch.equal(ratio[:96], torch.ones(96, 64))
        assert torch.equal(ratio[96:], torch.full((32, 64), 0.5))


def test_channels_that_no_token_excites_are_not_scaled():
    def silence(block):
        block.fc1.bias.data[5:9] = -100.0

    seen = Seen(make_model(CONFIGS["opt"]()), silence)
    fold = next(f for f in seen.folds if last(f.producer) == "fc1")
    assert (fold.channels[5:9] == -1).all()
    assert fold.spread(torch.full((96,), 3.0))[5:9].tolist() == [1.0] * 4
    assert fold.channels[10] == 10


class AlsoReads(nn.Module):
    """An MLP whose input is read by something else too."""

    def __init__(self, mlp, other):
        super().__init__()
        self.inner, self.other = mlp, other

    def forward(self, x):
        return self.inner(x) + self.other(x)


class Halved(nn.Module):
    def forward(self, x):
        return 0.5 * x


class Elsewhere(nn.Module):
    """A linear that reads a copy: another tensor with the same values."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 64)

    def forward(self, x):
        return self.router(x.clone())


@pytest.mark.parametrize("other", [Halved, Elsewhere])
def test_a_norm_that_something_else_reads_is_left_alone(llama, other):
    seen = Seen(llama, lambda block: setattr(block, "mlp", AlsoReads(block.mlp, other())))
    assert [last(fold.producer) for fold in seen.folds] == ["input_layernorm", "v_proj", "up_proj"]
    reasons = {last(group[-1]): reason for group, reason in seen.alone.items()}
    assert set(reasons) == {"up_proj"} | ({"router"} if other is Elsewhere else set())
    for reason in reasons.values():
        assert "scaling model.layers.1.post_attention_layernorm changes the block's output by" in reason


def test_a_gain_of_another_form_is_left_alone_with_a_word(llama):
    class Squared(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight = norm.weight

        def forward(self, x):
            return x * (2.5 + self.weight)

    seen = Seen(llama, lambda block: setattr(block, "input_layernorm", Squared(block.input_layernorm)))
    [reason] = seen.alone.values()
    assert reason == "the gain of model.layers.1.input_layernorm is neither its weight nor its weight plus one"


def test_a_wrong_fold_is_seen(llama):
    """What would be moved along a wrong map, or into the wrong form of gain, changes the output."""
    seen = Seen(llama)
    for fold in seen.folds:
        rolled = dataclasses.replace(fold, channels=fold.channels.roll(1))
        assert seen.error(rolled) > 100 * TOLERANCE
        assert seen.error(dataclasses.replace(fold, consumers=fold.consumers[1:])) > 100 * TOLERANCE
    gemma = Seen(make_model(CONFIGS["gemma3"]()))
    norms = [fold for fold in gemma.folds if fold.offset is not None]
    assert len(norms) == 2
    for fold in norms:
        assert gemma.error(dataclasses.replace(fold, offset=0.0)) > 100 * TOLERANCE


def test_a_wrong_map_is_rejected_by_the_search_itself(llama, monkeypatch):
    from hfcompress.models import folds

    channels = folds.BlockTrial._channels
    monkeypatch.setattr(folds.BlockTrial, "_channels", lambda self, *rest: channels(self, *rest).roll(1))
    seen = Seen(llama)
    assert seen.folds == []
    assert len(seen.alone) == 4
    assert all("changes the block's output" in reason for reason in seen.alone.values())
