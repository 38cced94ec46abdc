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
"""Distill: what pruning or sparsity has left, trained to talk like the original."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hfcompress.distillation.objective import FeatureLoss, Objective
from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe
from hfcompress.recipes.training import Training


MAKERS = ("prune", "sparsify", "distill")  # of students
NO_STUDENT = (
    "distill trains what is left of a model, or a student that it is given: put prune or sparsify right before it, such as "
    "prune >> distill, or set distill.student."
)


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """
    Train all weights of a student, so that it gives the distributions of the original, as a run of its own. The student is
    what the steps before have left, whose zeros remain where a pattern asked for them: `Prune(depth=0.3) >> Distill() >>
    GPTQ()`. Or it is made or taken from elsewhere: `Distill(student={"every": 2}) >> GPTQ()`. Needs the whole student in
    memory, with gradients and optimizer; the original is streamed. The rows that are held out decide which iterate is kept,
    or the start.

    Args:
        student (`str` or `Mapping`, *optional*): another checkpoint with the same tokenizer, a folder or a Hub id, whose
            vocabulary may be padded otherwise; `{"every": k}`, every k-th block of the original, beginning with its first; or
            fields of the original's configuration with smaller values, such as `{"num_hidden_layers": 4,
            "intermediate_size": 2048}`.
        init (`str`, *optional*, defaults to `"sliced"`): how a student of other sizes begins: `"sliced"`, as the leading rows
            and columns of evenly spread blocks of the original, or `"random"`, as transformers begins a new model.
        loss_weight (`float`, *optional*, defaults to 1.0): of `loss`; 0 with a `cross_entropy` trains on the text alone.
        signal (`str`, *optional*, defaults to `"live"`): `"live"` (the original's whole distributions, its head in memory), or
            from disk, written there once and read by any number of students: `"top_k"` (the most probable tokens of each
            position, and the mass of the rest) or `"sampled"` (tokens drawn from it, for an unbiased forward KL).
        signal_size (`int`, *optional*, defaults to 64): tokens that are kept for each position.
        teacher_cache (`str`, *optional*): the folder for that; `hfcompress/teachers` in the Hub's home if left out.
        teacher (`Mapping`, *optional*): `{"url": "http://localhost:8000/v1", "model": "name"}`, a teacher behind an
            OpenAI-style completions endpoint that echoes log-probabilities, in place of the original, for `signal="top_k"`;
            its key, if it wants one, is read from `OPENAI_API_KEY`.
        features (`float`, *optional*, defaults to 0.0): weight of the hidden states' distance from the original's.
        feature_loss (`str`, *optional*, defaults to `"mse"`): `"mse"`, `"cosine"`, `"relation"`, `"contrastive"` or
            `"adversarial"`; see [`hfcompress.distillation.features.Features`].
        feature_blocks (`Mapping[int, int]`, *optional*): which of the original's blocks (from 0) some of the student's are
            compared with; four of the student's, evenly spread, if left out.
        balanced (`bool`, *optional*, defaults to `False`): measure the hidden states' part in units of the rest of the loss.
        final_temperature (`float`, *optional*): what `temperature` goes to, in a straight line.
        epochs (`int`, *optional*, defaults to 4): times that the calibration rows are gone through.
        learning_rate (`float`, *optional*, defaults to 3e-4): of AdamW, without weight decay; a tenth of the steps warms
            up, and it falls by a cosine.
        held_out (`int`, *optional*, defaults to 8): calibration rows that are not trained on.

    The other settings are those of [`Training`].
    """

    name: ClassVar[str] = "distill"
    needs_inputs: ClassVar[bool] = True

    student: str | Mapping[str, Any] | None = None
    init: Literal["sliced", "random"] = "sliced"
    loss_weight: float = 1.0
    signal: Literal["live", "top_k", "sampled"] = "live"
    signal_size: int = 64
    teacher_cache: str | None = None
    teacher: Mapping[str, str] | None = None
    features: float = 0.0
    feature_loss: FeatureLoss = "mse"
    feature_blocks: Mapping[int, int] | None = None
    balanced: bool = False
    final_temperature: float | None = None
    epochs: int = 4
    learning_rate: float = 3e-4
    held_out: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.overrides or self.ignore or self.targets != Recipe.targets:
            raise InvalidValueError("distill takes no targets, ignore or overrides: the whole model is trained.")
        for key in ("loss_weight", "features"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise InvalidValueError(f"distill.{key} is {getattr(self, key)}; it must be 0 or more.")
        if not (self.loss_weight or self.cross_entropy or self.features):
            raise InvalidValueError(
                "distill has nothing to learn from: loss_weight, cross_entropy and features are all 0."
            )
        if self.final_temperature is not None and not 0 < self.final_temperature < float("inf"):
            raise InvalidValueError(f"distill.final_temperature is {self.final_temperature}; it must be above 0.")
        if self.signal_size < 1:
            raise InvalidValueError(f"distill.signal_size is {self.signal_size}; it must be at least 1.")
        if self.signal == "live" and self.teacher_cache is not None:
            raise InvalidValueError("distill.teacher_cache is for signal=top_k or sampled; set one, or leave it out.")
        if self.teacher is not None:
            self._check_teacher(self.teacher)
        if self.signal != "live" and (self.temperature, self.final_temperature) != (1.0, None):
            raise InvalidValueError(
                f"distill.signal={self.signal} keeps probabilities at temperature 1; leave temperature out, or take signal=live."
            )
        if self.signal != "live" and self.features:
            raise InvalidValueError(
                f"distill.signal={self.signal} keeps no hidden states; leave features out, or take signal=live."
            )
        if self.signal == "sampled" and self.loss != "forward_kl":
            raise InvalidValueError(
                f"distill.signal=sampled is for the forward KL; leave out loss={self.loss}, or take signal=top_k."
            )
        if self.student is not None and not self.student:
            raise InvalidValueError(
                "distill.student is empty; name a checkpoint, or fields such as {num_hidden_layers: 4}."
            )
        if self.init != "sliced" and (not isinstance(self.student, Mapping) or "every" in self.student):
            raise InvalidValueError("distill.init is for a distill.student that is told by its sizes; leave it out.")
        for key, value in (self.feature_blocks or {}).items():
            if not all(isinstance(number, int) and number >= 0 for number in (key, value)):
                raise InvalidValueError(
                    f"distill.feature_blocks: {key!r}: {value!r} is no pair of blocks, counted from 0."
                )

    def _check_teacher(self, teacher: Mapping[str, str]) -> None:
        if set(teacher) != {"url", "model"} or not all(isinstance(value, str) for value in teacher.values()):
            raise InvalidValueError(
                "distill.teacher has other keys than url and model; write {url: http://localhost:8000/v1, model: name}."
            )
        if not teacher["url"].startswith(("http://", "https://")):
            raise InvalidValueError(
                f"distill.teacher.url is {teacher['url']}; it must begin with http:// or https://."
            )
        if "@" in teacher["url"].partition("://")[2].partition("/")[0]:
            raise InvalidValueError(
                "distill.teacher.url holds a password, and recipes are kept; set OPENAI_API_KEY instead."
            )
        if self.signal != "top_k":
            raise InvalidValueError("distill.teacher tells its most probable tokens alone; set signal=top_k.")

    def check_place(self, before, after):
        """
        Raises:
            InvalidValueError: the student is rounded already, or nothing that makes one stands before it.
        """
        rounding = next((step for step in before if hasattr(step, "quantize")), None)
        if rounding is not None:
            raise InvalidValueError(
                f"distill trains weights that are not rounded yet: put it before {rounding.name}, or take qat."
            )
        if self.student is not None and before:
            raise InvalidValueError(
                f"distill has a student of its own, so {before[-1].name} before it would be lost; leave one out."
            )
        if before and before[-1].name not in (*MAKERS, "tune"):  # alone it is a stage
            raise InvalidValueError(NO_STUDENT)

    @property
    def objective(self) -> Objective:
        """What it is trained for."""
        return Objective.of(self)
