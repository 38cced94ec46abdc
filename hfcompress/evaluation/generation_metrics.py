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
How alike a generated answer and the right one are, as functions that lm-eval calls for one document at a time.

lm-eval has exact match and BLEU (by sacrebleu) itself; for what follows it would look on the Hub.
"""

import re
import string
from collections import Counter


ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """What SQuAD compares: lower case, without ASCII punctuation, then without articles, split at white space."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def token_f1(references: list[str], predictions: list[str]) -> float:
    """
    SQuAD's F1 (Rajpurkar et al. 2016, section 6.1) of two bags of [`words`]: with `s` words in common, each counted as
    often as in the bag that has it less often, of `p` predicted and `r` right ones,

        precision = s / p,  recall = s / r,  F1 = 2 * precision * recall / (precision + recall) = 2 s / (p + r).

    Two empty bags are alike: 1; where one is empty it is 0.

    Args:
        references (`list[str]`): the right answer, one.
        predictions (`list[str]`): the generated one, one.

    Returns:
        `float`: 0 to 1.
    """
    right, predicted = Counter(words(references[0])), Counter(words(predictions[0]))
    total = right.total() + predicted.total()
    return 2 * (right & predicted).total() / total if total else 1.0


def rougeL(references: list[str], predictions: list[str]) -> float:
    """
    ROUGE-L's F measure (Lin 2004, section 3.1) by `rouge_score`, which comes with lm-eval: the harmonic mean of the
    longest common subsequence's shares of both texts, in lower-case runs of letters and digits, not stemmed.

    Args:
        references (`list[str]`): the right answer, one.
        predictions (`list[str]`): the generated one, one.

    Returns:
        `float`: 0 to 1.
    """
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score(references[0], predictions[0])["rougeL"].fmeasure
