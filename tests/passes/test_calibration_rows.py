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
"""Which rows are for what does not depend on how many processes share them."""

import pytest
import torch
from conftest import token_ids

from hfcompress.models.batch import Batch
from hfcompress.passes.processes import Processes
from hfcompress.passes.rows import first_rows, held_out, spread_rows


class Several(Processes):
    """One of several processes, as far as sharing rows goes."""

    def __init__(self, rank: int, count: int, total: int):
        super().__init__(torch.device("cpu"))
        self.rank, self.count, self.total = rank, count, total

    def sum(self, tensor):
        return torch.tensor(self.total)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 29])
def test_the_same_rows_whoever_holds_them(rows, count):
    ids = torch.from_numpy(token_ids(rows, 4))
    chosen, numbers, judged = [], [], []
    for rank in range(count):
        processes = Several(rank, count, rows)
        batches = Batch(ids[processes.share(rows)]).split(3) if len(ids[processes.share(rows)]) else []
        few, first = spread_rows(batches, 8, processes)
        chosen += [row for batch in few for row in batch.input_ids]
        numbers += [n + i for n, batch in zip(first, few, strict=True) for i in range(len(batch.input_ids))]
        for batch, number in zip(batches, first_rows(batches, processes), strict=True):
            judged.append(held_out(number, len(batch.input_ids)))
    size = min(rows, 8)
    assert torch.equal(torch.stack(chosen), ids[[i * rows // size for i in range(size)]])
    assert numbers == list(range(size))
    assert torch.equal(torch.cat(judged), torch.arange(rows) % 8 == 7)


def test_masks_come_along():
    mask = torch.arange(20).view(10, 2) % 3 > 0
    few, _ = spread_rows([Batch(torch.zeros(10, 2, dtype=torch.long), mask)], 5, Processes(torch.device("cpu")))
    assert torch.equal(torch.cat([batch.mask for batch in few]), mask[::2])
