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
"""bitsandbytes and torchao, end to end on the bundled model: what is saved is what the library solved."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, in_fresh_process, make_model

import hfcompress as hfc
from hfcompress.errors import InvalidValueError, MissingExtraError, UnsupportedModelError
from hfcompress.evaluation.inspection import inspect_checkpoint
from hfcompress.evaluation.logits import open_streamed
from hfcompress.formats import bitsandbytes, torchao
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.tiny import tiny_folder


pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

STEPS = {
    "nf4": hfc.BitsAndBytes(),
    "nf4-double": hfc.BitsAndBytes(double_quant=True, ignore=("down_proj",)),
    "int8": hfc.BitsAndBytes(type="int8"),
    "torchao": hfc.TorchAo(),
}
NARROW = hfc.BitsAndBytes(ignore=("down_proj",))  # for the random Llama, whose down_proj is 96 wide
LOST = {"nf4": (0.004, 0.02), "nf4-double": (0.004, 0.02), "int8": (1e-6, 1e-3), "torchao": (1e-6, 1e-3)}
LOGITS = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
for folder, ids, logits in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        np.save(logits, model(input_ids=torch.from_numpy(np.load(ids))).logits.float().numpy())
print(json.dumps(True))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each step on the bundled model, measured on a few rows, and the logits of each folder from a fresh process."""
    parent = tmp_path_factory.mktemp("library")
    rows = np.load(tiny_folder() / "evaluation.npy")[:4, :96].astype(np.int64)
    results = {name: hfc.compress(None, step, parent / name, eval_data=rows) for name, step in STEPS.items()}
    jobs = []
    for name, result in results.items():
        np.save(parent / f"{name}-ids.npy", np.array([result.manifest["witness"]["input_ids"]]))
        jobs.append([str(result.output_dir), str(parent / f"{name}-ids.npy"), str(parent / f"{name}-logits.npy")])
    in_fresh_process(LOGITS, json.dumps(jobs), forbid="hfcompress")
    return results, {name: torch.from_numpy(np.load(job[2])) for name, job in zip(results, jobs, strict=True)}


@pytest.mark.parametrize("name", STEPS)
def test_a_fresh_process_says_what_the_solved_model_said(made, name):
    results, logits = made
    witness = results[name].manifest["witness"]
    found = torch.log_softmax(logits[name][0].float(), -1).gather(-1, torch.tensor(witness["top_ids"]))
    assert torch.allclose(found, torch.tensor(witness["top_log_probs"]), atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_the_dense_view_is_the_librarys_weight(made, name):
    folder = made[0][name].output_dir
    model = open_streamed(Checkpoint.open(folder), "cpu", torch.float32)
    ids = torch.tensor([made[0][name].manifest["witness"]["input_ids"]])
    [stream] = model.forward_blocks(model.embed([Batch(ids)]))
    with model.outside(head=True) as outside:
        ours = torch.log_softmax(model.logits(outside, stream).float(), -1)
    theirs = torch.log_softmax(made[1][name], -1)
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < 2e-3  # the library computes in bfloat16
    dense = Checkpoint.open(tiny_folder()).tensors
    for row in made[0][name].manifest["linears"]:
        weight, values = (t[f"{row['name']}.weight"].read().float() for t in (dense, model.tensors))
        error = ((weight - values).norm() / weight.norm()).item()
        assert row["relative_weight_error"] == pytest.approx(error, rel=1e-4)
        assert error < (0.12 if row["bits"] == 4 else 0.02)


@pytest.mark.parametrize("name", STEPS)
def test_report_and_rows(made, name):
    result, step = made[0][name], STEPS[name]
    low, high = LOST[name]
    assert low < result.report["kl_mean"] < high
    assert result.manifest["calibration"] is None
    assert result.manifest["recipe"]["format"] == step.name
    rows = inspect_checkpoint(Checkpoint.open(result.output_dir))["linears"]
    assert len(rows) == (24 if name == "nf4-double" else 28)
    assert {row["method"] for row in rows} == {step.name}
    assert {row["bits"] for row in rows} == {4 if "nf4" in name else 8}
    assert result.manifest["coverage"] == {"compressed": len(rows), "linears": 29}
    tensors = Checkpoint.open(result.output_dir).tensors
    compressed = {row["name"] for row in rows}
    size = sum(t.nbytes for n, t in tensors.items() if any(n.startswith(f"{c}.") for c in compressed))
    assert sum(row["bytes"] for row in rows) == size
    config = json.loads((result.output_dir / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == step.name
    assert f"pip install {step.name}`" in (result.output_dir / "README.md").read_text()


def test_double_quantization_is_smaller(made):
    single, double = (made[0][name].manifest["linears"] for name in ("nf4", "nf4-double"))
    by_name = {row["name"]: row["bytes"] for row in single}
    large = [
        row for row in double if "q_proj" in row["name"] or ".mlp." in row["name"]
    ]  # the table weighs on small ones
    assert len(large) == 12
    assert all(row["bytes"] < by_name[row["name"]] for row in large)


def test_the_command_is_silent_but_for_its_results(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hfcompress.cli",
            "run",
            "torchao-int8",
            "--no-eval",
            "--output",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "28 of 29 linears compressed" in done.stdout


def test_a_model_in_memory_is_taken_and_not_changed(tmp_path):
    model = make_model(CONFIGS["llama"](), torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = hfc.compress(model, NARROW, tmp_path / "out", evaluate=False)
    assert len(result.manifest["linears"]) == 18
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_resuming_after_the_weights_are_saved_does_not_quantize_again(tmp_path, monkeypatch):
    model = make_model(CONFIGS["llama"](), torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    from hfcompress import compression
    from hfcompress.passes import library_pass

    with monkeypatch.context() as patch:

        def stop(*args):
            raise KeyboardInterrupt

        patch.setattr(compression, "_write_companions", stop)
        with pytest.raises(KeyboardInterrupt):
            hfc.compress(tmp_path / "base", NARROW, tmp_path / "out", evaluate=False)
    monkeypatch.setattr(library_pass.LibraryPass, "_load", lambda *args: pytest.fail("it was saved"))
    result = hfc.compress(tmp_path / "base", NARROW, tmp_path / "out", evaluate=False, resume=True)
    assert len(result.manifest["linears"]) == 18
    assert result.manifest["witness"] is not None


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(InvalidValueError, match="leaves every linear of this model alone"):
        hfc.compress(None, hfc.BitsAndBytes(ignore=("Linear",)), tmp_path / "out", evaluate=False)
    with pytest.raises(InvalidValueError, match=r"no linear of this model is called 'q_porj'.*q_proj"):
        hfc.compress(None, hfc.TorchAo(ignore=("q_porj",)), tmp_path / "out", evaluate=False)
    with pytest.raises(
        UnsupportedModelError, match=r"down_proj is 96 wide.*blocks of 64 divide.*bitsandbytes\.ignore"
    ):
        hfc.compress(make_model(CONFIGS["llama"]()), hfc.BitsAndBytes(), tmp_path / "out", evaluate=False)
    with pytest.raises(UnsupportedModelError, match=r"is a Conv1D.*use rtn or gptq"):
        hfc.compress(make_model(CONFIGS["gpt2"]()), hfc.BitsAndBytes(), tmp_path / "out", evaluate=False)
    for module, extra in ((bitsandbytes, "bnb"), (torchao, "torchao")):
        monkeypatch.setitem(sys.modules, module.QUANT_METHOD, None)
        with pytest.raises(
            MissingExtraError, match=rf"needs {module.QUANT_METHOD}: pip install 'hfcompress\[{extra}\]"
        ):
            module.decoded({}, {})
