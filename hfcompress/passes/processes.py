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

import atexit
import contextlib
import math
import os
from bisect import bisect_left
from collections.abc import Generator, MutableMapping, Sequence
from itertools import accumulate, pairwise

import psutil
import torch
from torch import Tensor

from hfcompress.errors import HfcompressError, InvalidValueError, LostProcessError


HOW = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node {count} SCRIPT"
FEW_ROWS = 16  # of a weight for each process, below which dividing it is not worth it
FIRST_PORT, PORTS = 20000, 20000
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}


class Processes:
    """
    The processes of this run, from `torchrun`, `accelerate launch` or Slurm's `srun`.

    Args:
        device (`torch.device`): where this run's arithmetic happens; a CUDA device gets this process's own index.

    Raises:
        HfcompressError: the launcher announced several processes, but each is alone.
        InvalidValueError: several were asked for in a way that starts one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._accelerator = None
        take_over_slurm(os.environ)
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), 0
        if self.count == 1 and (asked := asked_of_accelerate(_parents_command())) > 1:
            raise InvalidValueError(
                f"accelerate launch starts one process on a CPU, though {asked} were asked for; start them with "
                f"{HOW.format(count=asked)}."
            )
        if self.count > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=device.type == "cpu")
            atexit.register(_leave)  # left to the interpreter's end, gloo's threads abort one run in ten
            if self._accelerator.num_processes != self.count:
                raise HfcompressError(
                    f"The launcher started {self.count} processes, but accelerate sees "
                    f"{self._accelerator.num_processes}; on a CPU start them with {HOW.format(count=self.count)}."
                )
            self.rank = self._accelerator.process_index
            self.device = self._accelerator.device

    @property
    def writes(self) -> bool:
        """Whether this process writes the result."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The contiguous part of `rows` rows that this process takes."""
        return self._shares(rows)[self.rank]

    def _shares(self, rows: int) -> list[slice]:
        return [slice(rows * rank // self.count, rows * (rank + 1) // self.count) for rank in range(self.count)]

    def shares(self, rows: int, blocks: Sequence[int] | None = None) -> list[slice]:
        """
        Which blocks of a weight's rows each process solves, so that all have about as many rows; all of them each where
        that is not worth it.

        Args:
            rows (`int`): of the weight.
            blocks (`Sequence[int]`, *optional*): the rows of each block; one each without it.
        """
        if self.count == 1 or rows < FEW_ROWS * self.count:
            return [slice(0, rows if blocks is None else len(blocks))] * self.count
        if blocks is None:
            return self._shares(rows)
        middles = [end - size / 2 for end, size in zip(accumulate(blocks), blocks, strict=True)]
        cuts = [bisect_left(middles, rows * rank / self.count) for rank in range(self.count + 1)]
        return [slice(start, stop) for start, stop in pairwise(cuts)]

    def together(self, part: Tensor, counts: Sequence[int]) -> Tensor:
        """
        A weight's rows of all processes, the same on each, bit for bit.

        Args:
            part (`Tensor`): those of this process, `(rows, ...)` of any dtype.
            counts (`Sequence[int]`): the rows of each process.
        """
        if self._accelerator is None:
            return part
        width = math.prod(part.shape[1:]) * part.dtype.itemsize
        padded = torch.zeros(max(counts), width, dtype=torch.uint8, device=part.device)
        if len(part):
            padded[: len(part)] = part.contiguous().view(torch.uint8).reshape(len(part), width)
        with self._told():
            every = self._accelerator.gather(padded).view(self.count, max(counts), -1)
        own = [every[rank, :count] for rank, count in enumerate(counts)]
        return torch.cat(own).contiguous().view(part.dtype).reshape(sum(counts), *part.shape[1:])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same on each."""
        if self._accelerator is None:
            return tensor
        with self._told():
            return self._accelerator.reduce(tensor, "sum")

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over all processes, element by element, the same on each."""
        if self._accelerator is None:
            return tensor
        with self._told():
            return self._accelerator.gather(tensor[None]).amax(0)

    def all(self, says: bool) -> bool:
        """Whether all processes say so."""
        return not self.max(torch.tensor(float(not says), device=self.device)).item()

    def wait(self) -> None:
        """Until all are here."""
        if self._accelerator is not None:
            with self._told():
                self._accelerator.wait_for_everyone()

    def go_separate_ways(self) -> None:
        """From here on no library takes this process for one of several."""
        if self._accelerator is not None:
            self.wait()
            _leave()
            self._accelerator = None

    @contextlib.contextmanager
    def _told(self) -> Generator[None]:
        """What a process meets that waits for one that is gone, as one sentence."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"Process {self.rank} of {self.count} lost another one, which has ended or cannot be reached; see what it said, "
                "start them again, and go on with --resume."
            ) from error


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def take_over_slurm(environment: MutableMapping[str, str]) -> None:
    """Give the processes of an `srun` the variables by which torch's and accelerate's own launchers number theirs."""
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    environment.update({name: environment[source] for name, source in SLURM.items()})
    environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    job = int(environment.get("SLURM_JOB_ID", "0")) * 16 + int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + job % PORTS))


def asked_of_accelerate(command: Sequence[str]) -> int:
    """How many processes an `accelerate launch` was told to start; 1 for any other command."""
    words = [word for argument in command for word in argument.split("=", 1)]
    if "launch" not in words or not any("accelerate" in word for word in words[: words.index("launch")]):
        return 1
    for name in ("--num_processes", "--num-processes"):
        if name in words and words[-1] != name and words[words.index(name) + 1].isdigit():
            return int(words[words.index(name) + 1])
    return 1


def _parents_command() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []
