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
"""Where the arithmetic happens, and in what."""

import torch

from hfcompress.errors import InvalidValueError
from hfcompress.models.checkpoint import Checkpoint


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def find_device(name: str) -> torch.device:
    """
    Args:
        name (`str`): `"auto"` (a GPU if there is one), `"cpu"`, `"cuda"` or `"cuda:0"`.

    Raises:
        InvalidValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidValueError(f"There is no device '{name}'; give auto, cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidValueError(f"The device '{name}' is not supported; give auto, cpu, cuda or cuda:0.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidValueError(f"There is no CUDA device for '{name}' that this torch can use; give --device cpu.")
    return device


def find_dtype(name: str | None, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """
    Args:
        name (`str` or `None`): `"bfloat16"`, `"float16"` or `"float32"`; `None` for float32 on a CPU and the
            checkpoint's own on a GPU.

    Raises:
        InvalidValueError: there is no such dtype.
    """
    if name is not None:
        if name not in DTYPES:
            raise InvalidValueError(f"There is no dtype '{name}'; give {', '.join(DTYPES)}.")
        return DTYPES[name]
    stored = checkpoint.config.dtype
    return stored if device.type == "cuda" and isinstance(stored, torch.dtype) else torch.float32
