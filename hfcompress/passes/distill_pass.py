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
Distillation as a run of its own: a student, made or given or left by earlier steps, trained on the original's distributions.

How it works. The original is streamed once over the calibration rows, and what its last block returns is kept; its head
stays in memory. The student is loaded whole, all its weights learn, but for the zeros that a pattern asked for, and the
iterate that is best on held-out rows is written, tensor by tensor as the student was stored.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn

from hfcompress.calibration.tokens import Tokens
from hfcompress.distillation.endpoint import Endpoint
from hfcompress.distillation.features import Features, default_map
from hfcompress.distillation.heard_rows import HeardRows, Speaker, StreamedTeacher
from hfcompress.distillation.objective import Objective
from hfcompress.distillation.signals import CACHED, Live, Signal
from hfcompress.distillation.taught_trainer import BestIterate, Student, TaughtRows, head_of, teach, train
from hfcompress.errors import CalibrationError, InvalidValueError, UnsupportedModelError
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.models.manifest import read_manifest
from hfcompress.models.roles import Linear, find_linears, linear_shape
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.students import MadeStudent
from hfcompress.models.vocabulary import shared_vocabulary
from hfcompress.passes.journal import DISTILL as NAME
from hfcompress.passes.journal import Journal
from hfcompress.passes.plan import Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.room import Batches, memory_needed, require_room, steps_of
from hfcompress.passes.witness import testimony_of
from hfcompress.progress import Progress
from hfcompress.solvers.pattern import Pattern


CACHE = "hfcompress/teachers"  # in the Hub's own home


class Distillation(Batches, Protocol):
    """What the pass asks of the step."""

    learning_rate: float
    objective: Objective
    feature_blocks: Mapping[int, int] | None
    student: str | Mapping[str, Any] | None
    signal: str
    signal_size: int
    teacher_cache: str | None
    teacher: Mapping[str, str] | None
    seed: int


