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
A teacher's distributions on disk: written once, heard by any number of students.

A folder named after all that they depend on (the teacher's weights and revision, its tokenizer, the tokens, what is kept)
holds shards of whole rows, each written whole or not at all, so that a run that was stopped goes on where it was. It
counts only once `teacher.json` is there.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hfcompress.calibration.tokens import Tokens
from hfcompress.distillation.signals import CACHED
from hfcompress.errors import CheckpointError
from hfcompress.formats.writer import disk_errors, write_json
from hfcompress.models.batch import Batch
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.vocabulary import tokenizer_hash
from hfcompress.progress import Progress


SHARD_TOKENS = 4096
POSITIONS = 512  # whose logits exist at a time
DONE = "teacher.json"


class Speaker(Protocol):
    """A teacher that is asked."""

    @property
    def described(self) -> dict[str, Any]:
        """What its answers depend on."""
        ...

    def say(self, batches: list[Batch]) -> Iterator[dict[str, Tensor]]:
        """What is kept of its distributions for each batch, `(rows, seq_len, ...)`."""
        ...


class StreamedTeacher:
    """
    A model of which one block is in memory at a time; it is streamed once, however much it is asked.

    Args:
        model (`StreamedModel`): the teacher.
        kind (`str`): of [`hfcompress.distillation.signals.CACHED`].
        size (`int`): tokens kept for each position.
        seed (`int`): of what is drawn.
    """

    def __init__(self, model: StreamedModel, kind: str, size: int, seed: int):
        self.model, self.kind, self.size, self.seed = model, kind, size, seed

    @property
    def described(self) -> dict[str, Any]:
        """The weights, their revision, the tokenizer and the arithmetic."""
        checkpoint = self.model.checkpoint
        return {
            "teacher": checkpoint.sha256,
            "revision": checkpoint.revision,
            "tokenizer": tokenizer_hash(checkpoint.tokenizer),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def say(self, batches: list[Batch]) -> Iterator[dict[str, Tensor]]:
        """What is kept of its distributions for each batch."""
        streams = self.model.forward_blocks(self.model.embed(batches))
        with self.model.outside(head=True) as model:
            for stream in streams:
                digest = hashlib.sha256(stream.batch.input_ids.numpy().tobytes()).digest()
                generator = torch.Generator().manual_seed(self.seed + int.from_bytes(digest[:4], "big"))
                parts = [
                    CACHED[self.kind].of(self.model.head_logits(model, hidden), self.size, generator)
                    for hidden in stream.hidden.split(POSITIONS, 1)
                ]
                yield {name: torch.cat([p[name].cpu() for p in parts], 1) for name in parts[0]}


class HeardRows(Dataset):
    """
    Rows of tokens, and what is kept of the teacher's distributions there; a shard at a time in memory.

    Args:
        folder (`Path`): holds any number of teachers.
        teacher (`Speaker`): the teacher.
        tokens (`Tokens`): the rows.
        kind (`str`): of [`hfcompress.distillation.signals.CACHED`].
        size (`int`): tokens kept for each position.
        seed (`int`): of what is drawn.
    """

    def __init__(self, folder: Path, teacher: Speaker, tokens: Tokens, kind: str, size: int, seed: int):
        batch = tokens.batch()
        self.input_ids, self.mask, self.kind, self.teacher = batch.input_ids, batch.mask, kind, teacher
        self.per_shard = max(1, SHARD_TOKENS // self.input_ids.shape[1])
        self.key = {
            **teacher.described,
            "tokens": tokens.sha256,
            "kind": kind,
            "size": size,
            "seed": seed if kind == "sampled" else None,
            "rows": len(self.input_ids),
            "rows_per_shard": self.per_shard,
        }
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:32]
        self._open: tuple[int, dict[str, Tensor]] | None = None

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        try:
            return json.loads((self.folder / DONE).read_text()) == self.key
        except (ValueError, OSError):
            return False

    @property
    def shards(self) -> list[slice]:
        """The rows of each."""
        starts = range(0, len(self.input_ids), self.per_shard)
        return [slice(start, min(start + self.per_shard, len(self.input_ids))) for start in starts]

    def fill(self, tokens: Tokens, progress: Progress) -> None:
        """Ask the teacher for what is missing."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number in range(len(self.shards)) if not self._path(number).exists()]
        if missing:
            said = self.teacher.say([tokens.batch(self.shards[number]) for number in missing])
            for number, tensors in zip(missing, said, strict=True):
                progress.step(f"distill: writing down what the teacher says, {number + 1}", amount=0)
                self._write(number, tensors)
        write_json(self.folder / DONE, self.key)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, place = divmod(index, self.per_shard)
        if self._open is None or self._open[0] != number:
            self._open = number, self._read(number)
        told = {f"teacher_{name}": tensor[place] for name, tensor in self._open[1].items()}
        row = {"input_ids": self.input_ids[index], **told}
        return row if self.mask is None else {**row, "mask": self.mask[index]}

    def split(self, rows: Tensor) -> "tuple[Subset, Subset]":
        """Those that `rows` names (int64 `(n,)`), and the others."""
        chosen: Sequence[int] = rows.sort().values.tolist()
        return Subset(self, chosen), Subset(self, sorted(set(range(len(self))) - set(chosen)))

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        path = self._path(number)
        with disk_errors(self.folder):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)

    def _read(self, number: int) -> dict[str, Tensor]:
        try:
            return load_file(self._path(number))
        except Exception as error:
            raise CheckpointError(f"The teacher cache {self.folder} is damaged; delete that folder.") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"rows-{number:05d}.safetensors"
