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
"""Energy: counters made of files and a stand-in for NVML, idle power taken off, and an estimate that says it is one."""

import json
import math
import os
import time

import numpy as np
import pytest
import torch
from conftest import CONFIGS, in_fresh_process, make_model, token_ids

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import HfcompressError
from hfcompress.evaluation import energy
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.meters import NvmlMeter, RaplMeter, cpu_estimate, nvml_meter, open_meter
from hfcompress.evaluation.probe import idle_power
from hfcompress.models.checkpoint import Checkpoint


class Nvml:
    """As much of pynvml as is used: one GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules=None, milliwatts=None):
        self.millijoules, self.milliwatts = millijoules, milliwatts

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-1234":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._given(self.millijoules)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return self._given(self.milliwatts)

    def _given(self, value):
        if value is None:
            raise self.NVMLError("Not Supported")
        return value


class SteadyDraw:
    """A meter of a machine that always draws the same."""

    counts_idle = True

    def __init__(self, watts):
        self.watts = watts

    def joules(self):
        return self.watts * time.perf_counter()


def zone(root, name, label, microjoules, limit=1_000_000):
    """A powercap zone."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_rapl_adds_up_packages_alone_past_their_wrap(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 100_000)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    meter = open_meter(torch.device("cpu"), tmp_path)
    assert (meter.source, meter.counts_idle) == ("rapl", True)
    assert meter.joules() == 0
    for other in others:
        other.write_text("777777")
    first.write_text("950000")
    second.write_text("400000")
    assert meter.joules() == pytest.approx(0.05 + 0.3)
    first.write_text("150000")  # past its end: 50 000 up to the limit, and 150 000 from zero
    assert meter.joules() == pytest.approx(0.35 + 0.2)
    first.write_text("50000")
    assert meter.joules() == pytest.approx(0.55 + 0.9)


def test_without_a_readable_counter_there_is_an_estimate_that_says_so(tmp_path):
    assert open_meter(torch.device("cpu"), tmp_path / "none").source == "estimate"
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    assert isinstance(open_meter(torch.device("cpu"), tmp_path), RaplMeter)
    counter.unlink()
    counter.mkdir()  # cannot be read, not even by root
    assert open_meter(torch.device("cpu"), tmp_path).source == "estimate"


def test_the_estimate_is_its_formula():
    meter = cpu_estimate()
    assert meter.text.startswith("An estimate, not a measurement")
    assert "85 W" in meter.text
    assert f"{os.cpu_count()} cores" in meter.text
    joules, seconds = meter.joules(), time.process_time()
    while time.process_time() - seconds < 0.2:
        pass
    worked = time.process_time() - seconds
    assert meter.joules() - joules == pytest.approx(85 * worked / os.cpu_count(), rel=0.05)
    assert idle_power(meter, 10.0) == 0  # at once: it does not count idle time


def test_nvml_gives_millijoules():
    nvml = Nvml(millijoules=5_000)
    meter = nvml_meter(nvml, "1234")
    assert isinstance(meter, NvmlMeter)
    before = meter.joules()
    nvml.millijoules = 12_500
    assert meter.joules() - before == pytest.approx(7.5)


def test_a_gpu_without_a_counter_is_estimated_from_its_power_limit():
    meter = nvml_meter(Nvml(milliwatts=300_000), "GPU-1234")
    assert (meter.source, meter.counts_idle, meter.watts) == ("estimate", False, 150)
    assert meter.text.startswith("An estimate, not a measurement")
    assert "300 W" in meter.text


@pytest.mark.parametrize(("nvml", "uuid"), [(Nvml(), "1234"), (Nvml(millijoules=1), "another")])
def test_a_gpu_that_nvml_cannot_meter_ends_in_one_sentence(nvml, uuid):
    with pytest.raises(HfcompressError, match=r"from NVML \(Not .*\); leave energy out of --measure\.$"):
        nvml_meter(nvml, uuid)


def test_energy_on_a_gpu_names_the_extra_that_it_needs():
    code = """
import json, torch
from hfcompress.errors import MissingExtraError
from hfcompress.evaluation.meters import open_meter
try:
    open_meter(torch.device("cuda"))
except MissingExtraError as error:
    print(json.dumps({"message": str(error)}))
"""
    message = in_fresh_process(code, forbid="pynvml")["message"]
    assert message == "Energy on a GPU needs nvidia-ml-py: pip install 'hfcompress[energy]'."


def test_idle_power_is_taken_while_asleep():
    assert idle_power(SteadyDraw(40.0), 0.1) == pytest.approx(40.0, rel=0.05)


def test_what_would_have_been_drawn_anyway_is_taken_off():
    turns = [
        {
            "idle_watts": 10.0,
            "repeats": [
                {"joules": 50.0, "seconds": 2.0, "tokens": 10},
                {"joules": 60.0, "seconds": 2.0, "tokens": 20},
            ],
        },
        {"idle_watts": 20.0, "repeats": [{"joules": 50.0, "seconds": 2.0, "tokens": 10}]},
    ]
    per_token = np.array([3.0, 2.0, 1.0])
    found = energy.figures(turns)
    assert found["tokens"] == 40
    assert found["joules_per_token"] == pytest.approx(per_token.mean())
    assert found["joules_per_token_stderr"] == pytest.approx(np.sqrt(((per_token - 2) ** 2).sum() / 2 / 3))


def test_two_models_in_memory_are_metered():
    models = [Checkpoint.open(make_model(CONFIGS[name]())) for name in ("llama", "mistral")]
    tokens = Tokens(token_ids(2, 32), "random")
    comparison = Comparison(candidate=models[0], baseline=models[1], tokens=tokens, seconds=0.2)
    report = energy.measure(comparison)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["how"]["prompt_length"], report["how"]["new_tokens"]) == (32, 32)
    for key in ("baseline", "compressed"):
        assert report[key]["tokens"] % 32 == 0
        assert report[key]["tokens"] >= 32 * report["how"]["repeats"]
        assert all(math.isfinite(value) for value in report[key].values())
    if report["how"]["source"] == "estimate":
        assert report["how"]["text"].startswith("An estimate")
        assert report["baseline"]["joules_per_token"] > 0
