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
"""The native format as a whole: which kind holds which tensor, and the view of a checkpoint that is stored in it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hfcompress.errors import UnsupportedModelError
from hfcompress.formats.layout import Layout
from hfcompress.formats.native.codebook import LEVELS, Codebook, CodebookTensor, grid_of
from hfcompress.formats.native.codebook import LOCALS as CODEBOOK_LOCALS
from hfcompress.formats.native.coded import COLUMNS, LOCALS, ROWS, STEP, Coded, CodedTensor
from hfcompress.formats.native.factors import BASE, LEFT, RIGHT, FactoredTensor, Factors
from hfcompress.formats.native.factors import LOCALS as FACTOR_LOCALS
from hfcompress.formats.native.lossless import LOCALS as LOSSLESS_LOCALS
from hfcompress.formats.native.lossless import REST, Lossless, LosslessTensor, packed, unpacked
from hfcompress.formats.native.numbers import columns_of
from hfcompress.formats.native.streams import FREQUENCIES, WORDS
from hfcompress.formats.native.vectors import LOCALS as VECTOR_LOCALS
from hfcompress.formats.native.vectors import SCALE, VECTORS, VectorCodes, VectorTensor
from hfcompress.formats.native.vectors import grid_of as vector_grid_of
from hfcompress.formats.stored import packed_stems
from hfcompress.models.names import in_block
from hfcompress.solvers.grid import Grid


QUANT_METHOD = "hfcompress"
VERSION = 1
PRODUCT = Grid(16, type="factors")  # whose rank is that of what is stored
EVERY_LOCAL = tuple(dict.fromkeys((*LOCALS, *LOSSLESS_LOCALS, *CODEBOOK_LOCALS, *VECTOR_LOCALS, *FACTOR_LOCALS)))
KINDS = {"codebook": Codebook, "vector": VectorCodes, "factors": Factors}


class Native(Coded):
    """Entropy-coded grids, codebooks, vectors or factors; what is not rounded is stored without loss."""

    name = "hfcompress"
    quant_method = QUANT_METHOD
    plugin = "hfcompress.integrations.transformers"
    codes_beside = True
    merges_experts = True

    def of(self, grid: Grid) -> Layout:
        """The kind that holds linears on a grid."""
        if grid.type in KINDS:
            return KINDS[grid.type]()
        return Lossless() if grid.is_plain else self

    def check_embeddings(self, name: str, grid: Grid) -> None:
        """All that it codes."""

    def beside(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Matrices without loss, in fewer bytes."""
        stem, _, local = name.rpartition(".")
        if local != WORDS:
            return {name: tensor}
        return {f"{stem}.{local}": part for local, part in packed(tensor).items()}

    def check_experts(self, grids: Mapping[str, Grid | None]) -> None:
        """They are as any other weight."""

    def check_together(self, grids: Mapping[str, Grid | None]) -> None:
        """They are as any other weight."""

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        return {**super().quantization_config(grids, untouched, kv_cache), "version": VERSION}


def dense_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """
    The values of one matrix, in float32 where it is on a grid, otherwise in its own dtype.

    Args:
        tensors (`Mapping[str, Tensor]`): what is stored of it, by local names.

    Raises:
        CheckpointError: it has been altered or cut short.
    """
    if LEVELS in tensors:
        return Codebook().unpack(tensors, grid_of(tensors[LEVELS].shape)).dequantize()
    if VECTORS in tensors:
        return VectorCodes().unpack(tensors, vector_grid_of(tensors[VECTORS].shape)).dequantize()
    if RIGHT in tensors:
        return Factors().unpack(tensors, PRODUCT).dequantize()
    if STEP in tensors:
        return Native().unpack(tensors, Grid(8, type="coded")).dequantize()
    return unpacked(tensors) if FREQUENCIES in tensors else tensors[WORDS]


def require_version(config: Mapping[str, Any]) -> None:
    """
    Raises:
        UnsupportedModelError: a later version of the format.
    """
    if config.get("version") != VERSION:
        raise UnsupportedModelError(
            f"This checkpoint is in version {config.get('version')} of the format hfcompress, and this hfcompress reads version "
            f"{VERSION}; update hfcompress."
        )


def decoded(tensors: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """
    A view of a checkpoint's tensors in which coded ones appear dense.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict`): the `quantization_config`.

    Raises:
        UnsupportedModelError: a later version of the format.
    """
    require_version(config)
    view = dict(tensors)
    for stem in packed_stems(tensors, LEVELS):
        parts = {local: view.pop(f"{stem}.{local}") for local in CODEBOOK_LOCALS if f"{stem}.{local}" in tensors}
        rows = parts[LEVELS].shape[0]
        shape = (rows, columns_of(parts, rows))
        view[f"{stem}.weight"] = CodebookTensor(parts, grid_of(parts[LEVELS].shape), Codebook(), shape)
    for stem in packed_stems(tensors, VECTORS):
        parts = {local: view.pop(f"{stem}.{local}") for local in VECTOR_LOCALS if f"{stem}.{local}" in tensors}
        (rows, _), grid = parts[SCALE].shape, vector_grid_of(parts[VECTORS].shape)
        shape = (rows, columns_of(parts, rows) // grid.tables * grid.group_size)
        view[f"{stem}.weight"] = VectorTensor(parts, grid, VectorCodes(), shape)
    for stem in packed_stems(view, FREQUENCIES):
        parts = {local: view.pop(f"{stem}.{local}") for local in EVERY_LOCAL if f"{stem}.{local}" in tensors}
        if STEP not in parts:
            if not any(local in REST for local in parts):
                raise KeyError(f"{stem}.weight_bfloat16")
            view[f"{stem}.weight"] = LosslessTensor(parts)
            continue
        (_, rows), (_, columns) = parts[ROWS].shape, parts[COLUMNS].shape
        bits = 8 * sum(part.nbytes for part in parts.values()) / (rows * columns)
        view[f"{stem}.weight"] = CodedTensor(parts, Grid(8, type="coded", rate=bits), Native(), (rows, columns))
    stems = packed_stems(tensors, RIGHT)
    leaning = {f"{stem}.weight" for stem in stems if f"{stem}.{BASE}" in tensors}
    for stem in stems:
        parts = {local: view.pop(f"{stem}.{local}") for local in FACTOR_LOCALS if f"{stem}.{local}" in tensors}
        shape, base = (parts[LEFT].shape[0], parts[RIGHT].shape[-1]), None
        if BASE in parts:
            name = in_block(f"{stem}.weight", int(parts[BASE].read()))
            if name in leaning:
                raise KeyError(name)
            base = view[name]
            if tuple(base.shape) != shape:
                raise KeyError(name)
        view[f"{stem}.weight"] = FactoredTensor(parts, PRODUCT, Factors(), shape, base)
    return view
