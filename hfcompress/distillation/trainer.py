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
Distillation for scripts of one's own: `transformers.Trainer` with a teacher, for any causal language model.

How it works: student and teacher run as they always do, through whatever they are wrapped in (DDP, FSDP), but their output
heads are given no positions; what would have gone in is kept, and goes through both heads a few hundred predicted
positions at a time ([`hfcompress.distillation.losses`]). So no `(rows, seq_len, vocabulary)` exists, and gradients are
synchronized as they always are. The loss is divided by the number of predictions of the whole optimizer step on all
processes, so it does not depend on how a step is divided.
"""

import contextlib
import math
import random
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hfcompress.distillation.divergences import MIXED, Kind
from hfcompress.distillation.features import Features, default_map
from hfcompress.distillation.losses import IGNORED, distillation_loss
from hfcompress.distillation.objective import Balance, FeatureLoss, Objective
from hfcompress.distillation.on_policy import continued, prompts
from hfcompress.distillation.signals import CACHED, Live, Signal
from hfcompress.distillation.taught_trainer import LOGIT_BYTES, TOLD
from hfcompress.errors import InvalidValueError, UnsupportedModelError


INPUTS = ("input_ids", "attention_mask", "position_ids")
PROBE = 5  # tokens that a head is tried on
ALIKE = 1e-3  # of the largest logit
LARGEST_EXPONENT = 700.0


@dataclass
class DistillationConfig(TrainingArguments):
    """
    `TrainingArguments`, and what is learned from a teacher. The other arguments are those of the base class;
    `metric_for_best_model` is the held-out KL unless something else is asked for.

    Args:
        loss (`str`, *optional*, defaults to `"forward_kl"`): see [`hfcompress.distillation.divergences.Divergence`].
        mix (`float`, *optional*): of the mixture in `"jsd"` (0.5 if left out) and the skew ones (0.1).
        temperature (`float`, *optional*, defaults to 1.0): of both distributions.
        final_temperature (`float`, *optional*): what it goes to in a straight line.
        loss_weight (`float`, *optional*, defaults to 1.0): of the divergence.
        cross_entropy (`float`, *optional*, defaults to 0.0): weight of the labels.
        features (`float`, *optional*, defaults to 0.0): weight of the hidden states.
        feature_loss (`str`, *optional*, defaults to `"mse"`): see [`hfcompress.distillation.features.Features`].
        feature_blocks (`dict[int, int]`, *optional*): which of the teacher's blocks some of the student's are compared with.
        balanced (`bool`, *optional*, defaults to `False`): measure the hidden states' part in units of the rest of the loss.
        on_policy (`float`, *optional*, defaults to 0.0): share of the optimizer steps whose rows the student has said itself,
            from what stands before a row's first label, or from its first half where every token is one (generalized
            knowledge distillation, arXiv 2306.13649).
        max_new_tokens (`int`, *optional*, defaults to 128): that it says of a row.
        sampling_temperature (`float`, *optional*, defaults to 1.0): at which.
    """

    loss: Kind = field(default="forward_kl", metadata={"help": "How far the distributions are apart."})
    mix: float | None = field(default=None, metadata={"help": "Of the mixture in jsd and the skew divergences."})
    temperature: float = field(default=1.0, metadata={"help": "Of both distributions."})
    final_temperature: float | None = field(default=None, metadata={"help": "What the temperature goes to."})
    loss_weight: float = field(default=1.0, metadata={"help": "Of the divergence."})
    cross_entropy: float = field(default=0.0, metadata={"help": "Weight of the labels."})
    features: float = field(default=0.0, metadata={"help": "Weight of the hidden states."})
    feature_loss: FeatureLoss = field(default="mse", metadata={"help": "How hidden states are compared."})
    feature_blocks: dict | None = field(default=None, metadata={"help": "Student's blocks -> teacher's, from 0."})
    balanced: bool = field(default=False, metadata={"help": "Hidden states in units of the rest of the loss."})
    on_policy: float = field(default=0.0, metadata={"help": "Share of the steps on what the student says itself."})
    max_new_tokens: int = field(default=128, metadata={"help": "That it says of a row."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "At which it says them."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that no forward takes."})

    def __post_init__(self):
        if self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "kl", False
        super().__post_init__()
        if self.mix is not None and (self.loss not in MIXED or not 0 < self.mix < 1):
            raise InvalidValueError(f"mix is {self.mix}; it is for {', '.join(MIXED)} and lies between 0 and 1.")
        for name in ("temperature", "final_temperature", "max_new_tokens", "sampling_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidValueError(f"{name} is {value}; it must be above 0.")
        if not 0 <= self.on_policy <= 1:
            raise InvalidValueError(f"on_policy is {self.on_policy}; it is a share of the steps, from 0 to 1.")

    @property
    def objective(self) -> Objective:
        """What is trained for."""
        return Objective.of(self)


@dataclass
class DistillationCollator:
    """
    Rows of different lengths, padded on the right: `input_ids`, with `attention_mask`, `labels` and what a cache knows of
    a teacher (`teacher_...`) if the rows have them. Without labels every token with a predecessor is one.

    Args:
        pad_token_id (`int`, *optional*, defaults to 0): what stands in the padding.
    """

    pad_token_id: int = 0

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [{key: torch.as_tensor(value) for key, value in row.items()} for row in rows]
        length = max(len(row["input_ids"]) for row in rows)
        masks = [row.get("attention_mask", torch.ones_like(row["input_ids"])) for row in rows]
        labels = [row.get("labels", row["input_ids"]).clone() for row in rows]
        for label, mask in zip(labels, masks, strict=True):
            label[mask == 0] = IGNORED
            label[1:][mask[:-1] == 0] = IGNORED
            label[0] = IGNORED
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], length, self.pad_token_id),
            "attention_mask": _padded(masks, length, 0),
            "labels": _padded(labels, length, IGNORED),
        }
        told = [key for key in rows[0] if key.startswith(TOLD)]
        return batch | {key: _padded([row[key] for row in rows], length, 0) for key in told}


def _padded(tensors: list[Tensor], length: int, value: int) -> Tensor:
    found = tensors[0].new_full((len(tensors), length, *tensors[0].shape[1:]), value)
    for row, tensor in zip(found, tensors, strict=True):
        row[: len(tensor)] = tensor
    return found


class Head:
    """
    From what a model's output head is given to its logits, with what some architectures do to them afterwards.

    Args:
        model (`PreTrainedModel`): the model.

    Raises:
        UnsupportedModelError: it makes its logits in another way.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        config = cast(Any, model).config.get_text_config()
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.width, self.vocabulary = config.hidden_size, config.vocab_size
        self._try()

    @property
    def module(self) -> nn.Module:
        """The output head."""
        return cast(PreTrainedModel, self.model).get_output_embeddings()

    def __call__(self, hidden: Tensor) -> Tensor:
        """From `(positions, hidden_size)` to `(positions, vocabulary)`."""
        logits = self.module(hidden) * self.factor
        return logits if not self.cap else (logits / self.cap).tanh() * self.cap

    @torch.no_grad()
    def _try(self) -> None:
        module = self.module
        if module is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no output head; give a causal language model."
            )
        ids = torch.arange(PROBE, device=cast(PreTrainedModel, self.model).device)[None] % self.vocabulary
        training = self.model.training
        self.model.eval()
        try:
            wanted = self.model(input_ids=ids, use_cache=False).logits[0]
            hidden, _, _ = self.inputs(self.model, {"input_ids": ids}, [])
            found = self(hidden[0])
        finally:
            self.model.train(training)
        if (found - wanted).abs().max() > ALIKE * wanted.abs().max():
            raise UnsupportedModelError(
                f"{type(self.model).__name__} makes its logits in a way that is not known here; use the recipe distill."
            )

    def inputs(
        self, wrapped: nn.Module, batch: Mapping[str, Any], after: list[int]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """
        What the head is given for a batch, `(rows, seq_len, hidden_size)`, what some blocks return, and the logits of no
        position at all.

        Args:
            wrapped (`nn.Module`): the model, or what it is wrapped in.
            batch (`Mapping`): `input_ids`, `attention_mask`, `position_ids`; what else there is, is left out.
            after (`list[int]`): which blocks.
        """
        with self._emptied() as seen:
            given = {key: batch[key] for key in INPUTS if batch.get(key) is not None}
            output = wrapped(**given, use_cache=False, output_hidden_states=bool(after))
        states = output.hidden_states if after else ()
        return seen[0], [states[index + 1] for index in after], output.logits

    @contextlib.contextmanager
    def _emptied(self) -> Generator[list[Tensor]]:
        """Within, the head is given no positions, and what it would have been given is kept."""
        seen: list[Tensor] = []

        def keep(module, args):
            seen.append(args[0])
            return (args[0][..., :0, :], *args[1:])

        handle = self.module.register_forward_pre_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()


class _WithoutAdapter(Head):
    """A PEFT model without its adapter: the teacher of the model with it, whose memory it shares."""

    def _try(self) -> None:
        """Nothing to do: the student's head is the same, and has been tried."""

    def __call__(self, hidden: Tensor) -> Tensor:
        with self._alone():
            return super().__call__(hidden)

    def inputs(
        self, wrapped: nn.Module, batch: Mapping[str, Any], after: list[int]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        with self._alone():
            return super().inputs(wrapped, batch, after)

    @contextlib.contextmanager
    def _alone(self) -> Generator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with cast(Any, self.model).disable_adapter():
                yield
        finally:
            self.model.train(training)


@dataclass
class _Heard:
    """
    A batch as student and teacher have it: at its predictions, `(positions, ...)`, what the student's head is given, what
    is known of the teacher, and the tokens that follow; for hidden states `(rows, seq_len - 1, ...)`, where they count; and
    what the student's forward returned.
    """

    hidden: Tensor
    told: dict[str, Tensor]
    targets: Tensor
    predicted: Tensor
    ours: list[Tensor]
    theirs: list[Tensor]
    returned: Tensor

    def by_row(self) -> "list[_Heard]":
        """Each row by itself, without hidden states to compare."""
        counts = self.predicted.sum(1).tolist()
        told = {name: tensor.split(counts) for name, tensor in self.told.items()}
        parts = zip(self.hidden.split(counts), self.targets.split(counts), strict=True)
        return [
            replace(self, hidden=hidden, told={name: each[row] for name, each in told.items()}, targets=targets)
            for row, (hidden, targets) in enumerate(parts)
        ]


class DistillationTrainer(Trainer):
    """
    Args:
        model (`PreTrainedModel`): the student.
        teacher (`PreTrainedModel`, *optional*): the teacher; one that is quantized or spread by a device map stays where it
            is. Left out where the rows carry what a cache has kept of it, and where the student is a PEFT model that is to
            stay near its own base, which then is the teacher and in memory once.
        signal (`str`, *optional*): what they carry then: `"top_k"` or `"sampled"`, as in [`hfcompress.Distill`].
        args (`DistillationConfig`, *optional*): how it is trained.
        kwargs: of `transformers.Trainer`; `data_collator` is a [`DistillationCollator`] if left out.

    Raises:
        InvalidValueError: there is no teacher, or two.
        UnsupportedModelError: how a model makes its logits is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        signal: str | None = None,
        args: DistillationConfig | None = None,
        **kwargs: Any,
    ):
        if teacher is None and signal is None and hasattr(model, "disable_adapter"):
            teacher = model
        if (teacher is None) == (signal is None):
            raise InvalidValueError("Give a teacher, or the signal that the rows carry of one: top_k or sampled.")
        if signal is not None and signal not in CACHED:
            raise InvalidValueError(f"signal is {signal!r}; it must be one of {', '.join(CACHED)}.")
        args = args if args is not None else DistillationConfig(output_dir="distilled")
        if signal is not None and args.features:
            raise InvalidValueError(
                "What a cache has kept holds no hidden states; give the teacher, or leave features out."
            )
        if signal is not None and args.on_policy:
            raise InvalidValueError(
                "What a cache has kept knows nothing of what the student says; give the teacher, or leave on_policy out."
            )
        tokenizer = kwargs.get("processing_class")
        kwargs.setdefault("data_collator", DistillationCollator(getattr(tokenizer, "pad_token_id", None) or 0))
        super().__init__(model=model, args=args, **kwargs)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise InvalidValueError(
                "A student in FSDP's first form has no output head of its own; take the second, by fsdp_version: 2 in accelerate's "
                "configuration, or fsdp_config={'version': 2}."
            )
        self.model_accepts_loss_kwargs = True  # so that the labels of a whole optimizer step are counted
        self.aim, self.balance = args.objective, Balance()
        self.student_head = Head(model)
        self.teacher_head: Head | None = None
        self.signal: Signal
        self.compared: dict[int, int] = {}
        if teacher is None:
            self.signal, self.vocabulary = CACHED[cast(str, signal)](), self.student_head.vocabulary
        else:
            self._take(teacher, args)
        self._evaluated = torch.zeros(3, dtype=torch.float64)

    def _take(self, teacher: nn.Module, args: DistillationConfig) -> None:
        if teacher is self.model:
            self.teacher_head = _WithoutAdapter(teacher)
        else:
            if not getattr(teacher, "hf_device_map", None) and not getattr(teacher, "is_quantized", False):
                teacher = teacher.to(args.device)
            teacher.eval().requires_grad_(False)
            self.teacher_head = Head(teacher)
        self.vocabulary = min(self.student_head.vocabulary, self.teacher_head.vocabulary)
        self.signal = Live(self.teacher_head, self.vocabulary)
        if not args.features:
            return
        blocks = [cast(Any, m).config.get_text_config().num_hidden_layers for m in (self.model, teacher)]
        given = {int(ours): int(theirs) for ours, theirs in (args.feature_blocks or {}).items()}
        if any(not (0 <= ours < blocks[0] and 0 <= theirs < blocks[1]) for ours, theirs in given.items()):
            raise InvalidValueError(
                f"feature_blocks names a block that there is not; the student has {blocks[0]} and the teacher {blocks[1]}, "
                "counted from 0."
            )
        self.compared = given or default_map(*blocks)
        if args.feature_loss == "adversarial":
            raise InvalidValueError(
                "The judge of feature_loss='adversarial' learns in the recipe distill alone; take that."
            )
        widths = self.student_head.width, self.teacher_head.width
        if widths[0] != widths[1] and args.feature_loss != "relation":
            raise InvalidValueError(
                f"The hidden states are {widths[0]} and {widths[1]} wide; take feature_loss='relation', or the recipe "
                "distill, which learns a map between them."
            )
        self.feature_loss = Features(args.feature_loss, self.compared, *widths, args.seed)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, said by the student itself where it is its turn, and how many labels."""
        args = cast(DistillationConfig, self.args)
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        turn = random.Random(f"{self.args.seed} {self.state.global_step}").random()  # the same in every process
        if not batches or turn >= args.on_policy:
            return batches, count
        student = self.accelerator.unwrap_model(self.model_wrapped)
        settings = args.max_new_tokens, args.sampling_temperature, self.is_fsdp_enabled or self.is_deepspeed_enabled
        said = [continued(student, prompts(self._prepare_inputs(batch)), *settings) for batch in batches]
        return said, self._get_num_items_in_batch(said, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch: its sum over the labels of the whole optimizer step."""
        heard = self._heard(model, inputs, self.compared)
        loss = said = self._said(heard, self.aim)
        if self.compared:
            hidden = self.feature_loss(heard.ours, heard.theirs, heard.predicted)
            parts = (self.accelerator.reduce(part.detach()).item() for part in (said, hidden))
            self.balance.add(self.state.global_step, *parts)
            weight = self.aim.features * (self.balance.ratio if self.aim.balanced else 1.0)
            loss = said + weight * hidden
        if hasattr(model, "unshard"):
            # FSDP2 gathers the parts again on the way back when it meets what the forward returned; made last, met first
            loss = loss + 0.0 * heard.returned.sum()
        if num_items_in_batch is None:
            loss = loss / max(1, len(heard.targets))
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # over which gradients are averaged
        return (loss, {}) if return_outputs else loss

    def _heard(self, model: nn.Module, inputs: Mapping[str, Any], blocks: Mapping[int, int]) -> "_Heard":
        """Student and teacher on a batch, up to their heads."""
        hidden, ours, returned = self.student_head.inputs(model, inputs, list(blocks))
        if hasattr(model, "unshard"):  # FSDP2 has divided the head again after the forward
            cast(Any, model).unshard()
        targets = inputs["labels"][:, 1:]
        predicted = targets != IGNORED
        theirs: list[Tensor] = []
        if self.teacher_head is None:
            told = {name.removeprefix(TOLD): t for name, t in inputs.items() if name.startswith(TOLD)}
        else:
            with torch.no_grad():
                said, theirs, _ = self.teacher_head.inputs(self.teacher_head.model, inputs, list(blocks.values()))
            told = {"hidden": said}
        return _Heard(
            hidden[:, :-1][predicted],
            {name: tensor[:, :-1].to(hidden.device)[predicted] for name, tensor in told.items()},
            targets[predicted],
            predicted,
            [each[:, :-1] for each in ours],
            [each[:, :-1].to(hidden.device) for each in theirs],
            returned,
        )

    def _said(self, heard: "_Heard", aim: Objective) -> Tensor:
        """What the predictions cost: a sum."""
        with self.accelerator.autocast():  # as within the model
            return distillation_loss(
                heard.hidden,
                heard.told,
                heard.targets,
                lambda part: self.student_head(part)[:, : self.vocabulary],
                self.signal,
                aim.cross_entropy,
                max(1, LOGIT_BYTES // (4 * self.student_head.vocabulary)),
                [parameter for parameter in self.student_head.module.parameters() if parameter.requires_grad],
                aim.divergence_at(self.state.global_step / max(1, self.state.max_steps)),
                aim.divergence_weight,
            )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        The forward KL and the cross-entropy of a batch, added to those of the evaluation; rows that fill up the last batch
        are left out.
        """
        told = []
        with torch.no_grad():
            for row in self._heard(model, self._prepare_inputs(inputs), {}).by_row():
                kl = self._said(row, Objective())
                nll = self._said(row, Objective(divergence_weight=0.0, cross_entropy=1.0))
                told.append(
                    torch.stack([kl.float(), nll.float(), torch.tensor(float(len(row.targets))).to(kl.device)])
                )
        every = cast(Tensor, self.accelerator.gather_for_metrics(torch.stack(told)))
        self._evaluated += every.double().sum(0).cpu()
        kl, _, count = torch.stack(told).sum(0)
        return kl / count.clamp(min=1), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """The evaluation, with `kl` (to the teacher, in nats) and `perplexity` over all predictions of all processes."""
        self._evaluated = torch.zeros(3, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        kl, nll, count = self._evaluated.tolist()
        measured = {"kl": kl / max(1, count), "perplexity": math.exp(min(nll / max(1, count), LARGEST_EXPONENT))}
        named = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})
