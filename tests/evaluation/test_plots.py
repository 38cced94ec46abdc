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
"""The pictures: real, readable, the same each time, and of the numbers that they say they show."""

import errno
import itertools
import math
import re

import matplotlib
import numpy as np
import pytest
from conftest import in_fresh_process
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from hfcompress.errors import OutputError
from hfcompress.evaluation import drawing, pictures, plots
from hfcompress.evaluation.published import LLAMA_CPP


CARD_WIDTH = 800  # pixels
SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (64, 256),
    "self_attn.v_proj": (64, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (384, 256),
    "mlp.up_proj": (384, 256),
    "mlp.down_proj": (256, 384),
}


def made_up_budget() -> dict:
    """What a budget of a model that does not exist was settled to."""

    def point(bits: float, kl: float) -> dict:
        return {"size_bytes": int(1e6 + 2e5 * bits), "bits_per_weight": bits, "kl": kl}

    return {
        "target": {"target_size": 1_700_000},
        "overrides": {},
        "chosen": {**point(3.4, 0.011), "bound": 0.0108},
        "curve": [point(bits, 4.0**-bits) for bits in (2.25, 2.5, 3.1, 3.5, 4.1, 8.1)],
        "uniform": {"2g64": point(2.25, 0.06), "4g128": point(4.125, 0.004)},
        "units": [{"linears": ["model.layers.0.mlp.down_proj"], "choice": "4g128", "choices": {}}],
        "trials": [],
    }


def made_up_manifest(blocks: int = 4, calibrated: bool = True) -> dict:
    """A manifest of a model that does not exist."""
    random = np.random.default_rng(0)
    rows = []
    for block, (linear, (rows_, columns)) in itertools.product(range(blocks), SHAPES.items()):
        bits = 8 if (block, linear) == (0, "mlp.down_proj") else 4
        error = 0.02 * math.exp(random.normal(0, 0.6))
        rows.append(
            {
                "name": f"model.layers.{block}.{linear}",
                "method": "gptq",
                "bits": bits,
                "group_size": 128,
                "symmetric": True,
                "shape": [rows_, columns],
                "sparsity": 0.125,
                "relative_output_error": error if calibrated else None,
                "relative_weight_error": 4 * error,
                "fallback": None,
                "bytes": rows_ * columns * bits // 8 + rows_ * columns // 64 + 16,
            }
        )
    return {
        "hfcompress": "0.0.0",
        "versions": {"python": "3.0", "torch": "2.0"},
        "recipe": {"recipe": [{"gptq": {"bits": 4}}], "format": "compressed-tensors"},
        "base": {"model": "nobody/no-model", "revision": "0123", "sha256": "f" * 64},
        "calibration": {"data": "bundled", "tokens": 1024, "samples": 4, "seq_len": 256, "sketch": list(range(64))},
        "seed": 0,
        "linears": rows,
        "budget": made_up_budget(),
        "skipped": {"lm_head": "it is tied to the embeddings"},
        "coverage": {"compressed": len(rows), "linears": len(rows) + 1},
        "fallbacks": 0,
        "device": "cpu",
        "dtype": "float32",
        "processes": 1,
        "finished": "2000-01-01T00:00:00+00:00",
        "phases": {"prepare": {"seconds": 0.5, "peak_rss_bytes": 2 * 10**8}},
    }


