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
"""What a compressed linear looks like on disk: one file per format, and the writer of the folder."""

import importlib

from hfcompress.errors import InvalidValueError, nearest
from hfcompress.formats.layout import Layout


# name -> the module of this package and the class in it: everything that `format=` can be
FORMATS = {
    "compressed-tensors": ("compressed_tensors", "CompressedTensors"),
    "pack-quantized": ("compressed_tensors", "PackQuantized"),
    "int-quantized": ("compressed_tensors", "IntQuantized"),
    "float-quantized": ("compressed_tensors", "FloatQuantized"),
    "gptq": ("gptq", "GPTQ"),
    "gptq_v2": ("gptq", "GPTQv2"),
    "awq": ("awq", "AWQ"),
    "gguf": ("gguf", "GGUF"),
    "sparse24": ("sparse24", "Sparse24"),
    "hfcompress": ("native", "Native"),
    "dense": ("dense", "Dense"),
}
NAMES = tuple(FORMATS)


def get_format(name: str) -> Layout:
    """
    The format called `name`.

    Args:
        name (`str`): of [`FORMATS`]; `"compressed-tensors"` is of its layouts the one that suits each linear.

    Raises:
        InvalidValueError: there is no such format.
    """
    if name not in FORMATS:
        raise InvalidValueError(f"There is no format '{name}'; there are {', '.join(NAMES)}.{nearest(name, NAMES)}")
    module, kind = FORMATS[name]
    return getattr(importlib.import_module(f"hfcompress.formats.{module}"), kind)()
