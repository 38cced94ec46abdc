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
"""How long each part of a run took, and how much memory."""

import contextlib
import sys
import time
from pathlib import Path

import psutil
import torch


class Phases:
    """Seconds and peak memory, phase by phase."""

    def __init__(self):
        self.ended: dict[str, dict[str, float]] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        """The phase `name` ends now, and the next begins."""
        now = time.perf_counter()
        self.ended[name] = {"seconds": round(now - self._since, 3), "peak_rss_bytes": peak_rss_bytes()}
        if torch.cuda.is_available():
            self.ended[name]["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        self._since = now


def peak_rss_bytes() -> int:
    """The most memory that this process has had so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    with contextlib.suppress(OSError, StopIteration):  # what getrusage says begins with what the parent process had
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
