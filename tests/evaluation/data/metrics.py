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
"""Metrics of generated answers that a task file names with `!function`: lm-eval would look for them on the Hub."""

from collections import Counter


def f1(references: list[str], predictions: list[str]) -> float:
    """Harmonic mean of precision and recall over the answer's words (Rajpurkar et al. 2016, section 6.1)."""
    expected, given = references[0].lower().split(), predictions[0].lower().split()
    shared = (Counter(expected) & Counter(given)).total()
    return 2 * shared / (len(expected) + len(given)) if shared else 0.0


def rougeL(references: list[str], predictions: list[str]) -> float:
    """ROUGE-L's F measure (Lin 2004), by the package that comes with lm-eval."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score(references[0], predictions[0])["rougeL"].fmeasure
