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
"""Whether the zeros of a saved checkpoint lie where its patterns ask for them."""

from collections.abc import Iterable, Mapping
from typing import Any

from hfcompress.errors import OutputError
from hfcompress.formats.reading import decoded, is_read
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.solvers.pattern import Pattern


def check_zeros(made: Checkpoint, patterns: Iterable[tuple[str, Pattern, bool]]) -> dict[str, float]:
    """
    Read every sparse weight back from disk, as a reader of the checkpoint would.

    Args:
        made (`Checkpoint`): what was written.
        patterns (`Iterable[tuple[str, Pattern, bool]]`): of every sparse linear its name on disk without `.weight`, where
            its zeros may lie, and whether its weight is stored transposed.

    Returns:
        `dict[str, float]`: the share of zeros, by the name on disk.

    Raises:
        OutputError: a later step, or the format, has undone a zero.
    """
    patterns, config = list(patterns), made.quantization_config
    tensors: Mapping[str, Any] = made.tensors
    if patterns and is_read(config):
        tensors = StreamedModel(made, tensors=decoded(made.tensors, config)).tensors
    shares, excess, rounding = {}, 0.0, 1.0
    for stem, pattern, transposed in patterns:
        weight = tensors[f"{stem}.weight"].read().float()
        weight = weight.T if transposed else weight
        own = pattern.excess(weight)
        if pattern.is_grouped and own:
            raise OutputError(
                f"In the written file the zeros of {stem} do not lie as its pattern asks for; nothing was finished. Please "
                "report this, with the recipe."
            )
        if not pattern.is_grouped:  # linears that read the same input share their zeros
            excess += own
            rounding += len(weight) / pattern.rows / 2  # the number of every row is rounded
        shares[stem] = (weight == 0).float().mean().item()
    if excess >= rounding:
        raise OutputError(
            "The written file holds fewer zeros than its pattern asks for; nothing was finished. Please report this, with "
            "the recipe."
        )
    return shares
