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
"""Factors moved in a whole run: what they gain, what is left alone, and that the folder holds what was solved."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from conftest import CONFIGS, in_fresh_process, make_model, token_ids
from safetensors.torch import load_file

import hfcompress as hfc
from hfcompress.cli import OK, _guarded, app
from hfcompress.models.roles import find_linears, get_weight, set_weight, watch_inputs
from hfcompress.models.tiny import tiny_folder
from hfcompress.solvers.grid import Grid
from hfcompress.solvers.rtn import rtn
from hfcompress.solvers.smoothing import Magnitudes, awq_candidates, gram_losses, round_scaled


WITNESS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
answers = {}
for folder in sys.argv[1:]:
    witness = json.load(open(folder + "/hfcompress.json"))["witness"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor([witness["input_ids"]])).logits[0].log_softmax(-1)
    told = torch.tensor(witness["top_log_probs"])
    answers[folder] = (found.gather(-1, torch.tensor(witness["top_ids"])) - told).abs().max().item()
print(json.dumps(answers))
"""
ROUNDING = ("rtn", "gptq")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """
    Folders: the bundled model by two recipes on the command line, with what was said; and every architecture.
    Then how far the log-probabilities that plain transformers finds in them are from those of the solved models.
    """
    parent = tmp_path_factory.mktemp("folding")
    said = {}
    for rounding in ROUNDING:
        recipe = parent / f"{rounding}.yaml"
        recipe.write_text(f"recipe:\n  - awq: {{grid: 4, rows: 2}}\n  - {rounding}: {{bits: 3}}\n")
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            options = ["--samples", "8", "--no-eval", "--output", str(parent / rounding)]
            assert _guarded(app, ["run", str(recipe), *options]) == OK
        said[rounding] = " ".join(stdout.getvalue().split())
    for name in CONFIGS:
        model = make_model(CONFIGS[name](), torch.bfloat16)
        steps = (hfc.AWQ(grid=3, rows=2), hfc.RTN(bits=3, group_size=32))
        job = hfc.Job(steps=steps, format="dense" if name == "gpt2" else "compressed-tensors")
        hfc.compress(model, job, parent / name, calibration=token_ids(4, 24), evaluate=False)
    folders = [str(parent / name) for name in (*ROUNDING, *CONFIGS)]
    return parent, said, in_fresh_process(WITNESS, *folders, forbid="hfcompress")


def manifest_of(folder) -> dict:
    return json.loads((folder / "hfcompress.json").read_text())


def stored(folder) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def test_plain_transformers_finds_the_solved_logits(made):
    parent, _, off = made
    assert len(off) == len(ROUNDING) + len(CONFIGS)
    assert max(off.values()) < 1e-3, off
    assert all(np.std(manifest_of(parent / name)["witness"]["top_log_probs"]) > 0.01 for name in CONFIGS)


@pytest.mark.parametrize("rounding", ROUNDING)
def test_the_command_line_tells_what_was_scaled_and_only_norms_changed(made, tiny, rounding):
    parent, said, _ = made
    manifest = manifest_of(parent / rounding)
    assert [next(iter(step)) for step in manifest["recipe"]["recipe"]] == ["awq", rounding]
    assert {row["method"] for row in manifest["linears"]} == {rounding}
    assert len(manifest["folds"]) == 16
    scaled = [pair for pair in manifest["folds"] if pair["left_alone"] is None]
    assert len(scaled) >= (8 if rounding == "rtn" else 1)  # error feedback leaves less to gain
    assert f"{len(scaled)} of 16 pairs" in said[rounding]
    for pair in scaled:
        assert 0 < pair["gain"] < 1
        assert min(abs(pair["ratio"] - ratio) for ratio in (0, 1 / 3, 2 / 3, 1)) < 1e-6
    base, tensors = stored(tiny), stored(parent / rounding)
    norms = {f"{pair['producer']}.weight" for pair in scaled if "norm" in pair["producer"]}
    assert norms or rounding == "gptq"
    for name in base:
        if "norm" in name:
            assert tensors[name].dtype == base[name].dtype
            assert torch.equal(tensors[name], base[name]) == (name not in norms)


def kl(tmp_path, name: str, recipe) -> float:
    ids = np.load(tiny_folder() / "evaluation.npy")[:24]
    return hfc.compress(None, recipe, tmp_path / name, eval_data=ids, samples=32).report["kl_mean"]


