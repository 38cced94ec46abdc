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
"""Before a block's weights are rounded: factors moved from the inputs of linears into whoever produces them."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.models.batch import Batch, made_up
from hfcompress.models.folds import Fold, apply_fold, find_folds
from hfcompress.models.roles import Linear, find_linears, get_weight, set_weight, shared_inputs, watch_inputs
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.passes.plan import LinearTask, Plan, Smoother
from hfcompress.passes.processes import Processes
from hfcompress.passes.rows import spread_rows
from hfcompress.passes.statistics import Statistics, flat_tokens
from hfcompress.passes.tuning import watch_output
from hfcompress.solvers.smoothing import Magnitudes, gram_losses, migration_losses, round_scaled


PROBE = (4, 8)  # rows and tokens on which a block is looked at
FINALISTS = 5  # of the factors that are tried: those that are looked at closely


class Folding:
    """
    Args:
        model (`StreamedModel`): the model.
        plan (`Plan`): its `folds` are the steps.
        processes (`Processes`): who takes part; all choose the same.
        batches (`list[Batch]`): this process's share of the calibration data.
    """

    def __init__(self, model: StreamedModel, plan: Plan, processes: Processes, batches: list[Batch]):
        self.model, self.plan, self.processes = model, plan, processes
        vocabulary = model.skeleton.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, PROBE, generator=torch.Generator().manual_seed(0))
        self.probe = model.embed([made_up(model.skeleton.config, ids)])[0]
        rows = max(step.rows for step in plan.folds)
        self.streams = model.embed(spread_rows(batches, rows, processes)[0])

    def advance(self, block: nn.Module, index: int) -> None:
        """Take the chosen rows through a finished block."""
        self.streams = [s.advanced(self.model.call(block, index, s)) for s in self.streams]

    def fold(
        self, block: nn.Module, index: int, streams: list[Stream]
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """
        Choose factors for every pair of the block and move them, in place.

        Args:
            block (`nn.Module`): block `index`, dense.
            index (`int`): which block.
            streams (`list[Stream]`): the calibration data in front of it.

        Returns:
            `tuple[list[dict], dict[str, Tensor]]`: what there is to report of every pair; and the tensors that changed
            and are not rounded later, by their names on disk, as they are to be stored.
        """
        tasks, name = self.plan.blocks[index], self.model.block_names[index]
        if not tasks:
            return [], {}
        modules = {f"{name}.{n}": module for n, module in block.named_modules()}
        groups = shared_inputs(self.model, block, index, self.probe)
        found, alone = find_folds(self.model, block, index, self.probe, groups)
        folds = {fold.consumers: fold for fold in found}
        joined = {name for fold in found if fold.joined for name in (*fold.consumers, *fold.routers)}
        apart = [tuple(group) for group in groups if not joined.issuperset(group)]
        reports, changed = [], set()
        for step in self.plan.folds:
            wanted = []
            for group in [*apart, *(fold.consumers for fold in found if fold.joined)]:
                if not any(n in tasks and step.for_linear(n) for n in group):
                    continue
                reason = alone.get(group) or self._reason_against(step, folds[group], tasks, modules)
                if reason is None:
                    wanted.append(folds[group])
                else:
                    reports.append(_report(step, group, folds.get(group), reason=reason))
            observed = self._observe(block, index, streams, wanted)
            for fold in wanted:
                report, scales = self._choose(step, fold, observed.pop(0), block, index, modules)
                reports.append(report)
                if scales is not None:
                    changed |= apply_fold(fold, modules, scales, self._as_stored)
        kept = [n for n in changed if n.removesuffix(".weight") not in tasks]
        parameters = dict(block.named_parameters(prefix=name))
        return reports, {self.model.sources[n]: self._as_stored(n, parameters[n].data).cpu() for n in sorted(kept)}

    def _as_stored(self, name: str, values: Tensor) -> Tensor:
        return values.to(self.model.tensors[self.model.sources[name]].dtype)

    def _reason_against(
        self, step: Smoother, fold: Fold, tasks: dict[str, LinearTask], modules: dict[str, nn.Module]
    ) -> str | None:
        """Why a pair that could be scaled is not."""
        for name in fold.consumers:
            if name not in tasks:
                return f"{name} reads the same tensor and stays dense"
            if tasks[name].grid.is_plain:
                return f"{name} reads the same tensor and is not rounded"
            if step.for_linear(name) is None:
                return f"{name} reads the same tensor and is no target of {step.name}"
        if fold.offset is None and fold.producer not in tasks:
            return f"{fold.producer}, which makes its input, stays dense"
        changed = [f"{fold.producer}.{n}" for n, _ in modules[fold.producer].named_parameters(recurse=False)]
        for name in [*changed, *(f"{router}.weight" for router in fold.routers)]:
            if name not in self.model.sources:
                return f"{name} is stored in another form than it is used in"
        return None

    def _observe(self, block: nn.Module, index: int, streams: list[Stream], folds: list[Fold]) -> "list[_Channels]":
        """The inputs of each fold's consumers, from one forward of the block as it is."""
        linears = find_linears(block, self.model.block_names[index])
        found = {fold.consumers[0]: _Channels(len(fold.channels), self.model.device) for fold in folds}
        leaders = {fold.consumers[0]: linears[fold.consumers[0]] for fold in folds if not fold.joined}
        prefix = f"{self.model.block_names[index]}."
        makers = {fold.consumers[0]: fold.producer.removeprefix(prefix) for fold in folds if fold.joined}
        for stream in streams if folds else []:
            batch = stream.batch
            with contextlib.ExitStack() as stack:
                stack.enter_context(
                    watch_inputs(leaders, lambda name, x, batch=batch: found[name].add(x, batch.mask_of(x)))
                )
                outputs = {name: stack.enter_context(watch_output(block, maker)) for name, maker in makers.items()}
                self.model.call(block, index, stream)
            for name, [output] in outputs.items():
                found[name].add(output, batch.mask_of(output))
        for name, channels in found.items():
            channels.complete(self.processes, name)
        return list(found.values())

    def _choose(
        self,
        step: Smoother,
        fold: Fold,
        channels: "_Channels",
        block: nn.Module,
        index: int,
        modules: dict[str, nn.Module],
    ) -> tuple[dict[str, Any], Tensor | None]:
        """
        The report of a pair, and the best factors for the producer's channels unless none are better.

        All candidates are compared by rounding to nearest: by the error of the linears' own output with the scales of the
        grid as they come, and then the best few with these searched, and, where that output does not go into the
        residual as it is, by the error of the block's. A step with error feedback rounds in another way, so the
        best of them must then beat leaving everything as it is once more, by the step that will round.
        """
        linears = {n: m for n, m in modules.items() if n in fold.consumers and isinstance(m, Linear)}
        weights = {name: get_weight(linear) for name, linear in linears.items()}
        used, rows = fold.used, sum(len(weight) for weight in weights.values())
        mean = torch.stack([weight.abs().sum(0) for weight in weights.values()]).sum(0) / rows
        peak = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
        magnitudes = Magnitudes(
            fold.gathered(channels.mean, "mean")[used],
            fold.gathered(channels.peak, "amax")[used],
            fold.gathered(mean, "mean")[used],
            fold.gathered(peak, "amax")[used],
        )
        ratios, factors = [None], [torch.ones(fold.width, device=used.device)]
        for ratio, scales in step.for_linear(fold.consumers[0]).candidates(magnitudes):
            ratios.append(ratio)
            factors.append(torch.ones_like(factors[0]).masked_scatter(used, scales))
        spread = [fold.spread(scales) for scales in factors]
        if step.rounds_inputs:
            losses = migration_losses(torch.cat(list(weights.values())), spread, channels.peak, channels.squares)
        else:
            losses = self._output_losses(weights, spread, channels, index, searches=False).nan_to_num(nan=float("inf"))
            last = sorted({0, *losses.argsort(stable=True)[:FINALISTS].tolist()})  # and none at all
            few = [spread[number] for number in last]
            if fold.offset is None:
                found = self._output_losses(weights, few, channels, index, searches=True)
            else:
                found = self._block_losses(weights, linears, few, channels, block, index, self._nearest)
            losses = torch.full_like(losses, float("inf")).scatter(0, torch.tensor(last, device=losses.device), found)
        losses = losses.nan_to_num(nan=float("inf"))
        best = int(losses.argmin())
        if losses[best] < losses[0] and not step.rounds_inputs:
            duel = [spread[0], spread[best]]
            if fold.offset is None:
                losses = self._solved_losses(weights, duel, channels, index)
            else:
                losses = self._block_losses(weights, linears, duel, channels, block, index, self._solved)
            best, factors, ratios = int(losses[1] < losses[0]), [factors[0], factors[best]], [None, ratios[best]]
        if not losses[best] < losses[0]:
            return _report(step, fold.consumers, fold, reason="no factors are better than none"), None
        gain = 1 - (losses[best] / losses[0]).item()
        return _report(step, fold.consumers, fold, ratio=ratios[best], gain=gain), factors[best]

    def _nearest(self, task: LinearTask, weight: Tensor, scales: Tensor, channels: "_Channels") -> Tensor:
        """A weight rounded to nearest under factors, seen with unscaled inputs."""
        return round_scaled(weight, scales, channels.squares, task.grid, task.scale_dtype, task.searches)

    def _solved(self, task: LinearTask, weight: Tensor, scales: Tensor, channels: "_Channels") -> Tensor:
        """The same, rounded by the step itself."""
        scaled = channels.scaled(scales)
        quantized, _ = task.settings.quantize(weight * scales, scaled, task.grid, task.scale_dtype, task.name)
        return quantized.dequantize() / scales

    def _output_losses(
        self, weights: dict[str, Tensor], spread: list[Tensor], channels: "_Channels", index: int, searches: bool
    ) -> Tensor:
        """The error of the linears' own output; `searches` lets the grid's scales be searched where the task has it so."""
        tasks = self.plan.blocks[index]
        settings = [
            (w, tasks[n].grid, tasks[n].scale_dtype, searches and tasks[n].searches) for n, w in weights.items()
        ]
        losses = [gram_losses(w, spread, channels.gram, grid, dtype, search) for w, grid, dtype, search in settings]
        return torch.stack(losses).sum(0)

    def _solved_losses(
        self, weights: dict[str, Tensor], spread: list[Tensor], channels: "_Channels", index: int
    ) -> Tensor:
        """The same error, with the weights rounded by the step itself."""
        losses = torch.zeros(len(spread), dtype=torch.float64)
        for number, scales in enumerate(spread):
            for name, weight in weights.items():
                off = self._solved(self.plan.blocks[index][name], weight, scales, channels) - weight
                losses[number] += (off @ channels.gram).mul_(off).sum(dtype=torch.float64).cpu()
        return losses

    def _block_losses(
        self,
        weights: dict[str, Tensor],
        linears: dict[str, Linear],
        spread: list[Tensor],
        channels: "_Channels",
        block: nn.Module,
        index: int,
        rounded: "Callable[[LinearTask, Tensor, Tensor, _Channels], Tensor]",
    ) -> Tensor:
        """The error of the block's output on the chosen rows: what makes the input stays as it is, and the weights are
        what their rounding makes of them, seen with unscaled inputs."""
        losses = torch.zeros(len(spread), dtype=torch.float64)
        expected = [self.model.call(block, index, stream) for stream in self.streams]
        for number, scales in enumerate(spread if expected else []):
            for name, linear in linears.items():
                set_weight(linear, rounded(self.plan.blocks[index][name], weights[name], scales, channels))
            for stream, output in zip(self.streams, expected, strict=True):
                change = self.model.call(block, index, stream) - output
                off = flat_tokens(change, stream.batch.mask_of(change))
                losses[number] += off.square().sum(dtype=torch.float64).cpu()
        for name, linear in linears.items():
            set_weight(linear, weights[name])
        return self.processes.sum(losses.to(self.model.device)).cpu()


