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
"""What a run will take, told before it: bytes written, memory by phase, and time."""

import tempfile
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfcompress.errors import InvalidValueError
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.passes.block_pass import BlockPass
from hfcompress.passes.curvature import rows_of
from hfcompress.passes.footprint import Course, Footprint
from hfcompress.passes.forecast import Forecast
from hfcompress.passes.journal import Journal
from hfcompress.preparing import Prepared, asked_job, calibration_share, prepare
from hfcompress.progress import Progress, Silent


PROBED = 2  # batches of the longer rehearsal, beside one of the shorter
BACKWARD = 3  # forwards that a backward pass takes, itself and one more


@dataclass(frozen=True)
class RunPlan:
    """
    Args:
        model (`str`): what is compressed.
        recipe (`dict`): by what.
        output_bytes (`int`): of `model*.safetensors`.
        baseline_bytes (`int`): of the model's own weights.
        memory (`dict[str, int]`): phase -> the most bytes that this process has in memory during it.
        course (`Course`): how the pass is run.
        least_memory (`int`): the lowest limit under which it can be run.
        seconds (`float` or `None`): of the compression, without the evaluation; `None` where nothing was timed.
        tokens (`int`): of calibration data.
        blocks (`int`): decoder blocks.
    """

    model: str
    recipe: dict[str, Any]
    output_bytes: int
    baseline_bytes: int
    memory: dict[str, int]
    course: Course
    least_memory: int
    seconds: float | None
    tokens: int
    blocks: int

    @property
    def peak_memory(self) -> int:
        """Bytes in the phase that takes most."""
        return max(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "peak_memory": self.peak_memory}


def plan(
    model: Any,
    recipe: Any,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    memory_limit: int | None = None,
    probe: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> RunPlan:
    """
    Forecast what [`hfcompress.compress`] will take; nothing is written.

    Args:
        probe (`bool`, *optional*, defaults to `True`): also solve one block, on a part of the data, to tell the time.
        others: of [`hfcompress.compress`].

    Raises:
        InvalidValueError: the recipe works on the whole model at once; or no way to run it stays below the limit.
        HfcompressError: something else the user can put right, in one sentence.
    """
    progress = progress or Silent()
    job = asked_job(recipe, calibration, samples, seq_len, seed, None, None, None, None)
    if len(job.stages) > 1 or any(
        each is not None for each in (job.pruning, job.distilling, job.training, job.library, job.cache_bits)
    ):
        raise InvalidValueError(
            f"{job.name} prunes, trains, hands over the whole model or learns vectors for its cache; only recipes of one pass over the blocks can be "
            "forecast. It tells what memory it lacks before it starts."
        )
    nowhere = Path(tempfile.gettempdir()) / f"hfcompress-plan-{uuid.uuid4().hex}"
    ready = prepare(
        *(job, model, nowhere),
        tokenizer=tokenizer,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        device=device,
        dtype=dtype,
        memory_limit=memory_limit,
        resume=False,
        overwrite=False,
        trust_remote_code=trust_remote_code,
        progress=progress,
        speak=False,
    )
    batch = calibration_share(ready)
    where = ready.streamed, ready.plan, ready.layout
    footprint = Footprint(*where, batch, ready.processes)
    course = footprint.courses[0] if memory_limit is None else footprint.course(memory_limit)
    memory = footprint.phases(course)
    seconds = _rehearsed(ready, course, batch, progress) if probe else None
    return RunPlan(
        model=ready.checkpoint.name,
        recipe=job.to_dict(),
        output_bytes=Forecast(ready.streamed, ready.layout).output_bytes(ready.plan),
        baseline_bytes=_bytes(ready.checkpoint),
        memory=memory,
        course=course,
        least_memory=footprint.least,
        seconds=seconds,
        tokens=0 if ready.tokens is None else ready.tokens.count,
        blocks=len(ready.streamed),
    )


def _rehearsed(ready: Prepared, course: Course, batch, progress: Progress) -> float:
    """Seconds of the whole pass, from those of one block with one batch and with a few."""
    progress.step("timing one block", amount=0)
    batches = [] if batch is None else batch.split(course.rows)
    run = BlockPass(
        *(
            ready.streamed,
            ready.plan,
            ready.layout,
            None,
            Journal(None, {}),
            ready.processes,
            Silent(),
            course.suspended,
        )
    )
    few = min(len(batches), PROBED)
    run.rehearse(batches[:few])  # what is imported and compiled by it is there for the next
    solving, one = run.rehearse(batches[:1])
    each = 0.0
    if len(batches) > 1:  # how long it is solved for differs with the data, and does not grow with it
        solving, more = run.rehearse(batches[:few])
        each = max(0.0, (more - one) / (few - 1))
    sizes = ready.streamed.block_parameters
    blocks = sum(sizes) / max(sizes)  # as large as the one that was gone through
    seconds = blocks * (solving + one + each * max(0, len(batches) - 1))
    if ready.plan.needs_curvature and batches:
        share = min(len(batches), rows_of(ready.plan) / len(batches[0].input_ids))
        seconds += BACKWARD * share * (each or one / 2) * blocks
    return seconds


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())
