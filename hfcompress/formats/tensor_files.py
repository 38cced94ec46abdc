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
"""The bytes of a safetensors file, for files that are not to be in memory whole."""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


class Readable(Protocol):
    """A tensor, or something that gives one when it is read."""

    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor."""
        ...


@dataclass(frozen=True)
class Entry:
    """
    One tensor inside a file.

    Args:
        name (`str`): its name.
        dtype (`str`): as safetensors call it.
        shape (`list[int]`): its shape.
        size (`int`): its bytes.
        path (`Path`): the file.
        start (`int`): where its bytes begin there.
    """

    name: str
    dtype: str
    shape: list[int]
    size: int
    path: Path = Path()
    start: int = 0


def entries_of(path: Path) -> list[Entry]:
    """What lies in a safetensors file, told by its header."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    entries = []
    for name, value in header.items():
        if name != "__metadata__":
            begin, end = value["data_offsets"]
            entries.append(Entry(name, value["dtype"], value["shape"], end - begin, path, 8 + length + begin))
    return entries


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
            return file.seek(0, os.SEEK_END) == 8 + length + max(ends, default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error, MemoryError):
        return False


def alignment(entry: Entry) -> tuple[int, str]:
    """Widest dtypes first, so that every tensor is aligned."""
    return -DTYPE_BYTES.get(entry.dtype, 1), entry.name


def header_of(entries: list[Entry]) -> bytes:
    """What comes before the bytes of the entries."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def write_one_by_one(path: Path, tensors: Mapping[str, Tensor | Readable]) -> None:
    """
    A safetensors file of tensors that are brought to the CPU, and read where they are not in memory, one after the other.

    Args:
        path (`Path`): the file; it is not yet sure to be on disk.
        tensors (`Mapping[str, Tensor or Readable]`): of one dtype.
    """
    entries = []
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        entries.append(Entry(name, SAFETENSORS_NAMES[tensor.dtype], list(tensor.shape), size))
    with open(path, "wb") as file:
        file.write(header_of(entries))
        for tensor in tensors.values():
            value = tensor if isinstance(tensor, Tensor) else tensor.read()
            file.write(memoryview(value.detach().to("cpu").contiguous().view(torch.uint8).flatten().numpy()))


def read_entry(file: FileIO, entry: Entry) -> Tensor:
    """
    One tensor, by calls: the pages of a memory map would count as this process's memory.

    Args:
        file (`FileIO`): the file in which the entry lies, open without a buffer.
        entry (`Entry`): the tensor.
    """
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    fill(tensor, file, entry.start)
    return tensor


def fill(tensor: Tensor, file: FileIO, start: int) -> None:
    """
    Fill a contiguous tensor on the CPU with the bytes of a file that begin at `start`.

    Raises:
        EOFError: there are too few of them.
    """
    left = memoryview(tensor.view(torch.uint8).flatten().numpy())
    file.seek(start)
    while left:
        count = file.readinto(left)
        if not count:
            raise EOFError(f"{file.name} has been cut short")
        left = left[count:]
