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
"""What students learn: from the text alone, from their teacher's predictions, and from its hidden states too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarking.bench import Bench, Progress
from benchmarking.ladder import Rung
from benchmarking.quality import Outcome, Row, compare, run_ours, summarize


HIDDEN, FFN, MULTIPLE = 0.3, 0.25, 16  # what the smaller students lack: less than 60 % of all parameters are left
BUDGETS = (32_768, 65_536, 262_144)  # tokens; the smaller ones tell whether the order changes on the way
RECOVERY_TOKENS = 65_536
BATCH, HELD_OUT = 4, 6  # rows
RATES = {"random": 2e-3, "sliced": 1e-3, "pruned": 3e-4}
TEXT, KL, FEATURES = "text alone", "forward KL", "forward KL, hidden states"
LOSSES = {
    TEXT: {"loss_weight": 0.0, "cross_entropy": 1.0},
    KL: {},
    FEATURES: {"features": 0.5, "feature_loss": "relation", "balanced": True},
}


def students(model: Path, seed: int) -> dict[str, list[Rung]]:
    """A table for every budget: three beginnings of one size, each with three losses."""
    config = json.loads((model / "config.json").read_text())
    sizes = {"hidden_size": _smaller(config["hidden_size"], HIDDEN)}
    sizes["intermediate_size"] = _smaller(config["intermediate_size"], FFN)
    sizes["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    tables: dict[str, list[Rung]] = {}
    for tokens in BUDGETS:
        rungs = [Rung("pruned, not trained", None, [_prune()])] if tokens == BUDGETS[0] else []
        for init, rate in RATES.items():
            common = {"tokens": tokens, "batch_size": BATCH, "held_out": HELD_OUT, "learning_rate": rate, "seed": seed}
            for loss, settings in LOSSES.items():
                before: list[dict[str, Any]] = [_prune()] if init == "pruned" else []
                own = {} if init == "pruned" else {"student": sizes, "init": init}
                base = None if loss == TEXT else f"{init}, {TEXT}"
                rungs.append(Rung(f"{init}, {loss}", base, [*before, {"distill": {**common, **own, **settings}}]))
        tables[f"{tokens:,} tokens"] = rungs
    return tables


def recovery(seed: int) -> list[Rung]:
    """What a short training gives back to zeros and to two bits."""
    sparsify = {"sparsify": {"pattern": "2:4"}}
    two = {"gptq": {"bits": 2, "group_size": 64, "damping": 0.1, "shift": 1.0, "curvature": True, "refine": 3}}
    common = {"tokens": RECOVERY_TOKENS, "batch_size": BATCH, "held_out": HELD_OUT, "seed": seed}
    return [
        Rung("2:4", None, [sparsify]),
        Rung("2:4, distill", "2:4", [sparsify, {"distill": {**common, "learning_rate": 3e-5}}]),
        Rung("2 bits", None, [two]),
        Rung("2 bits, qat", "2 bits", [two, {"qat": common}]),
    ]


def _prune() -> dict[str, Any]:
    return {"prune": {"hidden": HIDDEN, "ffn": FFN, "multiple": MULTIPLE}}


def _smaller(size: int, share: float) -> int:
    return round(size * (1 - share) / MULTIPLE) * MULTIPLE


def run_distillation(bench: Bench) -> Iterator[list[Row]]:
    """The rows of every table, as soon as they are known."""
    seeds = range(len(bench.calibration))

    def tables(seed: int) -> dict[str, list[Rung]]:
        return {**students(bench.model, seed), "recovery": recovery(seed)}

    progress = Progress(sum(map(len, tables(0).values())) * len(seeds))
    for setting, rungs in tables(0).items():
        outcomes: dict[str, list[Outcome]] = {rung.label: [] for rung in rungs}
        for seed in seeds:
            recipes = {rung.label: rung.recipe for rung in tables(seed)[setting]}
            for label, outcome in run_ours(bench, recipes, seed, progress, f"{setting} ").items():
                outcomes[label].append(outcome)
        rows = [Row(rung.label, setting, rung.base, rung.recipe) for rung in rungs]
        for row in rows:
            summarize(row, outcomes[row.method])
        compare(rows, [])
        yield rows
