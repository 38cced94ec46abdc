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
"""What a plan is said to take is what its run takes, to the byte."""

import pytest
from conftest import CONFIGS, make_model

import hfcompress as hfc
from hfcompress.formats import get_format
from hfcompress.formats.writer import CheckpointWriter, merged_bytes
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.forecast import Forecast
from hfcompress.passes.plan import make_plan


RECIPES = {
    "mixed": (hfc.RTN(bits=3, group_size=32, overrides={"down_proj": {"bits": 8}}), "compressed-tensors"),
    "asymmetric": (hfc.RTN(bits=4, group_size=32, symmetric=False), "compressed-tensors"),
    "bytes": (hfc.RTN(bits=4, group_size=-1, symmetric=False), "int-quantized"),
    "head": (hfc.RTN(bits=2, group_size=32, targets=("lm_head", "o_proj")), "compressed-tensors"),
    "dense": (hfc.RTN(bits=2, group_size=32), "dense"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_bytes_of_a_folder_are_told_beforehand(llama, tmp_path, name):
    recipe, layout = RECIPES[name]
    result = hfc.compress(llama, hfc.Job(steps=(recipe,), format=layout), tmp_path / "out", evaluate=False)
    model = StreamedModel(Checkpoint.open(llama))
    plan = make_plan(model, [recipe], get_format(layout))
    forecast = Forecast(model, get_format(layout))
    assert forecast.output_bytes(plan) == (tmp_path / "out" / "model.safetensors").stat().st_size
    rows = {row["name"]: row["bytes"] for row in result.manifest["linears"]}
    assert {n: forecast.linear_bytes(task) for n, task in plan.tasks.items()} == rows
    weights = sum(task.shape.out_features * task.shape.in_features for task in plan.tasks.values())
    assert forecast.bits_per_weight(plan.tasks.values()) == pytest.approx(8 * sum(rows.values()) / weights)


def test_a_transposed_weight(tmp_path):
    model, recipe = make_model(CONFIGS["gpt2"]()), hfc.RTN(group_size=32)
    hfc.compress(model, hfc.Job(steps=(recipe,), format="dense"), tmp_path / "out", evaluate=False)
    streamed, layout = StreamedModel(Checkpoint.open(model)), get_format("dense")
    found = Forecast(streamed, layout).output_bytes(make_plan(streamed, [recipe], layout))
    assert found == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_several_shards(tmp_path, llama):
    writer = CheckpointWriter(tmp_path / "out", max_shard_bytes=50_000)
    writer.open()
    parts = [{n: t} for n, t in sorted(llama.state_dict().items())]
    for number, part in enumerate(parts):
        writer.write_part(f"part-{number:05d}", part)
    writer.merge()
    found = [path.stat().st_size for path in writer.result.glob("model*.safetensors")]
    assert len(found) > 3
    assert merged_bytes(parts, 50_000) == sum(found)
