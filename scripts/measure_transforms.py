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
Transform coding of weights: whether cosines, wavelets or Hadamard matrices before rounding save bits, and what Huffman codes
would take instead of rANS.

    python scripts/measure_transforms.py [--model DIR] [--bits 2 3 4] [--output FILE.json]

Every linear's columns are weighed by the root mean square of their inputs, and rows by nothing. All transforms are
orthonormal, so that the same step loses the same; what the codes take with the library's own classes of rows and columns is
compared with what they take without a transform, at the same squared error. Bits are per weight, without what steps take.
"""

import argparse
import heapq
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hfcompress.calibration.tokens import load_tokens
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import find_linears, get_weight, watch_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.tiny import tiny_folder
from hfcompress.solvers.coded import MAGNITUDES, symbols_of
from hfcompress.solvers.entropy import bits_of, classes_of, counted, encode


HALVINGS = 30
BLOCK = 64  # rows and columns of a transform


def cosine(size: int) -> Tensor:
    """The orthonormal DCT-II: float32 `(size, size)`."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * (place[:, None] + 0) * (place + 0.5)) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.float()


def hadamard(size: int) -> Tensor:
    """Of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def haar(size: int) -> Tensor:
    """Haar's wavelets, of a power of two."""
    if size == 1:
        return torch.ones(1, 1)
    half = haar(size // 2)
    return (
        torch.cat([torch.kron(half, torch.ones(1, 2)), torch.kron(torch.eye(size // 2), torch.tensor([[1.0, -1.0]]))])
        / 2**0.5
    )


TRANSFORMS: dict[str, Callable[[int], Tensor]] = {"cosine": cosine, "wavelet": haar, "Hadamard": hadamard}


def transformed(weight: Tensor, matrix: Tensor) -> Tensor:
    """Blocks of a weight `(rows, columns)` between the matrix and its transpose."""
    size = len(matrix)
    rows, columns = weight.shape
    blocks = weight.view(rows // size, size, columns // size, size)
    return torch.einsum("ij,ajbk,lk->aibl", matrix, blocks, matrix).reshape(rows, columns)


def told(weight: Tensor, step: float) -> tuple[float, float, Tensor]:
    """Bits per weight, squared error per weight, and symbols, at a step."""
    codes = (weight / step).round().clamp(-127, 127)
    symbols = symbols_of(codes.to(torch.int8))
    bits = bits_of(counted(symbols, classes_of(symbols, MAGNITUDES))) / weight.numel()
    return bits, (weight - codes * step).square().mean().item(), symbols


def found(weight: Tensor, wanted: float, by_error: bool) -> tuple[float, float, Tensor]:
    """The same at the step whose bits, or whose error, are those that are wanted."""
    low, high = weight.std().item() * 1e-2, weight.std().item() * 16
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        bits, error, _ = told(weight, middle)
        smaller = error > wanted if by_error else bits < wanted
        low, high = (low, middle) if smaller else (middle, high)
    return told(weight, (low * high) ** 0.5)


def huffman(counts: Tensor) -> float:
    """Bits that Huffman's code takes for symbols that occur so often, its table left out."""
    heap = [int(count) for count in counts if count > 0]
    heapq.heapify(heap)
    if len(heap) == 1:
        return float(heap[0])
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return float(total)


def compared(symbols: Tensor) -> dict[str, float]:
    """Bits per weight of one table: its entropy, Huffman's code, and rANS as it is stored, with all that belongs to it."""
    counts = torch.bincount(symbols.flatten().int(), minlength=256)
    share = counts[counts > 0] / counts.sum()
    stream = encode(symbols)
    size = 8 * (stream.words.nbytes + stream.index.nbytes + stream.frequencies.nbytes)
    each = {"entropy": -(share * share.log2()).sum().item(), "huffman": huffman(counts) / symbols.numel()}
    return each | {"rans": size / symbols.numel()}


@torch.no_grad()
def weighed(model: StreamedModel) -> dict[str, Tensor]:
    """Every linear's weight, its columns times the root mean square of their inputs."""
    tokens = load_tokens(
        "bundled",
        model.checkpoint,
        split="calibration",
        tiny_folder=tiny_folder(),
        default_samples=8,
        default_seq_len=256,
    )
    streams = model.embed([tokens.batch(slice(None))])
    weights = {}
    for index, name in enumerate(model.block_names):
        with model.block(index) as block:
            linears = find_linears(block, name)
            powers: dict[str, Tensor] = {}

            def seen(linear: str, inputs: Tensor, powers=powers) -> None:
                powers[linear] = inputs.float().square().flatten(0, -2).mean(0)

            with watch_inputs(linears, seen):
                ahead = model.call(block, index, streams[0])
            streams = [streams[0].advanced(ahead)]
            weights |= {each: get_weight(module) * powers[each].sqrt() for each, module in linears.items()}
    return weights


def main() -> None:
    """A line for every rate."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, default=tiny_folder())
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    weights = weighed(StreamedModel(Checkpoint.open(options.model), torch.device("cpu"), torch.float32))
    weights = {name: w for name, w in weights.items() if not any(size % BLOCK for size in w.shape)}
    total = sum(weight.numel() for weight in weights.values())
    rows = []
    for wanted in options.bits:
        row: dict[str, float] = {"bits": wanted} | dict.fromkeys([*TRANSFORMS, "entropy", "huffman", "rans"], 0.0)
        for weight in weights.values():
            share = weight.numel() / total
            _, error, symbols = found(weight, wanted, by_error=False)
            for name, matrix in TRANSFORMS.items():
                row[name] += share * found(transformed(weight, matrix(BLOCK)), error, by_error=True)[0]
            for name, bits in compared(symbols).items():
                row[name] += share * bits
        rows.append({name: round(value, 4) for name, value in row.items()})
        print("  ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    if options.output:
        options.output.write_text(
            json.dumps({"model": options.model.name, "linears": len(weights), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
