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
"""Blocks that lean on others: those that are alike, and nothing is lost where the difference is small."""

import numpy as np
import pytest
import torch
from conftest import CONFIGS, digest, make_model, token_ids
from hypothesis import given
from hypothesis import strategies as st

import hfcompress as hfc
from hfcompress.models.names import in_block
from hfcompress.passes import block_pass, qat_pass
from hfcompress.passes.sharing import cheapest


IDS = torch.from_numpy(token_ids(8, 32)).long()


@given(st.integers(2, 9), st.integers(1, 4), st.randoms(use_true_random=False))
def test_pairs_do_not_touch_one_another_and_the_cheapest_is_among_them(total, count, random):
    costs = {own: {other: random.random() for other in range(total) if other != own} for own in range(total)}
    found = cheapest(costs, min(count, total // 2))
    assert len(found) == min(count, total // 2)
    assert not set(found) & set(found.values())
    least = min((cost, own, other) for own, others in costs.items() for other, cost in others.items())
    assert found[least[1]] == least[2]


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed"])
def test_the_block_that_is_alike_is_found_and_nothing_is_lost(name, tmp_path):
    config = CONFIGS[name]()
    config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * 4
    model = make_model(config)
    blocks, generator = model.get_decoder().layers, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (key, own), (_, base) in zip(blocks[2].named_parameters(), blocks[1].named_parameters(), strict=True):
            if own.dim() == 2 and "norm" not in key:
                rows, columns = own.shape
                small = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
                own.copy_(base + 0.01 * small)
    found = hfc.compress(model, hfc.Share(blocks=0.25, rank=4), tmp_path / "out", calibration=IDS, eval_data=IDS)
    leaning = {(int(row["name"].split(".")[2]), row["base"]) for row in found.manifest["linears"] if "base" in row}
    assert leaning in ({(2, 1)}, {(1, 2)})
    assert found.report["kl_mean"] < 1e-4
    other = hfc.compress(model, hfc.Prune(depth=0.25), tmp_path / "pruned", calibration=IDS, eval_data=IDS)
    assert found.report["kl_mean"] < 0.1 * other.report["kl_mean"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "products of two factors" in card


def test_training_heals_what_sharing_costs(tiny, tmp_path):
    calibration, evaluation = (np.load(tiny / f"{name}.npy") for name in ("calibration", "evaluation"))
    data = {
        "calibration": torch.as_tensor(calibration[:24]).long(),
        "eval_data": torch.as_tensor(evaluation[:8]).long(),
    }
    before = hfc.compress(None, hfc.Share(rank=16), tmp_path / "before", **data)
    after = hfc.compress(
        None, hfc.Share(rank=16) >> hfc.QAT(epochs=3, held_out=4, scale_learning_rate=0.03), tmp_path / "after", **data
    )
    assert after.report["kl_mean"] < 0.85 * before.report["kl_mean"]
    assert after.report["size_bytes"] == pytest.approx(before.report["size_bytes"], rel=1e-3)
    expected = hfc.plan(None, hfc.Share(rank=16), calibration=data["calibration"]).output_bytes
    assert expected == pytest.approx(before.report["size_bytes"], rel=0.05)


@pytest.mark.parametrize("step", [hfc.Share(blocks=0.5, rank=4), hfc.LowRank(ratio=0.6)])
@pytest.mark.parametrize("moment", ["the head", "training"])
def test_a_run_that_is_killed_behind_the_blocks_knows_what_was_settled(step, moment, tmp_path, monkeypatch):
    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(tmp_path / "base")
    steps = step >> hfc.QAT(steps=4, batch_size=2, held_out=2)

    def run(name, **options):
        own = {"evaluate": False, "calibration": IDS, **options}
        return hfc.compress(str(tmp_path / "base"), steps, tmp_path / name, **own)

    def stop(*_, **__):
        raise KeyboardInterrupt

    whole = run("whole")
    with monkeypatch.context() as patch:
        if moment == "training":
            patch.setattr(qat_pass.QatPass, "_fit", stop)
        else:
            patch.setattr(block_pass, "testimony", stop)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    found = run("out", resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert found.manifest["witness"] == whole.manifest["witness"]
    assert len({(row.get("rank"), row.get("base")) for row in found.manifest["linears"]}) > 1


def test_the_number_of_a_block_is_the_first_in_a_name():
    assert in_block("model.layers.3.experts.7.up_proj.weight", 12) == "model.layers.12.experts.7.up_proj.weight"
