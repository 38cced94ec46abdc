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
"""The house: light to enter, and its public names are where they should be."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import hfcompress as hfc


ROOT = Path(__file__).parents[1]


def imported_by(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_public_names_are_there():
    for name in hfc.__all__:
        assert getattr(hfc, name) is not None
    assert callable(hfc.compress)


def test_recipes_and_the_command_line_need_no_torch():
    for code in ("import hfcompress", "import hfcompress as h; h.GPTQ(bits=3)", "import hfcompress.cli"):
        assert "torch" not in imported_by(code)


def test_only_what_trains_needs_the_trainer():
    """It takes two seconds and 140 MB."""
    found = imported_by("import hfcompress.compression, hfcompress.preparing")
    assert "transformers.modeling_utils" in found
    assert "transformers.trainer" not in found


def test_every_shipped_recipe_has_a_script():
    library = {p.stem for p in (ROOT / "hfcompress" / "recipes" / "library").glob("*.yaml")}
    scripts = {p.stem for p in (ROOT / "recipes").glob("*.py")}
    assert {name.replace("-", "_") for name in library} == scripts
    for name in library:
        assert f'run_recipe("{name}")' in (ROOT / "recipes" / f"{name.replace('-', '_')}.py").read_text()


def test_a_wheel_holds_every_package_and_its_data():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    elsewhere = settings["package-dir"]
    sources = {path.parent.relative_to(ROOT) for path in (ROOT / "hfcompress").rglob("*.py")}
    assert {Path(elsewhere.get(name, name.replace(".", "/"))) for name in settings["packages"]} == sources
    data = {
        path for name, globs in settings["package-data"].items() for glob in globs for path in matching(name, glob)
    }
    others = {path for path in (ROOT / "hfcompress").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in others if path.suffix != ".py"} == data


def matching(package: str, glob: str) -> list[Path]:
    return [path for path in ROOT.joinpath(*package.split(".")).glob(glob) if path.is_file()]


def test_every_source_file_has_its_licence():
    for folder in ("hfcompress", "recipes", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "Apache License, Version 2.0" in path.read_text()[:600], path
