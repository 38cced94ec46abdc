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
"""What is done so far, so that a run that was killed goes on from its last finished block."""

import json
from pathlib import Path
from typing import Any

from hfcompress.errors import OutputError
from hfcompress.formats.writer import write_json


QAT, LORA, DISTILL = "qat", "lora", "distill"  # the stages that train


class Journal:
    """
    Args:
        path (`Path` or `None`): the file; `None` to keep it in memory.
        fingerprint (`dict[str, Any]`): what must be the same for the work to go on: base, recipe, data, versions.

    Attributes:
        blocks (`dict[str, list[dict]]`): finished block -> what is reported of each of its linears.
        folds (`dict[str, list[dict]]`): finished block -> what is reported of each pair between which factors moved.
        witness (`dict` or `None`): what the solved model says to a few tokens, once it is known.
        budget (`dict` or `None`): what a budget was settled to, once it is.
        stages (`dict[str, dict]`): finished stage after the block pass -> what there is to report of it.
        kept_blocks (`list[int]` or `None`): the decoder blocks that stay, once they are chosen.
        rows (`int` or `None`): that go through a block together, once that is settled.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any]):
        self.path, self.fingerprint = path, fingerprint
        self.blocks: dict[str, list[dict[str, Any]]] = {}
        self.folds: dict[str, list[dict[str, Any]]] = {}
        self.witness: dict[str, Any] | None = None
        self.budget: dict[str, Any] | None = None
        self.stages: dict[str, dict[str, Any]] = {}
        self.kept_blocks: list[int] | None = None
        self.rows: int | None = None

    def resume(self) -> None:
        """
        Take over what an earlier run has done.

        Raises:
            OutputError: that run was of something else; what differs is named.
        """
        if self.path is None or not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_text())
        except ValueError as error:
            raise OutputError(f"{self.path} is damaged; start again with --overwrite.") from error
        different = [key for key, value in self.fingerprint.items() if found["fingerprint"].get(key) != value]
        if different:
            raise OutputError(
                f"The unfinished run in {self.path.parent} differs in {', '.join(different)}; "
                "give the same options, or start again with --overwrite."
            )
        self.blocks, self.folds, self.witness = found["blocks"], found.get("folds", {}), found["witness"]
        self.budget, self.stages = found.get("budget"), found.get("stages", {})
        self.kept_blocks, self.rows = found.get("kept_blocks"), found.get("rows")

    def done(self, name: str) -> bool:
        """Whether block `name` is finished."""
        return name in self.blocks

    def lose(self, name: str) -> None:
        """The part of block `name` is not there any more: the block is to be solved again."""
        del self.blocks[name]
        self.witness = None

    def commit(self, name: str, results: list[dict[str, Any]], folds: list[dict[str, Any]]) -> None:
        """Block `name` is finished and its part is on disk."""
        self.blocks[name], self.folds[name] = results, folds
        self._write()

    def testify(self, witness: dict[str, Any]) -> None:
        """Keep what the solved model says."""
        self.witness = witness
        self._write()

    def settle(self, budget: dict[str, Any], write: bool = True) -> None:
        """Keep what a budget was settled to; on disk only where this process writes."""
        self.budget = budget
        if write:
            self._write()

    def keep_blocks(self, kept: list[int], write: bool = True) -> None:
        """Keep which blocks stay; on disk only where this process writes."""
        self.kept_blocks = kept
        if write:
            self._write()

    def commit_stage(
        self, name: str, record: dict[str, Any], blocks: dict[str, list[dict[str, Any]]], witness: dict[str, Any]
    ) -> None:
        """Stage `name` is finished; `blocks` and `witness` are what is true after it."""
        self.stages[name], self.blocks = record, blocks
        self.testify(witness)

    def _write(self) -> None:
        if self.path is not None:
            state: dict[str, Any] = {"blocks": self.blocks, "folds": self.folds, "witness": self.witness}
            state |= {"budget": self.budget, "stages": self.stages, "kept_blocks": self.kept_blocks}
            state["rows"] = self.rows
            write_json(self.path, {"fingerprint": self.fingerprint, **state})
