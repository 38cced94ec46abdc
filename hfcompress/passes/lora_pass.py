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
Low-rank recovery: corrections beside what the block pass has left, trained on the whole model.

How it works: the dense model is streamed once over the calibration rows and what its last block returns is kept; that is
the teacher. Then the whole model is loaded with the weights that the block pass has written, which stay, and every linear
that is corrected answers with its [`hfcompress.distillation.correction.Correction`] beside it. Those begin at the best
product of their rank for what the weight has lost, with the Gram matrices of the compressed model's own inputs, of one block
at a time. What is best on held-out rows is noted and written: into the writer's `adapter` folder, or merged into the parts.

Memory: the whole model, 16 bytes per number of the corrections, the hidden states of every block for a part of a batch, one
hidden state per calibration token, and while they begin the Gram matrices of one block.
"""

import time
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hfcompress.calibration.tokens import Tokens
from hfcompress.distillation.correction import Correction, error_correcting, starting
from hfcompress.distillation.objective import Objective
from hfcompress.distillation.signals import Live
from hfcompress.distillation.taught_trainer import (
    TEACHER_TOKENS,
    BestIterate,
    Student,
    TaughtRows,
    head_of,
    teach,
    train,
)
from hfcompress.errors import InvalidValueError
from hfcompress.formats.writer import CheckpointWriter, disk_errors
from hfcompress.models.adapter import ADAPTER, require_peft, write_adapter
from hfcompress.models.batch import Batch
from hfcompress.models.experts import ExpertLinear, Routed
from hfcompress.models.roles import Linear, find_linears, get_weight, linear_of, set_weight, watch_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.block_pass import parts_of
from hfcompress.passes.journal import LORA as NAME
from hfcompress.passes.journal import Journal
from hfcompress.passes.plan import Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.room import Batches, memory_needed, require_room, steps_of
from hfcompress.passes.statistics import flat_tokens
from hfcompress.passes.witness import testimony_of
from hfcompress.progress import Progress
from hfcompress.solvers.grid import QuantizedWeight


DOWN, UP, ERROR = "lora_down", "lora_up", "relative_weight_error"


class Correcting(Batches, Protocol):
    """What the pass asks of the step."""

    learning_rate: float
    rank: int
    begins_at_error: bool
    merge: bool
    objective: Objective
    seed: int

    def for_linear(self, linear: str) -> Any:
        """`None` for a linear that is not corrected."""


class LoraPass:
    """
    Args:
        model (`StreamedModel`): the dense model.
        plan (`Plan`): what the block pass has done.
        layout: the format of the result.
        settings (`Correcting`): how it is corrected.
        tokens (`Tokens`): the calibration rows.

    Raises:
        InvalidValueError: it cannot be corrected so, or the whole model does not fit in memory.
        CalibrationError: there are too few rows.
        MissingExtraError: PEFT is not installed.
    """

    def __init__(self, model: StreamedModel, plan: Plan, layout, settings: Correcting, tokens: Tokens):
        self.model, self.plan, self.layout, self.settings, self.tokens = model, plan, layout, settings, tokens
        self.trained = {name: task for name, task in plan.tasks.items() if settings.for_linear(name) is not None}
        if not self.trained:
            raise InvalidValueError("lora leaves every compressed linear alone; check its targets and ignore.")
        for task in self.trained.values():
            least = min(task.shape.in_features, task.shape.out_features)
            if settings.rank > least:
                raise InvalidValueError(
                    f"lora.rank is {settings.rank}, and {task.name} has only {least} rows or columns; lower it, or leave "
                    "that linear alone with lora.ignore."
                )
            if not settings.merge and isinstance(model.skeleton.get_submodule(task.name), ExpertLinear):
                raise InvalidValueError(
                    f"{task.name} is of an expert, which transformers merges with the others and PEFT then knows by no name; "
                    "leave experts alone with lora.ignore=[re:.*experts.*], or merge into plain weights with lora.merge."
                )
            if settings.merge and not task.grid.is_plain:
                raise InvalidValueError(
                    f"lora.merge would take {task.name} off the {task.grid.bits}-bit grid that it is rounded to; leave it out, "
                    "and an adapter is written."
                )
        if plan.kv_cache is not None or any(task.grid.activations != "none" for task in plan.tasks.values()):
            raise InvalidValueError(
                "lora cannot learn through inputs and caches that are rounded; leave out kv_cache, and set activations to none."
            )
        if plan.embeddings is not None:
            raise InvalidValueError(
                f"lora starts from embeddings as they were; take {plan.embeddings.name} out of targets."
            )
        if not settings.merge:
            require_peft(NAME)
        self.steps = steps_of(NAME, settings, tokens)

    def check(self, processes: Processes, memory_limit: int | None) -> None:
        """
        Before any work: whether it can be run here.

        Raises:
            InvalidValueError: it cannot.
        """
        shapes = [task.shape for task in self.trained.values()]
        learning = sum(self.settings.rank * (shape.in_features + shape.out_features) for shape in shapes)
        widest = self.plan.widest.shape.in_features
        needed = memory_needed(self.model, self.settings, self.tokens, learning, widest)
        needed += 8 * max(sum(t.shape.in_features**2 for t in tasks.values()) for tasks in self.plan.blocks)
        advice = "leave out the step, raise lora.accumulation"
        require_room(NAME, needed, advice, self.model.device, processes, memory_limit)

    def run(self, writer: CheckpointWriter, journal: Journal, progress: Progress) -> None:
        """Train, and put what is best beside the writer's parts, or into them, and into the journal."""
        if NAME not in journal.stages:
            found, witness, record = self._train(writer, progress)
            tensors = {f"{name}.{key}": each[key] for name, each in found.items() for key in (DOWN, UP)}
            writer.write_stage(NAME, tensors)
            rows = {block: [self._row(row, found) for row in rows] for block, rows in journal.blocks.items()}
            journal.commit_stage(NAME, record, rows, witness)
        stored = writer.read_stage(NAME)
        pairs = {name: (stored[f"{name}.{DOWN}"], stored[f"{name}.{UP}"]) for name in self.trained}  # float32
        if self.settings.merge:
            self._merge(writer, pairs)
        else:
            self._write(writer, pairs)

    def _row(self, row: dict[str, Any], found: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """What is true of a linear now; its outputs were not looked at again where its weight has changed."""
        name = row["name"]
        if name not in self.trained:
            return row
        row = {**row, "method": f"{row['method']}+{NAME}"}
        if not self.settings.merge:
            return row
        return {**row, "relative_output_error": None, "relative_weight_error": found[name].pop(ERROR).item()}

    # training

    def _train(self, writer: CheckpointWriter, progress: Progress):
        began, settings, model = time.perf_counter(), self.settings, self.model
        progress.step("lora: the teacher", amount=0)
        rows = teach(model, self.tokens)
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
        held_out, learned = rows.split(chosen[: settings.held_out])
        with ExitStack() as stack:
            signal = None
            if self.plan.head is not None:  # the student's head is not the teacher's
                teacher = StreamedModel(model.checkpoint, model.device, model.dtype, model.tensors)
                signal = Live(stack.enter_context(head_of(teacher)))
            whole = stack.enter_context(model.loaded()).requires_grad_(False)
            errors = self._install(whole, writer)
            student = Student(model, whole, signal)
            batch_size = settings.batch_size // settings.accumulation
            without = student.divergence(held_out, batch_size)
            corrections = self._begin(whole, learned, errors, progress)
            handles = [corrections[name].beside(whole.get_submodule(name)) for name in corrections]

            def stored() -> dict[str, dict[str, Tensor]]:
                return {
                    name: {DOWN: each.down.detach().cpu().clone(), UP: each.up.detach().cpu().clone()}
                    for name, each in corrections.items()
                }

            best = BestIterate(student, held_out, batch_size, stored)
            learning = [parameter for each in corrections.values() for parameter in each.parameters()]
            groups = [{"params": learning, "lr": settings.learning_rate}]
            folder = writer.partial / "trainer"
            train(NAME, student, learned, groups, settings, self.steps, best, folder, len(model), progress)
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                if settings.merge:
                    for name, pair in best.weights.items():
                        linear, dense = linear_of(whole, name), model.tensors[f"{self.trained[name].stem}.weight"]
                        values, before = self._merged(name, get_weight(linear), pair), dense.read().float()
                        before = before.T if self.trained[name].shape.transposed else before
                        pair[ERROR] = (before.to(values) - values).norm() / before.norm().clamp(min=1e-30)
                        set_weight(linear, values)
            witness = testimony_of(model, whole)
        if best.step == 0:
            progress.note("lora found nothing that is better on the held-out rows than where it started")
        record = {
            "step": NAME,
            "rank": settings.rank,
            "merged": settings.merge,
            "parameters": sum(parameter.numel() for parameter in learning),
            "steps": self.steps,
            "rows": len(learned),
            "held_out_rows": len(held_out),
            "held_out_kl_without": without,
            **best.record,
            "seconds": round(time.perf_counter() - began, 3),
        }
        return best.weights, witness, record

    def _install(self, whole: nn.Module, writer: CheckpointWriter) -> dict[str, Tensor]:
        """Put what was written into the model; of every linear that is corrected, what its weight has lost."""
        errors = {}
        for part, tasks in parts_of(self.plan):
            stored = writer.read_part(part)
            for name, task in tasks.items():
                linear = linear_of(whole, name)
                layout = self.layout.of(task.grid)
                values = layout.restore(stored, task.stem, task.grid, task.shape.transposed).to(self.model.device)
                if name in self.trained:
                    errors[name] = get_weight(linear) - values
                set_weight(linear, values)
        return errors

    def _begin(
        self, whole: nn.Module, rows: TaughtRows, errors: dict[str, Tensor], progress: Progress
    ) -> dict[str, Correction]:
        rank, generator = self.settings.rank, torch.Generator().manual_seed(self.settings.seed)
        found = {}
        if self.settings.begins_at_error:
            progress.step("lora: what the weights have lost", amount=0)
            for name, gram in self._grams(whole, rows):
                found[name] = Correction(*error_correcting(errors.pop(name), gram, rank))
        else:
            for name, error in errors.items():
                keep = linear_of(whole, name).weight != 0 if self.settings.merge else None
                keep = keep.T if keep is not None and self.trained[name].shape.transposed else keep
                found[name] = Correction(*starting((error.shape[0], error.shape[1]), rank, generator), keep)
        return {name: each.to(self.model.device) for name, each in found.items()}

    @torch.no_grad()
    def _grams(self, whole: nn.Module, rows: TaughtRows):
        """Of every linear that is corrected the sum of `x x^T` over the rows' tokens, of one block at a time."""
        model, length = self.model, rows.input_ids.shape[1]
        batches = Batch(rows.input_ids, rows.mask).split(max(1, TEACHER_TOKENS // length))
        streams = [model.stream(whole, batch) for batch in batches]
        grams: dict[str, Tensor] = {}
        last: tuple[Tensor, Tensor] | None = None
        kept: Tensor | None = None

        def seen(name: str, inputs: Tensor | Routed) -> None:
            nonlocal last
            read = inputs.inputs if isinstance(inputs, Routed) else inputs
            if last is None or last[0] is not read:  # linears that read the same tensor share its Gram matrix
                x = flat_tokens(inputs, kept)
                last = read, x.T @ x
            grams[name] = grams[name] + last[1] if name in grams else last[1]

        for index, block_name in enumerate(model.block_names):
            block = whole.get_submodule(block_name)
            named = {name: linear for name, linear in find_linears(block, block_name).items() if name in self.trained}
            advanced = []
            with watch_inputs(named, seen):
                for stream in streams:
                    kept = stream.batch.mask
                    advanced.append(stream.advanced(model.call(block, index, stream)))
            streams, last = advanced, None
            yield from grams.items()
            grams.clear()
        head = self.plan.head
        if head is not None and head.name in self.trained:
            with watch_inputs({head.name: whole.get_submodule(head.name)}, seen):
                for stream in streams:
                    kept = stream.batch.mask
                    model.head_logits(whole, stream.hidden, stream.batch)
            yield from grams.items()

    # what comes of it

    def _merged(self, name: str, weight: Tensor, pair: dict[str, Tensor]) -> Tensor:
        """A weight `(out_features, in_features)` with its correction, in the dtype that it is stored in."""
        own = {key: each.to(weight.device) for key, each in pair.items()}
        change = Correction(own[DOWN], own[UP], weight != 0).weight().detach()
        return (weight.float() + change).to(self.trained[name].scale_dtype).float()

    def _merge(self, writer: CheckpointWriter, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put the corrected weights into the parts; a part that has them is left as it is."""
        for part, tasks in parts_of(self.plan):
            done = f"{NAME}-{part}"
            if writer.holds_stage(done):
                stored = writer.read_stage(done)
            else:
                stored = writer.read_part(part)
                for name, task in tasks.items():
                    if name not in self.trained:
                        continue
                    layout = self.layout.of(task.grid)
                    weight = layout.restore(stored, task.stem, task.grid, task.shape.transposed)
                    down, up = pairs[name]
                    values = self._merged(name, weight, {DOWN: down, UP: up}).to(task.scale_dtype)
                    scales = torch.ones(len(values), 1, dtype=task.scale_dtype)
                    packed = layout.pack(QuantizedWeight(values, scales, None, task.grid))
                    if task.shape.transposed:
                        packed = {key: tensor.T.contiguous() for key, tensor in packed.items()}
                    stored.update({f"{task.stem}.{local}": tensor for local, tensor in packed.items()})
                writer.write_stage(done, stored)
            writer.write_part(part, stored)

    def _write(self, writer: CheckpointWriter, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        pairs = {
            name: (down.to(self.trained[name].scale_dtype), up.to(self.trained[name].scale_dtype))
            for name, (down, up) in pairs.items()
        }
        every = [name for name, module in self.model.skeleton.named_modules() if isinstance(module, Linear)]
        transposed = any(task.shape.transposed for task in self.trained.values())
        with disk_errors(writer.output):
            write_adapter(writer.result / ADAPTER, pairs, str(writer.output), every, transposed)
