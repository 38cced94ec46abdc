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
Linears of 4 and 8 bits on the kernels that torch has for a CPU: the weight stays packed, and few tokens, as in decoding, are
multiplied with the codes as they lie in memory. For many tokens a few rows at a time are unpacked, and multiplied as dense ones:
there the arithmetic takes the time, and not the weight's way from memory.
"""

import functools
import threading
from abc import abstractmethod

import torch
from torch import Tensor, nn

from hfcompress.formats import get_format
from hfcompress.formats.layout import Layout
from hfcompress.formats.stored import PackedTensor
from hfcompress.runtime.stored_linear import PackedLinear
from hfcompress.solvers.grid import Grid, QuantizedWeight


FEW = 24  # tokens, up to which torch's kernels are the faster
GROUPS = (256, 128, 64, 32)  # columns that can share a scale in torch's kernel of 4 bits
TILES = (64, 32)  # rows that it packs together, with AVX-512 and with AVX2
ROWS = max(TILES)  # of which a packed weight has a multiple
MIDDLE = 8  # of its codes, from 0 to 15
CHUNK = 1 << 22  # weights that are unpacked at a time
LOWEST, HALF_RANGE = -128, 127.5  # of rounded inputs, as compressed-tensors rounds them
LARGEST = 1 << 23  # values that are kept for the next time
DTYPE = torch.bfloat16  # of the inputs that the kernels are fast for


_scratch = threading.local()


class IntegerLinear(PackedLinear):
    """
    The base of them.

    Args:
        weight (`QuantizedWeight`): integers.
        layout (`Layout`): the format that it comes from.
        bias (`nn.Parameter`, *optional*): of the linear.
    """

    scales: Tensor
    zero_points: Tensor | None
    packed: Tensor
    pairs: Tensor

    def __init__(self, weight: QuantizedWeight, layout: Layout, bias: nn.Parameter | None):
        super().__init__(tuple(weight.codes.shape), weight.grid, layout, bias)
        self.register_buffer("scales", weight.scales, persistent=False)
        self.register_buffer("zero_points", weight.zero_points, persistent=False)

    @abstractmethod
    def codes(self) -> Tensor:
        """int8 `(out_features, in_features)`."""

    def stored(self) -> dict[str, Tensor]:
        return self.layout.pack(QuantizedWeight(self.codes(), self.scales, self.zero_points, self.grid))

    @property
    def weight(self) -> Tensor:
        """Unpacked now: float32 `(out_features, in_features)`."""
        return QuantizedWeight(self.codes(), self.scales, self.zero_points, self.grid).dequantize()

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, self.in_features)
        if inputs.device.type != "cpu":
            return nn.functional.linear(inputs, self.weight.to(inputs.dtype), self.bias)
        few = len(flat) <= FEW
        found = self._of_few(flat.to(DTYPE).contiguous()) if few else self._of_many(flat)
        found = found if self.bias is None else found.add_(self.bias)
        return found.to(inputs.dtype, copy=True).view(*inputs.shape[:-1], self.out_features)

    @abstractmethod
    def _of_few(self, inputs: Tensor) -> Tensor:
        """bfloat16 `(tokens, out_features)` for bfloat16 `(tokens, in_features)`."""

    def _of_many(self, inputs: Tensor) -> Tensor:
        """float32 likewise, of inputs in any dtype; valid until the next is asked for."""
        inputs = scratch("inputs", *inputs.shape).copy_(inputs)
        found = scratch("outputs", len(inputs), self.out_features)
        step = max(CHUNK // self.in_features // ROWS, 1) * ROWS
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            torch.mm(inputs, self._transposed(start, stop), out=found[:, start:stop])
        return found

    @abstractmethod
    def _transposed(self, start: int, stop: int) -> Tensor:
        """The values of rows `start`, a multiple of 64, to `stop`: float32 `(in_features, stop - start)`."""


class Int4Linear(IntegerLinear):
    """
    Codes of at most 4 bits with scales of groups, as torch's kernel takes them (scales are rounded to bfloat16 where few tokens
    are multiplied). The arguments are those of [`IntegerLinear`].
    """

    def __init__(self, weight: QuantizedWeight, layout: Layout, bias: nn.Parameter | None):
        super().__init__(weight, layout, bias)
        group, tile = width_of(weight.grid, self.in_features), tile_of_kernel()
        assert group is not None
        assert tile is not None
        self.group, self.tile = group, tile
        codes = nn.functional.pad(weight.codes, (0, 0, 0, -self.out_features % ROWS)).int() + MIDDLE
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), persistent=False)
        scales, zeros = self._spread(0, self.out_features)
        pairs = torch.stack([scales, -zeros * scales], 2).to(DTYPE)
        pairs = nn.functional.pad(pairs, (0, 0, 0, len(codes) - self.out_features))
        self.register_buffer("pairs", pairs.contiguous(), persistent=False)

    def _spread(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points of some rows for the kernel's groups: float32 `(in_features / group, rows)` each."""
        times = self.in_features // self.group // self.scales.shape[1]
        scales = self.scales[start:stop].T.float().repeat_interleave(times, 0).contiguous()
        if self.zero_points is None:
            return scales, torch.zeros_like(scales)
        return scales, self.zero_points[start:stop].T.float().repeat_interleave(times, 0)

    def _tiles(self) -> Tensor:
        """uint8 `(tiles, in_features, tile / 2)`: see [`hfcompress.kernels.int4`]."""
        return self.packed.view(torch.uint8).view(-1, self.in_features, self.tile // 2)

    def codes(self) -> Tensor:
        tiles = self._tiles()
        both = torch.cat([tiles & 15, tiles >> 4], 2).transpose(1, 2).reshape(-1, self.in_features)
        return both[: self.out_features].to(torch.int8) - MIDDLE

    def _of_few(self, inputs: Tensor) -> Tensor:
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        return kernel(inputs, self.packed, self.group, self.pairs)[:, : self.out_features]

    def _transposed(self, start: int, stop: int) -> Tensor:
        from hfcompress.kernels.int4 import unpack_tiles

        scales, zeros = self._spread(start, stop)
        offsets = -(zeros + MIDDLE) * scales
        rows = -(-(stop - start) // ROWS) * ROWS
        scales, offsets = (nn.functional.pad(each, (0, rows - (stop - start))) for each in (scales, offsets))
        tiles = self._tiles()[start // self.tile : (start + rows) // self.tile]
        found = scratch("weights", self.in_features, rows)
        unpack_tiles(tiles.numpy(), scales.numpy(), offsets.numpy(), self.group, found.numpy())
        return found[:, : stop - start]


class Int8Linear(IntegerLinear):
    """Codes of 8 bits with one scale for a row. The arguments are those of [`IntegerLinear`]."""

    def __init__(self, weight: QuantizedWeight, layout: Layout, bias: nn.Parameter | None):
        super().__init__(weight, layout, bias)
        self.register_buffer("packed", weight.codes.contiguous(), persistent=False)

    def codes(self) -> Tensor:
        return self.packed

    def _of_few(self, inputs: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(inputs, self.packed, self.scales.flatten().to(DTYPE))

    def _transposed(self, start: int, stop: int) -> Tensor:
        return (self.packed[start:stop].float() * self.scales[start:stop].float()).T


class RoundingInt8Linear(Int8Linear):
    """
    The same with inputs that are rounded to 8 bits too, by a scale for every token that is found on the fly: integers are
    multiplied with integers, and nothing is unpacked. The arguments are those of [`IntegerLinear`].
    """

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, self.in_features).float()
        steps = flat.abs().amax(1, keepdim=True) / HALF_RANGE
        steps = torch.where(steps == 0, torch.ones_like(steps), steps)
        codes = (flat / steps).round_().clamp_(LOWEST, -LOWEST - 1)
        if inputs.device.type == "cpu":
            products = torch._int_mm(codes.to(torch.int8), self.packed.T)
        else:
            products = codes @ self.packed.float().T
        found = products * steps * self.scales.flatten().float()
        found = found if self.bias is None else found + self.bias
        return found.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)


def scratch(name: str, rows: int, columns: int) -> Tensor:
    """
    Float32 memory that is used again and again, `(rows, columns)`: where a page that is touched first is dear, new memory takes as
    long as the arithmetic. More than `LARGEST` is not kept.
    """
    if rows * columns > LARGEST:
        return torch.empty(rows, columns)
    known = vars(_scratch)
    if name not in known or known[name].numel() < rows * columns:
        known[name] = torch.empty(rows * columns)
    return known[name][: rows * columns].view(rows, columns)


def width_of(grid: Grid, in_features: int) -> int | None:
    """The columns that share a scale in torch's kernel of 4 bits; `None` if it takes none that fit."""
    return next((group for group in GROUPS if grid.columns(in_features) % group == 0), None)


def kind_of(stored: PackedTensor, device: torch.device, dtype: torch.dtype) -> type[IntegerLinear] | None:
    """The linear that runs a stored weight as it is, if there is one for it, the device and the dtype."""
    grid, (rows, columns) = stored.grid, stored.shape
    if grid.activations != "none":
        return RoundingInt8Linear if _rounds_tokens(stored, device, dtype) else None
    if grid.type != "int" or device.type != "cpu" or dtype != DTYPE or columns % 2:
        return None
    if grid.bits <= 4 and width_of(grid, columns) is not None:
        return Int4Linear if tile_of_kernel() else None
    return Int8Linear if grid.bits > 4 and grid.symmetric and grid.group_size == -1 and rows > 1 else None


def _rounds_tokens(stored: PackedTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether inputs are rounded as [`RoundingInt8Linear`] does, on a CPU where that is fast."""
    grid, inputs = stored.grid, getattr(getattr(stored, "scheme", None), "input_activations", None)
    if device.type != "cpu" or dtype != DTYPE or inputs is None or not multiplies_exactly():
        return False
    rows = grid.type == "int" and 4 < grid.bits <= 8 and grid.symmetric and grid.group_size == -1
    tokens = (inputs.type, inputs.num_bits, inputs.symmetric, inputs.strategy) == ("int", 8, True, "token")
    return rows and tokens and inputs.dynamic is True


def warm_up() -> None:
    """Have everything imported and compiled that a first forward needs."""
    if tile_of_kernel() is None:
        return
    codes, scales = torch.zeros(ROWS, ROWS, dtype=torch.int8), torch.ones(ROWS, 1)
    linear = Int4Linear(QuantizedWeight(codes, scales, None, Grid(4)), get_format("compressed-tensors"), None)
    for tokens in (1, FEW + 1):
        linear(torch.zeros(tokens, ROWS))


@functools.cache
def multiplies_exactly() -> bool:
    """
    Whether products of 8-bit integers are right on this CPU, and made by a kernel: without instructions for them (VNNI) oneDNN adds
    two of them up in 16 bits, which overflow.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    values = torch.tensor([LOWEST, -LOWEST - 1], dtype=torch.int8)
    first, second = (
        values.repeat_interleave(32).view(2, 32).repeat(1, 8),
        values.flip(0).repeat_interleave(256).view(2, 256),
    )
    both = torch.cat([first, second]), torch.cat([second, first, first, second])
    return torch.equal(torch._int_mm(both[0], both[1].T).long(), both[0].long() @ both[1].long().T)


@functools.cache
def tile_of_kernel() -> int | None:
    """How many rows this torch packs together on this CPU; `None` if not the way [`hfcompress.kernels.int4`] unpacks them."""
    codes = torch.arange(ROWS * 32, dtype=torch.int32).view(ROWS, 32) * 7 // 3 % 16
    try:
        found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).view(torch.uint8).flatten()
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    for tile in TILES:
        halves = codes.view(-1, 2, tile // 2, 32).to(torch.uint8)
        if torch.equal(found, (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2).flatten()):
            return tile
    return None
