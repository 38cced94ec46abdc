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
"""LoRA recovery, end to end: an adapter that PEFT loads on the compressed base, or zeros that remain where it is merged."""

import json

import numpy as np
import pytest
import torch
from conftest import CONFIGS, digest, in_fresh_process, make_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.errors import CheckpointError, InvalidValueError, MissingExtraError, UnsupportedModelError
from hfcompress.evaluation.logits import open_streamed
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.hub.push import carried_files
from hfcompress.models.adapter import adapted, adapter_of, rebased, require_peft
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint


IDS = token_ids(20, 24)
UNSEEN = token_ids(8, 24, seed=9)
QUICK = {"rank": 4, "steps": 24, "held_out": 4, "learning_rate": 3e-3}
START = hfc.RTN(bits=2, group_size=32, scales="minmax")  # leaves much to learn
SPARSE = hfc.Sparsify(pattern="2:4", method="magnitude", refit=False)  # leaves much to learn
WITH_PEFT = """
import json, sys, numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
folder, dense = sys.argv[1], sys.argv[4] == "dense"
options = {} if dense else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
model = PeftModel.from_pretrained(model, folder + "/adapter", autocast_adapter_dtype=True)
with torch.no_grad():
    np.save(sys.argv[3], model(input_ids=torch.from_numpy(np.load(sys.argv[2]))).logits.numpy())
print(json.dumps([str(p) for p in sorted(sys.modules) if p == "hfcompress"]))
"""


def run(model, output, *steps, **options):
    recipe = steps[0]
    for step in steps[1:]:
        recipe = recipe >> step
    return hfc.compress(model, recipe, output, calibration=IDS, eval_data=UNSEEN, **options)


def logits_with_adapter(folder, ids) -> torch.Tensor:
    checkpoint = Checkpoint.open(folder)
    model = adapted(open_streamed(checkpoint, "cpu", torch.float32), adapter_of(checkpoint))
    streams = model.forward_blocks(model.embed([Batch(torch.from_numpy(ids))]))
    with model.outside(head=True) as head:
        return model.logits(head, streams[0])


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(folder / "base")
    plain = run(folder / "base", folder / "plain", START)
    return folder, plain, run(folder / "base", folder / "out", START, hfc.LoRA(**QUICK))


def test_it_helps_and_the_weights_are_not_touched(corrected):
    folder, plain, result = corrected
    record, report = result.manifest["training"], result.report
    assert record["held_out_kl"] < record["held_out_kl_start"] < 0.9 * record["held_out_kl_without"]
    assert digest(folder / "plain") == digest(folder / "out")
    assert report["kl_mean"] == pytest.approx(plain.report["kl_mean"], rel=1e-6)
    assert report["with_adapter"]["kl_mean"] < 0.85 * report["kl_mean"]
    assert [row["method"] for row in result.manifest["linears"]] == ["rtn+lora"] * 21
    sizes = {row["name"]: row["shape"] for row in result.manifest["linears"]}
    assert record["parameters"] == sum(4 * sum(shape) for shape in sizes.values())
    assert report["with_adapter"]["adapter_bytes"] == (folder / "out/adapter/adapter_model.safetensors").stat().st_size


def test_peft_says_what_was_measured(corrected):
    folder, _, result = corrected
    np.save(folder / "ids.npy", UNSEEN)
    names = str(folder / "out"), str(folder / "ids.npy"), str(folder / "logits.npy"), "packed"
    assert in_fresh_process(WITH_PEFT, *names) == []
    theirs = torch.from_numpy(np.load(folder / "logits.npy"))
    torch.testing.assert_close(logits_with_adapter(folder / "out", UNSEEN), theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)(torch.from_numpy(UNSEEN))
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (dense.logits, theirs))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl == pytest.approx(result.report["with_adapter"]["kl_mean"], rel=1e-3)


