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
"""A run that was stopped goes on from the hidden states that it kept, with the same bytes."""

import json

import pytest
import torch
from conftest import CONFIGS, StopAfter, digest, make_model, token_ids
from safetensors.torch import save_file

import hfcompress as hfc
from hfcompress.formats.writer import partial_path
from hfcompress.models.batch import Batch
from hfcompress.models.streaming import Stream
from hfcompress.passes import curvature, waypoint
from hfcompress.passes.block_pass import BlockPass
from hfcompress.passes.processes import Processes
from hfcompress.passes.spill import Spill
from hfcompress.passes.waypoint import Waypoint


@pytest.fixture
def always(monkeypatch):
    """Keep everything, however soon it would be found again."""
    monkeypatch.setattr(waypoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(waypoint, "WORTH", 0.0)


@pytest.fixture
def replayed(monkeypatch):
    """The blocks that are gone through again."""
    found = []
    replay = BlockPass._replay
    monkeypatch.setattr(BlockPass, "_replay", lambda self, b, i, *rest: found.append(i) or replay(self, b, i, *rest))
    return found


def run(model, output, recipe, **options):
    return hfc.compress(str(model), recipe, output, calibration=token_ids(9, 32), evaluate=False, **options)


def stopped(model, output, recipe, blocks):
    with pytest.raises(KeyboardInterrupt):
        run(model, output, recipe, progress=StopAfter(blocks))
    return partial_path(output) / "waypoint-0-of-1.safetensors"


RECIPES = {
    "shifted": hfc.GPTQ(bits=3, group_size=32, shift=1.0),
    "smoothed": hfc.AWQ(grid=2, rows=2) >> hfc.GPTQ(group_size=32),
    "without data": hfc.RTN(group_size=32),
    "rotated": hfc.Rotate() >> hfc.GPTQ(group_size=32, shift=1.0),
    "tuned": hfc.GPTQ(bits=3, group_size=32, curvature=True) >> hfc.Tune(iterations=2),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "on disk"])
def test_a_run_goes_on_from_there(saved_llama, tmp_path, always, replayed, run_in, recipe, spilled):
    run_in(suspended=True, spilled=spilled, rows=4)
    whole = run(saved_llama, tmp_path / "whole", recipe)
    assert stopped(saved_llama, tmp_path / "out", recipe, 2).is_file()
    result = run(saved_llama, tmp_path / "out", recipe, resume=True)
    assert not replayed
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert result.manifest["witness"] == whole.manifest["witness"]
    assert not list((tmp_path / "out").glob("*waypoint*"))


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "opt"])
def test_on_other_architectures_too(tmp_path, always, replayed, name):
    make_model(CONFIGS[name](), torch.bfloat16).save_pretrained(tmp_path / "model")
    recipe = hfc.GPTQ(bits=3, group_size=32, shift=1.0)
    run(tmp_path / "model", tmp_path / "whole", recipe)
    stopped(tmp_path / "model", tmp_path / "out", recipe, 2)
    run(tmp_path / "model", tmp_path / "out", recipe, resume=True)
    assert not replayed
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_what_came_after_it_is_gone_through_again(saved_llama, tmp_path, always, replayed, monkeypatch):
    recipe = RECIPES["shifted"]
    run(saved_llama, tmp_path / "whole", recipe)
    due = Waypoint.due
    asked = []
    monkeypatch.setattr(
        Waypoint, "due", lambda self, *rest: due(self, *rest) and not asked.append(1) and len(asked) < 2
    )
    stopped(saved_llama, tmp_path / "out", recipe, 3)
    run(saved_llama, tmp_path / "out", recipe, resume=True)
    assert replayed == [1, 2]
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut short", "other rows", "a part is gone", "not journaled"])
def test_where_it_does_not_fit_all_blocks_are_gone_through(saved_llama, tmp_path, always, replayed, damage):
    recipe = RECIPES["shifted"]
    run(saved_llama, tmp_path / "whole", recipe)
    kept = stopped(saved_llama, tmp_path / "out", recipe, 2)
    if damage == "cut short":
        kept.write_bytes(kept.read_bytes()[:-1])
    elif damage == "other rows":
        Waypoint(kept.parent, Processes(torch.device("cpu")), 0).keep(1, [stream((2, 32, 8))])
    elif damage == "a part is gone":
        (kept.parent / "parts" / "block-00000.safetensors").unlink()
    else:
        journal = json.loads((kept.parent / "journal.json").read_text())
        del journal["blocks"]["model.layers.1"]
        (kept.parent / "journal.json").write_text(json.dumps(journal))
    run(saved_llama, tmp_path / "out", recipe, resume=True)
    assert replayed == {"a part is gone": [1], "not journaled": [0]}.get(damage, [0, 1])
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_what_is_found_again_soon_is_not_kept(saved_llama, tmp_path, replayed):
    assert not stopped(saved_llama, tmp_path / "out", RECIPES["tuned"], 2).exists()
    assert not list(partial_path(tmp_path / "out").glob("kept-*"))
    run(saved_llama, tmp_path / "out", RECIPES["tuned"], resume=True)
    assert replayed == [0, 1]


