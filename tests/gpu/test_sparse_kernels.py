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

import pytest
import torch
from torch import nn

from hfcompress.runtime.semi_structured import PATTERN, use_sparse_kernels


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_sparse_kernels_give_the_same_outputs_and_are_used_only_where_faster():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 4096, bias=False)).cuda().bfloat16()
    for linear in model:
        linear.weight.data *= PATTERN.mask(linear.weight.abs())
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        run = use_sparse_kernels(model, 4096)
        found = model(x)
    assert run.linears == len(run.trials) == 2
    assert all(trial.used == (trial.sparse_seconds < 0.98 * trial.dense_seconds) for trial in run.trials)
    assert (found - expected).float().norm() < 0.02 * expected.float().norm()
