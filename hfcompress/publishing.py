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
"""`push()`: a folder's way to the Hub, past every check that a bad one should fail."""

from pathlib import Path
from typing import Any

from hfcompress.errors import InvalidValueError, RefusedError
from hfcompress.evaluation import plots
from hfcompress.evaluation.report import Report
from hfcompress.hub import push as hub
from hfcompress.hub.base_card import forbids_derivatives, is_gated
from hfcompress.hub.card import make_card
from hfcompress.hub.description import PLOTS
from hfcompress.hub.reload import check_reload
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.locate import is_hub_id
from hfcompress.models.manifest import MANIFEST, read_manifest
from hfcompress.progress import Progress, Silent
from hfcompress.recipes import job_from_dict


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    progress: Progress | None = None,
) -> hub.Pushed:
    """
    Check a compressed checkpoint and push it to the Hub in one commit.

    Args:
        folder (`str` or `Path`): what `hfcompress run` made.
        repo_id (`str`): `user/name`; the repo is created if it is not there.
        private (`bool`, *optional*, defaults to `False`): create it private.
        revision (`str`, *optional*): a branch; `main` if not given.
        message (`str`, *optional*): of the commit.
        progress (`Progress`, *optional*): is told how far it is.

    Raises:
        RefusedError: the recipe's gate or the reload check does not let it pass.
        HfcompressError: something else the user can put right, in one sentence.
    """
    progress = progress or Silent()
    hub.check_repo_id(repo_id)
    folder = Path(folder).expanduser().absolute()
    manifest = read_manifest(folder)
    if not manifest:
        wrong = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise InvalidValueError(f"{folder} cannot be pushed: {wrong}; give a folder that `hfcompress run` has made.")
    report = Report.load(folder) or Report()
    progress.start(1 + hub.UNITS)
    progress.step("checking", amount=0)
    _require_passed(folder, manifest, report)
    _point_out_licence(manifest, progress)
    reload = check_reload(folder, manifest)
    progress.step("reloaded")
    pictures = plots.draw(manifest, report, folder / PLOTS)
    name = repo_id.partition("/")[2]
    card = make_card(manifest, report, name, repo_id, pictures, reload)
    readme = str(card).encode()
    return hub.push(
        folder, repo_id, private=private, revision=revision, message=message, readme=readme, progress=progress
    )


def _require_passed(folder: Path, manifest: dict[str, Any], report: Report) -> None:
    """The report is of these weights, and the recipe's gate lets them pass."""
    size = Checkpoint.open(folder).size_bytes
    if report and report.get("size_bytes") != size:
        raise RefusedError(
            f"The report in {folder} is of other weights ({report.get('size_bytes')} bytes, and there are {size}); "
            f"measure again: hfcompress eval {folder} --save."
        )
    refusals = job_from_dict(manifest["recipe"]).evaluation.refusals(report)
    if refusals:
        raise RefusedError(f"The gate refuses to push {folder}: {'; '.join(refusals)}.")


def _point_out_licence(manifest: dict[str, Any], progress: Progress) -> None:
    base = manifest["base"]
    name, licence = base["model"].partition("@")[0], base.get("card", {}).get("license")
    if forbids_derivatives(licence):
        progress.note(f"{name} is under {licence}, which allows no derivatives: check whether you may share this one")
    if is_hub_id(name) and is_gated(name):
        progress.note(f"{name} is gated: check whether its terms let you share what was made from it")
