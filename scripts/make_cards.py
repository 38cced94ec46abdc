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
Make the cards in `model_cards/` again: one for every shipped recipe, on the bundled tiny model.

    python scripts/make_cards.py [RECIPE...]

Each recipe is run and measured anew, so the figures are those of the machine that this runs on.
"""

import sys
import tempfile
from pathlib import Path

import hfcompress as hfc
from hfcompress.hub.card import write_card
from hfcompress.models.tiny import TINY_NAME
from hfcompress.recipes import shipped_recipes


CARDS = Path(__file__).parents[1] / "model_cards"
MEASUREMENTS = ("quality", "tasks", "robustness")


def main(recipes: list[str]) -> None:
    """Write `model_cards/MODELNAME-RECIPE.md` for each recipe."""
    for recipe in recipes or list(shipped_recipes()):
        name = f"{TINY_NAME}-{recipe}"
        with tempfile.TemporaryDirectory() as scratch:
            result = hfc.compress(None, recipe, Path(scratch) / name, measure=MEASUREMENTS)
            write_card(Path(scratch), result.manifest, dict(result.report or {}), name)
            (CARDS / f"{name}.md").write_bytes((Path(scratch) / "README.md").read_bytes())
        print(CARDS / f"{name}.md")


if __name__ == "__main__":
    main(sys.argv[1:])
