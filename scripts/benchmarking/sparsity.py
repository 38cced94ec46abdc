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
"""What zeros cost: every addition to SparseGPT one at a time, with 4-bit codes beside them, and whole channels and blocks."""

from collections.abc import Callable, Iterator

from benchmarking.bench import Bench, Peer, Progress, Setting
from benchmarking.ladder import Rung
from benchmarking.quality import Outcome, Row, compare, run_ours, run_peer, summarize, with_spread
from benchmarking.table import number


PATTERNS = {"2:4": {"pattern": "2:4"}, "4:8": {"pattern": "4:8"}, "50 %": {"pattern": "unstructured", "sparsity": 0.5}}
PEERS_24 = (
    Peer("llm-compressor SparseGPT", "llmcompressor", before=("sparsegpt",)),
    Peer("llm-compressor Wanda", "llmcompressor", before=("wanda",)),
)
ALL, FAST = "ALPS, all that", "ALPS, no shift, curvature of 4 rows"
TUNE = {"iterations": 100, "batch_tokens": 1024}
LONGER = {**TUNE, "iterations": 200}
WIDTHS, DEPTHS = (0.1, 0.2, 0.3), (0.2, 0.34)
W3 = {"bits": 3, "group_size": 128, "damping": 0.03, "shift": 1.0, "curvature": True, "refine": 3}
W4 = {"bits": 4, "group_size": 128}


def ladder(pattern: str) -> list[Rung]:
    """Every rung for one pattern of zeros; each holds one thing more than its base."""
    plain = {"refit": False, "shift": 0.0, "curvature": False}

    def rung(label: str, base: str | None, **settings) -> Rung:
        return Rung(label, base, [{"sparsify": {**PATTERNS[pattern], **plain, **settings}}])

    refit, shift = {"refit": True}, {"refit": True, "shift": 1.0}
    whole = {**shift, "curvature": True}
    rungs = [
        rung("magnitude", None, method="magnitude"),
        rung("Wanda", "magnitude", method="wanda"),
        rung("RIA", "Wanda", method="ria"),
        rung("SparseGPT", "Wanda", method="sparsegpt"),
        rung("+ refit", "SparseGPT", method="sparsegpt", **refit),
        rung("+ shift", "+ refit", method="sparsegpt", **shift),
        rung("+ curvature", "+ shift", method="sparsegpt", **whole),
        rung("Wanda, refit, shift, curvature", "Wanda", method="wanda", **whole),
        rung(ALL, "+ curvature", method="alps", **whole),
        rung("ALPS, all that but the shift", ALL, method="alps", refit=True, curvature=True),
        rung(FAST, ALL, method="alps", refit=True, curvature=True, curvature_rows=4),
        Rung(f"{ALL}, tune", ALL, [{"sparsify": {**PATTERNS[pattern]}}, {"tune": TUNE}]),
        Rung(f"{ALL}, tune by halves", ALL, [{"sparsify": {**PATTERNS[pattern]}}, {"tune": {**TUNE, "halves": True}}]),
        rung("ALPS, all that, 2 rounds", ALL, method="alps", **whole, rounds=2),
    ]
    if PATTERNS[pattern]["pattern"] != "unstructured":
        return rungs
    stages = rung(f"{ALL}, after a stage of 25 %", ALL, method="alps", **whole, schedule=[0.25])
    ratios = [rung(f"{ALL}, {kind} ratios", ALL, method="alps", **whole, ratios=kind) for kind in ("owl", "global")]
    return [*rungs[:-1], stages, *ratios]


def joint() -> list[Rung]:
    """2:4 and 4 bits together, beside 3 bits alone, which take the same bytes."""
    sparsify = {"sparsify": {"pattern": "2:4"}}
    return [
        Rung(ALL, None, [sparsify]),
        Rung("then RTN", ALL, [sparsify, {"rtn": W4}]),
        Rung("then GPTQ that keeps the zeros", ALL, [sparsify, {"gptq": W4}]),
        Rung("with curvature and refine", ALL, [sparsify, {"gptq": {**W4, "curvature": True, "refine": 3}}]),
        Rung("3 bits without zeros", ALL, [{"gptq": W3}]),
    ]