def test_gradients_are_kept(saved_llama, tmp_path, always, monkeypatch):
    run(saved_llama, tmp_path / "whole", RECIPES["tuned"])
    stopped(saved_llama, tmp_path / "out", RECIPES["tuned"], 1)
    monkeypatch.setattr(curvature, "GradientCovariances", None)
    run(saved_llama, tmp_path / "out", RECIPES["tuned"], resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def stream(shape) -> Stream:
    generator = torch.Generator().manual_seed(sum(shape))
    return Stream(Batch(torch.zeros(shape[:2], dtype=torch.int64)), torch.randn(shape, generator=generator), [])


def point(folder, room=0) -> Waypoint:
    return Waypoint(folder, Processes(torch.device("cpu")), room)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_bit_for_bit(tmp_path, dtype):
    spill = Spill(tmp_path / "spill")
    before = [stream((3, 5, 8)), stream((1, 5, 8)), stream((2, 7, 8))]
    before = [each.advanced(each.hidden.to(dtype)) for each in before]
    before[1].held = spill.put(before[1].hidden)
    point(tmp_path).keep(4, before)
    blank = [each.advanced(torch.zeros_like(each.hidden)) for each in before]
    behind, after = point(tmp_path).reached(blank, lambda index: index < 5)
    assert behind == 5
    assert all(torch.equal(one.hidden, other.hidden) for one, other in zip(before, after, strict=True))
    assert not isinstance(after[1].held, torch.Tensor)  # on disk as before
    assert point(tmp_path).reached(blank, lambda index: index < 4) == (0, blank)
    assert point(tmp_path).reached(blank[:2], lambda index: True)[0] == 0
    save_file({"model.norm": torch.ones(3)}, tmp_path / "waypoint-0-of-1.safetensors")  # something else
    assert point(tmp_path).reached(blank, lambda index: True)[0] == 0
    point(tmp_path).keep(4, before)
    other = [each.advanced(each.hidden.to(torch.float16)) for each in blank]
    assert point(tmp_path).reached(other, lambda index: True)[0] == 0


def test_it_is_kept_where_that_costs_little_beside_what_it_saves(tmp_path):
    streams = [stream((4, 64, 32))]
    size = streams[0].hidden.nbytes
    one = point(tmp_path)
    assert not one.due(waypoint.LEAST_SECONDS * 0.6, streams)
    assert one.due(waypoint.LEAST_SECONDS * 0.6, streams)  # the blocks since then together
    one.keep(1, streams)
    assert not one.due(waypoint.LEAST_SECONDS * 0.6, streams)
    slow = point(tmp_path)
    slow._rate = size / 5  # five seconds to write
    assert not slow.due(waypoint.WORTH * 4.9, streams)
    assert slow.due(waypoint.WORTH * 0.2, streams)
    assert not point(tmp_path, room=1 << 62).due(1e6, streams)


def test_a_disk_that_fails_costs_only_the_shorter_way(tmp_path, monkeypatch):
    one = point(tmp_path)

    def full(temporary, final):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(waypoint, "put_in_place", full)
    one.keep(0, [stream((2, 3, 4))])
    assert not list(tmp_path.iterdir())
    assert not one.due(1e6, [stream((2, 3, 4))])
