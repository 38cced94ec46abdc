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
"""Eight-bit inputs and caches on the trained model: what they cost, measured with the rounding in place."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hfcompress as hfc


EIGHT = {"bits": 8, "group_size": -1}
ROWS = 12
RECIPES = {
    "weights": hfc.RTN(**EIGHT),
    "dynamic": hfc.RTN(**EIGHT, activations="dynamic"),
    "static": hfc.RTN(**EIGHT, activations="static"),
    "static minmax": hfc.RTN(**EIGHT, activations="static", observer="minmax"),
    "static percentile": hfc.RTN(**EIGHT, activations="static", observer="percentile"),
    "fp8 weights": hfc.RTN(**EIGHT, type="float"),
    "fp8 dynamic": hfc.RTN(**EIGHT, type="float", activations="dynamic"),
    "fp8 static": hfc.RTN(**EIGHT, type="float", activations="static"),
    "int cache": hfc.RTN(**EIGHT) >> hfc.KVCache(type="int"),
    "fp8 cache": hfc.RTN(**EIGHT) >> hfc.KVCache(),
}


@pytest.fixture(scope="module")
def ids(tiny):
    return np.load(tiny / "evaluation.npy").astype(np.int64)[:ROWS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("eight")
    return {
        name: hfc.compress(None, recipe, parent / name, samples=24, evaluate=False).output_dir
        for name, recipe in RECIPES.items()
    }


@pytest.fixture(scope="module")
def kl(folders, ids, tmp_path_factory):
    """KL to the original in nats a token, as `hfcompress eval` measures it."""
    cache = tmp_path_factory.mktemp("teacher")
    return {name: hfc.evaluate(folder, data=ids, teacher_cache=cache)["kl_mean"] for name, folder in folders.items()}


def test_eight_bit_inputs_cost_little(kl):
    assert kl["weights"] < 1e-4
    assert kl["weights"] < kl["dynamic"] < 1.5e-3
    assert kl["fp8 weights"] < 1.5e-3
    assert kl["fp8 weights"] < kl["fp8 dynamic"] < 5e-3


def test_one_stored_scale_costs_more_than_one_per_token_but_within_bounds(kl):
    assert 1.5 * kl["dynamic"] < kl["static"] < 6e-3
    assert kl["fp8 static"] < 6e-3


def test_observers_that_clip_pay_on_integers(kl):
    assert kl["static"] < 0.8 * kl["static minmax"]
    assert kl["static percentile"] < 0.8 * kl["static minmax"] < 0.02


def test_an_eight_bit_cache_costs_little(kl):
    assert kl["weights"] < kl["int cache"] < 1e-3
    assert kl["weights"] < kl["fp8 cache"] < 5e-3


def test_the_report_is_what_plain_transformers_finds(kl, folders, ids, tiny):
    """Measured with the activations rounded, by another program: nothing is measured on dense arithmetic by mistake."""
    original = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokens = torch.from_numpy(ids)
    for name in ("dynamic", "fp8 static", "fp8 cache"):
        model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
        with torch.no_grad():
            ours, theirs = (m(tokens, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (model, original))
        expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
        assert kl[name] == pytest.approx(expected, rel=1e-2), name


def test_the_shipped_recipes_run_from_the_command_line(tmp_path):
    for recipe, dtype in (("w8a8-int8", torch.int8), ("w8a8-fp8", torch.float8_e4m3fn)):
        output = tmp_path / recipe
        command = [sys.executable, "-m", "hfcompress.cli", "run", recipe, "--output", str(output), "--no-eval"]
        done = subprocess.run([*command, "--samples", "8"], capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "28 of 29 linears compressed" in done.stdout
        tensors = load_file(output / "model.safetensors")
        assert sum(tensor.dtype == dtype for tensor in tensors.values()) == 28
        manifest = json.loads((output / "hfcompress.json").read_text())
        assert (manifest["calibration"] is None) == (recipe == "w8a8-fp8")
        card = (output / "README.md").read_text()
        assert "w8a8" in card
        assert "inputs rounded to 8 bits by a scale per token" in card
        assert ("E4M3" in card) == ("- fp8" in card) == (recipe == "w8a8-fp8")
        assert "vllm serve" in card


def test_the_card_tells_of_the_cache(folders):
    for name, codes, served in (("int cache", "integers", False), ("fp8 cache", "E4M3", True)):
        card = (folders[name] / "README.md").read_text()
        assert f"keys and values: 8 bits ({codes}), one scale each per attention" in card
        assert ("vllm serve" in card) == served  # vLLM keeps caches in E4M3 alone
