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
Experts that lie together on disk, one tensor for each projection of a block: read one by one, and written together again.

Where transformers merges the matrices of experts while loading, a checkpoint may hold them either way, and is written with one
tensor for each. Where it does not (gpt-oss, Granite), it finds them together alone, and so they are written, unless a format
brings a reader that merges them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.models.checkpoint import TensorView, entry_of


@dataclass(frozen=True)
class Fused:
    """
    A parameter of transformers' that holds a matrix, or a bias, of every expert of a block.

    Args:
        name (`str`): of the parameter.
        key (`str`): its name on disk, as transformers writes it.
        shape (`tuple[int, ...]`): of the parameter: `(experts, ...)`.
        parts (`tuple[str, ...]`): what each expert has in it, in order, by local names: `gate_proj.weight`, `up_proj.weight`.
        transposed (`bool`): whether its matrices are `(in_features, out_features)`.
        interleaved (`bool`): whether rows of the parts take turns, instead of lying behind one another.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    transposed: bool
    interleaved: bool

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of each part of an expert: `(out_features, in_features)`, or `(out_features,)`."""
        _, *own = self.shape
        own = own[::-1] if self.transposed else own
        return own[0] // len(self.parts), *own[1:]

    @property
    def holder(self) -> str:
        """The module that holds the experts."""
        return self.name.rpartition(".")[0]

    def names(self, index: int) -> list[str]:
        """The names of the parts of one expert."""
        return [f"{self.holder}.{index}.{part}" for part in self.parts]

    def is_part(self, tensor: Tensor | None) -> bool:
        """Whether this is a part of an expert as it is computed with, and not some code of it."""
        return tensor is not None and tensor.is_floating_point() and tuple(tensor.shape) == self.part_shape

    def part(self, entry: Tensor, number: int) -> Tensor:
        """
        A part of an expert.

        Args:
            entry (`Tensor`): what the parameter has of the expert; a matrix may be transposed on disk.
            number (`int`): which part.

        Raises:
            CheckpointError: it is of another shape.
        """
        if entry.ndim == 2 and tuple(entry.T.shape) == self.shape[1:] != tuple(entry.shape):
            entry = entry.T
        if tuple(entry.shape) != self.shape[1:]:
            raise CheckpointError(
                f"{self.key} has {list(entry.shape)} for an expert, and {list(self.shape[1:])} are needed; the checkpoint is "
                "damaged, or of another model."
            )
        rows, count = entry.T if self.transposed else entry, len(self.parts)
        return rows[number::count] if self.interleaved else rows.chunk(count)[number]

    def whole(self, experts: Iterable[Sequence[Tensor]]) -> Tensor:
        """The parameter, of the parts of every expert."""
        entries = []
        for parts in experts:
            rows = torch.stack([*parts], 1).flatten(0, 1) if self.interleaved else torch.cat([*parts])
            entries.append(rows.T if self.transposed else rows)
        return torch.stack(entries)


@dataclass(frozen=True)
class ExpertPart(TensorView):
    """
    A part of one expert; see [`hfcompress.models.checkpoint.StoredTensor`].

    Args:
        stored: the tensor that holds those of all experts.
        fused (`Fused`): how it does.
        index (`int`): which expert.
        number (`int`): which part.
    """

    fused: Fused
    index: int
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fused.part_shape

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes // (self.fused.shape[0] * len(self.fused.parts))

    def read(self) -> Tensor:
        """`(out_features, in_features)`, or `(out_features,)` of a bias."""
        return self.fused.part(entry_of(self.stored, self.index), self.number).contiguous()

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


class ExpertStorage:
    """
    Args:
        held (`Iterable[Fused]`): the parameters that hold the experts of a model, or none.
        together (`bool`): whether transformers finds them in a checkpoint together alone.
    """

    def __init__(self, held: Iterable[Fused] = (), together: bool = False):
        self.held, self.together = tuple(held), together

    @property
    def biases(self) -> "ExpertStorage":
        """Without the weights, where a reader puts these together itself."""
        return ExpertStorage([fused for fused in self.held if fused.parts[0].endswith(".bias")], self.together)

    def apart(self, tensors: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        """
        A view of a checkpoint in which every expert has tensors of its own.

        Args:
            tensors (`Mapping`): name on disk -> stored tensor.
            names (`Mapping[str, str]`): name on disk -> parameter.

        Raises:
            CheckpointError: a tensor holds another number of experts.
        """
        known, view = {fused.name: fused for fused in self.held}, {}
        for key, stored in tensors.items():
            fused = known.get(names[key])
            if fused is None:
                view[key] = stored
                continue
            if stored.shape[0] != fused.shape[0]:
                raise CheckpointError(
                    f"{key} holds {stored.shape[0]} experts, and config.json says {fused.shape[0]}; the checkpoint is damaged or "
                    "of another model."
                )
            for index in range(fused.shape[0]):
                own = enumerate(fused.names(index))
                view |= {name: ExpertPart(stored, fused, index, number) for number, name in own}
        return view

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as they are written -> those of every expert; others as they are."""
        found, known = {}, {fused.key: fused for fused in self.held}
        for key, tensor in tensors.items():
            fused = known.get(key)
            if fused is None:
                found[key] = tensor
                continue
            for index, entry in enumerate(tensor):
                own = enumerate(fused.names(index))
                found |= {name: fused.part(entry, number).contiguous() for number, name in own}
        return found

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of every expert -> as they are written; where some are coded in some way, they stay apart."""
        found, counts = dict(tensors), self._counts(tensors)
        for fused in self.held:
            names = [fused.names(index) for index in range(counts.get(fused.holder, 0))]
            if names and all(fused.is_part(found.get(name)) for own in names for name in own):
                found[fused.key] = fused.whole([found.pop(name) for name in own] for own in names)
        return found

    def _counts(self, keys: Iterable[str]) -> dict[str, int]:
        """How many experts of each module are among what is written."""
        if not self.together:
            return {}
        holders, counts = {fused.holder for fused in self.held}, {}
        for found in (re.match(r"(.*)[.](\d+)[.]\w+[.]\w+$", key) for key in keys):
            if found is not None and found.group(1) in holders:
                counts[found.group(1)] = max(counts.get(found.group(1), 0), int(found.group(2)) + 1)
        return counts
