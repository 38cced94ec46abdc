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
from hfcompress.evaluation import page
from hfcompress.evaluation.report import EVALUATION, Report
from hfcompress.formats.writer import json_text
from hfcompress.hub import push as hub
from hfcompress.hub.base_card import forbids_derivatives, is_gated
from hfcompress.hub.card import make_card
from hfcompress.hub.description import PAGE, PLOTS, draw, generations_of
from hfcompress.hub.published import published
from hfcompress.hub.reload import Reload, check_reload
from hfcompress.models.adapter import ADAPTER, rebased
from hfcompress.models.adapter import CONFIG as ADAPTER_CONFIG
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.manifest import HUB, MANIFEST, read_manifest
from hfcompress.progress import Progress, Silent
from hfcompress.recipes import job_from_dict


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    trust_remote_code: bool = False,
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
        trust_remote_code (`bool`, *optional*): run modelling code that the folder carries, for the check.
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
    _require_passed(folder, manifest, report, trust_remote_code)
    _point_out_licence(manifest, progress)
    reload = check_reload(folder, manifest, trust_remote_code)
    progress.step("reloaded")
    contents = _told(folder, *published(manifest, report), repo_id, reload)
    return hub.push(
        folder, repo_id, private=private, revision=revision, message=message, contents=contents, progress=progress
    )


def _told(
    folder: Path, manifest: dict[str, Any], report: dict[str, Any], repo_id: str, reload: Reload
) -> dict[str, bytes]:
    """What the repo says of the model, with the repo's name in it and no path of this machine."""
    pictures = draw(folder, manifest, report)
    drawn = {key: folder / PLOTS / f"{key}.png" for key in pictures}
    card = make_card(manifest, report, repo_id.partition("/")[2], repo_id, pictures, reload)
    texts = {
        "README.md": str(card),
        MANIFEST: json_text(manifest),
        PAGE: page.render(manifest, report, drawn, generations_of(report)),
        **({EVALUATION: json_text(report)} if report else {}),
    }
    if (config := folder / ADAPTER / ADAPTER_CONFIG).is_file():
        texts[f"{ADAPTER}/{ADAPTER_CONFIG}"] = rebased(config.read_text(encoding="utf-8"), repo_id)
    return {name: text.encode() for name, text in texts.items()}


def _require_passed(folder: Path, manifest: dict[str, Any], report: Report, trust_remote_code: bool) -> None:
    """The weights and the configuration are those that were written and measured, and the gate lets them pass."""
    if Checkpoint.open(folder, trust_remote_code=trust_remote_code).sha256 != manifest.get("sha256"):
        raise RefusedError(
            f"The weights or config.json in {folder} are not what hfcompress wrote there; "
            "compress the model again with `hfcompress run`."
        )
    if report.get("how", {}).get("candidate_sha256", manifest["sha256"]) != manifest["sha256"]:
        raise RefusedError(
            f"The report in {folder} is of other weights; measure again with `hfcompress eval {folder} --save`."
        )
    refusals = job_from_dict(manifest["recipe"]).evaluation.refusals(report)
    if refusals:
        raise RefusedError(f"The gate refuses to push {folder}: {'; '.join(refusals)}.")


def _point_out_licence(manifest: dict[str, Any], progress: Progress) -> None:
    base = manifest["base"]
    name, licence = base["model"].partition("@")[0], base.get("card", {}).get("license")
    if forbids_derivatives(licence):
        progress.note(f"{name} is under {licence}, which allows no derivatives: check whether you may share this one")
    if base.get("kind") == HUB and is_gated(name):
        progress.note(f"{name} is gated: check whether its terms let you share what was made from it")
