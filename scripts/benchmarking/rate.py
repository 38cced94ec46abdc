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
"""What a bit buys: everything counted that is stored of the linears, against the divergence; fixed grids and all
other ways to store them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarking.bench import PEER_GPTQ, Bench, Peer, Progress, Setting
from benchmarking.ladder import DAMPING
from benchmarking.quality import Row, run_ours, run_peer, summarize, with_spread
from benchmarking.table import number
from benchmarking.workers import weight_bytes


GRIDS = ((2, -1), (2, 128), (2, 64), (3, -1), (3, 128), (4, -1), (4, 128), (8, -1))
RATES = (0.5, 1.0, 1.5, 2.0, 2.2, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
FIXED, CODED, PEERS = "fixed grid", "entropy-coded", "peers"
SPARSE = {"sparsify": {"pattern": "2:4"}}
TRAINED = {"epochs": 4, "held_out": 4}


@dataclass
class Point(Row):
    """A method at one rate."""

    ratio_to_grid: float | None = (
        None  # KL over that of the fixed grids at the same bits, between those that are known
    )


def recipes() -> dict[str, dict[str, list[dict]]]:
    """Kind -> label -> steps."""
    grids = {}
    for bits, group_size in GRIDS:
        best = {"damping": DAMPING.get(bits, DAMPING[4]), "shift": 1.0, "curvature": True, "refine": 3}
        name = f"w{bits} " + ("per row" if group_size == -1 else f"g{group_size}")
        grids[name] = [{"gptq": {"bits": bits, "group_size": group_size, **best}}]
    coded = {f"entropy {bits:g}": [{"entropy": {"bits": bits}}] for bits in RATES}
    uniform = {
        f"entropy {bits:g}, uniform": [{"entropy": {"bits": bits, "allocation": "uniform"}}] for bits in (2.2, 3.0)
    }
    return {FIXED: grids, CODED: {**coded, **uniform}, **_codebooks(), **_others()}


def _codebooks() -> dict[str, dict[str, list[dict]]]:
    """Levels and vectors."""
    levels = {f"codebook {bits}": [{"codebook": {"bits": bits}}] for bits in (2, 3, 4)}
    levels |= {f"vq {bits}, single weights": [{"vq": {"bits": bits, "length": 1}}] for bits in (3, 4)}
    vectors = {f"vq {bits}": [{"vq": {"bits": bits}}] for bits in (1, 2, 3, 4)}
    sums = {
        f"vq {bits}, two tables": [{"vq": {"bits": bits, "length": n, "tables": 2}}] for bits, n in ((2, 8), (3, 4))
    }
    chosen = {f"levels at {rate:g}": [{"vq": {"bits": 5, "length": 1, "rate": rate}}] for rate in (1.5, 2.2)}
    trained = {"vq 2, trained": [{"vq": {"bits": 2}}, {"qat": TRAINED}]}
    return {
        "codebook": levels,
        "vectors": {**vectors, **trained},
        "sums of vectors": sums,
        "entropy-constrained": chosen,
    }


def _others() -> dict[str, dict[str, list[dict]]]:
    """Zeros, products, blocks that lean on others, and nothing changed."""
    zeros = {
        "2:4 + int4": [SPARSE, {"gptq": {"bits": 4}}],
        "2:4 + entropy 2": [SPARSE, {"entropy": {"bits": 2.0, "shift": 0.0}}],
    }
    half = {"sparsify": {"pattern": "unstructured", "sparsity": 0.5, "ratios": "global"}}
    levels = {"vq": {"bits": 4, "length": 1, "damping": 0.03, "shift": 0.0}}
    deep = {"half zero + vq 4": [half, levels], "the same, trained": [half, levels, {"qat": TRAINED}]}
    products = {f"rank of {ratio:.0%}": [{"lowrank": {"ratio": ratio}}] for ratio in (0.2, 0.35, 0.5, 0.8)}
    products |= {
        "rank of 50%, trained": [{"lowrank": {"ratio": 0.5}}, {"qat": {**TRAINED, "scale_learning_rate": 0.03}}]
    }
    sharing = {
        "a quarter shared": [{"share": {}}],
        "the same, trained": [{"share": {}}, {"qat": {**TRAINED, "scale_learning_rate": 0.03}}],
    }
    return {
        "2:4": zeros,
        "deep compression": deep,
        "low rank": products,
        "shared": sharing,
        "lossless": {"lossless": [{"lossless": {}}]},
    }


def run_rate(bench: Bench, picture: Path, kinds: dict[str, dict[str, list[dict]]]) -> Iterator[list[Point]]:
    """
    The points of every kind, as soon as they are known; a picture of them is drawn each time.

    Args:
        bench (`Bench`): what all runs share.
        picture (`Path`): a PNG file.
        kinds (`dict`): some of [`recipes`].
    """
    peers = [(peer, setting) for peer in bench.peers(PEER_GPTQ) for setting in bench.settings]
    seeds = range(len(bench.calibration))
    progress = Progress((sum(map(len, kinds.values())) + len(peers)) * len(seeds))
    points: list[Point] = []
    for kind, methods in kinds.items():
        told = [run_ours(bench, methods, seed, progress, loads=True) for seed in seeds]
        own = [Point(label, kind, recipe=recipe) for label, recipe in methods.items()]
        for point in own:
            summarize(point, [outcomes[point.method] for outcomes in told])
        points += own
        for point in own:
            point.ratio_to_grid = beside_grids(point, [p for p in points if p.setting == FIXED])
        draw(points, picture)
        yield own
    if peers:
        theirs = [_of_peer(bench, peer, setting, progress) for peer, setting in peers]
        for point in theirs:
            point.ratio_to_grid = beside_grids(point, [p for p in points if p.setting == FIXED])
        draw([*points, *theirs], picture)
        yield theirs


def _of_peer(bench: Bench, peer: Peer, setting: Setting, progress: Progress) -> Point:
    """A peer at one setting; its bits are those of its files, less what the rest of the model takes in the original."""
    point = Point(f"{peer.label} {setting.name}", PEERS)
    outcomes = []
    for seed in range(len(bench.calibration)):
        end = progress.begin(point.method)
        outcomes.append(run_peer(bench, peer, setting, seed))
        end(str(outcomes[-1]))
    summarize(point, outcomes)
    if point.size_bytes is not None:
        weights = bench.linear_weights()
        rest = weight_bytes(bench.model) - 2 * weights
        point.bits = round(8 * (point.size_bytes - rest) / weights, 4)
    return point


def beside_grids(point: Point, grids: Sequence[Point]) -> float | None:
    """
    A point's divergence over that of the fixed grids at its bits: on the line, in the logarithm, between the best one that
    is smaller and the best that is larger; `None` where one of the two is missing.
    """
    known = [(p.bits, p.kl) for p in grids if p.bits is not None and p.kl is not None]
    if point.bits is None or point.kl is None:
        return None
    smaller = [(kl, bits) for bits, kl in known if bits <= point.bits]
    larger = [(bits, kl) for bits, kl in known if bits >= point.bits]
    if not smaller or not larger:
        return None
    kl, bits = min(smaller)
    far, lower = min(larger)
    share = (point.bits - bits) / (far - bits) if far > bits else 0.0
    return point.kl / math.exp(math.log(kl) + share * (math.log(min(lower, kl)) - math.log(kl)))


def draw(points: Sequence[Point], path: Path) -> None:
    """Bits against KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for kind in dict.fromkeys(point.setting for point in points):
        own = sorted((p.bits, p.kl, p.method) for p in points if p.setting == kind and p.bits and p.kl)
        axes.plot(*zip(*((bits, kl) for bits, kl, _ in own), strict=True), "o", label=kind)
        for bits, kl, label in own:
            axes.annotate(label, (bits, kl), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="bits per weight in the file", ylabel="KL to the original, nats", yscale="log")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


COLUMNS: dict[str, Callable[[Point], str]] = {
    "method": lambda row: row.method,
    "kind": lambda row: row.setting,
    "bits": lambda row: number(row.bits, ".3f"),
    "KL": lambda row: with_spread(row.kl, row.kl_spread, ".5f"),
    "to fixed grids": lambda row: number(row.ratio_to_grid, ".2f"),
    "perplexity": lambda row: number(row.perplexity, ".3f"),
    "MB": lambda row: number(row.size_bytes / 1e6 if row.size_bytes else None, ".3f"),
    "decoded MB/s": lambda row: number(row.decoded, ".0f"),
    "loaded s": lambda row: number(row.load_seconds, ".1f"),
    "loading MiB": lambda row: number(row.load_mib, ".0f"),
    "seconds": lambda row: number(row.seconds, ".1f"),
}
