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
Feed-forward channels and groups of heads that go: chosen where they are read, in the block pass, and cut out of what was
written when the pass is through.

While the pass walks, a channel that goes is a column of zeros in its consumer, so that the block computes what the
smaller one will. Then the columns, and the rows that make those channels, are left out of the tensors.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.experts import are_apart
from hfcompress.models.roles import Linear, find_linears, linear_shape
from hfcompress.models.shallow import changed_config, nested, reason_of, stored_key
from hfcompress.models.streaming import Stream, StreamedModel, build_skeleton
from hfcompress.models.units import rows_of_units
from hfcompress.passes.plan import LinearTask, Plan
from hfcompress.solvers.columns import remove_columns
from hfcompress.solvers.grid import Grid


FFN_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")


@dataclass(frozen=True)
class ColumnPruner:
    """
    What is done to a linear whose inputs are thinned out; see `passes.plan.Sparsifier`.

    Args:
        units (`int`): units that its inputs consist of, each of as many neighbouring columns.
        keep (`int`): units that stay.
        refit (`bool`): let what stays make up for what goes.
        shift (`float`): how much it may make up for what was lost before.
        damping (`float`): of the Gram matrix.
        curvature (`bool`): weigh errors by what each output is worth.
    """

    name: ClassVar[str] = "prune"
    pattern: ClassVar[str] = "columns"
    structure: ClassVar[None] = None
    reads_inputs: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True

    units: int
    keep: int
    refit: bool
    shift: float
    damping: float
    curvature: bool

    @property
    def needs_dense_stream(self) -> bool:
        return self.refit and self.shift > 0

    @property
    def needs_curvature(self) -> bool:
        return self.curvature and self.keep < self.units

    def sparsify(self, weight, statistics, linears, curvature=None):
        """See `passes.plan.Sparsifier`."""
        factor = statistics.factor(self.damping, False, linears)
        target, share = weight, 0.0
        if self.refit:
            target, share = statistics.target(weight, self.damping, False, linears, self.shift)
        units = torch.arange(weight.shape[1], device=weight.device) // (weight.shape[1] // self.units)
        worth = None if curvature is None else _root(curvature).to(weight.device)
        stays, values = remove_columns(target, factor.damped(statistics.gram), units, self.keep, worth)
        found = torch.zeros_like(weight)
        found[:, stays] = values if self.refit else weight[:, stays]
        keep = torch.zeros_like(weight, dtype=torch.bool)
        keep[:, stays] = True
        return found, keep, {"units": self.units, "kept": self.keep, **({"shift": share} if self.refit else {})}


def _root(curvature: list[Tensor]) -> Tensor:
    """`R` with `C = R^T R`, for `C` block by block along its diagonal."""
    roots = []
    for block in curvature:
        values, vectors = torch.linalg.eigh(block.cpu())
        roots.append((vectors * values.clamp(min=0).sqrt()).T)
    return torch.block_diag(*roots)


@dataclass(frozen=True)
class Cut:
    """
    Args:
        consumer (`str`): the linear whose inputs are thinned out.
        units (`int`): units that they consist of.
        keep (`int`): units that stay.
        rows (`dict[str, Tensor]`): full name of a linear -> int64 `(out_features,)`: the unit that each of its rows
            makes, or -1.
    """

    consumer: str
    units: int
    keep: int
    rows: dict[str, Tensor]


