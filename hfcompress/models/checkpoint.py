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
"""A checkpoint: a folder, a Hub id or a model in memory, read one tensor at a time."""

import contextlib
import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from hfcompress.errors import CheckpointError, UnsupportedModelError
from hfcompress.models.companions import COMPANIONS, LICENCES, VOCABULARIES
from hfcompress.models.locate import is_adapter, locate


FEW = 1 << 20  # values
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Checkpoint:
    """
    The weights and the configuration of a model, with the tensors read when asked for.

    Attributes:
        config (`PreTrainedConfig`): the model's configuration.
        name (`str`): the id or the path it came from.
        revision (`str` or `None`): the commit on the Hub.
        folder (`Path` or `None`): where it lies; `None` for a model in memory.
        tensors (`Mapping[str, StoredTensor]`): its tensors by their names on disk.
        generation_config (`GenerationConfig` or `None`): of a model in memory; a folder has it as a file.
        model (`PreTrainedModel` or `None`): the model in memory itself, which is never changed.
        packed (`Checkpoint` or `None`): the quantized one that this is the dense view of.
    """

    def __init__(self, config, name, tensors, folder=None, revision=None, tokenizer=None, trust_remote_code=False):
        self.config: PreTrainedConfig = config
        self.name: str = name
        self.tensors: Mapping[str, StoredTensor] = tensors
        self.folder: Path | None = folder
        self.revision: str | None = revision
        self.trust_remote_code: bool = trust_remote_code
        self.generation_config: GenerationConfig | None = None
        self.model: PreTrainedModel | None = None
        self.packed: Checkpoint | None = None
        self._tokenizer = tokenizer

    @classmethod
    def open(
        cls,
        model: "str | Path | PreTrainedModel | Checkpoint",
        tokenizer=None,
        trust_remote_code: bool = False,
        unpack: "Callable[[Checkpoint], Checkpoint] | None" = None,
    ) -> "Checkpoint":
        """
        Args:
            model (`str`, `Path`, `PreTrainedModel` or `Checkpoint`): a folder, a Hub id (`id` or `id@revision`), or
                a model in memory. The repo of a PEFT adapter stands for its base with the adapter merged into it.
            tokenizer (*optional*): the tokenizer of a model in memory.
            trust_remote_code (`bool`, *optional*, defaults to `False`): run modelling code that the repo carries.
            unpack (`Callable`, *optional*): makes of an adapter's quantized base the dense model that it stands for, as
                [`hfcompress.formats.dense_view.dense_view`] does.

        Raises:
            CheckpointError: it is not there, not complete, or not readable.
        """
        if isinstance(model, Checkpoint):
            return model
        if isinstance(model, PreTrainedModel):
            return cls._from_memory(model, tokenizer)
        folder, revision = locate(str(model), trust_remote_code)
        if is_adapter(folder):
            from hfcompress.models.merged import merged

            folder = merged(folder, trust_remote_code, unpack)
        config = _read_config(folder, trust_remote_code)
        return cls(config, str(model), _stored_tensors(folder), folder, revision, tokenizer, trust_remote_code)

    @classmethod
    def _from_memory(cls, model: PreTrainedModel, tokenizer) -> "Checkpoint":
        from transformers.core_model_loading import revert_weight_conversion

        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        state = {k: v for k, v in model.state_dict().items() if k not in tied}
        state = revert_weight_conversion(model, state)
        tensors = {name: StoredTensor(name, v.dtype, tuple(v.shape), value=v) for name, v in state.items()}
        name = model.config._name_or_path or type(model).__name__
        config = copy.deepcopy(model.config)
        config.architectures = config.architectures or [type(model).__name__]
        if config.dtype is None:
            config.dtype = model.dtype
        checkpoint = cls(config, name, tensors, tokenizer=tokenizer)
        checkpoint.generation_config = getattr(model, "generation_config", None)  # encoders have none
        checkpoint.model = model
        return checkpoint

    @property
    def tokenizer(self):
        """The tokenizer, or `None` where there is none: transformers would make an empty one of the configuration."""
        if self._tokenizer is None and self.folder is not None and any(map(self._holds, VOCABULARIES)):
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        return self._tokenizer

    def _holds(self, pattern: str) -> bool:
        return self.folder is not None and any(self.folder.glob(pattern))

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights: the sum of `model*.safetensors`, or of the tensors of a model in memory."""
        if self.folder is not None:
            return sum(p.stat().st_size for p in self.folder.glob("model*.safetensors"))
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def quantization_config(self) -> dict | None:
        """The configuration's `quantization_config`, or `None` for a dense model."""
        found = getattr(self.config, "quantization_config", None)
        return found if found is None or isinstance(found, dict) else found.to_dict()

    @property
    def parameters(self) -> int:
        """How many weights it stores."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @functools.cached_property
    def sha256(self) -> str:
        """A digest of the configuration and of every weight byte, taken once; of a dense view, what it is a view of."""
        if self.packed is not None:
            return self.packed.sha256
        digest = hashlib.sha256()
        if self.folder is None:
            digest.update(self.config.to_json_string().encode())
            for name, tensor in sorted(self.tensors.items()):
                digest.update(name.encode())
                digest.update(tensor.read().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            return digest.hexdigest()
        for path in [
            self.folder / "config.json",
            *sorted({t.path for t in self.tensors.values() if t.path is not None}),
        ]:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def companions(self) -> Iterator[Path]:
        """Files that belong beside the weights (tokenizer, generation config, chat template), relative to `folder`."""
        if self.folder is not None:
            patterns = (*COMPANIONS, LICENCES, *(["*.py"] if self.trust_remote_code else []))
            found = {p for pattern in patterns for p in self.folder.glob(pattern) if p.is_file()}
            yield from (p.relative_to(self.folder) for p in sorted(found))


class StoredTensor:
    """
    One tensor of a checkpoint, read when asked for.

    Behaves towards transformers' loader as safetensors' lazy slices do: indexing it with `...` reads it whole.
    """

    def __init__(self, name: str, dtype, shape, path: Path | None = None, value: Tensor | None = None):
        self.name, self.dtype, self.shape, self.path, self._value = name, dtype, shape, path, value

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    def read(self) -> Tensor:
        """
        Raises:
            CheckpointError: the shard is damaged, or the tensor holds NaN or infinity.
        """
        if self._value is not None:
            value = self._value.detach()
        else:
            assert self.path is not None
            with open_shard(self.path) as shard:
                value = shard.get_tensor(self.name)
        return self._checked(value)

    def entry(self, index: int) -> Tensor:
        """
        One along the first dimension, without reading the others.

        Raises:
            CheckpointError: as [`read`].
        """
        if self._value is not None:
            return self[index]
        assert self.path is not None
        with open_shard(self.path) as shard:
            return self._checked(shard.get_slice(self.name)[index])

    def __getitem__(self, index) -> Tensor:
        part = self.read()[index]
        return part if self._value is None else part.clone()  # a model in memory is its owner's: never changed

    def _checked(self, value: Tensor) -> Tensor:
        if value.is_floating_point() and value.dtype.itemsize > 1 and not _all_finite(value):
            where = f" in {self.path}" if self.path else ""
            raise CheckpointError(
                f"The weight {self.name}{where} holds NaN or infinity; compress a checkpoint whose weights are finite."
            )
        return value


def entry_of(stored: Any, index: int) -> Tensor:
    """One along the first dimension of a stored tensor or of a view of one; the others are read too only where they must be."""
    return stored.entry(index) if hasattr(stored, "entry") else stored.read()[index]


@dataclass(frozen=True)
class TensorView:
    """
    The base of what reads as another tensor than the one that is stored; see [`StoredTensor`].

    Args:
        stored: the original.
    """

    stored: Any

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def dtype(self) -> torch.dtype:
        """In which it will be written."""
        return self.stored.dtype

    @property
    def path(self) -> Path | None:
        return self.stored.path


def _all_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite, looked at a few at a time: the test makes copies."""
    return all(torch.isfinite(part).all() for part in value.flatten().split(FEW))


@contextlib.contextmanager
def open_shard(path: Path):
    """`safe_open` with its errors turned into one sentence that names the file."""
    try:
        with safe_open(path, "pt") as shard:
            yield shard
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); download or copy that file again."
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"The weight file {path} is missing; download or copy it again.") from error


def _read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"There is no config.json in {folder}; give the folder of a Hugging Face checkpoint "
            "(config.json and model*.safetensors)."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"The config.json in {folder} cannot be read: {reason}") from error


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors, from the headers alone."""
    tensors = {}
    for path in _weight_files(folder):
        with open_shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = shard.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype()) or shard.get_tensor(name).dtype
                tensors[name] = StoredTensor(name, dtype, tuple(part.get_shape()), path=path)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged; download or copy that file again.") from error
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names a file outside its folder ({name}); it cannot be trusted.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise UnsupportedModelError(
            f"{folder} holds pickled weights only; save it as safetensors first "
            "(load it with transformers and call save_pretrained)."
        )
    raise CheckpointError(f"There is no model.safetensors in {folder}; the checkpoint has no weights.")
