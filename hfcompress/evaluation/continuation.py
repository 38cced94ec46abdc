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
"""`continuation`: how does a passage of Python's reference go on? A task that needs no network.

A passage is `CONTEXT_WORDS` words of a paragraph, and the right answer is the `ENDING_WORDS` that follow there; the three
wrong ones are the endings of passages on other topics, nearly as long. The documents are held out (they come from the
evaluation topics) and the few-shot examples come from the calibration topics.

Endings are a few words cut anywhere, so how likely they are by themselves says much; `acc_mutual_info`, which takes that
off (log p(ending | passage) - log p(ending)), tells models apart better than `acc` and is what the task reports first.
"""

import random
from typing import Any

from hfcompress.calibration.reference_text import reference_text


SHOTS = {"continuation": 0, "continuation_2shot": 2}  # the two names it goes by, with their few-shot examples
CONTEXT_WORDS, ENDING_WORDS, CHARACTERS = 20, 5, 180  # so that two examples and a passage fit into 256 tokens
WRONG, NEAREST = 3, 12  # wrong answers, out of the endings that are nearest in length
SEED = 0  # the documents are the same whatever seed a comparison has


def config(name: str) -> dict[str, Any]:
    """
    The task as lm-eval's configuration.

    Args:
        name (`str`): a key of [`SHOTS`].
    """
    return {
        "task": name,
        "custom_dataset": _dataset,
        "training_split": "train",
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": SHOTS[name],
        "output_type": "multiple_choice",
        "doc_to_text": "passage",
        "doc_to_choice": "endings",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc_mutual_info", "acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def documents(split: str) -> list[dict[str, Any]]:
    """
    Args:
        split (`str`): `"calibration"` or `"evaluation"`.

    Returns:
        `list[dict]`: `passage`, its four `endings`, and `answer`, the index of the right one; in a random order that is
        always the same, so that the first documents are a fair sample.
    """
    rng = random.Random(SEED)
    passages = _passages(split)
    found = []
    for topic, passage, ending in passages:
        elsewhere = {other for where, _, other in passages if where != topic} - {ending}
        nearest = sorted(elsewhere, key=lambda other: (abs(len(other) - len(ending)), other))[:NEAREST]
        endings = [ending, *rng.sample(nearest, WRONG)]
        rng.shuffle(endings)
        found.append({"passage": passage, "endings": endings, "answer": endings.index(ending)})
    rng.shuffle(found)
    return found


def _passages(split: str) -> list[tuple[int, str, str]]:
    """Topic, beginning and ending of every stretch of words in the paragraphs that are prose."""
    length = CONTEXT_WORDS + ENDING_WORDS
    # topics quote each other, with other line breaks and indents
    quoted = " ".join(" ".join(reference_text("calibration")).split()) if split == "evaluation" else ""
    found = []
    for topic, text in enumerate(reference_text(split)):
        for paragraph in filter(_is_prose, text.split("\n\n")):
            words = paragraph.split()
            for start in range(0, len(words) - length + 1, length):
                begun = " ".join(words[start : start + CONTEXT_WORDS])
                ending = " ".join(words[start + CONTEXT_WORDS : start + length])
                if len(begun) + len(ending) < CHARACTERS and begun not in quoted:
                    found.append((topic, begun, ending))
    return found


def _is_prose(paragraph: str) -> bool:
    """Neither a heading, nor code, nor grammar."""
    text = paragraph.strip()
    return (text[:1].isalpha() or text[:1] in ('"', "*")) and text.endswith((".", ":"))


def _dataset(**_: Any):
    """What lm-eval loads: `train` holds the few-shot examples."""
    from datasets import Dataset, DatasetDict

    return DatasetDict(
        {"train": Dataset.from_list(documents("calibration")), "test": Dataset.from_list(documents("evaluation"))}
    )
