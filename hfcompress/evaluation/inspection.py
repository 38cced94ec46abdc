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

from hfcompress.models.checkpoint import Checkpoint
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
    config = checkpoint.quantization_config or {}
    rows = []
    stems = dict.fromkeys(n.rpartition(".")[0] for n, t in checkpoint.tensors.items() if _is_matrix(n, t))
    for stem in stems:
        parts = {n: t for n, t in checkpoint.tensors.items() if n.startswith((f"{stem}.weight", f"{stem}.q"))}
        dense = parts.get(f"{stem}.weight")
        compressed = f"{stem}.weight_scale" in parts or dense is None
        weights = next(iter(config.get("config_groups", {}).values()), {}).get("weights", {}) if compressed else {}
        rows.append(
            {
                "name": stem,
                "method": config.get("quant_method", "compressed") if compressed else "dense",
                "bits": weights.get("num_bits") if compressed else dense.dtype.itemsize * 8,
                "group_size": weights.get("group_size") or (-1 if compressed else None),
                "sparsity": None,
                "bytes": sum(t.nbytes for t in parts.values()),
                "relative_output_error": None,
            }
        )
    return found | {"linears": rows}


def _is_matrix(name: str, tensor) -> bool:
    local = name.rpartition(".")[2]
    return (local == "weight" and len(tensor.shape) == 2 and "embed" not in name) or local in (
        "weight_packed",
        "qweight",
    )