class DistillPass:
    """
    Args:
        teacher (`StreamedModel`): the original.
        student (`StreamedModel`): what is trained.
        settings (`Distillation`): the step.
        tokens (`Tokens`): the calibration rows.
        made (`MadeStudent`, *optional*): how it was made of the teacher, if it was.

    Raises:
        CalibrationError: there are too few rows, or they hold ids that the student does not know.
        CheckpointError: the two speak of other tokens.
        InvalidValueError: a block is to be compared that there is not.
        UnsupportedModelError: the student is stored in a form that cannot be written back.
    """

    def __init__(
        self,
        teacher: StreamedModel,
        student: StreamedModel,
        settings: Distillation,
        tokens: Tokens,
        made: MadeStudent | None = None,
    ):
        self.config_changes = {} if made is None else made.changes
        self.teacher, self.student, self.settings, self.tokens = teacher, student, settings, tokens
        if student.converts:
            raise UnsupportedModelError(
                f"{student.checkpoint.name} is stored in another form than it is used in; leave out distill."
            )
        self.steps = steps_of(NAME, settings, tokens)
        self.linears: dict[str, Linear] = {}
        for name in student.block_names:
            self.linears |= find_linears(student.skeleton.get_submodule(name), name)
        manifest = read_manifest(student.checkpoint.folder) if settings.student is None else {}
        self.sparse = {row["name"]: row for row in manifest.get("linears", []) if row.get("pattern")}
        kept = made.blocks if made is not None else manifest.get("pruning", {}).get("kept_blocks")
        self.vocabulary = self._vocabulary() if isinstance(settings.student, str) else None
        self.compared = self._compared(kept) if settings.objective.features else {}

    def _vocabulary(self) -> int:
        shared = shared_vocabulary(self.student.checkpoint, self.teacher.checkpoint)
        if (highest := int(self.tokens.input_ids.max())) >= shared:
            raise CalibrationError(
                f"The calibration rows hold the token id {highest}, and {self.student.checkpoint.name} shares only {shared} "
                "ids with the original; give other rows."
            )
        return shared

    def _compared(self, kept: Sequence[int] | None) -> dict[int, int]:
        """Of the student's blocks -> of the teacher's: those whose hidden states are compared."""
        ours, theirs = len(self.student), len(self.teacher)
        given = self.settings.feature_blocks
        for block, other in ({} if given is None else given).items():
            if block >= ours or other >= theirs:
                raise InvalidValueError(
                    f"distill.feature_blocks: {block}: {other} is no pair of blocks; the student has {ours} and the original "
                    f"{theirs}, counted from 0."
                )
        return dict(given) if given else default_map(ours, theirs, kept)

    def check(self, processes: Processes, memory_limit: int | None) -> None:
        """
        Before any work: whether it can be run here.

        Raises:
            InvalidValueError: it cannot.
        """
        shapes = [linear_shape(name, module) for name, module in self.linears.items()]
        trained = sum(parameter.numel() for parameter in self.student.skeleton.parameters())
        widest = max(shape.in_features for shape in shapes)
        needed = memory_needed(self.student, self.settings, self.tokens, trained, widest)
        width = self.teacher.skeleton.config.get_text_config().hidden_size
        needed += len(self.compared) * self.tokens.input_ids.size * width * self.teacher.dtype.itemsize
        advice = "leave out the step, raise distill.accumulation"
        require_room(NAME, needed, advice, self.student.device, processes, memory_limit)

    @property
    def patterns(self) -> list[tuple[str, Pattern, bool]]:
        """Of every sparse linear its name on disk, where its zeros may lie, and whether it is stored transposed."""
        found = []
        for name, row in self.sparse.items():
            stem = self.student.sources[f"{name}.weight"].removesuffix(".weight")
            pattern = Pattern.parse(row["pattern"], row["sparsity"])
            found.append((stem, pattern, linear_shape(name, self.linears[name]).transposed))
        return found

    @property
    def plan(self) -> Plan:
        """Of a block pass that does nothing."""
        named = [name for name, module in self.student.skeleton.named_modules() if isinstance(module, nn.Linear)]
        return Plan(
            blocks=[{} for _ in self.student.block_names],
            head=None,
            untouched=[name for name in named if name not in self.linears],
        )

    def run(self, writer: CheckpointWriter, journal: Journal, progress: Progress) -> list[dict[str, Any]]:
        """
        Train, and put what is best into the writer's result.

        Returns:
            `list[dict]`: what there is to report of every linear.
        """
        if NAME not in journal.stages:
            weights, witness, record = self._train(writer, progress)
            for number, (part, keys) in enumerate(self._parts()):
                progress.step(f"distill: writing {number + 1}", amount=0)
                writer.write_part(part, {key: weights[key] for key in keys})
            journal.commit_stage(NAME, record, {NAME: self._rows(weights)}, witness)
        if writer.merged:
            writer.require_whole()
        else:
            writer.merge()
        return journal.blocks[NAME]

    def _parts(self) -> list[tuple[str, list[str]]]:
        """Names of parts, and the names on disk of their tensors."""
        blocks = [(f"block-{index:05d}", self.student.keys_of_block(index)) for index in range(len(self.student))]
        return [*blocks, ("outside", self.student.outside_keys)]

    def _train(self, writer: CheckpointWriter, progress: Progress):
        began, settings, student = time.perf_counter(), self.settings, self.student
        progress.step("distill: the teacher", amount=0)
        rows = self._rows_taught(progress)
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
        held_out, learned = rows.split(chosen[: settings.held_out])
        with contextlib.ExitStack() as stack:
            signal: Signal
            if isinstance(rows, HeardRows):
                signal = CACHED[rows.kind]()
            else:
                signal = Live(stack.enter_context(head_of(self.teacher)), self.vocabulary)
            whole = stack.enter_context(student.loaded()).requires_grad_()
            for name in self.sparse:
                weight = whole.get_submodule(name).get_parameter("weight")
                weight.register_hook((weight.detach() != 0).to(weight).mul)
            features = self._features()
            learner = Student(student, whole, signal, features, self.vocabulary)
            best = BestIterate(
                learner, held_out, settings.batch_size // settings.accumulation, lambda: self._stored(whole)
            )
            learning = [*whole.parameters(), *([] if features is None else features.parameters())]
            groups = [{"params": learning, "lr": settings.learning_rate}]
            folder = writer.partial / "trainer"
            train(NAME, learner, learned, groups, settings, self.steps, best, folder, len(student), progress)
            with torch.no_grad():
                self._put(whole, best.weights)
            witness = testimony_of(student, whole)
        if best.step == 0:
            progress.note("distill found nothing that is better on the held-out rows than where it started")
        record = {
            "step": NAME,
            "signal": self.settings.signal,
            **({} if settings.teacher is None else {"teacher": settings.teacher["model"]}),
            "steps": self.steps,
            "rows": len(learned),
            "held_out_rows": len(held_out),
            **best.record,
            "seconds": round(time.perf_counter() - began, 3),
        }
        return best.weights, witness, record

    def _rows_taught(self, progress: Progress) -> TaughtRows | HeardRows:
        """What the teacher says: all of it in memory, or what is kept on disk, asked for now as far as it is not there."""
        settings = self.settings
        if settings.signal == "live":
            return teach(self.teacher, self.tokens, list(self.compared.values()))
        folder = Path(settings.teacher_cache).expanduser() if settings.teacher_cache else Path(HF_HOME) / CACHE
        own = settings.signal, settings.signal_size, settings.seed
        teacher: Speaker = StreamedTeacher(self.teacher, *own)
        if settings.teacher is not None:
            known = self.student.checkpoint.tokenizer
            teacher = Endpoint(settings.teacher["url"], settings.teacher["model"], known, settings.signal_size)
        rows = HeardRows(folder, teacher, self.tokens, *own)
        if rows.complete:
            progress.note(f"what the teacher says is read from {rows.folder}")
        else:
            rows.fill(self.tokens, progress)
        return rows

    def _features(self) -> Features | None:
        if not self.compared:
            return None
        ours, theirs = (model.skeleton.config.get_text_config().hidden_size for model in (self.student, self.teacher))
        kind, place = self.settings.objective.feature_loss, (self.student.device, self.student.dtype)
        return Features(kind, self.compared, ours, theirs, self.settings.seed, *place)

    def _stored(self, whole: nn.Module) -> dict[str, Tensor]:
        """Every tensor as it would be written now, by its name on disk."""
        values = {self.student.sources[n]: p for n, p in whole.named_parameters() if n in self.student.sources}
        return {
            key: values[key].detach().to("cpu", tensor.dtype, copy=True) if key in values else tensor.read()
            for key, tensor in self.student.tensors.items()
        }

    def _put(self, whole: nn.Module, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in whole.named_parameters():
            if name in self.student.sources:
                parameter.data.copy_(weights[self.student.sources[name]])

    def _rows(self, weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        rows = []
        for name, module in self.linears.items():
            key = self.student.sources[f"{name}.weight"]
            shape, before, after = linear_shape(name, module), self.student.tensors[key].read().float(), weights[key]
            own = self.sparse.get(name, {})
            rows.append(
                {
                    "name": name,
                    "method": "+".join([own["method"], NAME] if own else [NAME]),
                    "bits": 8 * after.dtype.itemsize,
                    "group_size": None,
                    "symmetric": True,
                    "type": "plain",
                    "activations": "none",
                    "shape": [shape.out_features, shape.in_features],
                    "sparsity": (after == 0).float().mean().item(),
                    "relative_output_error": None,
                    "relative_weight_error": ((after - before).norm() / before.norm().clamp(min=1e-30)).item(),
                    "tokens": self.tokens.count,
                    "fallback": None,
                    "bytes": after.nbytes,
                    **({"pattern": own["pattern"]} if own else {}),
                }
            )
        return rows
