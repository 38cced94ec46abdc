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
"""Bytes on disk, and of a process: at rest, after the first forward, and at most while it generates."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.fresh_process import circumstances, context, in_turns, prompts, ways


PROMPT_LENGTH = 512
NEW_TOKENS = 32
SAMPLING_SECONDS = 0.001
# glibc gives a freed block of this size or more back at once, so that what was freed is not counted
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def units(comparison: Comparison) -> int:
    """Steps of progress: one for every process."""
    return len(ways(comparison))


def measure(comparison: Comparison) -> dict[str, Any]:
    """
    Weigh both models, and the compressed one on packed weights where there are kernels for them.

    Args:
        comparison (`Comparison`): the two models.

    Returns:
        `dict`: under `baseline`, `compressed` and perhaps `packed` `disk_bytes`, `at_rest_bytes`, `after_forward_bytes`, `peak_bytes`
        and, to check them by, `tensor_bytes` and `tensor_bytes_after_forward`; under `how` how it was done.

    Raises:
        HfcompressError: a model could not be run.
    """
    length = min(PROMPT_LENGTH, context(comparison) // 2)
    new_tokens = min(NEW_TOKENS, context(comparison) - length)
    turns = ways(comparison)
    readings = in_turns(
        comparison,
        1,
        ALLOCATOR,
        turns,
        measurement="memory",
        prompts=prompts(comparison.tokens, 1, length),
        new_tokens=new_tokens,
    )
    kept = ("at_rest_bytes", "after_forward_bytes", "peak_bytes", "tensor_bytes", "tensor_bytes_after_forward")
    report: dict[str, Any] = {}
    for way in turns:
        reading = readings[way.key][0]
        report[way.key] = {"disk_bytes": way.checkpoint.size_bytes, **{name: reading[name] for name in kept}}
    report["how"] = {
        "text": readings["baseline"][0]["gauge"],
        "disk": "the sum of model*.safetensors; of the tensors, for a model in memory",
        "at_rest": "loaded, before the first forward, with every page of the weights read: a loader may map them from "
        "the file, and they would take no memory before they are used; pages of a mapped file count as long as it is mapped",
        "peak": f"while generating {new_tokens} tokens from a prompt of {length}, batch 1, on top of the model itself",
        "tensor_bytes": "bytes of parameters and buffers, tied ones once, at rest and after the first forward",
        "prompt_length": length,
        "new_tokens": new_tokens,
        **circumstances(comparison, readings),
    }
    return report


# how the child process weighs itself


class Gauge(Protocol):
    """
    Attributes:
        text (`str`): a sentence that says what is counted.
    """

    text: str

    def now(self) -> int:
        """Bytes taken."""
        ...

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most bytes taken while `work` is done."""
        ...


class ResidentMemory:
    """
    The memory of this process that lies in RAM: on Linux the peak is the kernel's own, elsewhere it is sampled.

    Args:
        process (`Path`, *optional*): the process's folder of Linux's `/proc`.
    """

    text = "Growth of the process's resident memory against the same process with all its libraries loaded."

    def __init__(self, process: Path = Path("/proc/self")):
        self._process = process

    def now(self) -> int:
        """Resident bytes."""
        return psutil.Process().memory_info().rss

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most resident bytes while `work` is done."""
        try:
            (self._process / "clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
        except OSError:
            return self._sampled_peak_of(work)
        work()
        status = (self._process / "status").read_text().splitlines()
        high_water = next(line for line in status if line.startswith("VmHWM:"))
        return max(int(high_water.split()[1]) * 1024, self.now())

    def _sampled_peak_of(self, work: Callable[[], object]) -> int:
        samples, done = [self.now()], threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLING_SECONDS):
                samples.append(self.now())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            work()
        finally:
            done.set()
            watcher.join()
        return max(*samples, self.now())


class CudaMemory:
    """
    What torch's allocator has given out on a GPU.

    Args:
        device (`torch.device`): the GPU.
    """

    text = "Bytes that torch's allocator has given out on the GPU; without the CUDA context and what it caches."

    def __init__(self, device: torch.device):
        self._device = device

    def now(self) -> int:
        """Allocated bytes."""
        return torch.cuda.memory_allocated(self._device)

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most allocated bytes while `work` is done."""
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        return torch.cuda.max_memory_allocated(self._device)


def open_gauge(device: torch.device) -> Gauge:
    """The memory of the device as this process sees it."""
    return CudaMemory(device) if device.type == "cuda" else ResidentMemory()
