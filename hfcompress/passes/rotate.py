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
"""Whether a recipe's steps are run on the model as it is or on its rotated equivalent, and what is told of that."""

from collections.abc import Sequence
from typing import Any, Protocol

from hfcompress.calibration.tokens import Tokens
from hfcompress.models.rotated_tensor import unrounded
from hfcompress.models.rotation import rotated
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.plan import Plan, Step, make_plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.trial import ROWS, trial
from hfcompress.progress import Progress


BETTER = "better"
PARTS = {"hidden": "the residual stream", "heads": "the values of the attention heads"}


class RotationSettings(Protocol):
    """What is asked of a recipe's step that rotates; see [`hfcompress.recipes.Rotate`]."""

    @property
    def hidden(self) -> bool: ...
    @property
    def heads(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def when(self) -> str: ...


class RotationChoice:
    """
    The model and its rotated equivalent, until one of them is chosen.

    Args:
        model (`StreamedModel`): the model as it is.
        settings (`RotationSettings`): what is asked for.
        progress (`Progress`): is told what cannot be rotated, and what was chosen.

    Attributes:
        model (`StreamedModel`): the rotated model, or the one given if nothing could be rotated; after
            [`RotationChoice.settle`] the chosen one.
        config_changes (`dict`): what config.json must say of the chosen one.
        manifest (`dict`): what `hfcompress.json` says of it.
    """

    def __init__(self, model: StreamedModel, settings: RotationSettings, progress: Progress):
        self.original, self.settings, self.progress = model, settings, progress
        progress.step("rotating", amount=0)
        self.found = rotated(model.checkpoint, settings.hidden, settings.heads, settings.seed, model.device)
        for part, reason in self.found.reasons.items():
            progress.note(f"{PARTS[part]} cannot be rotated and stays as it is: {reason}")
        if 0 < self.found.heads < len(model):
            progress.note(f"{PARTS['heads']} can be rotated in {self.found.heads} of {len(model)} blocks")
        self.model = model
        if self.found.checkpoint is not None:
            self.model = StreamedModel(self.found.checkpoint, model.device, model.dtype)
        self.config_changes: dict[str, Any] = {}
        self.manifest: dict[str, Any] = {}

    @property
    def applied(self) -> dict[str, Any]:
        """What was done, as against what was measured."""
        return {key: self.manifest[key] for key in ("hidden", "blocks_with_rotated_heads", "seed")}

    @property
    def needs_trial(self) -> bool:
        """Whether calibration rows are needed to choose."""
        return self.found.checkpoint is not None and self.settings.when == BETTER

    def settle(
        self, steps: Sequence[Step], layout, tokens: Tokens | None, processes: Processes, suspended: bool
    ) -> tuple[StreamedModel, Plan]:
        """
        Choose.

        Args:
            steps (`Sequence[Step]`): the recipe's steps.
            layout: the format of the result.
            tokens (`Tokens` or `None`): the calibration data.
            processes (`Processes`): who takes part; all choose the same.
            suspended (`bool`): see [`BlockPass`].

        Returns:
            the chosen model, whose linears are read without rounding where they will be solved, and its plan.
        """
        found, described = self.found, {}
        plan = make_plan(self.model, steps, layout)
        apply = found.checkpoint is not None
        if found.checkpoint is not None:
            names = {f"{task.stem}.weight" for task in plan.tasks.values()}
            tensors = unrounded(found.checkpoint.tensors, names)
            self.model = StreamedModel(found.checkpoint, self.model.device, self.model.dtype, tensors)
            if self.needs_trial:
                assert tokens is not None
                described = self._compare(plan, steps, layout, tokens, processes, suspended)
                apply = described["kl_rotated"] < described["kl_as_it_is"]
        if apply:
            self.config_changes = found.config_changes
            if found.added_bytes:
                self.progress.note(
                    f"the rotated output head no longer shares its weight with the embeddings: {found.added_bytes:,} "
                    "bytes more; rotate.hidden=false avoids that"
                )
        elif found.checkpoint is not None:
            self.model, plan = self.original, make_plan(self.original, steps, layout)
        self.manifest = {
            "hidden": apply and found.hidden,
            "blocks_with_rotated_heads": found.heads if apply else 0,
            "seed": self.settings.seed,
            "added_bytes": found.added_bytes if apply else 0,
            "reasons": found.reasons,
            **described,
        }
        return self.model, plan

    def _compare(
        self, plan: Plan, steps: Sequence[Step], layout, tokens: Tokens, processes: Processes, suspended: bool
    ) -> dict[str, Any]:
        """The divergence from the original, quantized both ways."""
        self.progress.step("trying with a rotation", amount=0)
        reference = self.original.checkpoint
        rotated_kl = trial(self.model, plan, layout, tokens, reference, processes, suspended)
        self.progress.step("trying without a rotation", amount=0)
        plain = make_plan(self.original, steps, layout)
        plain_kl = trial(self.original, plain, layout, tokens, reference, processes, suspended)
        verdict = "rotated" if rotated_kl < plain_kl else "not rotated"
        self.progress.note(
            f"{verdict}: on held-out calibration rows the divergence is {rotated_kl:.5f} nats with the rotation and "
            f"{plain_kl:.5f} without"
        )
        return {"kl_rotated": rotated_kl, "kl_as_it_is": plain_kl, "trial_rows": min(ROWS, len(tokens.input_ids))}
