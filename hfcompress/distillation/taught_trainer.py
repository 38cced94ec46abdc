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
A `transformers.Trainer` for students whose teacher has already spoken.

How it works: the teacher is streamed once, before the student is loaded, and only what its last block returned is kept,
`hidden_size` numbers a token. The student runs up to the same place, and both go through the model's own head a few
hundred positions at a time ([`distillation_loss`]). The loss is a sum over positions, divided by the number of
positions of the whole optimizer step, so that it does not depend on how a step is divided.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hfcompress.calibration.tokens import Tokens
from hfcompress.distillation.features import Features
from hfcompress.distillation.losses import IGNORED, distillation_loss
from hfcompress.distillation.objective import Balance, Objective
from hfcompress.distillation.signals import Live, Signal
from hfcompress.models.batch import Batch
from hfcompress.models.streaming import StreamedModel
from hfcompress.progress import Progress


LOGIT_BYTES = 1 << 26  # of one chunk's logits in float32
WARMUP = 0.1  # of the steps
DEFAULT_CONTEXT = 2048
EVALUATIONS = 8  # times that the held-out rows are looked at
TEACHER_TOKENS = 4096  # that are streamed together
TOLD, HIDDEN = "teacher_", "teacher_features"  # of a row's entries: the teacher's, and those that are no predictions


class TaughtRows(Dataset):
    """
    Rows of tokens, and what the teacher's last block made of them.

    Args:
        input_ids (`Tensor`): int64 `(rows, seq_len)`.
        mask (`Tensor` or `None`): bool `(rows, seq_len)`, false on padding.
        hidden (`Tensor`): `(rows, seq_len, hidden_size)`.
        features (`Tensor`, *optional*): what some of its other blocks made of them, `(rows, blocks, seq_len, hidden_size)`.
    """

    def __init__(self, input_ids: Tensor, mask: Tensor | None, hidden: Tensor, features: Tensor | None = None):
        self.input_ids, self.mask, self.hidden, self.features = input_ids, mask, hidden, features

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.input_ids[index], "teacher_hidden": self.hidden[index]}
        others = {"mask": self.mask, HIDDEN: self.features}
        return row | {key: value[index] for key, value in others.items() if value is not None}

    def split(self, rows: Tensor) -> "tuple[TaughtRows, TaughtRows]":
        """Those that `rows` names (int64 `(n,)`), and the others."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[rows] = True
        parts = []
        for which in (chosen, ~chosen):
            mask, features = (None if each is None else each[which] for each in (self.mask, self.features))
            parts.append(TaughtRows(self.input_ids[which], mask, self.hidden[which], features))
        return parts[0], parts[1]


class Rows(Protocol):
    """Rows of tokens and what the teacher has said there."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, with the tokens that have a predecessor as `labels`; padding and first tokens are no targets."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    target = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    target[:, 0] = False
    if "mask" in batch:
        target &= batch["mask"]
        target[:, 1:] &= batch["mask"][:, :-1]
    return {**batch, "labels": batch["input_ids"].masked_fill(~target, IGNORED)}


