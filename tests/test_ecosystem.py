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
"""A result in others' hands: transformers' pipeline, PEFT's adapters and lm-eval's command without hfcompress, optimum's with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_fresh_process
from safetensors.torch import load_file

import hfcompress as hfc


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The trained tiny model in four bits."""
    return hfc.compress(None, "w4a16-fast", tmp_path_factory.mktemp("ecosystem") / "w4").output_dir


PIPELINE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, prompt = sys.argv[1:]
[said] = pipeline("text-generation", folder, dtype="float32")(prompt, max_new_tokens=12, do_sample=False)
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
ids = tokenizer(prompt, return_tensors="pt")
wanted = model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
print(json.dumps([said["generated_text"], tokenizer.decode(wanted, skip_special_tokens=True)]))
"""


def test_a_pipeline_goes_on_with_a_text(result):
    prompt = "The function returns a list of"
    said, wanted = in_fresh_process(PIPELINE, str(result), prompt, forbid="hfcompress")
    assert said == wanted
    assert said.startswith(prompt)
    assert len(said) > len(prompt)


ADAPTER = """
import json, sys
import numpy as np, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
folder, tokens, out = sys.argv[1:]
options = {"dtype": "float32", "quantization_config": CompressedTensorsConfig(dequantize=True)}
base = AutoModelForCausalLM.from_pretrained(folder, **options)
packed = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
ids = torch.from_numpy(np.load(tokens)[:4, :64]).long()
with torch.no_grad():
    apart = (base(input_ids=ids).logits - packed(input_ids=ids).logits).abs().max().item()
torch.manual_seed(0)
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2), []
for _ in range(12):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
same = all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
model.save_pretrained(out)
print(json.dumps([apart, losses, same]))
"""


def test_an_adapter_learns_on_the_result(result, tiny, tmp_path, monkeypatch):
    """And its repo, given as a model, is what was trained, on a base that is unpacked for it."""
    pytest.importorskip("peft")
    apart, losses, same = in_fresh_process(
        ADAPTER, str(result), str(tiny / "calibration.npy"), str(tmp_path / "adapter"), forbid="hfcompress"
    )
    assert apart < 0.1  # transformers rounds what it unpacks to the scales' bfloat16
    assert losses[-1] < losses[0] - 0.1
    assert same
    monkeypatch.setattr("hfcompress.models.merged.MERGED", tmp_path / "merged")
    ids = torch.from_numpy(np.load(tiny / "calibration.npy")[:4, :64]).long()
    with torch.no_grad():
        loss = hfc.load(tmp_path / "adapter", device="cpu")(input_ids=ids, labels=ids).loss.item()
    assert loss < losses[0] - 0.1


TASK = """
task: endings
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_lm_eval_by_its_own_command_says_what_eval_says(result, tmp_path):
    pytest.importorskip("lm_eval")
    passages = ["The value of the", "A list is a", "If the argument is", "Return the", "This module", "The default is"]
    rows = [
        {"passage": passage, "endings": [" object", " zzqx", " string", " of"], "answer": number % 4}
        for number, passage in enumerate(passages)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "endings.yaml"
    task.write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--tasks", "endings"]
    options = ["--model_args", f"pretrained={result},dtype=float32", "--include_path", str(tmp_path)]
    done = subprocess.run(
        [*command, *options, "--output_path", str(tmp_path / "said"), "--batch_size", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [said] = Path(tmp_path / "said").rglob("results_*.json")
    theirs = json.loads(said.read_text())["results"]["endings"]["acc,none"]
    ours = hfc.evaluate(result, measurements=["tasks"], tasks=[str(task)])["tasks"]["scores"]["endings"]
    assert ours["metric"].startswith("acc")
    assert ours["compressed"] == pytest.approx(theirs)


def optimum(*arguments) -> subprocess.CompletedProcess[str]:
    """`optimum-cli compress`, from this environment."""
    pytest.importorskip("optimum")
    command = shutil.which("optimum-cli", path=str(Path(sys.executable).parent))
    assert command is not None
    return subprocess.run([command, "compress", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_optimum_compresses_as_hfcompress_does(result, tmp_path):
    done = optimum("w4a16-fast", "--output", tmp_path / "out", "--no-eval")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (result, tmp_path / "out"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_optimum_tells_bad_input_in_a_sentence(tmp_path):
    done = optimum("w4a61", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "w4a16" in done.stderr
    assert "recipe" in optimum("--help").stdout
