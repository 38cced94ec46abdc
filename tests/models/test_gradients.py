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
"""The streamed backward pass against the whole model's own, and against the curvature that it stands for."""

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids

from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.gradients import GradientCovariances, SquaredGradients
from hfcompress.models.roles import find_linears, linear_shape
from hfcompress.models.streaming import StreamedModel


def whole_model(model, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
    """The gradients `(tokens, out_features)` by one backward pass through the whole model in float64."""
    linears = {n.removeprefix("."): m for n, m in find_linears(model, "").items()}
    outputs = {}
    handles = [
        module.register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output}))
        for name, module in linears.items()
    ]
    mask = {} if batch.mask is None else {"attention_mask": batch.mask.long()}
    log_probs = model(input_ids=batch.input_ids, use_cache=False, **mask).logits.log_softmax(-1)
    likelihood = 0
    for row, own in enumerate(log_probs[:, :-1]):
        own = own if batch.mask is None else own[batch.mask[row, 1:]]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
        labels = torch.multinomial(own.detach().float().exp(), 1, generator=generator)
        likelihood = likelihood + own.gather(1, labels).sum()
    gradients = torch.autograd.grad(likelihood, list(outputs.values()))
    for handle in handles:
        handle.remove()
    return {name: g.flatten(0, -2) for name, g in zip(outputs, gradients, strict=True)}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_streamed_gradients_are_the_whole_models(name):
    model = make_model(CONFIGS[name]())
    ids = torch.from_numpy(token_ids(5, 16))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    batch = Batch(ids, mask)
    head = model.get_output_embeddings()
    widths = {n: linear_shape(n, m).out_features for n, m in find_linears(model, "").items()}
    widths = {n.removeprefix("."): width for n, width in widths.items()}
    assert any(model.get_submodule(n) is head for n in widths)
    expected = {n: g.square().sum(0) for n, g in whole_model(model.double(), batch, seed=3).items()}
    model.float()
    streamed = StreamedModel(Checkpoint.open(model))
    found = SquaredGradients(streamed, widths, seed=3)
    found.add(Batch(ids[:2], mask[:2]), 0)
    found.add(Batch(ids[2:], mask[2:]), 2)
    assert found.positions == int(mask[:, 1:].sum())
    assert found.sums.keys() == expected.keys()
    for linear, sums in found.sums.items():
        assert sums.sum() > 0, linear
        torch.testing.assert_close(
            sums.double(), expected[linear], rtol=1e-3, atol=1e-5 * expected[linear].max().item()
        )


def test_few_rows_at_a_time_give_the_same(llama, monkeypatch):
    batch = Batch(torch.from_numpy(token_ids(6, 16)))
    name, sums = "model.layers.1.mlp.down_proj", []
    for limit in (1 << 30, 1):
        monkeypatch.setattr("hfcompress.models.gradients.STORED_BYTES", limit)
        found = SquaredGradients(StreamedModel(Checkpoint.open(llama)), {name: 64})
        found.add(batch)
        sums.append(found.sums[name])
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-7)


def test_half_of_them_is_the_curvature_of_the_divergence(llama):
    """A noise of independent tokens and outputs moves the predictions by as many nats as is predicted."""
    ids = torch.from_numpy(token_ids(64, 16))
    name, size = "model.layers.1.mlp.down_proj", 1e-2
    found = SquaredGradients(StreamedModel(Checkpoint.open(llama)), {name: 64})
    found.add(Batch(ids))
    predicted = 0.5 * size**2 * found.sums[name].sum().item() / found.positions
    generator = torch.Generator().manual_seed(0)

    def disturb(module, args, output):
        return output + size * torch.randn(output.shape, generator=generator)

    with torch.no_grad():
        dense = llama(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        handle = llama.get_submodule(name).register_forward_hook(disturb)
        other = llama(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        handle.remove()
    measured = (dense.exp() * (dense - other)).sum(-1).mean().item()
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_covariances_are_those_of_the_whole_models_gradients(name):
    """In blocks along the diagonal, the last one smaller; and whole for the output of every block."""
    model = make_model(CONFIGS[name]())
    batch = Batch(torch.from_numpy(token_ids(5, 16)))
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    names = [n.removeprefix(".") for n in find_linears(model, "") if any(n.endswith(e) for e in ("up_proj", "c_fc"))]
    outputs = []
    handles = [
        b.register_forward_hook(lambda m, a, o: outputs.append(o[0] if isinstance(o, tuple) else o)) for b in blocks
    ]
    model.double()
    log_probs = model(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)
    likelihood = 0
    for row, own in enumerate(log_probs[:, :-1]):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + row)
        labels = torch.multinomial(own.detach().float().exp(), 1, generator=generator)
        likelihood = likelihood + own.gather(1, labels).sum()
    through = [g.flatten(0, -2) for g in torch.autograd.grad(likelihood, outputs)]
    for handle in handles:
        handle.remove()
    expected = whole_model(model, batch, seed=7)
    model.float()
    streamed = StreamedModel(Checkpoint.open(model))
    widths = {n: expected[n].shape[1] for n in names}
    found = GradientCovariances(streamed, widths, seed=7, block=40)
    found.add(batch)
    assert len(names) == 3
    for linear in names:
        parts = expected[linear].split(40, 1)
        assert [len(b) for b in found.blocks[linear]] == [part.shape[1] for part in parts]
        for block, part in zip(found.blocks[linear], parts, strict=True):
            wanted = part.T @ part
            torch.testing.assert_close(block.double(), wanted, rtol=1e-3, atol=1e-5 * wanted.max().item())
    for block, gradients in zip(found.outputs, through, strict=True):
        wanted = gradients.T @ gradients
        torch.testing.assert_close(block.double(), wanted, rtol=1e-3, atol=1e-5 * wanted.max().item())
