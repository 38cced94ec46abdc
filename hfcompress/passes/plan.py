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
"""What will be done to which linear, settled and checked before any work starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hfcompress.errors import InvalidValueError, UnsupportedModelError, nearest
from hfcompress.models.activations import find_attentions, rounds_caches
from hfcompress.models.architecture import must_be_unpacked, ties_embeddings
from hfcompress.models.experts import ExpertLinear, find_routers
from hfcompress.models.names import ALL_LINEARS, matches
from hfcompress.models.roles import LinearShape, find_linears, linear_shape
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.statistics import Statistics
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.lowrank import worth_factoring
from hfcompress.solvers.pattern import Pattern
from hfcompress.solvers.smoothing import Magnitudes


SHOWN = 6  # names in a message


class Step(Protocol):
    """What the plan asks of a recipe's step."""

    name: ClassVar[str]

    @property
    def targets(self) -> tuple[str, ...]:
        """The linears it is for."""
        ...

    @property
    def ignore(self) -> tuple[str, ...]:
        """The linears it leaves alone."""
        ...

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Names or patterns with settings of their own."""
        ...

    def for_linear(self, linear: str) -> Any:
        """The settings for a linear, a [`Quantizer`], or `None` if the step leaves it alone."""

    def for_cache(self) -> Any:
        """The `type` and `observer` for the key-value cache, or `None` if the step leaves it alone."""


class Smoother(Step, Protocol):
    """What the pass asks of a step that moves factors from the inputs of linears into who produces them."""

    rounds_inputs: ClassVar[bool]
    """Whether what follows rounds inputs too, so that it is their ranges that candidates are judged by."""

    @property
    def rows(self) -> int:
        """Calibration rows on which the block's output is compared."""
        ...

    def candidates(self, magnitudes: Magnitudes) -> list[tuple[float, Tensor]]:
        """Strengths to try and their factors, one per channel."""
        ...


class Quantizer(Protocol):
    """What the pass asks of a step that rounds, once the step has been narrowed down to a linear."""

    name: ClassVar[str]
    needs_inputs: ClassVar[bool]
    needs_dense_stream: bool
    needs_curvature: bool
    bits: Any
    group_size: int
    symmetric: bool
    type: str
    activations: str
    observer: str
    scales: str
    on_indivisible: str

    def quantize(
        self,
        weight: Tensor,
        statistics: Statistics | None,
        grid: Grid,
        scale_dtype: torch.dtype,
        linears: str,
        curvature: Sequence[Tensor] | None = None,
        keep: Tensor | None = None,
    ) -> tuple[QuantizedWeight, dict[str, Any]]:
        """
        Round the stacked weights `(out_features, in_features)` of linears that share their input.

        `curvature` is what their outputs are worth, block by block along the diagonal, for a step that asked for it.
        `keep`, bool like the weights, says which of them may be other than zero; the others are zero already.

        Returns:
            the rounded weight, and what there is to report of it.
        """


