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
"""The roles in a block, read off its tensors: which are right is known here because the block is written here."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from hfcompress.models.residual import Recording, UnknownRoleError, gain_of, heads_of_block, residual_of_block


WIDTH = 24


class Block(nn.Module):
    """A block in one of several arrangements; its linears are named after their role."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        norm = nn.LayerNorm if kind == "layer norm" else LlamaRMSNorm
        self.kind, self.first, self.second, self.after = kind, norm(WIDTH), LlamaRMSNorm(WIDTH), LlamaRMSNorm(WIDTH)
        linear = Conv1D if kind == "conv1d" else nn.Linear
        self.inner = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("read", "gate", "write", "up")})
        self.down = linear(WIDTH, WIDTH)
        for parameter in self.parameters():
            parameter.data = torch.randn_like(parameter)

    def forward(self, x):
        if self.kind == "no reader":
            return x + self.inner["write"](self.first(x) * 2)
        read = self.first(x)
        written = self.inner["write"](self.inner["gate"](read).sigmoid() * self.inner["read"](read))
        if self.kind == "sandwich":
            written = self.after(written)
        if self.kind == "gated output":
            written = written * self.inner["gate"](read).tanh()
        between = x if self.kind == "parallel" else x + 0.22 * written
        down = self.down(self.inner["up"](self.second(between)).relu())
        return between + down + (written if self.kind == "parallel" else 0)


@torch.no_grad()
def roles(kind: str):
    block, x = Block(kind), torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1)) * 5
    with Recording(block, "b", WIDTH) as seen:
        after = block(x)
    return residual_of_block(seen.events, x, after)


@pytest.mark.parametrize("kind", ["plain", "parallel", "conv1d"])
def test_readers_and_writers(kind):
    found = roles(kind)
    assert found.writers == {"b.inner.write", "b.down"}
    assert {name: norm.parameter for name, norm in found.readers.items()} == {
        "b.inner.read": "b.first.weight",
        "b.inner.gate": "b.first.weight",
        "b.inner.up": "b.second.weight",
    }


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("sandwich", "what a block adds to its residual stream is no linear's output"),
        ("gated output", "what a block adds to its residual stream is no linear's output"),
        ("layer norm", "b.first is no RMS norm"),
        ("no reader", "what b.first returns is read by no linear"),
    ],
)
def test_what_is_no_pre_norm_block_is_told(kind, said):
    with pytest.raises(UnknownRoleError, match=said):
        roles(kind)


@pytest.mark.parametrize(
    ("module", "gain"),
    [
        (LlamaRMSNorm(WIDTH), (0, 1)),
        (Gemma3RMSNorm(WIDTH), (1, 1)),
        (nn.LayerNorm(WIDTH), None),
        (nn.LayerNorm(WIDTH, bias=False), None),
        (nn.PReLU(WIDTH), None),
    ],
)
def test_what_a_norm_multiplies_by_is_tried(module, gain):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert gain_of(module) == gain
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Attention(nn.Module):
    """One token per row: each query head's output is its key-value head's values."""

    def __init__(self, head_dim: int, order: list[int], spoil: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.head_dim, self.order, self.spoil = head_dim, order, spoil
        self.queries, self.fused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 40)
        self.output = nn.Linear(head_dim * len(order), WIDTH)

    def forward(self, x):
        self.queries(x)
        heads = self.fused(x)[:, 4:].split(self.head_dim, -1)
        out = torch.cat([heads[i] for i in self.order], -1)
        return self.output(out.sigmoid() if self.spoil else out)


@torch.no_grad()
def heads(head_dim, order, spoil=False):
    module = Attention(head_dim, order, spoil)
    with Recording(module, "a", WIDTH) as seen:
        module(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)))
    return heads_of_block(seen.events, 12)


def test_the_rows_of_a_fused_projection_are_matched_to_the_columns_that_read_them():
    found = heads(12, [0, 0, 2])  # rows 4 to 15 twice, those of the third head, none of the second
    assert (found.values, found.rows) == ("a.fused", (4, 28))
    assert (found.output, found.columns) == ("a.output", (0, 12, 24))


def test_where_nothing_is_copied_head_by_head_there_are_none():
    assert heads(12, [0, 2], spoil=True) is None
    assert heads(9, [1, 0, 1, 2]) is None  # heads of nine, not of twelve
