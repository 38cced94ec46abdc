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
"""What a group of linears that read the same tensor knows of its inputs: one Gram matrix, one factor, their range."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, groupby

import torch
from torch import Tensor

from hfcompress.errors import CalibrationError
from hfcompress.models.experts import Routed
from hfcompress.passes.processes import Processes
from hfcompress.solvers.gptq import Factor, NotPositiveDefiniteError, factorize
from hfcompress.solvers.observers import Histogram
from hfcompress.solvers.shift import capped, shift_strength, target_shift


PANEL, WIDE_PANEL = 256, 2048  # columns of a Gram matrix that are computed together: on a CPU, on a GPU
SHOWN_WEIGHT = 0.25  # tokens that those an expert is only shown count for, for every input of its linears
GATE_POWER = 1.0  # of gates, that the inputs of an expert are weighed by
TRIED_ROWS = 512  # of a weight, which say what share of a correction helps


class Statistics:
    """
    Sums over the calibration tokens that have passed so far.

    Args:
        in_features (`int`): width of the input.
        device (`torch.device`): where the sums live.
        cross (`bool`): also keep `(X_dense - X)^T X`.
        ranges (`bool`): also count the magnitudes of the inputs.
        dense_features (`int`): width of the dense model's input where that is another one; what both are together is
            then kept too.

    Attributes:
        gram (`Tensor`): `X^T X / tokens`, float32 `(in_features, in_features)`, after [`Statistics.complete`].
        cross (`Tensor` or `None`): `(X_dense - X)^T X / tokens`, likewise.
        joint (`Tensor` or `None`): `X_dense^T X / tokens`, `(dense_features, in_features)`.
        dense_gram (`Tensor` or `None`): `X_dense^T X_dense / tokens`, `(dense_features, dense_features)`.
        magnitudes (`Histogram` or `None`): of the inputs.
        held_out (`Statistics` or `None`): of those of the tokens on which what follows from the others is judged; kept
            together with `cross`.
        tokens (`int`): tokens seen, padding left out; of an expert, those that were sent to it.

    For an expert the sums are weighted by the squares of the gates, which is what an error of its output counts for; and the
    mean over the tokens that it is only shown is mixed in, the more the fewer were sent to it, so that an expert that saw few
    or none is solved for what its block is like.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        cross: bool = False,
        ranges: bool = False,
        dense_features: int = 0,
    ):
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.cross = torch.zeros_like(self.gram) if cross else None
        self.joint = torch.zeros(dense_features, in_features, device=device) if dense_features else None
        self.dense_gram = torch.zeros(dense_features, dense_features, device=device) if dense_features else None
        self.held_out: Statistics | None = None
        self.magnitudes = Histogram.empty(device) if ranges else None
        self.tokens = 0
        self._excess = 0.0  # what the sums are divided by, over the number of tokens
        self._shown: Statistics | None = None  # tokens that were not sent to the expert
        self._factors: dict[tuple[float, bool], Factor] = {}
        self._processes: Processes | None = None

    @classmethod
    def even(cls, in_features: int, device: torch.device) -> "Statistics":
        """Those under which every column counts the same, for what token ids look up."""
        found = cls(in_features, device)
        found.gram.fill_diagonal_(1.0)
        found.tokens = 1
        return found

    def add(
        self,
        inputs: Tensor | Routed,
        mask: Tensor | None,
        dense_inputs: Tensor | Routed | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        """
        Add the inputs of one batch.

        Args:
            inputs (`Tensor` or `Routed`): `(rows, seq_len, in_features)`, or what an expert is given of such a batch.
            mask (`Tensor` or `None`): bool `(rows, seq_len)`, false on padding.
            dense_inputs (`Tensor`, `Routed` or `None`): what the dense model's linear receives for the same tokens; where an
                expert of the dense model was not sent one of them, its input is taken to be the same.
            held_out (`Tensor` or `None`): bool `(rows,)`: rows that are also kept by themselves, to judge by.
        """
        if isinstance(inputs, Routed):
            self._add_routed(inputs.kept(mask), dense_inputs, held_out)
            return
        assert not isinstance(dense_inputs, Routed)
        if self.magnitudes is not None:
            self.magnitudes = self.magnitudes.add(flat_tokens(inputs, mask))
        if self.cross is not None and held_out is not None and dense_inputs is not None and held_out.any():
            self.held_out = self.held_out or Statistics(len(self.gram), self.gram.device, cross=True)
            start = 0
            for held, run in groupby(held_out.tolist()):  # in slices, which copy nothing
                rows = slice(start, start := start + len(list(run)))
                own = self.held_out if held else self
                own._add(inputs[rows], None if mask is None else mask[rows], dense_inputs[rows])
        else:
            self._add(inputs, mask, dense_inputs)

    def _add_routed(self, inputs: Routed, dense_inputs: Tensor | Routed | None, held_out: Tensor | None) -> None:
        if self._shown is None:
            self._shown = Statistics(len(self.gram), self.gram.device)
        self._shown._add(inputs.beside, None, None)
        sent = inputs.sent
        gates = sent.gates.float()[:, None] ** GATE_POWER
        x, dense = sent.inputs.float(), None
        if self.cross is not None and isinstance(dense_inputs, Routed):
            theirs, known = dense_inputs.sent.of(sent)
            dense = torch.where(known[:, None], theirs.float(), x) * gates
        weighed = x * gates
        apart = [torch.ones(len(sent), dtype=torch.bool, device=gates.device)]
        if dense is not None and held_out is not None and held_out.any():
            held = held_out.to(gates.device)[sent.tokens // (inputs.total // len(held_out))]
            apart = [~held, held]
            self.held_out = self.held_out or Statistics(len(self.gram), self.gram.device, cross=True)
        for own, chosen in zip((self, self.held_out), apart, strict=False):
            assert own is not None
            own._add(weighed[chosen], None, None if dense is None else dense[chosen])
            own._excess += (gates[chosen].square() - 1).sum().item()

    def _add(self, inputs: Tensor, mask: Tensor | None, dense_inputs: Tensor | None) -> None:
        raw = _tokens(inputs, mask)
        exact = sums_in_float32(raw.device, raw.dtype)
        x = raw if exact and self.cross is None and self.joint is None else raw.float()
        _add_gram(self.gram, raw if exact else x)
        if self.cross is not None and dense_inputs is not None:
            self.cross.addmm_((flat_tokens(dense_inputs, mask) - x).T, x)
        if self.joint is not None and self.dense_gram is not None and dense_inputs is not None:
            dense = flat_tokens(dense_inputs, mask)
            self.joint.addmm_(dense.T, x)
            _add_gram(self.dense_gram, dense)
        self.tokens += len(x)

    def complete(self, processes: Processes, name: str) -> None:
        """
        Sum over the processes and divide by the tokens.

        Raises:
            CalibrationError: an input holds NaN or infinity.
        """
        self._processes = processes
        judge = self.held_out
        if judge is not None and self.cross is not None and judge.cross is not None:
            self.gram += judge.gram
            self.cross += judge.cross
            self.tokens += judge.tokens
            self._excess += judge._excess
        self._average(processes)
        if not torch.isfinite(self.gram).all():
            raise CalibrationError(
                f"The input of {name} holds NaN or infinity, or its squares overflow; try --dtype float32, and check "
                "that the model works on this calibration data."
            )
        if self.cross is not None:
            judge = self.held_out or Statistics(len(self.gram), self.gram.device, cross=True)
            judge._average(processes)  # this process may hold no such row, and others some
            self.held_out = judge if judge.tokens else None
        if processes.max(torch.tensor(float(self._shown is not None), device=self.gram.device)):
            self._mix_in(self._shown or Statistics(len(self.gram), self.gram.device), processes)

    def _mix_in(self, shown: "Statistics", processes: Processes) -> None:
        """What an expert would be given of any token of its block, for as many tokens as say little of so many inputs."""
        shown._average(processes)
        weight = SHOWN_WEIGHT * len(self.gram)
        share = weight / (self.tokens + weight) if shown.tokens else 0.0
        self.gram.mul_(1 - share).add_(shown.gram, alpha=share)
        if self.cross is not None:
            self.cross *= 1 - share

    def _average(self, processes: Processes) -> None:
        self.tokens = int(processes.sum(torch.tensor(self.tokens, device=self.gram.device)).item())
        self._excess = processes.sum(torch.tensor(self._excess, device=self.gram.device)).item()
        self.gram = self._symmetric_mean(self.gram, processes)
        if self.cross is not None:
            self.cross = processes.sum(self.cross).div_(self._mass or 1)
        if self.joint is not None and self.dense_gram is not None:
            self.joint = processes.sum(self.joint).div_(self._mass or 1)
            self.dense_gram = self._symmetric_mean(self.dense_gram, processes)
        if self.magnitudes is not None:
            self.magnitudes = over_all(self.magnitudes, processes)

    @property
    def _mass(self) -> float:
        """What the sums are divided by: how many tokens they are of, or the sum of the squares of their gates."""
        return self.tokens + self._excess

    def _symmetric_mean(self, gram: Tensor, processes: Processes) -> Tensor:
        """Of sums whose lower triangle is filled in."""
        mean = processes.sum(torch.tril(gram)).div_(self._mass or 1)
        return mean.add_(torch.tril(mean, -1).T)

    def target(self, weight: Tensor, damping: float, act_order: bool, name: str, most: float) -> tuple[Tensor, float]:
        """
        What a weight is rounded towards, so that it makes up for what was lost before it.

        How the inputs differ from the dense model's is summed over the tokens that are not held out, the correction that
        follows is weighed on those that are, in a few rows of the weight, and then it is taken from all of them. Without
        held-out rows half of it is taken.

        Args:
            weight (`Tensor`): `(out_features, in_features)` float32.
            damping (`float`): of the factors.
            act_order (`bool`): of the factors.
            name (`str`): the linears, for messages.
            most (`float`): the largest share of the correction that may be taken.

        Returns:
            `tuple[Tensor, float]`: the target, and the share that was taken.
        """
        if self.cross is None or not most or not torch.count_nonzero(self.cross):
            return weight, 0.0
        share = most / 2
        judge = self.held_out
        if judge is not None and judge.cross is not None and judge.tokens < self.tokens:
            few = weight[:: max(1, len(weight) // TRIED_ROWS)]
            cross = torch.sub(self.cross, judge.cross, alpha=judge._mass / self._mass)
            cross *= self._mass / (self._mass - judge._mass)
            trial = target_shift(few, cross, self.factor(damping, act_order, name))
            share = shift_strength(few, trial, judge.gram, judge.cross, most)
        if not share:
            return weight, 0.0
        shift = target_shift(weight, self.cross, self.factor(damping, act_order, name))
        return weight + capped(share * shift, weight), share

    def in_parts(
        self, solve: Callable[[slice, slice], Sequence[Tensor | None]], rows: int, blocks: Sequence[int] | None = None
    ) -> list[Tensor | None]:
        """
        Let every process solve a part of a weight's rows, and put them together.

        Args:
            solve (`Callable`): is told some of the rows, and which blocks these are; gives tensors of these rows, or `None`.
            rows (`int`): of the weight.
            blocks (`Sequence[int]`, *optional*): of rows that depend on one another, how many they are; without it none do.
        """
        processes = self._processes
        if processes is None:
            return list(solve(slice(0, rows), slice(None)))
        shares = processes.shares(rows, blocks)
        ends = range(rows + 1) if blocks is None else [0, *accumulate(blocks)]
        parts = [slice(ends[share.start], ends[share.stop]) for share in shares]
        if parts[0] == slice(0, rows) == parts[-1]:
            return list(solve(parts[0], shares[0]))
        counts = [part.stop - part.start for part in parts]
        share = shares[processes.rank]
        if share.start == share.stop:  # there are fewer blocks than processes: one is solved for its shape
            share = slice(0, 1)
        own = solve(slice(ends[share.start], ends[share.stop]), share)
        count = counts[processes.rank]
        return [None if each is None else processes.together(each[:count], counts) for each in own]

    def factor(self, damping: float, act_order: bool, name: str) -> Factor:
        """The factor of the Gram matrix, computed once for each setting."""
        key = (damping, act_order)
        if key not in self._factors:
            try:
                self._factors[key] = factorize(self.gram, damping, act_order)
            except NotPositiveDefiniteError as error:
                raise CalibrationError(
                    f"The inputs of {name} could not be factored at any damping; calibrate on more, or other, data."
                ) from error
        return self._factors[key]


def over_all(histogram: Histogram, processes: Processes) -> Histogram:
    """What all processes have seen."""
    return Histogram(processes.sum(histogram.counts), processes.max(histogram.largest))


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """
    `gram += x^T x`, in panels of columns and only from the diagonal down: the upper part follows by symmetry. Where `x` is
    of 16 bits, the products are exact in float32, and the device adds them up in it.
    """
    panel = PANEL if x.device.type == "cpu" else WIDE_PANEL
    for start in range(0, gram.shape[0], panel):
        stop = start + panel
        rows, columns = x[:, start:].T, x[:, start:stop]
        if x.dtype == gram.dtype:
            gram[start:, start:stop].addmm_(rows, columns)
        else:
            gram[start:, start:stop] += torch.mm(rows, columns, out_dtype=gram.dtype)


@cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of 16 bits into a float32 one; a CPU does not."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool((torch.mm(ones, ones, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError):  # no such kernel, or a torch that knows no out_dtype
        return False


def flat_tokens(inputs: Tensor | Routed, mask: Tensor | None) -> Tensor:
    """The tokens of a batch, or those of it that were sent to an expert, as float32 rows, padding left out."""
    if isinstance(inputs, Routed):
        return inputs.kept(mask).sent.inputs.float()
    return _tokens(inputs, mask).float()


def _tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The same in the dtype that they have."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return flat if mask is None else flat[mask.reshape(-1).to(flat.device)]
