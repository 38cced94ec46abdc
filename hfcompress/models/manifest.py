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
"""`hfcompress.json`: what was done to a checkpoint."""

import json
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError


MANIFEST = "hfcompress.json"


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
        manifest["base"]["model"], manifest["recipe"], manifest["linears"]  # noqa: B018 (what every reader rests on)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged; download or copy that file again.") from error
    return manifest
