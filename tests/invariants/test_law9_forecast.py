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
"""Law 9: what a plan says of memory and size holds in the run, and a limit is kept."""

import numpy as np
import pytest
import torch
from conftest import make_model
from measure_forecast import compared
from transformers import LlamaConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two blocks that are large beside what a process has in memory from the beginning, at these tokens."""
    folder = tmp_path_factory.mktemp("law9") / "llama"
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=512,
    )
    make_model(config, torch.bfloat16).save_pretrained(folder)
    np.save(folder / "calib.npy", np.random.default_rng(0).integers(0, 4096, (24, 512)).astype(np.int32))
    return folder


def test_memory_and_size_are_as_forecast_and_a_limit_is_kept(model, tmp_path):
    free = compared(model, "gptq-w4a16", None, tmp_path)
    assert free["way"] == "halted"
    assert abs(free["memory_ratio"] - 1) <= 0.15
    assert abs(free["size_ratio"] - 1) <= 0.01
    limit = (free["least_bytes"] + free["measured_bytes"]) // 2
    assert limit < 0.95 * free["measured_bytes"]  # so that there is something to keep
    limited = compared(model, "gptq-w4a16", limit, tmp_path)
    assert limited["way"] != "halted"
    assert limited["measured_bytes"] <= limit
    assert abs(limited["memory_ratio"] - 1) <= 0.15


@pytest.mark.slow
def test_a_limit_is_kept_where_factors_are_moved(model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("recipe:\n  - awq: {grid: 4, rows: 2}\n  - gptq: {bits: 4, group_size: 128}\n")
    limit = int(1.03 * compared(model, str(recipe), None, tmp_path)["least_bytes"])  # another process begins with more
    assert compared(model, str(recipe), limit, tmp_path)["measured_bytes"] <= limit
