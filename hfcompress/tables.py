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
"""The tables of a report, as a person sees them in a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from hfcompress.evaluation.numbers import embedding_rows, size, span


def report_tables(report: dict[str, Any]) -> Iterator[Table]:
    """A table for every part of the report that is there."""
    if "perplexity" in report:
        yield _quality_table(report)
    if "cosine_mean" in report:
        yield _embedding_table(report)
    for section, table_of in _SECTIONS.items():
        if section in report:
            yield table_of(report[section])


def _quality_table(report: dict[str, Any]) -> Table:
    shown = table(
        f"measured on {report['tokens']:,} {'masked tokens' if report['how'].get('masked') else 'predictions'} "
        f"({report['how']['data']})",
        "",
        "original",
        "compressed",
    )
    ratio = report["size_bytes"] / report["baseline_size_bytes"]
    shown.add_row("size", size(report["baseline_size_bytes"]), f"{size(report['size_bytes'])} ({ratio:.0%})")
    helped = report.get("with_adapter")
    label = "" if helped is None else f", with the adapter of {size(helped['adapter_bytes'])}"
    coded = report.get("with_cache")
    cached = (
        "" if coded is None else f", cache of {coded['bytes']:,} instead of {coded['dense_bytes']:,} bytes a token"
    )
    others = (helped, label), (coded, cached), (report.get("out_of_domain"), ", other domain")
    for found, where in ((report, ""), *others):
        if found:
            shown.add_row(f"perplexity{where}", f"{found['baseline_perplexity']:.4f}", f"{found['perplexity']:.4f}")
            error = plus_or_minus(found.get("kl_mean_stderr"), 5)
            shown.add_row(f"KL to the original, mean{where}", "", f"{found['kl_mean']:.5f}{error} nats")
    shown.add_row("KL, median / 99th percentile", "", f"{report['kl_median']:.5f} / {report['kl_p99']:.5f}")
    shown.add_row("same most likely token", "", f"{report['top1_agreement']:.2%}")
    return shown


def _embedding_table(report: dict[str, Any]) -> Table:
    shown = table(f"measured on {report['rows']:,} rows ({report['how']['data']})", "", "original", "compressed")
    ratio = report["size_bytes"] / report["baseline_size_bytes"]
    shown.add_row("size", size(report["baseline_size_bytes"]), f"{size(report['size_bytes'])} ({ratio:.0%})")
    for found, where in ((report, ""), (report.get("out_of_domain"), ", other domain")):
        for label, value in embedding_rows(found or {}):
            shown.add_row(f"{label}{where}", "", value)
    return shown


def _tasks_table(found: dict[str, Any]) -> Table:
    shown = table("tasks", "task", "metric", "original", "compressed", "recovery", "flips")
    for name, score in found["scores"].items():
        values = [
            f"{score[side]:.4f}{plus_or_minus(score.get(f'{side}_stderr'), 4)}" for side in ("baseline", "compressed")
        ]
        shares = ["" if score.get(key) is None else f"{score[key]:.2%}" for key in ("recovery", "flips")]
        shown.add_row(name, score["metric"], *values, *shares)
    if found.get("recovery") is not None:
        shown.add_row("average", "", "", "", f"{found['recovery']:.2%}", "")
    return shown


def _speed_table(found: dict[str, Any]) -> Table:
    sides = _sides(found)
    shown = table("speed", "", *sides.values())
    for batch in found["baseline"]["batches"]:
        each = [found[side]["batches"][batch] for side in sides]
        for key, label in (("decode", "decoding"), ("prefill", "prompt")):
            values = [
                f"{b[f'{key}_tokens_per_second']:,.1f}{plus_or_minus(b.get(f'{key}_stderr'), 1)} tokens/s"
                for b in each
            ]
            shown.add_row(f"{label}, batch {batch}", *values)
        latencies = [f"{b['latency_p50_ms']:.2f} / {b['latency_p90_ms']:.2f} ms" for b in each]
        shown.add_row(f"latency p50 / p90, batch {batch}", *latencies)
    zeros = found["compressed"].get("zeros")
    if zeros:
        for batch, b in zeros.get("batches", {}).items():
            for key, label in (("decode", "decoding"), ("prefill", "prompt")):
                value = f"{b[f'{key}_tokens_per_second']:,.1f}{plus_or_minus(b.get(f'{key}_stderr'), 1)} tokens/s"
                shown.add_row(f"{label}, batch {batch}, sparse kernels", "", value)
        shown.caption = said_of_zeros(zeros)
    return shown


def said_of_zeros(zeros: dict[str, Any]) -> str:
    """What kernels for 2:4 weights gain, in words."""
    if zeros["reason"] is not None:
        return f"{zeros['linears']} linears are 2:4 sparse; {zeros['reason']}"
    return f"of {zeros['linears']} linears with 2:4 weights {zeros['used']} are faster on sparse kernels"


def _memory_table(found: dict[str, Any]) -> Table:
    sides = _sides(found)
    shown = table("memory", "", *sides.values())
    labels = {
        "disk_bytes": "on disk",
        "at_rest_bytes": "at rest",
        "after_forward_bytes": "after the first forward",
        "peak_bytes": "peak while generating",
    }
    for key, label in labels.items():
        shown.add_row(label, *[size(found[side][key]) for side in sides])
    return shown


def _sides(found: dict[str, Any]) -> dict[str, str]:
    """The ways of loading that were measured, and what stands above their columns."""
    names = {"baseline": "original", "compressed": "compressed", "packed": "packed (hfc.load)"}
    return {side: name for side, name in names.items() if side in found}


def _energy_table(found: dict[str, Any]) -> Table:
    shown = table(f"energy ({found['how']['source']})", "", "original", "compressed")
    values = [
        f"{found[side]['joules_per_token']:.4g}{plus_or_minus(found[side].get('joules_per_token_stderr'), 4)}"
        for side in ("baseline", "compressed")
    ]
    shown.add_row("joules per token", *values)
    return shown


def _robustness_table(found: dict[str, Any]) -> Table:
    shown = table("robustness", "condition", "KL (nats)", "original perplexity", "compressed perplexity")
    for name, c in found["conditions"].items():
        divergence = f"{c['kl_mean']:.5f}{plus_or_minus(c.get('kl_mean_stderr'), 5)}"
        shown.add_row(name.replace("_", " "), divergence, f"{c['baseline_perplexity']:.3f}", f"{c['perplexity']:.3f}")
    error_ = found["calibration_error"]
    shown.add_row("calibration error", "", f"{error_['baseline']:.4f}", f"{error_['compressed']:.4f}")
    return shown


def _stability_table(found: dict[str, Any]) -> Table:
    shown = table("stability", "", "original", "compressed")
    repeated = found["repetition"]
    shown.add_row("repeated 4-grams", f"{repeated['baseline']:.2%}", f"{repeated['compressed']:.2%}")
    shown.add_row("greedy tokens in common", "", f"{found['common_prefix']:.1f}")
    for bucket in found["kl_by_position"]:
        shown.add_row(f"KL, tokens {span(bucket['from'], bucket['to'])}", "", f"{bucket['kl_mean']:.5f} nats")
    return shown


def _explain_table(found: dict[str, Any]) -> Table:
    shown = table("explain", "block", "error", "of its own", "attention", "KL, it alone swapped in")
    for block in found["blocks"]:
        attention = block.get("attention_distance")
        shown.add_row(
            block["name"],
            f"{block['relative_error']:.4f}",
            f"{block['relative_error_alone']:.4f}",
            "" if attention is None else f"{attention:.4f}",
            f"{block['kl_swapped_in']:.5f}",
        )
    return shown


def budget_tables(found: dict[str, Any]) -> Iterator[Table]:
    """What a budget was settled to: the curve of size against predicted loss, and each unit's choice."""
    (key, target), chosen = next(iter(found["target"].items())), found["chosen"]
    goal = size(target) if key == "target_size" else f"{target:g}"
    shown = table(f"budget, {key} {goal}", "", "size", "bits per weight", "predicted KL (nats)")
    rows = [(point, "best of its size") for point in found["curve"]]
    rows += [(point, f"{choice} everywhere") for choice, point in found["uniform"].items()]
    rows += [(chosen, "chosen")]
    for point, name in sorted(rows, key=lambda row: row[0]["size_bytes"]):
        mark = "→ " if name == "chosen" else ""
        values = (size(point["size_bytes"]), f"{point['bits_per_weight']:.3f}", f"{point['kl']:.5f}")
        shown.add_row(mark + name, *values)
    yield shown
    shown = Table(title="choices", title_justify="left")
    for column in ("choice", "units", "linears"):
        shown.add_column(column, justify="right" if column == "units" else "left", overflow="fold")
    for choice in sorted({unit["choice"] for unit in found["units"]}):
        own = [unit["linears"] for unit in found["units"] if unit["choice"] == choice]
        shown.add_row(choice, str(len(own)), _runs(own))
    yield shown


def _runs(units: list[list[str]]) -> str:
    """Units by the last parts of their names, with the blocks they are in: `gate_proj+up_proj 0, 1, 5`."""
    places: dict[str, list[str]] = {}
    for names in units:
        parts = [name.split(".") for name in names]
        block = next((part for part in parts[0] if part.isdigit()), "")
        places.setdefault("+".join(part[-1] for part in parts), []).append(block)
    return "; ".join(" ".join((name, ", ".join(filter(None, blocks)))).strip() for name, blocks in places.items())


_SECTIONS = {
    "tasks": _tasks_table,
    "speed": _speed_table,
    "memory": _memory_table,
    "energy": _energy_table,
    "robustness": _robustness_table,
    "stability": _stability_table,
    "explain": _explain_table,
}


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left")
    return shown


def plus_or_minus(error: float | None, decimals: int) -> str:
    """A standard error behind its figure."""
    return "" if error is None else f" ± {error:.{decimals}f}"
