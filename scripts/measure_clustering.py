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
Clustering of heads and of neurons: whether units that say alike are better found by clusters, each of which one of its own
stands for, or by taking out what the others make up for best.

    python scripts/measure_clustering.py [--model DIR] [--keep 0.75 0.5] [--output FILE.json]

A unit is a column of what reads neurons, or the columns of one head in what reads heads. In a cluster every member is
predicted from the one that stands for it by least squares, which is what its columns are then added up by ("merged"); clusters
are those of least loss by alternation (k-medoids). With the same units kept, all columns may be solved for together ("refitted").
Beside them is what `prune` does: units removed one after the other by what each costs, the rest made to make up for it
([`hfcompress.solvers.columns`]). Losses are shares of the power of the outputs.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from hfcompress.calibration.tokens import load_tokens
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import find_linears, get_weight, watch_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.tiny import tiny_folder
from hfcompress.solvers.columns import remove_columns


DAMPING = 1e-4  # of the mean diagonal
ROUNDS = 20
READS_NEURONS, READS_HEADS = "down_proj", "o_proj"


def lost(target: Tensor, gram: Tensor, columns: Tensor, values: Tensor) -> float:
    """The share of the outputs' power that is lost with these columns alone."""
    error = target.clone()
    error[:, columns] -= values
    return (((error @ gram) * error).sum() / ((target @ gram) * target).sum()).item()


def predicted(target: Tensor, gram: Tensor, size: int) -> Tensor:
    """What it costs to predict the first unit from the second: float64 `(units, units)`."""
    units = len(gram) // size
    blocks = gram.view(units, size, units, size).permute(0, 2, 1, 3)
    own = blocks.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    columns = target.T.reshape(units, size, -1)
    worth = columns @ columns.transpose(1, 2)
    whole = (worth * own).sum((1, 2))
    solved = torch.linalg.solve(
        own[None], blocks.transpose(2, 3)
    )  # of every pair what the second predicts the first by
    explained = torch.einsum("abij,abjk,aik->ab", blocks, solved, worth)
    return (whole[:, None] - explained).clamp(min=0)


def clusters(costs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """
    Units that stand for clusters, and for every unit the number of its own: greedily begun, and improved in turn.
    """
    standing = [int(costs.sum(0).argmin())]
    least = costs[:, standing[0]].clone()
    while len(standing) < count:
        gains = (least[:, None] - costs).clamp(min=0).sum(0)
        gains[standing] = -1.0
        standing.append(int(gains.argmax()))
        least = torch.minimum(least, costs[:, standing[-1]])
    chosen = torch.tensor(standing)
    for _ in range(ROUNDS):
        member = costs[:, chosen].argmin(1)
        member[chosen] = torch.arange(count)
        moved = chosen.clone()
        for number in range(count):
            own = (member == number).nonzero().flatten()
            moved[number] = own[costs[own][:, own].sum(0).argmin()]
        if torch.equal(moved, chosen):
            break
        chosen = moved
    member = costs[:, chosen].argmin(1)
    member[chosen] = torch.arange(count)
    return chosen, member


def merged(target: Tensor, gram: Tensor, size: int, chosen: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of the units that stand for clusters, and their values once those of the members are added."""
    units = len(gram) // size
    columns = torch.arange(len(gram)).view(units, size)
    values = torch.zeros(len(target), len(chosen) * size, dtype=target.dtype)
    for unit in range(units):
        own, other = columns[unit], columns[chosen[member[unit]]]
        by = torch.linalg.solve(gram[other][:, other], gram[other][:, own]).T  # own is about `by` times other
        place = int(member[unit]) * size
        values[:, place : place + size] += target[:, own] @ by
    return columns[chosen].flatten(), values


def refitted(target: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """The best values of these columns."""
    return torch.linalg.solve(gram[columns][:, columns], gram[columns] @ target.T).T


def compared(target: Tensor, gram: Tensor, size: int, share: float) -> dict[str, float]:
    """The losses of all ways, a share of the units kept."""
    target, gram = target.double(), gram.double().clone()
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    units = len(gram) // size
    keep = max(1, round(share * units))
    chosen, member = clusters(predicted(target, gram, size), keep)
    columns, values = merged(target, gram, size, chosen, member)
    removed = remove_columns(target, gram, torch.arange(len(gram)) // size, keep)
    return {
        "merged": lost(target, gram, columns, values),
        "refitted": lost(target, gram, columns, refitted(target, gram, columns)),
        "removed": lost(target, gram, *removed),
    }


@torch.no_grad()
def readers(model: StreamedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight and the Gram matrix of all linears that read neurons or heads."""
    tokens = load_tokens(
        "bundled",
        model.checkpoint,
        split="calibration",
        tiny_folder=tiny_folder(),
        default_samples=8,
        default_seq_len=256,
    )
    streams, found = model.embed([tokens.batch(slice(None))]), {}
    for index, name in enumerate(model.block_names):
        with model.block(index) as block:
            linears = find_linears(block, name)
            linears = {n: m for n, m in linears.items() if n.endswith((READS_NEURONS, READS_HEADS))}

            def seen(linear: str, inputs: Tensor, linears=linears) -> None:
                rows = inputs.double().flatten(0, -2)
                found[linear] = (get_weight(linears[linear]).clone(), rows.T @ rows / len(rows))

            with watch_inputs(linears, seen):
                ahead = model.call(block, index, streams[0])
            streams = [streams[0].advanced(ahead)]
    return found


def main() -> None:
    """A line for every share, of neurons and of heads."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, default=tiny_folder())
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = StreamedModel(Checkpoint.open(options.model), torch.device("cpu"), torch.float32)
    config = model.skeleton.config.get_text_config()
    found, rows = readers(model), []
    for kind, ending in (("neurons", READS_NEURONS), ("heads", READS_HEADS)):
        own = [each for name, each in found.items() if name.endswith(ending)]
        for share in options.keep:
            losses: dict[str, float] = {}
            for weight, gram in own:
                size = 1 if kind == "neurons" else len(gram) // config.num_attention_heads
                for way, loss in compared(weight, gram, size, share).items():
                    losses[way] = losses.get(way, 0.0) + loss / len(own)
            rows.append({"units": kind, "kept": share, **{way: round(loss, 5) for way, loss in losses.items()}})
            print(rows[-1], flush=True)
    if options.output:
        options.output.write_text(
            json.dumps({"model": options.model.name, "linears": len(found), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
