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
"""Law 4: killed anywhere and resumed, the same bytes; and what others do to a folder in the meantime."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CONFIGS, make_model, token_ids
from filelock import FileLock

import hfcompress as hfc
from hfcompress.errors import OutputError
from hfcompress.formats.writer import CheckpointWriter, lock_path, partial_path
from hfcompress.passes.block_pass import BlockPass
from hfcompress.passes.journal import Journal
from hfcompress.progress import Silent


# a run that is killed before or after the n-th time that a file gets its name
WHILE_WRITING = """
import os, signal, sys
count, after, output = int(sys.argv[1]), sys.argv[2] == "after", sys.argv[-1]
del sys.argv[1:3]
partial = os.path.join(os.path.dirname(output), f".{os.path.basename(output)}.partial")
replace = os.replace

def counted(source, target, **options):
    global count
    count -= str(source).startswith(partial)
    if count == 0 and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, **options)
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = counted
from hfcompress.cli import main
sys.exit(main())
"""
RECIPE = "recipe:\n  - gptq: {bits: 3, group_size: 32, shift: 1.0, refine: 2, curvature: true}\n"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a run on a tiny random Llama, up to the folder that it makes."""
    folder = tmp_path_factory.mktemp("killed")
    make_model(CONFIGS["llama"]()).save_pretrained(folder / "llama")
    np.save(folder / "ids.npy", token_ids(9, 32))
    (folder / "recipe.yaml").write_text(RECIPE)
    found = ["run", folder / "recipe.yaml", "--model", folder / "llama", "--calibration", folder / "ids.npy"]
    return [*map(str, found), "--no-eval", "--output"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """What a run gives that nobody stops."""
    return finished(options, tmp_path_factory.mktemp("whole") / "out", resume=False)


def finished(options, output: Path, resume: bool = True) -> str:
    """The digest of the weights of a run that goes on to its end."""
    recipe, model, ids = options[1], options[3], options[5]
    hfc.compress(model, recipe, output, calibration=ids, evaluate=False, resume=resume)
    assert not partial_path(output).exists()
    assert not lock_path(output).exists()
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def killed_while_writing(options, output: Path, renames: int, moment: str) -> int:
    command = [sys.executable, "-c", WHILE_WRITING, str(renames), moment, *options, str(output)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode


@pytest.mark.parametrize(("renames", "moment"), [(1, "before"), (4, "after"), (9, "before")])
def test_killed_while_a_file_gets_its_name(options, whole, tmp_path, renames, moment):
    assert killed_while_writing(options, tmp_path / "out", renames, moment) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert finished(options, tmp_path / "out") == whole


@pytest.mark.slow
def test_killed_at_every_rename(options, whole, tmp_path):
    renames = 0
    while True:
        renames += 1
        for moment in ("before", "after"):
            output = tmp_path / f"{renames}-{moment}"
            if killed_while_writing(options, output, renames, moment) == 0:
                assert renames > 10
                return
            assert finished(options, output) == whole


@pytest.mark.slow
def test_killed_at_twenty_random_moments_and_more_than_once(options, whole, tmp_path):
    command = [sys.executable, "-m", "hfcompress.cli", *options]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "timed")], capture_output=True, check=True)
    took = time.monotonic() - start
    draw = random.Random(0)
    for number in range(20):
        output = tmp_path / str(number)
        for more in ([], ["--resume"]):
            process = subprocess.Popen(
                [*command, str(output), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(draw.uniform(0.2, 1.0) * took)
            process.kill()
            process.wait()
            if output.exists():
                break
        if not output.exists():
            assert finished(options, output) == whole


def test_sigterm_is_ctrl_c(options, whole, tmp_path):
    journal = partial_path(tmp_path / "out") / "journal.json"
    command = [sys.executable, "-m", "hfcompress.cli", *options, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not journal.exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume" in said
    assert finished(options, tmp_path / "out") == whole


@pytest.fixture(scope="module")
def unfinished(options, tmp_path_factory):
    """The unfinished work of a run that was killed when two blocks were done."""
    output = tmp_path_factory.mktemp("unfinished") / "out"
    assert killed_while_writing(options, output, 5, "before") == -signal.SIGKILL
    assert len(json.loads((partial_path(output) / "journal.json").read_text())["blocks"]) == 2
    return partial_path(output)


@pytest.mark.parametrize("damage", ["cut short", "gone", "no header"])
def test_a_part_that_is_damaged_later_is_solved_again(options, whole, unfinished, tmp_path, damage):
    shutil.copytree(unfinished, partial_path(tmp_path / "out"))
    part = partial_path(tmp_path / "out") / "parts" / "block-00000.safetensors"
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[: -1 if damage == "cut short" else 4])
    assert finished(options, tmp_path / "out") == whole


def test_a_part_that_later_stages_rest_on_is_not_solved_again(tmp_path):
    writer, journal = CheckpointWriter(tmp_path / "out"), Journal(None, {})
    journal.blocks, journal.stages = {"layers.0": []}, {"qat": {}}
    model = SimpleNamespace(block_names=["layers.0"])
    run = BlockPass(model, None, None, writer, journal, None, Silent(), suspended=True)
    with pytest.raises(OutputError, match=r"block-00000.safetensors is gone or has been cut short; start again"):
        run.forget_lost_parts()


def test_shards_that_were_cut_short_are_told(options, unfinished, tmp_path):
    work = partial_path(tmp_path / "out")
    shutil.copytree(unfinished, work)
    for part in (work / "parts").iterdir():
        part.unlink()
    (work / "result" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(OutputError, match=r"model.safetensors has been cut short; start again with --overwrite\."):
        finished(options, tmp_path / "out")


def test_a_second_run_on_one_folder_is_refused(saved_llama, tmp_path):
    """Whatever it was told to do there; a dead owner keeps nothing."""
    output = tmp_path / "out"
    with FileLock(lock_path(output)):
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match="Another run is writing"):
                hfc.compress(saved_llama, hfc.RTN(group_size=32), output, evaluate=False, **how)
    assert not partial_path(output).exists()
    lock_path(output).write_text("")  # left by one that was killed
    hfc.compress(saved_llama, hfc.RTN(group_size=32), output, evaluate=False)
    assert not lock_path(output).exists()
