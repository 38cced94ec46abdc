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
"""Whether two models speak of the same tokens."""

import hashlib
import json
from typing import Any

from hfcompress.errors import CheckpointError
from hfcompress.models.checkpoint import Checkpoint


def shared_vocabulary(first: Checkpoint, second: Checkpoint) -> int:
    """
    How many ids two models have in common, counted from 0: vocabularies of one tokenizer may be padded to other lengths.

    Raises:
        CheckpointError: their tokenizers differ, or one has none and their vocabularies are not of one length.
    """
    sizes = [checkpoint.config.get_text_config().vocab_size for checkpoint in (first, second)]
    tokenizers = [checkpoint.tokenizer for checkpoint in (first, second)]
    if any(tokenizer is None for tokenizer in tokenizers):
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"{first.name} has a vocabulary of {sizes[0]} and {second.name} one of {sizes[1]}, and without a tokenizer "
                "for both nothing says that their ids mean the same; put their tokenizers beside them."
            )
        return sizes[0]
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if ours != theirs:
        different = sorted((ours.items() ^ theirs.items()), key=lambda item: item[1])
        token, number = different[0]
        raise CheckpointError(
            f"{first.name} and {second.name} have different tokenizers: {token!r} is {number} in one of them alone, and "
            f"{len(different)} entries differ; give two models of one tokenizer."
        )
    return min(sizes)


def tokenizer_hash(tokenizer: Any) -> str | None:
    """A digest of a tokenizer's entries and their ids; `None` where there is none."""
    if tokenizer is None:
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
