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
Who feeds whom in a block: pairs of a producer and the linears that read what it produces, between which a factor per
channel can be moved without changing what the block computes. Discovered on the running block, and each one proven.

How it works. A copy of the block runs on a few tokens in float32, with a factor of one on every output channel of every
linear and norm. Where such a factor comes out as the same factor on some channels of a linear's input, the derivative
of the input's (arbitrarily weighted) squares by it is the number of these channels, whatever the weights: a row of
`v_proj` under grouped queries gives the queries per group, one of `up_proj` gives one, one of `gate_proj` no whole
number. Which channels they are is read off two more forwards, in which the factors spell the digits of the channel's
number. What was found is then tried: with random factors divided out of the producer's parameters and multiplied into
its readers' columns, the block must give what it gave before. So whatever else reads the producer, and whatever form
it keeps its gain in, a pair that would change the block is never used. In a mixture a norm feeds all experts and the router
that mostly chooses among them; these are tried as one, the router's columns taking the factors too.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfcompress.models.experts import ExpertLinear, Routed, find_routers
from hfcompress.models.roles import Linear, watch_inputs
from hfcompress.models.streaming import Stream, StreamedModel


TOLERANCE = 1e-4  # of what the block adds to its input; float32 leaves about 1e-6
TRIALS = 3
LARGEST = 4.0  # factors tried lie between 1 / LARGEST and LARGEST
WHOLE = 1e-2  # how close to a whole number a derivative must come
SAME = 1e-3  # how constant over the tokens a factor must be


@dataclass(frozen=True, eq=False)
class Fold:
    """
    A producer and its readers.

    Args:
        producer (`str`): full name of a norm or a linear.
        consumers (`tuple[str, ...]`): full names of the linears that read the tensor.
        channels (`Tensor`): int64 `(in_features,)`: for each channel of that tensor the producer's output channel that
            it is proportional to; -1 where there is none that could be seen. Such a channel is never scaled.
        width (`int`): output channels of the producer.
        offset (`float` or `None`): of a norm whose gain is `weight + offset` (0, or 1 where the weight is stored minus
            one); `None` for a linear.
        joined (`bool`): whether the consumers are those of several groups, which see different tokens of the tensor: experts.
        routers (`tuple[str, ...]`): full names of what else reads the tensor, with weights `(rows, in_features)` that are not
            rounded.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: Tensor
    width: int
    offset: float | None = None
    joined: bool = False
    routers: tuple[str, ...] = ()

    @property
    def used(self) -> Tensor:
        """Bool `(width,)`: the producer's channels that feed the consumers; only these are ever scaled."""
        used = torch.zeros(self.width, dtype=torch.bool, device=self.channels.device)
        used[self.channels[self.channels >= 0]] = True
        return used

    def spread(self, factors: Tensor) -> Tensor:
        """Factors of the producer's channels `(width,)` as factors of the consumers' inputs `(in_features,)`."""
        spread = factors[self.channels.clamp(min=0)]
        return torch.where(self.channels >= 0, spread, torch.ones_like(spread))

    def gathered(self, values: Tensor, reduce: str) -> Tensor:
        """
        Values of the consumers' inputs `(in_features,)` as one per channel of the producer `(width,)`: the `"mean"` or
        the `"amax"` over all that it feeds; zero where it feeds none.
        """
        fed = self.channels >= 0
        found = values.new_zeros(self.width)
        return found.scatter_reduce(0, self.channels[fed], values[fed], reduce, include_self=False)


@torch.no_grad()
def find_folds(
    model: StreamedModel, block: nn.Module, index: int, probe: Stream, groups: Sequence[Sequence[str]]
) -> tuple[list[Fold], dict[tuple[str, ...], str]]:
    """
    Args:
        model (`StreamedModel`): the model.
        block (`nn.Module`): its block `index`, with weights; it is left as it is.
        index (`int`): which block.
        probe (`Stream`): a few rows of tokens.
        groups (`list[list[str]]`): all linears of the block, in groups that share an input
            ([`hfcompress.models.roles.shared_inputs`]).

    Returns:
        `tuple[list[Fold], dict[tuple[str, ...], str]]`: the folds that leave the block's output as it was, in the order
        in which their consumers run; and for each other group why it has none.
    """
    trial = BlockTrial(model, block, index, probe)
    fan_out = trial.fan_out([group[0] for group in groups])
    folds, alone = [], {}
    for group in groups:
        reason = "nothing in the block makes its input channel by channel"
        for producer, counts in reversed(fan_out[group[0]].items()):
            fold, said = trial.fold(producer, counts, group)
            reason = said or reason
            if fold is not None:
                folds.append(fold)
                break
        else:
            alone[tuple(group)] = reason
    for fold in trial.folds_of_experts(groups, alone, fan_out):
        folds.append(fold)
        for group in [group for group in alone if set(group) <= {*fold.consumers, *fold.routers}]:
            del alone[group]
    return folds, alone


