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
Import this, and `from_pretrained` reads the layout [`sparse24`][hfcompress.formats.sparse24] and the format
[`hfcompress`][hfcompress.formats.native]:

    import hfcompress.integrations.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("a-checkpoint-in-sparse24")

The weights are unpacked one by one while they are loaded, so the model is an ordinary one.
"""

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.errors import CheckpointError
from hfcompress.formats import native, sparse24
from hfcompress.formats.native.factors import BASE
from hfcompress.formats.native.layout import EVERY_LOCAL, dense_of, require_version
from hfcompress.models.experts import expert_storage
from hfcompress.models.fused_experts import ExpertStorage, Fused
from hfcompress.models.names import in_block


EVERY = "*"  # in the name of a pattern, for the number of an expert


@register_quantization_config(sparse24.QUANT_METHOD)
class Sparse24Config(QuantizationConfigMixin):
    """
    The `quantization_config` of such a checkpoint.

    Args:
        version (`int`): of the layout.
        groups (`list[dict]`): `bits`, `type`, `group_size`, and the linears that share them, `targets`.
    """

    def __init__(self, version: int = 1, groups: list[dict[str, Any]] | None = None, **kwargs):
        self.quant_method: Any = sparse24.QUANT_METHOD
        self.version, self.groups, self.dequantize = version, groups or [], True


@register_quantization_config(native.QUANT_METHOD)
class NativeConfig(QuantizationConfigMixin):
    """
    The `quantization_config` of a checkpoint in the native format.

    Args:
        version (`int`): of the format.
    """

    def __init__(self, version: int = 1, **kwargs):
        self.quant_method: Any = native.QUANT_METHOD
        self.version, self.dequantize = version, True


class UnpackingHfQuantizer(HfQuantizer):
    """The base of those that unpack weights while they are loaded."""

    requires_calibration = True

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.experts = ExpertStorage()
        self.stored = StoredExperts()

    @abstractmethod
    def unpacked(self, found: dict[str, Tensor], name: str) -> Tensor:
        """The weight of the module `name`, of what is stored of it by local names."""

    def get_load_operations(self) -> dict:
        return {"dequantize": _Unpack}

    def update_weight_conversions(self, weight_conversions, model):
        """Merge the experts of models that transformers finds in a checkpoint together alone."""
        self.experts = expert_storage(model, weight_conversions)
        own = _merging(self.experts.held) if self.experts.together else []
        return super().update_weight_conversions([*weight_conversions, *own], model)

    def _process_model_before_weight_loading(self, model, checkpoint_files: Sequence[str] | None = None, **kwargs):
        self.stored.read(checkpoint_files or ())

    def _process_model_after_weight_loading(self, model, **kwargs):
        model._weight_conversions = None  # it is an ordinary model now, and is saved as such
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@register_quantizer(sparse24.QUANT_METHOD)
class Sparse24HfQuantizer(UnpackingHfQuantizer):
    """Unpacks 2:4 weights."""

    serialized_names = {"weight": list(sparse24.LOCALS)}

    def __init__(self, quantization_config: Sparse24Config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        sparse24.require_version(quantization_config.to_dict())
        groups = quantization_config.groups
        self.grids = {name: sparse24.grid_of(group) for group in groups for name in group["targets"]}

    def unpacked(self, found: dict[str, Tensor], name: str) -> Tensor:
        if "weight_index" not in found:
            return found["weight"]
        return sparse24.Sparse24().unpack(found, self.grids[name]).dequantize()


@register_quantizer(native.QUANT_METHOD)
class NativeHfQuantizer(UnpackingHfQuantizer):
    """Decodes weights."""

    serialized_names = {"weight": list(EVERY_LOCAL)}

    def __init__(self, quantization_config: NativeConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        require_version(quantization_config.to_dict())
        self.leaning = _Found()

    def unpacked(self, found: dict[str, Tensor], name: str) -> Tensor:
        if BASE in found:
            self.leaning[name] = found
        return dense_of(found)

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model, **kwargs):
        """Add to the weights that lean on another block's what they lean on."""
        parts = {n: (f, index) for f in self.experts.held for index in range(f.shape[0]) for n in f.names(index)}

        def weight_of(name: str) -> Tensor:
            if name not in parts:
                return model.get_parameter(name)
            fused, index = parts[name]
            return fused.part(model.get_parameter(fused.name)[index], fused.names(index).index(name))

        for name, found in self.leaning.items():
            weight = weight_of(f"{name}.weight")
            base = weight_of(f"{in_block(name, int(found[BASE]))}.weight")
            weight.copy_(base.float() + dense_of(found).to(base.device))
        self.leaning.clear()
        return super()._process_model_after_weight_loading(model, **kwargs)


