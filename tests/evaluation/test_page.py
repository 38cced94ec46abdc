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
"""The page, opened in a browser: what is on it, that it sorts, that it is readable, and that it fetches nothing."""

import errno
import functools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from test_plots import made_up_manifest, made_up_quality, made_up_report

from hfcompress.errors import OutputError
from hfcompress.evaluation import numbers, page, plots
from hfcompress.evaluation.pictures import PICTURES


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = '"><img src="https://example.org/x.png" onerror="document.title=1"><script>document.title=2</script>'
# What a reader sees of an element: its ink, and the first ground below it that is not transparent.
COLOURS = """() => {
  const ground = e => {
    const colour = getComputedStyle(e).backgroundColor;
    return colour !== "rgba(0, 0, 0, 0)" || !e.parentElement ? colour : ground(e.parentElement);
  };
  const written = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.querySelectorAll("body *")].filter(e => written(e) && e.checkVisibility()).map(
    e => [e.tagName, getComputedStyle(e).color, ground(e)]);
}"""


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("There is no Chromium here, which the tests of the page need: apt-get install chromium.")
        pytest.skip("there is no Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> tuple[dict, dict, Path]:
    """A manifest and a report with everything in them, and their page."""
    manifest, report = made_up_manifest(), made_up_report()
    return manifest, report, written(tmp_path_factory.mktemp("page"), manifest, report)


def written(folder: Path, manifest: dict, report: dict) -> Path:
    pictures = plots.draw(manifest, report, folder / "plots")
    page.write(folder / "report.html", manifest, report, {n: folder / "plots" / f"{n}.png" for n in pictures})
    shutil.rmtree(folder / "plots")  # the page has to do without
    return folder / "report.html"


class Opened:
    """A page in the browser, and all that it asked for and complained of."""

    def __init__(self, browser, path: Path, **options):
        self.requests, self.complaints = [], []
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()

    def rows(self, table: str) -> list[list[str]]:
        """The texts of a table's cells."""
        script = "t => [...document.querySelectorAll(`#${t} tbody tr`)].map(r => [...r.cells].map(c => c.textContent))"
        return self.page.evaluate(script, table)

    def sorted_by(self, table: str, column: str) -> tuple[list[float | None], str | None]:
        """The numbers that a column is sorted by, and what its head says of the order."""
        heads = self.page.locator(f"#{table} thead th").all_inner_texts()
        index = next(i for i, head in enumerate(heads) if head.strip() == column)
        script = "([t, i]) => [...document.querySelectorAll(`#${t} tbody tr`)].map(r => r.cells[i].dataset.value)"
        values = self.page.evaluate(script, [table, index])
        order = self.page.locator(f"#{table} thead th").nth(index).get_attribute("aria-sort")
        return [float(value) if value else None for value in values], order


def test_the_tables_and_the_plots_are_there(browser, made_up):
    manifest, report, path = made_up
    with Opened(browser, path) as opened:
        pictures = opened.page.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt])")
        assert len(pictures) == len(PICTURES)
        for natural, shown, text in pictures:
            assert natural >= 700
            assert shown > 300
            assert len(text) > 20
        expected = {
            "tasks-table": len(report["tasks"]["scores"]),
            "metrics-table": 3,
            "speed-table": 8,
            "memory-table": 4,
            "energy-table": 2,
            "robustness-table": len(report["robustness"]["conditions"]),
            "calibration-error-table": 1,
            "adversarial-table": 2,
            "robustness-tasks-table": 1,
            "robustness-positions-table": 1,
            "stability-table": 2,
            "positions-table": len(report["stability"]["kl_by_position"]),
            "explain-table": len(report["explain"]["blocks"]),
            "explain-linears-table": 1,
            "linears-table": len(manifest["linears"]),
            "phases-table": 1,
        }
        assert {name: len(opened.rows(name)) for name in expected} == expected
        for name in expected:
            columns = len(opened.page.locator(f"#{name} thead th").all())
            assert {len(row) for row in opened.rows(name)} == {columns}, name
        sections = opened.page.locator("main section").evaluate_all("all => all.map(s => s.id)")
        assert sections == [
            *("limits", "quality", "tasks", "speed", "memory", "energy", "robustness", "stability", "explain"),
            *("generations", "linears", "making"),
        ]
        links = opened.page.locator("nav a").evaluate_all("all => all.map(a => a.getAttribute('href').slice(1))")
        assert links == sections


