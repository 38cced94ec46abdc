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
Models of a shape and with random weights, to time on: *wide*, two blocks of a Llama of a thousand million weights, and
*deep*, 64 blocks of hidden size 512.
"""

import shutil
from pathlib import Path


SHAPES = {
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "deep": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
}
VOCABULARY, ROWS, LENGTH = 4096, 32, 512
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def make_shape(name: str, folder: Path, tokenizer: Path) -> Path:
    """
    Write a model, and token ids beside it.

    Args:
        name (`str`): of `SHAPES`.
        folder (`Path`): to make.
        tokenizer (`Path`): a model's folder whose tokenizer is copied: peers ask for one, and none is used.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2 * LENGTH, **SHAPES[name])
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in TOKENIZER:
        if (tokenizer / file).is_file():
            shutil.copyfile(tokenizer / file, folder / file)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    np.save(folder / "calibration.npy", ids)
    np.save(folder / "evaluation.npy", ids[:4])
    return folder
