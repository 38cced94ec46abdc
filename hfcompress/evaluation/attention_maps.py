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
"""
Attention maps of a decoder block, and how far those of two models are apart.

A map is found by looking: under transformers' `eager` attention an attention module returns, beside its output, the
probabilities with which every query attends to every key. No module is looked up by its name or its class.
"""

import contextlib
import copy
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.models.checkpoint import Checkpoint


ROUNDING = 0.02  # by which probabilities in bfloat16 may sum to more than one


def eager(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with a configuration under which attention modules return their probabilities."""
    view = copy.copy(checkpoint)
    view.config = copy.deepcopy(checkpoint.config)
    view.config._attn_implementation = "eager"
    return view


@contextlib.contextmanager
def attention_maps(block: nn.Module, rows: int, seq_len: int) -> Generator[list[Tensor]]:
    """
    A list that fills with the attention maps `(rows, heads, seq_len, seq_len)` of whatever runs in the block.

    Args:
        block (`nn.Module`): a decoder block.
        rows, seq_len (`int`): of what it is going to be called with.
    """
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, output) -> None:
        for value in output if isinstance(output, tuple) else ():
            # a wrapper hands on what its inner module returned
            if _is_map(value, rows, seq_len) and not any(value is other for other in seen):
                seen.append(value)

    handles = [module.register_forward_hook(look) for module in block.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_map(value: Any, rows: int, seq_len: int) -> bool:
    """Whether these are probabilities over keys; they sum to less than one where a sink takes a share."""
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        return False
    if value.shape[0] != rows or value.shape[2:] != (seq_len, seq_len):
        return False
    return bool((value >= 0).all()) and bool((value.sum(-1, dtype=torch.float32) <= 1 + ROUNDING).all())


class AttentionDistance:
    """
    The total-variation distance `1/2 sum_k |p(k) - q(k)|` between the attention of two models, per head, as the mean
    over the queries that are no padding: 0 where they attend alike, 1 where to nothing in common.
    """

    def __init__(self):
        self.total: Tensor | None = None
        self.queries = 0
        self.comparable = True

    def add(self, maps: list[Tensor], others: list[Tensor], mask: Tensor) -> None:
        """
        Args:
            maps, others (`list[Tensor]`): the two models' maps of one batch, from [`attention_maps`].
            mask (`Tensor`): bool `(rows, seq_len)`, false on padding.
        """
        if not maps or [m.shape for m in maps] != [m.shape for m in others]:
            self.comparable = False
            return
        pairs = zip(maps, others, strict=True)
        distances = torch.cat([(a.float() - b.float()).abs().sum(-1) / 2 for a, b in pairs], dim=1)
        total = distances.transpose(1, 2)[mask].sum(0, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        self.queries += int(mask.sum())

    def result(self) -> list[float] | None:
        """One distance per head; `None` where there are no maps, or not of the same heads."""
        if self.total is None or not self.comparable:
            return None
        return (self.total / self.queries).tolist()
