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
"""What a person reads in a checkpoint's folder: the plots, the page, the card; all drawn from its two JSON files."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hfcompress.evaluation import page, plots
from hfcompress.evaluation.report import Report
from hfcompress.formats.writer import disk_errors
from hfcompress.hub.card import write_card
from hfcompress.hub.published import published
from hfcompress.models.manifest import read_manifest


PAGE, PLOTS = "report.html", "plots"


def describe(folder: Path, name: str) -> None:
    """
    Write `plots/*.png`, `report.html` and `README.md` anew; pictures of an earlier run that are not drawn again go.

    Args:
        folder (`Path`): a checkpoint that hfcompress made.
        name (`str`): the model's name.

    Raises:
        OutputError: the folder is not writable, the disk is full, or `plots` is no folder.
    """
    manifest, report = published(read_manifest(folder), Report.load(folder) or Report())
    pictures = draw(folder, manifest, report)
    page.write(
        folder / PAGE,
        manifest,
        report,
        {key: folder / PLOTS / f"{key}.png" for key in pictures},
        generations_of(report),
    )
    write_card(folder, manifest, report, name, pictures=pictures)


def draw(folder: Path, manifest: dict[str, Any], report: dict[str, Any]) -> dict[str, str]:
    """
    Draw the folder's plots anew.

    Returns:
        `dict[str, str]`: name -> caption.
    """
    pictures = plots.draw(manifest, report, folder / PLOTS)
    _remove_others(folder / PLOTS, pictures)
    return pictures


def generations_of(report: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """What the two models made of the same prompts."""
    return report.get("stability", {}).get("generations") or report.get("generations")


def _remove_others(folder: Path, pictures: Collection[str]) -> None:
    """Old pictures would be pushed with the new ones."""
    with disk_errors(folder):
        for path in folder.glob("*.png"):
            if path.stem not in pictures:
                path.unlink()
