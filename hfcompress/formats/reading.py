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
"""Reading a quantized checkpoint, whichever of the formats it is in."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hfcompress.errors import CheckpointError, HfcompressError, MissingExtraError, UnsupportedModelError
from hfcompress.formats import (
    FORMATS,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    get_format,
    gptq,
    mxfp4,
    native,
    sparse24,
    torchao,
)


OURS = (gptq, awq, sparse24, native)  # read by code of our own; the others through the library that wrote them
# `quant_method` in config.json -> who reads it
OTHERS = (compressed_tensors, fp8, mxfp4, bitsandbytes, torchao)
READERS = {module.QUANT_METHOD: module.decoded for module in (*OTHERS, *OURS)}


def is_read(config: dict[str, Any] | None) -> bool:
    """Whether a checkpoint with this `quantization_config` is dense or in a format that [`decoded`] reads."""
    return config is None or config.get("quant_method") in READERS


def is_streamed(config: dict[str, Any] | None) -> bool:
    """
    Whether a checkpoint with this `quantization_config` says block by block what it says whole: all that are read but
    LLM.int8(), which rounds the inputs too where the library runs it.
    """
    return is_read(config) and not (config or {}).get("load_in_8bit")


def is_read_by_us(config: dict[str, Any] | None) -> bool:
    """Whether no code of others takes part in reading it."""
    return config is not None and config.get("quant_method") in [module.QUANT_METHOD for module in OURS]


def has_codes(config: dict[str, Any]) -> bool:
    """Whether the codes of a checkpoint with this `quantization_config` can be taken over into another format."""
    return config.get("quant_method") in [module.QUANT_METHOD for module in (compressed_tensors, *OURS)]


def teach_transformers(config: dict[str, Any] | None) -> None:
    """Let plain `from_pretrained` load a checkpoint in one of our own formats, from here on in this process."""
    method = None if config is None else config.get("quant_method")
    for name in FORMATS:
        layout = get_format(name)
        if method is not None and layout.quant_method == method and layout.plugin is not None:
            import_module(layout.plugin)


def missing_packages(config: dict[str, Any] | None) -> list[str]:
    """What transformers would need, and does not find here, to load a checkpoint in one of our formats."""
    method = None if config is None else config.get("quant_method")
    layouts = (get_format(name) for name in FORMATS)
    needed = next((layout.packages for layout in layouts if method is not None and layout.quant_method == method), ())
    return [name for name in needed if find_spec(name.replace("-", "_")) is None]


def needs_our_reader(config: dict[str, Any] | None) -> bool:
    """
    Whether transformers cannot load such a checkpoint here, in the dtype that is asked for: it makes bfloat16 of FP8 and MXFP4
    weights where there are no kernels for them.
    """
    return bool(missing_packages(config)) or (config or {}).get("quant_method") in (
        fp8.QUANT_METHOD,
        mxfp4.QUANT_METHOD,
    )


def require_packages(name: str, config: dict[str, Any] | None) -> None:
    """
    Raises:
        MissingExtraError: transformers needs a package that is not there.
    """
    if config is not None and (missing := missing_packages(config)):
        raise MissingExtraError(
            f"transformers needs {' and '.join(missing)} to load {name}, which is in the format "
            f"{config.get('quant_method')}: pip install {' '.join(missing)} (or hfcompress[gptq]), or leave out what runs it packed "
            "(speed, memory, energy)."
        )


def decoded(tensors: Mapping[str, Any], config: dict[str, Any] | None) -> Mapping[str, Any]:
    """
    A view of a checkpoint's tensors in which compressed weights appear dense under their original names.

    Args:
        tensors (`Mapping`): name on disk -> stored tensor.
        config (`dict` or `None`): the `quantization_config`; `None` for a dense checkpoint.

    Raises:
        CheckpointError: a tensor is missing, or the `quantization_config` is damaged.
        MissingExtraError: the library that reads it is not installed.
        UnsupportedModelError: a format that is not read.
    """
    if config is None:
        return tensors
    method = config.get("quant_method")
    if method not in READERS:
        raise UnsupportedModelError(f"A checkpoint quantized by {method} is not read yet; {', '.join(READERS)} are.")
    try:
        return READERS[method](tensors, config)
    except HfcompressError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint does not hold what its quantization_config promises ({error} is missing or wrong); "
            "download or copy it again."
        ) from error
