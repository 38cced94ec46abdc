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
How much memory the block pass will take, and how it is run so that it takes no more than it may.

Nothing is guessed of a step's arithmetic. A row of tokens goes through the largest block while every tensor is counted,
which gives what one row's forward needs and what it holds where it is halted; and each group of that block's linears is
solved once with its sides made smaller, while every tensor is counted, which gives what its solver needs at full size, all
of which grows with the area. The rest is sizes of weights, and what this process has in memory already.
"""

import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from hfcompress.errors import InvalidValueError
from hfcompress.models.architecture import ties_embeddings
from hfcompress.models.batch import Batch
from hfcompress.models.experts import ExpertLinear
from hfcompress.models.gradients import LOGIT_BYTES, STORED_BYTES
from hfcompress.models.roles import find_linears, shared_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.live_bytes import LiveBytes
from hfcompress.passes.memory import give_back_freed_memory
from hfcompress.passes.observe import stages, walk_suspended
from hfcompress.passes.plan import LinearTask, Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.solving import solve_group, treatment
from hfcompress.passes.statistics import Statistics
from hfcompress.solvers.smoothing import VALUES_AT_ONCE


MICRO_BATCH_TOKENS = 4096  # that go through a block together where nothing stands against it
SMALL = 256  # inputs of a linear that stands for a larger one
ALLOCATOR = 1.03  # what is in memory over what is asked for: pages, and the ends of them
LATER = 40_000_000  # bytes of libraries that are imported when the result is described and drawn
KEPT_CURVATURE = 512  # outputs whose worth with one another is kept
LOGIT_COPIES = 5  # in which logits are there while one goes back through them
BACKWARD = 3  # times what a forward takes, that its way back does
MARGIN = 1.03  # of a limit over the forecast


@dataclass(frozen=True)
class Course:
    """
    How the block pass is run.

    Args:
        rows (`int`): that go through a block together.
        suspended (`bool`): forwards are halted at each group of linears instead of being run again.
        spilled (`bool`): hidden states lie on disk between the blocks.
    """

    rows: int
    suspended: bool
    spilled: bool


@dataclass
class _Solving:
    """Bytes while a group of linears is solved: the most, and what of that stays until its block is written."""

    peak: float = 0.0
    kept: float = 0.0


class Footprint:
    """
    Args:
        model (`StreamedModel`): the model that the pass walks.
        plan (`Plan`): what is done to which linear.
        layout: the format of the result.
        batch (`Batch` or `None`): this process's share of the calibration data; `None` where none is needed.
        processes (`Processes`): who takes part; all look at the same.
        dense_model (`StreamedModel`, *optional*): whose stream is the dense one, where that is of another width.
        rows (`int`, *optional*): that go through a block together, where that is settled: a run that goes on forms its sums
            as the one before it did.
    """

    def __init__(
        self,
        model: StreamedModel,
        plan: Plan,
        layout,
        batch: Batch | None,
        processes: Processes,
        dense_model: StreamedModel | None = None,
        rows: int | None = None,
    ):
        self.settled_rows = rows
        self.model, self.plan, self.layout, self.processes = model, plan, layout, processes
        self.dense_model = dense_model
        self.rows, self.length = (0, 0) if batch is None else (len(batch.input_ids), batch.length)
        size = model.dtype.itemsize
        self.blocks = [count * size for count in model.block_parameters]
        leaning = [any(task.base is not None for task in tasks.values()) for tasks in plan.blocks]
        self.largest = max(range(len(self.blocks)), key=lambda index: (self.blocks[index], leaning[index]))
        keys = model.keys_of_block(self.largest)
        self.stored = sum(model.tensors[key].nbytes for key in keys)  # a block as it is read
        inside = {id(p) for name in model.block_names for p in _parameters(model, name)}
        head = model.skeleton.get_output_embeddings()
        of_head = set() if head is None else {id(p) for p in head.parameters()}
        outside = {id(p): p.numel() * size for p in model.skeleton.parameters() if id(p) not in inside}
        tied = ties_embeddings(model.skeleton.config)
        table = sum(p.numel() for p in model.skeleton.get_input_embeddings().parameters()) * size
        self.head = 0 if tied else sum(outside[key] for key in of_head if key in outside)
        self.outside = sum(outside.values()) - (table if tied and len(of_head) and not self._shared(of_head) else 0)
        self.hidden = self.length * model.skeleton.config.get_text_config().hidden_size * size  # of one row
        self.row_peak = self.row_frame = 0.0
        self.solving: dict[str, _Solving] = {}
        self.packing = _Solving()
        self._look(batch)
        gc.collect()
        give_back_freed_memory()
        self.base = in_use(model.device)

    def _shared(self, of_head: set[int]) -> bool:
        """Whether head and embeddings are one parameter in the skeleton already."""
        return any(id(p) in of_head for p in self.model.skeleton.get_input_embeddings().parameters())

    @torch.no_grad()
    def _look(self, batch: Batch | None) -> None:
        """What is found on one row, and by solving small."""
        tasks, index = self.plan.blocks[self.largest], self.largest
        probe = self.model.probe() if self.plan.needs_inputs else None
        with self.model.block(index) as block:
            linears = find_linears(block, self.model.block_names[index])
            groups = [[name] for name in linears]
            if probe is not None:
                kinds = {name: task.rounding for name, task in tasks.items()}
                groups = shared_inputs(self.model, block, index, probe, tasks, kinds)
            if batch is not None and probe is not None:
                row = batch.rows(slice(0, 1))
                self._look_at_a_row(
                    block, row, {names[0]: linears[names[0]] for names in groups if names[0] in linears}
                )
        known: list[tuple[list[Any], _Solving]] = []  # one is as another among experts
        for names in groups:
            group = {name: tasks[name] for name in names if name in tasks}
            if group:
                kind = [(replace(task.shape, name=""), *treatment(task), task.base is None) for task in group.values()]
                found = next((solving for other, solving in known if other == kind), None) or self._solved_small(group)
                known.append((kind, found))
                self.solving[names[0]] = found
        if self.plan.head is not None:
            self.solving[self.plan.head.name] = self._solved_small({self.plan.head.name: self.plan.head})

    def _look_at_a_row(self, block: nn.Module, row: Batch, leaders: dict[str, nn.Module]) -> None:
        [stream] = self.model.embed([row])
        with LiveBytes() as live:
            began = live.begin()

            def seen(group: int, batch: int, inputs: Any, dense: Any) -> None:
                self.row_frame = max(self.row_frame, live.now - began)

            walk_suspended(
                [leaders],
                [lambda _: self.model.call(block, self.largest, stream)],
                1,
                seen,
                lambda _: None,
                lambda *_: None,
            )
            self.row_peak = live.peak - began

    def _solved_small(self, group: dict[str, LinearTask]) -> _Solving:
        """The bytes that solving takes, told from a smaller copy of the same shape."""
        first = next(iter(group.values()))
        width = first.shape.in_features
        step = max(1, first.grid.group_size) if not first.grid.is_plain else 1
        small = min(width, math.ceil(SMALL / step) * step)
        share = small / width
        tasks, linears = {}, {}
        for name, task in group.items():
            outputs = task.shape.out_features
            outputs = outputs if small == width else max(16, round(outputs * share / 16) * 16)
            shape = replace(task.shape, in_features=small, out_features=outputs, transposed=False)
            grid = replace(task.grid, rank=round(task.grid.rank * share)) if task.grid.rank else task.grid
            base = None if task.base is None else _Base(torch.ones(outputs, small))
            tasks[name] = replace(task, shape=shape, grid=grid, base=base)
            linears[name] = nn.Linear(small, outputs, bias=False, device=self.model.device, dtype=self.model.dtype)
        worth = None
        if self.plan.needs_curvature:
            worth = {
                name: [torch.eye(len(part), device=self.model.device) for part in linear.weight.split(KEPT_CURVATURE)]
                for name, linear in linears.items()
            }
        random = torch.Generator().manual_seed(0)
        inputs = torch.randn(8, max(1, small // 32), small, generator=random).to(self.model.device, self.model.dtype)
        with LiveBytes() as live:
            statistics = None
            if first.needs_inputs:
                cross = self.plan.needs_dense_stream and self.dense_model is None
                wide = small if self.dense_model is not None and self.plan.needs_dense_stream else 0
                statistics = Statistics(small, self.model.device, cross, first.needs_range, wide)
                dense = inputs * 1.01 if cross or wide else None
                statistics.add(inputs, None, dense, torch.arange(8) == 7)
                del dense
                statistics.complete(self.processes, first.name)
            live.begin()
            solved = solve_group(tasks, linears, statistics, self.layout, worth)
            peak = live.peak
            del statistics
            packed = []
            live.begin()
            for name, quantized, _ in solved:
                packed.append(self.layout.of(tasks[name].grid).pack(quantized))
            self.packing.peak = max(self.packing.peak, (live.peak - live.now) / share**2)
            kept = live.now
        return _Solving(peak / share**2, kept / share**2)

    def course(self, limit: int) -> Course:
        """
        The fastest way to run the pass that stays below a limit.

        Args:
            limit (`int`): bytes.

        Raises:
            InvalidValueError: there is none; the least limit that would do is named.
        """
        for course in self.courses:
            if MARGIN * self.peak(course) <= limit:
                return course
        least, rows = self.least, self.courses[-1].rows
        raise InvalidValueError(
            f"--memory-limit {limit / 1e9:.3g}GB is not enough for {self.model.checkpoint.name}: with {rows} {'rows' if rows > 1 else 'row'} at a time "
            f"and everything that can be on disk there, {rounded_up(least)} are needed (of which {self.base / 1e9:.3g} GB are in "
            f"use before the work begins); give --memory-limit {rounded_up(least)}."
        )

    @property
    def courses(self) -> list[Course]:
        """All ways to run the pass, the fastest first."""
        rows = [self.settled_rows or rows_at_once(self.plan, max(1, self.length))]
        while rows[-1] > 1 and self.plan.tuning is None and self.settled_rows is None:
            rows.append(rows[-1] // 2)
        ways = [(True, False), (False, False), (False, True)]
        return [Course(count, *way) for way in ways for count in rows]

    @property
    def least(self) -> int:
        """The lowest limit that can be kept, in bytes."""
        return math.ceil(MARGIN * min(map(self.peak, self.courses)))

    def peak(self, course: Course) -> int:
        """The most bytes of all phases."""
        return max(self.phases(course).values())

    def phases(self, course: Course) -> dict[str, int]:
        """
        The most bytes of every phase of the pass, with what was in memory before it.

        Args:
            course (`Course`): how it is run.
        """
        sides = 2 if self.plan.needs_dense_stream else 1  # streams, and blocks that they go through
        whole = self.rows * self.hidden
        at_once = min(course.rows, max(1, self.rows))
        resident = at_once * self.hidden if course.spilled else whole
        block = self.blocks[self.largest]
        largest = max((tensor.nbytes for tensor in self._outside_tensors()), default=0)
        embedding = self.outside - self.head + max(block + self.stored, resident + at_once * self.hidden, largest)
        frames = self.rows * self.row_frame * sides if course.suspended else 0
        forward = at_once * (self.row_peak + (sides - 1) * self._widest_input())  # one after the other
        kept = sum(each.kept for each in self.solving.values())
        solving = max((each.peak for each in self.solving.values()), default=0.0)
        tuned = self._tuned(at_once) if self.plan.tuning is not None else 0
        walking = (0 if course.spilled else whole * sides) + block * sides + kept + self._curvature()
        observing = frames + forward + self._sums(course.suspended)
        joined = bool(self.model.experts.together)  # experts are put together again, in memory of their own
        phases = {
            "embedding": embedding,
            "blocks": walking
            + max(
                observing,
                frames + solving,
                tuned,
                self.packing.peak,
                (1 + joined) * self.stored,
                self._folded(forward),
            ),
        }
        closing = self.outside + max(largest, at_once * self.hidden)
        if self.plan.head is not None:
            closing += (0 if course.spilled else whole * sides) + self.solving[self.plan.head.name].peak
        phases["head"] = closing
        if self.plan.needs_curvature and self.rows:
            phases = {"gradients": self._gradients(at_once), **phases}
        return {name: int(self.base + LATER + ALLOCATOR * amount) for name, amount in phases.items()}

    def _folded(self, forward: float) -> float:
        """
        What choosing factors takes, all in float32: the Gram matrices of every group, of experts two, and the same again while
        they are summed; or beside them the block that pairs are tried on, and what a solve takes; and in either case a forward.
        """
        if not self.plan.folds:
            return 0.0
        tasks = self.plan.blocks[self.largest]
        grams = {
            name: (1 + isinstance(self.model.skeleton.get_submodule(name), ExpertLinear))
            * 4
            * task.shape.in_features**2
            for name, task in tasks.items()
            if name in self.solving
        }
        kept, widest = sum(grams.values()), max(grams.values(), default=0)
        rows = 2 * max(step.rows for step in self.plan.folds) * self.hidden
        compared = 16 * max(
            VALUES_AT_ONCE, *(task.shape.out_features * task.shape.in_features for task in tasks.values())
        )
        trying = 8 * self.model.block_parameters[self.largest] + 3 * widest + compared
        return forward + rows + kept + max(kept, trying)

    def _gradients(self, rows: int) -> float:
        """What going back through the whole model takes, a few rows at a time."""
        config = self.model.skeleton.config.get_text_config()
        passed = self.hidden * (len(self.model) + 1)  # of one row, in front of every block
        together = max(1, min(rows, STORED_BYTES // passed))
        logits = 4 * config.vocab_size * self.length
        at_once = max(1, min(together, LOGIT_BYTES // logits))
        head = self.outside + LOGIT_COPIES * at_once * logits
        back = self.blocks[self.largest] + BACKWARD * at_once * self.row_peak
        return self._curvature() + together * (passed + self.hidden) + max(head, back)

    def _widest_input(self) -> float:
        """What a linear reads of one row, at most."""
        widest = max((task.shape.in_features for task in self.plan.blocks[self.largest].values()), default=0)
        return self.length * widest * self.model.dtype.itemsize

    def _sums(self, suspended: bool) -> float:
        """The largest statistics; of experts all at once where forwards are run again, and those of what they are shown."""
        copies = 4 if self.plan.needs_dense_stream else 1
        tasks = {name: task for name, task in self.plan.blocks[self.largest].items() if task.needs_inputs}
        leaders = {name: self.model.skeleton.get_submodule(name) for name in tasks}
        largest = 0
        for stage in stages(leaders):
            of_experts = isinstance(leaders[stage[0]], ExpertLinear)
            together = len(stage) if of_experts and not suspended else 1
            width = tasks[stage[0]].shape.in_features
            largest = max(largest, 4 * width**2 * together * (copies + of_experts))
        return largest

    def _curvature(self) -> float:
        """What is known of the outputs' worth."""
        if not self.plan.needs_curvature:
            return 0
        hidden = self.model.skeleton.config.get_text_config().hidden_size
        outputs = [
            task.shape.out_features for block in self.plan.blocks for task in block.values() if task.needs_curvature
        ]
        of_linears = sum(count * min(count, KEPT_CURVATURE) for count in outputs)
        return 4.0 * (of_linears + hidden**2 * len(self.model))

    def _tuned(self, rows: int) -> float:
        """What training one block takes: weights, gradients and two moments, and the way back through a batch."""
        return 4 * self.blocks[self.largest] + 3 * rows * self.row_peak + 2 * self.rows * self.hidden

    def _outside_tensors(self) -> Iterable[Any]:
        return [self.model.tensors[key] for key in self.model.outside_keys]


