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
from pathlib import Path

import numpy as np

from benchmarking.shapes import llama_config, outside_and_block, write_llama


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
    config = llama_config(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 512),
        vocab_size=options.vocabulary,
        max_position_embeddings=max(2048, options.seq_len),
    )
    outside, of_block = outside_and_block(config)
    config.num_hidden_layers = max(1, -(-(int(options.gigabytes * 1e9) // 2 - outside) // of_block))
    total = write_llama(config, options.folder)
    ids = np.random.default_rng(0).integers(0, options.vocabulary, (options.rows, options.seq_len))
    np.save(options.folder / "calib.npy", ids.astype(np.int32))
    print(f"{config.num_hidden_layers} blocks, {total / 1e9:.2f} GB in {options.folder}")


if __name__ == "__main__":
    main()
