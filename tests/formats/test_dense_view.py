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
"""Quantized checkpoints as the model to compress: what they stand for, unpacked block by block."""

import json

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from safetensors.torch import load_file, save_file

import hfcompress as hfc
from hfcompress.errors import CheckpointError, UnsupportedModelError
from hfcompress.formats.dense_view import dense_view
from hfcompress.models.checkpoint import Checkpoint


IDS = torch.arange(1, 25)[None]
FORMATS = ("compressed-tensors", "gptq", "awq", "hfcompress")


@torch.no_grad()
def logits(folder):
    return hfc.load(folder, packed=False, device="cpu", dtype="float32")(input_ids=IDS).logits


def quantized(tmp_path, name: str, made_from=None):
    recipe = hfc.Entropy(bits=4.0, shift=0.0) if name == "hfcompress" else hfc.RTN(bits=4, group_size=32)
    model = make_model(CONFIGS["llama"](), torch.bfloat16) if made_from is None else made_from
    job = hfc.Job(steps=(recipe,), format=name)
    return hfc.compress(model, job, tmp_path / name, calibration=token_ids(8, 32), evaluate=False).output_dir


@pytest.mark.parametrize("name", FORMATS)
def test_what_it_stands_for_is_what_is_compressed(name, tmp_path):
    base = quantized(tmp_path, name)
    fine = hfc.Job(steps=(hfc.RTN(bits=8, group_size=32),), format="compressed-tensors")
    made = hfc.compress(base, fine, tmp_path / "out", calibration=token_ids(8, 32), eval_data=token_ids(4, 32))
    assert made.report["kl_mean"] < 1e-3
    assert made.report["baseline_size_bytes"] == Checkpoint.open(base).size_bytes
    torch.testing.assert_close(logits(made.output_dir), logits(base), rtol=0, atol=0.05)
    again = hfc.evaluate(
        made.output_dir, data=token_ids(4, 32)
    )  # against its base, found by itself and known by its digest
    assert again["kl_mean"] == pytest.approx(made.report["kl_mean"], rel=1e-3)


def test_the_same_grid_finds_the_same_values(tmp_path):
    """A weight on a grid of four bits lies on one of eight with the same groups, to within a step of that."""
    base = quantized(tmp_path, "compressed-tensors")
    view = dense_view(Checkpoint.open(base))
    assert view.quantization_config is None
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = view.tensors[name]
    assert (weight.dtype, weight.shape, weight.nbytes) == (torch.bfloat16, (64, 64), 2 * 64 * 64)
    assert torch.equal(weight[:3], weight.read()[:3])
    assert view.sha256 == Checkpoint.open(base).sha256
    dense = Checkpoint.open(base)
    assert dense_view(dense_view(dense)).packed is not None


def test_a_trained_one_is_compressed_further(tiny_w4, tmp_path):
    made = hfc.compress(tiny_w4.output_dir, "entropy-2.5bit", tmp_path / "out")
    assert made.report["kl_mean"] < 0.1
    assert made.report["size_bytes"] < 0.8 * made.report["baseline_size_bytes"]


def as_fp8(folder, block):
    """The linears of a checkpoint as E4M3 with a scale for a block, or for the whole; and what they stand for."""
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name].float()
        rows, columns = block or weight.shape
        scales = torch.stack(
            [torch.stack([part.abs().max() / 448 for part in strip.split(columns, 1)]) for strip in weight.split(rows)]
        )
        spread = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        dense[name] = tensors[name].float() * spread
        tensors[f"{name}_scale_inv"] = scales if block else scales[0, 0]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize("block", [[32, 48], None])
def test_fp8_weights_are_read_with_their_scales(block, tmp_path):
    model = make_model(CONFIGS["llama"](), torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    values = as_fp8(tmp_path / "base", block)
    view = dense_view(Checkpoint.open(tmp_path / "base"))
    for name, wanted in values.items():
        assert torch.equal(view.tensors[name].read(), wanted)
    model = model.float()
    model.load_state_dict(values, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "base"), model(input_ids=IDS).logits, rtol=0, atol=1e-5)
    fine = hfc.Job(steps=(hfc.RTN(bits=8, group_size=32),), format="compressed-tensors")
    made = hfc.compress(tmp_path / "base", fine, tmp_path / "out", eval_data=token_ids(4, 32))
    assert made.report["kl_mean"] < 1e-3


def test_damaged_scales_are_told(tmp_path):
    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(tmp_path / "base")
    as_fp8(tmp_path / "base", [32, 32])
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for change, said in ((lambda t: t[:1], "has .* blocks; download or copy"), (lambda t: t * 1e38 * 1e5, "NaN")):
        altered = {**tensors, f"{name}_scale_inv": change(tensors[f"{name}_scale_inv"]).clone()}
        save_file(altered, tmp_path / "base" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            dense_view(Checkpoint.open(tmp_path / "base")).tensors[name].read()


def test_what_rounds_its_inputs_is_refused(tmp_path):
    model = make_model(CONFIGS["llama"](), torch.bfloat16)
    base = hfc.compress(
        model, hfc.RTN(bits=8, group_size=-1, activations="dynamic"), tmp_path / "w8a8", evaluate=False
    ).output_dir
    with pytest.raises(UnsupportedModelError, match=r"already quantized .* and rounds what its linears read"):
        hfc.compress(base, hfc.RTN(), tmp_path / "out", evaluate=False)
    assert not (tmp_path / "out").exists()


def test_another_method_is_refused(tmp_path):
    checkpoint = Checkpoint.open(quantized(tmp_path, "gptq"))
    checkpoint.config.quantization_config = {"quant_method": "aqlm"}
    with pytest.raises(
        UnsupportedModelError, match=r"already quantized \(aqlm\), and not in a format that can be unpacked"
    ):
        dense_view(checkpoint)
