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
"""Laws 1 to 4 where activations are rounded: what is calibrated is what runs, and what is saved is what was solved."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, StopAfter, digest, in_fresh_process, make_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import hfcompress as hfc
from hfcompress.errors import UnsupportedModelError
from hfcompress.evaluation.logits import open_streamed
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import find_linears, watch_inputs
from hfcompress.passes.statistics import Statistics


ROOT = Path(__file__).parents[2]
EIGHT = {"bits": 8, "group_size": -1}
IDS = token_ids(2, 16, seed=1)
CALIBRATION = token_ids(8, 32)
RECIPES = {
    "int-dynamic": hfc.RTN(**EIGHT, activations="dynamic"),
    "int-static": hfc.RTN(**EIGHT, activations="static", observer="minmax"),
    "int-static-percentile": hfc.GPTQ(**EIGHT, activations="static", observer="percentile"),
    "int-static-mse": hfc.GPTQ(**EIGHT, activations="static"),
    "float": hfc.RTN(**EIGHT, type="float"),
    "float-dynamic": hfc.GPTQ(**EIGHT, type="float", activations="dynamic"),
    "float-static": hfc.GPTQ(**EIGHT, type="float", activations="static", observer="minmax"),
    "packed-kv-float": hfc.GPTQ(group_size=32) >> hfc.KVCache(),
    "int-static-kv-int": hfc.GPTQ(**EIGHT, activations="static", observer="minmax")
    >> hfc.KVCache(type="int", observer="minmax"),
    "float-dynamic-kv-float": hfc.RTN(**EIGHT, type="float", activations="dynamic") >> hfc.KVCache(),
    "mixed": hfc.GPTQ(
        group_size=32,
        targets=("Linear", "lm_head"),
        ignore=("k_proj",),
        overrides={
            "o_proj": {**EIGHT, "activations": "dynamic"},
            "v_proj": {**EIGHT, "type": "float", "activations": "static"},
            "re:.*layers.1.mlp.*": {**EIGHT, "activations": "static", "observer": "percentile"},
            "lm_head": {**EIGHT, "activations": "static"},
        },
    ),
}
MODELS = {
    **{name: ("llama", recipe) for name, recipe in RECIPES.items()},
    **{f"{name}-int-static-kv": (name, RECIPES["int-static-kv-int"]) for name in ("qwen3-mixed", "gemma3", "phi3")},
}
LOGITS = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.from_numpy(np.load(sys.argv[2]))
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=cache).logits.numpy() for cache in (True, False)]
    assert (logits[0] == logits[1]).all()
    np.save(folder + "/logits.npy", logits[0])
print(json.dumps([name for name in sys.modules if name.startswith("hfcompress.")]))
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Every case compressed, and the logits that plain transformers gets from it in a process of its own."""
    parent = tmp_path_factory.mktemp("activations")
    np.save(parent / "ids.npy", IDS)
    folders = {}
    for case, (name, recipe) in MODELS.items():
        model = make_model(CONFIGS[name](), torch.bfloat16)
        folders[case] = hfc.compress(model, recipe, parent / case, calibration=CALIBRATION, evaluate=False).output_dir
    code, paths = LOGITS, json.dumps([str(folder) for folder in folders.values()])
    assert in_fresh_process(code, paths, str(parent / "ids.npy"), forbid="hfcompress") == []
    return folders


every_case = pytest.mark.parametrize("case", MODELS)


# what is saved is what was solved


