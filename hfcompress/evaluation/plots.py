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
Pictures as PNG files: all that a report has data for, and several results side by side, size against KL.

They are readable at the width of a model card, on a white page and on a dark one; see
[`hfcompress.evaluation.drawing`].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfcompress.evaluation.drawing import (
    BLUE,
    INK,
    MUTED,
    VERMILLION,
    byte_unit,
    card_style,
    clipped,
    draw_point,
    kl_axis,
    new_figure,
    place_labels,
    save,
)
from hfcompress.evaluation.numbers import counted
from hfcompress.evaluation.pictures import PICTURES
from hfcompress.formats.writer import disk_errors


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
        OutputError: the folder is no folder or not writable, or the disk is full.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    with card_style():
        for name, picture in PICTURES.items():
            drawn = picture(manifest, report)
            if drawn is not None:
                captions[name] = drawn[1]
                save(drawn, folder / f"{name}.png")
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
    labels = [clipped(c["name"]) for c in candidates] + ["original"] * len(originals)
    front = pareto_front(points)
    best = [labels[i] for i in front if i < len(candidates)]
    caption = (
        f"Size against KL to the original of {counted(len(candidates), 'result')}; no other is as small and as close as: "
        f"{', '.join(best) or 'the original'}."
    )
    with card_style():
        figure = new_figure(4.6)
        axes = figure.subplots()
        axes.set_title("Size against distance from the original")
        divisor, unit = byte_unit(max(x for x, _ in points))
        shown = [(x / divisor, y) for x, y in points]
        kl_axis(axes, [y for _, y in points])
        axes.set_xlim(0, max(x for x, _ in shown) * 1.12)
        axes.set_xlabel(f"size of the weights, {unit}")
        line = [shown[i] for i in front]
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1.2, zorder=2)
        for index, (x, y) in enumerate(shown):
            original = index >= len(candidates)
            error = None if original else candidates[index].get("kl_mean_stderr")
            colour = INK if original else BLUE if index in front else VERMILLION
            draw_point(axes, x, y, error, colour, marker="s" if original else "o" if index in front else "X")
        axes.plot([], [], "o", color=BLUE, label="no other is as small and as close")
        if len(front) < len(points):
            axes.plot([], [], "X", color=VERMILLION, label="another is smaller and closer")
        axes.legend(loc="upper right")
        place_labels(figure, axes, shown, labels, line)
        save((figure, caption), path)
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
