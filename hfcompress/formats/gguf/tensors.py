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
"""Which tensor of a checkpoint becomes which of the file, of what type, and whether its values stay what they are."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hfcompress.errors import UnsupportedModelError
from hfcompress.formats.gguf import blocks
from hfcompress.formats.gguf.architecture import Architecture, rope_rows
from hfcompress.formats.layout import kind_of
from hfcompress.formats.stored import PackedTensor
from hfcompress.solvers.grid import QuantizedWeight


EMBEDDINGS = ("token_embd.weight", "output.weight")
ROWS_AT_ONCE = 4096  # of an embedding that is rounded to blocks


@dataclass(frozen=True)
class GgufTensor:
    """
    Args:
        name (`str`): in the file.
        source (`str`): in the checkpoint.
        shape (`tuple[int, ...]`): rows first, as in the checkpoint.
        type (`str`): of `gguf.GGMLQuantizationType`.
        exact (`bool`): the values are the checkpoint's.
        data (`Callable[[], np.ndarray]`): makes the bytes when they are written.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    exact: bool
    data: Callable[[], np.ndarray]


class TensorNames:
    """
    Args:
        architecture (`str`): `general.architecture`.
        config (`PreTrainedConfig`): of the checkpoint.
    """

    def __init__(self, architecture: str, config: PreTrainedConfig):
        import gguf

        self.architecture, self.tied = architecture, config.tie_word_embeddings
        [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
        self.map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def find(self, source: str) -> str | None:
        """
        The name of a tensor in the file; `None` for a head that is the embeddings again.

        Raises:
            UnsupportedModelError: the architecture has no such tensor.
        """
        if source == "lm_head.weight" and self.tied:
            return None
        name = self.map.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(f"GGUF's architecture {self.architecture} has no tensor for {source}.")
        return name


class TensorPlan:
    """
    Args:
        architecture (`Architecture`): of the file.
        config (`PreTrainedConfig`): of the checkpoint.
        embeddings (`str`): `"f16"` or `"q8_0"`.
        lossy (`bool`): round what the blocks cannot hold, instead of refusing it.
    """

    def __init__(self, architecture: Architecture, config: PreTrainedConfig, embeddings: str, lossy: bool):
        self.architecture, self.config, self.embeddings, self.lossy = architecture, config, embeddings, lossy

    def tensors(self, stored: Mapping[str, Any]) -> Iterator[GgufTensor]:
        """
        Every tensor of the file, settled but not yet made.

        Args:
            stored (`Mapping`): name -> what reads a tensor of the checkpoint, compressed ones decoded.

        Raises:
            UnsupportedModelError: a tensor that the architecture has no name for, or that no type holds.
        """
        names = TensorNames(self.architecture.name, self.config)
        for source in sorted(stored, key=_in_order):
            name = names.find(source)
            if name is not None:
                yield self._tensor(name, source, stored[source])
        for name, value in self.architecture.tensors.items():
            yield GgufTensor(name, "config.json", value.shape, "F32", True, partial(_same, value))

    def _tensor(self, name: str, source: str, tensor: Any) -> GgufTensor:
        settle = partial(GgufTensor, name, source, tuple(tensor.shape))
        rows = self._rows(name)
        if isinstance(tensor, PackedTensor):
            return self._linear(settle, source, tensor, rows)
        if len(tensor.shape) < 2:  # llama.cpp wants norms and biases in float32
            return settle("F32", True, partial(self._vector, tensor, source, rows))
        if name in EMBEDDINGS and self.embeddings == "q8_0":
            if tensor.shape[-1] % blocks.BLOCK:
                raise UnsupportedModelError(
                    f"Q8_0 holds rows of whole blocks of {blocks.BLOCK}, and {source} is {tensor.shape[-1]} wide; leave "
                    "the embeddings at 16 bits."
                )
            return settle("Q8_0", False, partial(_rounded_rows, tensor))
        kind = _float_type(tensor.read())
        return settle(kind, True, partial(_floats, tensor, kind, rows))

    def _rows(self, name: str) -> np.ndarray | None:
        """The order of a tensor's rows, where it is another."""
        if self.architecture.name != "llama" or not (".attn_q." in name or ".attn_k." in name):
            return None
        heads = self.config.num_attention_heads if ".attn_q." in name else self.config.num_key_value_heads
        return rope_rows(self.config, heads)

    def _vector(self, tensor: Any, source: str, rows: np.ndarray | None) -> np.ndarray:
        value = tensor.read().float()
        if self.architecture.name == "gemma3" and source.endswith("norm.weight"):
            value = value + 1.0  # transformers multiplies by one plus the weight, and llama.cpp by what is stored
        return _ordered(value, rows).numpy()

    def _linear(
        self, settle: Callable[..., GgufTensor], source: str, tensor: PackedTensor, rows: np.ndarray | None
    ) -> GgufTensor:
        weight = tensor.quantized()
        kind = blocks.block_type(weight.grid, weight.codes.shape[1])
        held, exact = (False, False) if kind is None else blocks.is_exact(weight)
        if held and (exact or self.lossy):
            return settle(kind, exact, partial(_blocks, tensor, rows))
        if not self.lossy:
            raise UnsupportedModelError(f"{_why_not(source, weight, kind, held)} round it with lossy=True (--lossy).")
        width = weight.codes.shape[1]
        kind = "F16" if width % blocks.BLOCK else "Q8_0"
        return settle(kind, False, partial(_rounded, tensor, kind, rows))


def _why_not(source: str, weight: QuantizedWeight, kind: str | None, held: bool) -> str:
    grid, width = weight.grid, weight.codes.shape[1]
    if grid.type != "int":
        return f"GGUF has no type of {kind_of(grid)}, which {source} has; compress with integer codes, or"
    if grid.columns(width) % blocks.BLOCK:
        return (
            f"GGUF's blocks hold {blocks.BLOCK} weights of a row, and {source} has a scale for each {grid.columns(width)}; "
            "compress with a group_size of 32, 64 or 128, or"
        )
    if kind is None:
        return (
            f"GGUF has no asymmetric type of {grid.bits} bits, which {source} is on; compress with symmetric=true, or"
        )
    what = "the scales" if grid.symmetric else "the scales or offsets"
    how = "with other digits" if held else "out of float16's range"
    return (
        f"{kind} holds float16, and {what} of {source} are {how}; compress with format=gguf (symmetric), which chooses "
        "scales that both formats hold, or"
    )


def _in_order(name: str) -> tuple:
    """The order of the blocks by number, and within them by name."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"\.", name))


def _float_type(value: Tensor) -> str:
    """16 bits where they hold every value: float16, which all readers are fastest with, else bfloat16; else 32."""
    wide = value.float()
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        if torch.equal(wide.to(dtype).float(), wide):
            return kind
    return "F32"


def _ordered(value: Tensor, rows: np.ndarray | None) -> Tensor:
    return value if rows is None else value[torch.from_numpy(rows)]


def _same(value: np.ndarray) -> np.ndarray:
    return value


def _floats(tensor: Any, kind: str, rows: np.ndarray | None) -> np.ndarray:
    value = _ordered(tensor.read(), rows)
    if kind == "BF16":
        return value.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    return value.to({"F16": torch.float16, "F32": torch.float32}[kind]).numpy()


def _blocks(tensor: PackedTensor, rows: np.ndarray | None) -> np.ndarray:
    weight = tensor.quantized()
    if rows is not None:
        order = torch.from_numpy(rows)
        zeros = None if weight.zero_points is None else weight.zero_points[order]
        weight = QuantizedWeight(weight.codes[order], weight.scales[order], zeros, weight.grid)
    return blocks.pack(weight).data


def _rounded(tensor: PackedTensor, kind: str, rows: np.ndarray | None) -> np.ndarray:
    import gguf

    value = _ordered(tensor.read(), rows).numpy()
    return gguf.quantize(value, gguf.GGMLQuantizationType[kind])


def _rounded_rows(tensor: Any) -> np.ndarray:
    import gguf

    value = tensor.read()
    parts = [gguf.quantize(part.float().numpy(), gguf.GGMLQuantizationType.Q8_0) for part in value.split(ROWS_AT_ONCE)]
    return np.concatenate(parts)
