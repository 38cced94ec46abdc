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
"""A checkpoint carries its recipe: run again it gives the same tensors, and `--verify` says whether it did."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from safetensors.torch import load_file, save_file

import hfcompress as hfc
from hfcompress.cli import OK, REFUSED, USER_ERROR, _guarded, app
from hfcompress.reproduction import verify


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A result whose calibration was cut on the command line."""
    folder = tmp_path_factory.mktemp("original")
    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(folder / "model")
    np.save(folder / "ids.npy", token_ids(12, 40))
    arguments = ["--model", folder / "model", "--calibration", folder / "ids.npy", "--set", "gptq.group_size=32"]
    arguments += ["--samples", 6, "--seq-len", 32, "--dtype", "bfloat16", "--no-eval", "--output", folder / "out"]
    assert _guarded(app, ["run", "gptq-w4a16", *map(str, arguments)]) == OK
    return folder / "out"


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = _guarded(app, ["run", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_run_again_it_is_identical(original, tmp_path, capsys):
    code, out, _ = run(capsys, original, "--no-eval", "--verify", "--output", tmp_path / "again")
    assert code == OK
    tensors = load_file(original / "model.safetensors")
    assert f"identical: all {len(tensors)} tensors are the original's, bit for bit" in out
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    manifests = [json.loads((folder / "hfcompress.json").read_text()) for folder in (original, tmp_path / "again")]
    for key in ("calibration", "dtype", "base", "witness"):
        assert manifests[0][key] == manifests[1][key]


def test_other_results_are_told_apart(original, tmp_path, capsys):
    code, out, _ = run(
        capsys, original, "--no-eval", "--verify", "--output", tmp_path / "again", "--set", "gptq.bits=3", "--seed", 7
    )
    assert code == REFUSED
    assert "not identical: " in out
    assert "different from the original: seed (7 now, 0 then)" in out


def test_other_calibration_data_is_noticed_at_once(original, tmp_path, capsys):
    np.save(tmp_path / "other.npy", token_ids(6, 32, seed=5))
    code, out, err = run(
        capsys,
        *(original, "--no-eval", "--verify", "--output", tmp_path / "again", "--calibration", tmp_path / "other.npy"),
    )
    assert code == REFUSED
    assert "the calibration data is not what the original was calibrated on" in err
    assert "the calibration data (" in out


def test_every_difference_counts(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    assert verify(tmp_path / "copy", original).identical
    tensors = load_file(original / "model.safetensors")
    name = next(n for n in tensors if n.endswith("weight_packed"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "copy", original).differing == [name]
    del tensors[name]
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "copy", original).differing == [name]


def test_another_number_of_rows_is_heeded(original, tmp_path, capsys):
    arguments = ("--no-eval", "--output", tmp_path / "again", "--set", "calibration.samples=3")
    assert run(capsys, original, *arguments)[0] == OK
    manifest = json.loads((tmp_path / "again" / "hfcompress.json").read_text())
    assert manifest["calibration"]["samples"] == manifest["recipe"]["calibration"]["samples"] == 3
    assert manifest["calibration"]["seq_len"] == 32


def test_the_original_is_not_replaced_by_what_is_compared_with_it(original, capsys):
    before = (original / "model.safetensors").read_bytes()
    code, _, err = run(capsys, original, "--no-eval", "--verify", "--overwrite", "--output", original)
    assert code == USER_ERROR
    assert "is the checkpoint whose recipe is run again; choose another --output." in err
    assert (original / "model.safetensors").read_bytes() == before


def test_a_base_in_a_folder_is_found_from_elsewhere(saved_llama, tmp_path, monkeypatch):
    """A relative path with one slash would otherwise be somebody's repo."""
    monkeypatch.chdir(saved_llama.parent.parent)
    relative = f"{saved_llama.parent.name}/{saved_llama.name}"
    ids = token_ids(2, 16)
    result = hfc.compress(relative, hfc.RTN(group_size=32), tmp_path / "out", eval_data=ids)
    assert result.manifest["base"]["kind"] == "folder"
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir("/")
    report = hfc.evaluate(tmp_path / "out", data=ids)
    assert report["kl_mean"] == pytest.approx(result.report["kl_mean"], rel=1e-4)


def test_a_gate_on_the_recovery_of_a_task_file_asks_for_it(tmp_path, saved_llama):
    from hfcompress.recipes.job import EvaluationSettings

    settings = EvaluationSettings(tasks=("mine.yaml",), gate={"recovery": 0.5})
    job = hfc.Job(steps=(hfc.RTN(group_size=32),), evaluation=settings)
    base = {"model": str(saved_llama), "kind": "folder", "revision": None}
    manifest = {"recipe": job.to_dict(), "base": base, "linears": [], "calibration": None}
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "hfcompress.json").write_text(json.dumps(manifest))
    with pytest.raises(
        hfc.HfcompressError, match=r"names mine\.yaml, and a task file may hold code; give it yourself"
    ):
        hfc.compress(None, str(tmp_path / "made"), tmp_path / "out")


def test_a_recipe_alone_has_nothing_to_compare_with(capsys, tmp_path):
    code, _, err = run(capsys, "gptq-w4a16", "--verify", "--output", tmp_path / "out")
    assert code == USER_ERROR
    assert "--verify needs a checkpoint to compare with, and gptq-w4a16 is a recipe alone." in err


def test_token_ids_given_in_python_must_be_given_again(tmp_path):
    model = make_model(CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "model")
    ids = token_ids(4, 32)
    recipe = hfc.GPTQ(bits=4, group_size=32)
    hfc.compress(tmp_path / "model", recipe, tmp_path / "out", calibration=ids, evaluate=False)
    with pytest.raises(hfc.HfcompressError, match="calibrated on token ids that were given in Python"):
        hfc.compress(None, str(tmp_path / "out"), tmp_path / "again", evaluate=False)
    hfc.compress(None, str(tmp_path / "out"), tmp_path / "again", calibration=ids, evaluate=False)
    assert verify(tmp_path / "again", tmp_path / "out").identical