@torch.no_grad()
def error_of(model: StreamedModel, block: nn.Module, index: int, probe: Stream, fold: Fold) -> float:
    """
    The largest change of the block's output over several trials with random factors, relative to what the block adds
    to its input (root of the sum of squares of each).
    """
    return BlockTrial(model, block, index, probe).error(fold)


def apply_fold(
    fold: Fold,
    modules: Mapping[str, nn.Module],
    scales: Tensor,
    rounded: Callable[[str, Tensor], Tensor] = lambda name, values: values,
) -> set[str]:
    """
    Divide the producer's output channels by `scales` and multiply its readers' columns by them, in place.

    A norm's gain is rounded first, and its readers take the quotient of the old gain and the rounded one, so that the
    rounding changes nothing; where it would leave no gain, the channel stays as it is.

    Args:
        fold (`Fold`): the pair.
        modules (`Mapping[str, nn.Module]`): full name -> module, with weights.
        scales (`Tensor`): `(width,)`, above zero; what stands at channels that feed no consumer is left out.
        rounded (`Callable`, *optional*): gives the values of a parameter, by its full name, as they will be stored.

    Returns:
        `set[str]`: full names of the parameters that changed.
    """
    producer = modules[fold.producer]
    weight, bias = _weight(producer), producer._parameters.get("bias")
    scales = scales.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    scales = torch.where(fold.used, scales, torch.ones_like(scales))
    changed = {f"{fold.producer}.weight"}
    if fold.offset is None:
        _by_output(producer).div_(scales[:, None])
    else:
        gain = weight.to(scales.dtype) + fold.offset
        new = rounded(f"{fold.producer}.weight", gain / scales - fold.offset).to(weight.dtype)
        quotient = gain / (new.to(scales.dtype) + fold.offset)
        usable = (quotient > scales / 2) & (quotient < scales * 2)
        weight.copy_(torch.where(usable, new, weight))
        scales = torch.where(usable, quotient, torch.ones_like(scales))
    if bias is not None:
        changed.add(f"{fold.producer}.bias")
        bias.data.copy_(rounded(f"{fold.producer}.bias", bias.data.to(scales.dtype) / scales))
    for name in fold.consumers:
        _by_input(modules[name]).mul_(fold.spread(scales)[:, None])
        changed.add(f"{name}.weight")
    for name in fold.routers:
        router = _weight(modules[name])
        router.copy_(rounded(f"{name}.weight", router * fold.spread(scales)).to(router.dtype))
        changed.add(f"{name}.weight")
    return changed


