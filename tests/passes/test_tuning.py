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
"""Block tuning: never worse on the rows that judge, and better from a poor start."""

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids

import hfcompress as hfc
from hfcompress.errors import InvalidValueError
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import find_linears, get_weight, set_weight
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.processes import Processes
from hfcompress.passes.tuning import BlockTuner, first_half, watch_output
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.pattern import Pattern
from hfcompress.solvers.rtn import rtn


@torch.no_grad()
def tuned_block(name: str, step: hfc.Tune, masked: bool = False, curved: bool = False, looked: list | None = None):
    """The first block rounded to nearest and tuned: errors before and after on the held-out rows, codes that moved."""
    model = StreamedModel(Checkpoint.open(make_model(CONFIGS[name]())))
    ids = torch.from_numpy(token_ids(24, 32))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :5] = False
    batches = Batch(ids, mask if masked else None).split(2)
    streams = model.embed(batches)
    hidden = model.skeleton.config.get_text_config().hidden_size
    curvature = torch.diag(torch.linspace(0.1, 2, hidden)) if curved else None
    with model.block(0) as block:
        linears = find_linears(block, model.block_names[0])
        outputs, first = [], []
        for stream in streams:
            with watch_output(block, first_half(block) if step.halves else None) as found:
                outputs.append(model.call(block, 0, stream))
            first += found
        weights = {n: get_weight(m) for n, m in linears.items()}
        solved = {n: rtn(w, Grid(2, 32), torch.bfloat16) for n, w in weights.items()}
        for n, quantized in solved.items():
            set_weight(linears[n], quantized.dequantize())
        tuner = BlockTuner(model, 0, streams, outputs, curvature, first)
        if looked is not None:
            looked.append(tuner._loss(block, tuner.held_out, first_half(block)))
        moved, told = tuner.tune(block, linears, weights, solved, step)
        if looked is not None:
            looked.append(tuner._loss(block, tuner.held_out, first_half(block)))
        for n, module in linears.items():  # the block is left with what is returned
            torch.testing.assert_close(get_weight(module), moved.get(n, solved[n]).dequantize(), rtol=0, atol=0)
            assert not hasattr(module, "parametrizations")
        error = tuner._loss(block, tuner.held_out)
    assert error == pytest.approx(told["tuned"]["held_out_error"], rel=1e-4)
    changed = sum((moved[n].codes != solved[n].codes).sum().item() for n in moved)
    return told["tuned"]["held_out_error_before"], error, changed, moved


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "opt"])
def test_the_outputs_error_falls_a_good_deal_from_rounding_to_nearest(name):
    before, after, changed, moved = tuned_block(name, hfc.Tune(iterations=80, learning_rate=0.02))
    assert after < 0.9 * before
    assert changed > 100
    for quantized in moved.values():
        assert quantized.codes.min() >= -2
        assert quantized.codes.max() <= 1
        assert quantized.scales.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_by_halves_the_attention_is_moved_by_what_it_puts_out_itself(name):
    looked = []
    step = hfc.Tune(iterations=80, learning_rate=0.02, halves=True)
    before, after, _, moved = tuned_block(name, step, looked=looked)
    assert looked[1] < 0.9 * looked[0]
    assert after < 0.9 * before
    attention = [n for n in moved if "attn" in n]
    assert 0 < len(attention) < len(moved)


def test_by_halves_the_mlp_is_left_where_only_the_attention_is_asked_for():
    step = hfc.Tune(iterations=40, learning_rate=0.02, halves=True, targets=("o_proj", "v_proj"))
    looked = []
    *_, moved = tuned_block("llama", step, looked=looked)
    assert {n.rpartition(".")[2] for n in moved} == {"o_proj", "v_proj"}
    assert looked[1] < looked[0]


@pytest.mark.parametrize("options", [{"masked": True}, {"curved": True}])
def test_padding_and_what_errors_cost_are_heeded(options):
    before, after, _, _ = tuned_block("llama", hfc.Tune(iterations=80, learning_rate=0.02), **options)
    assert after < 0.95 * before


