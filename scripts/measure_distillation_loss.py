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
What a large vocabulary costs a distillation step: the chunked loss beside the naive one, each in a process of its own.

    python scripts/measure_distillation_loss.py [--vocabulary 131072] [--positions 512 1024] [--hidden 256]

Peaks are of the process's memory above what it holds before the step: both heads, hidden states and their gradients.
"""

import argparse
import json
import resource
import subprocess
import sys
import time


KINDS = ("chunked", "naive")


def step(kind: str, vocabulary: int, positions: int, hidden: int) -> dict[str, float]:
    """One loss and its gradients; peak bytes above the start, seconds, and the loss."""
    import psutil
    import torch

    from hfcompress.distillation.divergences import Divergence
    from hfcompress.distillation.losses import distillation_loss
    from hfcompress.distillation.signals import Live
    from hfcompress.distillation.taught_trainer import LOGIT_BYTES

    torch.manual_seed(0)
    heads = [torch.randn(vocabulary, hidden) / hidden**0.5 for _ in range(2)]
    ours, theirs = (torch.randn(positions, hidden) for _ in range(2))
    head, targets = heads[0].requires_grad_(), torch.randint(vocabulary, (positions,))
    ours.requires_grad_()
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    if kind == "naive":
        with torch.no_grad():
            wanted = theirs @ heads[1].T
        loss = Divergence()(wanted, ours @ head.T).sum()
    else:
        signal, chunk = Live(lambda h: h @ heads[1].T), max(1, LOGIT_BYTES // (4 * vocabulary))
        loss = distillation_loss(ours, {"hidden": theirs}, targets, lambda h: h @ head.T, signal, 0.0, chunk, [head])
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"bytes": peak - before, "seconds": time.perf_counter() - began, "loss": loss.item() / positions}


def main() -> None:
    """A line for every number of positions."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(step(options.kind, options.vocabulary, options.positions[0], options.hidden)))
        return
    print(f"vocabulary {options.vocabulary}, hidden size {options.hidden}, float32")
    print(
        f"{'positions':>9} {'naive MB':>9} {'chunked MB':>10} {'ratio':>6} {'naive s':>8} {'chunked s':>9} {'losses differ by':>17}"
    )
    for positions in options.positions:
        told = {}
        for kind in KINDS:
            given = ["--vocabulary", options.vocabulary, "--hidden", options.hidden, "--positions", positions]
            command = [sys.executable, __file__, *map(str, given), "--kind", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            told[kind] = json.loads(done.stdout.splitlines()[-1])
        naive, chunked = told["naive"], told["chunked"]
        print(
            f"{positions:>9} {naive['bytes'] / 1e6:>9.0f} {chunked['bytes'] / 1e6:>10.0f} "
            f"{chunked['bytes'] / naive['bytes']:>6.3f} {naive['seconds']:>8.2f} {chunked['seconds']:>9.2f} "
            f"{abs(naive['loss'] / chunked['loss'] - 1):>17.1e}"
        )


if __name__ == "__main__":
    main()
