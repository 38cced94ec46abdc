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

import itertools

import numpy as np
import pytest
import torch
from conftest import token_ids
from hypothesis import given
from hypothesis import strategies as st

import hfcompress as hfc
from hfcompress.errors import InvalidValueError
from hfcompress.passes.ratios import within


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.2, 0.8), st.floats(0.01, 0.15), st.integers(0, 99)
)
def test_shares_are_kept_near_the_mean_and_make_it(wanted, mean, spread, seed):
    names = [str(index) for index in range(len(wanted))]
    sizes = dict(zip(names, np.random.default_rng(seed).integers(1, 1000, len(wanted)).tolist(), strict=True))
    found = within(dict(zip(names, wanted, strict=True)), sizes, mean, spread)
    assert all(mean - spread - 1e-9 <= share <= mean + spread + 1e-9 for share in found.values())
    assert sum(found[n] * sizes[n] for n in names) / sum(sizes.values()) == pytest.approx(mean, abs=1e-6)
    order = sorted(names, key=lambda name: wanted[int(name)])
    assert all(found[a] <= found[b] + 1e-12 for a, b in itertools.pairwise(order))


def run(folder, evaluate=True, **settings):
    calibration, evaluation = (
        torch.as_tensor(np.load(hfc.models.tiny.tiny_folder() / f"{name}.npy")[:16]).long()
        for name in ("calibration", "evaluation")
    )
    options = {"calibration": calibration, "evaluate": evaluate, "eval_data": evaluation if evaluate else None}
    return hfc.compress(None, hfc.Sparsify("unstructured", **settings), folder, **options)


def shares_of(result):
    rows = result.manifest["linears"]
    sizes = np.array([np.prod(row["shape"]) for row in rows])
    shares = np.array([row["sparsity"] for row in rows])
    return shares, (shares * sizes).sum() / sizes.sum()


@pytest.mark.parametrize("ratios", ["owl", "global"])
def test_the_zeros_are_as_many_in_all_and_differ_by_linear(ratios, tmp_path):
    shares, mean = shares_of(
        run(tmp_path / ratios, evaluate=False, ratios=ratios, spread=0.1, sparsity=0.6, method="wanda", refit=False)
    )
    assert mean == pytest.approx(0.6, abs=2e-3)
    assert shares.min() >= 0.499
    assert shares.max() <= 0.701
    assert shares.std() > 0.01


def test_zeros_where_they_cost_least_cost_less(tmp_path):
    uniform = run(tmp_path / "uniform", sparsity=0.7).report["kl_mean"]
    settled = run(tmp_path / "global", sparsity=0.7, ratios="global").report["kl_mean"]
    assert settled < 0.8 * uniform


def test_a_pattern_that_fixes_the_number_leaves_nothing_to_settle():
    with pytest.raises(
        InvalidValueError, match=r"pattern 2:4 gives every linear as many zeros; leave sparsify\.ratios out"
    ):
        hfc.Sparsify("2:4", ratios="owl")
    with pytest.raises(InvalidValueError, match=r"sparsify\.spread is 1\.5; it must lie between 0 and 1"):
        hfc.Sparsify("unstructured", spread=1.5)


def test_an_interrupted_run_settles_the_same_again(saved_llama, tmp_path):
    class Stop(hfc.progress.Silent):
        def step(self, text, amount=1):
            if text.startswith("block 3"):
                raise KeyboardInterrupt

    step = hfc.Sparsify("unstructured", ratios="global") >> hfc.RTN(group_size=32)
    options = {"calibration": token_ids(8, 32), "evaluate": False}
    hfc.compress(str(saved_llama), step, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(str(saved_llama), step, tmp_path / "out", progress=Stop(), **options)
    hfc.compress(str(saved_llama), step, tmp_path / "out", resume=True, **options)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
