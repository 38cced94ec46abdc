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
"""Published measurements of other models: for orientation beside our own, never mixed with them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """One compressed model: the name of its format, its size, and its mean KL to the original in nats."""

    name: str
    gib: float
    kl_mean: float
    kl_mean_stderr: float


@dataclass(frozen=True)
class Scoreboard:
    """Results that were measured alike: what of, how large the 16-bit original is, on what text, and who says so."""

    model: str
    original_gib: float
    text: str
    source: str
    results: tuple[PublishedResult, ...]


# Rows without an importance matrix. The logits of the original were rounded to 16 bits there, which by itself shows as a
# KL of 0.000551; contexts, text and implementation differ from ours.
LLAMA_CPP = Scoreboard(
    model="Llama 3 8B",
    original_gib=14.97,
    text="WikiText-2 test",
    source="llama.cpp, tools/perplexity/README.md, LLaMA 3 8b Scoreboard, revision f364eb6f",
    results=(
        PublishedResult("Q8_0", 7.96, 0.001355, 0.000006),
        PublishedResult("Q6_K", 6.14, 0.005452, 0.000035),
        PublishedResult("Q5_K_M", 5.33, 0.010762, 0.000079),
        PublishedResult("Q4_K_M", 4.58, 0.031273, 0.000238),
        PublishedResult("Q3_K_M", 3.74, 0.101913, 0.000677),
        PublishedResult("Q2_K", 2.96, 0.445132, 0.001835),
    ),
)