@dataclass(frozen=True)
class _Base:
    """What a small copy leans on."""

    values: Tensor

    def read(self) -> Tensor:
        """All of it."""
        return self.values


def choose_course(
    model: StreamedModel,
    plan: Plan,
    layout,
    batch: Batch | None,
    processes: Processes,
    memory_limit: int | None,
    dense_model: StreamedModel | None = None,
    rows: int | None = None,
) -> Course:
    """
    How the block pass is run: under a limit as fast as it allows, else so that it takes about half of what is free. See
    [`Footprint`] for the arguments.

    Raises:
        InvalidValueError: no way to run it stays below the limit.
    """
    if memory_limit is not None:
        return Footprint(model, plan, layout, batch, processes, dense_model, rows).course(memory_limit)
    length = 1 if batch is None else batch.length
    tokens = 0 if batch is None else len(batch.input_ids) * length
    suspended = _fits_suspended(model, plan, tokens, processes.count)
    return Course(rows or rows_at_once(plan, length), suspended, spilled=False)


def rows_at_once(plan: Plan, length: int) -> int:
    """How many rows of `length` tokens go through a block together where nothing stands against it."""
    return max(1, (MICRO_BATCH_TOKENS if plan.tuning is None else plan.tuning.batch_tokens) // length)


def _fits_suspended(model: StreamedModel, plan: Plan, tokens: int, processes: int) -> bool:
    """
    Whether the halted forwards of all tokens fit: about six hidden-size tensors and the widest input per token (the
    stream, the residual, the normed input, queries, keys, values), twice that beside a dense stream.
    """
    if not plan.needs_inputs:
        return True
    config = model.skeleton.config.get_text_config()
    per_token = (6 * config.hidden_size + plan.widest.shape.in_features) * model.dtype.itemsize
    needed = tokens * per_token * (2 if plan.needs_dense_stream else 1)
    if model.device.type == "cuda":
        return needed <= torch.cuda.mem_get_info(model.device)[0] // 2
    return needed <= psutil.virtual_memory().available // 2 // processes


def in_use(device: torch.device) -> int:
    """Bytes that this process has in memory, on a CUDA device those of its tensors there."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def rounded_up(size: float) -> str:
    """Bytes as they are given on a command line, not less than they are."""
    return f"{math.ceil(size / 1e7) / 100:.2f}GB"


def _parameters(model: StreamedModel, name: str) -> list[Tensor]:
    return list(model.skeleton.get_submodule(name).parameters())
