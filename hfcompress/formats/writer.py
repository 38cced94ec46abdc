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
"""The writer of a checkpoint folder: parts as they come, shards at the end, one rename when all is there.

How it works: everything happens in `.NAME.partial` beside the final folder. Each part (a block, or what lies outside
the blocks) is a safetensors file of its own, written under a temporary name and renamed. At the end the parts' bytes
are copied into shards a few megabytes at a time, and then the parts are deleted. The folder gets its final name when
all is there.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import struct
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfcompress.errors import OutputError


MAX_SHARD_BYTES = 5_000_000_000
COPY_BYTES = 1 << 24
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}


@contextlib.contextmanager
def disk_errors(path: Path):
    """A full disk, a folder that is not writable and a file in a folder's place, as one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)
        if (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or "os error 28" in text
            or "os error 122" in text
        ):
            raise OutputError(f"The disk of {path} is full; free some space, or choose another --output.") from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS or "os error 13" in text:
            raise OutputError(f"{path} is not writable; choose another --output.") from error
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            raise OutputError(f"{path} cannot be a folder: a file is in its place; choose another one.") from error
        raise


class CheckpointWriter:
    """
    Args:
        output (`Path`): the final folder.
        max_shard_bytes (`int`, *optional*): shards are no larger than this, unless one tensor is.

    Attributes:
        partial (`Path`): where unfinished work lies.
        result (`Path`): the folder that becomes `output`.
    """

    def __init__(self, output: Path, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.output = output
        self.partial = partial_path(output)
        self.result = self.partial / "result"
        self.parts = self.partial / "parts"
        self.max_shard_bytes = max_shard_bytes

    @property
    def merged(self) -> bool:
        """Whether an earlier run has turned all parts into shards."""
        return any(self.result.glob("model*.safetensors")) and not any(self.parts.glob("*.safetensors"))

    def open(self) -> None:
        """Make the folders."""
        with disk_errors(self.output):
            self.parts.mkdir(parents=True, exist_ok=True)
            self.result.mkdir(exist_ok=True)

    def part(self, name: str) -> Path:
        """Where part `name` lies or will lie."""
        return self.parts / f"{name}.safetensors"

    def write_part(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write one part; it is there whole or not at all."""
        self._write(self.part(name), tensors)

    def read_part(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part that was written before."""
        return load_file(self.part(name))

    def write_stage(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write what a later stage will put into the parts; it is there whole or not at all, and no part itself."""
        self._write(self.partial / f"{name}.safetensors", tensors)

    def read_stage(self, name: str) -> dict[str, Tensor]:
        """The tensors of a stage that was written before."""
        return load_file(self.partial / f"{name}.safetensors")

    def _write(self, final: Path, tensors: dict[str, Tensor]) -> None:
        temporary = final.with_suffix(".tmp")
        with disk_errors(self.output):
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)

    def write_json(self, name: str, value: dict) -> None:
        """Write a JSON file into the result."""
        write_json(self.result / name, value)

    def copy(self, source: Path, name: Path) -> None:
        """Copy a file into the result."""
        target = self.result / name
        with disk_errors(self.output):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def merge(self) -> None:
        """Turn the parts into `model.safetensors`, or into shards with an index."""
        if not self.parts.exists():
            return
        for leftover in self.parts.glob("*.tmp"):
            leftover.unlink()
        entries = [e for path in sorted(self.parts.glob("*.safetensors")) for e in _entries(path)]
        shards = _shards(entries, self.max_shard_bytes)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        with disk_errors(self.output):
            for name, shard in zip(names, shards, strict=True):
                _write_shard(self.result / name, shard)
            if len(shards) > 1:
                weight_map = {e.name: n for n, shard in zip(names, shards, strict=True) for e in shard}
                total = {"total_size": sum(e.size for e in entries)}
                self.write_json("model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
            done = self.partial / "merged"
            os.replace(self.parts, done)  # from here on the shards are all there
            shutil.rmtree(done)

    def finish(self) -> None:
        """Give the folder its final name; what was there before is replaced."""
        with disk_errors(self.output):
            replaced = self.partial / "replaced"
            if self.output.exists():
                os.replace(self.output, replaced)
            os.replace(self.result, self.output)
            shutil.rmtree(self.partial)

    def discard(self) -> None:
        """Remove all unfinished work."""
        shutil.rmtree(self.partial, ignore_errors=True)


def partial_path(output: Path) -> Path:
    """Where the unfinished work for `output` lies."""
    return output.parent / f".{output.name}.partial"


def write_json(path: Path, value: dict) -> None:
    """Write JSON that is there whole or not at all; what is not a finite number is null."""
    write_text(path, json_text(value))


def json_text(value: dict) -> str:
    """A document that every JSON reader takes: NaN and infinity are null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text that is there whole or not at all; a link is replaced, and what it leads to is left alone."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path.parent):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class _Entry:
    """One tensor inside a part: where its bytes lie."""

    def __init__(self, path: Path, name: str, header: dict, data_start: int):
        begin, end = header["data_offsets"]
        self.path, self.name, self.dtype, self.shape = path, name, header["dtype"], header["shape"]
        self.start, self.size = data_start + begin, end - begin


def _entries(path: Path) -> list[_Entry]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return [_Entry(path, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"]


def _shards(entries: list[_Entry], limit: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return shards


def _write_shard(path: Path, entries: list[_Entry]) -> None:
    """Header and bytes, widest dtypes first so that every tensor is aligned."""
    entries = sorted(entries, key=lambda e: (-DTYPE_BYTES.get(e.dtype, 1), e.name))
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
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as target, contextlib.ExitStack() as stack:
        target.write(struct.pack("<Q", len(encoded)) + encoded)
        sources = {p: stack.enter_context(open(p, "rb")) for p in {e.path for e in entries}}
        for entry in entries:
            source = sources[entry.path]
            source.seek(entry.start)
            left = entry.size
            while left:
                chunk = source.read(min(left, COPY_BYTES))
                if not chunk:
                    raise OutputError(f"{entry.path} has been cut short; start again with --overwrite.")
                target.write(chunk)
                left -= len(chunk)
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, path)
