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
"""Law 4, as far as this goes: stopped after any block and resumed, the same bytes."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import CONFIGS, StopAfter, digest, make_model, token_ids

import hfcompress as hfc
from hfcompress.errors import OutputError
from hfcompress.formats.writer import partial_path
from hfcompress.passes import block_pass
from hfcompress.passes.footprint import Course
from hfcompress.passes.journal import Journal
from hfcompress.passes.statistics import Statistics
from hfcompress.recipes import load_job, with_changes


def run(model, output, recipe=None, **options):
    recipe = recipe or hfc.Job(steps=(hfc.GPTQ(group_size=32),), format=options.pop("layout", "compressed-tensors"))
    return hfc.compress(model, recipe, output, calibration=token_ids(9, 32), evaluate=False, **options)


@pytest.mark.parametrize("layout", ["compressed-tensors", "dense"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_stopped_after_a_block_and_resumed(saved_llama, tmp_path, blocks, layout):
    whole = run(saved_llama, tmp_path / "whole", layout=layout)
    with pytest.raises(KeyboardInterrupt):
        run(saved_llama, tmp_path / "out", layout=layout, progress=StopAfter(blocks))
    assert not (tmp_path / "out").exists()
    assert partial_path(tmp_path / "out").is_dir()
    result = run(saved_llama, tmp_path / "out", layout=layout, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert len(result.manifest["linears"]) == 21
    assert result.manifest["witness"] == whole.manifest["witness"]
    assert not partial_path(tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "step",
    [hfc.GPTQ(bits=2, group_size=32, shift=1.0, curvature=True, refine=2), hfc.Sparsify("2:4")],
    ids=["gptq", "sparsify"],
)
def test_what_the_gradients_said_is_found_again_when_a_run_goes_on(tmp_path, name, step):
    """Shifted, weighed, refined and tuned: everything that looks beyond one block."""
    make_model(CONFIGS[name](), torch.bfloat16).save_pretrained(tmp_path / "model")
    recipe = step >> hfc.Tune(iterations=4)
    run(str(tmp_path / "model"), tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path / "model"), tmp_path / "out", recipe, progress=StopAfter(2))
    run(str(tmp_path / "model"), tmp_path / "out", recipe, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_factors_that_were_moved_are_there_when_a_run_goes_on(tmp_path, name):
    """Norms and biases that changed, in a dtype that rounds them."""
    make_model(CONFIGS[name](), torch.bfloat16).save_pretrained(tmp_path / "model")
    recipe = hfc.AWQ(grid=3, rows=3) >> hfc.RTN(bits=3, group_size=32)
    whole = run(str(tmp_path / "model"), tmp_path / "whole", recipe)
    assert sum(pair["left_alone"] is None for pair in whole.manifest["folds"]) >= 3
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path / "model"), tmp_path / "out", recipe, progress=StopAfter(2))
    result = run(str(tmp_path / "model"), tmp_path / "out", recipe, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    for key in ("folds", "witness", "linears"):
        assert result.manifest[key] == whole.manifest[key]


def test_the_dense_stream_beside_moved_factors_is_the_same_when_a_run_goes_on(saved_llama, tmp_path, monkeypatch):
    crosses = []
    complete = Statistics.complete

    def noted(self, processes, name):
        complete(self, processes, name)
        if self.cross is not None:
            crosses.append(self.cross)

    monkeypatch.setattr(Statistics, "complete", noted)
    monkeypatch.setattr(hfc.GPTQ, "needs_dense_stream", True)
    recipe = hfc.AWQ(grid=2, rows=2) >> hfc.GPTQ(group_size=32, bits=2)
    run(saved_llama, tmp_path / "whole", recipe)
    whole = crosses[-4:]
    assert len(crosses) == 12
    with pytest.raises(KeyboardInterrupt):
        run(saved_llama, tmp_path / "out", recipe, progress=StopAfter(2))
    run(saved_llama, tmp_path / "out", recipe, resume=True)
    assert all(cross.abs().max() > 0 for cross in whole)
    assert all(torch.equal(one, other) for one, other in zip(whole, crosses[-4:], strict=True))


def test_finished_blocks_are_not_solved_again(saved_llama, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(saved_llama, tmp_path / "out", progress=StopAfter(2))
    solved = []
    solve_group = block_pass.solve_group
    monkeypatch.setattr(
        block_pass, "solve_group", lambda tasks, *rest: solved.extend(tasks) or solve_group(tasks, *rest)
    )
    run(saved_llama, tmp_path / "out", resume=True)
    assert solved
    assert all(name.startswith("model.layers.2.") for name in solved)


def test_an_interrupted_overwrite_leaves_the_old_output_and_goes_on(saved_llama, tmp_path):
    run(saved_llama, tmp_path / "out", hfc.RTN(group_size=32))
    old = digest(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(saved_llama, tmp_path / "out", overwrite=True, progress=StopAfter(2))
    assert digest(tmp_path / "out") == old
    run(saved_llama, tmp_path / "out", resume=True)
    run(saved_llama, tmp_path / "whole")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole") != old


def test_unfinished_work_is_not_run_over(saved_llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(saved_llama, tmp_path / "out", progress=StopAfter(1))
    with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
        run(saved_llama, tmp_path / "out")
    run(saved_llama, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_resuming_something_else_names_what_differs(saved_llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(saved_llama, tmp_path / "out", progress=StopAfter(1))
    with pytest.raises(OutputError, match="differs in the recipe"):
        run(saved_llama, tmp_path / "out", hfc.GPTQ(group_size=32, bits=3), resume=True)


def test_a_damaged_journal_is_told(tmp_path):
    (tmp_path / "journal.json").write_text('{"fingerprint": {')
    with pytest.raises(OutputError, match=r"damaged.*--overwrite"):
        Journal(tmp_path / "journal.json", {}).resume()


def test_resume_with_nothing_to_resume_starts_afresh(saved_llama, tmp_path):
    run(saved_llama, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_real_ctrl_c_is_130_and_the_run_goes_on(tmp_path, tiny):
    refined = {"gptq.curvature": True, "gptq.refine": 6}  # long enough to be interrupted on any machine
    # what a shell has started in the background ignores interrupts, and so would all that it starts itself
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from hfcompress.cli import main; main()"
    command = [sys.executable, "-c", heeding, "run", "gptq-w4a16", "--samples", "64", "--no-eval"]
    command += [part for key, value in refined.items() for part in ("--set", f"{key}={str(value).lower()}")]
    command += ["--output", str(tmp_path / "out")]
    journal = partial_path(tmp_path / "out") / "journal.json"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(12000):
        if journal.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.count("\n") == 1
    assert "--resume" in said
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    job = with_changes(load_job("gptq-w4a16"), [f"{key}={str(value).lower()}" for key, value in refined.items()])
    hfc.compress(None, job, tmp_path / "whole", samples=64, evaluate=False)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_run_goes_on_with_as_many_rows_at_a_time(saved_llama, tmp_path, monkeypatch):
    """Whatever limit is given then: sums are formed in the same order, so that the bytes are the same."""
    recipe, options = hfc.GPTQ(group_size=32), {"calibration": token_ids(20, 32), "evaluate": False}
    few = lambda *arguments: Course(4, True, False)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr("hfcompress.compression.choose_course", few)
        hfc.compress(str(saved_llama), recipe, tmp_path / "whole", **options)
        with pytest.raises(KeyboardInterrupt):
            hfc.compress(str(saved_llama), recipe, tmp_path / "out", **options, progress=StopAfter(1))
    journal = json.loads((partial_path(tmp_path / "out") / "journal.json").read_text())
    assert journal["rows"] == 4
    hfc.compress(str(saved_llama), recipe, tmp_path / "out", **options, memory_limit=10**12, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