def made_up_quality(middle: float = 0.002) -> dict:
    """Quality of a model that does not exist."""
    kl = np.exp(np.random.default_rng(1).normal(math.log(middle), 1.2, 5000))
    counts, edges = np.histogram(kl, 10 ** np.linspace(-7, 1, 65))
    return {
        "perplexity": 14.25,
        "baseline_perplexity": 14.0,
        "log_perplexity_difference": 0.0177,
        "log_perplexity_difference_stderr": 0.0021,
        "kl_mean": float(kl.mean()),
        "kl_mean_stderr": float(kl.mean() / 30),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "top1_agreement": 0.951,
        "top1_agreement_stderr": 0.004,
        "rms_probability_change": 0.021,
        "tokens": 5000,
        "kl_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def made_up_report(blocks: int = 4) -> dict:
    """A report with all that there can be, of a model that does not exist."""
    random = np.random.default_rng(2)
    conditions = ["clean", "typos", "case", "whitespace", "token_swaps", "code", "language"]

    def score(before: float, after: float) -> dict:
        ends = {"baseline": before, "baseline_stderr": 0.01, "compressed": after, "compressed_stderr": 0.011}
        return ends | {
            "metric": "acc_norm",
            "higher_is_better": True,
            "recovery": after / before,
            "flips": 0.04,
            "documents": 500,
            "metrics": {"acc": {**ends, "baseline": before - 0.05, "compressed": after - 0.05}},
        }

    def speed(factor: float) -> dict:
        batches = {
            str(size): {
                "prefill_tokens_per_second": 900.0 * size * factor,
                "prefill_stderr": 11.0,
                "decode_tokens_per_second": 41.0 * size * factor,
                "decode_stderr": 0.6,
                "latency_p50_ms": 24.4 / factor,
                "latency_p90_ms": 26.1 / factor,
            }
            for size in (1, 8)
        }
        return {"parameters": 2_100_000, "flops_per_token": 4_200_000, "batches": batches}

    def memory(at_rest: int) -> dict:
        return {"disk_bytes": at_rest, "at_rest_bytes": at_rest, "after_forward_bytes": 5e6, "peak_bytes": 6e6}

    return made_up_quality() | {
        "size_bytes": 1_500_000,
        "baseline_size_bytes": 4_200_000,
        "how": {"data": "bundled", "rows": 96, "seq_len": 256, "baseline": "nobody/no-model", "seed": 0},
        "out_of_domain": made_up_quality(0.007) | {"data": "source code"},
        "tasks": {
            "scores": {"first": score(0.52, 0.46), "second": score(0.71, 0.72), "tenth": score(0.11, 0.108)},
            "recovery": 0.96,
            "how": {"library": "lm-eval"},
        },
        "speed": {"baseline": speed(1.0), "compressed": speed(0.93), "how": {"repeats": 5}},
        "memory": {"baseline": memory(4_200_000), "compressed": memory(1_500_000), "how": {"seed": 0}},
        "energy": {
            "baseline": {"joules_per_token": 0.52, "joules_per_token_stderr": 0.013, "tokens": 900},
            "compressed": {"joules_per_token": 0.55, "joules_per_token_stderr": 0.014, "tokens": 880},
            "how": {"source": "estimate", "text": "An estimate from the processor's time."},
        },
        "robustness": {
            "conditions": {
                name: {
                    "kl_mean": 0.004 * (1 + 0.4 * index),
                    "kl_mean_stderr": 0.0002,
                    "perplexity": 14.25 * 1.5**index,
                    "baseline_perplexity": 14.0 * 1.5**index,
                    "log_perplexity_difference_stderr": 0.004,
                    "top1_agreement": 0.95 - 0.01 * index,
                    "tokens": 2000,
                }
                for index, name in enumerate(conditions)
            },
            "positions": [{"from": 0, "to": 64, "kl_mean": 0.005, "kl_mean_stderr": 0.0004}],
            "calibration_error": {"baseline": 0.021, "compressed": 0.024},
            "adversarial": {
                "swaps": 4,
                "baseline_nll_before": 2.6,
                "baseline_nll_after": 5.1,
                "compressed_nll_before": 2.61,
                "compressed_nll_after": 5.22,
                "kl_before": 0.004,
                "kl_after": 0.021,
                "kl_after_stderr": 0.003,
            },
            "tasks": {"typos": {"first": {"baseline": 0.5, "compressed": 0.45}}},
            "how": {"seed": 0, "rows": 8},
        },
        "stability": {
            "kl_by_position": [
                {"from": at, "to": at + 512, "kl_mean": 0.004 + at * 1e-6, "kl_mean_stderr": 0.0003}
                for at in range(0, 4096, 512)
            ],
            "repetition": {"baseline": 0.1, "compressed": 0.16, "baseline_stderr": 0.01, "compressed_stderr": 0.01},
            "common_prefix": 23.5,
            "generations": [
                {"prompt": "Once", "baseline": " upon a time", "compressed": " upon a hill"},
                {"prompt": "x <b>", "baseline": "plain", "compressed": "<script>alert(1)</script>"},
            ],
            "how": {"seed": 0},
        },
        "explain": {
            "blocks": [
                {
                    "block": block,
                    "name": f"model.layers.{block}",
                    "relative_error": 0.01 * (block + 1) ** 0.7,
                    "relative_error_alone": 0.008 + 0.002 * (block % 3),
                    "attention_distance": 0.01,
                    "kl_swapped_in": 0.0005 * (1 + 7 * block % 5),
                    "kl_swapped_in_stderr": 0.00005,
                }
                for block in range(blocks)
            ],
            "attention": random.gamma(2, 0.01, (blocks, 8)).tolist(),
            "linears": [{"block": 0, "linear": "mlp.down_proj", "relative_output_error": 0.02}],
            "how": {"rows": 4},
        },
    }


def figures(manifest: dict, report: dict) -> dict[str, Figure]:
    """The pictures before they are saved, laid out."""
    found = {}
    with drawing.card_style():
        for name, picture in pictures.PICTURES.items():
            if (drawn := picture(manifest, report)) is not None:
                found[name] = drawn[0]
                found[name].draw_without_rendering()
    return found


def labels_of(axis) -> list[Text]:
    """All labels of an axis's ticks, drawn or not."""
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [label for tick in ticks for label in (tick.label1, tick.label2)] + [axis.offsetText]


def contrast(one, other) -> float:
    """As WCAG 2 defines it."""

    def luminance(colour):
        parts = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def is_real(path) -> bool:
    """A picture wide enough for a card, with more on it than its panel."""
    with Image.open(path) as image:
        shown = image.convert("RGB")
    counts = {colour: count for count, colour in shown.getcolors(1 << 24)}
    panel = tuple(round(255 * part) for part in matplotlib.colors.to_rgb(drawing.PANEL))
    corners = {shown.getpixel((x, y)) for x in (0, shown.width - 1) for y in (0, shown.height - 1)}
    assert corners == {panel}  # it has its own margin, on any page
    return shown.width >= CARD_WIDTH and len(counts) > 100 and counts[panel] < 0.97 * shown.width * shown.height


# all of them


def test_every_picture_is_drawn_and_real(tmp_path):
    captions = plots.draw(made_up_manifest(), made_up_report(), tmp_path / "new" / "plots")
    assert set(captions) == set(pictures.PICTURES)
    assert {path.name for path in (tmp_path / "new" / "plots").iterdir()} == {f"{name}.png" for name in captions}
    for name, caption in captions.items():
        assert is_real(tmp_path / "new" / "plots" / f"{name}.png"), name
        assert caption.endswith(".")
        assert "nan" not in caption
        with Image.open(tmp_path / "new" / "plots" / f"{name}.png") as image:
            assert image.info["Description"] == caption


def test_a_picture_needs_its_data(tmp_path):
    assert plots.draw({}, {}, tmp_path) == {}
    report = made_up_report()
    quality = {key: report[key] for key in (*made_up_quality(), "size_bytes", "baseline_size_bytes")}
    assert set(plots.draw({}, quality, tmp_path)) == {"size_kl", "kl_histogram"}
    for section in ("robustness", "stability", "explain"):
        assert plots.draw({}, {section: {"how": {}}}, tmp_path) == {}
    del quality["kl_histogram"], quality["kl_mean_stderr"]
    expected = {"size_kl", "budget", "layer_errors", "bits_by_layer"}
    assert set(plots.draw(made_up_manifest(), quality, tmp_path)) == expected


def test_a_real_checkpoint_is_drawn(tiny_w4, tmp_path):
    captions = plots.draw(tiny_w4.manifest, tiny_w4.report, tmp_path)
    assert {"size_kl", "layer_errors", "bits_by_layer"} <= set(captions)
    assert all(is_real(tmp_path / f"{name}.png") for name in captions)
    names, values = pictures.by_block(tiny_w4.manifest["linears"], lambda row: row["relative_output_error"])
    for row in tiny_w4.manifest["linears"]:
        block, linear = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", row["name"]).groups()
        assert values[names.index(linear), int(block)] == row["relative_output_error"]
    assert values.size == len(tiny_w4.manifest["linears"])


@pytest.mark.parametrize("blocks", [1, 4, 12, 32, 80])
def test_all_text_is_large_enough_and_nothing_overlaps(blocks):
    """At the width of a card: 11 pixels at least, inside the picture, and no tick label over another."""
    for name, figure in figures(made_up_manifest(blocks), made_up_report(blocks)).items():
        frame = figure.bbox
        to_card = CARD_WIDTH / frame.width
        ticks = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in labels_of(axis)}
        for text in figure.findobj(lambda a: isinstance(a, Text) and a.get_visible() and a.get_text().strip()):
            assert text.get_fontsize() * figure.dpi / 72 * to_card >= 11, (name, text)
            if text not in ticks:  # of which some lie outside of the limits and are not drawn
                box = Text.get_window_extent(text)
                assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, (name, text)
                assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, (name, text)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                limits = sorted(axis.get_view_interval())
                shown = [
                    tick.label1
                    for tick in axis.get_major_ticks()
                    if tick.label1.get_visible() and limits[0] <= tick.get_loc() <= limits[1]
                ]
                boxes = [label.get_window_extent() for label in shown if label.get_text()]
                for one, other in itertools.pairwise(boxes):
                    assert not one.overlaps(other), (name, [t.get_text() for t in shown])
                for box in boxes:
                    assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, name
                    assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, name


