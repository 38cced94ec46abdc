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

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, StopAfter, digest, make_model, token_ids
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import hfcompress as hfc
from hfcompress.cli import USER_ERROR, _guarded, app
from hfcompress.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.formats.reading import decoded
from hfcompress.formats.sparse24 import join, split
from hfcompress.models.checkpoint import Checkpoint


def sparse_weight(seed, rows, columns, dtype=torch.bfloat16):
    """Zeros in every way that 2:4 allows, groups with fewer than two values among them."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, columns // 4, 4, generator=generator)
    kept = torch.rand(groups.shape, generator=generator).topk(2, -1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
    mask &= torch.rand(groups.shape, generator=generator) < 0.8
    return (groups * mask + 0.0).view(rows, columns).to(dtype)


@given(st.integers(0, 9999), st.integers(1, 5), st.integers(1, 6), st.sampled_from([torch.bfloat16, torch.float32]))
def test_what_is_split_is_joined_bit_for_bit(seed, rows, bytes_, dtype):
    weight = sparse_weight(seed, rows, 8 * bytes_, dtype)
    kept, index = split(weight)
    assert (kept.shape, index.shape) == ((rows, 4 * bytes_), (rows, bytes_))
    assert torch.equal(join(kept, index), weight)
    places = torch.stack([index & 3, index >> 2 & 3, index >> 4 & 3, index >> 6], -1).view(rows, -1, 2)
    assert (places[..., 0] < places[..., 1]).all()


def test_more_than_two_of_four_are_refused():
    with pytest.raises(InvalidValueError, match="is not 2:4"):
        split(torch.tensor([[1.0, 0, 2, 3, 0, 0, 0, 0]]))


MAGNITUDE = hfc.Sparsify("2:4", method="magnitude", refit=False)
RECIPES = {
    "plain": MAGNITUDE,
    "int4": MAGNITUDE >> hfc.RTN(group_size=32),
    "int8": MAGNITUDE >> hfc.RTN(bits=8, group_size=-1),
}
LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.arange(24)[None]).logits
print(json.dumps(logits.flatten().tolist()))
"""


def run(code, folder):
    """In a process of its own that says what transformers says to a user."""
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"},
    )


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_reads_it_with_the_plugin_and_refuses_it_without(name, tmp_path):
    base = make_model(CONFIGS["llama"]()).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    options = {"evaluate": False}
    recipe = RECIPES[name]
    steps = hfc.Job.of(recipe).steps
    plain = hfc.compress(str(tmp_path / "base"), recipe, tmp_path / "plain", **options).output_dir
    packed = hfc.compress(
        str(tmp_path / "base"), hfc.Job(steps=steps, format="sparse24"), tmp_path / "packed", **options
    )
    done = run("import hfcompress.integrations.transformers\n" + LOGITS, packed.output_dir)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = run(LOGITS, plain)
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(expected.stdout.splitlines()[-1])
    refused = run(LOGITS, packed.output_dir)
    assert refused.returncode != 0
    assert "hfcompress-sparse24" in refused.stderr  # which transformers does not know
    assert "RuntimeError" in refused.stderr
    assert "mismatch" in refused.stderr
    # a bf16 weight takes 9/16, 4 bits with their index 3, without the scales
    stored = load_file(packed.output_dir / "model.safetensors")
    weight = (
        stored["model.layers.0.mlp.up_proj.weight"].nbytes + stored["model.layers.0.mlp.up_proj.weight_index"].nbytes
    )
    bits = {"plain": 9, "int4": 3, "int8": 5}[name]
    assert weight * 8 == bits * 96 * 64


@pytest.mark.parametrize("name", RECIPES)
def test_there_and_back_is_the_same_bit_for_bit(name, tmp_path):
    ids = np.load(hfc.models.tiny.tiny_folder() / "calibration.npy")[:4]
    source = hfc.compress(None, RECIPES[name], tmp_path / "source", calibration=torch.as_tensor(ids).long())
    packed = hfc.export(tmp_path / "source", "sparse24", tmp_path / "packed")
    assert packed.made["lossless"]
    assert Checkpoint.open(tmp_path / "packed").size_bytes < Checkpoint.open(tmp_path / "source").size_bytes
    hfc.export(tmp_path / "packed", "dense", tmp_path / "dense", lossy=name != "plain")
    if name == "plain":
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "dense"))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key].view(torch.uint8), value.view(torch.uint8)) for key, value in before.items())
    else:
        for folder in ("source", "packed"):
            made = Checkpoint.open(tmp_path / folder)
            view = decoded(made.tensors, made.quantization_config)
            if folder == "source":
                first = {key: view[key].read() for key in view}
            else:
                assert all(torch.equal(first[key].float(), view[key].read().float()) for key in first)
        hfc.export(tmp_path / "packed", "compressed-tensors", tmp_path / "again")
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "again"))
        assert all(torch.equal(after[key], value) for key, value in before.items())
    report = json.loads((tmp_path / "packed" / "eval_results.json").read_text())
    assert report["kl_mean"] == source.report["kl_mean"]
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "import hfcompress.integrations.transformers" in card
    assert "vllm serve" not in card
    assert "stored like any other" not in card
    manifest = json.loads((tmp_path / "packed" / "hfcompress.json").read_text())
    assert all(row["pattern"] == "2:4" for row in manifest["linears"])


