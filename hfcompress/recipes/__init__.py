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
"""What a user writes: one file per step, each a frozen dataclass that validates itself and round-trips through YAML."""

from hfcompress.recipes.awq import AWQ
from hfcompress.recipes.base import Recipe, Steps
from hfcompress.recipes.bitsandbytes import BitsAndBytes
from hfcompress.recipes.budget import Budget
from hfcompress.recipes.codebook import Codebook
from hfcompress.recipes.distill import Distill
from hfcompress.recipes.entropy import Entropy
from hfcompress.recipes.gptq import GPTQ
from hfcompress.recipes.job import Job, job_from_dict, load_job, shipped_recipes, with_changes
from hfcompress.recipes.kv_cache import KVCache
from hfcompress.recipes.lora import LoRA
from hfcompress.recipes.lossless import Lossless
from hfcompress.recipes.lowrank import LowRank
from hfcompress.recipes.prune import Prune
from hfcompress.recipes.qat import QAT
from hfcompress.recipes.rotate import Rotate
from hfcompress.recipes.rtn import RTN
from hfcompress.recipes.share import Share
from hfcompress.recipes.smooth import Smooth
from hfcompress.recipes.sparsify import Sparsify
from hfcompress.recipes.torchao import TorchAo
from hfcompress.recipes.tune import Tune
from hfcompress.recipes.vq import VQ


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
    "Entropy",
    "Job",
    "KVCache",
    "LoRA",
    "Lossless",
    "LowRank",
    "Prune",
    "Recipe",
    "Rotate",
    "Share",
    "Smooth",
    "Sparsify",
    "Steps",
    "TorchAo",
    "Tune",
    "job_from_dict",
    "load_job",
    "shipped_recipes",
    "with_changes",
]
