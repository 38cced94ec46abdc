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
"""The text that every Python carries: its language reference (`pydoc_data.topics`, PSF licence), in two disjoint parts.

It needs no network and no licence question, so it is what `bundled` means for a model with a tokenizer of its own.
"""

import pydoc_data.topics


EVALUATION_EVERY = 5  # one topic in five is held out


def reference_text(split: str) -> list[str]:
    """
    The topics of one split, in alphabetical order of their names.

    Some topics quote others, so a paragraph of the evaluation topics is taken out of the calibration topics, however it
    is indented and broken into lines: the two splits share no paragraph.

    Args:
        split (`str`): `"calibration"` or `"evaluation"`.

    Returns:
        `list[str]`: one text per topic.
    """
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = topics[::EVALUATION_EVERY]
    if split == "evaluation":
        return held_out
    seen = {_words(paragraph) for text in held_out for paragraph in text.split("\n\n")}
    rest = (text for index, text in enumerate(topics) if index % EVALUATION_EVERY)
    return ["\n\n".join(p for p in text.split("\n\n") if _words(p) not in seen) for text in rest]


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())