def test_a_run_into_it_is_measured_as_loaded(tmp_path):
    ids = np.load(hfc.models.tiny.tiny_folder() / "calibration.npy")[:4]
    options = {"calibration": torch.as_tensor(ids).long(), "eval_data": torch.as_tensor(ids).long()}
    plain = hfc.compress(None, MAGNITUDE, tmp_path / "plain", **options)
    packed = hfc.compress(None, hfc.Job(steps=(MAGNITUDE,), format="sparse24"), tmp_path / "packed", **options)
    assert packed.report["kl_mean"] == pytest.approx(plain.report["kl_mean"], rel=1e-6)
    assert packed.report["size_bytes"] < plain.report["size_bytes"]


def test_a_run_goes_on_and_ends_with_the_same_bytes(saved_llama, tmp_path):
    """Shifted towards the dense model, which the blocks that are done are gone through again for."""
    job = hfc.Job(steps=(hfc.Sparsify("2:4", shift=1.0),), format="sparse24")
    options = {"evaluate": False, "calibration": torch.from_numpy(token_ids(8, 32)).long()}
    hfc.compress(str(saved_llama), job, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(str(saved_llama), job, tmp_path / "out", progress=StopAfter(2), **options)
    hfc.compress(str(saved_llama), job, tmp_path / "out", resume=True, **options)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["w4a16-fast"], "sparse24 holds 2:4 weights alone, and model.layers.0.self_attn.q_proj is to be dense"),
        (["sparse24", "--set", "sparsify.pattern=4:8"], "sparse24 holds 2:4 weights alone, and"),
        (["sparse24-w4a16", "--set", "gptq.symmetric=false"], "sparse24 is not for int codes with zero points"),
    ],
)
def test_what_it_cannot_hold_is_told(options, said, tmp_path, capsys):
    command = ["run", *options, "--set", "format=sparse24", "--output", str(tmp_path / "out")]
    assert _guarded(app, command) == USER_ERROR
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_sparse_is_not_exported(saved_llama, tmp_path):
    with pytest.raises(InvalidValueError, match=r"holds no weight that is 2:4 sparse; make such a checkpoint with"):
        hfc.export(saved_llama, "sparse24", tmp_path / "out")
    hfc.compress(str(saved_llama), hfc.RTN(group_size=32), tmp_path / "w4", evaluate=False)
    with pytest.raises(InvalidValueError, match="down_proj is not 2:4 sparse, and sparse24 holds nothing else"):
        hfc.export(tmp_path / "w4", "sparse24", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_weights_have_no_codes_for_others(saved_llama, tmp_path):
    job = hfc.Job(steps=(MAGNITUDE,), format="sparse24")
    hfc.compress(str(saved_llama), job, tmp_path / "packed", evaluate=False)
    with pytest.raises(InvalidValueError, match="holds plain weights, which have no codes for compressed-tensors"):
        hfc.export(tmp_path / "packed", "compressed-tensors", tmp_path / "out")


def test_a_later_version_and_a_damaged_configuration_are_told(saved_llama, tmp_path):
    hfc.compress(str(saved_llama), hfc.Job(steps=(MAGNITUDE,), format="sparse24"), tmp_path / "packed", evaluate=False)
    made = Checkpoint.open(tmp_path / "packed")
    with pytest.raises(UnsupportedModelError, match=r"is in version 2 of the layout sparse24.*update hfcompress"):
        decoded(made.tensors, {**made.quantization_config, "version": 2})
    with pytest.raises(CheckpointError, match=r"does not say how model.layers.0.* is stored"):
        decoded(made.tensors, {**made.quantization_config, "groups": []})
    with pytest.raises(CheckpointError, match="does not hold what its quantization_config promises"):
        decoded(made.tensors, {"quant_method": "hfcompress-sparse24", "version": 1})


def test_a_conv1d_and_an_odd_width_are_refused(tmp_path):
    model = make_model(CONFIGS["gpt2"]())
    with pytest.raises(InvalidValueError, match=r"sparse24 cannot hold .* it is a Conv1D"):
        hfc.compress(
            model, hfc.Job(steps=(MAGNITUDE,), format="sparse24"), tmp_path / "out", calibration=token_ids(4, 32)
        )
