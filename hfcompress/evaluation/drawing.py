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
How the pictures are drawn: their style, the parts that they share, labels, axes, and saving.

The style is a near-white panel with its own margins, and inks and colours that stand out on it and that colour-blind
readers can tell apart (Okabe and Ito's, cividis), on a white page and on a dark one. A card is some 800 pixels wide, so
there an inch of a figure is 100 pixels and its smallest text, 8.5 points, 11.8 pixels. A picture's sentence is also
written into its PNG, as its description.
"""

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfcompress.evaluation.numbers import number
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


# figures


def card_style():
    """This module's style, whatever the user's is; theirs comes back afterwards."""
    from matplotlib import style

    return style.context(["default", STYLE])


def new_figure(height: float) -> "Figure":
    """As wide as a card, `height` inches high, and with no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES, height))
    FigureCanvasAgg(figure)
    return figure


def save(drawn: Picture, path: Path) -> None:
    """Whole or not at all; the same bytes for the same picture."""
    figure, caption = drawn
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path.parent):
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None, "Description": caption})
        os.replace(temporary, path)


# parts of pictures


def draw_point(axes: "Axes", x: float, y: float, error: float | None, colour: str, marker: str) -> None:
    """One result, with its standard error where there is one."""
    axes.errorbar(
        x, y, error, color=colour, marker=marker, markersize=7, elinewidth=1.3, capsize=3, linestyle="none", zorder=3
    )


def draw_bars(axes: "Axes", values: Sequence[float], errors: Sequence[float | None], colours: Sequence[str]) -> None:
    """Lying bars with their errors, and their values written at the ends."""
    lengths, spread = np.nan_to_num(values), np.nan_to_num([as_float(error) for error in errors])
    rows = range(len(lengths))
    axes.barh(rows, lengths, 0.66, color=colours, xerr=spread, ecolor=INK, capsize=2.5, error_kw={"elinewidth": 1.1})
    for row, value in zip(rows, values, strict=True):
        end = (max(lengths[row] + spread[row], 0.0), row)
        axes.annotate(number(value, 3), end, (4, 0), textcoords="offset points", va="center", fontsize=SMALL)
    low, high = min(0.0, (lengths - spread).min()), max(0.0, (lengths + spread).max())
    axes.set_xlim(1.05 * low, high + 0.3 * ((high - low) or 1.0))
    axes.locator_params(axis="x", nbins=5)
    axes.axvline(0, color=MUTED, linewidth=0.8)


def draw_heat_map(axes: "Axes", values: np.ndarray, rows: list[str], label: str) -> None:
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


# labels


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


def clipped(name: str, most: int = 34) -> str:
    """A long name without its middle."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


# axes


def kl_axis(axes: "Axes", values: Iterable[float]) -> None:
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


def log_ticks(axis: Any, low: float, high: float) -> None:
    """At powers of ten, or at 1, 2 and 5 times them where there are few of those."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def block_ticks(axes: "Axes", count: int) -> None:
    """At as many blocks as there is room for."""
    shown = _thinned(count, 24)
    axes.set_xticks(shown, [str(i) for i in shown])
    axes.set_xlim(-0.6, count - 0.4)


def _thinned(count: int, most: int) -> range:
    """Every index, or every second, fifth, tenth, ... so that no more than `most` are left."""
    steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
    return range(0, count, next(step for step in steps if count / step <= most))


def byte_unit(largest: float) -> tuple[float, str]:
    """How many bytes an axis up to `largest` of them counts as one, and what that is called."""
    power = min(3, int(math.log10(max(largest, 1)) // 3))
    return 1000.0**power, ("bytes", "kB", "MB", "GB")[power]


def as_float(value: Any) -> float:
    """NaN for no value: what is not drawn."""
    return math.nan if value is None else float(value)
