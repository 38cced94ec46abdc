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

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from torch import nn

import hfcompress as hfc
from hfcompress.calibration.tokens import Tokens
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.speed import measure, with_zeros
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.runtime.semi_structured import sparse_linears, use_sparse_kernels
from hfcompress.solvers.pattern import Pattern
from hfcompress.tables import said_of_zeros


SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_semi_structured.py"


@pytest.fixture
def sparse_llama(llama):
    """Of whose blocks the linears are 2:4, but for one."""
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name and "layers.1.mlp.up_proj" not in name:
            module.weight.data *= Pattern.parse("2:4").mask(module.weight.abs())
    return llama


def test_each_is_kept_where_the_clock_says_so_and_left_alone_elsewhere(sparse_llama):
    """The clock of this test likes the MLP; torch has no kernel for one of the shapes."""
    before = {name: module.weight for name, module in sparse_llama.named_modules() if isinstance(module, nn.Linear)}
    converted, inputs = [], []

    def convert(weight):
        if weight.shape[0] == 32:
            raise RuntimeError("no kernel for this shape")
        converted.append(weight + 0)
        return converted[-1]

    def seconds(linear, x):
        inputs.append(x.shape)
        sparse = any(linear.weight.data_ptr() == weight.data_ptr() for weight in converted)
        return (0.5 if linear.in_features == 96 else 2.0) if sparse else 1.0

    run = use_sparse_kernels(sparse_llama, 40, convert, seconds)
    assert run.linears == 7 * 3 - 1
    assert all(shape[0] == 40 for shape in inputs)
    used = {trial.name for trial in run.trials if trial.used}
    assert used == {f"model.layers.{index}.mlp.down_proj" for index in range(3)}
    assert run.used == 3
    for trial in run.trials:
        weight = sparse_llama.get_submodule(trial.name).weight
        assert (weight is before[trial.name]) == (not trial.used)
        assert torch.equal(weight, before[trial.name])
        assert (trial.sparse_seconds is None) == (trial.name.endswith(("k_proj", "v_proj")))


def test_a_draw_is_no_gain(sparse_llama):
    assert use_sparse_kernels(sparse_llama, 8, lambda weight: weight + 0, lambda linear, x: 1.0).used == 0


def test_on_a_cpu_it_says_that_there_is_nothing_to_gain(sparse_llama, llama):
    run = use_sparse_kernels(sparse_llama, 8)
    assert (run.linears, run.trials) == (20, [])
    assert run.reason == "torch has kernels for 2:4 weights on CUDA alone: here the zeros make nothing faster"


def test_without_zeros_there_is_nothing_to_run():
    dense = make_model(CONFIGS["llama"]())
    assert sparse_linears(dense) == {}
    assert use_sparse_kernels(dense, 8).reason == "no linear has plain 2:4 weights"


def test_the_measurement_of_speed_reports_it(saved_llama, tmp_path):
    step = hfc.Sparsify("2:4", method="magnitude", refit=False)
    hfc.compress(str(saved_llama), step, tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)
    candidate, baseline = Checkpoint.open(tmp_path / "out"), Checkpoint.open(str(saved_llama))
    tokens = Tokens(token_ids(8, 32, 1), "ids")
    report = measure(Comparison(candidate=candidate, baseline=baseline, tokens=tokens, seconds=0.2))
    zeros = report["compressed"]["zeros"]
    assert (zeros["linears"], zeros["used"]) == (21, 0)
    assert said_of_zeros(zeros).startswith(
        "21 linears are 2:4 sparse; torch has kernels for 2:4 weights on CUDA alone"
    )
    assert "zeros" not in report["baseline"]


def test_what_is_gained_is_told_beside_the_rest():
    turn = {"prefill_seconds": 2.0, "step_seconds": [0.5, 0.5]}
    faster = with_zeros([{"linears": 9, "used": 4, "reason": None, "batches": {"2": [turn, turn]}}], length=32)
    assert faster["batches"]["2"]["prefill_tokens_per_second"] == 32
    assert faster["batches"]["2"]["decode_tokens_per_second"] == 4
    assert said_of_zeros(faster) == "of 9 linears with 2:4 weights 4 are faster on sparse kernels"


def test_the_script_says_on_a_cpu_that_it_needs_a_gpu():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    if torch.cuda.is_available():
        assert json.loads(done.stdout)["rows"]
    else:
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1] == (
            "error: There is no CUDA GPU here; torch has kernels for 2:4 weights on CUDA alone."
        )
