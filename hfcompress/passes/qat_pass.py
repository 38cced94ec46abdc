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
Quantization-aware training: from the codes and scales of the block pass to better ones, on the whole model.

How it works: the dense model is streamed once over the calibration rows and what its last block returns is kept; that
is the teacher. Then the whole model is loaded, each linear that is trained gets a rounded weight that learns
([`hfcompress.distillation.fake_quantized`]), starting at exactly the codes and scales that the block pass has left in
the writer's parts, and is trained to give the teacher's distributions. Rows that are held out decide which iterate is
kept; the start is one of them. The result is first written beside the parts, then noted in the journal, and then put
into the parts, so that a run that is killed trains again from the finished block pass or only repeats the last step.

Memory: the whole model, and per trained weight 16 bytes of float32 (the weight, its gradient and two moments) and what
it computes with; the hidden states of every block for a part of a batch; one hidden state per calibration token.
"""

import contextlib
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfcompress.calibration.tokens import Tokens
from hfcompress.distillation.fake_quantized import FakeQuantized, fake_quantize_linear
from hfcompress.distillation.learned_codebook import LearnedCodebook
from hfcompress.distillation.learned_factors import LearnedFactors
from hfcompress.distillation.objective import Objective
from hfcompress.distillation.signals import Live
from hfcompress.distillation.taught_trainer import BestIterate, Student, TaughtRows, head_of, teach, train
from hfcompress.errors import InvalidValueError
from hfcompress.formats.layout import kind_of
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.models.batch import Batch
from hfcompress.models.experts import Routed
from hfcompress.models.roles import linear_of, set_weight, watch_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.block_pass import parts_of
from hfcompress.passes.journal import QAT as NAME
from hfcompress.passes.journal import Journal
from hfcompress.passes.plan import LinearTask, Plan, take_over
from hfcompress.passes.processes import Processes
from hfcompress.passes.room import Batches, memory_needed, require_room, steps_of
from hfcompress.passes.statistics import flat_tokens
from hfcompress.passes.witness import testimony_of
from hfcompress.progress import Progress
from hfcompress.solvers.grid import QuantizedWeight


STANDING = ("codebook", "vector", "factors")  # types whose codes, if they have any, stay what they are
Learned = FakeQuantized | LearnedCodebook | LearnedFactors


class Training(Batches, Protocol):
    """What the pass asks of the step."""

    learning_rate: float
    scale_learning_rate: float
    train: str
    objective: Objective
    seed: int

    def for_linear(self, linear: str) -> Any:
        """`None` for a linear that is not trained."""


class QatPass:
    """
    Args:
        model (`StreamedModel`): the dense model.
        plan (`Plan`): what the block pass has done.
        layout: the format of the result.
        settings (`Training`): how it is trained.
        tokens (`Tokens`): the calibration rows.

    Raises:
        InvalidValueError: it cannot be trained so, or the whole model does not fit in memory.
        CalibrationError: there are too few rows.
    """

    def __init__(self, model: StreamedModel, plan: Plan, layout, settings: Training, tokens: Tokens):
        self.model, self.plan, self.layout, self.settings, self.tokens = model, plan, layout, settings, tokens
        if not self.trained:
            raise InvalidValueError("qat leaves every quantized linear alone; check its targets and ignore.")
        if layout.name == "dense":
            raise InvalidValueError(
                f"qat trains codes and scales, and the format '{layout.name}' does not keep them; write "
                "--set format=compressed-tensors or int-quantized."
            )
        _require_trainable(plan, settings.train)
        self.steps = steps_of(NAME, settings, tokens)

    @property
    def trained(self) -> dict[str, LinearTask]:
        """What is trained, of what the plan, which the data may have changed, says now."""
        rounded = {name: task for name, task in self.plan.tasks.items() if not task.grid.is_plain}
        return {name: task for name, task in rounded.items() if self.settings.for_linear(name) is not None}

    def check(self, processes: Processes, memory_limit: int | None) -> None:
        """
        Before any work: whether it can be run here.

        Raises:
            InvalidValueError: it cannot.
        """
        advice = "leave out the step, raise qat.accumulation, train fewer linears with qat.targets"
        require_room(NAME, self.memory_needed(), advice, self.model.device, processes, memory_limit)

    def memory_needed(self) -> int:
        """Bytes, about; see the module."""
        trained = sum(t.shape.in_features * t.shape.out_features for t in self.trained.values())
        return memory_needed(self.model, self.settings, self.tokens, trained, self.plan.widest.shape.in_features)

    def run(self, writer: CheckpointWriter, journal: Journal, progress: Progress) -> None:
        """Train, and put what is best into the writer's parts and the journal."""
        take_over(self.model, self.plan, journal.blocks)
        if NAME not in journal.stages:
            found, rows, witness, record = self._train(writer, journal, progress)
            writer.write_stage(NAME, self._packed(found))
            journal.commit_stage(NAME, record, rows, witness)
        self._apply(writer)

    # training

    def _train(self, writer: CheckpointWriter, journal: Journal, progress: Progress):
        began, settings = time.perf_counter(), self.settings
        progress.step("qat: the teacher", amount=0)
        rows = teach(self.model, self.tokens)
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
        held_out, learned = rows.split(chosen[: settings.held_out])
        solved = self._solved(writer)
        with contextlib.ExitStack() as stack:
            signal = None
            if self.plan.head is not None:  # the student's head is not the teacher's
                own = self.model
                teacher = StreamedModel(own.checkpoint, own.device, own.dtype, own.tensors)
                signal = Live(stack.enter_context(head_of(teacher)))
            whole = stack.enter_context(self.model.loaded()).requires_grad_(False)
            learning = self._install(whole, solved)
            student = Student(self.model, whole, signal)

            def stored() -> dict[str, QuantizedWeight]:
                return {name: each.quantized(_position(whole, name)).to("cpu") for name, each in learning.items()}

            best = BestIterate(student, held_out, settings.batch_size // settings.accumulation, stored)
            self._fit(student, learned, learning, best, writer, progress)
            for name in self.trained:
                parametrize.remove_parametrizations(whole.get_submodule(name), "weight")
                set_weight(linear_of(whole, name), self._values(best.weights[name].to(self.model.device)))
            results = self._results(whole, held_out, journal, solved, best.weights)
            witness = testimony_of(self.model, whole)
        if best.step == 0:
            progress.note("qat found nothing that is better on the held-out rows than where it started")
        changed = [row["changed_codes"] for rows in results.values() for row in rows if "changed_codes" in row]
        record = {
            "step": NAME,
            "steps": self.steps,
            "rows": len(learned),
            "held_out_rows": len(held_out),
            **best.record,
            "changed_codes": sum(changed) / len(changed),
            "seconds": round(time.perf_counter() - began, 3),
        }
        return best.weights, results, witness, record

    def _solved(self, writer: CheckpointWriter) -> dict[str, QuantizedWeight]:
        """What the block pass has made of every quantized linear."""
        found = {}
        for part, tasks in parts_of(self.plan):
            stored = writer.read_part(part)
            for name, task in tasks.items():
                local = {k.rpartition(".")[2]: t for k, t in stored.items() if k.rpartition(".")[0] == task.stem}
                if task.grid.is_plain:
                    continue
                weight = self.layout.of(task.grid).unpack(local, task.grid)
                found[name] = weight if task.base is None else replace(weight, base=task.base.read().float())
        return found

    def _install(self, whole: nn.Module, solved: dict[str, QuantizedWeight]) -> dict[str, Learned]:
        learning: dict[str, Learned] = {}
        trained = self.trained
        for name, weight in solved.items():
            linear, weight = linear_of(whole, name), weight.to(self.model.device)
            if name in trained:
                sparse = trained[name].sparsity is not None
                if weight.grid.type in STANDING:
                    kind = LearnedFactors if weight.grid.type == "factors" else partial(LearnedCodebook, sparse=sparse)
                    learning[name] = kind(weight, self.model.dtype)
                    parametrize.register_parametrization(linear, "weight", learning[name], unsafe=True)
                    _position(whole, name).requires_grad_(False)
                else:
                    own = (self.model.dtype, self.settings.train, sparse)
                    learning[name] = fake_quantize_linear(linear, weight, *own)
            else:
                set_weight(linear, self._values(weight))
        return learning

    def _values(self, weight: QuantizedWeight) -> Tensor:
        """What a reader computes with."""
        return self.layout.of(weight.grid).values(weight)

    def _fit(
        self, student: Student, rows: TaughtRows, learning, best: BestIterate, writer, progress: Progress
    ) -> None:
        settings = self.settings
        positions = [_position(student.model, name) for name in learning]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in positions if p.requires_grad], "lr": settings.learning_rate},
            {"params": [p for each in learning.values() for p in each.learned()], "lr": settings.scale_learning_rate},
        ]
        groups = [group for group in groups if any(p.requires_grad for p in group["params"])]
        folder = writer.partial / "trainer"
        train(NAME, student, rows, groups, settings, self.steps, best, folder, len(self.model), progress)

    # what comes of it

    @torch.no_grad()
    def _results(
        self, whole, held_out: TaughtRows, journal: Journal, solved, found
    ) -> dict[str, list[dict[str, Any]]]:
        """The journal's rows with what is true now; the output error is that on the held-out rows."""
        lost, whole_ = dict.fromkeys(self.trained, 0.0), dict.fromkeys(self.trained, 0.0)
        dense = {name: self.model.tensors[f"{task.stem}.weight"] for name, task in self.trained.items()}
        linears = {name: linear_of(whole, name) for name in self.trained}
        mask = None

        def seen(name: str, inputs: Tensor | Routed) -> None:
            x = flat_tokens(inputs, mask)
            weight = dense[name].read().to(x.device).float()
            lost[name] += (x @ (weight - linears[name].weight.float()).T).square().sum().item()
            whole_[name] += (x @ weight.T).square().sum().item()

        with watch_inputs(linears, seen):
            for batch in Batch(held_out.input_ids, held_out.mask).split(1):
                mask = batch.mask
                self.model.head_logits(whole, self.model.final_hidden(whole, batch), batch)

        def updated(row: dict[str, Any]) -> dict[str, Any]:
            name = row["name"]
            if name not in linears:
                return row
            weight, values = dense[name].read().float(), found[name].dequantize()
            return {
                **row,
                "method": f"{row['method']}+{NAME}",
                "sparsity": (values == 0).float().mean().item(),
                "relative_output_error": math.sqrt(lost[name] / whole_[name]) if whole_[name] else 0.0,
                "relative_weight_error": ((weight - values).norm() / weight.norm().clamp(min=1e-30)).item(),
                "changed_codes": (found[name].codes != solved[name].codes).float().mean().item(),
                **self._bytes(found[name]),
            }

        return {block: [updated(row) for row in rows] for block, rows in journal.blocks.items()}

    def _bytes(self, weight: QuantizedWeight) -> dict[str, int]:
        """What it takes now, where that depends on what was trained: tables are stored in an order of their own."""
        if weight.grid.type not in STANDING:
            return {}
        return {"bytes": sum(tensor.nbytes for tensor in self.layout.of(weight.grid).pack(weight).values())}

    def _packed(self, found: dict[str, QuantizedWeight]) -> dict[str, Tensor]:
        trained = self.trained
        return {
            f"{trained[name].stem}.{local}": tensor
            for name, weight in found.items()
            for local, tensor in self.layout.of(weight.grid).pack(weight).items()
        }

    def _apply(self, writer: CheckpointWriter) -> None:
        """Put the result into the parts; to do it twice is to do it once."""
        trained = writer.read_stage(NAME)
        own_names = self.trained.keys()
        for part, tasks in parts_of(self.plan):
            stored = writer.read_part(part)
            stems = {task.stem for task in tasks.values() if task.name in own_names}
            own = {key: tensor for key, tensor in trained.items() if key.rpartition(".")[0] in stems}
            gone = {
                key
                for key in stored
                if key.rpartition(".")[0] in stems and key.rpartition(".")[2].startswith("weight")
            }
            writer.write_part(part, {**{key: stored[key] for key in stored.keys() - gone}, **own})


def _require_trainable(plan: Plan, train: str) -> None:
    """
    Raises:
        InvalidValueError: something is rounded that lets no gradient through, or has other codes than integers.
    """
    if plan.kv_cache is not None:
        raise InvalidValueError(
            "qat trains weights, and kv_cache rounds what it would learn from; leave one of the two out."
        )
    for name, task in plan.tasks.items():
        if task.grid.is_plain:
            continue
        if task.grid.type in STANDING:
            if train != "scales":
                raise InvalidValueError(
                    f"The codes of {name} stay what they are, and what they stand for is trained; set qat.train to scales."
                )
            continue
        if task.grid.type != "int" or task.grid.activations != "none":
            raise InvalidValueError(
                f"qat trains integer codes whose inputs are not rounded, and {name} is to have {kind_of(task.grid)}; leave "
                "out qat, or set type to int and activations to none."
            )


def _position(model: nn.Module, name: str) -> nn.Parameter:
    """The trained positions of a linear."""
    return model.get_parameter(f"{name}.parametrizations.weight.original")
