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
"""What is compared: the settings, the methods, and how one of them is run and measured."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarking.errors import RunError, UsageError
from benchmarking.processes import DOOR, answer, answers


PEERS = {"llmcompressor": "llmcompressor", "gptqmodel": "gptqmodel", "autoround": "auto-round"}  # option -> package


@dataclass(frozen=True)
class Setting:
    """A grid: `w4g128`, or `w4channel` for one scale per row."""

    name: str
    bits: int
    group_size: int

    @classmethod
    def parse(cls, name: str) -> "Setting":
        """
        Raises:
            UsageError: it is no setting.
        """
        found = re.fullmatch(r"w(\d+)(?:g(\d+)|channel)", name)
        if found is None:
            raise UsageError(f"'{name}' is no setting; write w4g128, or w4channel for one scale per row.")
        return cls(name, int(found[1]), int(found[2] or -1))


@dataclass(frozen=True)
class Peer:
    """
    Args:
        label (`str`): what the table calls it.
        peer (`str`): whose interpreter runs it: a key of `PEERS`.
        before (`tuple[str, ...]`): arguments of its script before the common ones.
        after (`tuple[str, ...]`): arguments of its script after them.
        imports (`str`): Python that imports what its script does.
        per_row (`bool`): it can do one scale per row.
        own_reader (`bool`): only its own interpreter can load what it writes.
    """

    label: str
    peer: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    imports: str = ""
    per_row: bool = True
    own_reader: bool = False

    def refuses(self, setting: Setting) -> str | None:
        """Why it cannot do a setting, or `None` if it can."""
        return None if self.per_row or setting.group_size > 0 else "n/a: it refuses one scale per row"


LLMCOMPRESSOR = "import datasets, llmcompressor.modifiers.gptq, llmcompressor.modifiers.awq, transformers"
GPTQMODEL = "import gptqmodel"
PEER_GPTQ = (
    Peer("llm-compressor GPTQ", "llmcompressor", before=("gptq",), imports=LLMCOMPRESSOR),
    Peer("GPTQModel GPTQ", "gptqmodel", imports=GPTQMODEL, per_row=False, own_reader=True),
    Peer("AutoRound", "autoround", imports="import auto_round"),
)
PEER_AWQ = (
    Peer("llm-compressor AWQ", "llmcompressor", before=("awq",), imports=LLMCOMPRESSOR),
    Peer("GPTQModel AWQ", "gptqmodel", after=("awq",), imports=GPTQMODEL, per_row=False, own_reader=True),
)
PEER_RTN = (Peer("llm-compressor RTN", "llmcompressor", before=("rtn",)),)
# not getrusage: its peak counts the process that started this one
PEAK = """
import json, re
peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
print(json.dumps({"mib": int(peak[1]) // 1024}))
"""


@dataclass(frozen=True)
class Bench:
    """
    What all runs share.

    Args:
        model (`Path`): the model's folder.
        calibration (`tuple[Path, ...]`): token files, one for each seed.
        evaluation (`Path`): the token file that every result is measured on.
        settings (`tuple[Setting, ...]`): the grids.
        interpreters (`dict[str, Path]`): the Pythons of the peers that take part.
        scripts (`Path` or `None`): the folder with the peers' scripts.
        work (`Path`): a folder for what the runs write.
        without (`tuple[str, ...]`, *optional*): steps whose rungs are left out.
        device (`str`, *optional*, defaults to `"cpu"`): where our own runs compress; peers see the GPU, or see none.
    """

    model: Path
    calibration: tuple[Path, ...]
    evaluation: Path
    settings: tuple[Setting, ...]
    interpreters: dict[str, Path]
    scripts: Path | None
    work: Path
    without: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def hides_gpu(self) -> bool:
        """Whether no run may see a GPU."""
        return self.device == "cpu"

    def peers(self, candidates: Sequence[Peer]) -> list[Peer]:
        """Those whose interpreter is given."""
        return [peer for peer in candidates if peer.peer in self.interpreters]

    def compress(self, peer: Peer, setting: Setting, output: Path, seed: int = 0) -> tuple[float, int]:
        """
        Seconds and peak MiB of one run of a peer.

        Raises:
            RunError: it failed.
        """
        assert self.scripts is not None
        grid = (str(setting.bits), str(setting.group_size))
        command = (self.interpreters[peer.peer], self.scripts / f"{peer.peer}_run.py", *peer.before)
        return seconds_and_peak(
            answer(
                (*command, self.model, self.calibration[seed], output, *grid, *peer.after),
                self.work,
                own=False,
                hides_gpu=self.hides_gpu,
            )
        )

    def imports(self, peer: Peer) -> int:
        """
        Peak MiB of a process that imports what a peer needs.

        Raises:
            RunError: it cannot be imported.
        """
        command = (self.interpreters[peer.peer], "-c", f"{peer.imports}\n{PEAK}")
        return int(answer(command, self.work, own=False, hides_gpu=self.hides_gpu)["mib"])

    def compress_ours(
        self, jobs: Sequence[tuple[list[dict] | str, Path]], seed: int = 0, memory_limit: int | str | None = None
    ) -> Iterator[dict]:
        """
        Recipes of ours, one after the other in one process: for each what [`benchmarking.workers.compress`] says.

        Args:
            jobs (`Sequence[tuple[list[dict] or str, Path]]`): the steps as in YAML or the name of a shipped recipe, and
                the folder to write.
            seed (`int`, *optional*, defaults to 0): which calibration rows.
            memory_limit (`int` or `str`, *optional*): bytes, or `LEAST` for the lowest limit that can be kept.

        Raises:
            RunError: the process failed.
        """
        import json

        told = {
            "model": str(self.model),
            "calibration": str(self.calibration[seed]),
            "memory_limit": memory_limit,
            "device": self.device,
            "jobs": [(recipe, str(output)) for recipe, output in jobs],
        }
        command = (sys.executable, DOOR, "compress", json.dumps(told))
        return answers(command, self.work, own=True, hides_gpu=self.hides_gpu)

    def measure(self, outputs: Sequence[Path], python: Path | None = None) -> Iterator[dict]:
        """
        The quality of folders, by [`benchmarking.workers.measure`].

        Args:
            outputs (`Sequence[Path]`): what was written.
            python (`Path`, *optional*): the interpreter that can load them, if it is not our own.

        Raises:
            RunError: one cannot be loaded.
        """
        command = (python or sys.executable, DOOR, "measure", self.model, self.evaluation, *outputs)
        return answers(command, self.work, own=python is None)

    def load(self, folder: Path) -> tuple[float, int]:
        """
        Seconds and MiB at most that loading a folder takes, by [`benchmarking.workers.load`].

        Raises:
            RunError: it cannot be loaded.
        """
        told = answer((sys.executable, DOOR, "load", folder), self.work, own=True)
        return float(told["seconds"]), int(told["mib"])

    def linear_weights(self) -> int:
        """How many weights the linears of the model's blocks have."""
        return int(answer((sys.executable, DOOR, "linears", self.model), self.work, own=True)["weights"])

    def clear(self) -> None:
        """Remove what a run left."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(exist_ok=True)


def seconds_and_peak(told: dict) -> tuple[float, int]:
    """
    Of what a run says.

    Raises:
        RunError: it does not say it.
    """
    try:
        return float(told["seconds"]), int(told["peak_mib"])
    except KeyError as error:
        raise RunError(f"its JSON line has no {error}") from error


class Progress:
    """A line on stderr for every run, ended with what came of it."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def begin(self, label: str) -> Callable[[str], None]:
        """The next run; what it returns ends the line."""
        self.done += 1
        print(f"[{self.done}/{self.total}] {label}: ", end="", file=sys.stderr, flush=True)
        return lambda summary: print(summary, file=sys.stderr, flush=True)


def over(numerator: float | None, denominator: float | None) -> float | None:
    """A ratio, if there is one."""
    return numerator / denominator if numerator is not None and denominator else None
