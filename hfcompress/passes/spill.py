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
"""
Tensors kept on disk instead of in memory, bit for bit.

They lie in one file that has no name: it is gone with the process, however that ends. They are read and written by calls,
not through a memory map, whose pages would count as this process's memory for as long as they are in the system's cache.
"""

import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from hfcompress.formats.tensor_files import fill
from hfcompress.formats.writer import disk_errors


class Spill:
    """
    Args:
        folder (`Path`): where the file lies; its disk holds what is kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it lives as long as this object
        self._end = 0
        self._free: dict[int, list[int]] = {}  # bytes -> where

    def put(self, tensor: Tensor) -> "Spilled":
        """
        Keep a tensor.

        Raises:
            OutputError: the disk is full.
        """
        data = tensor.detach().to("cpu").contiguous().view(torch.uint8).flatten()
        place = self._free[data.nbytes].pop() if self._free.get(data.nbytes) else self._end
        self._end = max(self._end, place + data.nbytes)
        left = memoryview(data.numpy())
        with disk_errors(self.folder):
            self._file.seek(place)
            while left:
                left = left[self._file.write(left) :]
        return Spilled(self, place, tensor)

    def give_back(self, place: int, size: int) -> None:
        """What lies at `place` is not wanted any more."""
        self._free.setdefault(size, []).append(place)

    def read_into(self, data: Tensor, place: int) -> None:
        """Fill a tensor of bytes with what lies at `place`."""
        fill(data, self._file, place)


class Spilled:
    """A tensor that is kept on disk for as long as this object lives; its `shape`, `dtype` and `device` are those it had."""

    def __init__(self, spill: Spill, place: int, tensor: Tensor):
        self._spill, self._place = spill, place
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        weakref.finalize(self, spill.give_back, place, tensor.nbytes)

    def read(self) -> Tensor:
        """The tensor, where it was."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._spill.read_into(tensor.view(torch.uint8).flatten(), self._place)
        return tensor.to(self.device)

    def instead(self, tensor: Tensor) -> "Spilled":
        """Another tensor, kept likewise."""
        return self._spill.put(tensor)
