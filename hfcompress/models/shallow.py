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
"""A checkpoint without some of its decoder blocks: the same tensors under the names that they then have."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel


LAYERS = "num_hidden_layers"


def shallow(model: StreamedModel, kept: Sequence[int]) -> tuple[Checkpoint, dict[str, Any]]:
    """
    Args:
        model (`StreamedModel`): the whole model.
        kept (`Sequence[int]`): the blocks that stay, ascending.

    Returns:
        `tuple[Checkpoint, dict]`: the smaller checkpoint, whose tensors are read from the whole one, and what changes in
        config.json.
    """
    whole = model.checkpoint
    tensors = {key: model.tensors[key] for key in model.outside_keys}
    for number, index in enumerate(kept):
        keys = model.keys_of_block(index)
        place = _place_of(keys, index)
        for key in keys:
            parts = key.split(".")
            parts[place] = str(number)
            tensors[".".join(parts)] = model.tensors[key]
    changes = depth_changes(whole.config, kept)
    small = copy.copy(whole)
    small.config, small.tensors = changed_config(whole.config, changes), tensors
    return small, changes


def depth_changes(config, kept: Sequence[int]) -> dict[str, Any]:
    """What config.json must say of a model with these blocks alone: their number, and every list with one entry each."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    changes: dict[str, Any] = {stored_key(text, LAYERS): len(kept)}
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count and key != "architectures":
            changes[key] = [value[index] for index in kept]
    if isinstance(until := getattr(text, "max_window_layers", None), int):
        changes["max_window_layers"] = sum(index < until for index in kept)
    return nested(config, changes)


def stored_key(text_config, name: str) -> str:
    """What config.json calls a field that transformers has a common name for."""
    return text_config.attribute_map.get(name, name)


def nested(config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of the language model's part of a configuration, as changes of the whole."""
    text = config.get_text_config()
    if text is config:
        return dict(changes)
    name = next(key for key in config.sub_configs if getattr(config, key, None) is text)
    return {name: dict(changes)}


def changed_config(config, changes: Mapping[str, Any]):
    """A copy of a configuration with changes; lists that no longer fit are not looked at in between."""
    made = type(config).from_dict(merged(config.to_dict(), changes))
    made.architectures = config.architectures
    return made


def reason_of(error: Exception) -> str:
    """Why transformers does not take a configuration, as a clause: the last line of what it says."""
    return str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ").rstrip(".")


def merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A document of mappings with changes."""
    found = dict(document)
    for key, value in changes.items():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, Mapping) else value
    return found


def _place_of(keys: Sequence[str], index: int) -> int:
    """Which part of the names on disk is the block's number."""
    split = [key.split(".") for key in keys]
    return next(p for p in range(min(map(len, split))) if all(parts[p] == str(index) for parts in split))
