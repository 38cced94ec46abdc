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
"""What every way to a smaller model asks of the result."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from hfcompress.errors import UnsupportedModelError
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.journal import Journal
from hfcompress.passes.witness import testimony, witness_batch


SIZES = "sizes"  # of what is kept beside the parts
ALIKE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}  # log-probabilities, by the arithmetic


def require_same(made: StreamedModel, journal: Journal) -> None:
    """
    Ask the smaller model, as it was written, what the pruned one was asked while it was solved.

    Raises:
        UnsupportedModelError: it says something else.
    """
    [stream] = made.forward_blocks(made.embed([witness_batch(made)]))
    with made.outside(head=True) as model:
        said = testimony(stream, made.logits(model, stream))
    assert journal.witness is not None
    first, second = (torch.tensor(each["top_log_probs"]) for each in (said, journal.witness))
    if not torch.allclose(first, second, atol=ALIKE[made.dtype]):
        raise UnsupportedModelError(
            f"The smaller {made.checkpoint.name} does not say what the pruned model said while it was solved, so the "
            "architecture cannot be cut in this dimension; leave it out of prune."
        )


def size_asked(settings: Any, parameters: int) -> tuple[str, int | float | None]:
    """
    Which size is asked for, and how large it may be; a share of the parameters is told as a number of them.

    Args:
        settings ([`hfcompress.recipes.Prune`]): the step.
        parameters (`int`): of the whole model.
    """
    key, most = settings.target
    if key == "target_parameters" and most is not None and most < 1:
        return key, int(most * parameters)
    return key, most


def keep_sizes(writer: CheckpointWriter, sizes: Sequence[int | None]) -> None:
    """Write down how large the model will be, for a run that goes on: time would be measured otherwise then."""
    writer.write_stage(SIZES, {SIZES: torch.tensor([-1 if size is None else size for size in sizes])})


def kept_sizes(writer: CheckpointWriter) -> tuple[int | None, ...] | None:
    """What [`keep_sizes`] has written, if it has."""
    if not writer.holds_stage(SIZES):
        return None
    return tuple(None if size < 0 else size for size in writer.read_stage(SIZES)[SIZES].tolist())


def multiple_of(width: int, asked: int) -> int:
    """What a smaller `width` shall be a multiple of: the largest power of two in both, up to what is asked for."""
    return math.gcd(width, 2 ** int(math.log2(asked)))


def bytes_with(model: StreamedModel, before: int, after: int) -> int:
    """
    Bytes of a model's files at most, with `after` parameters instead of `before`: a parameter takes what it does now, and
    the files' headers do not grow.
    """
    now = sum(tensor.nbytes for tensor in model.checkpoint.tensors.values())
    return math.ceil(after / before * now) + max(model.checkpoint.size_bytes - now, 0)
