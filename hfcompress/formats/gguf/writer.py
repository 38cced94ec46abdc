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
One `.gguf` file from a checkpoint folder, for llama.cpp and what is built on it.

How it works: every tensor is settled first (its name, its type, whether that holds its values), so that what cannot be
written is refused before anything is. Then the header is written, and the tensors one after the other, each read when
its turn comes. The file has a temporary name until it is complete.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfcompress.errors import InvalidValueError, MissingExtraError, UnsupportedModelError, nearest
from hfcompress.formats.gguf.architecture import Architecture, describe
from hfcompress.formats.gguf.tensors import GgufTensor, TensorNames, TensorPlan
from hfcompress.formats.gguf.vocabulary import Vocabulary, read_vocabulary
from hfcompress.formats.reading import decoded, has_codes
from hfcompress.formats.stored import PackedTensor
from hfcompress.formats.writer import disk_errors
from hfcompress.models.checkpoint import Checkpoint


EMBEDDING_TYPES = ("f16", "q8_0")
QUANTIZED = ("Q4_0", "Q4_1", "Q8_0")
KINDS = {"token_embd": "embeddings", "output": "head"}  # the rest of two dimensions are linears, of one are vectors


def write_gguf(
    checkpoint_folder: str | Path,
    output_file: str | Path,
    *,
    embeddings: str = "f16",
    lossy: bool = False,
    name: str | None = None,
) -> dict[str, Any]:
    """
    Write a checkpoint as one GGUF file. Codes and scales are taken over as they are, never rounded again: a symmetric
    weight of up to 4 bits becomes Q4_0, one of up to 8 bits Q8_0, an asymmetric one of up to 4 bits Q4_1.

    Args:
        checkpoint_folder (`str` or `Path`): compressed-tensors, GPTQ, AWQ or plain weights.
        output_file (`str` or `Path`): the file; one that is there is replaced when the new one is complete.
        embeddings (`str`, *optional*, defaults to `"f16"`): `"f16"` for 16 bits (float16, or bfloat16 or 32 bits where
            float16 would change a value), `"q8_0"` for 8 bits, which rounds.
        lossy (`bool`, *optional*, defaults to `False`): where no type holds a weight's grid, round it (scales and
            offsets to float16, or else the values to Q8_0, or to float16 where the width is no multiple of 32) instead
            of refusing.
        name (`str`, *optional*): `general.name`; the folder's if not given.

    Returns:
        `dict`: `file`, `bytes`, `sha256`, `architecture`, `types` (kind of tensor -> type -> how many), `exact`,
        `inexact` (names of the tensors whose values are not the checkpoint's) and `notes`.

    Raises:
        InvalidValueError: `embeddings` is neither.
        MissingExtraError: `gguf` is not installed.
        UnsupportedModelError: an architecture, a tokenizer or a grid that the file cannot hold.
        CheckpointError: the folder is not complete, or damaged.
        OutputError: the file cannot be written.
    """
    if embeddings not in EMBEDDING_TYPES:
        raise InvalidValueError(
            f"embeddings is {embeddings!r}; it must be one of {', '.join(EMBEDDING_TYPES)}."
            f"{nearest(embeddings, EMBEDDING_TYPES)}"
        )
    output = Path(output_file).expanduser()
    checkpoint = Checkpoint.open(checkpoint_folder)
    architecture = check_gguf(checkpoint)
    config, quantization = checkpoint.config, checkpoint.quantization_config
    stored = decoded(checkpoint.tensors, quantization)
    tensors = list(TensorPlan(architecture, config, embeddings, lossy).tensors(stored))
    assert checkpoint.folder is not None
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.tokenizer, config.vocab_size)
    temporary = output.with_name(output.name + ".tmp")
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(temporary, name or checkpoint.folder.resolve().name, architecture, vocabulary, tensors)
            size = temporary.stat().st_size
            with open(temporary, "rb+") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
    return {
        "file": output.name,
        "bytes": size,
        "sha256": digest,
        "architecture": architecture.name,
        "types": _types(tensors),
        "exact": all(tensor.exact for tensor in tensors),
        "inexact": [tensor.source for tensor in tensors if not tensor.exact],
        "notes": [*architecture.notes, *vocabulary.notes, *_notes(tensors, stored)],
    }


