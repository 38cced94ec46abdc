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
"""Smaller students made from a teacher: some of its blocks, or its architecture with other sizes."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hfcompress.errors import InvalidValueError, nearest
from hfcompress.models.architecture import auto_class
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.shallow import changed_config, nested, reason_of, shallow
from hfcompress.models.slicing import SlicedTensor
from hfcompress.models.streaming import StreamedModel


EVERY = "every"  # of the keys of a student's description the one that is no field of a configuration


@dataclass(frozen=True)
class MadeStudent:
    """
    Args:
        checkpoint (`Checkpoint`): the student; beside its weights belongs what lies beside the teacher's.
        changes (`Mapping`): what changes in the teacher's config.json.
        blocks (`tuple[int, ...]` or `None`): which of the teacher's blocks its own begin as; `None` if they are new.
    """

    checkpoint: Checkpoint
    changes: Mapping[str, Any]
    blocks: tuple[int, ...] | None


def make_student(teacher: StreamedModel, description: Mapping[str, Any], random: bool, seed: int) -> MadeStudent:
    """
    Args:
        teacher (`StreamedModel`): the teacher.
        description (`Mapping`): `every` alone (2: every second block, beginning with the first), or fields of its
            configuration with the values that they shall have.
        random (`bool`): as transformers begins a model of that architecture, by the `seed`; otherwise every weight begins
            as the leading rows and columns of the teacher's, of blocks that are evenly spread from its first to its last.

    Raises:
        InvalidValueError: there is no such model.
    """
    if EVERY in description:
        return _every(teacher, description)
    config, small = teacher.checkpoint.config, copy.copy(teacher.checkpoint)
    text = config.get_text_config()
    for key, value in description.items():
        _require_field(key, value, text.to_dict(), teacher.checkpoint.name)
    changes = _with_layers(text, description)
    try:
        small.config = changed_config(config, nested(config, changes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = auto_class(config).from_config(
                small.config, dtype=config.dtype, trust_remote_code=small.trust_remote_code
            )
    except (ValueError, StrictDataclassError, RuntimeError, TypeError, KeyError) as error:
        raise InvalidValueError(f"distill.student: transformers refuses such a model ({reason_of(error)}).") from error
    small.tensors = Checkpoint.open(fresh).tensors
    blocks = None
    if not random:
        small.tensors, blocks = _sliced(teacher, StreamedModel(small, "cpu", teacher.dtype))
    return MadeStudent(small, nested(config, changes), blocks)


def _require_field(key: str, value: Any, known: Mapping[str, Any], name: str) -> None:
    if key not in known:
        raise InvalidValueError(
            f"distill.student: the configuration of {name} has no '{key}'.{nearest(str(key), list(known))}"
        )
    if key == "vocab_size":
        raise InvalidValueError("distill.student: vocab_size stays, since a student speaks its teacher's tokens.")
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(known[key], int) and not isinstance(known[key], bool) and not (whole and value > 0):
        raise InvalidValueError(f"distill.student: {key} is {value!r}; it must be a whole number from 1.")


def _every(teacher: StreamedModel, description: Mapping[str, Any]) -> MadeStudent:
    every = description[EVERY]
    if len(description) > 1 or not isinstance(every, int) or not 2 <= every <= len(teacher):
        raise InvalidValueError(
            f"distill.student: 'every' stands alone, and is a whole number from 2 to {len(teacher)}, the blocks of "
            f"{teacher.checkpoint.name}."
        )
    kept = tuple(range(0, len(teacher), every))
    checkpoint, changes = shallow(teacher, kept)
    return MadeStudent(checkpoint, changes, kept)


def _with_layers(text, description: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, and every list with one entry for each block at the length that it then has."""
    changes = dict(description)
    before = text.num_hidden_layers
    after = changes.get(text.attribute_map.get("num_hidden_layers", "num_hidden_layers"), before)
    if isinstance(after, int) and 0 < after < before:
        for key, value in text.to_dict().items():
            if isinstance(value, list) and len(value) == before and key not in changes and key != "architectures":
                changes[key] = [value[index] for index in _spread(after, before)]
    return changes


def _spread(count: int, whole: int) -> tuple[int, ...]:
    """So many of the blocks, evenly spread from the first to the last."""
    if count == 1:
        return (0,)
    return tuple(round(number * (whole - 1) / (count - 1)) for number in range(count))


def _sliced(teacher: StreamedModel, student: StreamedModel) -> tuple[dict[str, Any], tuple[int, ...]]:
    """
    The student's tensors as parts of the teacher's.

    Raises:
        InvalidValueError: it is larger than the teacher somewhere.
    """
    if len(student) > len(teacher):
        raise _larger(student, f"{len(student)} blocks", f"{len(teacher)}")
    blocks = _spread(len(student), len(teacher))
    pairs = list(zip(student.outside_keys, student.outside_keys, strict=True))
    own, theirs = student.block_names, teacher.block_names
    names = {source: name for name, source in student.sources.items()}
    for number, index in enumerate(blocks):
        for key in student.keys_of_block(number):
            name = names[key].replace(f"{own[number]}.", f"{theirs[index]}.", 1)
            pairs.append((key, teacher.sources.get(name, name)))
    found = {}
    for key, source in pairs:
        tensor: Any = teacher.tensors.get(source)
        shape = tuple(student.tensors[key].shape)
        if tensor is None or len(tensor.shape) != len(shape):
            raise InvalidValueError(f"distill.student: {key} is no part of {source}; take distill.init=random.")
        for dim, size in enumerate(shape):
            if size > tensor.shape[dim]:
                raise _larger(student, f"{key} {list(shape)}", f"{list(teacher.tensors[source].shape)}")
            if size < tensor.shape[dim]:
                tensor = SlicedTensor(tensor, dim, size)
        found[key] = tensor
    return found, blocks


def _larger(student: StreamedModel, ours: str, theirs: str) -> InvalidValueError:
    return InvalidValueError(
        f"distill.student: a part of the original cannot be larger than it is ({ours} of {theirs}); take smaller sizes, or "
        "distill.init=random."
    )
