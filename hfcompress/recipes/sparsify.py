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
"""Sparsify: zeros in a pattern that hardware or storage can use, and what stays making up for what does not."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe
from hfcompress.solvers.pattern import Pattern


SOLVERS = ("sparsegpt", "alps")  # of mask and values together
Method = Literal["magnitude", "random", "taylor", "wanda", "ria", "sparsegpt", "alps"]


@dataclass(frozen=True, kw_only=True)
class Sparsify(Recipe):
    """
    Set weights to zero. With a step behind it that rounds, what stays is rounded, and the zeros remain.

    Args:
        pattern (`str`, *optional*, defaults to `"2:4"`): where the zeros lie: `"N:M"` (of every M neighbours in a row N
            stay), `"unstructured"`, or `"RxC"` (blocks of R rows and C columns stay or go whole).
        sparsity (`float`, *optional*, defaults to 0.5): the share of zeros, where the pattern does not say it.
        method (`str`, *optional*, defaults to `"alps"`): how it is decided what stays: by `"magnitude"`, `"random"`,
            `"taylor"` (gradient times weight), `"wanda"`, `"ria"`, or by solving for mask and values together,
            `"sparsegpt"` or `"alps"`. Where the pattern does not fix a number for each group, `"wanda"` keeps as much in
            every row, and the others weigh all weights that read the same input against each other.
        refit (`bool`, *optional*, defaults to `True`): give what stays the values that are best for the mask.
        shift (`float`, *optional*, defaults to 1.0): how much each linear may make up for what was lost before it, as in
            [`GPTQ`]; taken by the refit, by `"sparsegpt"` and by `"alps"`.
        curvature (`bool`, *optional*, defaults to `True`): weigh errors by what each output is worth to the predictions;
            takes one backward pass through the model.
        curvature_rows (`int`, *optional*, defaults to 16): calibration rows for that pass; four times as many gained less
            than two parts in a hundred of the divergence, a quarter of them lost eight.
        rounds (`int`, *optional*, defaults to 0): how often `"sparsegpt"` and `"alps"` choose the entries of every group
            of N:M anew, given all others.
        ratios (`str`, *optional*, defaults to `"uniform"`): where the pattern does not fix a number for each group, how
            many zeros each linear gets: `"uniform"`, `"owl"` (fewer in blocks with more outliers) or `"global"` (by one
            threshold on what zeroing a weight costs the predictions).
        spread (`float`, *optional*, defaults to 0.25): how far from `sparsity` that may take a linear; the paper of `"owl"`
            has 0.08.
        damping (`float`, *optional*, defaults to 0.01): added to the diagonal of the Gram matrix, as a share of its
            mean.
        seed (`int`, *optional*, defaults to 0): of the method `"random"`.
        schedule (`tuple`, *optional*): what it goes through before, each stage a run of its own that is calibrated on what
            the one before has left: shares of zeros such as `[0.3, 0.5]`, or patterns such as `["6:8"]`. It then comes
            first. What was lost in a stage is not made up for in the next.
        on_indivisible (`str`, *optional*, defaults to `"error"`): what happens to a linear that the pattern's groups or
            blocks do not divide: `"error"`, or `"skip"` (left as it is).
        targets (`tuple[str, ...]`, *optional*): see [`Recipe`].
        ignore (`tuple[str, ...]`, *optional*): see [`Recipe`].
        overrides (`Mapping[str, Mapping]`, *optional*): see [`Recipe`].
    """

    name: ClassVar[str] = "sparsify"
    pattern: str = field(default="2:4", kw_only=False)
    sparsity: float = 0.5
    method: Method = "alps"
    refit: bool = True
    shift: float = 1.0
    curvature: bool = True
    curvature_rows: int = 16
    rounds: int = 0
    ratios: Literal["uniform", "owl", "global"] = "uniform"
    spread: float = 0.25
    damping: float = 0.01
    seed: int = 0
    schedule: tuple[float | int | str, ...] = ()
    on_indivisible: Literal["error", "skip"] = "error"

    def __post_init__(self):
        if isinstance(self.pattern, int) and not isinstance(self.pattern, bool):  # YAML reads 2:4 in base 60
            object.__setattr__(self, "pattern", f"{self.pattern // 60}:{self.pattern % 60}")
        super().__post_init__()
        pattern = Pattern.parse(self.pattern, self.sparsity)
        if not 0 < self.sparsity < 1:
            raise InvalidValueError(f"sparsify.sparsity is {self.sparsity}; it must lie between 0 and 1.")
        if pattern.is_grouped and self.sparsity not in (Sparsify.sparsity, pattern.sparsity):
            raise InvalidValueError(
                f"sparsify.pattern {self.pattern} has {pattern.sparsity:.0%} zeros; leave sparsify.sparsity out, or set "
                "pattern to unstructured."
            )
        if pattern.is_grouped and self.ratios != Sparsify.ratios:
            raise InvalidValueError(
                f"sparsify.pattern {self.pattern} gives every linear as many zeros; leave sparsify.ratios out, or set "
                "pattern to unstructured."
            )
        if self.curvature_rows < 1:
            raise InvalidValueError(f"sparsify.curvature_rows is {self.curvature_rows}; it must be at least 1.")
        for stage in self.before:
            if stage.zeros >= self.zeros:
                raise InvalidValueError(
                    f"sparsify.schedule goes through {stage.zeros:.0%} zeros before {self.zeros:.0%}; each stage must have "
                    "fewer than the next."
                )
        if self.rounds < 0:
            raise InvalidValueError(f"sparsify.rounds is {self.rounds}; it must not be negative.")
        for key in ("shift", "damping", "spread"):
            if not 0 <= getattr(self, key) <= 1:
                raise InvalidValueError(f"sparsify.{key} is {getattr(self, key)}; it must lie between 0 and 1.")

    def check_place(self, before: Sequence[Recipe], after: Sequence[Recipe]) -> None:
        """
        Raises:
            InvalidValueError: a step before it rounds, or one behind it shifts targets too.
        """
        if self.schedule and before:
            raise InvalidValueError(
                f"sparsify with a schedule is calibrated several times: put it before {before[0].name}."
            )
        for step in before:
            if hasattr(step, "quantize"):
                raise InvalidValueError(f"sparsify comes before the step that rounds; put it before {step.name}.")
        if any(step.name == "budget" for step in (*before, *after)):
            raise InvalidValueError("budget does not reckon with zeros yet; leave out sparsify or budget.")
        for step in after:
            if getattr(step, "shift", 0):
                raise InvalidValueError(
                    f"Behind sparsify the weights already make up for what was lost before them; set "
                    f"{step.name}.shift to 0, and sparsify.shift instead."
                )

    @property
    def before(self) -> "tuple[Sparsify, ...]":
        """The stage that comes before it, with those that come before that; none without a schedule."""
        if not self.schedule:
            return ()
        *earlier, last = self.schedule
        change = {"sparsity": last} if isinstance(last, float) else {"pattern": last}
        return (replace(self, **change, schedule=tuple(earlier)),)

    @property
    def zeros(self) -> float:
        """The share of zeros."""
        return self.structure.sparsity

    @property
    def structure(self) -> Pattern:
        """Where zeros may lie."""
        return Pattern.parse(self.pattern, self.sparsity)

    @property
    def solves(self) -> bool:
        """Whether values change beside those that become zero."""
        return self.refit or self.method in SOLVERS

    @property
    def reads_inputs(self) -> bool:
        """Whether calibration data is needed."""
        return self.solves or self.method in ("wanda", "ria", "taylor") or self.ratios != "uniform"

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's stream is carried beside the calibration's."""
        return self.solves and self.shift > 0

    @property
    def needs_curvature(self) -> bool:
        """Whether the outputs' worth to the predictions is asked for."""
        weighed = self.solves or self.ratios == "global"
        return (weighed and self.curvature) or self.method == "taylor"

    def sparsify(self, weight, statistics, linears, curvature=None):
        """See `passes.plan.Sparsifier`."""
        from hfcompress.solvers.alps import alps
        from hfcompress.solvers.curvature import factorize_rows, indifferent
        from hfcompress.solvers.saliency import saliency
        from hfcompress.solvers.sparse_fit import SparseFit
        from hfcompress.solvers.sparsegpt import sparsegpt

        pattern, keep = self.structure, None
        details: dict[str, Any] = {"pattern": self.pattern}
        if self.method not in SOLVERS:
            gram = None if statistics is None else statistics.gram
            scores = saliency(self.method, weight, gram, curvature, f"{self.seed} {linears}")
            keep = pattern.mask(scores, by_row=self.method == "wanda")
        if not self.solves:
            return weight * keep, keep, details
        factor = statistics.factor(self.damping, False, linears)
        target, share = statistics.target(weight, self.damping, False, linears, self.shift)
        worth = curvature if self.curvature else None

        def solve(part: slice, blocks: slice):
            own = target[part]
            rows = indifferent(len(own)) if worth is None else factorize_rows(worth[blocks])
            fit = SparseFit.of(own, statistics.gram, factor, rows, pattern)
            if keep is not None:
                fit.take(keep[part])
            elif self.method == "sparsegpt":
                fit.values, fit.keep = sparsegpt(fit.target, factor, rows, pattern)
            else:
                fit.values, fit.keep = alps(fit.target, fit.gram, rows, pattern)
            if self.method in SOLVERS:
                fit.refine(self.rounds)
            if self.refit:
                fit.refit()
            return fit.unordered(weight.device)

        if keep is None and not pattern.is_grouped:  # which entries stay depends on all rows
            values, stays = solve(slice(None), slice(None))
        else:
            blocks = None if worth is None else [len(block) for block in worth]
            values, stays = statistics.in_parts(solve, len(weight), blocks)
        raised = factor.damping > self.damping
        details |= {
            "damping": factor.damping,
            "dead_columns": factor.dead,
            "fallback": f"damping raised to {factor.damping:g}" if raised else None,
        }
        return values, stays, {**details, "shift": share} if self.shift else details
