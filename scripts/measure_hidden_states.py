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
Hidden states, keys and values in fewer numbers: principal components beside a learned autoencoder, and in fewer bits: vector
quantization beside a grid, all judged on tokens that nothing was learned from.

    python scripts/measure_hidden_states.py [--model DIR] [--shares 0.25 0.5] [--steps 1500] [--output FILE.json]

The autoencoder is one of two layers with GELU either way, four times as wide in between, beside a linear path that begins
as the principal components; Adam on the squared error. Told is the share of the variance that is lost. Vectors are of 4
channels, 256 of them, and the grid has 2 bits with a scale per token and 32 channels, so that the vectors take fewer bits.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from hfcompress.calibration.tokens import load_tokens
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import find_linears
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.tiny import tiny_folder
from hfcompress.solvers.k_means import k_means


ROWS, LENGTH, HELD_OUT = 64, 256, 4  # of the rows every fourth is judged by
BATCH, RATE = 1024, 1e-3
GROUP, VECTOR, ENTRIES = 32, 4, 256


class Autoencoder(nn.Module):
    """
    Args:
        mean (`Tensor`): `(width,)`.
        basis (`Tensor`): `(width, code)`: the principal components.
    """

    def __init__(self, mean: Tensor, basis: Tensor):
        super().__init__()
        width, code = basis.shape
        self.mean, self.into, self.back = mean, nn.Parameter(basis.clone()), nn.Parameter(basis.T.clone())
        self.more_in = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, code))
        self.more_back = nn.Sequential(nn.Linear(code, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for path in (self.more_in, self.more_back):
            nn.init.zeros_(path[2].weight)
            nn.init.zeros_(path[2].bias)

    def forward(self, values: Tensor) -> Tensor:
        centred = values - self.mean
        code = centred @ self.into + self.more_in(centred)
        return self.mean + code @ self.back + self.more_back(code)


def lost(values: Tensor, made: Tensor) -> float:
    """The share of the variance."""
    return ((values - made).square().sum() / (values - values.mean(0)).square().sum()).item()


def narrower(seen: Tensor, unseen: Tensor, share: float, steps: int) -> dict[str, float]:
    """What principal components and the autoencoder lose."""
    torch.manual_seed(0)
    mean, code = seen.mean(0), max(1, round(share * seen.shape[1]))
    basis = torch.linalg.eigh((seen - mean).T @ (seen - mean)).eigenvectors.flip(1)[:, :code].contiguous()
    principal = mean + (unseen - mean) @ basis @ basis.T
    model, scale = Autoencoder(mean, basis), (seen - mean).square().mean()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = seen[torch.randint(len(seen), (BATCH,))]
        optimizer.zero_grad()
        ((model(batch) - batch).square().mean() / scale).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return {"principal": lost(unseen, principal), "autoencoder": lost(unseen, model(unseen))}


def rounded(seen: Tensor, unseen: Tensor) -> dict[str, float]:
    """What vectors of scaled channels lose, and a grid."""
    scale = seen.square().mean(0).sqrt().clamp(min=1e-6)
    points = (seen / scale).view(-1, VECTOR)
    vectors = k_means(
        points[:: max(1, len(points) // 65536)],
        torch.ones(1, VECTOR).expand(len(points[:: max(1, len(points) // 65536)]), -1),
        ENTRIES,
        0,
    )
    chosen = torch.cdist((unseen / scale).view(-1, VECTOR), vectors).argmin(1)
    made = vectors[chosen].view_as(unseen) * scale
    groups = unseen.view(len(unseen), -1, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low).clamp(min=1e-9) / 3
    grid = (((groups - low) / step).round() * step + low).view_as(unseen)
    return {"vectors": lost(unseen, made), "grid": lost(unseen, grid)}


@torch.no_grad()
def gathered(model: StreamedModel) -> dict[str, Tensor]:
    """What comes out of every block, and of what makes keys and values: float32 `(rows, tokens, width)`."""
    tokens = load_tokens(
        "bundled",
        model.checkpoint,
        split="calibration",
        tiny_folder=tiny_folder(),
        default_samples=ROWS,
        default_seq_len=LENGTH,
    )
    [stream] = model.embed([tokens.batch(slice(None))])
    found = {}
    for index, name in enumerate(model.block_names):
        with model.block(index) as block:
            hooks = []
            for linear, module in find_linears(block, name).items():
                if linear.endswith(("k_proj", "v_proj")):
                    keep = lambda _, __, output, linear=linear: found.__setitem__(linear, output.float())  # noqa: E731
                    hooks.append(module.register_forward_hook(keep))
            stream = stream.advanced(model.call(block, index, stream))
            for hook in hooks:
                hook.remove()
        found[name] = stream.hidden.float()
    return found


def main() -> None:
    """A line for every tensor."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, default=tiny_folder())
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name, values in gathered(
        StreamedModel(Checkpoint.open(options.model), torch.device("cpu"), torch.float32)
    ).items():
        held = torch.arange(len(values)) % HELD_OUT == 0
        seen, unseen = values[~held].flatten(0, 1), values[held].flatten(0, 1)
        row = {"tensor": name}
        for share in options.shares:
            row |= {
                f"{kind} {share:g}": round(x, 5) for kind, x in narrower(seen, unseen, share, options.steps).items()
            }
        if name.endswith(("k_proj", "v_proj")):
            row |= {kind: round(x, 5) for kind, x in rounded(seen, unseen).items()}
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.output:
        options.output.write_text(
            json.dumps({"model": options.model.name, "steps": options.steps, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
