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
"""Where a result came from: what the manifest says of it, and what must be the same for a run to go on."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from hfcompress.calibration.overlap import sketch
from hfcompress.calibration.tokens import Tokens
from hfcompress.hub.base_card import base_card
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.locate import is_hub_id
from hfcompress.models.manifest import BUNDLED, FOLDER, HUB, MEMORY
from hfcompress.models.tiny import TINY_NAME
from hfcompress.recipes import Job


VERSIONS = ("hfcompress", "torch", "transformers", "accelerate", "compressed-tensors", "safetensors")


def described_base(checkpoint: Checkpoint) -> dict[str, Any]:
    """The base in the manifest: where it came from, so that the same one can be found again."""
    name = checkpoint.name
    if checkpoint.folder is None:
        kind = HUB if is_hub_id(name) else MEMORY
    elif checkpoint.revision is not None:
        kind = HUB
    elif name == TINY_NAME:
        kind = BUNDLED
    else:
        kind, name = FOLDER, str(checkpoint.folder)
    described = {"model": name, "kind": kind, "revision": checkpoint.revision, "sha256": checkpoint.sha256}
    return {**described, "card": base_card(checkpoint.folder)}


def described_calibration(tokens: Tokens | None, job: Job) -> dict[str, Any] | None:
    if tokens is None:
        return None
    rows, seq_len = tokens.input_ids.shape
    settings = {"seed": job.calibration.seed, "samples": rows, "seq_len": seq_len}
    described = {"data": tokens.source, "sha256": tokens.sha256, "tokens": tokens.count, **settings}
    if tokens.own_output:
        described["own_output"] = True  # of the model, in the decoder's part of every row
    return {**described, "sketch": sketch(tokens)}


def fingerprint(job: Job, base: Mapping, tokens: Tokens | None, streamed, rotation) -> dict[str, Any]:
    described = job.to_dict()
    return {
        "the base model": base["sha256"],
        "the student": streamed.checkpoint.sha256 if has_student(job) else None,
        "the recipe": {"recipe": described["recipe"], "format": described["format"]},
        "the calibration data": tokens.sha256 if tokens is not None else None,
        "the versions": versions(),
        "the dtype": str(streamed.dtype),
        "the device": streamed.device.type,
        "the rotation": None if rotation is None else rotation.applied,
    }


def has_student(job: Job) -> bool:
    """Whether the student is a checkpoint of its own."""
    return job.distilling is not None and isinstance(job.distilling.student, str)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
