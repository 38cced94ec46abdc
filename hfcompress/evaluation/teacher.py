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
The baseline's next-token distributions: computed beside the candidate's, or read from a disk cache that any number of
candidates share.

The cache keeps, per position, the largest log-probabilities with their ids, the mass of the rest, and the target's
log-probability. With a vocabulary of at most `WHOLE` every log-probability is kept and nothing is lost; with a larger
one the divergence is that of the distributions with the rest as one outcome, a lower bound by the log-sum inequality
(Cover and Thomas 2006, theorem 2.7.1). It lies in a folder named after everything that it depends on, one file per
batch, and counts only once `teacher.json` is there.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.formats.writer import disk_errors, write_json


WHOLE = 4096  # vocabularies up to this size are kept whole
TOP_K = 256


@dataclass(frozen=True)
class Distributions:
    """
    What the baseline says at some positions.

    Args:
        log_probs (`Tensor`): float32 `(positions, k)`, of the tokens `ids`, or of the whole vocabulary.
        target (`Tensor`): float32 `(positions,)`, the log-probability of the token that follows.
        ids (`Tensor` or `None`): int64 `(positions, k)`, the most probable first; `None` for the whole vocabulary.
        tail (`Tensor` or `None`): float32 `(positions,)`, the log of the mass that `ids` leave out.
    """

    log_probs: Tensor
    target: Tensor
    ids: Tensor | None = None
    tail: Tensor | None = None

    def __getitem__(self, part: slice) -> "Distributions":
        """Some of the positions."""
        return Distributions(**{name: tensor[part] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names, those that are there."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @classmethod
    def joined(cls, parts: "list[Distributions]") -> "Distributions":
        """The positions of all parts, one after the other."""
        columns = [part.tensors() for part in parts]
        return cls(**{name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    def divergence(self, candidate: Tensor) -> Tensor:
        """
        KL(baseline || candidate) in nats: `(positions,)`.

        Args:
            candidate (`Tensor`): log-probabilities `(positions, vocabulary)`.
        """
        if self.ids is None or self.tail is None:
            return (self.log_probs.exp() * (self.log_probs - candidate)).sum(-1)
        ours = candidate.gather(-1, self.ids)
        head = (self.log_probs.exp() * (self.log_probs - ours)).sum(-1)
        rest = (1 - ours.double().exp().sum(-1)).clamp(min=1e-12).log()
        return (head + self.tail.exp() * (self.tail - rest)).float()

    def best(self) -> tuple[Tensor, Tensor]:
        """The most probable token and its probability: `(positions,)` each."""
        top = self.log_probs.max(-1)
        best = top.indices if self.ids is None else self.ids.gather(-1, top.indices[:, None])[:, 0]
        return best, top.values.exp()

    def kept(self) -> "Distributions":
        """What the cache keeps of them."""
        vocabulary = self.log_probs.shape[-1]
        if vocabulary <= WHOLE:
            return self
        top = self.log_probs.topk(TOP_K)
        rest = (1 - top.values.double().exp().sum(-1)).clamp(min=1e-12).log().float()
        return Distributions(top.values, self.target, top.indices, rest)


class TeacherCache:
    """
    Args:
        folder (`Path`): holds any number of caches.
        key (`dict`): everything that the distributions depend on.
        batches (`int`): how many there will be.
    """

    def __init__(self, folder: Path, key: dict[str, Any], batches: int):
        self.key = {**key, "batches": batches, "whole": WHOLE, "top_k": TOP_K}
        self.batches = batches
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:32]
        with disk_errors(folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        with contextlib.suppress(ValueError, OSError):
            return json.loads((self.folder / "teacher.json").read_text()) == self.key
        return False

    def described(self, vocabulary: int) -> str:
        """What divergences from it are worth."""
        if vocabulary <= WHOLE:
            return "cached: every log-probability"
        return f"cached: the {TOP_K} largest log-probabilities and the mass of the rest, so KL is a lower bound"

    def write(self, index: int, distributions: Distributions) -> None:
        """Keep batch `index`."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in distributions.tensors().items()}
        temporary = self._path(index).with_suffix(".tmp")
        with disk_errors(self.folder):
            save_file(tensors, temporary)
            temporary.replace(self._path(index))

    def finish(self) -> None:
        """Everything has been written."""
        write_json(self.folder / "teacher.json", self.key)

    def read(self, index: int, device: torch.device) -> Distributions:
        """
        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            tensors = load_file(self._path(index))
        except Exception as error:
            raise CheckpointError(f"The teacher cache {self.folder} is damaged; delete that folder.") from error
        return Distributions(**{name: tensor.to(device) for name, tensor in tensors.items()})

    def _path(self, index: int) -> Path:
        return self.folder / f"batch-{index:05d}.safetensors"
