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
"""What the base model's own card says that its compressed form has to carry on: the licence above all."""

import re
from pathlib import Path
from typing import Any

import yaml


KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
PLAIN = re.compile(r"[\w .,:/+#%()-]{1,200}", re.ASCII)  # what cannot become markup in our card


def base_card(folder: Path | None) -> dict[str, Any]:
    """
    Args:
        folder (`Path` or `None`): the base checkpoint's folder.

    Returns:
        `dict`: those of `license`, `license_name`, `license_link`, `language` and `pipeline_tag` that its `README.md`
        has in its front matter, as plain texts or lists of them; what is anything else is left out.
    """
    path = None if folder is None else folder / "README.md"
    if path is None or not path.is_file():
        return {}
    head, _, rest = path.read_text(encoding="utf-8", errors="replace").lstrip().partition("---\n")
    if head.strip() or not rest:
        return {}
    try:
        front = yaml.load(rest.partition("\n---")[0], yaml.BaseLoader)  # every scalar is a text: `no` is Norwegian
    except yaml.YAMLError:
        return {}  # a card that its own author broke says nothing
    return {key: front[key] for key in KEPT if _plain(front.get(key))} if isinstance(front, dict) else {}


def _plain(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and PLAIN.fullmatch(text) for text in texts)


def forbids_derivatives(license_: Any) -> bool:
    """Whether a licence identifier is one that allows no derivatives, such as `cc-by-nc-nd-4.0`."""
    return "nd" in str(license_ or "").lower().split("-")


def is_gated(repo_id: str) -> bool:
    """Whether the Hub asks for terms to be accepted before it hands out a model; `False` where it does not tell."""
    from huggingface_hub import model_info

    from hfcompress.hub.upload_errors import ONCE, HubError, ask

    try:
        return bool(ask(lambda: model_info(repo_id), repo_id, ONCE, lambda message: None).gated)
    except HubError:
        return False
