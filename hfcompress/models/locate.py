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
"""Where a model lies: a folder, or a Hub id brought into the local cache."""

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hfcompress.errors import CheckpointError


WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "tokenizer*", "LICENSE*", "README.md"]


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter's, and no model's."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be a Hub id: it holds one `/` and is no path and no YAML file."""
    path_like = name.startswith(("/", "./", "../", "~")) or name.endswith((".yaml", ".yml"))
    return name.count("/") == 1 and not path_like and not os.path.lexists(name)


def locate(model: str, with_code: bool = False, wanted: Sequence[str] = WANTED) -> tuple[Path, str | None]:
    """
    Args:
        model (`str`): a folder, or a Hub id: `id` or `id@revision`.
        with_code (`bool`, *optional*, defaults to `False`): also bring the repo's own modelling code.
        wanted (`Sequence[str]`, *optional*): patterns of the files to bring from the Hub.

    Returns:
        `tuple[Path, str | None]`: the folder, and the commit where it came from the Hub.

    Raises:
        CheckpointError: it is neither a folder nor a repo that can be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve(), None
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the folder of a checkpoint or a Hub id.")
    repo, _, revision = model.partition("@")
    looks_like_path = model.startswith(("/", "./", "../", "~")) or repo.count("/") != 1
    if looks_like_path:
        raise CheckpointError(f"There is no folder {model}; give the folder of a checkpoint or a Hub id (user/name).")
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=[*wanted, "*.py"] if with_code else [*wanted]
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo} and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision}; check it on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no folder {model} and no model {repo} on the Hub that you may read; "
            "check the name, or log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{model} is not a folder here, and the Hub cannot be reached; "
            "give the path of a local checkpoint, or go online once to download it."
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{model} is neither a folder nor a Hub id (user/name).") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"Downloading {repo} failed: {reason}") from error
    return Path(folder), Path(folder).name
