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
"""What a person reads in a folder: the same each time, and nothing of an earlier run."""

import shutil
from pathlib import Path

import pytest

from hfcompress.errors import OutputError
from hfcompress.hub.description import PAGE, PLOTS, describe


@pytest.fixture
def folder(tiny_w4, tmp_path) -> Path:
    """The small files of a checkpoint, which are all that a description needs."""
    for name in ("hfcompress.json", "eval_results.json"):
        shutil.copy(tiny_w4.output_dir / name, tmp_path / name)
    return tmp_path


def described(folder: Path) -> dict[str, bytes]:
    """All that lies there, but for what it is made from."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_twice_gives_the_same_bytes(tiny_w4, folder):
    describe(folder, "w4")
    first = described(folder)
    assert {"README.md", PAGE, f"{PLOTS}/size_kl.png", f"{PLOTS}/layer_errors.png"} <= set(first)
    describe(folder, "w4")
    assert described(folder) == first
    assert first["README.md"] == (tiny_w4.output_dir / "README.md").read_bytes()  # the run's own


def test_pictures_of_an_earlier_run_go(folder):
    describe(folder, "w4")
    drawn = described(folder)
    shutil.copy(folder / PLOTS / "size_kl.png", folder / PLOTS / "attention.png")  # as of a run that had measured it
    (folder / PLOTS / "notes.txt").write_text("mine")
    describe(folder, "w4")
    assert described(folder) == drawn | {f"{PLOTS}/notes.txt": b"mine"}
    (folder / "eval_results.json").unlink()
    describe(folder, "w4")
    assert {p.stem for p in (folder / PLOTS).glob("*.png")} == {"layer_errors", "bits_by_layer"}
    assert "size_kl" not in (folder / "README.md").read_text()


def test_something_else_in_the_place_of_the_pictures(folder):
    (folder / PLOTS).write_text("no folder")
    with pytest.raises(OutputError) as caught:
        describe(folder, "w4")
    said = f"{folder / PLOTS} cannot be a folder: a file is in its place; choose another one."
    assert str(caught.value) == said
    (folder / PLOTS).unlink()
    (folder / PLOTS).symlink_to(folder / "nowhere")
    with pytest.raises(OutputError, match="cannot be a folder"):
        describe(folder, "w4")
    assert not (folder / "README.md").exists()
