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
The pictures of a report, and the data that they prepare.

How it works: every picture is a function of the manifest and the report that gives a figure and a sentence about it, or
nothing where its data is not there. What they share is in [`hfcompress.evaluation.drawing`].
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from hfcompress.evaluation.budget_curve import budget
from hfcompress.evaluation.drawing import (
    BLUE,
    CATEGORIES,
    GREEN,
    INK,
    MUTED,
    OTHERS,
    PANEL,
    SMALL,
    VERMILLION,
    Picture,
    as_float,
    block_ticks,
    byte_unit,
    clipped,
    draw_bars,
    draw_heat_map,
    draw_point,
    kl_axis,
    log_ticks,
    new_figure,
    place_labels,
)
from hfcompress.evaluation.numbers import counted, number, percent, plus_minus, size, span
from hfcompress.evaluation.published import LLAMA_CPP


# data


def by_block(
    linears: Iterable[dict[str, Any]], value: Callable[[dict[str, Any]], float | None], combine: Callable = max
) -> tuple[list[str], np.ndarray]:
    """
    Args:
        linears (`list[dict]`): rows of the manifest.
        value (`Callable`): what is wanted of a row; `None` where it has none.
        combine (`Callable`, *optional*): joins the values of linears that differ in an index alone (experts).

    Returns:
        `tuple[list[str], np.ndarray]`: the names of the linears in a block, and float64 `(linears, blocks)`, NaN where a
        block has no such linear. Linears outside the blocks are left out.
    """
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in linears:
        block, linear = place_of(row["name"])
        if block is not None and (found := value(row)) is not None:
            cells[linear, block].append(found)
    names = list(dict.fromkeys(name for name, _ in cells))
    blocks = range(max((block for _, block in cells), default=-1) + 1)
    values = [[combine(cells.get((name, block), [math.nan])) for block in blocks] for name in names]
    return names, np.array(values, dtype=np.float64).reshape(len(names), len(blocks))


def place_of(name: str) -> tuple[int | None, str]:
    """The block that a linear is in and its name there, with `*` for further indices; no block if outside of them."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return int(part), ".".join("*" if p.isdigit() else p for p in parts[index + 1 :])
    return None, name


def error_kind(linears: Sequence[dict[str, Any]]) -> str:
    """`"output"` where the errors of outputs were measured, else `"weight"`."""
    return "output" if any(row.get("relative_output_error") is not None for row in linears) else "weight"


def _shortened(names: list[str]) -> list[str]:
    """The last parts of the names, if those are all different."""
    last = [name.rpartition(".")[2] for name in names]
    return [clipped(name) for name in (last if len(set(last)) == len(last) else names)]


def _positive(edges: Sequence[float]) -> np.ndarray:
    """Edges for a logarithmic axis, on which a first one of zero has no place."""
    found = np.array(edges, dtype=np.float64)
    if found[0] <= 0:
        found[0] = found[1] / 10
    return found


# pictures


def layer_errors(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """Heat map of every linear's relative error."""
    linears = manifest.get("linears") or []
    kind = error_kind(linears)
    key = f"relative_{kind}_error"
    names, values = by_block(linears, lambda row: row.get(key))
    if not values.size:
        return None
    rows = [row for row in linears if row.get(key) is not None]
    worst = max(rows, key=lambda row: row[key])
    formula = "‖(W - Q)X‖ / ‖WX‖" if kind == "output" else "‖W - Q‖ / ‖W‖"
    caption = (
        f"Relative {kind} error of {counted(len(rows), 'linear')} ({formula}): median "
        f"{number(float(np.median([row[key] for row in rows])), 3)}, largest {number(worst[key], 3)} in {worst['name']}."
    )
    if kind == "weight":
        caption += " The errors of the outputs are not known, as nothing was calibrated."
    figure = new_figure(1.5 + 0.3 * len(names))
    axes = figure.subplots()
    axes.set_title(f"Relative {kind} error of every linear")
    draw_heat_map(axes, values, _shortened(names), formula)
    axes.set_xlabel("block")
    return figure, caption


