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
The pictures of a report, as PNG files: readable at the width of a model card, on a white page and on a dark one.

How it works: every picture is a function of the manifest and the report that gives a figure and a sentence about it, or
nothing where its data is not there. They share a style: a near-white panel with its own margins, and inks and colours
that stand out on it and that colour-blind readers can tell apart (Okabe and Ito's, cividis). A card is some 800 pixels
wide, so there an inch of a figure is 100 pixels and its smallest text, 8.5 points, 11.8 pixels. The sentence is also
written into the PNG, as its description.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfcompress.evaluation.page import number, percent, plus_minus, size
from hfcompress.evaluation.published import LLAMA_CPP
from hfcompress.formats.writer import disk_errors


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = tuple["Figure", str]

INCHES, DPI = 8.0, 180
SMALL = 8.5
LEADER = 15  # points between a label and what it names, above which a line joins them
PANEL, INK, MUTED, GRID = "#fbfbf8", "#1b1f24", "#57606a", "#dcdcd6"
BLUE, VERMILLION, GREEN = "#0072b2", "#c44e00", "#00805e"
CATEGORIES = ("#0072b2", "#56b4e9", "#f0e442", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
OTHERS = "#999999"
SEQUENTIAL = "cividis_r"
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PANEL,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": DPI,
    "figure.facecolor": PANEL,
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "hatch.color": "#b8b8b0",
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "savefig.facecolor": PANEL,
    "text.color": INK,
    "text.parse_math": False,  # names are not formulas
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": SMALL,
}


def draw(manifest: dict[str, Any], report: dict[str, Any], folder: Path) -> dict[str, str]:
    """
    Every picture that there is data for.

    Args:
        manifest (`dict`): what `hfcompress.json` holds; may be empty.
        report (`dict`): what `eval_results.json` holds.
        folder (`Path`): where the PNG files go; made if it is not there.

    Returns:
        `dict[str, str]`: from a picture's name (`folder/NAME.png`) to a sentence about what it shows.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    with card_style():
        for name, picture in PICTURES.items():
            drawn = picture(manifest, report)
            if drawn is not None:
                captions[name] = drawn[1]
                _save(drawn, folder / f"{name}.png")
    return captions


def pareto(candidates: Sequence[dict[str, Any]], path: Path) -> str:
    """
    Size against KL over several results, with those that no other beats joined by a line.

    Args:
        candidates (`list[dict]`): each `name`, `size_bytes`, `kl_mean`, `baseline_size_bytes` and, where known,
            `kl_mean_stderr`.
        path (`Path`): the PNG file.

    Returns:
        `str`: a sentence about what it shows.

    Raises:
        OutputError: the file cannot be written.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    originals = sorted({c["baseline_size_bytes"] for c in candidates})
    points = [(c["size_bytes"], c["kl_mean"]) for c in candidates] + [(bytes_, 0.0) for bytes_ in originals]
    labels = [_clipped(c["name"]) for c in candidates] + ["original"] * len(originals)
    front = pareto_front(points)
    best = [labels[i] for i in front if i < len(candidates)]
    caption = (
        f"Size against KL to the original of {_count(len(candidates), 'result')}; no other is as small and as close as: "
        f"{', '.join(best) or 'the original'}."
    )
    with card_style():
        figure = _figure(4.6)
        axes = figure.subplots()
        axes.set_title("Size against distance from the original")
        divisor, unit = _unit(max(x for x, _ in points))
        shown = [(x / divisor, y) for x, y in points]
        _kl_axis(axes, [y for _, y in points])
        axes.set_xlim(0, max(x for x, _ in shown) * 1.12)
        axes.set_xlabel(f"size of the weights, {unit}")
        line = [shown[i] for i in front]
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1.2, zorder=2)
        for index, (x, y) in enumerate(shown):
            original = index >= len(candidates)
            error = None if original else candidates[index].get("kl_mean_stderr")
            colour = INK if original else BLUE if index in front else VERMILLION
            _point(axes, x, y, error, colour, marker="s" if original else "o" if index in front else "X")
        axes.plot([], [], "o", color=BLUE, label="no other is as small and as close")
        if len(front) < len(points):
            axes.plot([], [], "X", color=VERMILLION, label="another is smaller and closer")
        axes.legend(loc="upper right")
        place_labels(figure, axes, shown, labels, line)
        _save((figure, caption), path)
    return caption


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """
    Args:
        points (`list[tuple]`): pairs of which both are better when smaller.

    Returns:
        `list[int]`: the points that no other beats, in the order of their first value: another beats a point that is
        better in one value and no worse in the other. Of equal points all are kept.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


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
        f"Relative {kind} error of {_count(len(rows), 'linear')} ({formula}): median "
        f"{number(float(np.median([row[key] for row in rows])), 3)}, largest {number(worst[key], 3)} in {worst['name']}."
    )
    if kind == "weight":
        caption += " The errors of the outputs are not known, as nothing was calibrated."
    figure = _figure(1.5 + 0.3 * len(names))
    axes = figure.subplots()
    axes.set_title(f"Relative {kind} error of every linear")
    _heat_map(axes, values, _shortened(names), formula)
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
        f"{size(float(stored.sum()))} in {_count(int(np.count_nonzero(stored.sum(0))), 'block')}: {overall:.2f} bits a weight with "
        f"scales, between {np.nanmin(per_weight):.2f} and {np.nanmax(per_weight):.2f} by block."
    )
    labels = _shortened(names)
    order = np.argsort(-stored.sum(1), kind="stable")
    kept = sorted(order[: len(CATEGORIES)])
    figure = _figure(4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
    blocks, base = np.arange(stored.shape[1]), np.zeros(stored.shape[1])
    divisor, unit = _unit(float(stored.sum(0).max()))
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
    _block_ticks(below, len(blocks))
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
    figure = _figure(3.7)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
    left.set_title("This model")
    right.set_title(f"For orientation: {board.model}, llama.cpp")
    values = [report["kl_mean"], *(r.kl_mean for r in board.results)] + ([elsewhere] if elsewhere is not None else [])
    _kl_axis(left, values)
    divisor, unit = _unit(original)
    points, labels = (
        [(original / divisor, 0.0), (ours / divisor, report["kl_mean"])],
        ["original", f"compressed,\n{percent(ours / original, 3)}"],
    )
    _point(left, *points[0], None, INK, "s")
    _point(left, *points[1], report.get("kl_mean_stderr"), BLUE, "o")
    if elsewhere is not None:
        points.append((ours / divisor, elsewhere))
        labels.append("the same,\nother domain")
        _point(left, *points[2], report["out_of_domain"].get("kl_mean_stderr"), VERMILLION, "D")
    left.set_xlim(0, max(ours, original) / divisor * 1.2)
    left.set_xlabel(f"size of the weights, {unit}")
    shares = [100 * r.gib / board.original_gib for r in board.results]
    right.set_xlim(0, 120)
    right.set_xlabel("size, % of its 16-bit original")
    right.tick_params(labelleft=False)
    right.grid(True, axis="y")
    theirs = [(share, r.kl_mean) for share, r in zip(shares, board.results, strict=True)]
    right.plot(*zip(*theirs, strict=True), "o-", color=MUTED, markerfacecolor=PANEL, linewidth=1.0, markersize=5)
    _point(right, 100, 0.0, None, INK, "s")
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
    figure = _figure(3.4)
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
    _log_ticks(axes.xaxis, *seen)
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
    names, found = [_clipped(name.replace("_", " ")) for name in conditions], list(conditions.values())
    kl = [c["kl_mean"] for c in found]
    worst = int(np.argmax(kl))
    caption = f"KL to the original on changed text: largest on {names[worst]}, {number(kl[worst], 3)} nats"
    clean = (conditions.get("clean") or {}).get("kl_mean")
    caption += f" ({number(kl[worst] / clean, 3)} times that on clean text)." if clean else "."
    figure = _figure(1.5 + 0.34 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [MUTED if name == "clean" else BLUE for name in names]
    _bars(left, kl, [c.get("kl_mean_stderr") for c in found], colours)
    if clean:
        left.axvline(clean, color=INK, linewidth=1.0, linestyle=(0, (4, 2)))
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_title("KL to the original")
    left.set_xlabel("nats, with standard error")
    ratios = [_float(c.get("perplexity")) / _float(c.get("baseline_perplexity")) for c in found]
    errors = [100 * r * _float(c.get("log_perplexity_difference_stderr")) for r, c in zip(ratios, found, strict=True)]
    if not np.isnan(ratios).all():
        _bars(right, [100 * (r - 1) for r in ratios], errors, [MUTED if n == "clean" else GREEN for n in names])
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
        key: np.array([_float(row.get(key)) for row in blocks]) for key in ("relative_error", "relative_error_alone")
    }
    swapped = np.array([_float(row.get("kl_swapped_in")) for row in blocks])
    errors = np.nan_to_num([_float(row.get("kl_swapped_in_stderr")) for row in blocks])
    caption = f"Error of the hidden states along {_count(len(blocks), 'block')}: {number(series['relative_error'][-1], 3)} after the last"
    figure = _figure(4.6)
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
    _block_ticks(below, len(index))
    return figure, caption + "."


def attention(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """Heat map of how far the attention of every head has moved."""
    found = (report.get("explain") or {}).get("attention")
    if not found or not any(found):
        return None
    values = np.full((max(len(heads or []) for heads in found), len(found)), math.nan)
    for block, heads in enumerate(found):
        values[: len(heads or []), block] = [_float(head) for head in heads or []]
    if np.isnan(values).all():
        return None
    head, block = np.unravel_index(np.nanargmax(values), values.shape)
    caption = (
        f"Distance between the attention maps of the two models, head by head: median {number(float(np.nanmedian(values)), 3)}, "
        f"largest {number(values[head, block], 3)} in head {head} of block {block}."
    )
    figure = _figure(min(6.0, 1.7 + 0.22 * len(values)))
    axes = figure.subplots()
    axes.set_title("Distance of the attention maps from the original's")
    _heat_map(axes, values, [str(i) for i in range(len(values))], "distance")
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
        f"KL along the text: {number(first['kl_mean'], 3)} nats over positions {first['from']} to {first['to']}, "
        f"{number(last['kl_mean'], 3)} over {last['from']} to {last['to']}."
    )
    figure = _figure(3.2)
    axes = figure.subplots()
    middles = [(p["from"] + p["to"]) / 2 for p in found]
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
        layer_errors,
        bits_by_layer,
        robustness,
        stability,
        explain_blocks,
        attention,
    )
}


# parts of pictures


def place_labels(
    figure: "Figure",
    axes: "Axes",
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    line: Sequence[tuple[float, float]] = (),
) -> None:
    """
    Write a label beside each point, as near as it goes without hitting a label, a point, a line, or the axes' edge.

    Args:
        figure (`Figure`): that the axes are in.
        axes (`Axes`): with its limits and scales already set.
        points (`list[tuple]`): in data units.
        labels (`list[str]`): one for each.
        line (`list[tuple]`, *optional*): the corners of a line to keep off.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the layout, and with it where a point is
    pixel = DPI / 72
    centres = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - 4 * pixel, y - 4 * pixel, 8 * pixel, 8 * pixel) for x, y in centres]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    corners = [axes.transData.transform(corner) for corner in line]
    for begin, end in itertools.pairwise(corners):
        steps = max(1, int(np.hypot(*(end - begin)) / (4 * pixel)))
        along = [begin + (end - begin) * step / steps for step in range(steps + 1)]
        taken += [Bbox.from_bounds(x - pixel, y - pixel, 2 * pixel, 2 * pixel) for x, y in along]
    for index, ((x, y), point, label) in enumerate(zip(centres, points, labels, strict=True)):
        measured = axes.text(0, 0, label, fontsize=SMALL)
        extent = measured.get_window_extent()
        measured.remove()
        choices = []
        for reach in (7, 15, 26, 40, 58, 80):
            for right, up in ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)):
                dx, dy = right * reach * pixel, up * reach * pixel
                box = Bbox.from_bounds(
                    x + dx - extent.width * (1 - right) / 2,
                    y + dy - extent.height * (1 - up) / 2,
                    extent.width,
                    extent.height,
                )
                cost = sum(_overlap(box, other) for other in taken)
                cost += 2 * (extent.width * extent.height - _overlap(box, axes.bbox))
                nearest = min(range(len(centres)), key=lambda i: (_distance(box, *centres[i]), i != index))
                if reach <= LEADER and nearest != index:  # it would be read as another point's label
                    cost += extent.width * extent.height
                choices.append((round(cost), len(choices), reach, box))
        _, _, reach, box = min(choices, key=lambda choice: choice[:2])
        taken.append(box)
        written = axes.annotate(
            label,
            point,
            ((box.x0 - x) / pixel, (box.y0 - y) / pixel),
            textcoords="offset points",
            fontsize=SMALL,
            va="bottom",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 4} if reach > LEADER else None,
        )
        written.set_in_layout(False)


