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
"""What the CPU solves, a CUDA device solves too; run by hand where there is one: `pytest -m gpu tests/gpu`."""

import numpy as np
import pytest
import torch

import hfcompress as hfc
from hfcompress.models.tiny import tiny_folder
from hfcompress.passes.processes import Processes
from hfcompress.passes.statistics import Statistics, sums_in_float32
from hfcompress.recipes.job import load_job
from hfcompress.solvers import gptq
from hfcompress.solvers.grid import Grid


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPTQ = hfc.GPTQ(bits=2, group_size=64)
STEPS = {
    "awq": hfc.AWQ(grid=8) >> GPTQ,
    "rotate": hfc.Rotate(when="always") >> GPTQ,
    "tune": hfc.RTN(bits=2, group_size=64) >> hfc.Tune(iterations=40),
    "qat": GPTQ >> hfc.QAT(steps=20),
    "kv-cache": hfc.GPTQ(bits=8, group_size=-1, activations="static") >> hfc.KVCache(),
}
SHIPPED = ["w4a16", "w3a16", "w2a16", "w4a16-fast", "w8a8-int8", "w8a8-fp8", "budget", "gptq-w4a16"]
CLOSE = 0.12  # of the KL: other sums, so other ties


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "calibration.npy"
    np.save(path, np.load(tiny_folder() / "calibration.npy")[:24])
    return path


@pytest.mark.parametrize("name", [*SHIPPED, *STEPS])
def test_the_loss_is_that_of_the_cpu(name, calibration, tmp_path):
    recipe = STEPS[name] if name in STEPS else load_job(name)
    kl = {}
    for device in ("cpu", "cuda"):
        result = hfc.compress(None, recipe, tmp_path / device, calibration=calibration, device=device, dtype="float32")
        kl[device] = result.report["kl_mean"]
    assert kl["cuda"] == pytest.approx(kl["cpu"], rel=CLOSE)


def test_in_the_dtype_of_the_checkpoint(calibration, tmp_path):
    """The default on a GPU: the model runs in bfloat16, what is summed and solved does not."""
    kl = {}
    for dtype in ("float32", None):
        result = hfc.compress(
            None, "w4a16", tmp_path / str(dtype), calibration=calibration, device="cuda", dtype=dtype
        )
        kl[dtype] = hfc.evaluate(tmp_path / str(dtype), device="cpu", dtype="float32")["kl_mean"]
        assert all(linear["fallback"] is None for linear in result.manifest["linears"])
    assert kl[None] == pytest.approx(kl["float32"], rel=2 * CLOSE)


def test_speed_and_memory_are_measured(calibration, tmp_path):
    report = hfc.compress(
        None,
        "w4a16-fast",
        tmp_path / "out",
        calibration=calibration,
        device="cuda",
        measure=("quality", "speed", "memory"),
    ).report
    assert report["speed"]
    assert report["memory"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gram_is_added_up_in_float32(dtype):
    device = torch.device("cuda", 0)
    assert sums_in_float32(device, torch.bfloat16)
    inputs = torch.randn(4, 512, 3000, device=device, dtype=dtype)
    statistics = Statistics(3000, device)
    statistics.add(inputs, None)
    statistics.complete(Processes(torch.device("cpu")), "a linear")
    x = inputs.double().view(-1, 3000)
    torch.testing.assert_close(statistics.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_sweep_in_triton_gives_the_codes_of_the_plain_one(symmetric, monkeypatch):
    weight, inputs = torch.randn(1000, 700, device="cuda"), torch.randn(4096, 700, device="cuda")
    factor, grid = gptq.factorize(inputs.T @ inputs / len(inputs)), Grid(4, 70, symmetric)
    triton = gptq.gptq(weight, factor, grid, torch.float32)
    monkeypatch.setattr(gptq, "_inner_loop", lambda device, grid: (gptq._sweep_columns, gptq.SUB_BLOCK))
    plain = gptq.gptq(weight, factor, grid, torch.float32)
    assert (triton.codes == plain.codes).float().mean() > 0.995
