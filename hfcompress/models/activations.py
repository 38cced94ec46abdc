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
"""What a checkpoint's linears and key-value caches do to the activations when plain transformers runs it.

compressed-tensors itself is asked to do it: the part of a `quantization_config` that speaks of activations is applied
to a model without weights, whose modules then round what they are given just as those of a loaded checkpoint do. Where
scales are stored, the model has a parameter for each, `input_scale` of a linear, `k_scale` and `v_scale` of an
attention; a module whose scales are not known yet rounds nothing until it gets them.
"""

import contextlib
import copy
import re
import weakref
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.models.experts import Routed, find_experts


QUANT_METHOD = "compressed-tensors"
INPUT = "input_scale"
CACHE = ("k_scale", "v_scale")


def round_activations(model: PreTrainedModel, config: Mapping[str, Any]) -> None:
    """
    Let the modules of a model round their inputs and caches.

    Args:
        model (`PreTrainedModel`): the model; needs no weights.
        config (`Mapping`): a `quantization_config`; what it says of the weights is not done. One of another method than
            compressed-tensors says nothing of activations.
    """
    if config.get("quant_method") != QUANT_METHOD:
        return
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    known = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "dequantize"})
    groups: dict[str, Any] = dict(known.config_groups)
    known.config_groups = {name: group for name, group in groups.items() if group.input_activations is not None}
    if config.get("dequantize") or not (known.config_groups or known.kv_cache_scheme):
        return  # with "dequantize" transformers loads the weights alone
    for group in groups.values():
        group.weights = None
    # transformers merges experts, and rounds nothing there
    inside = [f"re:{re.escape(name)}[.]" for name in find_experts(model)]
    known.ignore = [*(known.ignore or []), *inside]
    apply_quantization_config(model, known, show_progress=False)


def await_scales(model: nn.Module, scales: Iterable[str]) -> None:
    """Let the modules that these scales, parameters by their full names, belong to round nothing until they get them."""
    for name in scales:
        _enable(model.get_submodule(name.rpartition(".")[0]), False)


def set_scales(module: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Give a module the scales that it was waiting for, by their local names; from now on it rounds."""
    like = next(p for p in module.parameters() if p.device.type != "meta")  # the scales that are awaited have no data
    for name, value in scales.items():
        module.register_parameter(name, nn.Parameter(value.to(like.device, like.dtype), requires_grad=False))
    if scales:
        _enable(module, True)


def rounded_input(linear: nn.Module, inputs: Any) -> Any:
    """What a linear makes of its inputs before it multiplies them with its weight."""
    if isinstance(inputs, Routed):
        return inputs  # transformers merges experts while loading, and rounds nothing that they are given
    scheme = getattr(linear, "quantization_scheme", None)
    if scheme is None or not getattr(linear, "quantization_enabled", True):
        return inputs
    from compressed_tensors.quantization import forward_quantize

    return forward_quantize(linear, inputs, "input", scheme.input_activations)


def rounds_caches(model: PreTrainedModel) -> bool:
    """Whether compressed-tensors knows the heads of this model, without which it rounds no cache."""
    from compressed_tensors.utils import get_head_dim, get_num_attn_heads, get_num_kv_heads

    config = model.config.get_text_config(decoder=True)
    try:
        return all(find(config) for find in (get_num_attn_heads, get_num_kv_heads, get_head_dim))
    except ValueError:
        return False


def find_attentions(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Full name -> module, for every attention whose cache compressed-tensors can round."""
    from compressed_tensors.quantization import is_cached_attention_module

    return {f"{prefix}.{n}": m for n, m in module.named_modules() if is_cached_attention_module(m)}


def cache_of(attention: nn.Module) -> nn.Module:
    """The module that an attention hands its keys and values to, each `(rows, heads, seq_len, head_dim)`."""
    from compressed_tensors.modeling import KV_CACHE_ATTR

    return getattr(attention, KV_CACHE_ATTR)


@contextlib.contextmanager
def unrounded(module: nn.Module) -> Generator[None]:
    """Within, no module rounds its activations."""
    known = [m for m in module.modules() if hasattr(m, "quantization_scheme")]
    before = [getattr(m, "quantization_enabled", True) for m in known]
    for each in known:
        _enable(each, False)
    try:
        yield
    finally:
        for each, enabled in zip(known, before, strict=True):
            _enable(each, enabled)


def dense_twin(block: nn.Module) -> nn.Module:
    """A copy of a block that rounds no activations."""
    with unrounded(block):
        twin = copy.deepcopy(block)
    for attention in find_attentions(twin, "").values():
        if hasattr(attention, "quantization_scheme"):
            vars(cache_of(attention))["attn_module"] = weakref.ref(attention)  # deepcopy keeps the one to the original
    return twin


def _enable(module: nn.Module, enabled: bool) -> None:
    """compressed-tensors' own switch, which its forwards look at."""
    vars(module)["quantization_enabled"] = enabled