def _distance(box: Any, x: float, y: float) -> float:
    """In pixels, from a point to a box; 0 inside."""
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _overlap(one: Any, other: Any) -> float:
    """Area, in square pixels."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, wide) * max(0.0, high)


def _point(axes: "Axes", x: float, y: float, error: float | None, colour: str, marker: str) -> None:
    axes.errorbar(
        x, y, error, color=colour, marker=marker, markersize=7, elinewidth=1.3, capsize=3, linestyle="none", zorder=3
    )


def _bars(axes: "Axes", values: Sequence[float], errors: Sequence[float | None], colours: Sequence[str]) -> None:
    """Lying bars with their errors, and their values written at the ends."""
    lengths, spread = np.nan_to_num(values), np.nan_to_num([_float(error) for error in errors])
    rows = range(len(lengths))
    axes.barh(rows, lengths, 0.66, color=colours, xerr=spread, ecolor=INK, capsize=2.5, error_kw={"elinewidth": 1.1})
    for row, value in zip(rows, values, strict=True):
        end = (max(lengths[row] + spread[row], 0.0), row)
        axes.annotate(number(value, 3), end, (4, 0), textcoords="offset points", va="center", fontsize=SMALL)
    low, high = min(0.0, (lengths - spread).min()), max(0.0, (lengths + spread).max())
    axes.set_xlim(1.05 * low, high + 0.3 * ((high - low) or 1.0))
    axes.locator_params(axis="x", nbins=5)
    axes.axvline(0, color=MUTED, linewidth=0.8)


def _heat_map(axes: "Axes", values: np.ndarray, rows: list[str], label: str) -> None:
    """Darker is larger; in each cell its value where it fits, hatched where there is none."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    wide = low > 0 and high / low > 10
    if not wide:
        low, high = min(low, 0.0), high or 1.0
    norm = LogNorm(low, high) if wide else Normalize(low, high)
    axes.patch.set(hatch="////", facecolor=PANEL)
    many = max(values.shape) > 40
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), cmap=SEQUENTIAL, norm=norm, edgecolors=PANEL, linewidth=0.2 if many else 0.8
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    shown = _thinned(len(rows), 40 if max(map(len, rows)) > 3 else 16)
    axes.set_yticks([i + 0.5 for i in shown], [rows[i] for i in shown])
    shown = _thinned(values.shape[1], 24)
    axes.set_xticks([i + 0.5 for i in shown], [str(i) for i in shown])
    if values.shape[1] <= 12 and values.shape[0] <= 24:
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                ink = ink_on(colormaps[SEQUENTIAL](norm(value)))
                axes.text(
                    column + 0.5, row + 0.5, number(value, 2), ha="center", va="center", fontsize=SMALL, color=ink
                )
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=18)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    ticks = (np.geomspace if wide else np.linspace)(low, high, 4).tolist()
    bar.set_ticks(ticks, labels=[number(tick, 2) for tick in ticks])
    bar.set_label(label)


def ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever is easier to read on a colour (red, green, blue from 0 to 1)."""
    red, green, blue = (part**2.2 for part in colour[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def _kl_axis(axes: "Axes", values: Iterable[float]) -> None:
    """Logarithmic, but with a zero for the original."""
    positive = [value for value in values if value > 0]
    low = math.floor(math.log10(min(positive))) if positive else -3
    high = max(low + 1, math.ceil(math.log10(max(positive)))) if positive else 0
    axes.set_yscale("symlog", linthresh=10.0**low, linscale=0.4)
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    ticks = [0.0] + [step * 10.0**decade for decade in range(low, high) for step in steps] + [10.0**high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(-0.25 * 10.0**low, 1.6 * max(positive, default=1.0))
    axes.set_ylabel("mean KL to the original, nats")
    axes.grid(True, axis="y")


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """At powers of ten, or at 1, 2 and 5 times them where there are few of those."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _block_ticks(axes: "Axes", count: int) -> None:
    shown = _thinned(count, 24)
    axes.set_xticks(shown, [str(i) for i in shown])
    axes.set_xlim(-0.6, count - 0.4)


def _thinned(count: int, most: int) -> range:
    """Every index, or every second, fifth, tenth, ... so that no more than `most` are left."""
    steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return range(0, count, next(step for step in steps if count / step <= most))


def _shortened(names: list[str]) -> list[str]:
    """The last parts of the names, if those are all different."""
    last = [name.rpartition(".")[2] for name in names]
    return [_clipped(name) for name in (last if len(set(last)) == len(last) else names)]


def _clipped(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _positive(edges: Sequence[float]) -> np.ndarray:
    """Edges for a logarithmic axis, on which a first one of zero has no place."""
    found = np.array(edges, dtype=np.float64)
    if found[0] <= 0:
        found[0] = found[1] / 10
    return found


def _unit(largest: float) -> tuple[float, str]:
    power = min(3, int(math.log10(max(largest, 1)) // 3))
    return 1000.0**power, ("bytes", "kB", "MB", "GB")[power]


def _count(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def card_style():
    """This module's style, whatever the user's is; theirs comes back afterwards."""
    from matplotlib import style

    return style.context(["default", STYLE])


def _figure(height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, height))
    FigureCanvasAgg(figure)
    return figure


def _save(drawn: Picture, path: Path) -> None:
    """Whole or not at all; the same bytes for the same picture."""
    figure, caption = drawn
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path.parent):
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None, "Description": caption})
        os.replace(temporary, path)