def test_a_step_that_makes_it_worse_leaves_the_start():
    before, after, changed, moved = tuned_block("llama", hfc.Tune(iterations=3, learning_rate=50.0))
    assert after == before
    assert (changed, moved) == (0, {})


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_weights_without_a_grid_move_and_their_zeros_stay(name):
    model = StreamedModel(Checkpoint.open(make_model(CONFIGS[name]())))
    streams = model.embed(Batch(torch.from_numpy(token_ids(24, 32))).split(2))
    with model.block(0) as block:
        linears = find_linears(block, model.block_names[0])
        outputs = [model.call(block, 0, s) for s in streams]
        weights = {n: get_weight(m) for n, m in linears.items()}
        pattern, solved = Pattern.parse("2:4", 0.5), {}
        for n, weight in weights.items():
            values = (weight * pattern.mask(weight.abs(), by_row=False)).bfloat16()
            scales = torch.ones(len(weight), 1, dtype=torch.bfloat16)
            solved[n] = QuantizedWeight(values, scales, None, Grid(16, type="plain"))
            set_weight(linears[n], values.float())
        tuner = BlockTuner(model, 0, streams, outputs)
        moved, told = tuner.tune(block, linears, weights, solved, hfc.Tune(iterations=60), list(solved))
        for n, module in linears.items():
            assert torch.equal(moved[n].codes == 0, solved[n].codes == 0)
            assert not torch.equal(moved[n].codes, solved[n].codes)
            torch.testing.assert_close(get_weight(module), moved[n].dequantize(), rtol=0, atol=0)
        assert tuner._loss(block, tuner.held_out) == pytest.approx(told["tuned"]["held_out_error"], rel=1e-2)
    assert told["tuned"]["held_out_error"] < 0.8 * told["tuned"]["held_out_error_before"]


def test_after_zeros_the_predictions_are_nearer_to_the_dense_models(tmp_path):
    ids = torch.as_tensor(np.load(hfc.models.tiny.tiny_folder() / "calibration.npy")[:48]).long()
    kl = {}
    quick = {"iterations": 40, "batch_tokens": 512}
    rungs = {"solved": (), "moved": (hfc.Tune(**quick),), "by halves": (hfc.Tune(**quick, halves=True),)}
    for label, steps in rungs.items():
        job = hfc.Job(steps=(hfc.Sparsify("2:4"), *steps))
        kl[label] = hfc.compress(None, job, tmp_path / label, calibration=ids).report["kl_mean"]
    assert kl["moved"] < 0.97 * kl["solved"]
    assert kl["by halves"] < 0.97 * kl["solved"]


def test_only_the_targets_move():
    *_, moved = tuned_block("llama", hfc.Tune(iterations=40, learning_rate=0.02, targets=("down_proj",)))
    assert list(moved) == ["model.layers.0.mlp.down_proj"]


def test_it_needs_two_batches_to_judge(llama, tmp_path):
    result = hfc.compress(
        llama,
        hfc.GPTQ(group_size=32) >> hfc.Tune(iterations=2),
        tmp_path / "out",
        calibration=token_ids(1, 32),
        evaluate=False,
    )
    assert {row["tuned"] for row in result.manifest["linears"]} == {None}


@pytest.mark.parametrize("steps", [(hfc.Tune(),), (hfc.Tune(), hfc.GPTQ(group_size=32))])
def test_it_comes_after_a_step_that_rounds(llama, tmp_path, steps):
    with pytest.raises(InvalidValueError, match="tune starts from weights that a step has changed: put one before it"):
        hfc.compress(llama, hfc.Job(steps=steps), tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)


def test_it_works_in_one_process(llama, tmp_path, monkeypatch):
    class Two(Processes):
        def __init__(self, device):
            super().__init__(device)
            self.count = 2

    monkeypatch.setattr("hfcompress.preparing.Processes", Two)
    recipe = hfc.GPTQ(group_size=32) >> hfc.Tune()
    with pytest.raises(InvalidValueError, match="tune works in one process; start one, or leave tune out"):
        hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)


def test_it_comes_once(llama, tmp_path):
    recipe = hfc.GPTQ(group_size=32) >> hfc.Tune() >> hfc.Tune()
    with pytest.raises(InvalidValueError, match="has the step tune twice; leave one"):
        hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"iterations": 0}, "tune.iterations is 0; it must be at least 1"),
        ({"batch_tokens": 0}, "tune.batch_tokens is 0; it must be at least 1"),
        ({"learning_rate": -1.0}, "tune.learning_rate is -1.0; it must be 0 or more"),
        ({"scale_learning_rate": float("inf")}, "tune.scale_learning_rate is inf; it must be 0 or more"),
        ({"seed": -1}, "tune.seed is -1; it must be 0 or more"),
        ({"overrides": {"q_proj": {"seed": 1}}}, "tune takes no overrides"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(InvalidValueError, match=said):
        hfc.Tune(**settings)
