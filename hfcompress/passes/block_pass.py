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
The walk that compresses: embed, then block by block fold, observe, solve, write, replay. Each block is in memory alone,
and is written while the next one is read.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfcompress.errors import OutputError, UnsupportedModelError
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.models.activations import cache_of, dense_twin, find_attentions, rounded_input, set_scales, unrounded
from hfcompress.models.batch import Batch
from hfcompress.models.experts import Routed
from hfcompress.models.roles import Linear, find_linears, get_weight, linear_shape, set_weight, shared_inputs
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.passes.background import Background
from hfcompress.passes.curvature import Curvatures, output_curvatures, stand_ins
from hfcompress.passes.folding import Folding
from hfcompress.passes.journal import Journal
from hfcompress.passes.memory import give_back_freed_memory
from hfcompress.passes.observe import walk_recomputed, walk_suspended
from hfcompress.passes.plan import LinearTask, Plan, take_over
from hfcompress.passes.processes import Processes
from hfcompress.passes.profile import (
    FORWARD,
    GRADIENTS,
    READ,
    SOLVE,
    SUMS,
    WRITE,
    Profile,
    operations_of_forwards,
    operations_of_solving,
    operations_of_sums,
)
from hfcompress.passes.ranges import CacheRanges, input_scale, stored_scales
from hfcompress.passes.ranks import settle_ranks
from hfcompress.passes.rates import settle_rates
from hfcompress.passes.ratios import settle_ratios
from hfcompress.passes.rows import first_rows, held_out
from hfcompress.passes.sharing import settle_sharing
from hfcompress.passes.solved_weight import SolvedWeight
from hfcompress.passes.solving import errors, solve_group
from hfcompress.passes.spill import Spill
from hfcompress.passes.statistics import Statistics
from hfcompress.passes.tuning import BlockTuner, first_half, watch_output
from hfcompress.passes.waypoint import Waypoint
from hfcompress.passes.witness import testimony, witness_batch
from hfcompress.progress import Progress
from hfcompress.solvers.grid import QuantizedWeight


HEAD, EMBEDDINGS = "head", "embeddings"
GIVE_BACK = 4  # batches between two times that freed memory is given back: pages that come anew are cleared anew


