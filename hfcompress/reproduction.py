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
"""Whether a recipe that was run again gave the same checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.manifest import read_manifest


CIRCUMSTANCES = ("hfcompress", "dtype", "processes", "seed")


@dataclass(frozen=True)
class Verification:
    """
    Args:
        tensors (`int`): how many were compared.
        differing (`list[str]`): names of those that are not the same bit for bit, or are in one of the two only.
        circumstances (`list[str]`): what else differs, such as a library's version, with both values.
    """

    tensors: int
    differing: list[str] = field(default_factory=list)
    circumstances: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return not self.differing


def verify(again: Path, original: Path) -> Verification:
    """
    Compare two compressed checkpoints tensor by tensor.

    Args:
        again (`Path`): what the recipe gave now.
        original (`Path`): the checkpoint that carried it.
    """
    ours, theirs = (Checkpoint.open(folder).tensors for folder in (again, original))
    names = sorted({*ours, *theirs})
    differing = [n for n in names if n not in ours or n not in theirs or not _same(ours[n].read(), theirs[n].read())]
    return Verification(len(names), differing, _differences(read_manifest(again), read_manifest(original)))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    pairs: dict[str, tuple[Any, Any]] = {key: (now.get(key), then.get(key)) for key in CIRCUMSTANCES}
    ours, theirs = (str(manifest.get("device")).partition(":")[0] for manifest in (now, then))
    pairs["device"] = (ours, theirs)
    versions = {*now["versions"], *then["versions"]}
    pairs |= {name: (now["versions"].get(name), then["versions"].get(name)) for name in sorted(versions)}
    for key, label in (("calibration", "the calibration data"), ("base", "the base model")):
        ours, theirs = ((manifest[key] or {}).get("sha256") for manifest in (now, then))
        pairs[label] = (ours and ours[:16], theirs and theirs[:16])
    return [f"{name} ({ours} now, {theirs} then)" for name, (ours, theirs) in pairs.items() if ours != theirs]
