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
Llamas of a shape and with random weights, to time on: *wide*, two blocks of a thousand million weights, *deep*, 64
blocks of hidden size 512, and *8b*, that of Llama 3 8B, for a GPU.
"""

import json
import shutil
from pathlib import Path
from typing import Any


SHAPES: dict[str, dict[str, int]] = {
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
    },
    "deep": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
DATA = {"wide": (32, 512), "deep": (32, 512), "8b": (128, 2048)}  # rows and tokens in each
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHARD_BLOCKS = 8


def make_shape(name: str, folder: Path, tokenizer: Path, blocks: int | None = None, rows: int | None = None) -> Path:
    """
    Write a model, and token ids beside it.

    Args:
        name (`str`): of `SHAPES`.
        folder (`Path`): to make.
        tokenizer (`Path`): a model's folder whose tokenizer is copied: peers ask for one, and none is used.
        blocks (`int`, *optional*): so many in place of the shape's.
        rows (`int`, *optional*): of token ids, in place of the shape's.
    """
    import numpy as np

    length = DATA[name][1]
    shape = {**SHAPES[name], **({} if blocks is None else {"num_hidden_layers": blocks})}
    write_llama(llama_config(max_position_embeddings=2 * length, **shape), folder)
    for file in TOKENIZER:
        if (tokenizer / file).is_file():
            shutil.copyfile(tokenizer / file, folder / file)
    ids = np.random.default_rng(0).integers(0, shape["vocab_size"], (rows or DATA[name][0], length)).astype(np.int32)
    np.save(folder / "calibration.npy", ids)
    np.save(folder / "evaluation.npy", ids[:4])
    return folder


def llama_config(**shape: int) -> Any:
    """The config of a Llama in bfloat16 with an output head of its own."""
    from transformers import LlamaConfig

    return LlamaConfig(tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"], **shape)


def linears_of_block(config: Any) -> dict[str, tuple[int, int]]:
    """`(out_features, in_features)` of every linear of a block."""
    size, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (size // config.num_attention_heads)
    return {
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (keys, size),
        "self_attn.v_proj": (keys, size),
        "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }


def outside_and_block(config: Any) -> tuple[int, int]:
    """How many weights lie outside the blocks, and in each."""
    of_block = sum(rows * columns for rows, columns in linears_of_block(config).values()) + 2 * config.hidden_size
    return 2 * config.vocab_size * config.hidden_size + config.hidden_size, of_block


def write_llama(config: Any, folder: Path) -> int:
    """
    Write random weights shard by shard, so that no more than a shard is in memory.

    Args:
        config (`LlamaConfig`): of [`llama_config`].
        folder (`Path`): to make.

    Returns:
        `int`: bytes of all weights.
    """
    import torch

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(config.hidden_size, dtype=torch.bfloat16)

    shards = []
    for first in range(0, config.num_hidden_layers, SHARD_BLOCKS):
        tensors = {}
        for block in range(first, min(first + SHARD_BLOCKS, config.num_hidden_layers)):
            stem = f"model.layers.{block}"
            tensors |= {f"{stem}.{name}.weight": weight(*shape) for name, shape in linears_of_block(config).items()}
            tensors |= {f"{stem}.{name}.weight": ones() for name in ("input_layernorm", "post_attention_layernorm")}
        shards.append(_write_shard(folder, len(shards), tensors))
    last = {
        "model.embed_tokens.weight": weight(config.vocab_size, config.hidden_size),
        "model.norm.weight": ones(),
        "lm_head.weight": weight(config.vocab_size, config.hidden_size),
    }
    shards.append(_write_shard(folder, len(shards), last))
    outside, of_block = outside_and_block(config)
    total = 2 * (config.num_hidden_layers * of_block + outside)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: shard for shard, names in shards for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return total


def _write_shard(folder: Path, number: int, tensors: dict[str, Any]) -> tuple[str, list[str]]:
    """One shard; its name and what it holds."""
    from safetensors.torch import save_file

    name = f"model-{number:05d}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return name, list(tensors)
