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
"""Stored scales of caches: what enters them, and what is refused."""

import pytest
import torch
from torch import nn

from hfcompress.errors import CalibrationError, UnsupportedModelError
from hfcompress.passes.block_pass import BlockPass
from hfcompress.passes.plan import CacheTask
from hfcompress.passes.processes import Processes
from hfcompress.passes.ranges import CacheRanges
from hfcompress.solvers.grid import Grid


NAME = "model.layers.0.self_attn"
ATTENTION = nn.Linear(2, 2)


def make_ranges(type_="int"):
    return CacheRanges(CacheTask(NAME, NAME, Grid(8, type=type_), "minmax", torch.float32))


def make_states(seed=0, key_width=6, value_width=4):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, 5, key_width, generator=generator)
    return 3 * keys, torch.randn(2, 3, 5, value_width, generator=generator)


@pytest.mark.parametrize(("type_", "codes"), [("int", 127.5), ("float", 448.0)])
def test_keys_and_values_have_a_scale_each_over_all_batches(type_, codes):
    ranges, batches = make_ranges(type_), [make_states(0), make_states(1)]
    for states in batches:
        ranges.add(states, None)
    scales = ranges.scales(Processes(torch.device("cpu")), ATTENTION)
    assert list(scales) == ["k_scale", "v_scale"]
    for index, scale in enumerate(scales.values()):
        largest = max(states[index].abs().max().item() for states in batches)
        assert scale.item() == pytest.approx(largest / codes, rel=1e-6)


def test_padding_is_left_out():
    keys, values = make_states()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    keys[1, :, :2], values[1, :, 1] = 1e6, float("nan")
    ranges = make_ranges()
    ranges.add((keys, values), mask)
    scales = ranges.scales(Processes(torch.device("cpu")), ATTENTION)
    kept = keys.transpose(1, 2)[mask].abs().max().item()
    assert scales["k_scale"].item() == pytest.approx(kept / 127.5, rel=1e-6)
    assert scales["v_scale"].isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(value):
    keys, values = make_states()
    values[0, 0, 0, 0] = value
    ranges = make_ranges()
    ranges.add((keys, values), None)
    with pytest.raises(CalibrationError, match=rf"keys or values of {NAME} hold NaN or infinity.*--dtype float32"):
        ranges.scales(Processes(torch.device("cpu")), ATTENTION)


def test_an_attention_that_keeps_nothing_is_refused():
    """Such as those of the later layers of Gemma 3n, which read the keys and values of earlier ones."""
    run = BlockPass.__new__(BlockPass)
    run._require_all_cache({NAME: ATTENTION}, [["model.layers.0.self_attn.q_proj"], [NAME]])
    with pytest.raises(UnsupportedModelError, match=rf"{NAME} keeps no keys and values.*leave out the step kv_cache"):
        run._require_all_cache({NAME: ATTENTION}, [["model.layers.0.self_attn.q_proj"]])
