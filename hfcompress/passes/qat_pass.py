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
from functools import partial
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hfcompress.calibration.tokens import Tokens
from hfcompress.distillation.divergences import Divergence
from hfcompress.distillation.fake_quantized import FakeQuantized, fake_quantize_linear
from hfcompress.distillation.trainer import AfterSteps, DistillationTrainer, Schedule, Student, TaughtRows
from hfcompress.errors import CalibrationError, InvalidValueError
from hfcompress.formats.layout import kind_of
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.models.roles import Linear, set_weight, watch_inputs
from hfcompress.models.streaming import Batch, StreamedModel
from hfcompress.passes.block_pass import HEAD
from hfcompress.passes.journal import Journal
from hfcompress.passes.plan import LinearTask, Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.witness import testimony, witness_ids
from hfcompress.progress import Progress
from hfcompress.solvers.grid import QuantizedWeight


NAME = "qat"
EVALUATIONS = 8  # times that the held-out rows are looked at
TRAINED_BYTES = 16  # per weight: itself, its gradient, two moments
BLOCK_HIDDEN, BLOCK_WIDEST = 16, 4  # tensors of these widths that a block keeps for the way back, about
TEACHER_TOKENS = 4096  # that are streamed together


class Training(Protocol):
    """What the pass asks of the step."""

    steps: int | None
    epochs: int
    learning_rate: float
    scale_learning_rate: float
    batch_size: int
    accumulation: int
    held_out: int
    train: str
    cross_entropy: float
    divergence: Divergence
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
        self.trained = {name: task for name, task in plan.tasks.items() if settings.for_linear(name) is not None}
        rows = len(tokens.input_ids) - settings.held_out
        if rows < settings.batch_size:
            raise CalibrationError(
                f"qat has {len(tokens.input_ids)} calibration rows, which is less than held_out ({settings.held_out}) "
                f"and one batch ({settings.batch_size}); give more --samples, or lower qat.batch_size or qat.held_out."
            )
        if not self.trained:
            raise InvalidValueError("qat leaves every quantized linear alone; check its targets and ignore.")
        if layout.name == "dense":
            raise InvalidValueError(
                f"qat trains codes and scales, and the format '{layout.name}' does not keep them; write "
                "--set format=compressed-tensors or int-quantized."
            )
        _require_trainable(plan)
        self.steps = settings.steps or settings.epochs * (rows // settings.batch_size)

    def check(self, processes: Processes, memory_limit: int | None) -> None:
        """
        Before any work: whether it can be run here.

        Raises:
            InvalidValueError: it cannot.
        """
        if processes.count > 1:
            raise InvalidValueError("qat trains in one process; start it without torchrun or accelerate launch.")
        device = self.model.device
        if device.type == "cuda" and device.index:
            raise InvalidValueError(
                f"qat trains on the first GPU; give --device cuda and choose it with CUDA_VISIBLE_DEVICES={device.index}."
            )
        needed = self.memory_needed()
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available
            if memory_limit is not None:
                free = min(free, memory_limit - psutil.Process().memory_info().rss)
        if needed > free:
            raise InvalidValueError(
                f"qat trains the whole model at once and needs about {needed / 1e9:.3g} GB, but {max(free, 0) / 1e9:.3g} "
                "GB are free; leave out the step, raise qat.accumulation, train fewer linears with qat.targets, or use "
                "a larger machine."
            )

    def memory_needed(self) -> int:
        """Bytes, about; see the module."""
        config = self.model.skeleton.config.get_text_config()
        size = self.model.dtype.itemsize
        everything = sum(parameter.numel() for parameter in self.model.skeleton.parameters())
        trained = sum(t.shape.in_features * t.shape.out_features for t in self.trained.values())
        per_token = (BLOCK_HIDDEN * config.hidden_size + BLOCK_WIDEST * self.plan.widest.shape.in_features) * size
        rows = self.settings.batch_size // self.settings.accumulation
        activations = rows * self.tokens.input_ids.shape[1] * per_token * len(self.model)
        teacher = self.tokens.input_ids.size * config.hidden_size * size
        return everything * size + trained * TRAINED_BYTES + activations + teacher

    def run(self, writer: CheckpointWriter, journal: Journal, progress: Progress) -> None:
        """Train, and put what is best into the writer's parts and the journal."""
        if NAME not in journal.stages:
            found, rows, witness, record = self._train(writer, journal, progress)
            writer.write_stage(NAME, self._packed(found))
            journal.commit_stage(NAME, record, rows, witness)
        self._apply(writer)

    # training

    def _train(self, writer: CheckpointWriter, journal: Journal, progress: Progress):
        began, settings = time.perf_counter(), self.settings
        progress.step("qat: the teacher", amount=0)
        rows = self._teach()
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
        held_out, learned = rows.split(chosen[: settings.held_out])
        solved = self._solved(writer)
        with contextlib.ExitStack() as stack:
            teacher_logits = None
            if self.plan.head is not None:  # the student's head is not the teacher's
                own = self.model
                teacher = StreamedModel(own.checkpoint, own.device, own.dtype, own.tensors)
                teacher_head = stack.enter_context(teacher.outside(head=True))
                teacher_logits = partial(_logits, teacher, teacher_head)
            whole = stack.enter_context(self.model.loaded()).requires_grad_(False)
            learning = self._install(whole, solved)
            student = Student(self.model, whole, teacher_logits)
            best = _Best(student, held_out, settings.batch_size // settings.accumulation, learning)
            self._fit(student, learned, learning, best, writer, progress)
            for name in self.trained:
                parametrize.remove_parametrizations(whole.get_submodule(name), "weight")
                set_weight(_linear(whole, name), self.layout.values(best.weights[name].to(self.model.device)))
            results = self._results(whole, held_out, journal, solved, best.weights)
            stream = self.model.stream(whole, Batch(witness_ids(self.model)))
            with torch.no_grad():
                stream = stream.advanced(self.model.final_hidden(whole, stream.batch))
                witness = testimony(stream, self.model.logits(whole, stream))
        if best.step == 0:
            progress.note("qat found nothing that is better on the held-out rows than where it started")
        changed = [row["changed_codes"] for rows in results.values() for row in rows if "changed_codes" in row]
        record = {
            "step": NAME,
            "steps": self.steps,
            "rows": len(learned),
            "held_out_rows": len(held_out),
            "held_out_kl_start": best.history[0][1],
            "held_out_kl": best.divergence,
            "best_step": best.step,
            "history": best.history,
            "changed_codes": sum(changed) / len(changed),
            "seconds": round(time.perf_counter() - began, 3),
        }
        return best.weights, results, witness, record

    def _teach(self) -> TaughtRows:
        tokens, length = self.tokens.batch(slice(None)), self.tokens.input_ids.shape[1]
        batches = tokens.split(max(1, TEACHER_TOKENS // length))
        finals = self.model.forward_blocks(self.model.embed(batches))
        return TaughtRows(tokens.input_ids, tokens.mask, torch.cat([stream.hidden.cpu() for stream in finals]))

    def _solved(self, writer: CheckpointWriter) -> dict[str, QuantizedWeight]:
        """What the block pass has made of every quantized linear."""
        found = {}
        for part, tasks in self._parts():
            stored = writer.read_part(part)
            for name, task in tasks.items():
                local = {k.rpartition(".")[2]: t for k, t in stored.items() if k.rpartition(".")[0] == task.stem}
                found[name] = self.layout.unpack(local, task.grid)
        return found

    def _parts(self) -> list[tuple[str, dict[str, LinearTask]]]:
        parts = [(f"block-{index:05d}", tasks) for index, tasks in enumerate(self.plan.blocks)]
        head = self.plan.head
        return parts if head is None else [*parts, (HEAD, {head.name: head})]

    def _install(self, whole: nn.Module, solved: dict[str, QuantizedWeight]) -> dict[str, FakeQuantized]:
        learning = {}
        for name, weight in solved.items():
            linear, weight = _linear(whole, name), weight.to(self.model.device)
            if name in self.trained:
                sparse = self.trained[name].sparsity is not None
                learning[name] = fake_quantize_linear(linear, weight, self.model.dtype, self.settings.train, sparse)
            else:
                set_weight(linear, self.layout.values(weight))
        return learning

    def _fit(self, student: Student, rows: TaughtRows, learning, best: "_Best", writer, progress: Progress) -> None:
        settings = self.settings
        schedule = Schedule(
            steps=self.steps, batch_size=settings.batch_size, accumulation=settings.accumulation, seed=settings.seed
        )
        every, units = max(1, math.ceil(self.steps / EVALUATIONS)), len(self.model)

        def after(step: int) -> None:
            if step % every == 0 or step == self.steps:
                best.look(step)
            progress.step(
                f"qat: step {step} of {self.steps}, held-out KL {best.divergence:.5f}",
                step * units // self.steps - (step - 1) * units // self.steps,
            )

        best.look(0)
        positions = [_position(student.model, name) for name in learning]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in positions if p.requires_grad], "lr": settings.learning_rate},
            {"params": [f.ratio for f in learning.values()], "lr": settings.scale_learning_rate},
        ]
        groups = [group for group in groups if any(p.requires_grad for p in group["params"])]
        trainer = DistillationTrainer(
            cross_entropy=settings.cross_entropy,
            divergence=settings.divergence,
            model=student,
            args=schedule.arguments(writer.partial / "trainer", self.model.device),
            train_dataset=rows,
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
            callbacks=[AfterSteps(after)],
        )
        trainer.train()

    # what comes of it

    @torch.no_grad()
    def _results(
        self, whole, held_out: TaughtRows, journal: Journal, solved, found
    ) -> dict[str, list[dict[str, Any]]]:
        """The journal's rows with what is true now; the output error is that on the held-out rows."""
        lost, whole_ = dict.fromkeys(self.trained, 0.0), dict.fromkeys(self.trained, 0.0)
        dense = {name: self.model.tensors[f"{task.stem}.weight"] for name, task in self.trained.items()}
        linears = {name: _linear(whole, name) for name in self.trained}
        mask = None

        def seen(name: str, inputs: Tensor) -> None:
            x = inputs.reshape(-1, inputs.shape[-1]).float()
            x = x if mask is None else x[mask.reshape(-1).to(x.device)]
            weight = dense[name].read().to(x.device).float()
            lost[name] += (x @ (weight - linears[name].weight.float()).T).square().sum().item()
            whole_[name] += (x @ weight.T).square().sum().item()

        with watch_inputs(linears, seen):
            for batch in Batch(held_out.input_ids, held_out.mask).split(1):
                mask = batch.mask
                self.model.head_logits(whole, self.model.final_hidden(whole, batch), batch)

        def updated(row: dict[str, Any]) -> dict[str, Any]:
            name = row["name"]
            if name not in self.trained:
                return row
            weight, values = dense[name].read().float(), found[name].dequantize()
            return {
                **row,
                "method": f"{row['method']}+{NAME}",
                "sparsity": (values == 0).float().mean().item(),
                "relative_output_error": math.sqrt(lost[name] / whole_[name]) if whole_[name] else 0.0,
                "relative_weight_error": ((weight - values).norm() / weight.norm().clamp(min=1e-30)).item(),
                "changed_codes": (found[name].codes != solved[name].codes).float().mean().item(),
            }

        return {block: [updated(row) for row in rows] for block, rows in journal.blocks.items()}

    def _packed(self, found: dict[str, QuantizedWeight]) -> dict[str, Tensor]:
        return {
            f"{self.trained[name].stem}.{local}": tensor
            for name, weight in found.items()
            for local, tensor in self.layout.pack(weight).items()
        }

    def _apply(self, writer: CheckpointWriter) -> None:
        """Put the result into the parts; to do it twice is to do it once."""
        trained = writer.read_stage(NAME)
        for part, _ in self._parts():
            stored = writer.read_part(part)
            writer.write_part(part, {key: trained.get(key, tensor) for key, tensor in stored.items()})


class _Best:
    """The best iterate so far, as it would be stored, in the CPU's memory."""

    def __init__(self, student: Student, held_out: TaughtRows, batch_size: int, learning: dict[str, FakeQuantized]):
        self.student, self.held_out, self.batch_size, self.learning = student, held_out, batch_size, learning
        self.divergence, self.step = math.inf, 0
        self.weights: dict[str, QuantizedWeight] = {}
        self.history: list[tuple[int, float]] = []

    def look(self, step: int) -> None:
        """Take the present iterate if it is better."""
        divergence = self.student.divergence(self.held_out, self.batch_size)
        self.history.append((step, divergence))
        if divergence < self.divergence or not self.weights:
            self.divergence, self.step = divergence, step
            self.weights = {
                name: learning.quantized(_position(self.student.model, name)).to("cpu")
                for name, learning in self.learning.items()
            }


def _require_trainable(plan: Plan) -> None:
    """
    Raises:
        InvalidValueError: something is rounded that lets no gradient through, or has other codes than integers.
    """
    if plan.kv_cache is not None:
        raise InvalidValueError(
            "qat trains weights, and kv_cache rounds what it would learn from; leave one of the two out."
        )
    for name, task in plan.tasks.items():
        if task.grid.type != "int" or task.grid.activations != "none":
            raise InvalidValueError(
                f"qat trains integer codes whose inputs are not rounded, and {name} is to have {kind_of(task.grid)}; leave "
                "out qat, or set type to int and activations to none."
            )


def _position(model: nn.Module, name: str) -> nn.Parameter:
    """The trained positions of a linear."""
    return model.get_parameter(f"{name}.parametrizations.weight.original")


def _linear(model: nn.Module, name: str) -> Linear:
    module = model.get_submodule(name)
    assert isinstance(module, Linear)
    return module


def _logits(model: StreamedModel, head: nn.Module, hidden: Tensor) -> Tensor:
    return model.head_logits(head, hidden[None])[0]
