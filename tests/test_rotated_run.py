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
"""A run that rotates, from the command line to the folder that plain transformers loads: all laws hold as without."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS, StopAfter, in_fresh_process, make_model, token_ids, with_outliers
from safetensors.torch import load_file

import hfcompress as hfc
from hfcompress.cli import OK, REFUSED, USER_ERROR, _guarded, app
from hfcompress.errors import OutputError
from hfcompress.formats import get_format
from hfcompress.hub.reload import check_reload
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import set_weight
from hfcompress.models.rotation import rotated
from hfcompress.models.streaming import StreamedModel
from hfcompress.solvers.grid import Grid


LOGITS = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    np.save(sys.argv[3], model(input_ids=torch.from_numpy(np.load(sys.argv[2]))).logits.numpy())
tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
print(json.dumps({"tied": tied, "tokens": len(AutoTokenizer.from_pretrained(sys.argv[1])("def f(x):")["input_ids"])}))
"""


@torch.no_grad()
def solved_logits(source, folder, ids) -> torch.Tensor:
    """Of the rotated original, with the weights that our own reader finds in the folder put in."""
    model = StreamedModel(rotated(Checkpoint.open(source)).checkpoint)
    manifest, stored = json.loads((folder / "hfcompress.json").read_text()), load_file(folder / "model.safetensors")
    layout = get_format(manifest["recipe"]["format"])
    grids = {row["name"]: Grid(row["bits"], row["group_size"], row["symmetric"]) for row in manifest["linears"]}
    [stream] = model.embed([Batch(torch.from_numpy(ids))])
    for index, block_name in enumerate(model.block_names):
        with model.block(index) as block:
            for name in [name for name in grids if name.startswith(f"{block_name}.")]:
                module = block.get_submodule(name.removeprefix(f"{block_name}."))
                set_weight(module, layout.restore(stored, name, grids[name], False))
            stream = stream.advanced(model.call(block, index, stream))
    with model.outside(head=True) as whole:
        return model.logits(whole, stream)


def test_from_the_command_line_to_plain_transformers(tiny, tmp_path):
    """A tied model in bfloat16, with outliers, so that the rotation is chosen."""
    source, output = tmp_path / "model", tmp_path / "out"
    with_outliers(tiny).to(torch.bfloat16).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny / name).read_bytes())
    np.save(tmp_path / "calibration.npy", np.load(tiny / "calibration.npy")[:16])
    recipe = {"recipe": [{"rotate": {}}, {"gptq": {"bits": 3, "group_size": -1, "ignore": ["k_proj"]}}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--model", source, "--calibration", tmp_path / "calibration.npy", "--no-eval", "--output", output]
    command = [sys.executable, "-m", "hfcompress.cli", "run", tmp_path / "recipe.yaml", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == OK, done.stderr
    assert "note: rotated: on held-out calibration rows the divergence is " in done.stderr
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"] is True
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(output / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert tensors[name].dtype == torch.bfloat16
    assert torch.equal(tensors["model.norm.weight"], torch.ones_like(tensors["model.norm.weight"]))

    ids = np.load(tiny / "evaluation.npy").astype(np.int64)[:4]
    np.save(tmp_path / "ids.npy", ids)
    found = in_fresh_process(
        LOGITS, str(output), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy"), forbid="hfcompress"
    )
    assert found["tied"] is False
    assert found["tokens"] > 0
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(logits, solved_logits(source, output, ids), rtol=0, atol=5e-5)
    manifest = json.loads((output / "hfcompress.json").read_text())
    assert check_reload(output, manifest).difference < 1e-4  # the witness was taken from what is on disk


# the laws, on a small random model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotated") / "model"
    make_model(CONFIGS["qwen3-mixed"](), torch.bfloat16).save_pretrained(folder)
    np.save(folder.parent / "ids.npy", token_ids(9, 32))
    return folder


def run(folder, output, recipe, **options):
    return hfc.compress(folder, recipe, output, calibration=folder.parent / "ids.npy", evaluate=False, **options)


def test_stopped_and_resumed_it_is_the_same(model_folder, tmp_path):
    recipe = hfc.Rotate() >> hfc.GPTQ(bits=3, group_size=32)
    whole = run(model_folder, tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, tmp_path / "out", recipe, progress=StopAfter(2))
    resumed = run(model_folder, tmp_path / "out", recipe, resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert resumed.manifest["rotation"] == whole.manifest["rotation"]
    assert resumed.manifest["witness"] == whole.manifest["witness"]


def test_another_rotation_is_not_gone_on_with(model_folder, tmp_path, monkeypatch):
    """Should the trial fall out differently, the blocks that are done would be of another model."""
    from hfcompress.passes import rotate

    recipe = hfc.Rotate() >> hfc.GPTQ(bits=3, group_size=32)
    kl = iter([0.1, 0.2, 0.2, 0.1])
    monkeypatch.setattr(rotate, "trial", lambda *arguments: next(kl))
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, tmp_path / "out", recipe, progress=StopAfter(1))
    with pytest.raises(OutputError, match="differs in the rotation"):
        run(model_folder, tmp_path / "out", recipe, resume=True)


def test_run_again_it_is_verified(model_folder, tmp_path, capsys):
    run(model_folder, tmp_path / "out", hfc.Rotate(when="always") >> hfc.GPTQ(bits=3, group_size=32))
    again = ["run", tmp_path / "out", "--no-eval", "--verify"]
    assert _guarded(app, [str(a) for a in [*again, "--output", tmp_path / "again"]]) == OK
    assert "identical: all " in capsys.readouterr().out
    other = [*again, "--set", "rotate.seed=1", "--output", tmp_path / "other"]
    assert _guarded(app, [str(a) for a in other]) == REFUSED


def test_a_mistake_is_told_in_a_sentence(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("recipe: [gptq, rotate]")
    assert _guarded(app, ["run", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")]) == USER_ERROR
    said = capsys.readouterr().err
    assert "rotate prepares the weights for the steps after it; write it first" in said
    assert said.count("\n") == 1


def test_two_processes_choose_and_give_what_one_does(model_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text("recipe: [rotate: {}, gptq: {bits: 3, group_size: 32}]")
    recipe = hfc.Rotate() >> hfc.GPTQ(bits=3, group_size=32)
    one = run(model_folder, tmp_path / "one", recipe).manifest
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["hfcompress.cli", "run", tmp_path / "recipe.yaml", "--model", model_folder, "--no-eval"]
    command += ["--calibration", model_folder.parent / "ids.npy", "--output", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "hfcompress.json").read_text())
    assert two["processes"] == 2
    for key in ("hidden", "blocks_with_rotated_heads", "seed"):
        assert two["rotation"][key] == one["rotation"][key]
    for key in ("kl_rotated", "kl_as_it_is"):
        assert two["rotation"][key] == pytest.approx(one["rotation"][key], rel=0.02)
    packed = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in packed[0].items():
        if not name.endswith("weight_packed"):
            torch.testing.assert_close(packed[1][name], tensor, rtol=1e-2, atol=1e-3)
