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
"""What a configuration is called in GGUF, and which configurations llama.cpp's graph does not follow."""

import numpy as np
import pytest
import torch
from conftest import _COMMON, _MIXED, CONFIGS
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hfcompress.errors import UnsupportedModelError
from hfcompress.formats.gguf.architecture import describe, rope_rows


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}


def gemma3(**changes):
    return Gemma3TextConfig(**{**_COMMON, **_MIXED, "query_pre_attn_scalar": 16, **changes})


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("phi3", "phi3")]
)
def test_sizes(kind, name):
    described = describe(CONFIGS[kind]())
    assert described.name == name
    assert described.notes == []
    assert described.keys == {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": CONFIGS[kind]().rms_norm_eps,
        "vocab_size": 128,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 16,
    }


def test_rotating_neighbours_in_the_new_order_is_rotating_halves_in_the_old():
    """Rotate each head of 6 both ways, feature by feature."""
    config = LlamaConfig(**{**_COMMON, "head_dim": 6})
    rows = rope_rows(config, 2)
    vector, angles = np.random.default_rng(0).normal(size=12), np.array([0.3, 0.7, 1.1])
    halves, neighbours = vector.copy(), vector[rows]
    for head in (0, 6):
        for i, angle in enumerate(angles):
            for rotated, a, b in ((halves, head + i, head + i + 3), (neighbours, head + 2 * i, head + 2 * i + 1)):
                x, y = rotated[a], rotated[b]
                rotated[a], rotated[b] = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    np.testing.assert_allclose(neighbours, halves[rows], rtol=0, atol=1e-15)
    assert sorted(rows) == list(range(12))


def test_llama3_frequencies_are_divided_to_transformers_own():
    parameters = {**LLAMA_3, "rope_theta": 500.0, "original_max_position_embeddings": 32}
    config = LlamaConfig(**{**_COMMON, "max_position_embeddings": 256}, rope_parameters=parameters)
    factors = describe(config).tensors["rope_freqs.weight"]
    plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert factors.dtype == np.float32
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors.min() == 1
    assert factors.max() == pytest.approx(8)


def test_scaled_rotary_embeddings():
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    keys = describe(LlamaConfig(**_COMMON, rope_parameters=linear)).keys
    assert (keys["rope.scaling.type"], keys["rope.scaling.factor"]) == ("linear", 4.0)
    keys = describe(Qwen2Config(**_COMMON, rope_parameters={**YARN, "beta_fast": 30.0})).keys
    assert keys["rope.scaling.type"] == "yarn"
    assert keys["rope.scaling.original_context_length"] == 32
    assert keys["rope.scaling.yarn_beta_fast"] == 30.0


def test_longrope_of_phi3():
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    parameters |= {"long_factor": [2.0] * 6, "short_factor": [1.5] * 6, "partial_rotary_factor": 0.75}
    config = Phi3Config(**_COMMON, rope_parameters=parameters, original_max_position_embeddings=32)
    described = describe(config)
    assert described.keys["rope.dimension_count"] == 12
    assert described.keys["rope.scaling.attn_factor"] == pytest.approx((1 + 1 / 5) ** 0.5)  # log(2) / log(32)
    np.testing.assert_array_equal(described.tensors["rope_factors_long.weight"], np.full(6, 2, np.float32))
    assert "when it is opened with a context above 32" in described.notes[0]


@pytest.mark.parametrize("kind", ["mistral-sliding", "qwen3-mixed"])
def test_a_context_is_cut_to_a_window_that_llama_cpp_does_not_slide(kind):
    described = describe(CONFIGS[kind]())
    assert described.keys["context_length"] == 8
    assert "cut from 64 to 8" in described.notes[0]


def test_gemma3_says_which_blocks_slide():
    described = describe(gemma3(layer_types=["sliding_attention", "full_attention", "sliding_attention"]))
    assert described.keys["attention.sliding_window"] == 8
    assert described.keys["attention.sliding_window_pattern"] == [True, False, True]
    assert described.keys["rope.freq_base_swa"] == 10000.0
    assert described.keys["rope.freq_base"] == 1000000.0
    assert described.notes == []
    usual = describe(gemma3(num_hidden_layers=7)).keys
    assert "attention.sliding_window_pattern" not in usual
    assert describe(gemma3(final_logit_softcapping=30.0)).keys["final_logit_softcapping"] == 30.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CONFIGS["gpt2"], "this model is a gpt2"),
        (lambda: LlamaConfig(**_COMMON, hidden_act="gelu"), "llama with silu, and this model has gelu"),
        (lambda: gemma3(query_pre_attn_scalar=256), r"has 1/sqrt\(256\)"),
        (lambda: gemma3(attn_logit_softcapping=50.0), "a cap of 50"),
        (
            lambda: LlamaConfig(**_COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "'dynamic' is not written to GGUF for llama",
        ),
        (
            lambda: Qwen2Config(
                **_COMMON, rope_parameters={**LLAMA_3, "rope_theta": 1e4, "original_max_position_embeddings": 32}
            ),
            "'llama3' is not written to GGUF for qwen2",
        ),
        (
            lambda: Qwen2Config(**_COMMON, rope_parameters={**YARN, "attention_factor": 2.0}),
            "YaRN with attention_factor",
        ),
        (
            lambda: LlamaConfig(
                **_COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ),
            "rotates whole heads of llama, and this model 8 features",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(config, says):
    with pytest.raises(UnsupportedModelError, match=says):
        describe(config())


def test_gemma3_windows_are_not_scaled():
    config = gemma3()
    config.rope_parameters["sliding_attention"]["rope_type"] = "linear"
    with pytest.raises(UnsupportedModelError, match="frequencies of gemma3's sliding windows"):
        describe(config)