def test_its_numbers_are_the_reports(browser, made_up):
    manifest, report, path = made_up
    with Opened(browser, path) as opened:
        quality = {row[0]: row[1:] for row in opened.rows("quality-table")}
        other = report["out_of_domain"]
        assert quality["perplexity, compressed"] == ["14.25", "14.25"]
        assert quality["difference of the log-perplexities"] == ["0.0177 ± 0.0021"] * 2
        shown = [float(cell.split(" ± ")[0]) for cell in quality["KL to the original, mean (nats)"]]
        assert shown == pytest.approx([report["kl_mean"], other["kl_mean"]], rel=0.01)
        assert quality["same most likely token"] == ["95.10 ± 0.40 %"] * 2
        assert opened.rows("tasks-table")[0][:6] == [
            *("first", "acc_norm", "0.520 ± 0.010", "0.460 ± 0.011", "88.46 %", "4.00 %")
        ]
        assert opened.rows("adversarial-table") == [
            ["none", "2.600", "2.610", "0.004000"],
            ["adversarial, up to 4", "5.100", "5.220", "0.0210 ± 0.0030"],
        ]
        assert [row[0] for row in opened.rows("positions-table")][:2] == ["0\N{EN DASH}511", "512\N{EN DASH}1,023"]
        assert opened.rows("robustness-positions-table")[0][0] == "0\N{EN DASH}63"
        assert opened.rows("energy-table")[0][1:] == ["0.520 ± 0.013", "0.550 ± 0.014", "1.06x"]
        values, _ = opened.sorted_by("linears-table", "output error")
        assert values == [row["relative_output_error"] for row in manifest["linears"]]
        text = opened.page.inner_text("body")
        assert "An estimate from the processor's time." in text
        assert "Relative output error of every linear, on the calibration text" in text
        assert "35.7 % of it" in text
        assert "gptq, 4 and 8 bits, groups of 128, 28 of 29 linears" in text
        assert "64 values" in text  # and not the 64 of them
        headline = opened.page.inner_text("#headline")
        assert "1.500 MB" in headline
        assert "96.0 %" in headline


def test_a_click_sorts_by_number_and_another_turns_it_round(browser, made_up):
    manifest, _, path = made_up
    with Opened(browser, path) as opened:
        errors = sorted(row["relative_output_error"] for row in manifest["linears"])
        button = opened.page.locator("#linears-table thead button", has_text="output error")
        button.click()
        assert opened.sorted_by("linears-table", "output error") == (errors, "ascending")
        button.click()
        assert opened.sorted_by("linears-table", "output error") == (errors[::-1], "descending")
        opened.page.locator("#linears-table thead button", has_text="bytes").focus()
        opened.page.keyboard.press("Enter")  # by the keyboard as well
        sizes = sorted(row["bytes"] for row in manifest["linears"])
        assert opened.sorted_by("linears-table", "bytes") == (sizes, "ascending")
        assert opened.sorted_by("linears-table", "output error")[1] is None
        opened.page.locator("#tasks-table thead button", has_text="task").click()
        assert [row[0] for row in opened.rows("tasks-table")] == ["first", "second", "tenth"]
        opened.page.locator("#tasks-table thead button", has_text="recovery").click()
        assert [row[0] for row in opened.rows("tasks-table")] == ["first", "tenth", "second"]
        assert not opened.complaints


def test_what_has_no_value_sorts_last(browser, tmp_path):
    report = made_up_report()
    report["tasks"]["scores"]["second"]["recovery"] = None
    report["tasks"]["scores"]["tenth"]["recovery"] = float("nan")
    with Opened(browser, written(tmp_path, {}, report)) as opened:
        button = opened.page.locator("#tasks-table thead button", has_text="recovery")
        for _ in range(2):
            button.click()
            assert [row[0] for row in opened.rows("tasks-table")] == ["first", "second", "tenth"]


def test_nothing_leaves_the_page(browser, made_up):
    path = made_up[2]
    with Opened(browser, path) as opened:
        opened.page.wait_for_load_state("networkidle")
        assert [url for url in opened.requests if not url.startswith("data:")] == [path.as_uri()]
        assert not opened.complaints
        opened.page.evaluate("fetch('https://example.org/').catch(() => null)")
        opened.page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 3'}))"
        )
        assert opened.page.title() != "3"
        assert [url for url in opened.requests if not url.startswith("data:")] == [path.as_uri()]
        assert {kind for kind in ("Connecting", "inline script") if any(kind in c for c in opened.complaints)} == {
            *("Connecting", "inline script")
        }, opened.complaints
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", path.read_text())
    assert "http:" not in text
    assert "https:" not in text
    assert not re.findall(r"(?:src|href)=\"(?!#|\")", text)


