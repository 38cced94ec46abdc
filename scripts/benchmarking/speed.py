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
"""How long it takes: the methods in turn, so that a busy moment of the machine hits all of them."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benchmarking.bench import PEER_AWQ, PEER_GPTQ, Bench, Peer, Progress, Setting, over, seconds_and_peak
from benchmarking.errors import RunError, UsageError
from benchmarking.ladder import WHOLE, ladder
from benchmarking.table import number
from benchmarking.workers import LEAST


OURS, RECOMPUTED, SHIFT = "hfcompress GPTQ", "hfcompress GPTQ least memory", "hfcompress GPTQ shift"
FULL, AWQ = "hfcompress GPTQ full", "hfcompress AWQ"
RUNGS = {
    OURS: "+ scale search",
    RECOMPUTED: "+ scale search",
    SHIFT: "+ shift",
    FULL: WHOLE,
    AWQ: "AWQ, RTN, scale search",
}


@dataclass
class SpeedRow:
    """The times of one method in one setting."""

    method: str
    setting: str
    runs: list[float] = field(default_factory=list)  # seconds, in order
    seconds: float | None = None  # the median
    fastest: float | None = None
    slowest: float | None = None
    ratio: float | None = None  # median of OURS, for AWQ of AWQ, over median of this
    ratio_recomputed: float | None = None  # the same with RECOMPUTED
    ratio_shift: float | None = None  # the same with SHIFT
    ratio_full: float | None = None  # the same with FULL
    peak_rss_mib: int | None = None  # the largest of the runs
    imports_mib: int | None = None  # of it, what importing takes
    floor: float | None = None  # seconds that the same operations take at the machine's rate; the last run's
    error: str | None = None

    @property
    def ours(self) -> bool:
        """Whether hfcompress did it."""
        return self.method in RUNGS

    @property
    def remark(self) -> str:
        """Why there are no figures."""
        return self.error or ""

    def add(
        self, seconds: float, peak_rss_mib: int, imports_mib: int | None = None, floor: float | None = None
    ) -> None:
        """One more run."""
        self.floor = floor
        self.runs.append(seconds)
        self.seconds = statistics.median(self.runs)
        self.fastest, self.slowest = min(self.runs), max(self.runs)
        self.peak_rss_mib = max(self.peak_rss_mib or 0, peak_rss_mib)
        self.imports_mib = imports_mib


def run_speed(bench: Bench, repeats: int, asked: str | None = None) -> Iterator[list[SpeedRow]]:
    """
    The rows of every setting, as soon as they are known; the methods take turns.

    Args:
        bench (`Bench`): what all runs share.
        repeats (`int`): runs of each method.
        asked (`str`, *optional*): names of methods, or parts of them, with commas between; all of them otherwise.

    Raises:
        UsageError: there is no such method.
    """
    methods = _asked([*RUNGS, *bench.peers((*PEER_GPTQ, *PEER_AWQ))], asked)
    progress = Progress(len(bench.settings) * len(methods) * repeats)
    for setting in bench.settings:
        rows = {method: SpeedRow(_label(method), setting.name) for method in methods}
        for method in methods * repeats:
            row = rows[method]
            end = progress.begin(f"{setting.name} {row.method}")
            if row.error is None:
                try:
                    row.add(*timed(bench, method, setting))
                except RunError as error:
                    row.error = str(error)
                bench.clear()
            end(row.error or f"{row.runs[-1]:.1f} s")
        seconds = {row.method: row.seconds for row in rows.values()}
        for row in rows.values():
            by_awq = "AWQ" in row.method
            row.ratio = over(seconds.get(AWQ if by_awq else OURS), row.seconds)
            if not by_awq:
                row.ratio_recomputed = over(seconds.get(RECOMPUTED), row.seconds)
                row.ratio_shift = over(seconds.get(SHIFT), row.seconds)
                row.ratio_full = over(seconds.get(FULL), row.seconds)
        yield list(rows.values())


def timed(bench: Bench, method: str | Peer, setting: Setting) -> tuple[float, int, int | None, float | None]:
    """
    Seconds, peak MiB, what of it importing takes, and, of ours, seconds at the machine's rate of one run in a process of
    its own.

    Raises:
        RunError: it failed.
    """
    output = bench.work / "output"
    if isinstance(method, Peer):
        refused = method.refuses(setting)
        if refused:
            raise RunError(refused)
        imports = bench.imports(method)
        return *bench.compress(method, setting, output), imports, None
    recipe = next(rung.recipe for rung in ladder(setting) if rung.label == RUNGS[method])
    limit = LEAST if method == RECOMPUTED else None
    [told] = bench.compress_ours([(recipe, output)], memory_limit=limit)
    if "error" in told or "skipped" in told:
        raise RunError(told.get("error") or told["skipped"])
    return *seconds_and_peak(told), told.get("imports_mib"), told.get("floor")


def _label(method: str | Peer) -> str:
    return method if isinstance(method, str) else method.label


def _asked(methods: list[str | Peer], asked: str | None) -> list[str | Peer]:
    """Those that are named, or whose names hold what is no name itself."""
    if asked is None:
        return methods
    labels, wanted = [_label(method) for method in methods], set()
    for part in asked.split(","):
        found = {part} if part in labels else {label for label in labels if part in label}
        if not found:
            raise UsageError(f"--methods {part}: there is no such method; there are {', '.join(labels)}.")
        wanted |= found
    return [method for method in methods if _label(method) in wanted]


COLUMNS: dict[str, Callable[[SpeedRow], str]] = {
    "method": lambda row: row.method,
    "setting": lambda row: row.setting,
    "median s": lambda row: number(row.seconds, ".1f"),
    "min-max s": lambda row: "-" if not row.runs else f"{row.fastest:.1f}-{row.slowest:.1f}",
    "ours / it": lambda row: number(row.ratio, ".2f"),
    "least": lambda row: number(row.ratio_recomputed, ".2f"),
    "shift": lambda row: number(row.ratio_shift, ".2f"),
    "full": lambda row: number(row.ratio_full, ".2f"),
    "MiB": lambda row: number(row.peak_rss_mib, ""),
    "imports": lambda row: number(row.imports_mib, ""),
}
