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
"""Round to nearest: no error feedback, and no data unless there is some."""

import torch
from torch import Tensor

from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.scales import choose_scales


def rtn(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype, search: bool = True, importance: Tensor | None = None
) -> QuantizedWeight:
    """
    Round every weight to the nearest value of its group's grid.

    Args:
        weight (`Tensor`): `(out_features, in_features)` float32.
        grid (`Grid`): the grid.
        scale_dtype (`torch.dtype`): the dtype that scales are stored in.
        search (`bool`, *optional*, defaults to `True`): choose the scales that give the least squared error.
        importance (`Tensor`, *optional*): `(in_features,)`, what a squared error in each column counts.
    """
    scales, zero_points = choose_scales(weight, importance, grid, scale_dtype, search)
    groups = weight.view(len(weight), scales.shape[1], -1)
    zeros = None if zero_points is None else zero_points.float().unsqueeze(-1)
    codes = grid.round(groups, scales.float().unsqueeze(-1), zeros)
    return QuantizedWeight(codes.view_as(weight).to(grid.dtype), scales, zero_points, grid)
