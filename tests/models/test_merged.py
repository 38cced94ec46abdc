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
"""A PEFT adapter's repo given as the model: what PEFT's own merge makes of it, compressed like any other."""

import json
import shutil

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.errors import CheckpointError, UnsupportedModelError
from hfcompress.models import merged as module
from hfcompress.models.checkpoint import Checkpoint


IDS = torch.arange(1, 25)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MERGED", tmp_path / "cache" / "merged")
    return tmp_path / "cache" / "merged"


def adapter(tmp_path, name: str = "llama", targets=("q_proj", "down_proj"), **settings):
    """A model and an adapter of it, on disk; and the model that PEFT makes of both."""
    peft = pytest.importorskip("peft")
    base = make_model(CONFIGS[name](), torch.float32)
    base.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.merge_and_unload()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn",)), ("qwen2", ("o_proj", "up_proj"))]
)
def test_it_is_what_peft_makes_of_it(name, targets, tmp_path, cache):
    folder, wanted = adapter(tmp_path, name, targets, fan_in_fan_out=name == "gpt2")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(wanted) - logits(base)).abs().max() > 0.01
    torch.testing.assert_close(logits(hfc.load(folder, device="cpu")), logits(wanted), rtol=0, atol=2e-5)
    opened = Checkpoint.open(folder)
    plain = AutoModelForCausalLM.from_pretrained(opened.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(wanted), rtol=0, atol=2e-5)
    assert opened.name == str(folder)
    assert [path.name for path in cache.iterdir()] == [opened.folder.name]  # found again


def test_it_is_compressed_and_measured_against_the_merged_model(tmp_path):
    folder, wanted = adapter(tmp_path)
    recipe = hfc.RTN(bits=8, group_size=-1)
    made = hfc.compress(folder, recipe, tmp_path / "out", calibration=token_ids(8, 32), eval_data=token_ids(4, 32))
    assert made.report["kl_mean"] < 1e-3
    assert (logits(hfc.load(made.output_dir, packed=False, device="cpu")) - logits(wanted)).abs().max() < 0.05
    again = hfc.evaluate(made.output_dir, data=token_ids(4, 32))  # its base is found by itself
    assert again["kl_mean"] == pytest.approx(made.report["kl_mean"])


@pytest.mark.parametrize("size", [1 << 30, 100_000])
def test_a_quantized_base_is_unpacked(tmp_path, cache, monkeypatch, size):
    """As adapters are that were trained on one: the products are added to the weights that its codes stand for."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(module, "FILE_BYTES", size)
    folder, _ = adapter(tmp_path)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    packed = hfc.compress(base, hfc.RTN(bits=4, group_size=32), tmp_path / "packed", evaluate=False).output_dir
    changed(folder, base_model_name_or_path=str(packed))
    dense = hfc.export(packed, "dense", tmp_path / "dense", dtype="float32", evaluate=False).output_dir
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload()
    recipe = hfc.RTN(bits=8, group_size=-1)
    made = hfc.compress(folder, recipe, tmp_path / "out", calibration=token_ids(8, 32), eval_data=token_ids(4, 32))
    assert made.report["kl_mean"] < 1e-3
    assert (logits(hfc.load(made.output_dir, packed=False, device="cpu")) - logits(wanted)).abs().max() < 0.05
    torch.testing.assert_close(logits(hfc.load(folder, device="cpu")), logits(wanted), rtol=0, atol=2e-5)
    [whole] = cache.iterdir()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)), logits(wanted), rtol=0, atol=2e-5
    )
    assert (len(list(whole.glob("*.safetensors"))) > 1) == (size < 1 << 30)
    again = hfc.evaluate(made.output_dir, data=token_ids(4, 32))
    assert again["kl_mean"] == pytest.approx(made.report["kl_mean"])


def test_another_base_or_adapter_is_merged_anew(tmp_path, cache):
    folder, _ = adapter(tmp_path)
    first = Checkpoint.open(folder).folder
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    assert Checkpoint.open(folder).folder != first
    assert len(list(cache.iterdir())) == 2


def changed(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_what_cannot_be_merged_is_told(tmp_path, cache):
    folder, _ = adapter(tmp_path)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    changed(folder, use_dora=True)
    with pytest.raises(UnsupportedModelError, match=r"is no plain LoRA \(use_dora\); merge it with peft first"):
        Checkpoint.open(folder)
    changed(folder, use_dora=False, base_model_name_or_path=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"There is no folder .*none"):
        Checkpoint.open(folder)
    quantized = hfc.compress(base, hfc.RTN(bits=8, group_size=-1), tmp_path / "q", evaluate=False).output_dir
    changed(folder, base_model_name_or_path=str(quantized))
    with pytest.raises(
        UnsupportedModelError, match="which is quantized, and which is not unpacked here; write the base"
    ):
        Checkpoint.open(folder)
    rounded = hfc.RTN(bits=8, group_size=-1, activations="dynamic")
    rounded = hfc.compress(base, rounded, tmp_path / "rounded", evaluate=False).output_dir
    changed(folder, base_model_name_or_path=str(rounded))
    with pytest.raises(UnsupportedModelError, match=r"cannot be unpacked \(.*rounds what its linears read"):
        hfc.compress(folder, hfc.RTN(group_size=32), tmp_path / "out")
    other = make_model(CONFIGS["opt"](), torch.float32)
    other.save_pretrained(tmp_path / "opt")
    changed(folder, base_model_name_or_path=str(tmp_path / "opt"))
    with pytest.raises(CheckpointError, match=r"is of another model: it changes model.layers.0"):
        Checkpoint.open(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(UnsupportedModelError, match=r"is no plain LoRA \(base_model.model.lm_head.weight\)"):
        Checkpoint.open(folder)
    save_file(dict(sorted(tensors.items())[1:]), path)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged; download or copy it again"):
        Checkpoint.open(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is damaged; download or copy it again"):
        Checkpoint.open(folder)
    assert not cache.exists() or not list(cache.iterdir())


def test_two_that_merge_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    folder, wanted = adapter(tmp_path)
    write = module._write

    def slower(target, *rest):
        """Another process is done before."""
        write(target, *rest)
        result = module.MERGED / module._digest(rest[0], rest[1])
        shutil.copytree(target, result)

    monkeypatch.setattr(module, "_write", slower)
    torch.testing.assert_close(logits(hfc.load(folder, device="cpu")), logits(wanted), rtol=0, atol=2e-5)
