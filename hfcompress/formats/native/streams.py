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
"""The tensors of a stream by their local names, which all kinds of the native format have in common."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hfcompress.errors import CheckpointError
from hfcompress.solvers.entropy import Classes, Stream, decode


WORDS, INDEX, FREQUENCIES = "weight", "weight_index", "weight_frequencies"
STREAM = (WORDS, INDEX, FREQUENCIES)
DTYPES = {WORDS: torch.uint16, INDEX: torch.int64, FREQUENCIES: torch.uint16}


def stored(stream: Stream) -> dict[str, Tensor]:
    """What is written of a stream, but for its classes."""
    return {WORDS: stream.words, INDEX: stream.index, FREQUENCIES: stream.frequencies}


def symbols_of(tensors: Mapping[str, Tensor], classes: Classes, beside: bytes = b"") -> Tensor:
    """
    The symbols of a stream that was written: uint8 `(rows, columns)`.

    Raises:
        CheckpointError: it has been altered or cut short.
    """
    if any(tensors[local].dtype != dtype for local, dtype in DTYPES.items()):
        raise CheckpointError("An entropy-coded tensor is not stored as such; download or copy its file again.")
    return decode(Stream(tensors[WORDS], tensors[INDEX], tensors[FREQUENCIES], classes), beside)
