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
"""How does a passage of Python's reference go on? Tasks that need no network.

A passage is `CONTEXT_WORDS` words of a paragraph, and the right answer is the `ENDING_WORDS` that follow there.
`continuation` offers it beside three wrong ones: the endings of passages on other topics, nearly as long. The documents
are held out (they come from the evaluation topics) and the few-shot examples come from the calibration topics.

Endings are a few words cut anywhere, so how likely they are by themselves says much; `acc_mutual_info`, which takes that
off (log p(ending | passage) - log p(ending)), tells models apart better than `acc` and is what the task reports first.

`continuation_generated` has the model write on after the same passages: greedily, `GENERATED_TOKENS` tokens or up to its
end token, of which the first `GENERATED_WORDS` words are compared with as many that follow in the paragraph. Passages
that are followed by fewer are left out, and of the others the first `GENERATED_DOCUMENTS` are asked.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from hfcompress.calibration.reference_text import reference_text
from hfcompress.evaluation.generation_metrics import rougeL, token_f1


SHOTS = {"continuation": 0, "continuation_2shot": 2}  # few-shot examples before each document
GENERATED = "continuation_generated"
NAMES = (*SHOTS, GENERATED)
CONTEXT_WORDS, ENDING_WORDS, CHARACTERS = 20, 5, 180  # so that two examples and a passage fit into 256 tokens
GENERATED_DOCUMENTS, GENERATED_WORDS, GENERATED_TOKENS = 96, 10, 48  # 48 tokens are ten words almost always
WRONG, NEAREST = 3, 12  # wrong answers, out of the endings that are nearest in length
SEED = 0  # the documents are the same whatever seed a comparison has


def config(name: str) -> dict[str, Any]:
    """
    The task as lm-eval's configuration.

    Args:
        name (`str`): one of [`NAMES`].
    """
    return {
        "task": name,
        "test_split": "test",
        "num_fewshot": SHOTS.get(name, 0),
        "doc_to_text": "passage",
        "metadata": {"version": 1.0},
        **(_generated() if name == GENERATED else _chosen()),
    }


def _chosen() -> dict[str, Any]:
    """The ending is picked out of four."""
    metrics = ("acc_mutual_info", "acc", "acc_norm")
    return {
        "custom_dataset": _with_examples,
        "training_split": "train",
        "fewshot_split": "train",
        "output_type": "multiple_choice",
        "doc_to_choice": "endings",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }


def _generated() -> dict[str, Any]:
    """What follows is written."""
    first_words = {"function": "custom", "filter_fn": _first_words}
    mean = {"aggregation": "mean", "higher_is_better": True}
    return {
        "custom_dataset": _to_write_on,
        "output_type": "generate_until",
        "doc_to_target": "following",
        "generation_kwargs": {"until": [], "max_gen_toks": GENERATED_TOKENS, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "take_first"}, first_words]}],
        "metric_list": [
            {"metric": token_f1, **mean},
            {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True, **mean},
            {"metric": rougeL, **mean},
            {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True},
        ],
    }


def _first_words(answers: Iterable[str], _: Sequence[dict[str, Any]]) -> list[str]:
    """As many words of each answer as are asked for, with one space between them."""
    return [" ".join(answer.split()[:GENERATED_WORDS]) for answer in answers]


def documents(split: str) -> list[dict[str, Any]]:
    """
    Args:
        split (`str`): `"calibration"` or `"evaluation"`.

    Returns:
        `list[dict]`: `passage`, its four `endings`, `answer`, the index of the right one, and `following`, the up to
        `GENERATED_WORDS` words that follow in the paragraph; in a random order that is always the same, so that the
        first documents are a fair sample.
    """
    rng = random.Random(SEED)
    passages = _passages(split)
    found = []
    for topic, passage, ending, following in passages:
        elsewhere = {other for where, _, other, _ in passages if where != topic} - {ending}
        nearest = sorted(elsewhere, key=lambda other: (abs(len(other) - len(ending)), other))[:NEAREST]
        endings = [ending, *rng.sample(nearest, WRONG)]
        rng.shuffle(endings)
        answer = endings.index(ending)
        found.append({"passage": passage, "endings": endings, "answer": answer, "following": following})
    rng.shuffle(found)
    return found


def _passages(split: str) -> list[tuple[int, str, str, str]]:
    """Topic, beginning, ending and what follows the beginning, of every stretch of words in the paragraphs that are prose."""
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
                    following = words[start + CONTEXT_WORDS :][:GENERATED_WORDS]
                    found.append((topic, begun, ending, " ".join(following)))
    return found


def _is_prose(paragraph: str) -> bool:
    """Neither a heading, nor code, nor grammar."""
    text = paragraph.strip()
    return (text[:1].isalpha() or text[:1] in ('"', "*")) and text.endswith((".", ":"))


def _with_examples(**_: Any):
    """What lm-eval loads: `train` holds the few-shot examples."""
    return _datasets(train=documents("calibration"), test=documents("evaluation"))


def _to_write_on(**_: Any):
    """What lm-eval loads: passages that are followed by enough words."""
    long = [d for d in documents("evaluation") if len(d["following"].split()) == GENERATED_WORDS]
    return _datasets(test=long[:GENERATED_DOCUMENTS])


def _datasets(**splits: list[dict[str, Any]]):
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_list(documents) for name, documents in splits.items()})