class BlockPass:
    """
    Args:
        model (`StreamedModel`): the model.
        plan (`Plan`): what is done to which linear.
        layout: the format of the result.
        writer (`CheckpointWriter` or `None`): takes the tensors; `None` to keep none of them.
        journal (`Journal`): knows what is done.
        processes (`Processes`): who takes part.
        progress (`Progress`): is told of every block.
        suspended (`bool`): halt the forwards at each group of linears instead of running them again.
        dense_model (`StreamedModel`, *optional*): the model whose stream is the dense one, where that is of another width.
        basis (`Tensor`, *optional*): `(dense hidden_size, hidden_size)`: what the stream should be is the dense one times
            this.
        spill (`Spill`, *optional*): keeps the streams instead of memory.
    """

    def __init__(
        self,
        model: StreamedModel,
        plan: Plan,
        layout,
        writer: CheckpointWriter | None,
        journal: Journal,
        processes: Processes,
        progress: Progress,
        suspended: bool,
        dense_model: StreamedModel | None = None,
        basis: Tensor | None = None,
        spill: Spill | None = None,
    ):
        self.dense_model, self.basis, self.spill = dense_model, basis, spill
        self.model, self.plan, self.layout, self.writer = model, plan, layout, writer
        self.journal, self.processes, self.progress = journal, processes, progress
        self.walk = walk_suspended if suspended else walk_recomputed
        self.folding: Folding | None = None
        self.first_rows: list[int] = []
        self.profile = Profile()
        self.writing = Background()
        self.waypoint: Waypoint | None = None
        self.curvatures = Curvatures()

    @torch.no_grad()
    def run(
        self,
        batches: list[Batch],
        held_out: Sequence[Batch] = (),
        judge: Callable[[PreTrainedModel, list[Stream]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """
        Args:
            batches (`list[Batch]`): this process's share of the calibration data; empty where none is needed.
            held_out (`Sequence[Batch]`, *optional*): rows that nothing is solved on and that pass every solved block.
            judge (`Callable`, *optional*): is given the solved model outside its blocks, and these rows' streams.

        Returns:
            `list[dict]`: what there is to report of every linear.
        """
        with self.writing:
            return self._run(batches, held_out, judge)

    def _run(
        self,
        batches: list[Batch],
        held_out: Sequence[Batch],
        judge: Callable[[PreTrainedModel, list[Stream]], None] | None,
    ) -> list[dict[str, Any]]:
        self.first_rows = first_rows(batches, self.processes)
        if self.writer is not None:
            room = sum(tensor.nbytes for tensor in self.model.tensors.values())
            self.waypoint = Waypoint(self.writer.partial, self.processes, room)
        if self.plan.needs_curvature and not all(map(self.journal.done, self.model.block_names)):
            with self.profile.part(GRADIENTS):
                self.curvatures = output_curvatures(
                    self.model, self.plan, batches, self.processes, self.progress, self.waypoint
                )
        for settle in (settle_ratios, settle_rates, settle_ranks, settle_sharing):
            settle(self.model, self.plan, batches, self.curvatures.linears, self.processes, self.progress)
        take_over(self.model, self.plan, self.journal.blocks)
        unrounded_hidden = self._finish_embeddings(batches)
        keep = None if self.spill is None else self.spill.put
        streams = self.model.embed(batches, keep) if self.plan.needs_inputs else []
        dense = list(streams) if self.plan.needs_dense_stream else []
        if self.dense_model is not None and self.plan.needs_dense_stream:
            dense = self.dense_model.embed(batches, keep)
        if unrounded_hidden:
            dense = [stream.advanced(hidden) for stream, hidden in zip(dense, unrounded_hidden, strict=True)]
        probe = self.model.probe() if self.plan.needs_inputs else None
        self.folding = Folding(self.model, self.plan, self.processes, batches) if self.plan.folds else None
        watched = self.model.embed([witness_batch(self.model), *held_out])
        behind, streams, dense, watched = self._reached(streams, dense, watched)
        for index, name in enumerate(self.model.block_names):
            if index < behind:
                self.progress.step(f"block {index + 1} of {len(self.model)}")
                continue
            self.progress.step(f"block {index + 1} of {len(self.model)}", amount=0)
            began = self.profile.spent(READ, FORWARD)
            last = index == len(self.model) - 1 and self.plan.head is None
            with contextlib.ExitStack() as stack:
                with self.profile.part(READ):
                    block = stack.enter_context(self.model.block(index))
                with self.profile.part(WRITE):
                    self.writing.wait()
                if self.journal.done(name):
                    with self.profile.part(FORWARD):
                        streams, dense = self._replay(block, index, streams, dense, last)
                else:
                    streams, dense = self._compress(block, index, streams, dense, probe, last)
                watched = [s.advanced(self.model.call(block, index, s)) for s in watched]
                if self.folding is not None:
                    self.folding.advance(block, index)
            if self.waypoint is not None and not last:
                ahead = self._all(streams, dense, watched)
                if self.waypoint.due(self.profile.spent(READ, FORWARD) - began, ahead):
                    with self.profile.part(WRITE):
                        self.writing.wait()
                        self.waypoint.keep(index, ahead)
            self.progress.step(f"block {index + 1} of {len(self.model)}")
        with self.model.outside(head=True) as model:
            if self.plan.head is not None:
                self._finish_head(model, self.plan.head, streams, dense)
            said = testimony(watched[0], self.model.logits(model, watched[0]))
            if judge is not None:
                judge(model, watched[1:])
        self.writing.wait()
        self._write_outside()
        if self.processes.writes:
            self.journal.testify(said)
        if self.waypoint is not None:
            self.waypoint.forget()
        return [result for results in self.journal.blocks.values() for result in results]

    def _all(self, *lanes: list[Stream]) -> list[Stream]:
        """What goes from block to block."""
        return [s for lane in (*lanes, [] if self.folding is None else self.folding.streams) for s in lane]

    def _reached(
        self, streams: list[Stream], dense: list[Stream], watched: list[Stream]
    ) -> tuple[int, list[Stream], list[Stream], list[Stream]]:
        """How many blocks an earlier run has put behind it for good, and the streams behind them."""
        if self.waypoint is None:
            return 0, streams, dense, watched
        names = self.model.block_names
        behind, found = self.waypoint.reached(
            self._all(streams, dense, watched), lambda index: self.journal.done(names[index])
        )
        left = iter(found)
        streams, dense, watched = ([next(left) for _ in lane] for lane in (streams, dense, watched))
        if self.folding is not None:
            self.folding.streams = list(left)
        return behind, streams, dense, watched

    @torch.no_grad()
    def rehearse(self, batches: list[Batch]) -> tuple[float, float]:
        """
        Go through the first of the largest blocks with these rows, from reading it to having its tensors as they are written;
        none of it is kept.

        Args:
            batches (`list[Batch]`): a few of the calibration data.

        Returns:
            `tuple[float, float]`: the seconds that solving took, and all others.
        """
        self.first_rows = first_rows(batches, self.processes)
        self.folding = Folding(self.model, self.plan, self.processes, batches) if self.plan.folds else None
        streams = self.model.embed(batches) if self.plan.needs_inputs else []
        dense = list(streams) if self.plan.needs_dense_stream else []
        probe = self.model.probe() if self.plan.needs_inputs else None
        sizes = self.model.block_parameters
        index = sizes.index(max(sizes))
        self.curvatures = Curvatures(stand_ins(self.plan.blocks[index].values()))
        began, solved = time.perf_counter(), self.profile.spent(SOLVE)
        with self.model.block(index) as block:
            self._compress(block, index, streams, dense, probe, False)
        self.journal.blocks.clear()
        solving = self.profile.spent(SOLVE) - solved
        return solving, time.perf_counter() - began - solving

    def forget_lost_parts(self) -> None:
        """
        Take blocks for unfinished whose parts are gone or have been cut short since.

        Raises:
            OutputError: what came after the blocks rests on such a part.
        """
        if self.writer is None:
            return
        parts = {name: _part(index) for index, name in enumerate(self.model.block_names)}
        for name in [n for n in self.journal.blocks if not self.writer.holds(parts.get(n, n))]:
            if self.journal.stages:
                lost = self.writer.part(parts.get(name, name))
                raise OutputError(f"{lost} is gone or has been cut short; start again with --overwrite.")
            self.progress.note(f"what was written of {name} is damaged, so it is solved again")
            self.journal.lose(name)

    # one block

    def _compress(
        self,
        block: nn.Module,
        index: int,
        streams: list[Stream],
        dense: list[Stream],
        probe: Stream | None,
        last: bool,
    ) -> tuple[list[Stream], list[Stream]]:
        tasks = self.plan.blocks[index]
        linears = find_linears(block, self.model.block_names[index])
        results, tensors, folds, folded = [], {}, [], {}
        if self.folding is not None:  # the dense stream goes by the block as it was: so it will when a run is resumed
            ahead = [] if last else list(dense)
            self.model.advance(block, index, ahead)
            folds, folded = self.folding.fold(block, index, streams)

        def solve_cache(ranges: CacheRanges, attention: nn.Module) -> None:
            scales = ranges.scales(self.processes, attention)
            set_scales(attention, scales)
            tensors.update({f"{ranges.task.stem}.{local}": scale.cpu() for local, scale in scales.items()})

        found: dict[str, _Solved] = {}

        def solve(names: list[str], statistics: Statistics | None) -> None:
            group = {name: tasks[name] for name in names if name in tasks}
            tuned = {name: get_weight(linears[name]) for name in group} if self.plan.tuning is not None else {}
            solved = solve_group(group, linears, statistics, self.layout, self.curvatures.linears)
            for name, quantized, result in solved:
                self.curvatures.linears.pop(name, None)
                scales = input_scale(tasks[name], statistics)
                set_scales(linears[name], scales)
                found[name] = _Solved(quantized, scales, result, tuned.get(name), statistics if tuned else None)

        if probe is None:
            with self.profile.part(SOLVE):
                for name in linears:
                    solve([name], None)
        else:
            caches = self._caches(block, index)
            others = {name: cache_of(attention) for name, attention in caches.items()}
            kinds = {name: task.rounding for name, task in tasks.items()}
            groups = shared_inputs(self.model, block, index, probe, tasks, kinds, others)
            self._require_all_ran(tasks, groups)
            self._require_all_cache(caches, groups)
            tunes = self.plan.tuning is not None
            received = list(streams) if tunes else []
            last = last and not tunes
            first: list[Tensor] = []
            with contextlib.ExitStack() as stack:
                twins = [stack.enter_context(self._twin(block, index))] if dense else []
                if self.plan.tuning is not None and self.plan.tuning.halves:
                    first = self._first_half(twins[0], index, dense)
                streams, dense = self._observe(
                    block, twins, index, groups, caches, streams, dense, solve, solve_cache, last
                )
            if tunes:
                outputs = [self._wanted(s.hidden) for s in dense]
                with self.profile.part(SOLVE):
                    streams = self._tune(block, index, linears, received, streams, outputs, first, found)
        if self.folding is not None:
            dense = ahead
        with self.profile.part(WRITE):
            for name, each in found.items():
                packed = self._packed(tasks[name], each.quantized, each.scales)
                tensors.update({f"{tasks[name].stem}.{local}": tensor for local, tensor in packed.items()})
                results.append({**each.result, "bytes": sum(t.nbytes for t in packed.values())})
            stems = {tasks[result["name"]].stem for result in results}
            for key in self.model.keys_of_block(index):
                if key.removesuffix(".weight") not in stems:
                    tensors[key] = folded[key] if key in folded else self.model.tensors[key].read()
            self._commit(self.model.block_names[index], _part(index), tensors, results, folds)
        return streams, dense

    def _wanted(self, dense: Tensor) -> Tensor:
        """What the stream should be where the dense model's is this."""
        return dense if self.basis is None else dense @ self.basis.to(dense)

    def _first_half(self, twin: nn.Module, index: int, dense: list[Stream]) -> list[Tensor]:
        """What the attention of the dense block adds to its stream."""
        outputs = []
        for stream in dense:
            with watch_output(twin, first_half(twin)) as found:
                self.model.call(twin, index, stream)
            outputs += [self._wanted(output) for output in found]
        return outputs

    def _tune(
        self,
        block: nn.Module,
        index: int,
        linears: Mapping[str, Linear],
        received: list[Stream],
        streams: list[Stream],
        outputs: list[Tensor],
        first: list[Tensor],
        found: "dict[str, _Solved]",
    ) -> list[Stream]:
        """Move the codes and scales of a solved block together, and go through it with what they have become."""
        step = self.plan.tuning
        assert step is not None
        curvature = self.curvatures.outputs[index] if self.curvatures.outputs else None
        tuner = BlockTuner(self.model, index, received, outputs, curvature, first)
        weights = {name: each.weight for name, each in found.items() if each.weight is not None}
        solved = {name: each.quantized for name, each in found.items()}
        sparse = [name for name, task in self.plan.blocks[index].items() if task.sparsity is not None]
        moved, told = tuner.tune(block, linears, weights, solved, step, sparse)
        for name, each in found.items():
            each.result.update(told)
            if name in moved:
                each.quantized = moved[name]
                values = self.layout.of(each.quantized.grid).values(each.quantized)
                set_weight(linears[name], values)
                each.result.update(errors(weights[name], values, each.statistics))
        if not moved:
            return streams
        return [s.advanced(self.model.call(block, index, s)) for s in received]

    def _observe(
        self,
        block: nn.Module,
        twins: list[nn.Module],
        index: int,
        groups: list[list[str]],
        caches: dict[str, nn.Module],
        streams: list[Stream],
        dense: list[Stream],
        solve: Callable[[list[str], Statistics | None], None],
        solve_cache: Callable[[CacheRanges, nn.Module], None],
        last: bool,
    ) -> tuple[list[Stream], list[Stream]]:
        """Gather each group's statistics with the groups before it compressed, and solve it."""
        blocks = [block, *twins]
        both = [streams, dense][: len(blocks)]
        calls = [partial(self._call, b, index, s) for b, s in zip(blocks, both, strict=True)]
        leaders = []
        for b in blocks:
            own: dict[str, nn.Module] = {**find_linears(b, self.model.block_names[index])}
            own |= {name: cache_of(attention) for name, attention in self._caches(b, index).items()}
            leaders.append({names[0]: own[names[0]] for names in groups})
        tasks, ranges = self.plan.blocks[index], {}
        linears = find_linears(block, self.model.block_names[index])
        gathered: dict[int, Statistics] = {}

        def seen(group: int, batch: int, inputs: Any, dense_inputs: Any) -> None:
            name, mask = groups[group][0], streams[batch].batch.mask_of(inputs)
            if name in caches:
                ranges.setdefault(name, CacheRanges(self.plan.caches[index][name])).add(inputs, mask)
            else:
                if group not in gathered:
                    gathered[group] = empty(tasks[name])
                # as the weight will meet them; where a scale is only found from all of them, as they come
                rows = held_out(self.first_rows[batch], len(streams[batch].batch.input_ids))
                with self.profile.part(SUMS):
                    gathered[group].add(rounded_input(linears[name], inputs), mask, dense_inputs, rows)
                tokens = len(inputs) if isinstance(inputs, Routed) else inputs.shape[:-1].numel()
                width = tasks[name].shape.in_features
                self.profile.count(SUMS, operations_of_sums(width, tokens, dense_inputs is not None))
            if batch % GIVE_BACK == 0:
                give_back_freed_memory()

        def empty(task: LinearTask) -> Statistics:
            width = self._dense_width(task)
            cross = self.plan.needs_dense_stream and not width
            return Statistics(task.shape.in_features, self.model.device, cross, task.needs_range, width)

        def solve_seen(group: int) -> None:
            names = groups[group]
            if names[0] in caches:
                seen_here = ranges.pop(names[0], None) or CacheRanges(self.plan.caches[index][names[0]])
                solve_cache(seen_here, caches[names[0]])
                return
            statistics = gathered.pop(group, None) or empty(tasks[names[0]])
            with self.profile.part(SUMS):
                statistics.complete(self.processes, names[0])
            with self.profile.part(SOLVE):
                solve(names, statistics)
            self.profile.count(SOLVE, operations_of_solving([tasks[name] for name in names if name in tasks]))

        def finished(which: int, batch: int, output: Tensor) -> None:
            both[which][batch] = both[which][batch].advanced(output)

        with self.profile.part(FORWARD):
            self.walk(leaders, calls, len(streams), seen, solve_seen, None if last else finished)
        sizes = [[linears[name].weight.numel() for name in names if name in linears] for names in groups]
        tokens = len(calls) * sum(len(s.batch.input_ids) * s.batch.length for s in streams)
        suspended = self.walk is walk_suspended
        self.profile.count(FORWARD, operations_of_forwards(sizes, tokens, suspended, last))
        return ([], []) if last else (streams, dense)

    def _call(self, block: nn.Module, index: int, streams: list[Stream], batch: int) -> Tensor:
        return self.model.call(block, index, streams[batch])

    def _replay(
        self, block: nn.Module, index: int, streams: list[Stream], dense: list[Stream], last: bool
    ) -> tuple[list[Stream], list[Stream]]:
        """Go through a block that an earlier run has finished, with the weights that it wrote."""
        with self._twin(block, index, copied=False) as twin:
            dense = [] if last else dense
            self.model.advance(twin, index, dense)
        linears = find_linears(block, self.model.block_names[index])
        assert self.writer is not None
        stored = self.writer.read_part(_part(index))
        solved = {f"{task.stem}.weight" for task in self.plan.blocks[index].values()}  # of any shape, and set below
        for name, parameter in block.named_parameters(prefix=self.model.block_names[index]):
            if self.model.sources.get(name) in stored.keys() - solved:  # a fold may have changed it
                parameter.data.copy_(stored[self.model.sources[name]])
        for name, task in self.plan.blocks[index].items():
            set_weight(linears[name], self._restored(stored, task))
            set_scales(linears[name], stored_scales(stored, task))
        for name, attention in self._caches(block, index).items():
            set_scales(attention, stored_scales(stored, self.plan.caches[index][name]))
        streams = [] if last else streams
        self.model.advance(block, index, streams)
        return streams, dense

    @contextlib.contextmanager
    def _twin(self, block: nn.Module, index: int, copied: bool = True) -> Generator[nn.Module]:
        """The dense model's block: a copy, or the block itself where nothing has changed in it yet."""
        if self.dense_model is not None:
            with self.dense_model.block(index) as other:
                yield other
        elif copied:
            yield dense_twin(block)
        else:
            with unrounded(block):
                yield block

    def _caches(self, block: nn.Module, index: int) -> dict[str, nn.Module]:
        """The attentions of a block whose cache is rounded."""
        if not self.plan.caches[index]:
            return {}
        return find_attentions(block, self.model.block_names[index])

    def _require_all_cache(self, caches: dict[str, nn.Module], groups: list[list[str]]) -> None:
        missing = [name for name in caches if [name] not in groups]
        if missing:
            raise UnsupportedModelError(
                f"{missing[0]} keeps no keys and values of its own in the model's forward; leave out the step kv_cache."
            )

    def _require_all_ran(self, tasks: dict[str, LinearTask], groups: list[list[str]]) -> None:
        ran = {name for names in groups for name in names}
        missing = [name for name in tasks if name not in ran]
        if missing:
            raise UnsupportedModelError(
                f"{missing[0]} does not run in the model's forward, so there is nothing to calibrate it on; "
                f"leave it alone: --set STEP.ignore=[{missing[0]}]."
            )

    # outside the blocks

    def _finish_embeddings(self, batches: list[Batch]) -> list[Tensor]:
        """
        Let everything from here on read the input embeddings as they will be: solved, or as an earlier run has solved
        them. What the dense stream begins with is returned where it then differs.
        """
        task = self.plan.embeddings
        if task is None:
            return []
        self.progress.step("embeddings", amount=0)
        hidden = [s.hidden for s in self.model.embed(batches)] if self.plan.needs_dense_stream else []
        if self.journal.done(EMBEDDINGS):
            assert self.writer is not None
            tensors = self.writer.read_part(EMBEDDINGS)
        else:
            with self.model.outside(head=False) as model:
                table: Any = model.get_input_embeddings()  # its weight is rounded like that of a linear
                [(_, quantized, result)] = solve_group({task.name: task}, {task.name: table}, None, self.layout)
            packed = self._packed(task, quantized, {})
            tensors = {f"{task.stem}.{local}": tensor for local, tensor in packed.items()}
            result = {**result, "bytes": sum(t.nbytes for t in packed.values())}
            self._commit(EMBEDDINGS, EMBEDDINGS, tensors, [result], [])
        self.model = self.model.reading({f"{task.stem}.weight": SolvedWeight(task, tensors, self.layout)})
        return hidden

    def _finish_head(
        self, model: PreTrainedModel, task: LinearTask, streams: list[Stream], dense: list[Stream]
    ) -> None:
        """The output head, on what comes out of the final norm; solved, or as an earlier run has solved it."""
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        if self.journal.done(HEAD):
            assert self.writer is not None
            stored = self.writer.read_part(HEAD)
            set_weight(head, self._restored(stored, task))
            set_scales(head, stored_scales(stored, task))
            return
        statistics = None
        if task.needs_inputs:
            statistics = self._head_statistics(model, head, task, streams, dense)
            statistics.complete(self.processes, task.name)
        [(_, quantized, result)] = solve_group({task.name: task}, {task.name: head}, statistics, self.layout)
        scales = input_scale(task, statistics)
        set_scales(head, scales)
        packed = self._packed(task, quantized, scales)
        tensors = {f"{task.stem}.{local}": tensor for local, tensor in packed.items()}
        self._commit(HEAD, HEAD, tensors, [{**result, "bytes": sum(t.nbytes for t in packed.values())}], [])

    def _head_statistics(
        self, model: PreTrainedModel, head: nn.Module, task: LinearTask, streams: list[Stream], dense: list[Stream]
    ) -> Statistics:
        width = self._dense_width(task)
        statistics = Statistics(
            task.shape.in_features, self.model.device, ranges=task.needs_range, dense_features=width
        )
        with contextlib.ExitStack() as stack:
            other = stack.enter_context(self.dense_model.outside(head=True)) if self.dense_model is not None else None
            for number, stream in enumerate(streams):
                inputs = self.model.head_input(model, head, stream)
                wider = None
                if self.dense_model is not None and other is not None:
                    wider = self.dense_model.head_input(other, other.get_output_embeddings(), dense[number])
                statistics.add(rounded_input(head, inputs), stream.batch.mask_of(inputs), wider)
        return statistics

    def _dense_width(self, task: LinearTask) -> int:
        """How wide the input of a linear is in a dense model of another width; 0 where there is none."""
        if self.dense_model is None:
            return 0
        module = self.dense_model.skeleton.get_submodule(task.name)
        assert isinstance(module, Linear)
        return linear_shape(task.name, module).in_features

    def _write_outside(self) -> None:
        """What lies outside the blocks, as it is, one tensor at a time."""
        replaced = {f"{task.stem}.weight" for task in (self.plan.head, self.plan.embeddings) if task is not None}
        if self.writer is not None and self.processes.writes:
            for number, key in enumerate(self.model.outside_keys):
                if key not in replaced:
                    own = self.layout.beside(key, self.model.tensors[key].read())
                    self.writer.write_part(f"outside-{number:05d}", own)
        self.processes.wait()

    def _restored(self, stored: Mapping[str, Tensor], task: LinearTask) -> Tensor:
        """The values of a linear that an earlier run has written."""
        values = self.layout.of(task.grid).restore(stored, task.stem, task.grid, task.shape.transposed)
        return values if task.base is None else task.base.read().float() + values

    def _packed(self, task: LinearTask, quantized: QuantizedWeight, scales: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = {k: v.cpu() for k, v in {**self.layout.of(task.grid).pack(quantized), **scales}.items()}
        if task.shape.transposed:
            packed["weight"] = packed["weight"].T.contiguous()
        return packed

    def _commit(
        self,
        name: str,
        part: str,
        tensors: dict[str, Tensor],
        results: list[dict[str, Any]],
        folds: list[dict[str, Any]],
    ) -> None:
        if self.writer is not None and self.processes.writes:
            self.writing.start(partial(self._write, self.writer, name, part, tensors, results, folds))
        else:
            self.journal.blocks[name] = results
        give_back_freed_memory()
        self.processes.wait()

    def _write(self, writer: CheckpointWriter, name, part, tensors, results, folds) -> None:
        writer.write_part(part, tensors)
        self.journal.commit(name, results, folds)


def _part(index: int) -> str:
    """Where a block is written."""
    return f"block-{index:05d}"


@dataclass
class _Solved:
    """A linear of the block that is being solved; its weight and statistics are kept if it is tuned later."""

    quantized: QuantizedWeight
    scales: dict[str, Tensor]
    result: dict[str, Any]
    weight: Tensor | None
    statistics: Statistics | None


def parts_of(plan: Plan) -> list[tuple[str, dict[str, LinearTask]]]:
    """The parts that a plan's linears are written in, by their names, and which are in each."""
    parts = [(_part(index), tasks) for index, tasks in enumerate(plan.blocks)]
    return parts if plan.head is None else [*parts, (HEAD, {plan.head.name: plan.head})]