def test_the_same_bytes_whatever_the_users_style_is(tmp_path):
    plots.draw(made_up_manifest(), made_up_report(), tmp_path / "one")
    with matplotlib.rc_context({"font.size": 21, "axes.facecolor": "red", "figure.dpi": 33, "savefig.dpi": 44}):
        before = dict(matplotlib.rcParams)
        plots.draw(made_up_manifest(), made_up_report(), tmp_path / "other")
        assert dict(matplotlib.rcParams) == before
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name
        assert b"matplotlib" not in path.read_bytes()


def test_no_window_and_no_pyplot(tmp_path):
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom hfcompress.evaluation import plots\n"
        "early = 'matplotlib' in sys.modules\n"
        "made = plots.draw({}, {'kl_mean': 0.1, 'size_bytes': 1, 'baseline_size_bytes': 2}, Path(sys.argv[1]))\n"
        "print(json.dumps({'made': list(made), 'early': early}))"
    )
    found = in_fresh_process(code, str(tmp_path), forbid="matplotlib.pyplot")
    assert found == {"made": ["size_kl"], "early": False}


def test_text_stands_out_on_its_panel():
    for colour in (drawing.INK, drawing.MUTED):
        assert contrast(colour, drawing.PANEL) >= 4.5
    for colour in (drawing.BLUE, drawing.VERMILLION, drawing.GREEN):
        assert contrast(colour, drawing.PANEL) >= 3  # what is no text
    for colour in matplotlib.colormaps[drawing.SEQUENTIAL](np.linspace(0, 1, 256)):
        assert contrast(drawing.ink_on(colour), colour[:3]) >= 4.5


