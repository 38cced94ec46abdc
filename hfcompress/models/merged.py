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
The repo of a PEFT adapter as a model: its base with the adapter's products added, as a checkpoint of its own beside the Hub's
cache (`$HF_HOME/hfcompress/merged`), where it is found again. From there on it is a dense model like any other.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from safetensors.torch import save_file
from torch import Tensor

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.adapter import CONFIG, WEIGHTS, Adapted, LowRankUpdate, of_another_model, read_adapter
from hfcompress.models.checkpoint import Checkpoint


MERGED = Path(HF_HOME) / "hfcompress" / "merged"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 2_000_000_000  # of weights in a file, where the base has none to go by


def merged(
    folder: Path, trust_remote_code: bool = False, unpack: Callable[[Checkpoint], Checkpoint] | None = None
) -> Path:
    """
    Args:
        folder (`Path`): of an adapter.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run modelling code that the base carries.
        unpack (`Callable`, *optional*): makes of a quantized base the dense model that it stands for.

    Returns:
        `Path`: the folder of the whole model, in the base's dtype.

    Raises:
        CheckpointError: the adapter is damaged or of another model, or the base is not there.
        UnsupportedModelError: it is no plain LoRA, or its base is quantized and cannot be unpacked.
    """
    update = read_adapter(folder)
    base = Checkpoint.open(update.base + (f"@{update.revision}" if update.revision else ""), None, trust_remote_code)
    assert base.folder is not None
    result = MERGED / _digest(folder, base)
    if not result.is_dir():
        if base.quantization_config is not None:
            base = _unpacked(folder, base, unpack)
        MERGED.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=MERGED) as name:
            _write(Path(name), folder, base, update)
            _publish(Path(name), result)
    return result


def _unpacked(folder: Path, base: Checkpoint, unpack: Callable[[Checkpoint], Checkpoint] | None) -> Checkpoint:
    """The dense model that a quantized base stands for: products are added to weights, not to codes."""
    try:
        if unpack is not None:
            return unpack(base)
        reason = "which is not unpacked here"
    except UnsupportedModelError as error:
        reason = f"which cannot be unpacked ({str(error).rstrip('.')})"
    raise UnsupportedModelError(
        f"The adapter in {folder} belongs to {base.name}, which is quantized, and {reason}; write the base with plain weights and "
        "name it in adapter_config.json."
    )


def _digest(folder: Path, base: Checkpoint) -> str:
    """Of the adapter's bytes and of which files the base is."""
    digest = hashlib.sha256()
    for path in (folder / CONFIG, folder / WEIGHTS):
        digest.update(path.read_bytes())
    assert base.folder is not None
    for path in sorted(
        {tensor.path for tensor in base.tensors.values() if tensor.path} | {base.folder / "config.json"}
    ):
        found = path.stat()
        digest.update(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _write(target: Path, folder: Path, base: Checkpoint, update: LowRankUpdate) -> None:
    """The whole model, file by file as the base has it, in `target`."""
    changed = {}
    for name, (down, up) in update.pairs.items():
        key = _on_disk(f"{name}.weight", base)
        shape = (up.shape[0], down.shape[1])
        if key is None or tuple(base.tensors[key].shape) != (shape[::-1] if update.transposed else shape):
            raise of_another_model(folder, name)
        changed[key] = Adapted(base.tensors[key], down, up, update.scale, update.transposed)
    assert base.folder is not None
    files = _files(base)
    for file, keys in files.items():
        tensors: dict[str, Tensor] = {}
        for key in keys:
            tensors[key] = changed.get(key, base.tensors[key]).read().to(base.tensors[key].dtype).contiguous()
        save_file(tensors, target / file, metadata={"format": "pt"})
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    own = Checkpoint(base.config, str(folder), {}, folder)
    for source in (base, own):  # what the adapter brings replaces the base's
        assert source.folder is not None
        for path in source.companions():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / path, target / path)


def _files(base: Checkpoint) -> dict[str, list[str]]:
    """Which tensors lie in which file: as the base has them, or those of a base that was unpacked in files of a size."""
    if base.packed is None:
        files: dict[str, list[str]] = {}
        for key, tensor in base.tensors.items():
            assert tensor.path is not None
            files.setdefault(tensor.path.name, []).append(key)
        return files
    parts: list[list[str]] = [[]]
    size = 0
    for key, tensor in base.tensors.items():
        if parts[-1] and size + tensor.nbytes > FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(key)
        size += tensor.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": keys for n, keys in enumerate(parts, 1)}


def _on_disk(name: str, base: Checkpoint) -> str | None:
    """The stored name of a parameter: its own, or without the model's prefix, which some checkpoints leave out."""
    return next((key for key in (name, name.partition(".")[2]) if key in base.tensors), None)


def _publish(made: Path, result: Path) -> None:
    """Put it in its place, unless another process was faster."""
    try:
        os.rename(made, result)
    except OSError:
        if not result.is_dir():
            raise
    else:
        made.mkdir()  # for the temporary folder's own end
