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
the blocks) is a safetensors file of its own, written under a temporary name and renamed. At the end it is noted which
bytes of which part go where, they are copied into shards a few megabytes at a time, and a part is deleted as soon as all
of it is in shards. The folder gets its final name when all is there.
"""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfcompress.errors import InvalidValueError, OutputError
from hfcompress.formats.tensor_files import SAFETENSORS_NAMES, Entry, alignment, entries_of, header_of, is_whole
from hfcompress.models.fused_experts import ExpertStorage


MAX_SHARD_BYTES = 5_000_000_000
COPY_BYTES = 1 << 24
MERGING = "merging.json"


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
        experts (`ExpertStorage`): how the model's experts are stored; parts are given and read with every expert apart.
    """

    def __init__(self, output: Path, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.output = output
        self.partial = partial_path(output)
        self.result = self.partial / "result"
        self.parts = self.partial / "parts"
        self.max_shard_bytes = max_shard_bytes
        self.lock = FileLock(lock_path(output), timeout=0)
        self.experts = ExpertStorage()

    @property
    def merged(self) -> bool:
        """Whether an earlier run has turned all parts into shards."""
        return any(self.result.glob("model*.safetensors")) and not any(self.parts.glob("*.safetensors"))

    @property
    def merging(self) -> bool:
        """Whether an earlier run has begun to turn parts into shards, so that some may be gone."""
        return (self.partial / MERGING).is_file()

    def claim(self) -> None:
        """
        Keep other runs away from the output until [`release`], or until this process ends, however it does.

        Raises:
            OutputError: another run is at work there.
        """
        with disk_errors(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire()
            except Timeout as error:
                raise OutputError(
                    f"Another run is writing {self.output}; wait until it ends, or choose another --output."
                ) from error

    def release(self) -> None:
        """Let other runs at the output; does nothing where it was not claimed."""
        if self.lock.is_locked:
            with contextlib.suppress(OSError):  # some systems keep an open file
                lock_path(self.output).unlink()
            self.lock.release()

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
        self._write(self.part(name), self.experts.join(tensors))

    def read_part(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part that was written before."""
        return self.experts.split(load_file(self.part(name)))

    def holds(self, name: str) -> bool:
        """Whether part `name` is there and whole."""
        return is_whole(self.part(name))

    def require_whole(self) -> None:
        """
        Raises:
            OutputError: a shard is not as long as it says.
        """
        for shard in sorted(self.result.glob("model*.safetensors")):
            if not is_whole(shard):
                raise OutputError(f"{shard} has been cut short; start again with --overwrite.")

    def write_stage(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write what a later stage will put into the parts; it is there whole or not at all, and no part itself."""
        self._write(self.partial / f"{name}.safetensors", tensors)

    def read_stage(self, name: str) -> dict[str, Tensor]:
        """The tensors of a stage that was written before."""
        return load_file(self.partial / f"{name}.safetensors")

    def holds_stage(self, name: str) -> bool:
        """Whether stage `name` is there and whole."""
        return is_whole(self.partial / f"{name}.safetensors")

    def _write(self, final: Path, tensors: dict[str, Tensor]) -> None:
        temporary = final.with_suffix(".tmp")
        with disk_errors(self.output):
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            put_in_place(temporary, final)

    def write_json(self, name: str, value: dict) -> None:
        """Write a JSON file into the result."""
        write_json(self.result / name, value)

    def write_beside(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a file of tensors that are none of the model's weights into the result."""
        with disk_errors(self.output):
            (self.result / name).parent.mkdir(parents=True, exist_ok=True)
        self._write(self.result / name, tensors)

    def copy(self, source: Path, name: Path) -> None:
        """Copy a file into the result."""
        target = self.result / name
        with disk_errors(self.output):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def merge(self) -> None:
        """
        Turn the parts into `model.safetensors`, or into shards with an index; on the disk there is never more than one
        shard beside them.

        Raises:
            OutputError: a part is gone or has been cut short, or what was noted is damaged.
        """
        if not self.parts.exists():
            return
        for leftover in self.parts.glob("*.tmp"):
            leftover.unlink()
        shards = self._planned()
        with disk_errors(self.output):
            if len(shards) > 1:
                weight_map = {e.name: name for name, shard in shards.items() for e in shard}
                total = {"total_size": sum(e.size for shard in shards.values() for e in shard)}
                self.write_json("model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
            left = list(shards.items())
            while left:
                name, shard = left.pop(0)
                if not is_whole(self.result / name):
                    _write_shard(self.result / name, shard)
                needed = {e.path for _, later in left for e in later}
                for path in {e.path for e in shard} - needed:
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.parts)
            (self.partial / MERGING).unlink()

    def _planned(self) -> "dict[str, list[Entry]]":
        """What goes into which shard: settled now, or by an earlier run that had begun."""
        note = self.partial / MERGING
        if note.is_file():
            try:
                told = {Path(n).name: [Entry(**e) for e in shard] for n, shard in json.loads(note.read_text()).items()}
                return {n: [replace(e, path=self.parts / Path(e.path).name) for e in own] for n, own in told.items()}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise OutputError(f"{note} is damaged; start again with --overwrite.") from error
        entries = [e for path in sorted(self.parts.glob("*.safetensors")) for e in entries_of(path)]
        shards = _shards(entries, self.max_shard_bytes)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        planned = dict(zip(names, shards, strict=True))
        write_json(
            note, {name: [{**asdict(e), "path": e.path.name} for e in shard] for name, shard in planned.items()}
        )
        return planned

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


def lock_path(output: Path) -> Path:
    """The file that a run on `output` holds locked."""
    return output.parent / f".{output.name}.lock"


def partial_path(output: Path) -> Path:
    """Where the unfinished work for `output` lies."""
    return output.parent / f".{output.name}.partial"


def check_output(output: Path, resume: bool, overwrite: bool, source: Path | None = None) -> None:
    """
    Raises:
        OutputError: the folder is there, or unfinished work is, and nothing was said of it.
    """
    if resume and overwrite:
        raise InvalidValueError("--resume goes on and --overwrite starts again; give one of them.")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; choose another --output.")
    inside = next((parent for parent in output.parents if parent.exists()), output)
    if not inside.is_dir():
        raise OutputError(f"{inside} is a file, so {output} cannot be made; choose another --output.")
    if source is not None and (output.resolve() in (source, *source.parents) or source in output.resolve().parents):
        raise OutputError(f"{output} is, holds or lies in the model's own folder; choose another --output.")
    if output.is_dir() and any(output.iterdir()):
        if overwrite and output.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise OutputError(f"{output} is or holds the working folder; choose another --output.")
        if not overwrite and not (resume and partial_path(output).exists()):
            raise OutputError(f"{output} exists already; give --overwrite to replace it, or choose another --output.")
    if output.is_mount():
        raise OutputError(f"{output} is a mount point, which cannot be replaced; choose a folder in it for --output.")
    if partial_path(output).exists() and not (resume or overwrite):
        raise OutputError(
            f"There is unfinished work for {output} in {partial_path(output)}; "
            "go on with --resume, or start again with --overwrite."
        )


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a file that was written, both it and its new name being on disk before anything that comes later."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
        put_in_place(temporary, path)


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def merged_bytes(parts: Iterable[Mapping[str, Any]], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """
    What all shards will take, headers included, told from the shapes alone.

    Args:
        parts (`Iterable[Mapping]`): name -> tensor, stored or not, of which only shape, dtype and bytes are looked at, in the order in
            which the parts are merged.
        max_shard_bytes (`int`, *optional*): as in [`CheckpointWriter`].
    """
    entries = []
    for part in parts:
        own = [Entry(n, SAFETENSORS_NAMES[t.dtype], list(t.shape), t.nbytes) for n, t in part.items()]
        entries += sorted(own, key=alignment)
    shards = _shards(entries, max_shard_bytes)
    return sum(len(header_of(sorted(shard, key=alignment))) + sum(e.size for e in shard) for shard in shards)


def _shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return shards


def _write_shard(path: Path, entries: list[Entry]) -> None:
    entries = sorted(entries, key=alignment)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as target, contextlib.ExitStack() as stack:
        target.write(header_of(entries))
        try:
            sources = {p: stack.enter_context(open(p, "rb")) for p in {e.path for e in entries}}
        except FileNotFoundError as error:
            raise OutputError(f"{error.filename} is gone; start again with --overwrite.") from error
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
    put_in_place(temporary, path)