def test_names_are_not_formulas(tmp_path):
    manifest = made_up_manifest()
    for row in manifest["linears"]:
        row["name"] = row["name"].replace("_proj", r"$\undefined{$")
    plots.draw(manifest, {}, tmp_path)
    plots.pareto([candidate("$x^$", 1e6, 0.1), candidate(r"$\frac$", 2e6, 0.01)], tmp_path / "pareto.png")
    assert is_real(tmp_path / "pareto.png")


def test_a_full_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    plots.draw(made_up_manifest(), {}, tmp_path)
    before = (tmp_path / "layer_errors.png").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OutputError, match=r"The disk of .* is full; free some space"):
        plots.draw(made_up_manifest(8), {}, tmp_path)
    assert (tmp_path / "layer_errors.png").read_bytes() == before


def test_a_place_that_is_no_folder_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "plots"):
        with pytest.raises(OutputError, match="cannot be a folder: a file is in its place"):
            plots.draw({}, {}, folder)
        with pytest.raises(OutputError, match="cannot be a folder"):
            plots.pareto([candidate("one", 8e6, 0.1)], folder / "pareto.png")


# what they show


def test_blocks_and_linears_of_other_shapes():
    rows = [
        {"name": "transformer.h.0.attn.c_attn", "value": 1.0},
        {"name": "transformer.h.2.attn.c_attn", "value": 2.0},
        {"name": "transformer.h.2.moe.experts.0.up", "value": 3.0},
        {"name": "transformer.h.2.moe.experts.11.up", "value": 5.0},
        {"name": "transformer.h.1.moe.experts.0.up", "value": None},
        {"name": "lm_head", "value": 7.0},
    ]
    names, values = pictures.by_block(rows, lambda row: row["value"])
    assert names == ["attn.c_attn", "moe.experts.*.up"]
    np.testing.assert_array_equal(values, [[1, np.nan, 2], [np.nan, np.nan, 5]])
    _, sums = pictures.by_block(rows, lambda row: row["value"], sum)
    assert sums[1, 2] == 8
    assert pictures.by_block([], lambda row: 1.0)[1].shape == (0, 0)


