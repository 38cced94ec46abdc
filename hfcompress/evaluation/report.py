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
One report: what `eval_results.json` holds, whatever was measured.

The composite score is the weighted geometric mean of parts that are each 1 for the original: below 1 where something
was lost, above 1 where something was gained. The weights are the recipe's.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError


EVALUATION = "eval_results.json"
QUALITY, TASKS = "quality", "tasks"


class Report(dict[str, Any]):
    """The results of the measurements by their names; quality's own lie at the top."""

    @classmethod
    def load(cls, folder: Path | None) -> "Report | None":
        """
        The report of a folder, or `None` where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        path = None if folder is None else folder / EVALUATION
        if path is None or not path.is_file():
            return None
        try:
            return cls(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged; measure again with `hfcompress eval`.") from error

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint's folder."""
        from hfcompress.formats.writer import write_json  # brings torch, which recipes do without

        write_json(folder / EVALUATION, self)

    def updated(self, other: "Report") -> "Report":
        """This report with what another one has measured since."""
        merged = Report({**self, **other})
        if TASKS in other and "recovery" not in other:
            merged.pop("recovery", None)
        skipped = {k: v for k, v in {**self.get("skipped", {}), **other.get("skipped", {})}.items() if k not in other}
        if skipped:
            merged["skipped"] = skipped
        else:
            merged.pop("skipped", None)
        return merged

    def composite_score(self, weights: Mapping[str, float]) -> dict[str, Any] | None:
        """
        The composite score.

        Args:
            weights (`Mapping[str, float]`): of [`PARTS`]; those that were not measured do not count.

        Returns:
            `dict` or `None`: `value`, the `parts` with what each is, and the `weights` that counted.
        """
        parts = {}
        for name in weights:
            value = _part(PARTS[name], self)
            if value is not None and value > 0 and math.isfinite(value):
                parts[name] = value
        total = sum(weights[name] for name in parts)
        if total <= 0:
            return None
        value = math.exp(sum(weights[name] * math.log(part) for name, part in parts.items()) / total)
        return {"value": value, "parts": parts, "weights": {name: weights[name] for name in parts}}


def _part(of: Callable[[Report], float], report: Report) -> float | None:
    try:
        return of(report)
    except (KeyError, TypeError, ZeroDivisionError):
        return None  # not measured


def _gain(section: str, key: str, higher_is_better: bool) -> Callable[[Report], float]:
    def ratio(report: Report) -> float:
        ours, theirs = report[section]["compressed"][key], report[section]["baseline"][key]
        return ours / theirs if higher_is_better else theirs / ours

    return ratio


def _decode_speed(report: Report) -> float:
    ours, theirs = (report["speed"][side]["batches"]["1"] for side in ("compressed", "baseline"))
    return ours["decode_tokens_per_second"] / theirs["decode_tokens_per_second"]


PARTS: dict[str, Callable[[Report], float]] = {
    "kl_mean": lambda report: math.exp(-report["kl_mean"]),
    "perplexity": lambda report: report["baseline_perplexity"] / report["perplexity"],
    "top1_agreement": lambda report: report["top1_agreement"],
    "recovery": lambda report: report["recovery"],
    "size": lambda report: report["baseline_size_bytes"] / report["size_bytes"],
    "speed": _decode_speed,
    "memory": _gain("memory", "peak_bytes", higher_is_better=False),
    "energy": _gain("energy", "joules_per_token", higher_is_better=False),
}
