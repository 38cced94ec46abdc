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
"""How much memory the block pass takes, and how it keeps a limit."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids

import hfcompress as hfc
from hfcompress.errors import InvalidValueError, OutputError
from hfcompress.formats import get_format
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.footprint import Course, Footprint, choose_course, in_use
from hfcompress.passes.live_bytes import LiveBytes
from hfcompress.passes.plan import make_plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.spill import Spill


GB = 1_000_000_000


def footprint(recipe=None, name="llama", rows=64) -> Footprint:
    model = StreamedModel(Checkpoint.open(make_model(CONFIGS[name]())))
    layout = get_format("compressed-tensors")
    plan = make_plan(model, (recipe or hfc.GPTQ(group_size=32),), layout)
    batch = Batch(torch.from_numpy(token_ids(rows, 32))) if plan.needs_inputs else None
    return Footprint(model, plan, layout, batch, Processes(model.device))


def test_bytes_are_counted_for_as_long_as_they_live():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view = a.view(10, 100).T
        assert live.now == 4000
        del a
        assert live.now == 4000  # the view is left
        b = view.contiguous()
        assert (live.now, live.peak) == (8000, 8000)
        b += 1  # in place
        del view
        assert (live.now, live.peak) == (4000, 8000)
        assert live.begin() == live.peak == 4000
        before = torch.cat([b, b])
        del b, before
        gc.collect()
        assert (live.now, live.peak) == (0, 12000)


def test_bytes_of_a_solver_grow_with_the_area(monkeypatch):
    """What the small copy says of a large linear is what the large one takes."""
    found = footprint()
    task = next(iter(found.plan.blocks[0].values()))
    large = {"a": replace(task, shape=replace(task.shape, name="a", in_features=1024, out_features=768))}
    small = found._solved_small(large)
    monkeypatch.setattr("hfcompress.passes.footprint.SMALL", 1024)
    whole = found._solved_small(large)
    assert 0.97 * whole.peak <= small.peak <= 1.25 * whole.peak
    assert small.kept == pytest.approx(whole.kept, rel=0.1)


def test_the_fastest_way_below_the_limit_is_taken():
    found = footprint()
    found.base, found.row_frame, found.row_peak, found.hidden = GB, 0.01 * GB, 0.02 * GB, 0.03 * GB
    most = found.courses[0].rows
    assert found.course(100 * GB) == Course(most, suspended=True, spilled=False)
    ways = [found.course(int(limit * GB)) for limit in (6, 4.3, 3.4, 1.45)]
    assert [(way.suspended, way.spilled) for way in ways] == [
        (True, False),
        (True, False),
        (False, False),
        (False, True),
    ]
    assert ways[0].rows > ways[1].rows
    for limit, way in zip((6, 4.3, 3.4, 1.45), ways, strict=True):
        assert found.peak(way) <= limit * GB
    assert found.course(found.least).rows == 1
    with pytest.raises(InvalidValueError, match=r"--memory-limit 1GB is not enough .*; give --memory-limit 1\.\d\dGB"):
        found.course(GB)


def test_the_least_limit_that_is_named_is_enough():
    found = footprint()
    found.row_peak = 0.1 * GB
    with pytest.raises(InvalidValueError) as error:
        found.course(1)
    named = float(str(error.value).rpartition("--memory-limit ")[2].removesuffix("GB.")) * GB
    assert found.course(int(named)).rows == 1


@pytest.mark.parametrize("recipe", [hfc.RTN(group_size=32), hfc.GPTQ(group_size=32, shift=1.0)], ids=["rtn", "shift"])
def test_what_is_needed_is_what_the_recipe_needs(recipe):
    plain, other = footprint(), footprint(recipe)
    plain.base = other.base = 0
    course = plain.courses[0]
    if recipe.needs_inputs:
        assert other.phases(course)["blocks"] > 1.5 * (plain.phases(course)["blocks"] - 40e6)
    else:
        assert other.row_peak == other.row_frame == 0
        assert other.phases(course)["blocks"] < plain.phases(course)["blocks"]


def test_without_a_limit_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(Footprint, "__init__", None)
    model = StreamedModel(Checkpoint.open(make_model(CONFIGS["llama"]())))
    layout = get_format("compressed-tensors")
    plan = make_plan(model, (hfc.GPTQ(group_size=32),), layout)
    where = model, plan, layout, Batch(torch.from_numpy(token_ids(4, 32))), Processes(model.device)
    assert choose_course(*where, None) == Course(128, suspended=True, spilled=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 1000})())
    assert choose_course(*where, None) == Course(128, suspended=False, spilled=False)


def test_in_use_is_this_process():
    before = in_use(torch.device("cpu"))
    kept = np.ones(50_000_000 // 8)
    assert in_use(torch.device("cpu")) - before > 0.9 * kept.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_on_disk_comes_back_bit_for_bit(tmp_path, dtype):
    spill = Spill(tmp_path)
    tensors = [torch.randn(3, 5, 7).to(dtype) for _ in range(4)]
    kept = [spill.put(t) for t in tensors]
    again = kept[1].instead(tensors[1] * 2)
    assert all(torch.equal(k.read(), t) for k, t in zip(kept, tensors, strict=True))
    assert torch.equal(again.read(), tensors[1] * 2)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    end = spill._end
    del kept
    gc.collect()
    others = [spill.put(t + 1) for t in tensors]  # in the places that have become free
    assert spill._end == end
    assert all(torch.equal(k.read(), t + 1) for k, t in zip(others, tensors, strict=True))
    assert torch.equal(again.read(), tensors[1] * 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk that is always full, is Linux's")
def test_a_full_disk_is_told(tmp_path):
    spill = Spill(tmp_path)
    spill._file.close()
    with open("/dev/full", "wb", buffering=0) as full:
        spill._file = full
        with pytest.raises(OutputError, match=r"The disk of .* is full; free some space"):
            spill.put(torch.ones(1000))
