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
"""One process or several: who holds which samples, how sums are formed, who writes."""

import os

import torch
from torch import Tensor

from hfcompress.errors import HfcompressError


class Processes:
    """
    The processes of this run, from `torchrun` or `accelerate launch`.

    Args:
        device (`torch.device`): where this run's arithmetic happens; a CUDA device gets this process's own index.

    Raises:
        HfcompressError: the launcher announced several processes, but each is alone.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._accelerator = None
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), 0
        if self.count > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=device.type == "cpu")
            if self._accelerator.num_processes != self.count:
                raise HfcompressError(
                    f"The launcher started {self.count} processes, but accelerate sees "
                    f"{self._accelerator.num_processes}; on a CPU start them with `ACCELERATE_USE_CPU=true torchrun`."
                )
            self.rank = self._accelerator.process_index
            self.device = self._accelerator.device

    @property
    def writes(self) -> bool:
        """Whether this process writes the result."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The contiguous part of `rows` rows that this process takes."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same on each."""
        return tensor if self._accelerator is None else self._accelerator.reduce(tensor, "sum")

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over all processes, element by element, the same on each."""
        return tensor if self._accelerator is None else self._accelerator.gather(tensor[None]).amax(0)

    def wait(self) -> None:
        """Until all are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def part(self) -> None:
        """Go separate ways: from here on no library takes this process for one of several."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
            torch.distributed.destroy_process_group()
            self._accelerator = None