def structured() -> list[Rung]:
    """Channels and blocks that go."""
    rungs = []
    for share in WIDTHS:
        settings = {"ffn": share, "multiple": 16}
        label = f"ffn {share:.0%}"
        rungs.append(Rung(f"{label}, no refit", None, [{"prune": {**settings, "refit": False}}]))
        rungs.append(Rung(f"{label}, refit", f"{label}, no refit", [{"prune": settings}]))
        rungs.append(Rung(f"{label}, refit, tune", f"{label}, no refit", [{"prune": settings}, {"tune": LONGER}]))
    for share in WIDTHS:
        settings = {"hidden": share, "multiple": 16}
        label = f"hidden {share:.0%}"
        rungs.append(Rung(f"{label}, no refit", None, [{"prune": {**settings, "refit": False}}]))
        rungs.append(Rung(f"{label}, refit", f"{label}, no refit", [{"prune": settings}]))
        gentle = {**TUNE, "learning_rate": 0.003}
        rungs.append(Rung(f"{label}, refit, tune", f"{label}, no refit", [{"prune": settings}, {"tune": gentle}]))
    rungs.append(Rung("heads 50%, no refit", None, [{"prune": {"heads": 0.5, "refit": False}}]))
    rungs.append(Rung("heads 50%, refit", "heads 50%, no refit", [{"prune": {"heads": 0.5}}]))
    for share in DEPTHS:
        settings = {"depth": share}
        rungs.append(
            Rung(f"depth {share:.0%}, by influence", None, [{"prune": {**settings, "criterion": "influence"}}])
        )
        rungs.append(Rung(f"depth {share:.0%}, by KL", rungs[-1].label, [{"prune": settings}]))
    return rungs


def run_sparsity(bench: Bench) -> Iterator[list[Row]]:
    """The rows of every pattern, as soon as they are known."""
    tables = {**{pattern: ladder(pattern) for pattern in PATTERNS}, "2:4 + int4": joint(), "structured": structured()}
    peers = bench.peers(PEERS_24)
    seeds = range(len(bench.calibration))
    progress = Progress((sum(map(len, tables.values())) + len(peers)) * len(seeds))
    for setting, rungs in tables.items():
        beside = peers if setting == "2:4" else []
        outcomes: dict[str, list[Outcome]] = {method.label: [] for method in (*rungs, *beside)}
        for seed in seeds:
            recipes = {rung.label: rung.recipe for rung in rungs}
            for label, outcome in run_ours(bench, recipes, seed, progress, f"{setting} ").items():
                outcomes[label].append(outcome)
            for peer in beside:
                end = progress.begin(f"{setting} {peer.label}")
                outcomes[peer.label].append(run_peer(bench, peer, Setting("2:4", 16, -1), seed))
                end(str(outcomes[peer.label][-1]))
        ours = [Row(rung.label, setting, rung.base, rung.recipe) for rung in rungs]
        theirs = [Row(peer.label, setting) for peer in beside]
        for row in (*ours, *theirs):
            summarize(row, outcomes[row.method])
        compare(ours, theirs)
        yield [*ours, *theirs]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.method,
    "setting": lambda row: row.setting,
    "KL": lambda row: with_spread(row.kl, row.kl_spread, ".5f"),
    "change": lambda row: with_spread(row.change, row.change_spread, "+.1%"),
    "against": lambda row: row.base or "",
    "to best peer": lambda row: number(row.ratio_to_peer, ".2f"),
    "perplexity": lambda row: number(row.perplexity, ".3f"),
    "top-1": lambda row: number(row.top1, ".3f"),
    "MB": lambda row: number(row.size_bytes / 1e6 if row.size_bytes else None, ".3f"),
    "seconds": lambda row: number(row.seconds, ".1f"),
}
