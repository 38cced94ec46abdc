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
Import this, and `from_pretrained` reads the layout [`sparse24`][hfcompress.formats.sparse24]:

    import hfcompress.integrations.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("a-checkpoint-in-sparse24")

The weights are unpacked while they are loaded, so the model is an ordinary one.
"""

from typing import Any

from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.formats.sparse24 import LOCALS, QUANT_METHOD, Sparse24, grid_of, require_version


@register_quantization_config(QUANT_METHOD)
class Sparse24Config(QuantizationConfigMixin):
    """
    The `quantization_config` of such a checkpoint.

    Args:
        version (`int`): of the layout.
        groups (`list[dict]`): `bits`, `type`, `group_size`, and the linears that share them, `targets`.
    """

    def __init__(self, version: int = 1, groups: list[dict[str, Any]] | None = None, **kwargs):
        self.quant_method: Any = QUANT_METHOD
        self.version, self.groups, self.dequantize = version, groups or [], True


@register_quantizer(QUANT_METHOD)
class Sparse24HfQuantizer(HfQuantizer):
    """Unpacks 2:4 weights while they are loaded."""

    requires_calibration = True
    serialized_names = {"weight": list(LOCALS)}

    def __init__(self, quantization_config: Sparse24Config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        require_version(quantization_config.to_dict())
        self.grids = {name: grid_of(group) for group in quantization_config.groups for name in group["targets"]}

    def get_load_operations(self) -> dict:
        return {"dequantize": _Unpack}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Unpack(ConversionOps):
    """The dense weight of one module, of the tensors that were stored for it."""

    def __init__(self, hf_quantizer: Sparse24HfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, Any]:
        model, full_layer_name = kwargs["model"], kwargs["full_layer_name"]
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        found = {name.rpartition(".")[2]: value for name, value in found.items()}
        weight = found["weight"]
        if "weight_index" in found:
            grid = self.hf_quantizer.grids[full_layer_name.removesuffix(".weight")]
            weight = Sparse24().unpack(found, grid).dequantize()
        return {full_layer_name: weight.to(model.get_parameter(full_layer_name).dtype)}
