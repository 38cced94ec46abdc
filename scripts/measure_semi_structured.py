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
What 2:4 weights gain on this GPU: every linear of a decoder block, dense and on torch's sparse kernels.

    python scripts/measure_semi_structured.py [--hidden 4096 --intermediate 14336 --kv 1024] [--tokens 1,64,4096]

JSON on stdout, a line for every row on stderr.
"""

import argparse
import json
import sys
from dataclasses import asdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024, help="outputs of k_proj and v_proj")
    parser.add_argument("--tokens", default="1,16,64,512,4096", help="that go through at once, commas between")
    options = parser.parse_args()

    import torch
    from torch import nn

    from hfcompress.runtime.semi_structured import PATTERN, use_sparse_kernels

    if not torch.cuda.is_available():
        print("error: There is no CUDA GPU here; torch has kernels for 2:4 weights on CUDA alone.", file=sys.stderr)
        return 2
    hidden, wide = options.hidden, options.intermediate
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, options.kv),
        "o_proj": (hidden, hidden),
        "up_proj": (hidden, wide),
        "down_proj": (wide, hidden),
    }
    rows = []
    for tokens in map(int, options.tokens.split(",")):
        block = nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (i, o) in shapes.items()}).cuda().bfloat16()
        for linear in block.values():
            linear.weight.data *= PATTERN.mask(linear.weight.abs())
        for trial in use_sparse_kernels(block, tokens).trials:
            rows.append({"tokens": tokens, **asdict(trial)})
            sparse = "no kernel" if trial.sparse_seconds is None else f"{trial.sparse_seconds * 1e6:.1f} us"
            told = f"{tokens:6} tokens  {trial.name:10} dense {trial.dense_seconds * 1e6:.1f} us  sparse {sparse}"
            print(told, file=sys.stderr)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
