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
"""Meters of energy: NVML's counter, RAPL's, or an estimate that says that it is one."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from hfcompress.errors import HfcompressError, MissingExtraError


POWERCAP = Path("/sys/class/powercap")
ASSUMED_WATTS = 85.0  # of a whole CPU with all its cores busy
ASSUMED_LOAD = 0.5  # of a GPU without a counter, as a share of its power limit


class Meter(Protocol):
    """
    Attributes:
        source (`str`): `"nvml"`, `"rapl"` or `"estimate"`.
        text (`str`): a sentence that says what is counted.
        counts_idle (`bool`): whether it goes on counting while nothing is done.
    """

    source: str
    text: str
    counts_idle: bool

    def joules(self) -> float:
        """Since a fixed moment; two readings are subtracted."""
        ...


class NvmlMeter:
    """
    The energy counter of an NVIDIA GPU's whole board.

    Args:
        nvml: the module `pynvml`, initialised.
        handle: NVML's handle of the GPU.
    """

    source = "nvml"
    text = "NVML's energy counter: the whole GPU board, whoever uses it; not the host."
    counts_idle = True

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        """Since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


class RaplMeter:
    """
    The energy counters of the CPU packages, from Linux's powercap files.

    A counter starts again at zero past `max_energy_range_uj`, minutes apart at the soonest, so `joules` must be read
    more often than that.

    Args:
        root (`Path`, *optional*): the powercap folder.

    Raises:
        OSError: there is no package with a counter that this user may read.
    """

    source = "rapl"
    text = (
        "RAPL's energy counters of the CPU packages, whoever uses them; not the memory, nor the rest of the machine."
    )
    counts_idle = True

    def __init__(self, root: Path = POWERCAP):
        # `intel-rapl:0:0` lies inside `intel-rapl:0`, and a zone named psys holds the packages: neither counts twice
        zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not packages:
            raise FileNotFoundError(f"There is no CPU package in {root}.")
        self._counters = [zone / "energy_uj" for zone in packages]
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in packages]
        self._last = self._read()
        self._total = 0

    def _read(self) -> list[int]:
        return [int(counter.read_text()) for counter in self._counters]

    def joules(self) -> float:
        """Since this meter was made, summed over the packages."""
        now = self._read()
        for value, last, limit in zip(now, self._last, self._ranges, strict=True):
            self._total += value - last if value >= last else value + limit - last
        self._last = now
        return self._total / 1e6


class Estimate:
    """
    A constant power times the time that was worked: no measurement, and it says so.

    Args:
        watts (`float`): assumed while working.
        seconds (`Callable`): seconds that were worked, since a fixed moment.
        text (`str`): the formula, and what was assumed.
    """

    source = "estimate"
    counts_idle = False

    def __init__(self, watts: float, seconds: Callable[[], float], text: str):
        self.watts, self._seconds, self.text = watts, seconds, text

    def joules(self) -> float:
        """Assumed so far."""
        return self.watts * self._seconds()


def open_meter(device: torch.device, powercap: Path = POWERCAP) -> Meter:
    """
    The best meter that there is for the device: NVML's counter for a GPU, RAPL's for a CPU, otherwise an estimate.

    Args:
        device (`torch.device`): what does the work.
        powercap (`Path`, *optional*): Linux's powercap folder.

    Raises:
        MissingExtraError: the device is a GPU, and pynvml is not installed.
    """
    if device.type == "cuda":
        try:
            import pynvml
        except ImportError as error:
            raise MissingExtraError("Energy on a GPU needs nvidia-ml-py: pip install 'hfcompress[energy]'.") from error
        return nvml_meter(pynvml, str(torch.cuda.get_device_properties(device).uuid))
    try:
        return RaplMeter(powercap)
    except OSError:
        return cpu_estimate()


def nvml_meter(nvml: Any, uuid: str) -> Meter:
    """
    The counter of the GPU, or an estimate where it has none (before Volta, and in many virtual machines).

    Args:
        nvml: the module `pynvml`.
        uuid (`str`): the GPU's, as torch gives it.

    Raises:
        HfcompressError: NVML does not know the GPU, or neither its energy nor its power limit.
    """
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        meter = NvmlMeter(nvml, handle)
        try:
            meter.joules()
        except nvml.NVMLError:
            return _gpu_estimate(nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3)
    except nvml.NVMLError as error:
        raise HfcompressError(
            f"The energy of this GPU cannot be had from NVML ({error}); leave energy out of --measure."
        ) from error
    return meter


def cpu_estimate() -> Estimate:
    """For a CPU: the assumed power of all cores, times the share of them that this process kept busy."""
    cores = os.cpu_count() or 1
    return Estimate(
        ASSUMED_WATTS,
        lambda: time.process_time() / cores,
        f"An estimate, not a measurement, because no energy counter can be read here: {ASSUMED_WATTS:g} W (assumed for "
        f"the whole CPU, busy) x CPU seconds of the process / {cores} cores.",
    )


def _gpu_estimate(power_limit: float) -> Estimate:
    """For a GPU, which has no CPU seconds: a share of its power limit, times the time by the clock."""
    return Estimate(
        ASSUMED_LOAD * power_limit,
        time.perf_counter,
        "An estimate, not a measurement, because this GPU has no energy counter: "
        f"{ASSUMED_LOAD:g} (assumed load) x {power_limit:g} W (its power limit) x seconds.",
    )