def write_called_after_type(
    checkpoint_folder: Path, folder: Path, *, lossy: bool = False, name: str | None = None
) -> dict[str, Any]:
    """Write `model-q4_0.gguf` into `folder`, or as the type of most linears is called; see [`write_gguf`]."""
    written = write_gguf(checkpoint_folder, folder / "model.gguf", lossy=lossy, name=name)
    written["file"] = f"model-{main_type(written['types']).lower()}.gguf"
    (folder / "model.gguf").replace(folder / written["file"])
    return written


def check_gguf(checkpoint: Checkpoint) -> Architecture:
    """
    Whether a checkpoint can be a GGUF file, as far as its configuration, its tensors' names and its tokenizer say.

    Raises:
        MissingExtraError: `gguf` is not installed.
        UnsupportedModelError: an architecture or a tokenizer that GGUF is not written for, or another quantization
            method.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Writing GGUF needs the package gguf: pip install 'hfcompress[gguf]'.") from error
    quantization = checkpoint.quantization_config
    if quantization is not None and not has_codes(quantization):
        raise UnsupportedModelError(
            f"{checkpoint.name} is quantized by {quantization.get('quant_method')}; GGUF is written from "
            "compressed-tensors, GPTQ and AWQ checkpoints and from plain weights."
        )
    architecture = describe(checkpoint.config)
    names = TensorNames(architecture.name, checkpoint.config)
    stored = decoded(checkpoint.tensors, quantization)
    for tensor in stored:
        names.find(tensor)
    if checkpoint.folder is not None:
        read_vocabulary(checkpoint.folder, checkpoint.tokenizer, checkpoint.config.vocab_size)
    return architecture


def _write(
    path: Path, name: str, architecture: Architecture, vocabulary: Vocabulary, tensors: Iterable[GgufTensor]
) -> None:
    import gguf

    tensors = list(tensors)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_file_type(tensors))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in architecture.keys.items():
        _add(writer, f"{architecture.name}.{key}", value)
    _add_vocabulary(writer, vocabulary)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        size = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind)))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.ascontiguousarray(tensor.data()))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """A value with the type that llama.cpp reads it as: sizes are unsigned, and reals are of 32 bits."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if not vocabulary.tokens:
        return
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    for key, flag in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", flag)
    for key, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", number)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def main_type(types: dict[str, dict[str, int]]) -> str:
    """The type of most linears: what such a file is called after."""
    return Counter(types["linears"]).most_common(1)[0][0]


def _file_type(tensors: list[GgufTensor]) -> int:
    import gguf

    kind = main_type(_types(tensors))
    return gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"].value


def _types(tensors: Iterable[GgufTensor]) -> dict[str, dict[str, int]]:
    """Kind of tensor -> type -> how many."""
    counted: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        kind = "vectors" if len(tensor.shape) < 2 else KINDS.get(tensor.name.split(".")[0], "linears")
        types = counted.setdefault(kind, {})
        types[tensor.type] = types.get(tensor.type, 0) + 1
    return counted


def _notes(tensors: list[GgufTensor], stored: Mapping[str, Any]) -> list[str]:
    notes = []
    rounded = [tensor for tensor in tensors if not tensor.exact]
    if rounded:
        notes.append(f"{len(rounded)} tensors are rounded, {rounded[0].source} the first: the others are exact")
    grids = {tensor.grid for tensor in stored.values() if isinstance(tensor, PackedTensor)}
    smaller = [str(width) for width in sorted({grid.bits for grid in grids}) if width not in (4, 8)]
    if smaller:
        notes.append(
            f"codes of {' and '.join(smaller)} bits take the room of GGUF's next wider type, with the same values"
        )
    if any(grid.activations != "none" for grid in grids):
        notes.append("the activations' own quantization has no place in GGUF")
    if not grids:
        notes.append("these are plain weights: for 4 bits, compress with the recipe gguf-q4_0 or with format=gguf")
    return notes
