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
"""Which experts of a mixture it does best without: those that add least to what comes out of their block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.models.batch import Batch
from hfcompress.models.experts import find_experts
from hfcompress.models.fewer_experts import expert_groups
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.processes import Processes
from hfcompress.progress import Progress


@torch.no_grad()
def experts_to_keep(
    model: StreamedModel, count: int, batches: Sequence[Batch], processes: Processes, progress: Progress
) -> dict[str, list[int]]:
    """
    Experts with the highest mean norm of what they add to the stream, gate times output, over the tokens that are sent to
    them (REAP, arXiv 2510.13999); of every group that the router chooses from as many.

    Args:
        model (`StreamedModel`): the model.
        count (`int`): experts of a block that stay; a multiple of the groups.
        batches (`Sequence[Batch]`): this process's share of the calibration data.
        processes (`Processes`): who takes part; all choose the same.
        progress (`Progress`): is told of every block.

    Returns:
        `dict[str, list[int]]`: module that holds experts -> those that stay, ascending.
    """
    streams, groups = model.embed(list(batches)) if batches else [], expert_groups(model)
    kept = {}
    for index, block_name in enumerate(model.block_names):
        progress.step(f"choosing experts: block {index + 1} of {len(model)}", amount=0)
        with model.block(index) as block:
            holders = {f"{block_name}.{name}": module for name, module in find_experts(block).items()}
            sums = {
                name: torch.zeros(2, m.num_experts, dtype=torch.float64, device=model.device)
                for name, m in holders.items()
            }
            advanced = []
            for stream in streams:
                handles = [h for name, m in holders.items() for h in _watch(m, sums[name], stream.batch.mask)]
                advanced.append(stream.advanced(model.call(block, index, stream)))
                for handle in handles:
                    handle.remove()
            streams = advanced
            for name in holders:
                added, sent = processes.sum(sums[name])
                score = (added / sent.clamp(min=1)).view(groups, -1)
                best = score.topk(count // groups, dim=1).indices
                first = torch.arange(groups, device=best.device)[:, None] * score.shape[1]
                kept[name] = sorted((best + first).flatten().tolist())
    return kept


def _watch(holder: Any, sums: Tensor, mask: Tensor | None) -> list[Any]:
    """Add up gate times the norm of the output, and the number of tokens, of every expert."""

    def hook_for(number: int):
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            _, tokens, gates, _ = args
            norms = gates.double() * output.double().norm(dim=-1)
            counted = gates != 0
            if mask is not None:
                counted = counted & mask.reshape(-1).to(tokens.device)[tokens]
            sums[0, number] += norms[counted].sum()
            sums[1, number] += counted.sum()

        return hook

    projections = holder.projections
    linears = [holder.get_submodule(f"{number}.{projections.down}") for number in range(holder.num_experts)]
    return [linear.register_forward_hook(hook_for(number)) for number, linear in enumerate(linears)]
