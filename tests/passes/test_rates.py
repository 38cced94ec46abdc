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
"""Bits, and ranks, where they count: as many in all, and less lost."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hfcompress as hfc
from hfcompress.passes.rates import LEAST, SPREAD, at_one_step
from hfcompress.solvers.coded import Curve


@given(st.lists(st.tuples(st.floats(-8, 8), st.integers(1, 1000)), min_size=1, max_size=8), st.floats(0.8, 4))
def test_rates_are_those_of_one_step_and_make_the_mean(linears, mean):
    """Curves that fall by one bit an octave, as at high rates, until nothing is left."""
    rates = torch.arange(16.0, -16.0, -0.5).clamp(min=0)
    curves = {str(i): Curve(first, rates) for i, (first, _) in enumerate(linears)}
    sizes = {str(i): size for i, (_, size) in enumerate(linears)}
    found = at_one_step(curves, sizes, mean)
    assert sum(found[n] * sizes[n] for n in sizes) / sum(sizes.values()) == pytest.approx(mean, abs=0.01)
    inside = {n: r for n, r in found.items() if max(mean - SPREAD, min(mean, LEAST)) + 0.01 < r < mean + SPREAD - 0.01}
    steps = [curves[name].first - rate for name, rate in inside.items()]
    assert max(steps, default=0) - min(steps, default=0) < 0.05


def test_bits_where_they_count_lose_less(tiny, tmp_path):
    calibration, evaluation = (np.load(tiny / f"{name}.npy") for name in ("calibration", "evaluation"))
    data = {
        "calibration": torch.as_tensor(calibration[:8]).long(),
        "eval_data": torch.as_tensor(evaluation[:8]).long(),
    }
    reports = {}
    for name in ("uniform", "global"):
        found = hfc.compress(None, hfc.Entropy(bits=2.2, allocation=name), tmp_path / name, **data)
        sizes = np.array([np.prod(row["shape"]) for row in found.manifest["linears"]])
        bits = np.array([row["bits"] for row in found.manifest["linears"]])
        assert (bits * sizes).sum() / sizes.sum() == pytest.approx(2.2, abs=0.01)
        assert (bits.std() > 0.1) == (name == "global")
        reports[name] = found.report
    assert reports["global"]["kl_mean"] < 0.9 * reports["uniform"]["kl_mean"]
    assert reports["global"]["size_bytes"] == pytest.approx(reports["uniform"]["size_bytes"], rel=0.01)


def test_ranks_where_they_count_lose_less(tiny, tmp_path):
    calibration, evaluation = (np.load(tiny / f"{name}.npy") for name in ("calibration", "evaluation"))
    data = {
        "calibration": torch.as_tensor(calibration[:8]).long(),
        "eval_data": torch.as_tensor(evaluation[:8]).long(),
    }
    reports = {}
    for name in ("uniform", "global"):
        found = hfc.compress(None, hfc.LowRank(ratio=0.8, allocation=name), tmp_path / name, **data)
        held = sum(row["rank"] * sum(row["shape"]) for row in found.manifest["linears"] if row.get("rank"))
        held += sum(np.prod(row["shape"]) for row in found.manifest["linears"] if row["type"] == "plain")
        assert held / sum(np.prod(row["shape"]) for row in found.manifest["linears"]) == pytest.approx(0.8, abs=0.03)
        assert len({row.get("rank") for row in found.manifest["linears"]}) > (3 if name == "global" else 0)
        card = (tmp_path / name / "README.md").read_text()
        assert "on average, products of two factors" in card or "bits, products of two factors" in card
        reports[name] = found.report
        expected = hfc.plan(
            None, hfc.LowRank(ratio=0.8, allocation=name), calibration=data["calibration"]
        ).output_bytes
        assert expected >= 0.999 * found.report["size_bytes"]  # what stays whole takes less than its share
    assert reports["global"]["kl_mean"] < 0.5 * reports["uniform"]["kl_mean"]


def test_without_curvature_all_are_alike():
    assert hfc.LowRank(curvature=False).allocation == "uniform"
    assert hfc.Entropy(curvature=False).allocation == "uniform"


def test_six_bits_lose_less_than_four(tiny, tmp_path):
    calibration, evaluation = (np.load(tiny / f"{name}.npy") for name in ("calibration", "evaluation"))
    data = {
        "calibration": torch.as_tensor(calibration[:4]).long(),
        "eval_data": torch.as_tensor(evaluation[:4]).long(),
    }
    four, six = (hfc.compress(None, hfc.Entropy(bits=b), tmp_path / f"{b}", **data).report for b in (4.0, 6.0))
    assert six["kl_mean"] < 0.2 * four["kl_mean"]