def test_errors_of_weights_stand_in_and_are_called_so():
    manifest = made_up_manifest(calibrated=False)
    with drawing.card_style():
        figure, caption = pictures.layer_errors(manifest, {})
    drawn = figure.axes[0].collections[0].get_array().reshape(len(SHAPES), 4)
    rows = {row["name"]: row["relative_weight_error"] for row in manifest["linears"]}
    for (linear, name), block in itertools.product(enumerate(SHAPES), range(4)):
        assert drawn[linear, block] == rows[f"model.layers.{block}.{name}"]
    assert "weight error" in figure.axes[0].get_title(loc="left")
    assert "Relative weight error" in caption
    assert "outputs are not known" in caption


def test_bits_and_bytes_add_up():
    manifest = made_up_manifest(3)
    with drawing.card_style():
        figure, caption = pictures.bits_by_layer(manifest, {})
    above, below = figure.axes
    for block in range(3):
        rows = [row for row in manifest["linears"] if f".{block}." in row["name"]]
        stored = sum(row["bytes"] for row in rows)
        weights = sum(math.prod(row["shape"]) for row in rows)
        bars = [bar for bar in above.patches if bar.get_x() < block < bar.get_x() + bar.get_width()]
        assert len(bars) == len(rows)
        assert sum(bar.get_height() for bar in bars) == pytest.approx(stored / 1000)  # kB
        assert below.patches[block].get_height() == pytest.approx(8 * stored / weights)
    assert f"{sum(row['bytes'] for row in manifest['linears']) / 1000:.1f} kB" in caption


def test_many_kinds_of_linears_share_the_last_colour():
    manifest = {
        "linears": [{"name": f"h.0.part{i}", "bytes": 10 + i, "shape": [4, 4], "bits": 4} for i in range(12)],
    }
    with drawing.card_style():
        figure, _ = pictures.bits_by_layer(manifest, {})
    heights = {bar_.get_label(): bar_.patches[0].get_height() for bar_ in figure.axes[0].containers}
    assert len(heights) == len(drawing.CATEGORIES) + 1
    assert heights["others"] == sum(10 + i for i in range(12 - len(drawing.CATEGORIES)))
    assert sum(heights.values()) == sum(10 + i for i in range(12))


def test_published_results_are_kept_apart():
    """Ours on the left in bytes; another model's on the right, in shares of its own original, with their source."""
    report = made_up_report()
    with drawing.card_style():
        figure, caption = pictures.size_kl({}, report)
    left, right = figure.axes
    ours = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in left.lines if line.get_marker() in "soD"
    }
    assert ours == {(4.2, 0.0), (1.5, report["kl_mean"]), (1.5, report["out_of_domain"]["kl_mean"])}
    theirs = right.lines[0].get_xydata()
    expected = [(100 * r.gib / LLAMA_CPP.original_gib, r.kl_mean) for r in LLAMA_CPP.results]
    np.testing.assert_allclose(theirs, expected)
    assert LLAMA_CPP.source in caption
    assert "for orientation only" in caption
    assert LLAMA_CPP.model in right.get_title(loc="left")
    assert "not a ranking" in "".join(text.get_text() for text in right.texts)