def test_it_pays_before_rounding_to_nearest(tmp_path):
    rounding = hfc.RTN(bits=3, group_size=128)
    assert kl(tmp_path, "awq", hfc.AWQ(grid=8, rows=4) >> rounding) < 0.97 * kl(tmp_path, "rtn", rounding)


@torch.no_grad()
def test_the_choice_is_the_best_by_brute_force(llama, tmp_path):
    """Every candidate of the first block written out: the output's error in float64 for `o_proj`, and the block's output
    with the rounded weights put in for queries, keys and values."""
    ids = token_ids(6, 32)
    recipe = hfc.AWQ(grid=5, rows=6) >> hfc.RTN(bits=3, group_size=32)
    manifest = hfc.compress(llama, recipe, tmp_path / "out", calibration=ids, evaluate=False).manifest
    pairs = {tuple(n.rpartition(".")[2] for n in pair["consumers"]): pair for pair in manifest["folds"][:4]}
    block, seen = llama.model.layers[0], {}
    linears = {n.rpartition(".")[2]: m for n, m in find_linears(block, "0").items()}
    outputs = []
    handle = block.register_forward_hook(lambda _, args, output: outputs.append(output))

    def output():
        llama(input_ids=torch.from_numpy(ids))
        return outputs.pop()

    with watch_inputs(linears, lambda name, x: seen.__setitem__(name, x.reshape(-1, x.shape[-1]))):
        expected = output()
    grid = Grid(3, 32)

    x = seen["o_proj"]
    weight = get_weight(linears["o_proj"])
    by_row = [x.abs().mean(0), x.abs().amax(0), weight.abs().mean(0), weight.abs().amax(0)]
    heads = [values.view(2, 2, 16) for values in by_row]  # the two query heads of each value head
    shared = [h.amax(1) if i % 2 else h.mean(1) for i, h in enumerate(heads)]
    losses = {None: gram_losses(weight, [torch.ones(64)], x.T @ x / len(x), grid, torch.float32, True).item()}
    for ratio, scales in awq_candidates(Magnitudes(*(s.flatten() for s in shared)), 5):
        spread = scales.view(2, 1, 16).expand(2, 2, 16).reshape(64)
        rounded = round_scaled(weight, spread, x.square().mean(0), grid, torch.float32, True)
        losses[ratio] = (x.double() @ (rounded - weight).double().T).square().sum(1).mean().item()
    best = min(losses, key=losses.get)
    assert pairs["o_proj",]["ratio"] == best
    assert pairs["o_proj",]["gain"] == pytest.approx(1 - losses[best] / losses[None], abs=1e-4)

    names = ("q_proj", "k_proj", "v_proj")
    x = seen["q_proj"]
    weights = [get_weight(linears[n]) for n in names]
    stacked = torch.cat(weights).abs()
    magnitudes = Magnitudes(x.abs().mean(0), x.abs().amax(0), stacked.mean(0), stacked.amax(0))
    losses = {}
    for ratio, scales in [(None, torch.ones(64)), *awq_candidates(magnitudes, 5)]:
        for n, weight in zip(names, weights, strict=True):
            set_weight(linears[n], round_scaled(weight, scales, x.square().mean(0), grid, torch.float32, True))
        losses[ratio] = (output() - expected).double().square().sum().item()
    handle.remove()
    best = min(losses, key=losses.get)
    assert pairs[names]["ratio"] == best
    assert pairs[names]["gain"] == pytest.approx(1 - losses[best] / losses[None], abs=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_on_every_architecture_no_pair_loses_by_its_own_measure(made, name):
    pairs = manifest_of(made[0] / name)["folds"]
    assert len(pairs) == 12
    assert all(pair["gain"] >= 0 for pair in pairs)
    assert all((pair["ratio"] is None) == (pair["left_alone"] is not None) for pair in pairs)
    assert sum(pair["left_alone"] is None for pair in pairs) >= 3


def test_what_stays_dense_is_not_scaled(llama, tmp_path):
    recipe = hfc.AWQ(grid=3, rows=2, ignore=("down_proj",)) >> hfc.RTN(
        bits=3, group_size=32, ignore=("k_proj", "v_proj")
    )
    result = hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(4, 24), evaluate=False)
    first = {pair["consumers"][-1].rpartition(".")[2]: pair for pair in result.manifest["folds"][:3]}
    assert set(first) == {"v_proj", "o_proj", "up_proj"}
    assert first["v_proj"]["left_alone"] == "model.layers.0.self_attn.k_proj reads the same tensor and stays dense"
    assert first["o_proj"]["left_alone"] == "model.layers.0.self_attn.v_proj, which makes its input, stays dense"
    assert first["up_proj"]["left_alone"] in (None, "no factors are better than none")
    tensors, before = stored(result.output_dir), llama.state_dict()
    for name in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm"):
        assert torch.equal(tensors[f"model.layers.0.{name}.weight"], before[f"model.layers.0.{name}.weight"])
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(tensors[norm], before[norm]) == (first["up_proj"]["left_alone"] is not None)


