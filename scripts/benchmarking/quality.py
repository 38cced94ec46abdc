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
"""What is lost: every rung of the ladder and every peer, over the seeds."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarking.bench import PEER_GPTQ, PEER_RTN, Bench, Peer, Progress, Setting, over
from benchmarking.errors import RunError
from benchmarking.ladder import by_default, ladder
from benchmarking.table import number
from benchmarking.workers import weight_bytes


@dataclass
class Row:
    """
    What one method did in one setting; `None` where there is nothing to tell. Spreads are standard deviations over
    the seeds.
    """

    method: str
    setting: str
    base: str | None = None  # what it adds a step to
    recipe: list[dict] | None = None  # ours, with seed 0
    by_default: bool | None = None  # whether the shipped recipes do what it adds
    kls: list[float] = field(default_factory=list)  # one for each seed
    kl: float | None = None  # their mean
    kl_spread: float | None = None
    change: float | None = None  # of the KL against that of the base, seed by seed; -0.1 is a tenth less
    change_spread: float | None = None
    ratio_to_peer: float | None = None  # KL over that of the best peer
    perplexity: float | None = None
    dense_perplexity: float | None = None
    top1: float | None = None
    size_bytes: int | None = None  # of the weights on disk
    size_ratio: float | None = None  # of that to the original's
    bits: float | None = None  # that a weight of the linears takes there, everything counted
    decoded: float | None = None  # MB of bf16 that are decoded in a second on one core, where something is coded
    load_seconds: float | None = None  # by transformers
    load_mib: int | None = None  # at most, above what importing takes
    seconds: float | None = None
    skipped: str | None = None  # why this version cannot do it
    error: str | None = None

    @property
    def ours(self) -> bool:
        """Whether hfcompress did it."""
        return self.recipe is not None

    @property
    def remark(self) -> str:
        """Why there are no figures."""
        return self.error or self.skipped or ""


@dataclass
class Outcome:
    """One run, of one seed."""

    seconds: float | None = None
    quality: dict[str, float] | None = None
    size_bytes: int | None = None
    bits: float | None = None
    decoded: float | None = None
    loaded: tuple[float, int] | None = None  # seconds and MiB
    skipped: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        if self.error or self.skipped or self.seconds is None:
            return self.error or self.skipped or ""
        return f"{self.seconds:.1f} s" + (f", KL {self.quality['kl']:.5f}" if self.quality else "")


def run_quality(bench: Bench) -> Iterator[list[Row]]:
    """The rows of every setting, as soon as they are known: one for every method."""
    peers = bench.peers((*PEER_GPTQ, *PEER_RTN))
    seeds = range(len(bench.calibration))
    progress = Progress(sum(len(ladder(s, without=bench.without)) + len(peers) for s in bench.settings) * len(seeds))
    for setting in bench.settings:
        rungs = ladder(setting, without=bench.without)
        outcomes: dict[str, list[Outcome]] = {method.label: [] for method in (*rungs, *peers)}
        for seed in seeds:
            recipes = {rung.label: rung.recipe for rung in ladder(setting, seed, bench.without)}
            for label, outcome in run_ours(bench, recipes, seed, progress, f"{setting.name} ").items():
                outcomes[label].append(outcome)
            for peer in peers:
                end = progress.begin(f"{setting.name} {_named(peer.label, seed)}")
                outcomes[peer.label].append(run_peer(bench, peer, setting, seed))
                end(str(outcomes[peer.label][-1]))
        kept = by_default(rungs)
        ours = [Row(r.label, setting.name, r.base, r.recipe, r.label in kept) for r in rungs]
        theirs = [Row(p.label, setting.name) for p in peers]
        for row in (*ours, *theirs):
            summarize(row, outcomes[row.method])
        compare(ours, theirs)
        yield [*ours, *theirs]


def run_ours(
    bench: Bench,
    recipes: Mapping[str, list[dict] | str],
    seed: int,
    progress: Progress,
    before: str = "",
    loads: bool = False,
) -> dict[str, Outcome]:
    """
    Label -> outcome of every recipe: all are compressed in one process, and measured in another.

    Args:
        bench (`Bench`): what all runs share.
        recipes (`Mapping[str, list[dict] or str]`): label -> steps as in YAML, or the name of a shipped recipe.
        seed (`int`): which calibration rows.
        progress (`Progress`): is told of every run.
        before (`str`, *optional*, defaults to `""`): put before the label there.
        loads (`bool`, *optional*, defaults to `False`): also tell what loading takes.
    """
    folders = {label: bench.work / f"ours-{index}" for index, label in enumerate(recipes)}
    outcomes = {}
    compressed = bench.compress_ours([(recipe, folders[label]) for label, recipe in recipes.items()], seed)
    for label in recipes:
        end = progress.begin(before + _named(label, seed))
        told = _next(compressed)
        named = {"size_bytes": "bytes", "bits": "bits", "decoded": "decoded", "skipped": "skipped", "error": "error"}
        outcomes[label] = Outcome(told.get("seconds"), **{name: told.get(key) for name, key in named.items()})
        end(str(outcomes[label]))
    made = [label for label, outcome in outcomes.items() if outcome.seconds is not None]
    measured = bench.measure([folders[label] for label in made])
    for label in made:
        told = _next(measured)
        if "error" in told:
            outcomes[label].error = told["error"]
        else:
            outcomes[label].quality = told
            outcomes[label].loaded = bench.load(folders[label]) if loads else None
    bench.clear()
    return outcomes


def _next(answers: Iterator[dict]) -> dict:
    """The next answer, or the error in its place; after a process failed there are none."""
    try:
        return next(answers, {"error": "not reached: the process had failed before"})
    except RunError as error:
        return {"error": str(error)}


def run_peer(bench: Bench, peer: Peer, setting: Setting, seed: int) -> Outcome:
    """Compress and measure."""
    refused = peer.refuses(setting)
    if refused:
        return Outcome(error=refused)
    output = bench.work / "output"
    outcome = Outcome()
    try:
        outcome.seconds, _ = bench.compress(peer, setting, output, seed)
        reader = bench.interpreters[peer.peer] if peer.own_reader else None
        outcome.size_bytes = weight_bytes(output)
        [outcome.quality] = bench.measure([output], reader)
    except RunError as error:
        outcome.error = str(error)
    bench.clear()
    return outcome


def summarize(row: Row, outcomes: Sequence[Outcome]) -> None:
    """The seeds of one method in one row; one that failed leaves no figures."""
    row.error = next((outcome.error for outcome in outcomes if outcome.error), None)
    row.skipped = next((outcome.skipped for outcome in outcomes if outcome.skipped), None)
    measured = [outcome.quality for outcome in outcomes if outcome.quality]
    if row.error or row.skipped or not measured:
        return
    row.kls = [quality["kl"] for quality in measured]
    row.kl, row.kl_spread = mean_and_spread(row.kls)
    for key in ("perplexity", "dense_perplexity", "top1"):
        setattr(row, key, statistics.mean(quality[key] for quality in measured))
    row.size_bytes, row.bits, row.decoded = (getattr(outcomes[0], key) for key in ("size_bytes", "bits", "decoded"))
    row.load_seconds, row.load_mib = outcomes[0].loaded or (None, None)
    row.seconds = statistics.mean(outcome.seconds for outcome in outcomes if outcome.seconds is not None)


def compare(ours: Sequence[Row], theirs: Sequence[Row]) -> None:
    """Every rung beside the one that it adds to, and every row beside the best peer."""
    kls = {row.method: row.kls for row in ours}
    for row in ours:
        base = kls.get(row.base or "", [])
        if row.kls and base:
            changes = [kl / before - 1 for kl, before in zip(row.kls, base, strict=True)]
            row.change, row.change_spread = mean_and_spread(changes)
    best = min((row.kl for row in theirs if row.kl is not None), default=None)
    for row in (*ours, *theirs):
        row.ratio_to_peer = over(row.kl, best)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; of one value there is none."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _named(label: str, seed: int) -> str:
    return label if seed == 0 else f"{label}, seed {seed}"


def with_spread(value: float | None, spread: float | None, form: str) -> str:
    return number(value, form) if spread is None else f"{number(value, form)} ± {number(spread, form.lstrip('+'))}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.method,
    "setting": lambda row: row.setting,
    "KL": lambda row: with_spread(row.kl, row.kl_spread, ".5f"),
    "change": lambda row: with_spread(row.change, row.change_spread, "+.1%"),
    "against": lambda row: row.base or "",
    "default": lambda row: "" if row.by_default is None else "on" if row.by_default else "off",
    "to best peer": lambda row: number(row.ratio_to_peer, ".2f"),
    "perplexity": lambda row: number(row.perplexity, ".3f"),
    "top-1": lambda row: number(row.top1, ".3f"),
    "seconds": lambda row: number(row.seconds, ".1f"),
}
