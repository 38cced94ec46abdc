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
"""`hfcompress.json`: what was done to a checkpoint, and to which."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError
from hfcompress.models.tiny import TINY_NAME, tiny_folder


MANIFEST = "hfcompress.json"
EXPORTS = "exports"  # its key for the formats that a checkpoint has gone through since it was compressed
ANY_BITS = ("coded", "factors")  # the types of linears that take any number of bits
HUB, FOLDER, MEMORY, BUNDLED = "hub", "folder", "memory", "bundled"  # where a base came from


def read_manifest(folder: Path | None) -> dict[str, Any]:
    """
    Args:
        folder (`Path` or `None`): a checkpoint's folder.

    Returns:
        `dict`: empty where there is no manifest.

    Raises:
        CheckpointError: it is damaged.
    """
    path = None if folder is None else folder / MANIFEST
    if path is None or not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text())
        base = manifest["base"]
        complete = {"recipe", "linears", "calibration"} <= manifest.keys() and {"model", "revision"} <= base.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged; download or copy that file again.") from error
    if not complete:
        raise CheckpointError(f"{path} is damaged; download or copy that file again.")
    return manifest


def base_of(folder: Path | None) -> str | Path:
    """
    The base that the manifest in `folder` names; the bundled tiny model if there is no manifest.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = read_manifest(folder)
    if not manifest or manifest["base"]["model"] == TINY_NAME:
        return tiny_folder()
    if manifest["base"].get("kind") == FOLDER:
        return Path(manifest["base"]["model"])
    model, revision = manifest["base"]["model"], manifest["base"]["revision"]
    return f"{model.partition('@')[0]}@{revision}" if revision else model


def format_of(manifest: Mapping[str, Any]) -> str:
    """The format of the checkpoint now: the recipe's, or that of its last export."""
    exports = manifest.get(EXPORTS)
    if not exports and is_plain(manifest):
        return "dense"
    return exports[-1]["format"] if exports else manifest["recipe"]["format"]


def is_plain(manifest: Mapping[str, Any]) -> bool:
    """Whether none of its weights is rounded to fewer bits, and the checkpoint an ordinary one."""
    rows = manifest["linears"]
    return manifest["recipe"]["format"] == "compressed-tensors" and all(row.get("type") == "plain" for row in rows)


def distinct_bits(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """
    The bits of linears, each once and ascending; those of linears that take any number as one, what a weight of them takes
    on average.
    """
    found = {row["bits"] for row in rows if row.get("type") not in ANY_BITS and row.get("bits") is not None}
    coded = [(row["bits"], row["shape"][0] * row["shape"][1]) for row in rows if row.get("type") in ANY_BITS]
    if coded:
        found.add(round(sum(bits * size for bits, size in coded) / sum(size for _, size in coded), 1))
    return sorted(found)


def is_as_solved(manifest: dict[str, Any]) -> bool:
    """Whether no export has changed a value."""
    return all(made["lossless"] for made in manifest.get(EXPORTS, []))
