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
A Llama with random weights, larger than memory may be, written shard by shard:

    python scripts/make_large_checkpoint.py FOLDER [--gigabytes 6] [--hidden 2048] [--intermediate 5632]

Beside it `calib.npy`, random token ids. It says nothing of quality; it is for showing that memory does not grow with a
model.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


SHARD_BLOCKS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of bfloat16 weights, at least")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 512),
        vocab_size=options.vocabulary,
        max_position_embeddings=max(2048, options.seq_len),
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    size, keys = options.hidden, config.num_key_value_heads * 64
    shapes = {
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (keys, size),
        "self_attn.v_proj": (keys, size),
        "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (options.intermediate, size),
        "mlp.up_proj": (options.intermediate, size),
        "mlp.down_proj": (size, options.intermediate),
    }
    of_block = sum(rows * columns for rows, columns in shapes.values()) + 2 * size
    outside = 2 * options.vocabulary * size + size
    config.num_hidden_layers = max(1, -(-(int(options.gigabytes * 1e9) // 2 - outside) // of_block))
    options.folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    shards = []
    for first in range(0, config.num_hidden_layers, SHARD_BLOCKS):
        tensors = {}
        for block in range(first, min(first + SHARD_BLOCKS, config.num_hidden_layers)):
            stem = f"model.layers.{block}"
            tensors |= {f"{stem}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
            tensors |= {f"{stem}.{name}.weight": ones() for name in ("input_layernorm", "post_attention_layernorm")}
        shards.append(write(options.folder, len(shards), tensors))
    last = {
        "model.embed_tokens.weight": weight(options.vocabulary, size),
        "model.norm.weight": ones(),
        "lm_head.weight": weight(options.vocabulary, size),
    }
    shards.append(write(options.folder, len(shards), last))
    weight_map = {name: shard for shard, names in shards for name in names}
    total = 2 * (config.num_hidden_layers * of_block + outside)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(options.folder)
    ids = np.random.default_rng(0).integers(0, options.vocabulary, (options.rows, options.seq_len))
    np.save(options.folder / "calib.npy", ids.astype(np.int32))
    print(f"{config.num_hidden_layers} blocks, {total / 1e9:.2f} GB in {options.folder}")


def write(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> tuple[str, list[str]]:
    """One shard; its name and what it holds."""
    name = f"model-{number:05d}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return name, list(tensors)


if __name__ == "__main__":
    main()
