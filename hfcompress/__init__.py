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
"""hfcompress: smaller checkpoints that load with plain `from_pretrained`, with what it cost measured."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hfcompress.compression import Result, compress
    from hfcompress.distillation.trainer import DistillationConfig, DistillationTrainer
    from hfcompress.errors import HfcompressError
    from hfcompress.exporting import export
    from hfcompress.measuring import compare, evaluate
    from hfcompress.planning import plan
    from hfcompress.publishing import push
    from hfcompress.recipes import (
        AWQ,
        GPTQ,
        QAT,
        RTN,
        VQ,
        BitsAndBytes,
        Budget,
        Codebook,
        Distill,
        Entropy,
        Job,
        KVCache,
        LoRA,
        Lossless,
        LowRank,
        Prune,
        Recipe,
        Rotate,
        Share,
        Smooth,
        Sparsify,
        TorchAo,
        Tune,
    )
    from hfcompress.runtime.loading import load
    from hfcompress.runtime.vector_cache import VectorCache


__version__ = "0.1.0"
_WHERE = {
    "AWQ": "hfcompress.recipes",
    "BitsAndBytes": "hfcompress.recipes",
    "Budget": "hfcompress.recipes",
    "Codebook": "hfcompress.recipes",
    "Distill": "hfcompress.recipes",
    "DistillationConfig": "hfcompress.distillation.trainer",
    "DistillationTrainer": "hfcompress.distillation.trainer",
    "Entropy": "hfcompress.recipes",
    "GPTQ": "hfcompress.recipes",
    "HfcompressError": "hfcompress.errors",
    "Job": "hfcompress.recipes",
    "KVCache": "hfcompress.recipes",
    "LoRA": "hfcompress.recipes",
    "Lossless": "hfcompress.recipes",
    "LowRank": "hfcompress.recipes",
    "Prune": "hfcompress.recipes",
    "QAT": "hfcompress.recipes",
    "RTN": "hfcompress.recipes",
    "Recipe": "hfcompress.recipes",
    "Result": "hfcompress.compression",
    "Rotate": "hfcompress.recipes",
    "Share": "hfcompress.recipes",
    "Smooth": "hfcompress.recipes",
    "Sparsify": "hfcompress.recipes",
    "TorchAo": "hfcompress.recipes",
    "Tune": "hfcompress.recipes",
    "VQ": "hfcompress.recipes",
    "VectorCache": "hfcompress.runtime.vector_cache",
    "compare": "hfcompress.measuring",
    "compress": "hfcompress.compression",
    "evaluate": "hfcompress.measuring",
    "export": "hfcompress.exporting",
    "load": "hfcompress.runtime.loading",
    "plan": "hfcompress.planning",
    "push": "hfcompress.publishing",
}
__all__ = [
    "AWQ",
    "GPTQ",
    "QAT",
    "RTN",
    "VQ",
    "BitsAndBytes",
    "Budget",
    "Codebook",
    "Distill",
    "DistillationConfig",
    "DistillationTrainer",
    "Entropy",
    "HfcompressError",
    "Job",
    "KVCache",
    "LoRA",
    "Lossless",
    "LowRank",
    "Prune",
    "Recipe",
    "Result",
    "Rotate",
    "Share",
    "Smooth",
    "Sparsify",
    "TorchAo",
    "Tune",
    "VectorCache",
    "compare",
    "compress",
    "evaluate",
    "export",
    "load",
    "plan",
    "push",
]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'hfcompress' has no attribute '{name}'")


def __dir__():
    return sorted([*globals(), *__all__])
