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
Which rows of which linears make which inputs of another: what goes with an input channel, or with a group of heads, when
it is removed. Discovered on the running block, for any architecture.

How it works. The inputs of the consumer are divided into units, which are numbered. A copy of the block runs on a few
tokens with a factor of one on every output row of every linear. The squares of those inputs whose unit has a certain bit
in its number have a derivative by such a factor only where that row reaches one of them; so one backward pass for each
bit, and one for its complement, spell for every row the unit that it reaches, or tell that it reaches several.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.folds import BlockTrial
from hfcompress.models.roles import Linear, linear_shape
from hfcompress.models.streaming import Stream, StreamedModel


NONE = -1  # the unit of a row that reaches none


def rows_of_units(
    model: StreamedModel, block: nn.Module, index: int, probe: Stream, consumer: str, units: Tensor
) -> dict[str, Tensor]:
    """
    Args:
        model (`StreamedModel`): the model.
        block (`nn.Module`): its block `index`, with weights; it is left as it is.
        index (`int`): which block.
        probe (`Stream`): a few tokens.
        consumer (`str`): full name of the linear that reads the units.
        units (`Tensor`): int64 `(in_features,)`: the unit of each of its input channels, numbered from 0.

    Returns:
        `dict[str, Tensor]`: full name of a linear -> int64 `(out_features,)`, the unit of each of its rows or -1. A linear
        of which a row reaches several units is not among them.

    Raises:
        UnsupportedModelError: some unit is reached by no row.
    """
    trial = BlockTrial(model, block, index, probe)
    device, count = trial.stream.hidden.device, int(units.max()) + 1
    linears = {n: m for n, m in trial.producers.items() if isinstance(m, Linear) and n != consumer}
    taps = {
        n: torch.ones(linear_shape(n, m).out_features, device=device, requires_grad=True) for n, m in linears.items()
    }
    with torch.enable_grad():
        _, inputs = trial.run([consumer], taps)
        squares = inputs[consumer].square().sum(0)
        found = {n: torch.zeros_like(t, dtype=torch.long) for n, t in taps.items()}
        several = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in taps.items()}
        none = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in taps.items()}
        for bit in range(max(1, (count - 1).bit_length())):
            has = ((units >> bit) & 1).bool().to(device)
            one, zero = (_reach(squares, chosen, taps) for chosen in (has, ~has))
            for name in taps:
                found[name] += one[name].long() << bit
                several[name] |= one[name] & zero[name]
                none[name] |= ~one[name] & ~zero[name]
    rows = {n: _filled(torch.where(none[n], NONE, found[n]), count) for n in taps if not several[n].any()}
    rows = {n: own.cpu() for n, own in rows.items() if (own != NONE).any()}
    reached = torch.zeros(count, dtype=torch.bool)
    for own in rows.values():
        reached[own[own != NONE]] = True
    if not reached.all():
        raise UnsupportedModelError(
            f"It could not be seen which weights make the inputs of {consumer}, so none of them can be removed; leave that "
            "dimension out of prune."
        )
    return rows


def _reach(squares: Tensor, chosen: Tensor, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which rows the chosen inputs depend on."""
    none = {name: torch.zeros_like(tap, dtype=torch.bool) for name, tap in taps.items()}
    if not chosen.any():
        return none
    gradients = torch.autograd.grad(squares[chosen].sum(), list(taps.values()), retain_graph=True, allow_unused=True)
    return {n: none[n] if g is None else g != 0 for (n, _), g in zip(taps.items(), gradients, strict=True)}


def _filled(rows: Tensor, count: int) -> Tensor:
    """Rows that were silent on the few tokens, such as behind a ReLU, where the others leave no doubt: one to a unit."""
    if (rows != NONE).any() and len(rows) % count == 0:
        regular = torch.arange(len(rows), device=rows.device) % count
        if torch.equal(torch.where(rows == NONE, NONE, regular), rows):
            return regular
    return rows
