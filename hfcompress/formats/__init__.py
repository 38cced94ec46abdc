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

from hfcompress.errors import InvalidValueError, nearest


NAMES = ("compressed-tensors", "pack-quantized", "int-quantized", "float-quantized", "dense", "gguf")


def get_format(name: str):
    """
    The format called `name`.

    Args:
        name (`str`): `"compressed-tensors"` (of its layouts the one that suits each linear), one of its layouts
            `"pack-quantized"`, `"int-quantized"` and `"float-quantized"`, `"dense"`, or `"gguf"`.

    Raises:
        InvalidValueError: there is no such format.
    """
    from hfcompress.formats import compressed_tensors, dense, gguf

    every = (compressed_tensors.CompressedTensors(), *compressed_tensors.LAYOUTS, dense.Dense(), gguf.GGUF())
    formats = {layout.name: layout for layout in every}
    if name not in formats:
        raise InvalidValueError(f"There is no format '{name}'; there are {', '.join(NAMES)}.{nearest(name, NAMES)}")
    return formats[name]