class Sparsifier(Protocol):
    """What the pass asks of a step that sets weights to zero, once it has been narrowed down to a linear."""

    name: ClassVar[str]
    reads_inputs: bool
    needs_dense_stream: bool
    needs_curvature: bool
    pattern: str
    structure: Pattern
    on_indivisible: str

    def sparsify(
        self,
        weight: Tensor,
        statistics: Statistics | None,
        linears: str,
        curvature: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """
        Choose what stays of the stacked weights `(out_features, in_features)` of linears that share their input.

        Returns:
            the weights with their zeros, bool which of them stay, and what there is to report.
        """


@dataclass(frozen=True)
class LinearTask:
    """
    Args:
        shape (`LinearShape`): the linear.
        settings (`Quantizer` or `Sparsifier`): what is done to it; where it is sparsified and rounded, the step that
            rounds.
        grid (`Grid`): the grid it ends on.
        stem (`str`): its name on disk, without `.weight`.
        scale_dtype (`torch.dtype`): the dtype of its scales on disk, or of its weight where that is written dense.
        fallback (`str` or `None`): what was done instead of what was asked for.
        sparsity (`Sparsifier` or `None`): how it is sparsified.
        base (*optional*): the stored weight of another block that it leans on.
    """

    shape: LinearShape
    settings: Any
    grid: Grid
    stem: str
    scale_dtype: torch.dtype
    fallback: str | None = None
    sparsity: Any = None
    base: Any = None

    @property
    def name(self) -> str:
        """Full module name."""
        return self.shape.name

    @property
    def searches(self) -> bool:
        """Whether the grid's scales are searched."""
        return self.settings.scales == "search"

    @property
    def rounding(self) -> tuple[str, str] | None:
        """How and to which codes its inputs are rounded."""
        return None if self.grid.activations == "none" else (self.grid.activations, self.grid.type)

    @property
    def needs_range(self) -> bool:
        """Whether the range of its inputs is wanted, for a scale that is stored."""
        return self.grid.activations == "static"

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration data is needed."""
        sparsified = self.sparsity is not None and self.sparsity.reads_inputs
        return sparsified or self.settings.needs_inputs or self.needs_range

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's stream is carried beside the calibration's."""
        return any(step.needs_dense_stream for step in (self.sparsity, self.settings) if step is not None)

    @property
    def needs_curvature(self) -> bool:
        """Whether it is asked what the outputs are worth to the predictions."""
        return any(step.needs_curvature for step in (self.sparsity, self.settings) if step is not None)

    @property
    def curvature_rows(self) -> int | None:
        """How many calibration rows are enough for that, where all who ask say so."""
        asking = [step for step in (self.sparsity, self.settings) if step is not None and step.needs_curvature]
        known = [step.curvature_rows for step in asking if hasattr(step, "curvature_rows")]
        return max(known) if known and len(known) == len(asking) else None


@dataclass(frozen=True)
class CacheTask:
    """
    Args:
        name (`str`): the attention whose keys and values are rounded.
        stem (`str`): its name on disk.
        grid (`Grid`): the codes they are rounded to.
        observer (`str`): how their ranges are chosen.
        scale_dtype (`torch.dtype`): the dtype of its weights on disk.
    """

    name: str
    stem: str
    grid: Grid
    observer: str
    scale_dtype: torch.dtype


@dataclass
class Plan:
    """
    Args:
        blocks (`list[dict[str, LinearTask]]`): for each block, name -> task.
        head (`LinearTask` or `None`): the output head, if it was asked for.
        untouched (`list[str]`): `nn.Linear`s that stay as they are.
        routers (`list[str]`): what sends tokens to experts, by their names as modules and on disk; they stay as they are.
        skipped (`dict[str, str]`): targeted linears that are left alone, and why.
        needs_inputs (`bool`): whether calibration data is needed.
        needs_dense_stream (`bool`): whether the dense model's stream is carried beside.
        needs_curvature (`bool`): whether the gradients of the predictions are wanted.
        caches (`list[dict[str, CacheTask]]`): for each block, the attentions whose cache is rounded.
        embeddings (`LinearTask` or `None`): the input embeddings, if they were asked for.
        folds (`list[Smoother]`): steps that come before any rounding, block by block.
        tuning (`Tuning` or `None`): the step that comes after it, block by block.
        unpacked (`bool`): whether transformers has to unpack the weights while it loads them.
    """

    blocks: list[dict[str, LinearTask]]
    head: LinearTask | None
    untouched: list[str] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    needs_inputs: bool = False
    needs_dense_stream: bool = False
    needs_curvature: bool = False
    folds: list[Smoother] = field(default_factory=list)
    tuning: Any = None
    embeddings: LinearTask | None = None
    caches: list[dict[str, CacheTask]] = field(default_factory=list)
    unpacked: bool = False

    @property
    def kv_cache(self) -> str | None:
        """The type of the codes of the key-value cache, if it is rounded."""
        return next((task.grid.type for block in self.caches for task in block.values()), None)

    @property
    def tasks(self) -> dict[str, LinearTask]:
        """All of them, by name."""
        tasks = {name: task for block in self.blocks for name, task in block.items()}
        return {**tasks, **{task.name: task for task in (self.head, self.embeddings) if task is not None}}

    @property
    def widest(self) -> LinearTask:
        """The linear with the most inputs."""
        return max(self.tasks.values(), key=lambda task: task.shape.in_features)


def make_plan(model: StreamedModel, steps: Sequence[Step], layout) -> Plan:
    """
    Args:
        model (`StreamedModel`): the model; its weights are not needed.
        steps (`Sequence[Step]`): the recipe's steps; those that do not quantize are passed over.
        layout: the format that will hold the result.

    Raises:
        InvalidValueError: a pattern that means nothing, a group size that does not divide, a layout that cannot hold
            a linear, several steps for one linear, a step that needs one behind it.
        UnsupportedModelError: a weight that is stored in a form that cannot be replaced.
    """
    layout.check_model(model.checkpoint)
    found = _output_head(model)
    head_name = None if found is None else found[0]
    shapes = [_block_shapes(model, index) for index in range(len(model))]
    head = {} if found is None else {found[0]: linear_shape(*found)}
    embeddings = _input_embeddings(model)
    named_only = {*head, *embeddings}
    check_patterns(steps, [name for group in [*shapes, head, embeddings] for name in group])
    folds, tuning = _steps_before_rounding(steps), _step_after_rounding(steps)
    tasks: dict[str, LinearTask] = {}
    skipped: dict[str, str] = {}
    indivisible: dict[str, tuple[LinearShape, Any]] = {}
    routers = find_routers(model.skeleton)
    for shape in (shape for group in [*shapes, head, embeddings] for shape in group.values()):
        found_here = _settings_for(shape.name, steps, in_blocks=shape.name not in named_only)
        if found_here and shape.name in routers:
            skipped[shape.name] = "it decides what of a token goes to experts"
            continue
        if found_here and shape.name == head_name and head_name in _tied_names(model):
            raise InvalidValueError(
                f"{head_name} shares its weight with the embeddings; take it out of targets, or name "
                f"{' and '.join(embeddings)} there instead, in an rtn step, to quantize both as one."
            )
        sparsity, settings = found_here.get("sparsify"), found_here.get("quantize")
        if sparsity is not None and not sparsity.structure.fits(shape.out_features, shape.in_features):
            if sparsity.on_indivisible == "error":
                raise InvalidValueError(
                    f"The pattern {sparsity.pattern} does not divide {shape.name}, whose weight is {shape.out_features} x "
                    f"{shape.in_features}; choose another pattern, or set sparsify.on_indivisible to skip."
                )
            skipped[shape.name] = f"the pattern {sparsity.pattern} does not divide its weight"
            sparsity = None
        fallback = None
        if settings is not None and settings.group_size != -1 and shape.in_features % settings.group_size:
            if settings.on_indivisible == "error":
                indivisible[shape.name] = (shape, settings)
                continue
            if settings.on_indivisible == "skip":
                skipped[shape.name] = f"its width {shape.in_features} is no multiple of {settings.group_size}"
                settings = None
            else:
                fallback = f"one scale per row: {shape.in_features} is no multiple of {settings.group_size}"
        if settings is None and sparsity is None:
            continue
        stem, dtype = _stored_as(model, shape.name)
        if settings is None:
            settings, grid = sparsity, Grid(8 * dtype.itemsize, type="plain")
        else:
            group_size = -1 if fallback else settings.group_size
            grid = _grid(settings, group_size, dtype, shape)
            dtype = dtype if grid.is_plain else layout.of(grid).scale_dtype(dtype)
        layout.check_coded(shape.name, grid)
        layout.of(grid).check(shape, grid)
        layout.check_pattern(shape.name, None if sparsity is None else sparsity.pattern)
        tasks[shape.name] = LinearTask(shape, settings, grid, stem, dtype, fallback, sparsity)
    if indivisible:
        _refuse_indivisible(indivisible)
    if not tasks:
        raise InvalidValueError("The recipe leaves every linear of this model alone; check its targets and ignore.")
    for name in (name for name in embeddings if name in tasks):
        _check_embeddings(tasks[name], layout)
    _check_experts(model, tasks, layout)
    caches = _cache_tasks(model, steps)
    linears = [n for n, m in model.skeleton.named_modules() if isinstance(m, torch.nn.Linear)]
    plan = Plan(
        blocks=[{name: tasks[name] for name in group if name in tasks} for group in shapes],
        head=tasks.get(head_name) if head_name else None,
        embeddings=next((tasks[name] for name in embeddings if name in tasks), None),
        untouched=[name for name in linears if name not in tasks],
        routers=list(dict.fromkeys(n for name in routers for n in (name, _stored_as(model, name)[0]))),
        skipped=skipped,
        needs_inputs=bool(folds)
        or tuning is not None
        or any(task.needs_inputs for task in tasks.values())
        or any(caches),
        needs_dense_stream=tuning is not None or any(task.needs_dense_stream for task in tasks.values()),
        needs_curvature=any(task.needs_curvature for task in tasks.values()),
        caches=caches,
        folds=folds,
        tuning=tuning,
        unpacked=_must_be_unpacked(model, tasks, layout),
    )
    sharing: Any = next((step for step in steps if hasattr(step, "reach")), None)
    if sharing is not None:  # the data will say which blocks; here it is how many
        total = len(model)
        lean(model, plan, {index: index - 1 for index in range(total - 1, 0, -2)[: sharing.count(total)]})
    return plan


def lean(model: StreamedModel, plan: Plan, bases: Mapping[int, int]) -> None:
    """
    Let blocks use the weights of others, those with a step that shares; a linear for which factors are not worth it stays
    whole.

    Args:
        model (`StreamedModel`): the dense model.
        plan (`Plan`): its tasks are replaced.
        bases (`Mapping[int, int]`): which block leans on which.
    """
    for index, tasks in enumerate(plan.blocks):
        for name, task in tasks.items():
            if not hasattr(task.settings, "reach"):
                continue
            bits, rank = 8 * task.scale_dtype.itemsize, task.settings.rank
            grid, base = Grid(bits, type="plain"), None
            if index in bases and worth_factoring(rank, (task.shape.out_features, task.shape.in_features)):
                base = namesake(model, task, index, bases[index])
            if base is not None:
                grid = replace(factored(task.shape, rank, bits), base=bases[index])
            tasks[name] = replace(task, grid=grid, base=base)


def take_over(model: StreamedModel, plan: Plan, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """
    Products as an earlier run has settled them: where its blocks are not solved again, nothing tells their ranks anew.

    Args:
        model (`StreamedModel`): the dense model.
        plan (`Plan`): its tasks are replaced.
        rows (`Mapping`): block -> what is reported of its linears.
    """
    known = {row["name"]: row for reported in rows.values() for row in reported}
    for index, tasks in enumerate(plan.blocks):
        for name, task in tasks.items():
            row = known.get(name)
            if row is None or not (
                getattr(task.settings, "type", None) == "factors" or hasattr(task.settings, "reach")
            ):
                continue
            bits, base = 8 * task.scale_dtype.itemsize, row.get("base")
            grid = Grid(bits, type="plain")
            if row["type"] == "factors":
                grid = replace(factored(task.shape, row["rank"], bits), base=base)
            tasks[name] = replace(task, grid=grid, base=None if base is None else namesake(model, task, index, base))


def namesake(model: StreamedModel, task: LinearTask, own: int, other: int) -> Any:
    """The stored weight of another block's linear of the same name and shape; `None` if there is none."""
    name = model.block_names[other] + task.name.removeprefix(model.block_names[own])
    base = model.tensors.get(model.sources.get(f"{name}.weight", ""))
    same = (task.shape.out_features, task.shape.in_features)
    return None if base is None or tuple(base.shape) != same else base


def factored(shape: LinearShape, rank: int, bits: int) -> Grid:
    """Of a linear that becomes a product of this rank, whose numbers are of `bits`."""
    rows, columns = shape.out_features, shape.in_features
    return Grid(bits, type="factors", rate=round(bits * rank * (rows + columns) / (rows * columns), 3), rank=rank)


def _grid(settings: Any, group_size: int, stored: torch.dtype, shape: LinearShape) -> Grid:
    """The grid that a step's settings for a linear, whose weight is stored in a dtype, ask for."""
    if settings.type == "factors":
        rank = settings.rank(shape.out_features, shape.in_features)
        if rank is not None:
            return factored(shape, rank, 8 * stored.itemsize)
        return Grid(8 * stored.itemsize, type="plain")
    if settings.type == "plain":
        return Grid(8 * stored.itemsize, type="plain")
    if settings.type == "coded":
        return Grid(8, type="coded", rate=settings.bits)
    if settings.type == "codebook":
        return Grid(settings.bits, group_size, type="codebook")
    if settings.type == "vector":
        own = Grid(0, settings.group_size, type="vector", rate=settings.bits, tables=settings.tables)
        return replace(own, rows=settings.rows or 0, limit=settings.rate)
    return Grid(settings.bits, group_size, settings.symmetric, settings.type, settings.activations)


def _steps_before_rounding(steps: Sequence[Step]) -> list[Any]:
    """The steps that move factors; each needs a step behind it that rounds."""
    folds = [number for number, step in enumerate(steps) if hasattr(step, "candidates")]
    for number in folds:
        if not any(hasattr(step, "quantize") for step in steps[number + 1 :]):
            name = steps[number].name
            raise InvalidValueError(
                f"{name} only prepares weights for rounding and compresses nothing; put a step behind it that rounds, "
                f"such as gptq: {name} >> gptq."
            )
    return [steps[number] for number in folds]


def _step_after_rounding(steps: Sequence[Step]) -> Any:
    """The step that tunes whole blocks; it needs one before it that rounds."""
    found = [number for number, step in enumerate(steps) if hasattr(step, "iterations")]
    if len(found) > 1:
        raise InvalidValueError("The recipe has the step tune twice; leave one.")
    for number in found:
        if not any(hasattr(step, kind) for step in steps[:number] for kind in ("quantize", "sparsify")):
            raise InvalidValueError(
                "tune starts from weights that a step has changed: put one before it, such as gptq >> tune."
            )
    return steps[found[0]] if found else None


def _cache_tasks(model: StreamedModel, steps: Sequence[Step]) -> list[dict[str, CacheTask]]:
    """For each block the attentions whose cache the recipe rounds."""
    found = [settings for step in steps if (settings := step.for_cache()) is not None]
    if len(found) > 1:
        raise InvalidValueError("The recipe has the step kv_cache twice; leave one.")
    tasks: list[dict[str, CacheTask]] = [{} for _ in model.block_names]
    if not found:
        return tasks
    [settings] = found
    grid = Grid(8, type=settings.type)
    for index, block_name in enumerate(model.block_names if rounds_caches(model.skeleton) else ()):
        for name, attention in find_attentions(model.skeleton.get_submodule(block_name), block_name).items():
            inside = next(iter(find_linears(attention, name)))
            stem, dtype = _stored_as(model, inside)
            stem = stem.removesuffix(inside.removeprefix(name))
            tasks[index][name] = CacheTask(name, stem, grid, settings.observer, dtype)
    if not any(tasks):
        raise UnsupportedModelError(
            f"{model.checkpoint.name} has no attention whose key-value cache compressed-tensors can round; leave out "
            "the step kv_cache."
        )
    return tasks


def _block_shapes(model: StreamedModel, index: int) -> dict[str, LinearShape]:
    name = model.block_names[index]
    linears = find_linears(model.skeleton.get_submodule(name), name)
    return {n: linear_shape(n, module) for n, module in linears.items()}


def _output_head(model: StreamedModel) -> tuple[str, torch.nn.Linear] | None:
    head = model.skeleton.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return None
    return next(((name, head) for name, module in model.skeleton.named_modules() if module is head), None)


def untied_head(model: StreamedModel) -> str | None:
    """The name of the output head, if it is a linear whose weight is not the embeddings'."""
    found = _output_head(model)
    return None if found is None or found[0] in _tied_names(model) else found[0]


def _input_embeddings(model: StreamedModel) -> dict[str, LinearShape]:
    """The name and the shape of the table that token ids look up; a token is a row, as an output of a linear is."""
    module = model.skeleton.get_input_embeddings()
    if not isinstance(module, torch.nn.Embedding):
        return {}
    names = (name for name, other in model.skeleton.named_modules() if other is module)
    return {name: LinearShape(name, module.embedding_dim, module.num_embeddings, False) for name in names}


def _check_embeddings(task: LinearTask, layout) -> None:
    blind = not task.settings.needs_inputs or getattr(task.settings, "looks_up", False)
    if not blind or task.sparsity is not None:
        name = task.settings.name if task.sparsity is None else task.sparsity.name
        raise InvalidValueError(
            f"{name} needs the inputs of what it changes, and {task.name} is looked up by token ids; take it "
            f"out of its targets and give it a step of its own: rtn with targets: [{task.name.rpartition('.')[2]}]."
        )
    layout.check_embeddings(task.name, task.grid)


def _tied_names(model: StreamedModel) -> set[str]:
    if not ties_embeddings(model.skeleton.config):
        return set()
    return {name.removesuffix(".weight") for name in model.skeleton.all_tied_weights_keys}


def _settings_for(name: str, steps: Sequence[Step], in_blocks: bool) -> dict[str, Any]:
    """
    The one step of each kind that is for this linear, by what it does; the output head and the embeddings must be asked
    for by name.
    """
    found: dict[str, Any] = {}
    for kind in ("sparsify", "quantize"):
        for step in (step for step in steps if hasattr(step, kind)):
            if not in_blocks and all(target == ALL_LINEARS for target in step.targets):
                continue
            settings = step.for_linear(name)
            if settings is None or not (in_blocks or _named(name, step.targets)):
                continue
            if kind in found:
                raise InvalidValueError(
                    f"{name} is a target of {found[kind].name} and {settings.name}; divide the linears between them with "
                    "targets or ignore."
                )
            found[kind] = settings
    return found


def _named(name: str, targets: tuple[str, ...]) -> bool:
    return matches(name, tuple(t for t in targets if t != ALL_LINEARS))


def check_patterns(steps: Sequence[Step], names: list[str]) -> None:
    """
    Raises:
        InvalidValueError: a pattern of a step means none of the linears `names`; the nearest is named.
    """
    for step in steps:
        for pattern in (*step.targets, *step.ignore, *step.overrides):
            if pattern != ALL_LINEARS and not any(matches(name, (pattern,)) for name in names):
                parts = list(dict.fromkeys([n.rpartition(".")[2] for n in names] + names))
                hint = nearest(pattern, parts) or f" Its linears end in {', '.join(parts[:SHOWN])}."
                raise InvalidValueError(f"{step.name}: no linear of this model is called '{pattern}'.{hint}")


def _check_experts(model: StreamedModel, tasks: Mapping[str, LinearTask], layout) -> None:
    coded = {name: task.grid for name, task in tasks.items() if layout.of(task.grid) is layout}
    if coded or layout.codes_beside:
        experts = [name for name, module in model.skeleton.named_modules() if isinstance(module, ExpertLinear)]
        check = layout.check_together if model.experts.together else layout.check_experts
        check({name: coded.get(name) for name in experts})


def _must_be_unpacked(model: StreamedModel, tasks: Mapping[str, LinearTask], layout) -> bool:
    """Whether transformers cannot hold the weights packed until the model's first forward."""
    hidden = [
        n for n, task in tasks.items() if not task.grid.is_plain and layout.of(task.grid).hides_weight(task.grid)
    ]
    return must_be_unpacked(model.skeleton, hidden)


def _refuse_indivisible(indivisible: dict[str, tuple[LinearShape, Quantizer]]) -> None:
    shape, settings = next(iter(indivisible.values()))
    names = ", ".join(list(indivisible)[:SHOWN]) + (", ..." if len(indivisible) > SHOWN else "")
    raise InvalidValueError(
        f"The group size {settings.group_size} does not divide the width {shape.in_features} of {len(indivisible)} "
        f"linears ({names}); choose another group_size, or set {settings.name}.on_indivisible to channel "
        "(one scale per row there) or skip."
    )


def _stored_as(model: StreamedModel, name: str) -> tuple[str, torch.dtype]:
    key = model.sources.get(f"{name}.weight")
    if key is None:
        if not model.converts:
            raise UnsupportedModelError(
                f"{model.checkpoint.name} has no weight for {name}; the checkpoint is incomplete or of another model."
            )
        raise UnsupportedModelError(
            f"{name} is stored in another form than it is used in; this architecture is not supported yet."
        )
    return key.removesuffix(".weight"), model.tensors[key].dtype
