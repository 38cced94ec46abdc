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
"""Runs in processes of their own, which answer with JSON lines."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarking.errors import RunError


DOOR = Path(__file__).absolute().parents[1] / "benchmark.py"  # its first argument may name a worker


def answers(command: Sequence[Any], work: Path, own: bool, hides_gpu: bool = True) -> Iterator[dict[str, Any]]:
    """
    A fresh process; every JSON line that it prints, as it prints it.

    Args:
        command (`Sequence`): interpreter, script, arguments.
        work (`Path`): where it runs and puts its temporary files.
        own (`bool`): it is our own interpreter, which keeps its `PYTHONPATH`.
        hides_gpu (`bool`, *optional*, defaults to `True`): it sees no GPU.

    Raises:
        RunError: it failed; what it said before has been handed out.
    """
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TMPDIR": str(work)}
    if hides_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    if not own:
        environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise RunError(f"cannot be started: {error.strerror}") from error
        with process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("{"):
                        try:
                            answer = json.loads(line)
                        except ValueError:
                            continue
                        yield answer
            except BaseException:  # the caller was interrupted, or wants no more
                process.kill()
                raise
        if process.returncode < 0:
            raise RunError(f"killed by signal {-process.returncode}")
        if process.returncode:
            said.seek(0)
            raise RunError(last_error(said.read()) or f"exit code {process.returncode}")


def answer(command: Sequence[Any], work: Path, own: bool, hides_gpu: bool = True) -> dict[str, Any]:
    """
    What the last JSON line of a fresh process says; see [`answers`].

    Raises:
        RunError: it failed, or printed none.
    """
    told = list(answers(command, work, own, hides_gpu))
    if not told:
        raise RunError("it printed no JSON line")
    return told[-1]


def last_error(said: str) -> str:
    """The last line that names an exception, else the last line; without the folders of its paths."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)(:|$)", line)]
    return without_folders((named or lines or [""])[-1])


def without_folders(line: str) -> str:
    """A message without the folders of its paths."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "", line)
