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
"""What every shipped recipe makes of the model: its loss and its size, over the seeds."""

from collections.abc import Callable, Iterator

from benchmarking.bench import Bench, Progress
from benchmarking.quality import Outcome, Row, run_ours, summarize, with_spread
from benchmarking.table import number


def run_recipes(bench: Bench, names: tuple[str, ...]) -> Iterator[list[Row]]:
    """A row for every recipe, as soon as it is known."""
    dense = sum(path.stat().st_size for path in bench.model.glob("model*.safetensors"))
    seeds = range(len(bench.calibration))
    progress = Progress(len(names) * len(seeds))
    for name in names:
        outcomes: list[Outcome] = [run_ours(bench, {name: name}, seed, progress)[name] for seed in seeds]
        row = Row(name, setting="", recipe=[])
        summarize(row, outcomes)
        row.size_ratio = row.size_bytes / dense if row.size_bytes else None
        yield [row]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "recipe": lambda row: row.method,
    "KL": lambda row: with_spread(row.kl, row.kl_spread, ".5f"),
    "perplexity": lambda row: number(row.perplexity, ".3f"),
    "top-1": lambda row: number(row.top1, ".3f"),
    "MB": lambda row: number(row.size_bytes / 1e6 if row.size_bytes else None, ".3f"),
    "of the original": lambda row: number(row.size_ratio, ".0%"),
    "seconds": lambda row: number(row.seconds, ".1f"),
}