def rounded(values: torch.Tensor, scheme: dict, scale: torch.Tensor | None) -> torch.Tensor:
    """Round to 8 bits as the scheme says, written out."""
    if scheme["dynamic"]:
        scale = values.abs().amax(-1, keepdim=True) / (127.5 if scheme["type"] == "int" else 448.0)
    scaled = values / scale
    if scheme["type"] == "int":
        return scaled.round().clamp(-128, 127) * scale
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class RoundingCache(DynamicCache):
    """A cache that rounds what it is given."""

    def __init__(self, scheme: dict, scales: dict[int, tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        self.scheme, self.scales = scheme, scales

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        key_scale, value_scale = self.scales[layer_idx]
        keys, values = rounded(key_states, self.scheme, key_scale), rounded(value_states, self.scheme, value_scale)
        return super().update(keys, values, layer_idx, *args, **kwargs)


@torch.no_grad()
def reference_logits(folder: Path, name: str, ids: np.ndarray) -> torch.Tensor:
    """
    The dense model with every compressed weight written out, its linears' inputs rounded by hooks and its keys and
    values by a cache: nothing of compressed-tensors runs.
    """
    stored = {k: v.float() for k, v in load_file(folder / "model.safetensors").items() if "packed" not in k}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    packed = load_file(folder / "model.safetensors")
    model = make_model(CONFIGS[name](), torch.bfloat16).float()
    groups = config["config_groups"].values()
    for stem, module in find_linears(model, "").items():
        stem = stem.removeprefix(".")
        if f"{stem}.weight_scale" not in stored:
            continue
        group = next(g for g in groups if g["targets"] == ["Linear"] or stem in g["targets"])
        if f"{stem}.weight_packed" in packed:
            words, (rows, columns) = packed[f"{stem}.weight_packed"], packed[f"{stem}.weight_shape"].tolist()
            nibbles = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1)
            codes = nibbles.view(rows, -1)[:, :columns].float() - 8
        else:
            codes = stored[f"{stem}.weight"]
        scales = stored[f"{stem}.weight_scale"]
        module.weight.data = codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        if (scheme := group["input_activations"]) is not None:
            scale = stored.get(f"{stem}.input_scale")
            module.register_forward_pre_hook(lambda _, args, s=scheme, c=scale: (rounded(args[0], s, c),))
    cache = None
    if config.get("kv_cache_scheme"):
        ends = [(k, k.replace("k_scale", "v_scale")) for k in stored if k.endswith(".k_scale")]
        scales = {int(k.split("layers.")[1].split(".")[0]): (stored[k], stored[v]) for k, v in ends}
        cache = RoundingCache(config["kv_cache_scheme"], scales)
    return model(input_ids=torch.from_numpy(ids), past_key_values=cache, use_cache=cache is not None).logits


@every_case
def test_plain_transformers_rounds_as_written_out(compressed, case):
    logits = torch.from_numpy(np.load(compressed[case] / "logits.npy"))
    expected = reference_logits(compressed[case], MODELS[case][0], IDS)
    off = (logits - expected).abs()
    # a value at a tie may fall to the other side where sums are formed in another order
    assert off.median() < 2e-5
    assert off.mean() < 2e-3 * expected.std()


@every_case
@torch.no_grad()
def test_the_streamed_evaluation_sees_what_plain_transformers_computes(compressed, case):
    streamed = open_streamed(Checkpoint.open(compressed[case]), "cpu", torch.float32)
    [stream] = streamed.forward_blocks(streamed.embed([Batch(torch.from_numpy(IDS))]))
    with streamed.outside(head=True) as outside:
        found = streamed.logits(outside, stream)
    expected = torch.from_numpy(np.load(compressed[case] / "logits.npy"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@every_case
@torch.no_grad()
def test_the_run_itself_ended_on_what_plain_transformers_computes(compressed, case):
    witness = json.loads((compressed[case] / "hfcompress.json").read_text())["witness"]
    model = AutoModelForCausalLM.from_pretrained(compressed[case], dtype=torch.float32)
    said = torch.log_softmax(model(torch.tensor([witness["input_ids"]])).logits[0], -1)
    found = said.gather(-1, torch.tensor(witness["top_ids"]))
    assert (found - torch.tensor(witness["top_log_probs"])).abs().median() < 2e-5


def test_rounded_activations_are_what_makes_the_difference(compressed):
    """So that the tests above can fail: without the rounding the logits are far from these."""
    for case in ("int-dynamic", "float-dynamic", "packed-kv-float"):
        model = AutoModelForCausalLM.from_pretrained(compressed[case], dtype=torch.float32)
        for module in model.modules():
            module.quantization_enabled = False
        with torch.no_grad():
            logits = model(torch.from_numpy(IDS)).logits
        assert (logits - torch.from_numpy(np.load(compressed[case] / "logits.npy"))).abs().median() > 1e-3


def test_each_linear_is_in_the_layout_that_suits_it(compressed):
    tensors = load_file(compressed["mixed"] / "model.safetensors")
    config = json.loads((compressed["mixed"] / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {
        "pack-quantized",
        "int-quantized",
        "float-quantized",
    }
    block = "model.layers.0"
    assert f"{block}.self_attn.q_proj.weight_packed" in tensors
    assert tensors[f"{block}.self_attn.o_proj.weight"].dtype == torch.int8
    assert f"{block}.self_attn.o_proj.input_scale" not in tensors
    assert tensors[f"{block}.self_attn.v_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{block}.self_attn.v_proj.input_scale"].shape == (1,)
    assert tensors[f"{block}.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert tensors["lm_head.input_scale"].dtype == torch.bfloat16


# what is calibrated is what runs


@pytest.mark.parametrize(("case", "codes"), [("int-static-kv-int", 127.5), ("float-static", 448.0)])
@torch.no_grad()
def test_every_stored_scale_is_of_the_range_that_the_compressed_model_really_meets(compressed, case, codes):
    model = AutoModelForCausalLM.from_pretrained(compressed[case], dtype=torch.float32)
    stored = load_file(compressed[case] / "model.safetensors")
    largest = {}
    watched = {n.removeprefix("."): m for n, m in find_linears(model, "").items() if "lm_head" not in n}
    watched |= {n: m for n, m in model.named_modules() if n.endswith("kv_cache")}
    with watch_inputs(watched, lambda name, inputs: largest.__setitem__(name, inputs)):
        model(torch.from_numpy(CALIBRATION))
    names = [name for name in stored if name.endswith(("input_scale", "k_scale", "v_scale"))]
    assert len(names) == (21 + 6 if "kv" in case else 21)
    for name in names:
        stem, _, local = name.rpartition(".")
        inputs = largest[stem] if local == "input_scale" else largest[f"{stem}.kv_cache"][local == "v_scale"]
        assert stored[name].item() == pytest.approx(inputs.abs().max().item() / codes, rel=2**-8), name


@torch.no_grad()
def test_the_gram_matrix_is_of_the_rounded_inputs(llama, tmp_path, monkeypatch):
    grams = {}
    complete = Statistics.complete

    def noted(self, processes, name):
        complete(self, processes, name)
        grams[name] = self.gram

    monkeypatch.setattr(Statistics, "complete", noted)
    recipe = hfc.GPTQ(**EIGHT, activations="dynamic", overrides={"v_proj": {"activations": "none"}})
    hfc.compress(llama, recipe, tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    assert len(grams) == 15  # v_proj reads what q_proj and k_proj read, but not rounded
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    inputs = {}
    watched = {n.removeprefix("."): m for n, m in find_linears(model, "").items()}
    with watch_inputs(watched, inputs.__setitem__):
        model(torch.from_numpy(CALIBRATION))
    for name, gram in grams.items():
        x = inputs[name]
        if not name.endswith("v_proj"):
            scale = x.abs().amax(-1, keepdim=True) / 127.5
            x = (x / scale).round().clamp(-128, 127) * scale
        x = x.flatten(0, 1)
        torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_dense_stream_beside_is_not_rounded(llama, tmp_path, monkeypatch):
    crosses = []
    complete = Statistics.complete
    monkeypatch.setattr(
        Statistics, "complete", lambda self, *rest: (complete(self, *rest), crosses.append((rest[1], self.cross)))[0]
    )
    monkeypatch.setattr(hfc.GPTQ, "needs_dense_stream", True)
    recipe = hfc.GPTQ(**EIGHT, activations="dynamic") >> hfc.KVCache(type="int")
    hfc.compress(llama, recipe, tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours, dense = {}, {}
    for each, seen in ((model, ours), (llama, dense)):
        watched = {n.removeprefix("."): m for n, m in find_linears(each, "").items()}
        with watch_inputs(watched, seen.__setitem__):
            each(torch.from_numpy(CALIBRATION))
    for name, cross in crosses:
        x = ours[name]
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        x = ((x / scale).round().clamp(-128, 127) * scale).flatten(0, 1)
        expected = (dense[name].flatten(0, 1) - x).T @ x / len(x)
        torch.testing.assert_close(cross, expected, rtol=2e-3, atol=5e-4)


def test_padding_enters_no_range(llama, tmp_path):
    ids = token_ids(4, 32)
    mask = np.ones_like(ids)
    mask[1, :9] = mask[3, :20] = 0
    other = np.where(mask, ids, (ids + 1) % 128)
    recipe = hfc.RTN(**EIGHT, activations="static") >> hfc.KVCache(type="int")
    for name, given in (("one", ids), ("two", other)):
        data = {"input_ids": given, "attention_mask": mask}
        hfc.compress(llama, recipe, tmp_path / name, calibration=data, evaluate=False)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        if name.endswith("_scale"):
            torch.testing.assert_close(tensor, two[name], rtol=1e-6, atol=0)


# the same however it is run


def test_suspended_and_recomputed_forwards_give_the_same_bytes(llama, tmp_path, run_in):
    options = {"calibration": CALIBRATION, "evaluate": False}
    recipe = RECIPES["int-static-kv-int"]
    hfc.compress(llama, recipe, tmp_path / "suspended", **options)
    run_in(suspended=False)
    hfc.compress(llama, recipe, tmp_path / "recomputed", **options)
    assert digest(tmp_path / "suspended") == digest(tmp_path / "recomputed")


@pytest.mark.parametrize("case", ["int-static-kv-int", "mixed"])
def test_a_run_that_was_stopped_goes_on_with_the_scales_that_it_wrote(llama, tmp_path, case):
    options = {"calibration": CALIBRATION, "evaluate": False}
    whole = hfc.compress(llama, RECIPES[case], tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(llama, RECIPES[case], tmp_path / "out", progress=StopAfter(2), **options)
    result = hfc.compress(llama, RECIPES[case], tmp_path / "out", resume=True, **options)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert result.manifest["witness"] == whole.manifest["witness"]


def test_two_processes_find_the_scales_of_one(saved_llama, tmp_path):
    np.save(tmp_path / "calibration.npy", token_ids(9, 32))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "recipe: [rtn: {bits: 8, group_size: -1, activations: static, observer: percentile}, kv_cache: {}]"
    )
    options = ["--model", str(saved_llama), "--calibration", str(tmp_path / "calibration.npy"), "--no-eval"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "-m", "hfcompress.cli", "run", str(recipe), *options, "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hfc.compress(
        str(saved_llama), str(recipe), tmp_path / "one", calibration=tmp_path / "calibration.npy", evaluate=False
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith("_scale"):
            torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_a_cache_that_compressed_tensors_cannot_round_is_refused(tmp_path, name):
    recipe = hfc.Job.of(hfc.RTN(**EIGHT) >> hfc.KVCache())
    layout = "compressed-tensors" if name == "opt" else "dense"
    with pytest.raises(
        UnsupportedModelError, match=r"no attention whose key-value cache.*leave out the step kv_cache"
    ):
        hfc.compress(make_model(CONFIGS[name]()), dataclasses.replace(recipe, format=layout), tmp_path / "out")


def test_rounding_per_token_needs_no_data(llama, tmp_path):
    recipe = hfc.RTN(**EIGHT, activations="dynamic")
    result = hfc.compress(llama, recipe, tmp_path / "out", calibration="nowhere.txt", evaluate=False)
    assert result.manifest["calibration"] is None
