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
"""A checkpoint has a tokenizer where there are files of one, and a digest of all its bytes."""

import pytest
from conftest import CONFIGS, make_model

from hfcompress.models.checkpoint import Checkpoint


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "gemma3", "gpt2"])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(name, tmp_path):
    """Transformers makes an empty tokenizer of the configuration alone, which turns any text into nothing."""
    make_model(CONFIGS[name]()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).tokenizer is None


def test_the_tiny_models_tokenizer(tiny):
    assert Checkpoint.open(tiny).tokenizer("a text")["input_ids"]


def test_every_byte_counts_in_the_digest(saved_llama):
    before = Checkpoint.open(saved_llama).sha256
    assert Checkpoint.open(saved_llama).sha256 == before
    path = saved_llama / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert Checkpoint.open(saved_llama).sha256 != before
