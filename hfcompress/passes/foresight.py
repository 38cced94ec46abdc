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
"""What the dense model's inputs on a few rows tell of each linear, before anything is changed."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hfcompress.models.batch import Batch
from hfcompress.models.roles import find_linears, get_weight, shared_inputs, watch_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.plan import LinearTask
from hfcompress.passes.processes import Processes
from hfcompress.passes.rows import spread_rows
from hfcompress.passes.statistics import Statistics


ROWS = 16  # calibration rows
Told = TypeVar("Told")


@torch.no_grad()
def foresee(
    model: StreamedModel,
    asked: Mapping[str, LinearTask],
    batches: Sequence[Batch],
    processes: Processes,
    tell: Callable[[LinearTask, Tensor, Statistics], Told],
) -> dict[str, Told]:
    """
    What `tell` makes of every linear; one Gram matrix is in memory at a time, as in the block pass.

    Args:
        model (`StreamedModel`): the dense model.
        asked (`Mapping[str, LinearTask]`): the linears.
        batches (`Sequence[Batch]`): this process's share of the calibration data.
        processes (`Processes`): who takes part; all are told the same.
        tell (`Callable`): is given the task, the weight, float32 `(out_features, in_features)`, and its inputs' statistics.
    """
    few, _ = spread_rows(batches, ROWS, processes)
    streams, probe = model.embed(few) if few else [], model.probe()
    found: dict[str, Told] = {}
    for index, block_name in enumerate(model.block_names):
        with model.block(index) as block:
            linears = {n: m for n, m in find_linears(block, block_name).items() if n in asked}
            for names in shared_inputs(model, block, index, probe, linears):
                statistics = Statistics(asked[names[0]].shape.in_features, model.device)
                for stream in streams:
                    add = partial(_add, statistics, stream.batch)
                    with watch_inputs({names[0]: linears[names[0]]}, add):
                        model.call(block, index, stream)
                statistics.complete(processes, names[0])
                for name in names:
                    found[name] = tell(asked[name], get_weight(linears[name]), statistics)
            model.advance(block, index, streams)
    return found


def _add(statistics: Statistics, batch: Batch, _: str, inputs: Tensor) -> None:
    statistics.add(inputs, batch.mask_of(inputs))
