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
"""The scales that are stored for activations: of a linear's inputs, and of an attention's keys and values."""

from collections.abc import Mapping

from torch import Tensor, nn

from hfcompress.errors import CalibrationError
from hfcompress.models.activations import CACHE, INPUT
from hfcompress.passes.plan import CacheTask, LinearTask
from hfcompress.passes.processes import Processes
from hfcompress.passes.statistics import Statistics, over_all
from hfcompress.solvers.observers import Histogram, static_scale


class CacheRanges:
    """
    The magnitudes of the keys and values that an attention hands to its cache.

    Args:
        task (`CacheTask`): the attention, and what is done to its cache.
    """

    def __init__(self, task: CacheTask):
        self.task = task
        self.seen: list[Histogram] = []

    def add(self, states: tuple[Tensor, ...], mask: Tensor | None) -> None:
        """
        Count the keys and values of one batch.

        Args:
            states (`tuple[Tensor, ...]`): the keys and the values, each `(rows, heads, seq_len, head_dim)`.
            mask (`Tensor` or `None`): bool `(rows, seq_len)`, false on padding.
        """
        self.seen = self.seen or [Histogram.empty(each.device) for each in states]
        kept = [each if mask is None else each.transpose(1, 2)[mask.to(each.device)] for each in states]
        self.seen = [histogram.add(each) for histogram, each in zip(self.seen, kept, strict=True)]

    def scales(self, processes: Processes, attention: nn.Module) -> dict[str, Tensor]:
        """
        The two scales by their local names, over all processes.

        Raises:
            CalibrationError: a key or value is NaN or infinite.
        """
        device = next(p for p in attention.parameters() if p.device.type != "meta").device
        seen = [over_all(each, processes) for each in self.seen or [Histogram.empty(device) for _ in CACHE]]
        if not all(each.largest.isfinite() for each in seen):
            raise CalibrationError(
                f"The keys or values of {self.task.name} hold NaN or infinity; try --dtype float32, and check that the "
                "model works on this calibration data."
            )
        found = [static_scale(each, self.task.grid, self.task.observer, self.task.scale_dtype) for each in seen]
        return dict(zip(CACHE, found, strict=True))


def input_scale(task: LinearTask, statistics: Statistics | None) -> dict[str, Tensor]:
    """The scale of a linear's inputs by its local name, where one is to be stored."""
    if not task.needs_range:
        return {}
    assert statistics is not None
    assert statistics.magnitudes is not None
    scale = static_scale(statistics.magnitudes, task.grid, task.settings.observer, task.scale_dtype)
    return {INPUT: scale}


def stored_scales(tensors: Mapping[str, Tensor], task: LinearTask | CacheTask) -> dict[str, Tensor]:
    """The scales of activations that an earlier run has written for a linear or an attention, by their local names."""
    return {name: tensors[f"{task.stem}.{name}"] for name in (INPUT, *CACHE) if f"{task.stem}.{name}" in tensors}
