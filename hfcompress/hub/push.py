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
"""The push: a folder becomes one commit of a repo on the Hub, and is compared there with what was sent.

How it works: large files go to the Hub's storage first, where nobody sees them; then a single commit, made on the head
that was read before, adds all files and removes what an earlier model left behind. So configuration and card never
stand beside weights that are not theirs. Afterwards the Hub's own listing of that commit is compared with the folder,
hash by hash; if it differs, the configuration is taken back and nothing loads.

A push that broke is resumed by pushing again: the storage skips what it has.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.hub.upload_errors import ONCE, Answer, HubConflictError, HubError, Patience, ask
from hfcompress.models.companions import COMPANIONS, LICENCES
from hfcompress.progress import Progress, Silent


UNITS = 3  # how often `push` calls progress.step
MAIN = "main"
CONFIG, INDEX, MANIFEST, README = "config.json", "model.safetensors.index.json", "hfcompress.json", "README.md"
WEIGHTS = "model*.safetensors"
OWN = (
    CONFIG,
    WEIGHTS,
    "model*.safetensors.index.json",
    "model*.gguf",
    "adapter/adapter_*",
    "kv_cache/*.safetensors",
    MANIFEST,
)
RESULTS = ("eval_results.json", "report.html", "plots/*.png", ".eval_results/*.yaml")
WORDS = (README, LICENCES)  # a person may have written them: never removed from a repo
CARRIED = (*OWN, *COMPANIONS, *RESULTS, *WORDS)
SCRATCH = (".tmp", ".partial", ".incomplete", ".lock", "~")
NOTHING_IGNORED = "# nothing\n"  # a .gitignore in the repo must not keep weights out of the commit
BRANCH = re.compile(r"(?!.*\.\.)(?![0-9a-f]{40}$)[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)
READ_BYTES = 1 << 20
NAMED = 3  # files, in an error about many


@dataclass(frozen=True)
class Pushed:
    """
    What is on the Hub now.

    Args:
        repo_id (`str`): `user/name`.
        url (`str`): the page of the repo, or of its branch.
        commit (`str`): the commit that holds the folder.
    """

    repo_id: str
    url: str
    commit: str


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    contents: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> Pushed:
    """
    Upload a compressed model in one commit.

    Args:
        folder (`Path`): what `hfcompress run` wrote.
        repo_id (`str`): `user/name`; it is created if it is not there.
        private (`bool`, *optional*, defaults to `False`): a new repo is private; a repo that is there must be.
        revision (`str`, *optional*, defaults to `"main"`): the branch; it is started from main if it is not there.
        message (`str`, *optional*): of the commit.
        contents (`Mapping[str, bytes]`, *optional*): path in the repo -> what goes there, instead of the folder's file.
        progress (`Progress`, *optional*): stepped [`UNITS`] times, and told about waits.
        patience (`Patience`, *optional*): how often and how long to wait for a Hub that fails for a moment.

    Returns:
        `Pushed`: where it is now.

    Raises:
        InvalidValueError: the id or the branch cannot be, or a private push would be seen by everyone.
        CheckpointError: the folder is not a whole result.
        HubError: the Hub refused, could not be reached, or did not keep what it was sent.
    """
    check_repo_id(repo_id)
    if revision is not None and not BRANCH.fullmatch(revision):
        raise InvalidValueError(f"{revision!r} is no name of a branch; write letters, digits and any of . _ - + /.")
    progress = progress or Silent()
    files: dict[str, Path | bytes] = {**carried_files(Path(folder))}
    files.update(contents or {})
    repo = _Repo(repo_id, revision or MAIN, patience or Patience(), progress)
    progress.step(f"asking for {repo_id}")
    repo.prepare(private)
    progress.step(f"uploading {len(files)} files")
    before, commit, additions = repo.replace(
        files, message or f"Model compressed by hfcompress {version('hfcompress')}"
    )
    progress.step("comparing what is there")
    there = repo.tree(commit)
    wrong = differences(additions, there)
    if wrong:
        repo.withdraw(commit, there, wrong, before)
    return Pushed(repo_id, repo.url, commit)


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        InvalidValueError: it is not of the form `user/name`, or holds what the Hub does not allow.
    """
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise InvalidValueError(f"{repo_id!r} is no name of a repo; write user/name, such as me/llama-w4a16.")


