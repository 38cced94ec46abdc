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
"""Which of the calibration rows are for what; the same ones however many processes share them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hfcompress.models.batch import Batch
from hfcompress.passes.processes import Processes


HELD_OUT = 8  # every eighth row


def first_rows(batches: Sequence[Batch], processes: Processes) -> list[int]:
    """The number, over all processes, of every batch's first row."""
    total = total_rows(batches, processes)
    number, numbers = processes.share(total).start, []
    for batch in batches:
        numbers.append(number)
        number += len(batch.input_ids)
    return numbers


def total_rows(batches: Sequence[Batch], processes: Processes) -> int:
    """Rows of all processes together."""
    own = sum(len(batch.input_ids) for batch in batches)
    return int(processes.sum(torch.tensor(own, device=processes.device)).item())


def held_out(first: int, rows: int) -> Tensor:
    """Which of the `rows` rows from number `first` on are held out: bool `(rows,)`."""
    return torch.arange(first, first + rows) % HELD_OUT == HELD_OUT - 1


def spread_rows(batches: Sequence[Batch], count: int, processes: Processes) -> tuple[list[Batch], list[int]]:
    """
    A few rows, evenly over those of all processes.

    Args:
        batches (`Sequence[Batch]`): this process's share of the calibration data.
        count (`int`): rows of all processes together, at most.
        processes (`Processes`): who takes part.

    Returns:
        `tuple[list[Batch], list[int]]`: those of the rows that this process holds, and what number among the chosen
        ones the first of every batch has.
    """
    total = total_rows(batches, processes)
    count = min(total, count)
    share = processes.share(total)
    chosen = [index * total // count for index in range(count)]
    rows = [row - share.start for row in chosen if share.start <= row < share.stop]
    if not rows:
        return [], []
    few = Batch.joined(batches).rows(rows).split(len(batches[0].input_ids))
    first = chosen.index(rows[0] + share.start)
    return few, [first + sum(len(batch.input_ids) for batch in few[:number]) for number in range(len(few))]