def _merging(held: Iterable[Fused]) -> list[WeightConverter]:
    """How matrices of experts, one by one, become the parameters that hold them."""
    converters = {}
    for fused in held:
        if fused.parts[0].endswith(".weight"):
            parameter = fused.name.removeprefix(f"{fused.holder}.")
            place = ".".join(fused.holder.split(".")[-2:])  # the same in every block
            steps: list[ConversionOps] = [MergeModulelist(0)]
            steps += [Concatenate(1)] if len(fused.parts) > 1 else []
            steps += [Interleave(1, inverse=True)] if fused.interleaved else []
            steps += [Transpose(1, 2)] if fused.transposed else []
            sources = [f"{place}.{EVERY}.{part}" for part in fused.parts]
            converters[place, parameter] = WeightConverter(sources, f"{place}.{parameter}", operations=steps)
    return list(converters.values())


class StoredExperts:
    """
    Which experts have which tensors, which transformers does not tell: it hands over those that there are of each kind, by the
    numbers of the experts.
    """

    def __init__(self):
        self._numbers: dict[tuple[str, str, str], list[int]] = {}

    def read(self, files: Iterable[str]) -> None:
        """Look at the names in a checkpoint's files."""
        for file in files:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                    found = re.fullmatch(r"(.*)[.](\d+)[.](\w+)[.](\w+)", name)
                    if found is not None:
                        holder, number, own, local = found.groups()
                        self._numbers.setdefault((holder, own, local), []).append(int(number))

    def experts_with(self, holder: str, own: str, local: str) -> list[int]:
        """
        The experts of a module that have such a tensor of a projection, ascending; none if no file was looked at. What is called
        otherwise on disk is known by the numbers in its name.
        """
        if (holder, own, local) in self._numbers:
            return sorted(self._numbers[holder, own, local])
        alike = [
            key for key in self._numbers if key[1:] == (own, local) and _numbers_in(key[0]) == _numbers_in(holder)
        ]
        return sorted(number for key in alike for number in self._numbers[key])


def _numbers_in(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


class _Found(dict[str, dict[str, Tensor]]):
    """What was stored of modules. transformers copies quantizers while it loads, and what a copy finds is for all of them."""

    def __deepcopy__(self, memo):
        return self


class _Unpack(ConversionOps):
    """
    The dense weight of one module, of the tensors that were stored for it; or those of all experts of a block, which
    transformers merges behind it.
    """

    def __init__(self, hf_quantizer: UnpackingHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, Any]:
        model, full_layer_name = kwargs["model"], kwargs["full_layer_name"]
        if any(EVERY in name for name in input_dict):
            return self._of_experts(input_dict, full_layer_name, model.get_parameter(full_layer_name))
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        found = {name.rpartition(".")[2]: value for name, value in found.items()}
        weight = self.hf_quantizer.unpacked(found, full_layer_name.removesuffix(".weight"))
        return {full_layer_name: weight.to(model.get_parameter(full_layer_name).dtype)}

    def _of_experts(self, input_dict: dict[str, Any], full_layer_name: str, merged: Tensor) -> dict[str, Any]:
        """Pattern of one projection -> the weights `(experts, out_features, in_features)`."""
        holder = full_layer_name.rpartition(".")[0]
        found: dict[str, Any] = {}
        unreadable = CheckpointError(
            f"Some experts of {holder} are incomplete; download or copy the checkpoint again."
        )
        for projection in dict.fromkeys(name.rpartition(".")[0] for name in input_dict):
            stored = {
                n.rpartition(".")[2]: each for n, each in input_dict.items() if n.rpartition(".")[0] == projection
            }
            own = projection.rpartition(".")[2]
            experts: list[dict[str, Tensor]] = [{} for _ in range(len(merged))]
            for local, tensors in stored.items():
                numbers = self.hf_quantizer.stored.experts_with(holder, own, local) or range(len(merged))
                if len(numbers) != len(tensors):
                    raise unreadable
                for number, tensor in zip(numbers, tensors, strict=True):
                    experts[number][local] = tensor
            weights = []
            for number, parts in enumerate(experts):
                try:
                    weight = self.hf_quantizer.unpacked(parts, f"{holder}.{number}.{own}")
                except KeyError as error:
                    raise unreadable from error
                weights.append(weight.to(merged.dtype))
            found[f"{projection}.weight"] = torch.stack(weights)
        return found