class _Channels:
    """What [`Statistics`] tells of an input, and the mean and the largest magnitude of each of its channels."""

    def __init__(self, in_features: int, device: torch.device):
        self.statistics = Statistics(in_features, device)
        self.mean = torch.zeros(in_features, device=device)
        self.peak = torch.zeros_like(self.mean)
        self._scaled: tuple[Tensor, Statistics] | None = None

    @property
    def gram(self) -> Tensor:
        return self.statistics.gram

    @property
    def squares(self) -> Tensor:
        return self.statistics.gram.diagonal()

    @property
    def tokens(self) -> int:
        return self.statistics.tokens

    def scaled(self, scales: Tensor) -> Statistics:
        """What is known of the inputs divided by `scales`; one for all linears, so that they share a factor."""
        if self._scaled is None or self._scaled[0] is not scales:
            statistics = Statistics(len(scales), scales.device)
            statistics.gram, statistics.tokens = self.gram / scales / scales[:, None], self.tokens
            self._scaled = scales, statistics
        return self._scaled[1]

    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        self.statistics.add(inputs, mask)
        magnitude = flat_tokens(inputs, mask).abs()
        self.mean += magnitude.sum(0)
        if len(magnitude):
            self.peak = torch.maximum(self.peak, magnitude.amax(0))

    def complete(self, processes: Processes, name: str) -> None:
        self.statistics.complete(processes, name)
        self.mean = processes.sum(self.mean).div_(max(self.tokens, 1))
        peaks = self.peak.new_zeros(processes.count, len(self.peak))
        peaks[processes.rank] = self.peak  # a maximum by a sum: each process fills its own row
        self.peak = processes.sum(peaks).amax(0)


def _report(
    step: Smoother,
    consumers: tuple[str, ...],
    fold: Fold | None,
    ratio: float | None = None,
    gain: float = 0.0,
    reason: str | None = None,
) -> dict[str, Any]:
    """`gain` is the share of the error that is forecast to vanish; `reason` says why a pair was left alone."""
    return {
        "step": step.name,
        "producer": None if fold is None else fold.producer,
        "consumers": list(consumers),
        "ratio": ratio,
        "gain": gain,
        "left_alone": reason,
    }
