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
"""Where the time goes, and what there was to do."""

import time

import pytest
import torch
from conftest import token_ids
from torch.utils.flop_counter import FlopCounterMode

import hfcompress as hfc
from hfcompress.passes.profile import FORWARD, SOLVE, SUMS, Profile, gemm_rate, operations_of_forwards


def test_a_part_within_another_is_taken_off_it(monkeypatch):
    times = iter([0, 2, 7, 8, 11, 20])  # begin, begin within, end, begin within, end, end
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    profile = Profile()
    with profile.part("outer"):
        for _ in range(2):
            with profile.part("inner"):
                pass
    assert {name: part.seconds for name, part in profile.parts.items()} == {"inner": 8, "outer": 12}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("suspended", [True, False])
def test_operations_of_forwards_are_those_of_the_linears_that_run(suspended, last):
    """Counted on linears one after the other, each a group: halted, or run again up to each of them."""
    linears = [torch.nn.Linear(8, 8, bias=False) for _ in range(4)]
    inputs = torch.randn(5, 8)

    def run(count: int) -> None:
        hidden = inputs
        for linear in linears[:count]:
            hidden = linear(hidden)

    with FlopCounterMode(display=False) as counter:
        if suspended:
            run(3 if last else 4)
        else:
            for group in range(4):
                run(group)
            run(0 if last else 4)
    found = operations_of_forwards([[64]] * 4, 5, suspended, last)
    assert found == counter.get_total_flops()


def test_a_run_tells_its_profile(llama, tmp_path, run_in):
    ids = token_ids(20, 32)
    plain = hfc.compress(llama, hfc.GPTQ(group_size=32), tmp_path / "plain", calibration=ids, evaluate=False)
    assert "profile" not in plain.manifest
    found = {}
    for suspended in (True, False):
        run_in(suspended, rows=8)
        result = hfc.compress(
            llama, hfc.GPTQ(group_size=32), tmp_path / str(suspended), calibration=ids, evaluate=False, profile=True
        )
        found[suspended] = result.manifest["profile"]["parts"]
        assert result.manifest["profile"]["gemm_gflops"] > 0
        total = sum(part["seconds"] for part in found[suspended].values())
        assert 0 < total <= result.manifest["phases"]["compress"]["seconds"]
    linears = [m for layer in llama.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    last = linears[-1].weight.numel()  # behind which nothing runs
    once = 2 * 20 * 32 * (sum(m.weight.numel() for m in linears) - last) / 1e9
    assert found[True][FORWARD]["gflop"] == pytest.approx(once, abs=1e-3)
    assert found[False][FORWARD]["gflop"] > 2 * once
    widths = 3 * (3 * 64**2 + linears[-1].in_features ** 2)  # what q, k, v read, o, gate and up, and down
    assert found[True][SUMS]["gflop"] == pytest.approx(20 * 32 * widths / 1e9, abs=1e-3)
    assert found[True][SOLVE]["gflop"] == found[False][SOLVE]["gflop"] > 0


def test_the_rate_is_one_of_this_machine():
    assert 1e9 < gemm_rate(torch.device("cpu")) < 1e14