class Student(nn.Module):
    """
    A whole model as the trainer sees it.

    Args:
        streamed (`StreamedModel`): knows how blocks and head are called.
        model (`nn.Module`): from its `loaded()`; what is to be trained requires a gradient, nothing else does.
        signal (`Signal`, *optional*): the teacher; live, with the student's own head, if left out.
        features (`Features`, *optional*): compares hidden states.
        vocabulary (`int`, *optional*): how many ids it shares with the teacher, counted from 0; all if left out.
    """

    accepts_loss_kwargs = True  # so the trainer counts the labels of a whole optimizer step

    def __init__(
        self,
        streamed: StreamedModel,
        model: nn.Module,
        signal: Signal | None = None,
        features: Features | None = None,
        vocabulary: int | None = None,
    ):
        super().__init__()
        self.streamed, self.model, self.features, self.vocabulary = streamed, model, features, vocabulary
        self.signal: Signal = signal or Live(self.logits)
        config = streamed.skeleton.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
        self.chunk = max(1, min(LOGIT_BYTES // (4 * config.vocab_size), context))
        self.head_parameters = self._of_the_head()

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the last block returns: `(rows, seq_len, hidden_size)`."""
        return self.streamed.final_hidden(self.model, Batch(input_ids, mask))

    def _of_the_head(self) -> list[nn.Parameter]:
        """What learns of that by which hidden states become logits."""
        blocks = {
            id(p)
            for name in self.streamed.block_names
            for p in self.streamed.skeleton.get_submodule(name).parameters()
        }
        outside = [p for p in self.model.parameters() if p.requires_grad and id(p) not in blocks]
        if not outside:
            return []
        width = self.streamed.skeleton.config.get_text_config().hidden_size
        with torch.enable_grad():
            logits = self.logits(torch.ones(1, width, dtype=self.streamed.dtype, device=self.streamed.device))
            reached = torch.autograd.grad(logits.sum(), outside, allow_unused=True)
        return [p for p, gradient in zip(outside, reached, strict=True) if gradient is not None]

    def logits(self, hidden: Tensor) -> Tensor:
        """From `(positions, hidden_size)` to `(positions, vocabulary)`."""
        return self.streamed.head_logits(self.model, hidden[None])[0]

    def shared_logits(self, hidden: Tensor) -> Tensor:
        """[`Student.logits`] of the ids that it shares with the teacher."""
        return self.logits(hidden)[:, : self.vocabulary]

    def losses(
        self, batch: dict[str, Tensor], objective: Objective, done: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """
        What a batch from [`collate`] costs, as sums over its labels: by the predictions, the [`distillation_loss`]; and by
        the hidden states, without their weight, where they count.
        """
        wanted = self.features.blocks if self.features is not None and objective.features else {}
        stream = Batch(batch["input_ids"], batch.get("mask"))
        *ours, hidden = self.streamed.hidden_states(self.model, stream, [*wanted, len(self.streamed) - 1])
        labels = batch["labels"][:, 1:].to(hidden.device)
        predicted = labels != IGNORED
        told = {name.removeprefix(TOLD): t for name, t in batch.items() if name.startswith(TOLD) and name != HIDDEN}
        said = distillation_loss(
            hidden[:, :-1][predicted],
            {name: tensor[:, :-1].to(hidden.device)[predicted] for name, tensor in told.items()},
            labels[predicted],
            self.shared_logits,
            self.signal,
            objective.cross_entropy,
            self.chunk,
            self.head_parameters,
            objective.divergence_at(done),
            objective.divergence_weight,
        )
        if not wanted or self.features is None:
            return said, None
        theirs = batch[HIDDEN].to(hidden.device).unbind(1)
        seen = [each[:, :-1] for each in ours], [each[:, :-1] for each in theirs]
        return said, self.features(*seen, predicted)

    @torch.no_grad()
    def divergence(self, rows: Rows, batch_size: int) -> float:
        """The mean KL to the teacher over every predicted position of the rows, in nats."""
        total, count = 0.0, 0
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
            total += self.losses(batch, Objective())[0].item()
            count += int((batch["labels"] != IGNORED).sum())
        return total / max(count, 1)


class TaughtTrainer(Trainer):
    """
    Args:
        objective (`Objective`, *optional*): what it is trained for; the forward KL if left out.
        kwargs: of `transformers.Trainer`.
    """

    def __init__(self, *, objective: Objective | None = None, **kwargs):
        super().__init__(data_collator=collate, **kwargs)
        self.aim, self.balance = objective or Objective(), Balance()
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch: its sum over the labels of the whole optimizer step."""
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"] != IGNORED).sum()
        said, hidden = model.losses(inputs, self.aim, self.state.global_step / max(1, self.state.max_steps))
        loss = said
        if hidden is not None:
            self.balance.add(self.state.global_step, said.item(), hidden.item())
            weight = self.aim.features * (self.balance.ratio if self.aim.balanced else 1.0)
            loss = said + weight * hidden
        loss = loss / num_items_in_batch
        return (loss, {}) if return_outputs else loss


class BestIterate:
    """
    The best iterate so far by the held-out rows, as it would be stored.

    Args:
        student (`Student`): what is trained.
        held_out (`TaughtRows`): rows that nothing is trained on.
        batch_size (`int`): of them, that go through the student together.
        stored (`Callable`): what would be stored now, in the CPU's memory.
    """

    def __init__(self, student: Student, held_out: Rows, batch_size: int, stored: Callable[[], dict[str, Any]]):
        self.student, self.held_out, self.batch_size, self.stored = student, held_out, batch_size, stored
        self.divergence, self.step = math.inf, 0
        self.weights: dict[str, Any] = {}
        self.history: list[tuple[int, float]] = []

    def look(self, step: int) -> None:
        """Take the present iterate if it is better."""
        divergence = self.student.divergence(self.held_out, self.batch_size)
        self.history.append((step, divergence))
        if divergence < self.divergence or not self.weights:
            self.divergence, self.step, self.weights = divergence, step, self.stored()

    @property
    def record(self) -> dict[str, Any]:
        """What there is to report of it."""
        return {
            "held_out_kl_start": self.history[0][1],
            "held_out_kl": self.divergence,
            "best_step": self.step,
            "history": self.history,
        }


class Settings(Protocol):
    """What is asked of the step that trains."""

    batch_size: int
    accumulation: int
    objective: Objective
    seed: int


def train(
    name: str,
    student: Student,
    rows: Rows,
    groups: list[dict[str, Any]],
    settings: Settings,
    steps: int,
    best: BestIterate,
    folder: Path,
    units: int,
    progress: Progress,
) -> None:
    """
    Args:
        name (`str`): of the step, for the progress.
        student (`Student`): what learns.
        rows (`TaughtRows`): from what.
        groups (`list[dict]`): parameters and their learning rates, for AdamW.
        settings (`Settings`): how.
        steps (`int`): optimizer steps.
        best (`BestIterate`): looks at the held-out rows a few times, at the start too.
        folder (`Path`): a place that the trainer may make.
        units (`int`): what all of it is worth in the progress.
        progress (`Progress`): is told of every step.
    """
    schedule = Schedule(
        steps=steps, batch_size=settings.batch_size, accumulation=settings.accumulation, seed=settings.seed
    )
    every = max(1, math.ceil(steps / EVALUATIONS))

    def after(step: int) -> None:
        if step % every == 0 or step == steps:
            best.look(step)
        progress.step(
            f"{name}: step {step} of {steps}, held-out KL {best.divergence:.5f}",
            step * units // steps - (step - 1) * units // steps,
        )

    best.look(0)
    trainer = TaughtTrainer(
        objective=settings.objective,
        model=student,
        args=schedule.arguments(folder, student.streamed.device),
        train_dataset=rows,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        callbacks=[AfterSteps(after)],
    )
    trainer.train()


@torch.no_grad()
def teach(teacher: StreamedModel, tokens: Tokens, blocks: Sequence[int] = ()) -> TaughtRows:
    """What the teacher's last block makes of the rows, and if asked for what other `blocks` make of them."""
    batch, length = tokens.batch(slice(None)), tokens.input_ids.shape[1]
    streams, kept = teacher.embed(batch.split(max(1, TEACHER_TOKENS // length))), {}
    for index in range(len(teacher)):
        with teacher.block(index) as block:
            streams = [stream.advanced(teacher.call(block, index, stream)) for stream in streams]
        if index in blocks:
            kept[index] = torch.cat([stream.hidden.cpu() for stream in streams])
    features = torch.stack([kept[index] for index in blocks], 1) if blocks else None
    return TaughtRows(batch.input_ids, batch.mask, torch.cat([stream.hidden.cpu() for stream in streams]), features)


@contextlib.contextmanager
def head_of(model: StreamedModel) -> Generator[Callable[[Tensor], Tensor]]:
    """From what the last block of a model returns, `(positions, hidden_size)`, to its logits; of the weights beside it."""
    with model.outside(head=True) as outside:
        yield lambda hidden: model.head_logits(outside, hidden[None])[0]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """
    Args:
        steps (`int`): optimizer steps.
        batch_size (`int`): rows per step.
        accumulation (`int`): parts that a step's rows go through the model in.
        seed (`int`): of the order of the rows.
    """

    steps: int
    batch_size: int
    accumulation: int
    seed: int

    def arguments(self, folder: Path, device: torch.device) -> TrainingArguments:
        """For a trainer that is silent, writes nothing and stays on one device; `folder` is a place it may make."""
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size // self.accumulation,
            gradient_accumulation_steps=self.accumulation,
            lr_scheduler_type="cosine",
            warmup_steps=int(WARMUP * self.steps),
            seed=self.seed,
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # it would copy the model to every GPU that it sees
        return arguments


class AfterSteps(TrainerCallback):
    """Calls `function(step)` after every optimizer step."""

    def __init__(self, function: Callable[[int], None]):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)
