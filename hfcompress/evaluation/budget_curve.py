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
"""The picture of a budget: what it could buy, and what it bought."""

from typing import Any

from hfcompress.evaluation.drawing import (
    BLUE,
    MUTED,
    PANEL,
    VERMILLION,
    Picture,
    byte_unit,
    clipped,
    draw_point,
    kl_axis,
    new_figure,
    place_labels,
)
from hfcompress.evaluation.numbers import number, size


def budget(manifest: dict[str, Any], report: dict[str, Any]) -> Picture | None:
    """Size against predicted KL: the best of every size, every choice for all linears, and what a budget chose."""
    found = manifest.get("budget") or {}
    if not found.get("curve") or not found.get("chosen"):
        return None
    chosen, uniform = found["chosen"], found.get("uniform") or {}
    caption = (
        f"Size against predicted KL: chosen are {size(chosen['size_bytes'])}, {chosen['bits_per_weight']:.2f} bits per weight, "
        f"and {number(chosen['kl'], 3)} nats; no choice of that size is predicted to go below {number(chosen['bound'], 3)}."
    )
    figure = new_figure(4.2)
    axes = figure.subplots()
    axes.set_title("What the budget could buy, and what it bought")
    everything = [*found["curve"], *uniform.values(), chosen]
    divisor, unit = byte_unit(max(point["size_bytes"] for point in everything))

    def at(point: dict[str, float]) -> tuple[float, float]:
        return point["size_bytes"] / divisor, point["kl"]

    line, others = [at(point) for point in found["curve"]], [at(point) for point in uniform.values()]
    kl_axis(axes, [point["kl"] for point in everything])
    axes.set_ylabel("predicted KL to the original, nats")
    axes.set_xlabel(f"size of the weights, {unit}")
    axes.plot(*zip(*line, strict=True), "o-", color=MUTED, markerfacecolor=PANEL, linewidth=1.0, markersize=4)
    for point in others:
        draw_point(axes, *point, None, VERMILLION, "X")
    draw_point(axes, *at(chosen), None, BLUE, "o")
    axes.plot([], [], "o-", color=MUTED, markerfacecolor=PANEL, markersize=4, label="the best of every size")
    axes.plot([], [], "X", color=VERMILLION, label="one choice for all linears")
    axes.plot([], [], "o", color=BLUE, label="chosen")
    axes.legend(loc="upper right")
    place_labels(figure, axes, [*others, at(chosen)], [*map(clipped, uniform), "chosen"], line)
    return figure, caption