def require_login(repo_id: str) -> None:
    """
    Before long work that ends in a push: the Hub is there, and knows the user.

    Raises:
        HubError: it is not, or does not.
    """
    ask(HfApi(token=True).whoami, repo_id, ONCE, lambda message: None)


def carried_files(folder: Path) -> dict[str, Path]:
    """
    Args:
        folder (`Path`): what `hfcompress run` wrote.

    Returns:
        `dict[str, Path]`: what a push uploads, by its path in the repo. Anything else in the folder stays here.

    Raises:
        CheckpointError: something is missing, left over from another model, or a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give the one that `hfcompress run` wrote.")
    found = [path for pattern in CARRIED for path in sorted(folder.glob(pattern))]
    files = {p.relative_to(folder).as_posix(): p for p in found if not p.name.endswith(SCRATCH) and not p.is_dir()}
    for needed in (CONFIG, MANIFEST):
        if needed not in files:
            raise CheckpointError(
                f"There is no {needed} in {folder}; give the folder that `hfcompress run` wrote, once it is complete."
            )
    if _has_code(files[CONFIG]):
        files |= {p.name: p for p in sorted(folder.glob("*.py"))}
    for path in files.values():
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise CheckpointError(f"{path} is a link that leads out of its folder; put the file itself there.")
    named = _named_weights(files.get(INDEX))
    present = {name for name in files if _fits(name, (WEIGHTS,))}
    if named - present:
        raise CheckpointError(f"There is no {min(named - present)} in {folder}; the weights are not complete.")
    if present - named:
        raise CheckpointError(
            f"{folder / min(present - named)} belongs to no weights of this model; move it out of the folder."
        )
    return files


def differences(additions: list[CommitOperationAdd], tree: dict[str, RepoFile]) -> list[str]:
    """
    Args:
        additions (`list[CommitOperationAdd]`): the files as they lie here.
        tree (`dict[str, RepoFile]`): the files as the Hub lists them.

    Returns:
        `list[str]`: the files that are not the same there, and those of another model that are still there.
    """
    changed = [local.path_in_repo for local in additions if not _is_same(local, tree.get(local.path_in_repo))]
    return changed + _stale(tree, {local.path_in_repo for local in additions})


class _Repo:
    """One branch of a repo on the Hub; `huggingface_hub` finds the token."""

    def __init__(self, repo_id: str, branch: str, patience: Patience, progress: Progress):
        self.api = HfApi(token=True, library_name="hfcompress", library_version=version("hfcompress"))
        self.id, self.branch, self.patience, self.progress = repo_id, branch, patience, progress

    @property
    def url(self) -> str:
        page = f"{self.api.endpoint}/{self.id}"
        return page if self.branch == MAIN else f"{page}/tree/{self.branch}"

    def ask(
        self,
        call: Callable[[], Answer],
        patience: Patience | None = None,
        recover: Callable[[], Answer | None] = lambda: None,
    ) -> Answer:
        """[`ask`] about this repo."""
        return ask(call, self.id, patience or self.patience, self.progress.note, recover)

    def prepare(self, private: bool) -> None:
        """Create the repo and the branch, whichever is not there."""
        visible = True if private else None  # None: the namespace's own default
        self.ask(lambda: self.api.create_repo(self.id, private=visible, exist_ok=True, repo_type="model"))
        info = self.ask(lambda: self.api.model_info(self.id))
        if private and not info.private:
            raise InvalidValueError(
                f"{self.id} is there already and public: make it private in its settings on the Hub, "
                "push to another name, or leave out --private."
            )
        if self.branch != MAIN and not self.ask(self._has_branch):
            self.ask(lambda: self.api.create_branch(self.id, branch=self.branch, exist_ok=True))

    def replace(
        self, files: dict[str, Path | bytes], message: str
    ) -> tuple[str | None, str, list[CommitOperationAdd]]:
        """
        Put `files` in the place of the model that is there. If someone else commits meanwhile, it is tried once more.

        Returns:
            `tuple[str | None, str, list[CommitOperationAdd]]`: the commit before, the new one, and what it added.
        """
        try:
            return self._replace_on_head(files, message)
        except HubConflictError:
            self.progress.note(f"Someone else changed {self.id} meanwhile; trying once more on top of that.")
        return self._replace_on_head(files, message)

    def head(self) -> str | None:
        """The commit at the end of the branch; `None` in a repo without any."""
        revision = None if self.branch == MAIN else self.branch
        return self.ask(lambda: self.api.model_info(self.id, revision=revision)).sha

    def tree(self, commit: str | None) -> dict[str, RepoFile]:
        """The files of a commit as the Hub lists them."""
        if commit is None:
            return {}
        listed = self.ask(lambda: list(self.api.list_repo_tree(self.id, recursive=True, revision=commit)))
        return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}

    def withdraw(self, commit: str, there: dict[str, RepoFile], wrong: list[str], before: str | None) -> None:
        """
        Delete what makes the folder load, since the Hub does not hold what was sent.

        Raises:
            HubError: always.
        """
        loads = [CommitOperationDelete(path) for path in (CONFIG, INDEX) if path in there]
        names = ", ".join(wrong[:NAMED]) + (f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else "")
        earlier = "" if before is None else f"; before this push {self.id} was at revision {before[:12]}"
        try:
            self._commit(loads, "Withdraw a model that did not arrive whole", commit, lambda tree: CONFIG not in tree)
        except HubError:
            raise HubError(
                f"{self.url} differs from what was sent ({names}) and could not be taken back: "
                f"delete config.json there by hand{earlier}."
            ) from None
        raise HubError(
            f"The Hub did not keep {names} as sent, so config.json was taken back and nothing loads from "
            f"{self.url}: push again, and under another name if that does not help{earlier}."
        )

    def _has_branch(self) -> bool:
        try:
            self.api.model_info(self.id, revision=self.branch)
        except RevisionNotFoundError:
            return False
        return True

    def _replace_on_head(
        self, files: dict[str, Path | bytes], message: str
    ) -> tuple[str | None, str, list[CommitOperationAdd]]:
        before = self.head()
        stale = _stale(self.tree(before), files)
        if stale:
            self.progress.note(
                f"An earlier model left these in {self.id}, the commit removes them: {', '.join(stale)}."
            )
        additions = self._upload(files)
        operations = [*additions, *map(CommitOperationDelete, stale)]
        commit = self._commit(operations, message, before, lambda tree: not differences(additions, tree))
        return before, commit, additions

    def _upload(self, files: dict[str, Path | bytes]) -> list[CommitOperationAdd]:
        """Send the large files; no commit shows them yet. The client repeats what fails, over LFS and over Xet."""

        def send():
            additions = [CommitOperationAdd(path, content) for path, content in files.items()]
            self.api.preupload_lfs_files(
                self.id, additions, revision=self.branch, free_memory=False, gitignore_content=NOTHING_IGNORED
            )
            return additions

        return self.ask(send, ONCE)

    def _commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        before: str | None,
        shows: Callable[[dict[str, RepoFile]], bool],
    ) -> str:
        """One commit on top of `before` and of nothing else; `shows` tells by its files whether it was made."""

        def unanswered() -> str | None:
            """The commit, if it was made although the answer was lost."""
            head = self.head()
            return head if head != before and shows(self.tree(head)) else None

        def commit() -> str:
            return self.api.create_commit(
                self.id, operations, commit_message=message, revision=self.branch, parent_commit=before
            ).oid

        return self.ask(commit, recover=unanswered)


def _has_code(config: Path) -> bool:
    """Whether the configuration names modelling code that lies beside it."""
    try:
        return "auto_map" in json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{config} is damaged; compress again with --overwrite.") from error


def _named_weights(index: Path | None) -> set[str]:
    if index is None:
        return {"model.safetensors"}
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged; compress again with --overwrite.") from error


def _fits(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits one of the patterns, which do not reach into folders."""
    parts = PurePosixPath(path).parts
    return any(len(parts) == p.count("/") + 1 and PurePosixPath(path).match(p) for p in patterns)


def _stale(tree: Iterable[str], files: Collection[str]) -> list[str]:
    """What a repo holds of an earlier model: all that a push carries and this one does not."""
    return [path for path in tree if path not in files and _fits(path, CARRIED) and not _fits(path, WORDS)]


def _is_same(local: CommitOperationAdd, there: RepoFile | None) -> bool:
    if there is None or there.size != local.upload_info.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == local.upload_info.sha256.hex()
    digest = hashlib.sha1(f"blob {there.size}\0".encode(), usedforsecurity=False)  # as `git hash-object` computes it
    with local.as_file() as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return there.blob_id == digest.hexdigest()
