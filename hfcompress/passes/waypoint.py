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
What lets a run that was killed go on sooner, kept on disk where finding it again would take far longer than writing it:
the hidden states behind a block, instead of going through all finished blocks again, and what gradients have told.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfcompress.formats.tensor_files import (
    DTYPES,
    Entry,
    Readable,
    entries_of,
    is_whole,
    read_entry,
    write_one_by_one,
)
from hfcompress.formats.writer import put_in_place
from hfcompress.models.streaming import Stream
from hfcompress.passes.processes import Processes


WORTH = 10.0  # times as long as writing them
LEAST_SECONDS = 20.0  # that going through the blocks must take
DISK_RATE = 2e8  # bytes per second, until it is known


class Waypoint:
    """
    Args:
        folder (`Path`): where unfinished work lies.
        processes (`Processes`): each keeps the states of its own rows, where that is worth it to it.
        room (`int`): bytes that must stay free on the disk.
    """

    def __init__(self, folder: Path, processes: Processes, room: int):
        self.folder, self.processes, self.room = folder, processes, room
        self.path = folder / f"waypoint-{processes.rank}-of-{processes.count}.safetensors"
        self._behind = 0.0  # seconds that going again through the blocks since the last one would take
        self._rate = DISK_RATE

    def due(self, seconds: float, streams: Sequence[Stream]) -> bool:
        """
        Whether it is worth it to keep the streams.

        Args:
            seconds (`float`): that going again through the block that is finished now would take.
            streams (`Sequence[Stream]`): all that is in front of the next block.
        """
        self._behind += seconds
        return self._is_worth(self._behind, sum(_size(s.held) for s in streams))

    def keep(self, index: int, streams: Sequence[Stream]) -> None:
        """
        Keep the streams in the place of those that were kept before.

        Args:
            index (`int`): the block that they have passed, which the journal says is finished.
            streams (`Sequence[Stream]`): all that is in front of the next block.
        """
        self._behind = 0.0
        self._write(self.path, {f"{index}.{place}": s.held for place, s in enumerate(streams)})

    def reached(self, streams: Sequence[Stream], done: Callable[[int], bool]) -> tuple[int, list[Stream]]:
        """
        How many blocks need not be gone through again, and the streams in front of the next one.

        Args:
            streams (`Sequence[Stream]`): in front of the first block.
            done (`Callable`): whether a block is finished.
        """
        if not is_whole(self.path):
            return 0, list(streams)
        entries = {entry.name: entry for entry in entries_of(self.path)}
        told = next(iter(entries), "").split(".")[0]
        index = int(told) if told.isdecimal() else -1
        wanted = {f"{index}.{place}": stream for place, stream in enumerate(streams)}
        if entries.keys() != wanted.keys() or not all(map(done, range(index + 1))):
            return 0, list(streams)
        if any(_kind(entries[name]) != (s.held.dtype, list(s.held.shape)) for name, s in wanted.items()):
            return 0, list(streams)
        with open(self.path, "rb", buffering=0) as file:
            return index + 1, [
                s.advanced(read_entry(file, entries[name]).to(s.held.device)) for name, s in wanted.items()
            ]

    def keep_found(self, name: str, tensors: Mapping[str, Tensor], seconds: float) -> None:
        """
        Keep what all processes have found together, if that is worth it.

        Args:
            name (`str`): what it is.
            tensors (`Mapping[str, Tensor]`): it.
            seconds (`float`): that finding it took.
        """
        if self.processes.writes and self._is_worth(seconds, sum(_size(each) for each in tensors.values())):
            self._write(self._file(name), tensors)

    def found(self, name: str, device: torch.device) -> dict[str, Tensor] | None:
        """What was kept under this name, if all processes see it."""
        path = self._file(name)
        if not self.processes.all(is_whole(path)):
            return None
        with open(path, "rb", buffering=0) as file:
            return {entry.name: read_entry(file, entry).to(device) for entry in entries_of(path)}

    def forget(self) -> None:
        """Nothing of it is wanted any more."""
        kept = self.folder.glob("kept-*.safetensors") if self.processes.writes else ()
        for path in (self.path, *kept):
            path.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"kept-{name}.safetensors"

    def _is_worth(self, seconds: float, size: int) -> bool:
        if seconds < max(LEAST_SECONDS, WORTH * size / self._rate):
            return False
        return shutil.disk_usage(self.folder).free >= size + self.room

    def _write(self, path: Path, tensors: Mapping[str, Tensor | Readable]) -> None:
        temporary = path.with_suffix(".tmp")
        began = time.perf_counter()
        try:
            write_one_by_one(temporary, tensors)
            put_in_place(temporary, path)
        except OSError:  # the run does without
            self._behind = -math.inf
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
        self._rate = max(1, sum(_size(each) for each in tensors.values())) / (time.perf_counter() - began)


def _size(tensor: Tensor | Readable) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _kind(entry: Entry) -> tuple[torch.dtype | None, list[int]]:
    return DTYPES.get(entry.dtype), entry.shape
