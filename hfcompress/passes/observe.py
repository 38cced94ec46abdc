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
"""The inputs of every group of linears in a block, each group seeing those before it already compressed.

Two ways, same numbers. *Suspended*: each batch's forward runs in a greenlet and is halted where a group of linears is
about to run; when all batches have arrived, the group is solved, its new weights are put in, and all go on. One
forward per block, paid for with the frames of the halted forwards. *Recomputed*: for each group the forward is run
again up to that group and given up there; little memory, one forward more per group. Experts do not hear of one another, so
that what all of them read is seen in one forward, and what all of them read behind that in another.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import greenlet
from torch import Tensor, nn

from hfcompress.models.experts import ExpertLinear
from hfcompress.models.roles import watch_inputs


Call = Callable[[int], Tensor]
Seen = Callable[[int, int, Any, Any], None]
Solve = Callable[[int], None]
Finished = Callable[[int, int, Tensor], None]


def walk_suspended(
    leaders: Sequence[Mapping[str, nn.Module]],
    calls: Sequence[Call],
    count: int,
    seen: Seen,
    solve: Solve,
    finished: Finished | None,
) -> None:
    """
    Args:
        leaders (`list[dict[str, nn.Module]]`): for the block, and for its dense twin if there is one, the first
            linear of every group in the order in which they run.
        calls (`list[Call]`): for each of them, `call(i)` runs the forward of batch `i` and returns its output.
        count (`int`): number of batches.
        seen (`Seen`): called with (group, batch, input, dense twin's input or `None`); of a module with several
            inputs it is told the tuple.
        solve (`Solve`): called with a group when all batches have been seen; changes its weights.
        finished (`Finished`, *optional*): called with (which call, batch, output of the block); without it the forwards
            end at the last group.
    """
    main = greenlet.getcurrent()
    running = [[greenlet.greenlet(call) for _ in range(count)] for call in calls]
    names = list(leaders[0])

    def halt(name: str, inputs: Any) -> None:
        main.switch((name, inputs))

    def advance(which: int, batch: int, first: bool) -> Any:
        return running[which][batch].switch(*((batch,) if first else ()))

    with _watching(leaders, halt):
        for group, name in enumerate(names):
            for batch in range(count):
                arrived = [advance(which, batch, group == 0) for which in range(len(calls))]
                _require(all(a[0] == name for a in arrived), name)
                seen(group, batch, arrived[0][1], arrived[1][1] if len(arrived) > 1 else None)
                del arrived
            solve(group)
        if finished is None:
            return
        for batch in range(count):
            for which in range(len(calls)):
                finished(which, batch, advance(which, batch, not names))
                running[which][batch] = None


def walk_recomputed(
    leaders: Sequence[Mapping[str, nn.Module]],
    calls: Sequence[Call],
    count: int,
    seen: Seen,
    solve: Solve,
    finished: Finished | None,
) -> None:
    """The same as [`walk_suspended`], by running the forward again for every group, or for those that go together."""
    numbers = {name: group for group, name in enumerate(leaders[0])}
    for stage in stages(leaders[0]):
        for batch in range(count):
            arrived = [
                _run_until({name: own[name] for name in stage}, call, batch)
                for own, call in zip(leaders, calls, strict=True)
            ]
            for name in stage:
                seen(numbers[name], batch, arrived[0].pop(name), arrived[1].pop(name) if len(arrived) > 1 else None)
            del arrived
        for name in stage:
            solve(numbers[name])
    if finished is None:
        return
    for batch in range(count):
        for which, call in enumerate(calls):
            finished(which, batch, call(batch))


def stages(leaders: Mapping[str, nn.Module]) -> list[list[str]]:
    """
    Which groups need no other to be solved before them: the same linear of all experts of a block, and every other alone.

    Args:
        leaders (`dict[str, nn.Module]`): the first linear of every group in the order in which they run.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, module in leaders.items():
        expert, _, local = name.rpartition(".")
        key = (expert.rpartition(".")[0], local) if isinstance(module, ExpertLinear) else (name, "")
        found.setdefault(key, []).append(name)
    return list(found.values())


class _Reached(Exception):
    """A forward has come to where its input was wanted."""


def _run_until(linears: Mapping[str, nn.Module], call: Call, batch: int) -> dict[str, Any]:
    """The inputs of all these linears; the forward is given up where it has come to the last of them."""
    found: dict[str, Any] = {}

    def stop(name: str, inputs: Any) -> None:
        found[name] = inputs
        if len(found) == len(linears):
            raise _Reached

    with watch_inputs(linears, stop):
        try:
            call(batch)
        except _Reached:
            return found
    raise RuntimeError("a linear that ran in the probe did not run in the forward")


def _watching(leaders: Sequence[Mapping[str, nn.Module]], seen: Callable[[str, Any], None]):
    stack = contextlib.ExitStack()
    for own in leaders:
        stack.enter_context(watch_inputs(own, seen))
    return stack


def _require(in_order: bool, name: str) -> None:
    if not in_order:
        raise RuntimeError(f"the forwards of a block reached its linears in different orders, at {name}")