def test_what_does_not_pay_by_the_step_that_rounds_is_left_alone(llama, tmp_path, monkeypatch):
    """Candidates that do better when rounded to nearest must do so by the step itself; here all are equally bad."""

    def to_zero(self, weight, statistics, grid, scale_dtype, linears, curvature=None):
        return rtn(torch.zeros_like(weight), grid, scale_dtype), {}

    recipe = hfc.AWQ(grid=3, rows=2) >> hfc.GPTQ(bits=3, group_size=32)
    scaled = []
    for name in ("itself", "to-zero"):
        result = hfc.compress(llama, recipe, tmp_path / name, calibration=token_ids(4, 24), evaluate=False)
        scaled.append(sum(pair["left_alone"] is None for pair in result.manifest["folds"]))
        monkeypatch.setattr(hfc.GPTQ, "quantize", to_zero)
    assert scaled[0] > 0
    assert scaled[1] == 0


def test_a_reader_that_is_no_target_keeps_its_pair_from_being_scaled(llama, tmp_path):
    recipe = hfc.AWQ(grid=3, rows=2, targets=("q_proj",)) >> hfc.RTN(bits=3, group_size=32)
    pairs = hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(4, 24), evaluate=False).manifest[
        "folds"
    ]
    assert [pair["left_alone"] for pair in pairs] == [
        f"model.layers.{i}.self_attn.k_proj reads the same tensor and is no target of awq" for i in range(3)
    ]


def test_smoothing_moves_outliers_and_leaves_the_rest(llama, tmp_path):
    llama.model.layers[0].input_layernorm.weight.data[5] *= 60
    recipe = hfc.Smooth() >> hfc.RTN(bits=8, group_size=32)
    result = hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(4, 24), evaluate=False)
    pair = result.manifest["folds"][0]
    assert (pair["step"], pair["ratio"], pair["left_alone"]) == ("smooth", 0.5, None)
    assert pair["gain"] > 0.5
    before = llama.model.layers[0].input_layernorm.weight.abs()
    after = stored(result.output_dir)["model.layers.0.input_layernorm.weight"].abs()
    assert after.max() / after.median() < 0.3 * before.max() / before.median()


def test_rounding_to_nearest_heeds_the_inputs_where_they_are_known(llama, tmp_path):
    """With statistics at hand the clip search weights columns by them; without, all alike."""
    ids = token_ids(4, 24)
    recipe = hfc.AWQ(grid=1, rows=1, targets=("q_proj",)) >> hfc.RTN(bits=3, group_size=32)  # no pair is scaled
    layout = {"format": "int-quantized"}
    hfc.compress(llama, hfc.Job(steps=recipe.steps, **layout), tmp_path / "known", calibration=ids, evaluate=False)
    hfc.compress(llama, hfc.Job(steps=recipe.steps[1:], **layout), tmp_path / "unknown", evaluate=False)
    known, unknown = stored(tmp_path / "known"), stored(tmp_path / "unknown")
    seen = {}
    with torch.no_grad(), watch_inputs({"": llama.model.layers[0].self_attn.q_proj}, seen.__setitem__):
        llama(input_ids=torch.from_numpy(ids))
    x, name = seen[""].reshape(-1, 64), "model.layers.0.self_attn.q_proj.weight"
    errors = []
    for tensors in (known, unknown):
        values = tensors[name].float() * tensors[f"{name}_scale"].float().repeat_interleave(32, 1)
        errors.append((llama.state_dict()[name] - values).square().mul(x.square().mean(0)).sum().item())
    assert errors[0] < errors[1]
