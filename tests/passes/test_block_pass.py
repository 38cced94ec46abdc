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
"""The pass against its own slow definition, and its two ways of walking against each other."""

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from safetensors.torch import load_file

import hfcompress as hfc
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import find_linears, get_weight, set_weight, watch_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.statistics import Statistics
from hfcompress.solvers.gptq import factorize, gptq
from hfcompress.solvers.grid import Grid


@torch.no_grad()
def one_linear_at_a_time(model, ids: torch.Tensor, groups: list[list[str]]) -> dict[str, torch.Tensor]:
    """Codes by running the whole model from the beginning for every group of linears: obvious and slow."""
    codes = {}
    linears = find_linears(model, "")
    linears = {name.removeprefix("."): module for name, module in linears.items()}
    for group in groups:
        inputs = []
        with watch_inputs({"": linears[group[0]]}, lambda _, x, inputs=inputs: inputs.append(x)):
            model(input_ids=ids)
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        factor = factorize(x.T @ x / len(x))
        for name in group:
            quantized = gptq(get_weight(linears[name]), factor, Grid(4, 32), torch.float32)
            set_weight(linears[name], quantized.dequantize())
            codes[name] = quantized.codes
    return codes


def test_the_pass_gives_what_running_the_whole_model_for_each_group_gives(llama, tmp_path):
    ids = token_ids(20, 32)
    hfc.compress(
        llama,
        hfc.Job(steps=(hfc.GPTQ(group_size=32),), format="int-quantized"),
        tmp_path / "out",
        calibration=ids,
        evaluate=False,
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    parts = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    parts += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    groups = [[f"model.layers.{i}.{name}" for name in part] for i in range(3) for part in parts]
    expected = one_linear_at_a_time(llama, torch.from_numpy(ids), groups)
    same = [(found[f"{name}.weight"] == codes).float().mean().item() for name, codes in expected.items()]
    assert len(same) == 21
    assert min(same) > 0.995  # the sums are formed in another order
    assert np.mean(same) > 0.999


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize(
    "recipe", [hfc.GPTQ(group_size=32), hfc.GPTQ(group_size=32, bits=2, shift=1.0)], ids=["", "shift"]
)
def test_every_way_to_run_it_gives_the_same_bytes(tmp_path, name, recipe, run_in):
    """Forwards halted, or run again; hidden states in memory, or on disk."""
    model = make_model(CONFIGS[name](), torch.bfloat16)
    found = []
    for number, (suspended, spilled) in enumerate([(True, False), (False, False), (False, True)]):
        run_in(suspended, spilled, rows=8)
        output = tmp_path / str(number)
        hfc.compress(model, recipe, output, calibration=token_ids(20, 32), evaluate=False)
        found.append((output / "model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("suspended", [True, False])
def test_the_dense_stream_beside_gives_the_cross_term(llama, tmp_path, monkeypatch, run_in, suspended):
    """`(X_dense - X)^T X` of every group equals what two whole models give."""
    gathered = []
    complete = Statistics.complete

    def noted(self, processes, name):
        complete(self, processes, name)
        gathered.append((name, self.cross))

    monkeypatch.setattr(Statistics, "complete", noted)
    monkeypatch.setattr(hfc.GPTQ, "needs_dense_stream", True)
    ids = token_ids(6, 32)
    recipe = hfc.Job(steps=(hfc.GPTQ(group_size=32, bits=2),), format="int-quantized")
    run_in(suspended)
    hfc.compress(llama, recipe, tmp_path / "out", calibration=ids, evaluate=False)
    assert len(gathered) == 12
    manifest_codes = load_file(tmp_path / "out" / "model.safetensors")
    dense_inputs = inputs_of(llama, torch.from_numpy(ids), [name for name, _ in gathered])
    assert torch.count_nonzero(gathered[0][1]) == 0  # nothing is compressed before the first group
    linears = find_linears(llama.model, "model")
    for index, (name, cross) in enumerate(gathered):  # with the groups before it compressed, but not itself
        x = inputs_of(llama, torch.from_numpy(ids), [name])[name]
        expected = (dense_inputs[name] - x).T @ x / len(x)
        torch.testing.assert_close(cross, expected, rtol=1e-3, atol=1e-4)
        last = gathered[index + 1][0] if index + 1 < len(gathered) else None
        names = list(linears)
        stop = names.index(last) if last else len(names)
        for done in names[names.index(name) : stop]:
            scales = manifest_codes[f"{done}.weight_scale"].repeat_interleave(32, 1)
            set_weight(linears[done], manifest_codes[f"{done}.weight"].float() * scales)


@torch.no_grad()
def inputs_of(model, ids: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    seen = {}
    linears = {name: module for name, module in find_linears(model.model, "model").items() if name in names}
    with watch_inputs(linears, lambda name, x: seen.__setitem__(name, x.reshape(-1, x.shape[-1]).clone())):
        model(input_ids=ids)
    return seen


def test_no_dense_stream_is_carried_when_nothing_asks_for_it(llama, tmp_path, monkeypatch):
    crosses = []
    complete = Statistics.complete
    monkeypatch.setattr(
        Statistics, "complete", lambda self, *rest: (crosses.append(self.cross), complete(self, *rest))[1]
    )
    hfc.compress(llama, hfc.GPTQ(group_size=32), tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)
    assert crosses
    assert all(cross is None for cross in crosses)


def test_no_block_stays_in_memory(saved_llama):
    streamed = StreamedModel(Checkpoint.open(saved_llama))
    streams = streamed.embed([Batch(torch.from_numpy(token_ids(1, 8)))])
    for index in range(len(streamed)):
        with streamed.block(index):
            loaded = [n for n, p in streamed.skeleton.named_parameters() if p.device.type != "meta"]
            assert loaded
            assert all(name.startswith(f"{streamed.block_names[index]}.") for name in loaded)
    assert streams[0].hidden.shape == (1, 8, 64)
    assert all(p.device.type == "meta" for p in streamed.skeleton.parameters())


def test_an_indivisible_group_is_an_error_that_names_layers_and_option(llama, tmp_path):
    with pytest.raises(hfc.HfcompressError, match=r"64 does not divide the width 96 of 3 .*down_proj.*on_indivisible"):
        hfc.compress(llama, hfc.GPTQ(group_size=64), tmp_path / "out", calibration=token_ids(4, 32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("choice", "linears", "fallbacks"), [("channel", 21, 3), ("skip", 18, 0)])
def test_on_indivisible(llama, tmp_path, choice, linears, fallbacks):
    recipe = hfc.GPTQ(group_size=64, on_indivisible=choice)
    manifest = hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False).manifest
    assert len(manifest["linears"]) == linears
    assert manifest["fallbacks"] == fallbacks
    assert len(manifest["skipped"]) == 21 - linears
    for row in manifest["linears"]:
        assert row["group_size"] == (-1 if "down_proj" in row["name"] else 64)


def test_what_was_not_supported_is_refused_before_any_work(tmp_path):
    from transformers import JetMoeConfig

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    jetmoe = make_model(JetMoeConfig(**small, num_key_value_heads=2, kv_channels=16, num_local_experts=2))
    with pytest.raises(hfc.HfcompressError, match="has 2 experts per block"):
        hfc.compress(jetmoe, hfc.RTN(group_size=32), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_tied_head_is_refused(tmp_path):
    with pytest.raises(hfc.HfcompressError, match="shares its weight with the embeddings"):
        hfc.compress(None, hfc.RTN(targets=("Linear", "lm_head")), tmp_path / "out")


def test_a_model_in_memory_is_left_as_it_was(llama, tmp_path):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    hfc.compress(llama, hfc.GPTQ(group_size=32), tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
