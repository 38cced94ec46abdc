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

from pathlib import Path

from hfcompress.evaluation import page, plots
from hfcompress.evaluation.report import Report
from hfcompress.hub.card import write_card
from hfcompress.models.manifest import read_manifest


PAGE, PLOTS = "report.html", "plots"


def describe(folder: Path, name: str) -> None:
    """
    Write `plots/*.png`, `report.html` and `README.md` anew.

    Args:
        folder (`Path`): a checkpoint that hfcompress made.
        name (`str`): the model's name.
    """
    manifest, report = read_manifest(folder), Report.load(folder) or Report()
    pictures = plots.draw(manifest, report, folder / PLOTS)
    page.write(
        folder / PAGE,
        manifest,
        report,
        {key: folder / PLOTS / f"{key}.png" for key in pictures},
        report.get("stability", {}).get("generations"),
    )
    write_card(folder, manifest, report, name, pictures=pictures)
