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
"""What a run will take, told before it."""

import json
import re

import pytest

import hfcompress as hfc
from hfcompress.cli import _guarded, app
from hfcompress.errors import InvalidValueError
from hfcompress.passes.block_pass import BlockPass


ROWS = {"samples": 16, "seq_len": 64}


@pytest.mark.parametrize("recipe", ["rtn-w8a16", "gptq-w3a16", "sparse24-w4a16", "w8a8-fp8"])
def test_the_size_is_that_of_the_run(tiny, tmp_path, recipe):
    found = hfc.plan(None, recipe, **ROWS, probe=False)
    hfc.compress(None, recipe, tmp_path / "out", **ROWS, evaluate=False)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("model*.safetensors"))
    assert found.output_bytes == pytest.approx(written, rel=1e-4)  # the scales of caches are not counted
    assert found.baseline_bytes > 4_000_000
    assert found.seconds is None


def test_memory_and_time_are_told_by_phase(tiny):
    found = hfc.plan(None, hfc.GPTQ(group_size=32), **ROWS)
    assert list(found.memory) == ["embedding", "blocks", "head"]
    assert found.peak_memory == max(found.memory.values()) > 100_000_000
    assert 100_000_000 < found.least_memory < 1.05 * found.peak_memory
    assert found.tokens == 16 * 64
    assert 0 < found.seconds < 600
    assert found.blocks == 4
    limited = hfc.plan(None, hfc.GPTQ(group_size=32), **ROWS, memory_limit=100_000_000_000, probe=False)
    assert limited.course == found.course


def test_time_is_told_from_one_batch_and_from_two(tiny, monkeypatch):
    """Of a block, what it takes once and what it takes for every batch; for all blocks and batches. Solving is once."""
    monkeypatch.setattr(BlockPass, "rehearse", lambda self, batches: (3.0 * len(batches), 1.0 + 0.5 * len(batches)))
    few, many = (hfc.plan(None, hfc.GPTQ(group_size=32), samples=samples, seq_len=256) for samples in (16, 128))
    assert (few.seconds, many.seconds) == (
        4 * (3.0 + 1.5),
        4 * (6.0 + 1.0 + 0.5 * 8),
    )  # 16 rows of 256 tokens are a batch
    assert many.memory["blocks"] > few.memory["blocks"]


@pytest.mark.parametrize("recipe", ["prune-width", "recover-w2", "distill-half", "torchao-int8"])
def test_what_works_on_the_whole_model_is_refused(tiny, recipe):
    with pytest.raises(InvalidValueError, match="only recipes of one pass over the blocks can be forecast"):
        hfc.plan(None, recipe, **ROWS)


def test_the_command_prints_a_table_and_writes_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("plan", "gptq-w4a16", "--samples", "8", "--seq-len", "64", "--json", "plan.json") == 0
    said = capsys.readouterr().out
    for word in ("embedding", "blocks", "head", "peak memory", "weights: 1.4", "--memory-limit", "time: about"):
        assert word in said
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["peak_memory"] == max(told["memory"].values())
    assert told["course"] == {"rows": 64, "suspended": True, "spilled": False}
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_limit_that_nothing_can_keep_is_told_before_any_work(tiny, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert run(command, "gptq-w4a16", "--samples", "8", "--memory-limit", "10MB") == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: --memory-limit 0.01GB is not enough for tiny-llama")
    assert re.search(r"give --memory-limit \d\.\d\dGB\.$", said)
    assert "\n" not in said.replace("\nnote:", "")
    assert list(tmp_path.iterdir()) == []


def run(*arguments: str) -> int:
    return _guarded(app, list(arguments))
