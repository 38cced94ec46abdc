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
"""What is in a checkpoint, a row per linear, without loading its weights."""

from typing import Any

from hfcompress.formats.reading import decoded, is_read
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.checkpoint import Checkpoint, StoredTensor
from hfcompress.models.manifest import read_manifest


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    Args:
        checkpoint (`Checkpoint`): any checkpoint; of one that hfcompress made, the manifest tells the most.

    Returns:
        `dict`: `model`, `size_bytes`, `linears` (a list of rows: `name`, `method`, `bits`, `group_size`, `sparsity`,
        `bytes`, `relative_output_error`) and, where known, `base` and `recipe`.
    """
    found: dict[str, Any] = {"model": checkpoint.name, "size_bytes": checkpoint.size_bytes}
    if manifest := read_manifest(checkpoint.folder):
        return found | {key: manifest[key] for key in ("base", "recipe", "linears")}
    config = checkpoint.quantization_config
    tensors = decoded(checkpoint.tensors, config) if is_read(config) else checkpoint.tensors
    return found | {"linears": [_row(n, t, config) for n, t in tensors.items() if _is_matrix(n, t)]}


def _row(name: str, tensor, config: dict[str, Any] | None) -> dict[str, Any]:
    packed = isinstance(tensor, PackedTensor)
    dense = isinstance(tensor, StoredTensor) and name.endswith(".weight")
    return {
        "name": name.rpartition(".")[0],
        "method": "dense" if dense or config is None else config.get("quant_method", "compressed"),
        "bits": round(tensor.grid.bits_on_average, 3) if packed else tensor.dtype.itemsize * 8 if dense else None,
        "group_size": tensor.grid.group_size if packed else None,
        "sparsity": None,
        "bytes": tensor.nbytes,
        "relative_output_error": None,
    }


def _is_matrix(name: str, tensor) -> bool:
    local = name.rpartition(".")[2]
    embeddings = "embed" in name and not isinstance(tensor, PackedTensor)
    return len(tensor.shape) == 2 and ((local == "weight" and not embeddings) or local == "qweight")