def test_texts_of_models_stay_texts(browser, tmp_path):
    manifest, report = made_up_manifest(), made_up_report()
    manifest["base"]["model"] = manifest["linears"][0]["name"] = manifest["recipe"]["format"] = EVIL
    manifest["skipped"] = {EVIL: EVIL}
    report["tasks"]["scores"][EVIL] = report["tasks"]["scores"]["first"]
    report["robustness"]["conditions"][EVIL] = report["robustness"]["conditions"]["typos"]
    report["how"][EVIL] = report["something_else"] = {EVIL: EVIL}
    report["stability"]["generations"].append({"prompt": EVIL, "baseline": EVIL, "compressed": EVIL})
    with Opened(browser, written(tmp_path, manifest, report)) as opened:
        texts = opened.page.locator(".generation .text").all_inner_texts()
        assert texts[5] == "<script>alert(1)</script>"
        assert texts[6:] == [EVIL] * 3
        assert opened.rows("linears-table")[0][0] == EVIL
        assert EVIL in opened.page.title()
        assert len(opened.page.query_selector_all("script")) == 1
        assert [url for url in opened.requests if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
        assert not opened.complaints


def test_generations_stand_side_by_side(browser, made_up):
    path = made_up[2]
    with Opened(browser, path) as opened:
        first = opened.page.locator(".generation").first
        assert first.locator(".text").all_inner_texts() == ["Once", " upon a time", " upon a hill"]
        assert first.locator("mark").all_inner_texts() == [" upon a "] * 2
        left, right = (box.bounding_box() for box in first.locator(".pair > div").all())
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out(browser, made_up, scheme):
    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    with Opened(browser, made_up[2], color_scheme=scheme) as opened:
        opened.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        found = opened.page.evaluate(COLOURS)
        assert {"H1", "TD", "TH", "BUTTON", "FIGCAPTION", "SUMMARY", "MARK", "A", "DT", "DD", "LI"} <= {
            f[0] for f in found
        }
        for tag, ink, ground in found:
            dark, light = sorted((luminance(ink), luminance(ground)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (tag, ink, ground)
        ground = luminance(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert ground < 0.05 if scheme == "dark" else ground > 0.9


def test_a_phone_scrolls_tables_and_not_the_page(browser, made_up):
    with Opened(browser, made_up[2], viewport={"width": 390, "height": 800}) as opened:
        opened.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
        boxes = [box.bounding_box() for box in opened.page.locator(".generation .pair > div").all()[:2]]
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]  # one above the other


# parts of a report


def test_quality_alone(browser, tmp_path):
    report = made_up_quality() | {"size_bytes": 1, "baseline_size_bytes": 2}
    with Opened(browser, written(tmp_path, made_up_manifest(), report)) as opened:
        sections = opened.page.locator("main section").evaluate_all("all => all.map(s => s.id)")
        assert sections == ["limits", "quality", "linears", "making"]
        text = opened.page.inner_text("#limits")
        assert "Not measured: tasks, speed, memory, energy, robustness, stability, explain." in text
        assert not opened.complaints


def test_a_real_checkpoint(browser, tiny_w4, tmp_path):
    with Opened(browser, written(tmp_path, tiny_w4.manifest, tiny_w4.report)) as opened:
        assert len(opened.rows("linears-table")) == len(tiny_w4.manifest["linears"])
        headline = opened.page.inner_text("#headline")
        assert numbers.number(tiny_w4.report["kl_mean"], 3) in headline
        assert numbers.number(tiny_w4.report["perplexity"]) in headline
        assert numbers.size(tiny_w4.output_dir.joinpath("model.safetensors").stat().st_size) in headline
        assert opened.page.evaluate("[...document.images].every(i => i.naturalWidth > 700)")
        assert not opened.complaints


def test_any_part_may_be_missing(monkeypatch):
    """Of every section, with each of its keys left out, and with nothing in it."""
    assert page.render({}, {}, {})
    monkeypatch.setattr(page, "_environment", functools.cache(page._environment))  # compiled once
    manifest, report = made_up_manifest(1), made_up_report(1)
    assert page.render(manifest, {}, {})
    for whole, first in ((report, False), (manifest, True)):
        for key, found in whole.items():
            cut = [{k: v for k, v in whole.items() if k != key}]
            if isinstance(found, dict):
                cut += [{**whole, key: {k: v for k, v in found.items() if k != left}} for left in found]
                cut += [{**whole, key: {**found, left: None}} for left in found]
            for changed in cut:
                try:
                    assert "</html>" in (
                        page.render(changed, report, {}) if first else page.render(manifest, changed, {})
                    )
                except Exception as error:
                    raise AssertionError(f"without {key}: {json.dumps(changed.get(key))[:200]}") from error


def test_what_could_not_be_measured_says_why():
    report = made_up_quality() | {"skipped": {"energy": "there is no counter."}, "score": None}
    assert "energy (there is no counter.)" in page.render({}, report, {})
    report["score"] = {"value": 1.25, "parts": {"size": 2.8, "kl_mean": 0.99}, "weights": {"size": 1, "kl_mean": 3}}
    html = page.render({}, report, {})
    assert "Composite score: 1.250" in html
    assert "size 2.800, weight 1; kl mean 0.9900, weight 3)" in html


def test_token_ids_where_there_is_no_tokenizer():
    html = page.render({}, {}, {}, [{"prompt": [1, 2], "baseline": [3, 4, 5], "compressed": [3, 4, 6]}])
    assert '<div class="text" dir="auto">1 2</div>' in html
    assert "<mark>3 4 </mark>5" in html


def test_local_paths_are_not_shown():
    manifest = made_up_manifest(1)
    manifest["base"]["model"] = "/home/somebody/models/mine"
    html = page.render(manifest, made_up_quality() | {"how": {"data": "/home/somebody/text.txt"}}, {})
    assert "somebody" not in html
    assert "mine, compressed" in html
    assert "text.txt" in html


def test_a_full_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    page.write(tmp_path / "report.html", {}, {}, {})
    before = (tmp_path / "report.html").read_text()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"The disk of .* is full; free some space"):
        page.write(tmp_path / "report.html", made_up_manifest(), {}, {})
    assert (tmp_path / "report.html").read_text() == before


# numbers


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.number(None), numbers.NOTHING),
        (numbers.number(float("nan")), numbers.NOTHING),
        (numbers.number(float("inf")), numbers.NOTHING),
        (numbers.number(0), "0"),
        (numbers.number(0.0), "0"),
        (numbers.number(24480), "24,480"),
        (numbers.number(13.8905), "13.89"),
        (numbers.number(0.0042417), "0.004242"),
        (numbers.number(0.0042417, 2), "0.0042"),
        (numbers.number(123456.7), "123,457"),
        (numbers.number(3.14e-7, 3), "3.14e-07"),
        (numbers.number(-2.5), "-2.500"),
        (numbers.number(9.9996), "10.00"),
        (numbers.plus_minus(0.00424176, 0.000131), "0.00424 ± 0.00013"),
        (numbers.plus_minus(13.89, 0.2), "13.89 ± 0.20"),
        (numbers.plus_minus(5000.3, 31.4), "5,000 ± 31"),
        (numbers.plus_minus(0.5, None), "0.5000"),
        (numbers.plus_minus(0.5, 0.0), "0.5000"),
        (numbers.plus_minus(None, 0.1), numbers.NOTHING),
        (numbers.plus_minus(2e-12, 3e-13), "2.00e-12 ± 3.0e-13"),
        (numbers.percent(0.957516), "95.75 %"),
        (numbers.percent(0.957516, 3), "95.8 %"),
        (numbers.percent(0.957516, error=0.0013), "95.75 ± 0.13 %"),
        (numbers.percent(None), numbers.NOTHING),
        (numbers.ratio(1.0, 4.0), "0.250x"),
        (numbers.ratio(1.0, 0.0), numbers.NOTHING),
        (numbers.size(999), "999 B"),
        (numbers.size(1485544), "1.486 MB"),
        (numbers.size(16.06e9), "16.06 GB"),
        (numbers.size(5e12), "5,000 GB"),
        (numbers.span(32, 60), "32\N{EN DASH}59"),
        (numbers.span(0, 1), "0"),
        (numbers.span(512, 2048), "512\N{EN DASH}2,047"),
        (numbers.span(None, 60), numbers.NOTHING),
        (numbers.counted(1, "block"), "1 block"),
        (numbers.counted(2, "block"), "2 blocks"),
        (page.brief(0), "0"),
        (page.brief(1), "1"),
        (page.brief(True), "yes"),
        (page.brief(None), "none"),
        (page.brief([1, 2]), "[1, 2]"),
        (page.brief([]), "none"),
        (page.brief(list(range(2000))), "2,000 values"),
    ],
)
def test_numbers(shown, expected):
    assert shown == expected
