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
"""What leaves this machine of a manifest and a report: the names of local files, and not where they lie."""

import copy
from pathlib import Path
from typing import Any

from hfcompress.models.manifest import FOLDER


LOCAL = (".txt", ".jsonl", ".parquet", ".npy", ".wav", ".yaml", ".yml")


def published(manifest: dict[str, Any], report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Args:
        manifest (`dict`): what `hfcompress.json` holds.
        report (`dict`): what `eval_results.json` holds; may be empty.

    Returns:
        `tuple[dict, dict]`: copies in which the paths of local files and folders are their last parts.
    """
    manifest, report = copy.deepcopy(manifest), copy.deepcopy(dict(report))
    base = manifest["base"]
    whole = base["model"]
    if base.get("kind") == FOLDER:
        base["model"] = Path(whole).name
    student = manifest.get("student", {})
    if student.get("kind") == FOLDER:
        student["model"] = Path(student["model"]).name
    for step in manifest["recipe"]["recipe"]:
        settings = step.get("distill", {})
        if "teacher_cache" in settings:
            settings["teacher_cache"] = Path(settings["teacher_cache"]).name
        if "teacher" in settings:
            settings["teacher"]["url"] = "http://teacher/v1"
        if isinstance(settings.get("student"), str) and student.get("kind") == FOLDER:
            settings["student"] = Path(settings["student"]).name
    sections = [manifest["calibration"], *(manifest["recipe"].get(key) for key in ("calibration", "evaluation"))]
    sections += [report.get("how"), *(found.get("how") for found in report.values() if isinstance(found, dict))]
    for section in sections:
        if not isinstance(section, dict):
            continue
        if isinstance(section.get("data"), str):
            section["data"] = _name(section["data"])
        for key, said in section.items():
            if isinstance(said, str):  # the baseline, and sentences that name it
                section[key] = said.replace(whole, base["model"])
        if isinstance(section.get("tasks"), list):
            section["tasks"] = [_name(task) for task in section["tasks"]]
    if "scores" in report.get("tasks", {}):
        report["tasks"]["scores"] = {_name(task): score for task, score in report["tasks"]["scores"].items()}
    return manifest, report


def is_local(source: str) -> bool:
    """Whether a data source or a task is a file, or a folder."""
    return source.endswith(LOCAL) or source.startswith(".") or Path(source).expanduser().is_absolute()


def _name(source: str) -> str:
    return Path(source).name if is_local(source) else source