class Widths:
    """
    How wide every block will be, and where that is to be cut.

    Args:
        model (`StreamedModel`): the model.
        settings: the step.
        ffn (`int` or `None`): feed-forward channels that stay; `None` for all.
        groups (`int` or `None`): groups of heads that stay; `None` for all.
        tuning (*optional*): the step that comes after every block.

    Raises:
        UnsupportedModelError: the architecture has no place for such widths, or it cannot be seen what to cut.
    """

    def __init__(self, model: StreamedModel, settings, ffn: int | None, groups: int | None, tuning=None):
        self.model, self.settings, self.ffn, self.groups, self.tuning = model, settings, ffn, groups, tuning
        self.config_changes = width_changes(model.skeleton.config, ffn, groups)
        if ffn is not None and are_apart(model.skeleton):
            raise UnsupportedModelError(
                f"{model.checkpoint.name} is a mixture, of which prune takes out whole experts and not their channels; leave "
                "prune.ffn out and name prune.experts."
            )
        self.cuts: list[list[Cut]] = [[] for _ in range(len(model))]
        if self.config_changes:
            probe = model.probe()
            for index in range(len(model)):
                with model.block(index) as block:
                    self.cuts[index] = self._cuts(block, index, probe)
            self._check_shapes()

    @property
    def plan(self) -> Plan:
        """The consumers as tasks of a block pass."""
        settings, blocks = self.settings, []
        for index, cuts in enumerate(self.cuts):
            name = self.model.block_names[index]
            linears = find_linears(self.model.skeleton.get_submodule(name), name)
            units = {cut.consumer: (cut.units, cut.keep) for cut in cuts}
            tasks = {}
            for linear, module in linears.items():
                if linear not in units and not (cuts and settings.refit and (settings.shift or self.tuning)):
                    continue
                key = self.model.sources[f"{linear}.weight"]
                dtype = self.model.tensors[key].dtype
                pruner = ColumnPruner(
                    *units.get(linear, (1, 1)), settings.refit, settings.shift, settings.damping, settings.curvature
                )
                tasks[linear] = LinearTask(
                    shape=linear_shape(linear, module),
                    settings=pruner,
                    grid=Grid(8 * dtype.itemsize, type="plain"),
                    stem=key.removesuffix(".weight"),
                    scale_dtype=dtype,
                    sparsity=pruner,
                )
            blocks.append(tasks)
        given = [task for tasks in blocks for task in tasks.values()]
        untouched = [n for n, m in self.model.skeleton.named_modules() if isinstance(m, nn.Linear)]
        names = {task.name for task in given}
        return Plan(
            blocks=blocks,
            head=None,
            untouched=[name for name in untouched if name not in names],
            needs_inputs=bool(given),
            needs_dense_stream=self.tuning is not None or any(task.needs_dense_stream for task in given),
            needs_curvature=any(task.needs_curvature for task in given),
            caches=[{} for _ in blocks],
            tuning=self.tuning,
        )

    def cut(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        What was written of block `index`, with everything left out that goes; to do it twice is to do it once.

        Args:
            index (`int`): which block.
            tensors (`Mapping[str, Tensor]`): its tensors by their names on disk.
        """
        found = dict(tensors)
        for cut in self.cuts[index]:
            key = self.model.sources[f"{cut.consumer}.weight"]
            along = 0 if self._transposed(cut.consumer) else 1
            weight = found[key]
            size = weight.shape[along] // cut.units
            if weight.shape[along] == size * cut.keep or size * cut.units != weight.shape[along]:
                continue
            stays = _units_with_values(weight if along else weight.T, cut)
            columns = (stays[:, None] * size + torch.arange(size)).flatten()
            found[key] = weight.index_select(along, columns)
            for name, units in cut.rows.items():
                kept = torch.isin(units, stays).nonzero().flatten()
                for part in ("weight", "bias"):
                    source = self.model.sources.get(f"{name}.{part}")
                    if source in found:
                        dim = 1 if part == "weight" and self._transposed(name) else 0
                        found[source] = found[source].index_select(dim, kept)
        return found

    def _check_shapes(self) -> None:
        """That the architecture builds such a model: every tensor as it will be cut has the shape that is asked for."""
        checkpoint = copy.copy(self.model.checkpoint)
        refused = f"{checkpoint.name} ({type(self.model.skeleton).__name__}) cannot be built with such widths"
        try:
            checkpoint.config = changed_config(checkpoint.config, self.config_changes)
            wanted = dict(build_skeleton(checkpoint, self.model.dtype).named_parameters())
        except (ValueError, RuntimeError, StrictDataclassError) as error:
            raise UnsupportedModelError(
                f"{refused} ({reason_of(error)}); take another share, or leave that dimension out of prune."
            ) from error
        for index, cuts in enumerate(self.cuts):
            prefix = f"{self.model.block_names[index]}."
            shapes = {n: list(p.shape) for n, p in self.model.skeleton.named_parameters() if n.startswith(prefix)}
            for cut in cuts:
                along = 0 if self._transposed(cut.consumer) else 1
                own = shapes[f"{cut.consumer}.weight"]
                own[along] = own[along] // cut.units * cut.keep
                for name, units in cut.rows.items():
                    count = int((units >= 0).sum()) // cut.units * cut.keep + int((units < 0).sum())
                    shapes[f"{name}.weight"][1 if self._transposed(name) else 0] = count
                    if f"{name}.bias" in shapes:
                        shapes[f"{name}.bias"][0] = count
            for name, shape in shapes.items():
                if list(wanted[name].shape) != shape:
                    raise UnsupportedModelError(
                        f"{refused}: {name} would be {shape}, and transformers makes it {list(wanted[name].shape)}; leave "
                        "that dimension out of prune."
                    )

    def _transposed(self, name: str) -> bool:
        module = self.model.skeleton.get_submodule(name)
        assert isinstance(module, Linear)
        return linear_shape(name, module).transposed

    # where

    def _cuts(self, block: nn.Module, index: int, probe: Stream) -> list[Cut]:
        cuts = []
        text = self.model.skeleton.config.get_text_config()
        if self.groups is not None:
            width = text.num_attention_heads * head_width(text)
            cuts.append(self._cut_of(block, index, probe, width, key_value_heads(text), self.groups, "heads"))
        if self.ffn is not None:
            width = ffn_width(text)
            cuts.append(self._cut_of(block, index, probe, width, width, self.ffn, "ffn"))
        return cuts

    def _cut_of(
        self, block: nn.Module, index: int, probe: Stream, width: int, units: int, keep: int, dimension: str
    ) -> Cut:
        """The linear of the block that reads such units, made by rows of their own."""
        name, hidden = self.model.block_names[index], probe.hidden.shape[-1]
        for consumer, module in reversed(find_linears(block, name).items()):
            shape = linear_shape(consumer, module)
            if (shape.in_features, shape.out_features) != (width, hidden):
                continue
            each = torch.arange(width) // (width // units)
            try:
                rows = rows_of_units(self.model, block, index, probe, consumer, each)
            except UnsupportedModelError:
                continue
            if len(rows) > (1 if dimension == "heads" else 0):
                return Cut(consumer, units, keep, rows)
            if dimension == "heads" and any(len(own) > width for own in rows.values()):  # queries, keys, values in one
                return Cut(consumer, units, keep, rows)
        raise UnsupportedModelError(
            f"In {name} it could not be seen which weights make the {width} inputs that prune.{dimension} thins out; leave "
            "that dimension out."
        )


def _units_with_values(weight: Tensor, cut: Cut) -> Tensor:
    """The units that stay, ascending: those whose columns hold anything, `(out_features, in_features)`."""
    sizes = weight.float().abs().amax(0).view(cut.units, -1).amax(1)
    return sizes.topk(cut.keep).indices.sort().values


def width_changes(config, ffn: int | None, groups: int | None) -> dict[str, Any]:
    """What config.json must say of a model with so many feed-forward channels and groups of heads."""
    text, changes = config.get_text_config(), {}
    if ffn is not None:
        changes[next(key for key in FFN_KEYS if hasattr(text, key))] = ffn
    if groups is not None:
        heads = text.num_attention_heads // key_value_heads(text) * groups
        changes[stored_key(text, "num_attention_heads")] = heads
        if getattr(text, "num_key_value_heads", None) is not None:
            changes[stored_key(text, "num_key_value_heads")] = groups
        changes["head_dim"] = head_width(text)
    return nested(config, changes) if changes else {}


def ffn_width(text_config) -> int:
    """Feed-forward channels."""
    for key in FFN_KEYS:
        if hasattr(text_config, key):
            return getattr(text_config, key) or 4 * text_config.hidden_size  # GPT-2 leaves it out
    raise UnsupportedModelError(
        f"The configuration of {text_config.model_type} does not say how many feed-forward channels there are; leave "
        "prune.ffn out."
    )


def key_value_heads(text_config) -> int:
    """Groups of heads that share keys and values."""
    return getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads


def head_width(text_config) -> int:
    """Channels of a head."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