class BlockTrial:
    """A float32 copy of a block, a few tokens, and what can be learnt by running the one on the other."""

    def __init__(self, model: StreamedModel, block: nn.Module, index: int, probe: Stream):
        self.model, self.index, self.prefix = model, index, model.block_names[index]
        self.block = copy.deepcopy(block).requires_grad_(False)
        self.block.to(torch.promote_types(model.dtype, torch.float32))
        dtype = next(self.block.parameters()).dtype
        calls = [((), {})] * len(probe.calls)
        calls[index] = _cast(probe.calls[index], dtype)
        self.stream = replace(probe, held=probe.hidden.to(dtype), calls=calls)
        self.modules = {f"{self.prefix}.{n}": m for n, m in self.block.named_modules()}
        self.producers = {n: m for n, m in self.modules.items() if _width(m)}

    def run(
        self, leaders: Sequence[str] = (), taps: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The block's output, and the inputs of some linears as `(tokens, in_features)`, with factors on outputs."""
        inputs: dict[str, Tensor | Routed] = {}
        taps = taps or {}
        handles = [self.modules[name].register_forward_hook(_times(tap)) for name, tap in taps.items()]
        try:
            with watch_inputs({n: self.modules[n] for n in leaders}, lambda n, x: inputs.__setitem__(n, x)):
                output = self.model.call(self.block, self.index, self.stream)
        finally:
            for handle in handles:
                handle.remove()
        return output, {name: _flat(x) for name, x in inputs.items()}

    def fan_out(self, leaders: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """For each leader's input: producer -> how many of its channels each output channel scales, 0 if it does not
        simply scale them; in the order in which the producers are defined."""
        generator = torch.Generator().manual_seed(0)
        weights = self.stream.hidden.dtype, self.stream.hidden.device
        taps = {n: torch.ones(_width(m), dtype=weights[0], device=weights[1]) for n, m in self.producers.items()}
        found: dict[str, dict[str, Tensor]] = {}
        with torch.enable_grad():
            for tap in taps.values():
                tap.requires_grad_(True)
            _, inputs = self.run(leaders, taps)
            for leader, x in inputs.items():
                seen = []
                for _ in range(2 if x.requires_grad else 0):
                    weighted = x.detach() * (torch.rand(x.shape, generator=generator) + 0.1).to(x)
                    weighted /= (weighted * x.detach()).sum(0).clamp(min=torch.finfo(x.dtype).tiny)
                    seen.append(
                        torch.autograd.grad((weighted * x).sum(), list(taps.values()), None, True, allow_unused=True)
                    )
                found[leader] = {
                    name: _whole(*counts)
                    for name, counts in zip(taps, zip(*seen, strict=True), strict=False)
                    if counts[0] is not None and _whole(*counts).any()
                }
        return found

    def fold(self, producer: str, counts: Tensor, group: Sequence[str]) -> tuple[Fold | None, str | None]:
        """The fold from `producer` to `group`, or why there is none; nothing to say if it is not where it comes from."""
        channels = self._channels(producer, counts, group[0])
        if 2 * int((channels >= 0).sum()) < len(channels):
            return None, None
        module, offset = self.modules[producer], None
        if not isinstance(module, Linear):
            offset = self._offset(producer)
            if offset is None:
                return None, f"the gain of {producer} is neither its weight nor its weight plus one"
        fold = Fold(producer, tuple(group), channels, len(counts), offset)
        error = self.error(fold)
        if not error <= TOLERANCE:
            return None, f"scaling {producer} changes the block's output by {error:.1g}: something else reads it"
        return fold, None

    def folds_of_experts(
        self,
        groups: Sequence[Sequence[str]],
        alone: Mapping[tuple[str, ...], str],
        fan_out: Mapping[str, Mapping[str, Tensor]],
    ) -> list[Fold]:
        """For every norm that feeds experts what reads it, as one fold: groups that are among those `alone`, and routers."""
        routers = [name for name in find_routers(self.model.skeleton) if name.startswith(f"{self.prefix}.")]
        found = []
        for producer, module in self.producers.items():
            whole = torch.arange(_width(module), device=self.stream.hidden.device)
            fed = [tuple(group) for group in groups if tuple(group) in alone and producer in fan_out[group[0]]]
            fed = [
                group
                for group in fed
                if torch.equal(self._channels(producer, fan_out[group[0]][producer], group[0]), whole)
            ]
            consumers = [name for group in fed for name in group if name not in routers]
            if isinstance(module, Linear) or not any(
                isinstance(self.modules[name], ExpertLinear) for name in consumers
            ):
                continue
            own = [name for name in routers if _weight(self.modules[name]).shape[1] == len(whole)]
            for beside in [own, []] if own else [own]:  # some routers read another norm
                fold = Fold(producer, tuple(consumers), whole, len(whole), self._offset(producer), True, tuple(beside))
                if fold.offset is not None and self.error(fold) <= TOLERANCE:
                    found.append(fold)
                    break
        return found

    def _channels(self, producer: str, counts: Tensor, leader: str) -> Tensor:
        """For each channel of the leader's input the producer's channel that scales it, or -1."""
        x = self.run([leader])[1][leader]
        base = math.isqrt(len(counts) - 1) + 1
        number = torch.arange(len(counts), device=x.device)
        alive = x.square().sum(0) > 0
        channels = torch.zeros_like(alive, dtype=torch.long)
        for digit, worth in ((number // base, base), (number % base, 1)):
            factors = torch.where(counts > 0, 1 + (digit + 1) / base, 1.0).to(x.dtype)
            scaled = self.run([leader], {producer: factors})[1][leader]
            ratio = (scaled * x).sum(0) / x.square().sum(0)
            read = ((ratio - 1) * base - 1).nan_to_num(-1).round()
            alive &= (scaled - ratio * x).norm(dim=0) <= SAME / base * x.norm(dim=0)
            alive &= (read >= 0) & (((ratio - 1) * base - 1 - read).abs() < 0.1)
            channels += worth * read.long()
        alive &= channels < len(counts)
        return torch.where(alive, channels, -1)

    def _offset(self, name: str) -> float | None:
        """What a norm adds to its weight to get its gain, seen by running it with other weights."""
        norm, seen = self.modules[name], []
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args))
        self.run()
        handle.remove()
        kept = {n: p.data for n, p in norm.named_parameters(recurse=False)}
        try:
            outputs = []
            for value in (0.0, 1.0):
                for n, parameter in norm.named_parameters(recurse=False):
                    parameter.data = torch.full_like(kept[n], value if n == "weight" else 0.0)
                outputs.append(norm(*seen[0]))
        finally:
            for n, parameter in norm.named_parameters(recurse=False):
                parameter.data = kept[n]
        slope = outputs[1] - outputs[0]
        offset = ((outputs[0] * slope).sum() / slope.square().sum()).item()
        return float(round(offset)) if abs(offset - round(offset)) < WHOLE and round(offset) in (0, 1) else None

    def error(self, fold: Fold) -> float:
        """
        See [`error_of`]; NaN if an output is not finite. Of experts it is the outputs of the consumers that count where they
        change more: the few tokens may not have been sent to them.
        """
        experts = [name for name in fold.consumers if isinstance(self.modules[name], ExpertLinear)]
        before = self.run()[0]
        apart = self._outputs(experts)
        added = (before - self.stream.hidden).norm()
        touched = [self.modules[name] for name in (fold.producer, *fold.consumers, *fold.routers)]
        kept = [[p.data.clone() for p in module.parameters(recurse=False)] for module in touched]
        generator, worst = torch.Generator().manual_seed(0), torch.zeros_like(added)
        for _ in range(TRIALS):
            scales = LARGEST ** (2 * torch.rand(fold.width, generator=generator) - 1)
            apply_fold(fold, self.modules, scales)
            worst = torch.maximum(worst, (self.run()[0] - before).norm())
            for was, now in zip(apart, self._outputs(experts), strict=True):
                worst = torch.maximum(worst, (now - was).norm() / was.norm() * added)
            for module, values in zip(touched, kept, strict=True):
                for parameter, value in zip(module.parameters(recurse=False), values, strict=True):
                    parameter.data.copy_(value)
        return (worst / added).item()

    def _outputs(self, experts: Sequence[str]) -> list[Tensor]:
        """What linears of experts make of all tokens that they are shown."""
        if not experts:
            return []
        inputs = self.run(experts)[1]
        return [inputs[name] @ _by_input(self.modules[name]) for name in experts]


def _flat(inputs: Tensor | Routed) -> Tensor:
    """`(tokens, in_features)`; of an expert those that it is shown, which are the same wherever tokens are sent."""
    return inputs.beside if isinstance(inputs, Routed) else inputs.reshape(-1, inputs.shape[-1])


def _times(tap: Tensor):
    def hook(module, args, output):
        return output * tap

    return hook


def _whole(first: Tensor, second: Tensor) -> Tensor:
    """The whole number that both derivatives are; 0 where they differ or are none."""
    count = first.round()
    same = ((first - count).abs() < WHOLE) & ((second - count).abs() < WHOLE) & (count > 0)
    return torch.where(same, count, 0).long()


def _width(module: nn.Module) -> int:
    """Output channels of a linear or of a module with a gain of its own; 0 for others."""
    weight = module._parameters.get("weight")
    if isinstance(module, Conv1D):
        return module.weight.shape[1]
    if weight is None or isinstance(module, nn.Embedding):
        return 0
    return weight.shape[0] if isinstance(module, nn.Linear) or weight.ndim == 1 else 0


def _weight(module: nn.Module) -> Tensor:
    """The values of a weight that is there."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.data


def _by_output(module: nn.Module) -> Tensor:
    """The weight of a linear as a view `(out_features, in_features)`."""
    return _weight(module).T if isinstance(module, Conv1D) else _weight(module)


def _by_input(module: nn.Module) -> Tensor:
    """The weight of a linear as a view `(in_features, out_features)`."""
    return _by_output(module).T


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in nested arguments in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value