def bits_by_layer(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """Bytes by block, stacked by linear, and the bits that a weight takes there with its scales."""
    linears = [row for row in manifest.get("linears") or [] if row.get("bytes") and row.get("shape")]
    names, stored = by_block(linears, lambda row: row["bytes"], sum)
    if not stored.size:
        return None
    _, weights = by_block(linears, lambda row: math.prod(row["shape"]), sum)
    stored, weights = np.nan_to_num(stored), np.nan_to_num(weights)
    per_weight = 8 * stored.sum(0) / np.where(weights.sum(0) > 0, weights.sum(0), math.nan)
    overall = 8 * stored.sum() / weights.sum()
    caption = (
        f"{size(float(stored.sum()))} in {counted(int(np.count_nonzero(stored.sum(0))), 'block')}: {overall:.2f} bits a weight with "
        f"scales, between {np.nanmin(per_weight):.2f} and {np.nanmax(per_weight):.2f} by block."
    )
    labels = _shortened(names)
    order = np.argsort(-stored.sum(1), kind="stable")
    kept = sorted(order[: len(CATEGORIES)])
    figure = new_figure(4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
    blocks, base = np.arange(stored.shape[1]), np.zeros(stored.shape[1])
    divisor, unit = byte_unit(float(stored.sum(0).max()))
    layers = [(labels[i], stored[i], CATEGORIES[colour]) for colour, i in enumerate(kept)]
    if len(kept) < len(names):
        layers.append(("others", stored[order[len(CATEGORIES) :]].sum(0), OTHERS))
    for label, part, colour in layers:
        above.bar(
            blocks,
            part / divisor,
            0.82,
            base / divisor,
            color=colour,
            edgecolor=INK,
            linewidth=0.3 if len(blocks) <= 40 else 0.1,
            label=label,
        )
        base += part
    above.set_title("Bytes of the compressed linears by block")
    above.set_ylabel(unit)
    handles, texts = above.get_legend_handles_labels()
    above.legend(handles[::-1], texts[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)
    below.bar(blocks, per_weight, 0.82, color=BLUE)
    if len(blocks) <= 16:
        for block, value in zip(blocks, per_weight, strict=True):
            if not math.isnan(value):
                below.annotate(
                    f"{value:.2f}", (block, value), (0, 2), textcoords="offset points", ha="center", fontsize=SMALL
                )
    below.set_ylim(0, np.nanmax(per_weight) * 1.25)
    below.set_title("Bits per weight, scales and zero points included")
    below.set_ylabel("bits")
    below.set_xlabel("block")
    block_ticks(below, len(blocks))
    return figure, caption


def size_kl(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """This model and the original; beside them, on axes of their own, published results of another model."""
    if report.get("kl_mean") is None or not report.get("size_bytes") or not report.get("baseline_size_bytes"):
        return None
    ours, original = report["size_bytes"], report["baseline_size_bytes"]
    elsewhere = (report.get("out_of_domain") or {}).get("kl_mean")
    board = LLAMA_CPP
    caption = (
        f"{size(ours)} ({percent(ours / original, 3)} of the original) at a mean KL of "
        f"{plus_minus(report['kl_mean'], report.get('kl_mean_stderr'))} nats"
        + (f", {number(elsewhere, 3)} on text of another domain" if elsewhere is not None else "")
        + f". On the right, for orientation only, another model measured by others on other text: {board.model} on "
        f"{board.text} ({board.source})."
    )
    figure = new_figure(3.7)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
    left.set_title("This model")
    right.set_title(f"For orientation: {board.model}, llama.cpp")
    values = [report["kl_mean"], *(r.kl_mean for r in board.results)] + ([elsewhere] if elsewhere is not None else [])
    kl_axis(left, values)
    divisor, unit = byte_unit(original)
    points, labels = (
        [(original / divisor, 0.0), (ours / divisor, report["kl_mean"])],
        ["original", f"compressed,\n{percent(ours / original, 3)}"],
    )
    draw_point(left, *points[0], None, INK, "s")
    draw_point(left, *points[1], report.get("kl_mean_stderr"), BLUE, "o")
    if elsewhere is not None:
        points.append((ours / divisor, elsewhere))
        labels.append("the same,\nother domain")
        draw_point(left, *points[2], report["out_of_domain"].get("kl_mean_stderr"), VERMILLION, "D")
    left.set_xlim(0, max(ours, original) / divisor * 1.2)
    left.set_xlabel(f"size of the weights, {unit}")
    shares = [100 * r.gib / board.original_gib for r in board.results]
    right.set_xlim(0, 120)
    right.set_xlabel("size, % of its 16-bit original")
    right.tick_params(labelleft=False)
    right.grid(True, axis="y")
    theirs = [(share, r.kl_mean) for share, r in zip(shares, board.results, strict=True)]
    right.plot(*zip(*theirs, strict=True), "o-", color=MUTED, markerfacecolor=PANEL, linewidth=1.0, markersize=5)
    draw_point(right, 100, 0.0, None, INK, "s")
    right.text(
        0.98,
        0.97,
        f"another model, {board.text}:\nnot a ranking",
        transform=right.transAxes,
        ha="right",
        va="top",
        fontsize=SMALL,
        color=MUTED,
    )
    place_labels(figure, left, points, labels)
    place_labels(figure, right, [*theirs, (100, 0.0)], [*(r.name for r in board.results), "original"])
    return figure, caption


def kl_histogram(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """How the KL is spread over the predictions."""
    found = report.get("kl_histogram") or {}
    counts = np.array(found.get("counts") or [], dtype=np.float64)
    if not counts.sum():
        return None
    edges = _positive(found["edges"])
    marks = {"median": report.get("kl_median"), "mean": report.get("kl_mean"), "99th percentile": report.get("kl_p99")}
    marks = {name: value for name, value in marks.items() if value is not None}
    caption = f"KL to the original of each of {counts.sum():,.0f} predictions: " + ", ".join(
        f"{name} {number(value, 3)}" for name, value in marks.items()
    )
    figure = new_figure(3.4)
    axes = figure.subplots()
    axes.set_title("KL to the original, prediction by prediction")
    axes.set_xscale("log")
    seen = edges[:-1][counts > 0].min(), edges[1:][counts > 0].max()
    axes.stairs(100 * counts / counts.sum(), edges, fill=True, color=BLUE, alpha=0.75, label="evaluation text")
    other = (report.get("out_of_domain") or {}).get("kl_histogram") or {}
    if sum(other.get("counts") or []):
        share = 100 * np.array(other["counts"]) / sum(other["counts"])
        axes.stairs(share, _positive(other["edges"]), color=VERMILLION, linewidth=1.6, label="other domain")
        axes.legend(loc="center left")
    axes.set_xlim(*seen)
    log_ticks(axes.xaxis, *seen)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top * 1.3)
    for height, (name, value) in zip((1.08, 1.17, 1.26), sorted(marks.items(), key=lambda m: m[1]), strict=False):
        if value > 0:
            axes.plot([value, value], [0, top * height], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(
                f"{name} {number(value, 3)}",
                (value, top * height),
                (-4, 0),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=SMALL,
            )
    axes.set_xlabel("KL, nats (logarithmic)")
    axes.set_ylabel("% of the predictions")
    return figure, caption + "."


def robustness(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """What changed text does: KL between the two models, and what it costs each of them."""
    conditions = {
        name: found
        for name, found in ((report.get("robustness") or {}).get("conditions") or {}).items()
        if found.get("kl_mean") is not None
    }
    if not conditions:
        return None
    names, found = [clipped(name.replace("_", " ")) for name in conditions], list(conditions.values())
    kl = [c["kl_mean"] for c in found]
    worst = int(np.argmax(kl))
    caption = f"KL to the original on changed text: largest on {names[worst]}, {number(kl[worst], 3)} nats"
    clean = (conditions.get("clean") or {}).get("kl_mean")
    caption += f" ({number(kl[worst] / clean, 3)} times that on clean text)." if clean else "."
    figure = new_figure(1.5 + 0.34 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [MUTED if name == "clean" else BLUE for name in names]
    draw_bars(left, kl, [c.get("kl_mean_stderr") for c in found], colours)
    if clean:
        left.axvline(clean, color=INK, linewidth=1.0, linestyle=(0, (4, 2)))
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_title("KL to the original")
    left.set_xlabel("nats, with standard error")
    ratios = [as_float(c.get("perplexity")) / as_float(c.get("baseline_perplexity")) for c in found]
    errors = [
        100 * r * as_float(c.get("log_perplexity_difference_stderr")) for r, c in zip(ratios, found, strict=True)
    ]
    if not np.isnan(ratios).all():
        draw_bars(right, [100 * (r - 1) for r in ratios], errors, [MUTED if n == "clean" else GREEN for n in names])
    right.tick_params(left=False, labelleft=False)
    right.set_title("Perplexity that compression adds")
    right.set_xlabel("% of the original's" + ("" if np.isnan(errors).all() else ", with standard error"))
    return figure, caption


def explain_blocks(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """How the error grows along the blocks, and what each block does by itself."""
    blocks = (report.get("explain") or {}).get("blocks") or []
    if not blocks:
        return None
    series = {
        key: np.array([as_float(row.get(key)) for row in blocks]) for key in ("relative_error", "relative_error_alone")
    }
    swapped = np.array([as_float(row.get("kl_swapped_in")) for row in blocks])
    errors = np.nan_to_num([as_float(row.get("kl_swapped_in_stderr")) for row in blocks])
    caption = f"Error of the hidden states along {counted(len(blocks), 'block')}: {number(series['relative_error'][-1], 3)} after the last"
    figure = new_figure(4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    index, few = np.arange(len(blocks)), len(blocks) <= 40
    lines = ("all blocks compressed", BLUE, "o"), ("this block alone", GREEN, "s")
    for values, (label, colour, marker) in zip(series.values(), lines, strict=True):
        if not np.isnan(values).all():
            above.plot(
                index, values, marker=marker, color=colour, linewidth=1.6, markersize=4 if few else 0, label=label
            )
    above.set_ylim(bottom=0)
    above.grid(True, axis="y")
    above.legend(loc="upper left")
    above.set_title("Relative error of a block's output")
    below.set_title("KL with this block alone compressed")
    below.set_ylabel("nats")
    below.grid(True, axis="y")
    if not np.isnan(swapped).all():
        worst = int(np.nanargmax(swapped))
        caption += f"; compressed alone, block {blocks[worst].get('block', worst)} hurts most, KL {number(swapped[worst], 3)} nats"
        colours = [VERMILLION if i == worst else BLUE for i in index]
        below.bar(
            index,
            swapped,
            0.75,
            color=colours,
            yerr=errors,
            ecolor=INK,
            capsize=2.0 if few else 0,
            error_kw={"elinewidth": 0.9},
        )
        below.set_ylim(bottom=0)
    below.set_xlabel("block")
    block_ticks(below, len(index))
    return figure, caption + "."


def attention(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """Heat map of how far the attention of every head has moved."""
    found = (report.get("explain") or {}).get("attention")
    if not found or not any(found):
        return None
    values = np.full((max(len(heads or []) for heads in found), len(found)), math.nan)
    for block, heads in enumerate(found):
        values[: len(heads or []), block] = [as_float(head) for head in heads or []]
    if np.isnan(values).all():
        return None
    head, block = np.unravel_index(np.nanargmax(values), values.shape)
    caption = (
        f"Distance between the attention maps of the two models, head by head: median {number(float(np.nanmedian(values)), 3)}, "
        f"largest {number(values[head, block], 3)} in head {head} of block {block}."
    )
    figure = new_figure(min(6.0, 1.7 + 0.22 * len(values)))
    axes = figure.subplots()
    axes.set_title("Distance of the attention maps from the original's")
    draw_heat_map(axes, values, [str(i) for i in range(len(values))], "distance")
    axes.set_xlabel("block")
    axes.set_ylabel("head")
    return figure, caption


def stability(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """KL along a long text."""
    found = [p for p in (report.get("stability") or {}).get("kl_by_position") or [] if p.get("kl_mean") is not None]
    if not found:
        return None
    first, last = found[0], found[-1]
    caption = (
        f"KL along the text: {number(first['kl_mean'], 3)} nats over positions {span(first['from'], first['to'])}, "
        f"{number(last['kl_mean'], 3)} over {span(last['from'], last['to'])}."
    )
    figure = new_figure(3.2)
    axes = figure.subplots()
    middles = [(p["from"] + p["to"] - 1) / 2 for p in found]
    kl = np.array([p["kl_mean"] for p in found])
    errors = np.array([p.get("kl_mean_stderr") or 0.0 for p in found])
    axes.fill_between(middles, kl - errors, kl + errors, color=BLUE, alpha=0.2, linewidth=0)
    axes.errorbar(
        middles, kl, errors, color=BLUE, marker="o", markersize=5, linewidth=1.6, elinewidth=1.1, capsize=2.5
    )
    axes.set_ylim(0, (kl + errors).max() * 1.15 or 1.0)
    axes.set_xlim(left=0)
    axes.grid(True, axis="y")
    axes.set_title("KL to the original along the text, with standard error")
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("nats")
    return figure, caption


PICTURES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Picture | None]] = {
    picture.__name__: picture
    for picture in (
        size_kl,
        kl_histogram,
        budget,
        layer_errors,
        bits_by_layer,
        robustness,
        stability,
        explain_blocks,
        attention,
    )
}