def test_the_histogram_holds_all_predictions():
    report = made_up_report()
    report["kl_histogram"]["edges"][0] = 0.0  # a first bin that begins at zero has a place on the axis too
    with drawing.card_style():
        figure, caption = pictures.kl_histogram({}, report)
    values, edges, _ = figure.axes[0].patches[0].get_data()
    counts = np.array(report["kl_histogram"]["counts"])
    np.testing.assert_allclose(values, 100 * counts / counts.sum())
    assert (edges > 0).all()
    marked = sorted(float(line.get_xdata()[0]) for line in figure.axes[0].lines)
    assert marked == sorted(report[key] for key in ("kl_median", "kl_mean", "kl_p99"))
    assert "5,000 predictions" in caption


def test_robustness_bars_and_their_errors():
    report = made_up_report()
    with drawing.card_style():
        figure, caption = pictures.robustness({}, report)
    conditions = report["robustness"]["conditions"]
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    assert bars == [found["kl_mean"] for found in conditions.values()]
    ends = [segment[:, 0].tolist() for segment in figure.axes[0].collections[0].get_segments()]
    expected = [[c["kl_mean"] + sign * c["kl_mean_stderr"] for sign in (-1, 1)] for c in conditions.values()]
    np.testing.assert_allclose(ends, expected)
    added = [bar.get_width() for bar in figure.axes[1].patches]
    np.testing.assert_allclose(added, [100 * (14.25 / 14 - 1)] * len(conditions))
    ends = [segment[:, 0].tolist() for segment in figure.axes[1].collections[0].get_segments()]
    np.testing.assert_allclose(np.diff(ends)[:, 0], 2 * 100 * 14.25 / 14 * 0.004)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [name.replace("_", " ") for name in conditions]
    assert "language" in caption
    assert "3.40 times" in caption


def test_the_curve_along_a_text_lies_in_the_middle_of_its_positions():
    report = made_up_report()
    with drawing.card_style():
        figure, caption = pictures.stability({}, report)
    drawn = figure.axes[0].lines[0].get_xydata()
    buckets = report["stability"]["kl_by_position"]
    expected = [(np.arange(b["from"], b["to"]).mean(), b["kl_mean"]) for b in buckets]
    np.testing.assert_allclose(drawn, expected)
    assert "over positions 0\N{EN DASH}511" in caption
    assert "over 3,584\N{EN DASH}4,095." in caption


# several results


def candidate(name: str, size: float, kl: float, error: float | None = 0.001) -> dict:
    return {
        "name": name,
        "size_bytes": size,
        "kl_mean": kl,
        "kl_mean_stderr": error,
        "baseline_size_bytes": 16e6,
    }


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_front_is_what_no_other_beats(points):
    def beaten(point):
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    front = plots.pareto_front(points)
    assert sorted(front) == [i for i, point in enumerate(points) if not beaten(point)]
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_pareto_names_those_that_are_not_beaten(tmp_path):
    results = [candidate("four", 4e6, 0.02), candidate("worse", 5e6, 0.03), candidate("eight", 8e6, 0.001, None)]
    caption = plots.pareto(results, tmp_path / "new" / "pareto.png")
    assert is_real(tmp_path / "new" / "pareto.png")
    assert caption.endswith("no other is as small and as close as: four, eight.")
    first = (tmp_path / "new" / "pareto.png").read_bytes()
    plots.pareto(results, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == first
    plots.pareto([candidate("lossless", 8e6, 0.0)], tmp_path / "one.png")
    assert is_real(tmp_path / "one.png")


@pytest.mark.parametrize("seed", range(6))
def test_labels_collide_with_nothing(seed):
    random = np.random.default_rng(seed)
    points = [tuple(p) for p in np.column_stack([random.uniform(2, 9, 12), 10 ** random.uniform(-3, 0, 12)])]
    points += [(points[0][0], points[0][1] * 1.05), (16.0, 0.0)]  # a close neighbour, and one at the edge
    labels = [f"model-w{i}a16-g{2**i}" for i in range(len(points))]
    with drawing.card_style():
        figure = Figure(figsize=(drawing.INCHES, 4.6))
        axes = figure.subplots()
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_xlim(0, 18)
        axes.set_ylim(-1e-4, 2)
        drawing.place_labels(figure, axes, points, labels)
        figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == labels
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other)
    for box in boxes:
        assert axes.bbox.x0 - 1 <= box.x0 <= box.x1 <= axes.bbox.x1 + 1
        assert not any(box.padded(-1).contains(*axes.transData.transform(point)) for point in points)
