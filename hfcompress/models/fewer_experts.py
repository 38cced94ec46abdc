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
"""A checkpoint with fewer experts in every block: the same tensors under the names that they then have, and fewer rows of routers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.checkpoint import Checkpoint, TensorView
from hfcompress.models.experts import EXPERT_KEYS, find_experts
from hfcompress.models.shallow import changed_config, nested, reason_of, stored_key
from hfcompress.models.streaming import StreamedModel, build_skeleton


@dataclass(frozen=True)
class ChosenTensor(TensorView):
    """
    Some entries of a tensor along a dimension; see [`hfcompress.models.checkpoint.StoredTensor`].

    Args:
        stored: the whole.
        dim (`int`): along which.
        chosen (`tuple[int, ...]`): which, ascending.
    """

    dim: int
    chosen: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        whole = tuple(self.stored.shape)
        return (*whole[: self.dim], len(self.chosen), *whole[self.dim + 1 :])

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes // self.stored.shape[self.dim] * len(self.chosen)

    def read(self) -> Tensor:
        """The chosen part; a copy."""
        return self.stored.read().index_select(self.dim, torch.tensor(self.chosen))

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def experts_of(model: StreamedModel) -> int:
    """
    How many experts a block has.

    Raises:
        UnsupportedModelError: it is no mixture, or its blocks differ.
    """
    counts = {module.num_experts for module in find_experts(model.skeleton).values()}
    if len(counts) != 1:
        kind = "has blocks with different numbers of experts" if counts else "is no mixture of experts"
        raise UnsupportedModelError(f"{model.checkpoint.name} {kind}; leave prune.experts out.")
    return counts.pop()


def expert_changes(model: StreamedModel, count: int) -> dict[str, Any]:
    """
    What config.json must say of a model with so many experts in a block.

    Raises:
        UnsupportedModelError: transformers builds no such model.
    """
    config, whole = model.checkpoint.config, experts_of(model)
    text = config.get_text_config()
    key = next((key for key in EXPERT_KEYS if getattr(text, key, None) == whole), None)
    name = f"{model.checkpoint.name} ({type(model.skeleton).__name__})"
    if key is None:
        raise UnsupportedModelError(
            f"The configuration of {name} does not say how many experts there are; leave prune.experts out."
        )
    key = stored_key(text, key)
    changes = nested(config, {key: count})
    checkpoint = copy.copy(model.checkpoint)
    try:
        checkpoint.config = changed_config(config, changes)
        built = {module.num_experts for module in find_experts(build_skeleton(checkpoint, model.dtype)).values()}
    except (ValueError, RuntimeError, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"{name} cannot be built with {count} experts ({reason_of(error)}); take another share, or leave prune.experts out."
        ) from error
    if built != {count}:
        raise UnsupportedModelError(f"{name} has {whole} experts whatever {key} says; leave prune.experts out.")
    return changes


def expert_groups(model: StreamedModel) -> int:
    """In how many groups, as large as one another, a router chooses: as many experts of each must stay."""
    return int(getattr(model.skeleton.config.get_text_config(), "n_group", None) or 1)


def fewer_experts(model: StreamedModel, kept: Mapping[str, Sequence[int]]) -> tuple[Checkpoint, dict[str, Any]]:
    """
    Args:
        model (`StreamedModel`): the whole model.
        kept (`Mapping[str, Sequence[int]]`): module that holds experts -> those that stay, ascending; as many for all.

    Returns:
        `tuple[Checkpoint, dict]`: the smaller checkpoint, whose tensors are read from the whole one, and what changes in
        config.json.

    Raises:
        UnsupportedModelError: something in it depends on the number of experts in a way that is not known.
    """
    count, whole = len(next(iter(kept.values()))), experts_of(model)
    small, changes = copy.copy(model.checkpoint), expert_changes(model, count)
    small.config = changed_config(model.checkpoint.config, changes)
    built = build_skeleton(small, model.dtype).state_dict()
    stored = set(model.sources.values())
    tensors = {key: tensor for key, tensor in model.tensors.items() if key not in stored}
    for name, key in model.sources.items():
        holder = next((each for each in kept if name.startswith(f"{each}.")), None)
        if holder is None:
            beside = next((each for each in kept if name.startswith(f"{each.rpartition('.')[0]}.")), None)
            tensors[key] = _fitting(model, name, built, None if beside is None else kept[beside], whole)
            continue
        number, _, local = name.removeprefix(f"{holder}.").partition(".")
        if int(number) in kept[holder]:
            place = kept[holder].index(int(number))
            tensors[key.removesuffix(f"{number}.{local}") + f"{place}.{local}"] = model.tensors[key]
    small.tensors = tensors
    return small, changes


def _fitting(
    model: StreamedModel, name: str, built: Mapping[str, Tensor], kept: Sequence[int] | None, whole: int
) -> Any:
    """A tensor as the smaller model has it: what has an entry for every expert keeps those of the experts that stay."""
    stored = model.tensors[model.sources[name]]
    if name not in built or tuple(stored.shape) == tuple(built[name].shape):
        return stored
    differing = [dim for dim, size in enumerate(stored.shape) if built[name].shape[dim] != size]
    if kept is None or len(differing) != 1 or stored.shape[differing[0]] != whole:
        raise UnsupportedModelError(
            f"{name} depends on the number of experts in a way that is not known; leave prune.experts out."
        )
    return ChosenTensor(stored, differing[0], tuple(kept))
