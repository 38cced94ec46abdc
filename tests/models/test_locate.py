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
"""What the Hub may answer, each as one sentence; the answers are made here."""

import pytest
from huggingface_hub import errors

from hfcompress.errors import CheckpointError
from hfcompress.models import locate as module
from hfcompress.models.locate import locate


def answer(kind: type[Exception]) -> Exception:
    """An error of the client's as it comes, without the response that it would carry."""
    error = kind.__new__(kind)
    Exception.__init__(error, "what the server said\nand more")
    return error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (errors.GatedRepoError, r"is gated: accept its terms at https://huggingface.co/some/model .*hf auth login"),
        (errors.RepositoryNotFoundError, "no model some/model on the Hub that you may read"),
        (errors.RevisionNotFoundError, "has no revision v7"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached"),
        (errors.OfflineModeIsEnabled, "the Hub cannot be reached"),
        (errors.HFValidationError, "neither a folder nor a Hub id"),
        (OSError, "Downloading some/model failed: what the server said$"),
    ],
)
def test_every_answer_is_a_sentence(monkeypatch, kind, expected):
    def failing(*args, **kwargs):
        raise answer(kind)

    monkeypatch.setattr(module.huggingface_hub, "snapshot_download", failing)
    with pytest.raises(CheckpointError, match=expected) as caught:
        locate("some/model@v7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("with_code", [False, True])
def test_the_repos_own_code_is_fetched_only_when_asked_for(monkeypatch, tmp_path, with_code):
    seen = {}

    def fetched(repo, revision, allow_patterns):
        seen.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "abc123")

    monkeypatch.setattr(module.huggingface_hub, "snapshot_download", fetched)
    assert locate("some/model@refs/pr/1", with_code) == (tmp_path / "abc123", "abc123")
    assert (seen["repo"], seen["revision"]) == ("some/model", "refs/pr/1")
    assert ("*.py" in seen["patterns"]) == with_code


def test_a_folder_is_a_folder(tmp_path):
    assert locate(str(tmp_path)) == (tmp_path.resolve(), None)
