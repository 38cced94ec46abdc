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
"""The check before a push: a folder says in a fresh process what the solved model said, and a damaged one does not."""

import json
import shutil

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from safetensors.torch import load_file, save_file

import hfcompress as hfc
from hfcompress.errors import CheckpointError, RefusedError
from hfcompress.hub import reload
from hfcompress.hub.reload import check_reload


def compressed(name, output, recipe, layout="compressed-tensors", tied=True):
    config = CONFIGS[name]()
    if not tied:
        config.tie_word_embeddings = False
    model = make_model(config, torch.bfloat16)
    job = hfc.Job(steps=(recipe,), format=layout)
    return hfc.compress(model, job, output, calibration=token_ids(4, 32), evaluate=False)


GPTQ = hfc.GPTQ(bits=4, group_size=32)
CASES = {
    "llama": ("llama", GPTQ, "compressed-tensors", True),
    "gemma3": ("gemma3", hfc.RTN(bits=4, group_size=32), "compressed-tensors", True),
    "qwen3-mixed, zero points": (
        "qwen3-mixed",
        hfc.RTN(bits=3, group_size=32, symmetric=False),
        "compressed-tensors",
        True,
    ),
    "gpt2, dense": ("gpt2", hfc.RTN(bits=8, group_size=32), "dense", True),
    "opt, bytes": ("opt", hfc.RTN(bits=8, group_size=-1), "int-quantized", True),
    "llama, rounded activations": (
        "llama",
        hfc.RTN(bits=8, group_size=-1, activations="static"),
        "compressed-tensors",
        False,
    ),
    "llama with its head": (
        "llama",
        hfc.GPTQ(bits=8, group_size=32, targets=("Linear", "lm_head")),
        "compressed-tensors",
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [reload.WHOLE, reload.STREAMED])
def test_what_is_reloaded_says_what_was_solved(case, mode, tmp_path):
    result = compressed(CASES[case][0], tmp_path / "out", *CASES[case][1:])
    witness = result.manifest["witness"]
    assert len(witness["input_ids"]) == len(witness["top_ids"]) == 32
    assert reload._difference(result.output_dir, mode) < (0.02 if "zero" in case or "rounded" in case else 1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return compressed("llama", tmp_path_factory.mktemp("made") / "out", GPTQ)


def damaged(made, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(made.output_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_in_a_fresh_process(made):
    found = check_reload(made.output_dir, made.manifest)
    assert found.how == "whole, by plain transformers"
    assert found.difference < 1e-4
    assert found.positions == 32


def test_block_by_block_where_it_does_not_fit(made, monkeypatch):
    monkeypatch.setattr(reload, "BYTES_PER_WEIGHT", 10**9)
    found = check_reload(made.output_dir, made.manifest)
    assert found.how == "block by block, through the decompressor that transformers uses"
    assert found.difference < 1e-4


def test_other_weights_are_refused(made, tmp_path):
    def swap(tensors):
        down, other = (f"model.layers.{i}.mlp.down_proj.weight_packed" for i in (0, 1))
        tensors[down], tensors[other] = tensors[other], tensors[down]

    folder = damaged(made, tmp_path, swap)
    with pytest.raises(
        RefusedError, match=r"does not say what the solved model said .* so it is not pushed; compress it"
    ):
        check_reload(folder, made.manifest)


def test_a_folder_that_does_not_load(made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made.output_dir, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError):
        check_reload(folder, made.manifest)
    shutil.copy(made.output_dir / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = "many"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        check_reload(folder, made.manifest)


def test_nothing_is_imported_from_the_working_folder(made, tmp_path, monkeypatch):
    """A downloaded folder may hold anything, and people run the command inside it."""
    folder = tmp_path / "copy"
    shutil.copytree(made.output_dir, folder)
    for name in ("safetensors", "json", "torch"):
        (folder / f"{name}.py").write_text("open('ran', 'w'); raise SystemExit('this ran')")
    monkeypatch.chdir(folder)
    assert check_reload(folder, made.manifest).difference < 1e-4
    assert not (folder / "ran").exists()


def test_small_changes_are_found(made, tmp_path):
    def negate_a_row(tensors):
        scales = tensors["model.layers.1.mlp.down_proj.weight_scale"]
        scales[3] = -scales[3]

    with pytest.raises(RefusedError):
        check_reload(damaged(made, tmp_path, negate_a_row), made.manifest)


def test_an_older_folder_has_no_witness(made):
    manifest = {key: value for key, value in made.manifest.items() if key != "witness"}
    with pytest.raises(CheckpointError, match=r"carries no witness .* compress it again with `hfcompress run`\.$"):
        check_reload(made.output_dir, manifest)
