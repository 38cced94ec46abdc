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
again up to that group and given up there; little memory, one forward more per group.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import greenlet
from torch import Tensor, nn

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
    """The same as [`walk_suspended`], by running the forward again for every group."""
    for group, name in enumerate(leaders[0]):
        for batch in range(count):
            arrived = [_run_until(own[name], call, batch) for own, call in zip(leaders, calls, strict=True)]
            seen(group, batch, arrived[0], arrived[1] if len(arrived) > 1 else None)
            del arrived
        solve(group)
    if finished is None:
        return
    for batch in range(count):
        for which, call in enumerate(calls):
            finished(which, batch, call(batch))


class _Reached(Exception):
    """A forward has come to where its input was wanted."""


def _run_until(linear: nn.Module, call: Call, batch: int) -> Any:
    found = []

    def stop(name: str, inputs: Any) -> None:
        found.append(inputs)
        raise _Reached

    with watch_inputs({"": linear}, stop):
        try:
            call(batch)
        except _Reached:
            return found[0]
    raise RuntimeError("a linear that ran in the probe did not run in the forward")


def _watching(leaders: Sequence[Mapping[str, nn.Module]], seen: Callable[[str, Any], None]):
    stack = contextlib.ExitStack()
    for own in leaders:
        stack.enter_context(watch_inputs(own, seen))
    return stack


def _require(in_order: bool, name: str) -> None:
    if not in_order:
        raise RuntimeError(f"the forwards of a block reached its linears in different orders, at {name}")