def test_the_card_and_the_hub_know_of_the_adapter(corrected):
    folder, _, result = corrected
    card = (result.output_dir / "README.md").read_text()
    assert 'PeftModel.from_pretrained(model, "out", subfolder="adapter")' in card
    assert "quantization_config=CompressedTensorsConfig(dequantize=True)" in card
    assert "with the adapter of" in card
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= carried_files(folder / "out").keys()
    config = json.loads((folder / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "out")
    assert config["target_modules"] == sorted(f"{x}_proj" for x in ["q", "k", "v", "o", "gate", "up", "down"])
    told = json.loads(rebased(json.dumps(config), "someone/model"))
    assert told == config | {"base_model_name_or_path": "someone/model"}


def test_plain_weights_and_exports_may_have_one_too(corrected, tmp_path):
    """Zeros alone, not merged: nothing to dequantize, as the card says. An export carries the adapter along."""
    folder = corrected[0]
    result = run(folder / "base", tmp_path / "out", SPARSE, hfc.LoRA(**QUICK))
    assert result.report["with_adapter"]["kl_mean"] < result.report["kl_mean"]
    assert "dequantize=True" not in (tmp_path / "out" / "README.md").read_text()
    np.save(tmp_path / "ids.npy", UNSEEN)
    in_fresh_process(WITH_PEFT, *(str(tmp_path / name) for name in ("out", "ids.npy", "logits.npy")), "dense")
    theirs = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(logits_with_adapter(tmp_path / "out", UNSEEN), theirs, rtol=1e-4, atol=1e-4)
    hfc.export(folder / "out", "dense", tmp_path / "exported", dtype="float32")
    adapter, other = folder / "out/adapter", tmp_path / "exported/adapter"
    weights = "adapter_model.safetensors"
    assert (other / weights).read_bytes() == (adapter / weights).read_bytes()
    assert json.loads((other / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "exported"
    )
    in_fresh_process(WITH_PEFT, *(str(tmp_path / name) for name in ("exported", "ids.npy", "logits.npy")), "dense")
    theirs = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(logits_with_adapter(folder / "out", UNSEEN), theirs, rtol=1e-4, atol=1e-4)


def test_the_output_head_is_corrected_too(corrected, tmp_path):
    """Its teacher is the head as it was."""
    head = hfc.RTN(bits=2, group_size=32, scales="minmax", targets=("Linear", "lm_head"))
    result = run(corrected[0] / "base", tmp_path / "out", head, hfc.LoRA(**QUICK))
    assert "lm_head" in {row["name"] for row in result.manifest["linears"] if row["method"] == "rtn+lora"}
    assert result.report["with_adapter"]["kl_mean"] < 0.85 * result.report["kl_mean"]


def test_conv1d_and_a_part_of_the_linears(tmp_path):
    """GPT-2: transposed weights; and where not all linears of a name are meant, their whole names are told."""
    make_model(CONFIGS["gpt2"]()).save_pretrained(tmp_path / "base")
    lora = hfc.LoRA(**{**QUICK, "steps": 4}, ignore=("re:.*h.2.*",))
    recipe = hfc.Job.of(START >> lora)
    recipe = hfc.Job(steps=recipe.steps, format="dense")
    hfc.compress(tmp_path / "base", recipe, tmp_path / "out", calibration=IDS, evaluate=False)
    report = hfc.evaluate(tmp_path / "out", baseline=tmp_path / "base", data=UNSEEN)
    assert report["with_adapter"]["kl_mean"] < report["kl_mean"]
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    assert "transformer.h.0.attn.c_attn" in config["target_modules"]
    assert not any(".2." in name for name in config["target_modules"])
    np.save(tmp_path / "ids.npy", UNSEEN)
    in_fresh_process(WITH_PEFT, *(str(tmp_path / name) for name in ("out", "ids.npy", "logits.npy")), "dense")
    theirs = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(logits_with_adapter(tmp_path / "out", UNSEEN), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["dense", "sparse24"])
def test_merged_where_zeros_remain(corrected, tmp_path, monkeypatch, layout):
    """A 2:4 model with the correction in it: an ordinary checkpoint, and the same after a run that was killed on the way."""
    folder = corrected[0]
    job = hfc.Job.of(SPARSE >> hfc.LoRA(**{**QUICK, "merge": True}))
    job = hfc.Job(steps=job.steps, format=layout)
    result = hfc.compress(folder / "base", job, tmp_path / "out", calibration=IDS, eval_data=UNSEEN)
    record = result.manifest["training"]
    assert record["held_out_kl"] < record["held_out_kl_start"] == record["held_out_kl_without"]
    assert not (tmp_path / "out" / "adapter").exists()
    assert all(row["sparsity"] >= 0.5 for row in result.manifest["linears"])
    if layout == "dense":
        stored, dense = (load_file(place / "model.safetensors") for place in (tmp_path / "out", folder / "base"))
        for row in result.manifest["linears"]:
            weight, before = (found[f"{row['name']}.weight"].float() for found in (stored, dense))
            assert ((weight.view(len(weight), -1, 4) != 0).sum(-1) <= 2).all()
            error = ((weight - before).norm() / before.norm()).item()
            assert row["relative_weight_error"] == pytest.approx(error, rel=1e-4)
    write, calls = CheckpointWriter.write_part, []

    def killed(self, name, tensors):
        calls.append(name)
        if calls.count("block-00001") == 2:  # the block pass writes it first
            raise KeyboardInterrupt
        write(self, name, tensors)

    monkeypatch.setattr(CheckpointWriter, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(folder / "base", job, tmp_path / "again", calibration=IDS, evaluate=False)
    monkeypatch.undo()
    hfc.compress(folder / "base", job, tmp_path / "again", calibration=IDS, evaluate=False, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "again")


def test_what_cannot_be_is_told(corrected, tmp_path, monkeypatch):
    folder = corrected[0]

    def refused(match, *steps, error=InvalidValueError, **options):
        with pytest.raises(error, match=match):
            run(folder / "base", tmp_path / "out", *steps, **options)
        assert not (tmp_path / "out").exists()

    with pytest.raises(
        InvalidValueError, match="lora corrects a compressed model: put gptq, rtn or sparsify before it"
    ):
        hfc.Job.of(hfc.LoRA())
    with pytest.raises(InvalidValueError, match="lora must be the last step; put rtn before it"):
        hfc.Job.of(START >> hfc.LoRA() >> START)
    with pytest.raises(InvalidValueError, match="awq rescales them first; leave one of the two out"):
        hfc.Job.of(hfc.AWQ() >> START >> hfc.LoRA())
    with pytest.raises(InvalidValueError, match=r"lora\.rank is 0; it must be at least 1"):
        hfc.LoRA(rank=0)
    with pytest.raises(InvalidValueError, match=r"lora\.init=error repairs what was rounded"):
        hfc.LoRA(merge=True, init="error")
    with pytest.raises(InvalidValueError, match="lora takes no overrides"):
        hfc.LoRA(overrides={"q_proj": {"rank": 2}})
    refused(r"lora\.rank is 40, and model\.layers\.0\.self_attn\.k_proj has only 32 rows", START, hfc.LoRA(rank=40))
    refused("lora.merge would take .* off the 2-bit grid", START, hfc.LoRA(**QUICK, merge=True))
    refused("lora leaves every compressed linear alone", START, hfc.LoRA(ignore=("re:.*",)))
    rounded = hfc.RTN(bits=8, type="int", group_size=-1, activations="dynamic")
    refused("lora cannot learn through inputs and caches that are rounded", rounded, hfc.LoRA(**QUICK))
    embedded = hfc.RTN(bits=8, type="int", group_size=-1, targets=("embed_tokens", "Linear"))
    refused(
        "lora starts from embeddings as they were; take model.embed_tokens out of targets", embedded, hfc.LoRA(**QUICK)
    )
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"lora needs peft: pip install 'hfcompress\[peft\]'"):
        require_peft("lora")


def test_an_adapter_that_is_none_is_told(corrected, tmp_path):
    folder = corrected[0]
    model = open_streamed(Checkpoint.open(folder / "out"), "cpu", torch.float32)
    place = tmp_path / "adapter"
    place.mkdir()

    def change(**settings):
        config = json.loads((folder / "out/adapter/adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps(config | settings))

    (place / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged; download or copy it again"):
        adapted(model, place)
    change(use_dora=True)
    with pytest.raises(UnsupportedModelError, match=r"is no plain LoRA \(use_dora\); merge it with peft first"):
        adapted(model, place)
    change(peft_type="IA3")
    with pytest.raises(UnsupportedModelError, match=r"is no plain LoRA \(IA3\)"):
        adapted(model, place)
    change()
    with pytest.raises(CheckpointError, match="is missing; download or copy it again"):
        adapted(model, place)
    (place / "adapter_model.safetensors").write_bytes((folder / "out/adapter/adapter_model.safetensors").read_bytes())
    other = make_model(CONFIGS["gpt2"]())
    with pytest.raises(CheckpointError, match=r"is of another model: it changes model\.layers\.0"):
        adapted(open_streamed(Checkpoint.open(other), "cpu", torch.float32), place)
