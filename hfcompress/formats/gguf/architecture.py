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
"""What a configuration is called in GGUF: the architecture, its hyperparameters, and how its weights are laid out.

GGUF names the graph that a reader builds (`general.architecture`), so each one is described here by what llama.cpp does
where transformers does something else. A configuration that the graph does not follow is refused.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hfcompress.errors import UnsupportedModelError


# model_type of a configuration -> general.architecture
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
GEMMA3_PERIOD = 6  # every sixth block sees the whole context, unless a pattern is given


@dataclass
class Architecture:
    """
    Args:
        name (`str`): `general.architecture`.
        keys (`dict`): hyperparameters without the architecture's prefix: integers, floats, strings, lists.
        tensors (`dict[str, np.ndarray]`): what the reader needs and the checkpoint does not store.
        notes (`list[str]`): what a user should know.
    """

    name: str
    keys: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe(config: PreTrainedConfig) -> Architecture:
    """
    Args:
        config (`PreTrainedConfig`): of a decoder.

    Raises:
        UnsupportedModelError: there is no GGUF architecture for it here, or llama.cpp computes it in another way.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, and this model is a {kind}; use another format."
        )
    name = ARCHITECTURES[kind]
    activation = "gelu_pytorch_tanh" if name == "gemma3" else "silu"
    found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if found != activation:
        raise UnsupportedModelError(f"llama.cpp computes {name} with {activation}, and this model has {found}.")
    described = Architecture(name, _sizes(config))
    _add_windows(described, config)
    _add_rope(described, config)
    return described


def head_dim(config: PreTrainedConfig) -> int:
    """Features per attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_rows(config: PreTrainedConfig, heads: int) -> np.ndarray:
    """
    The order in which llama.cpp's llama graph wants the rows of the query and key projections: it rotates neighbouring
    rows of a head (0 and 1, 2 and 3, ...), and transformers the first half against the second.

    Args:
        config (`PreTrainedConfig`): of the model.
        heads (`int`): heads of the projection.

    Returns:
        `np.ndarray`: `(heads * head_dim,)`, the row of transformers' that comes at each place.
    """
    width = head_dim(config)
    return np.arange(heads * width).reshape(heads, 2, width // 2).swapaxes(1, 2).reshape(-1)


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    width = head_dim(config)
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }


def _add_windows(described: Architecture, config: PreTrainedConfig) -> None:
    """Sliding windows: gemma3's graph has them; for the others the context is cut to where they make no difference."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or []
    sliding = "sliding_attention" in layers if layers else bool(window)
    if described.name == "gemma3":
        _require_gemma3(config)
        if sliding:
            described.keys["attention.sliding_window"] = window
            pattern = [layer == "sliding_attention" for layer in layers]
            if pattern != [(index + 1) % GEMMA3_PERIOD != 0 for index in range(len(layers))]:
                described.keys["attention.sliding_window_pattern"] = pattern
        softcap = getattr(config, "final_logit_softcapping", None)
        if softcap:
            described.keys["final_logit_softcapping"] = float(softcap)
    elif sliding and window is not None and window < config.max_position_embeddings:
        described.keys["context_length"] = window
        described.notes.append(
            f"context_length is cut from {config.max_position_embeddings} to {window}: llama.cpp has no sliding window "
            f"for {described.name}, and up to there it makes no difference"
        )


def _require_gemma3(config: PreTrainedConfig) -> None:
    # llama.cpp takes the 27B model's scale by its 62 blocks, and the head's size for all others
    width = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else head_dim(config)
    if config.query_pre_attn_scalar != width or getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(
            f"llama.cpp scales this gemma3's attention by 1/sqrt({width}) and caps no attention logits; the model has "
            f"1/sqrt({config.query_pre_attn_scalar}) and a cap of {getattr(config, 'attn_logit_softcapping', None)}."
        )


def _add_rope(described: Architecture, config: PreTrainedConfig) -> None:
    parameters = dict(config.rope_parameters or {})
    if "full_attention" in parameters:
        local = parameters["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise UnsupportedModelError("llama.cpp does not scale the rotary frequencies of gemma3's sliding windows.")
        described.keys["rope.freq_base_swa"] = float(local["rope_theta"])
        parameters = parameters["full_attention"]
    described.keys["rope.freq_base"] = float(parameters["rope_theta"])
    rotated = int(head_dim(config) * parameters.get("partial_rotary_factor", 1.0))
    if rotated != head_dim(config) and described.name != "phi3":
        raise UnsupportedModelError(
            f"llama.cpp rotates whole heads of {described.name}, and this model {rotated} features."
        )
    described.keys["rope.dimension_count"] = rotated
    kind = parameters.get("rope_type", "default")
    scale = {
        "default": _no_scaling,
        "linear": _linear,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }.get(kind)
    if (
        scale is None
        or (kind == "longrope") > (described.name == "phi3")
        or (kind == "llama3") > (described.name == "llama")
    ):
        raise UnsupportedModelError(f"Rotary scaling '{kind}' is not written to GGUF for {described.name}.")
    scale(described, config, parameters)


def _no_scaling(described: Architecture, config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    pass


def _linear(described: Architecture, config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    described.keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}


def _llama3(described: Architecture, config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    """As divisors of the plain frequencies, taken from transformers' own."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_dim(config)
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    described.tensors["rope_freqs.weight"] = (plain / scaled.float()).numpy()


def _yarn(described: Architecture, config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    other = sorted(key for key, value in parameters.items() if key not in known and value is not None)
    if other:
        raise UnsupportedModelError(f"YaRN with {', '.join(other)} is not written to GGUF.")
    described.keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(parameters["factor"])}
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    described.keys["rope.scaling.original_context_length"] = original
    for key in ("beta_fast", "beta_slow"):
        if parameters.get(key) is not None:
            described.keys[f"rope.scaling.yarn_{key}"] = float(parameters[key])


def _longrope(described: Architecture, config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    original = parameters["original_max_position_embeddings"]
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    described.keys["rope.scaling.original_context_length"] = original
    described.keys["rope.scaling.attn_factor"] = float(attention)
    described.notes.append(
        f"llama.cpp takes the long factors when it is opened with a context above {original}, transformers when a text is"
    )
    for key in ("long", "short"):
        described.tensors[f"rope_factors_{key}.weight"] = np.array(parameters[f"{key}_factor"], dtype=np.float32)
