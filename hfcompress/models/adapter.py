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
An adapter in PEFT's own format, on disk: `adapter_config.json` and `adapter_model.safetensors` in a folder of their own.

It is written with PEFT's own configuration and read without PEFT, as weights with the products added.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from hfcompress.models.checkpoint import Checkpoint, open_shard
from hfcompress.models.streaming import StreamedModel


ADAPTER = "adapter"  # the folder, within a checkpoint's
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
OTHERWISE = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")


def require_peft(step: str) -> None:
    """
    Raises:
        MissingExtraError: PEFT is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"{step} needs peft: pip install 'hfcompress[peft]'.") from error


def write_adapter(
    folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], base: str, every: Collection[str], transposed: bool
) -> None:
    """
    Args:
        folder (`Path`): is made.
        pairs (`Mapping`): module name -> `down` `(rank, in_features)` and `up` `(out_features, rank)`, all of one rank.
        base (`str`): the model that it belongs to, as `from_pretrained` takes it.
        every (`Collection[str]`): the names of all the model's linears.
        transposed (`bool`): its linears hold their weights `(in_features, out_features)`.
    """
    from peft import LoraConfig, TaskType

    rank = len(next(iter(pairs.values()))[0])
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=_short(pairs, every),
        fan_in_fan_out=transposed,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"{PREFIX}{name}{DOWN}"], tensors[f"{PREFIX}{name}{UP}"] = down.contiguous(), up.contiguous()
    (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    config.save_pretrained(str(folder))
    (folder / CONFIG).write_text(rebased((folder / CONFIG).read_text(encoding="utf-8"), base), encoding="utf-8")


def _short(names: Collection[str], every: Collection[str]) -> list[str]:
    """The last parts of the names where they mean just these modules, as people and servers write them; or the names."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {name for name in every if name.rpartition(".")[2] in last}
    return sorted(last if meant == set(names) else names)


def rebased(config: str, base: str) -> str:
    """An `adapter_config.json` for the same base under this name, the same at each call."""
    settings = json.loads(config)
    settings |= {"base_model_name_or_path": base, "target_modules": sorted(settings["target_modules"])}
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


@dataclass
class Adapted:
    """
    A stored weight with a product added; reads as a [`hfcompress.models.checkpoint.StoredTensor`] does.

    Args:
        stored (`Any`): the weight.
        down, up (`Tensor`): the product's parts.
        scale (`float`): what it is multiplied by.
        transposed (`bool`): the weight is stored `(in_features, out_features)`.
    """

    stored: Any
    down: Tensor
    up: Tensor
    scale: float
    transposed: bool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)

    def read(self) -> Tensor:
        """The sum, in float32 and then in the weight's dtype unless that would round it."""
        product = self.scale * (self.up.float() @ self.down.float())
        return self.stored.read().float() + (product.T if self.transposed else product)

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


def has_adapter(checkpoint: Checkpoint) -> bool:
    """Whether an adapter lies in a checkpoint's folder."""
    return checkpoint.folder is not None and (checkpoint.folder / ADAPTER / CONFIG).is_file()


def adapter_of(checkpoint: Checkpoint) -> Path:
    """The folder of the adapter that lies in a checkpoint's own."""
    assert checkpoint.folder is not None
    return checkpoint.folder / ADAPTER


@dataclass(frozen=True)
class LowRankUpdate:
    """
    What an adapter adds to a model's weights.

    Args:
        pairs (`dict`): module name -> `down` `(rank, in_features)` and `up` `(out_features, rank)`.
        scale (`float`): what the products are multiplied by.
        transposed (`bool`): the weights are stored `(in_features, out_features)`.
        base (`str`): the model that it belongs to.
        revision (`str` or `None`): of that.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    scale: float
    transposed: bool
    base: str
    revision: str | None


def read_adapter(folder: Path) -> LowRankUpdate:
    """
    Raises:
        CheckpointError: the adapter in this folder is damaged.
        UnsupportedModelError: it is one of another kind than LoRA.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        rank, alpha, kind = config["r"], config["lora_alpha"], config["peft_type"]
        base = str(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged; download or copy it again.") from error
    other = [key for key in OTHERWISE if config.get(key)]
    if kind != "LORA" or other or config.get("bias", "none") != "none":
        raise _no_plain_lora(folder, ", ".join(other) or kind)
    with open_shard(folder / WEIGHTS) as shard:
        stored = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (no mapping)
    others = [name for name in stored if not name.endswith((DOWN, UP))]
    if others:
        raise _no_plain_lora(folder, others[0])
    downs = [key.removesuffix(DOWN) for key in stored if key.endswith(DOWN)]
    if {key.removesuffix(UP) for key in stored if key.endswith(UP)} != set(downs):
        raise CheckpointError(f"{folder / WEIGHTS} is damaged; download or copy it again.")
    pairs = {key.removeprefix(PREFIX): (stored[f"{key}{DOWN}"], stored[f"{key}{UP}"]) for key in downs}
    return LowRankUpdate(pairs, alpha / rank, bool(config.get("fan_in_fan_out")), base, config.get("revision"))


def _no_plain_lora(folder: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"The adapter in {folder} is no plain LoRA ({what}); merge it with peft first.")


def of_another_model(folder: Path, name: str) -> CheckpointError:
    """What is said of an adapter that changes a module which the model does not have, or has in another shape."""
    return CheckpointError(f"The adapter in {folder} is of another model: it changes {name}, which is not here.")


def adapted(model: StreamedModel, folder: Path) -> StreamedModel:
    """
    A model with an adapter's products added to its weights.

    Raises:
        CheckpointError: the adapter is damaged, or belongs to another model.
        UnsupportedModelError: it is one of another kind.
    """
    update, tensors = read_adapter(folder), {}
    for name, (down, up) in update.pairs.items():
        source = model.sources.get(f"{name}.weight")
        if source is None:
            raise of_another_model(folder, name)
        transposed = isinstance(model.skeleton.get_submodule(name), Conv1D)
        tensors[source] = Adapted(model.tensors[source], down, up, update.scale, transposed)
    return model.reading(tensors)
