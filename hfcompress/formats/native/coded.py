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
"""
A weight on a grid with a step for every row and every column, its codes entropy-coded.

Beside the stream ([`hfcompress.formats.native`]) there are `weight_rows` uint8 `(2, out_features)` and `weight_columns`
uint8 `(2, in_features)`, each the exponents `e` of the steps and the classes, and `weight_step` float32 `(1,)`. Symbols
0, 1, 2, 3, ... are the codes 0, -1, 1, -2, ...; a weight is the code times `step 2^(e_row / 16)` times
`2^(e_column / 16)`, both factors and the products rounded to float32. The checksums begin with `weight_step` and the
exponents of the rows and of the columns.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.formats.layout import Layout, refuse_cache, refuse_conv1d
from hfcompress.formats.native.streams import FREQUENCIES, INDEX, STREAM, WORDS, stored, symbols_of
from hfcompress.formats.stored import PackedTensor
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.coded import MAGNITUDES, codes_of, exponents, powers
from hfcompress.solvers.coded import symbols_of as symbols_for
from hfcompress.solvers.entropy import CHUNK, Classes, classes_of, encode
from hfcompress.solvers.grid import Grid, QuantizedWeight


ROWS, COLUMNS, STEP = "weight_rows", "weight_columns", "weight_step"
LOCALS = (*STREAM, ROWS, COLUMNS, STEP)


class Coded(Layout):
    """Codes that take as many bits as they are worth."""

    name = "hfcompress"
    quant_method = "hfcompress"
    packages = ()

    def check(self, shape: LinearShape, grid: Grid) -> None:
        refuse_conv1d(self.name, shape)
        if grid.type != "coded":
            raise InvalidValueError(
                f"{self.name} is not for fixed grids, and {shape.name} is on one; round it with entropy, codebook or vq, or leave "
                "the format at compressed-tensors."
            )

    def check_coded(self, name: str, grid: Grid) -> None:
        """It is made for them."""

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """float32: they are whole powers times one step."""
        return torch.float32

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        step, *own = _steps(weight)
        symbols = symbols_for(weight.codes.cpu())
        classes = classes_of(symbols, MAGNITUDES)
        stream = encode(symbols, classes, _beside(step, *own))
        sides = {
            ROWS: torch.stack([own[0], classes.rows]),
            COLUMNS: torch.stack([own[1], classes.columns]),
            STEP: step,
        }
        return {**stored(stream), **sides}

    def expected(self, shape: LinearShape, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a linear whose rate is the one that is asked for, without values."""
        rows, columns = shape.out_features, shape.in_features
        chunks = -(-rows // max(1, CHUNK // columns))

        def empty(*sizes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
            return torch.empty(*sizes, dtype=dtype, device="meta")

        sides = {
            ROWS: empty(2, rows),
            COLUMNS: empty(2, columns),
            STEP: empty(1, dtype=torch.float32),
            INDEX: empty(2, chunks, dtype=torch.int64),
            FREQUENCIES: empty(1, dtype=torch.uint16),
        }
        words = round(grid.bits_on_average * rows * columns / 16) - sum(side.nbytes for side in sides.values()) // 2
        return {WORDS: empty(max(words, 1), dtype=torch.uint16), **sides}

    def values(self, weight: QuantizedWeight) -> Tensor:
        step, rows, columns = _steps(weight)
        scales, column_scales = (step * powers(rows))[:, None], powers(columns)
        stored = QuantizedWeight(weight.codes.cpu(), scales, None, weight.grid, column_scales)
        return stored.dequantize().to(weight.codes.device)

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedWeight:
        """
        Raises:
            CheckpointError: it has been altered or cut short.
        """
        rows, columns, step = tensors[ROWS], tensors[COLUMNS], tensors[STEP]
        if rows.dim() != 2 or columns.dim() != 2 or len(rows) != 2 or len(columns) != 2 or step.shape != (1,):
            raise CheckpointError("An entropy-coded tensor is damaged; download or copy its file again.")
        beside = _beside(step, rows[0], columns[0])
        symbols = symbols_of(tensors, Classes(rows[1].contiguous(), columns[1].contiguous()), beside)
        scales = step * powers(rows[0])
        return QuantizedWeight(codes_of(symbols), scales[:, None], None, grid, powers(columns[0]))

    def restore(self, tensors: Mapping[str, Tensor], stem: str, grid: Grid, transposed: bool) -> Tensor:
        return self.unpack({local: tensors[f"{stem}.{local}"] for local in LOCALS}, grid).dequantize()

    def quantization_config(
        self, grids: Mapping[str, Grid], untouched: list[str], kv_cache: str | None = None
    ) -> dict[str, Any]:
        refuse_cache(self.name, kv_cache)
        return {"quant_method": self.quant_method}


class CodedTensor(PackedTensor):
    """An entropy-coded linear that reads as the dense weight it stands for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the steps."""
        return torch.float32


def _steps(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """The step, and the exponents of the rows and of the columns, as they are stored."""
    assert weight.column_scales is not None
    scales = weight.scales.flatten().cpu()
    return scales.min().reshape(1), exponents(scales), exponents(weight.column_scales.cpu())


def _beside(step: Tensor, rows: Tensor, columns: Tensor) -> bytes:
    return step.numpy().tobytes() + rows.numpy().tobytes() + columns.numpy().tobytes()
