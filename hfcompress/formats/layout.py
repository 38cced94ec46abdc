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
"""What every format does unless it says otherwise."""

from pathlib import Path
from typing import Any

import torch


class Layout:
    """The base of the formats; see [`hfcompress.formats.compressed_tensors.PackQuantized`] for all that one does."""

    def check_model(self, checkpoint: Any) -> None:
        """
        Raises:
            HfcompressError: this format cannot hold the model.
        """

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype that scales are chosen and stored in, for a weight that is stored in `stored`."""
        return stored

    def write_beside(self, folder: Path, name: str) -> dict[str, Any]:
        """
        Write what belongs beside the weights.

        Args:
            folder (`Path`): complete but for the manifest and the report.
            name (`str`): what the folder will be called.

        Returns:
            `dict`: what the manifest says of it.
        """
        return {}
