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
"""What bad input gets: one sentence that says what to do, exit code 2, no traceback, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from safetensors.torch import load_file, save_file

from hfcompress.cli import INTERRUPTED, OK, REFUSED, USER_ERROR, _guarded, app


@pytest.fixture
def hfcompress(capsys):
    """Run a command in this process; gives the exit code and what went to stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = _guarded(app, [str(a) for a in arguments])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return run


@pytest.fixture
def refused(hfcompress, tmp_path):
    """A command that must be refused with exit code 2, one line, and no trace on disk."""

    def run(*arguments: object) -> str:
        before = sorted(p.name for p in tmp_path.iterdir())
        code, said = hfcompress(*arguments)
        assert code == USER_ERROR, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert len(said.splitlines()) == 1 + said.count("note: ")
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        return errors[0]

    return run


@pytest.fixture
def ids(tmp_path):
    """Token ids for the tiny random models."""
    np.save(tmp_path / "ids.npy", token_ids(4, 32))
    return tmp_path / "ids.npy"


def options(folder, ids, tmp_path):
    return ["--model", folder, "--calibration", ids, "--eval-data", ids, "--output", tmp_path / "out"]


# the model


def test_missing_model_folder(refused, tmp_path):
    said = refused("run", "gptq-w4a16", "--model", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert "There is no folder" in said
    assert "Hub id" in said


def test_hub_id_while_offline(refused, tmp_path):
    said = refused("run", "gptq-w4a16", "--model", "someone/some-model", "--output", tmp_path / "out")
    assert "Hub cannot be reached" in said


def test_a_file_for_a_model(refused, ids, tmp_path):
    assert "is a file" in refused("run", "gptq-w4a16", "--model", ids, "--output", tmp_path / "out")


def test_folder_without_config(refused, saved_llama, ids, tmp_path):
    (saved_llama / "config.json").unlink()
    assert "no config.json" in refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path))


def test_folder_without_weights(refused, saved_llama, ids, tmp_path):
    (saved_llama / "model.safetensors").unlink()
    assert "no model.safetensors" in refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path))


def test_pickled_weights(refused, saved_llama, ids, tmp_path):
    (saved_llama / "model.safetensors").rename(saved_llama / "pytorch_model.bin")
    assert "pickled" in refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path))


def test_damaged_config(refused, saved_llama, ids, tmp_path):
    (saved_llama / "config.json").write_text("{")
    assert "cannot be read" in refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path))


def test_unknown_architecture(refused, saved_llama, ids, tmp_path):
    (saved_llama / "config.json").write_text('{"model_type": "a-model-of-tomorrow"}')
    assert "a-model-of-tomorrow" in refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_shard_is_named(refused, saved_llama, ids, tmp_path, damage):
    path = saved_llama / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-1000], "garbage": b"\xff" * 4096, "empty": b""}[damage])
    said = refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path))
    assert "model.safetensors is truncated or damaged" in said


def test_missing_shard_is_named(refused, saved_llama, ids, tmp_path):
    weights = load_file(saved_llama / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (saved_llama / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path))
    assert "model-00001-of-00002.safetensors is missing" in said


def test_an_index_that_leads_out_of_its_folder(refused, saved_llama, ids, tmp_path):
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (saved_llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside its folder" in refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named(refused, saved_llama, ids, tmp_path, name, value):
    weights = load_file(saved_llama / "model.safetensors")
    weights[name][3, 5] = value
    save_file(weights, saved_llama / "model.safetensors", metadata={"format": "pt"})
    said = refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path), "--set", "gptq.group_size=32")
    assert f"{name} in" in said
    assert "NaN or infinity" in said


@pytest.mark.parametrize(
    ("recipe", "change"), [("gptq-w4a16", "gptq.group_size=32"), ("w8a8-int8", "gptq.activations=static")]
)
def test_an_activation_that_is_not_finite_is_named(refused, saved_llama, ids, tmp_path, recipe, change):
    weights = load_file(saved_llama / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 3e38
    save_file(weights, saved_llama / "model.safetensors", metadata={"format": "pt"})
    said = refused("run", recipe, *options(saved_llama, ids, tmp_path), "--set", change)
    assert "The input of model.layers.0.mlp.down_proj holds NaN or infinity" in said


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_weight_is_named(refused, saved_llama, ids, tmp_path, name):
    weights = load_file(saved_llama / "model.safetensors")
    del weights[name]
    save_file(weights, saved_llama / "model.safetensors", metadata={"format": "pt"})
    said = refused("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path), "--set", "gptq.group_size=32")
    assert f"no weight for {name}; the checkpoint is incomplete" in said


# the recipe


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gptq-w4a61"], "Did you mean 'gptq-w4a16'?"),
        (["gptq-w4a16", "--set", "gptq.bit=3"], "Did you mean 'bits'?"),
        (["gptq-w4a16", "--set", "gtpq.bits=3"], "Did you mean 'gptq'?"),
        (["gptq-w4a16", "--set", "gptq.bits=5"], "must be one of 2, 3, 4, 8"),
        (["gptq-w4a16", "--set", "gptq.bits=four"], "must be one of 2, 3, 4, 8"),
        (["gptq-w4a16", "--set", "gptq.group_size=100"], "must be one of -1, 32, 64, 128"),
        (["gptq-w4a16", "--set", "gptq.symmetric=7"], "must be true or false"),
        (["gptq-w4a16", "--set", "gptq.activations=dynamic"], "set gptq.bits to 8, group_size to -1"),
        (["gptq-w4a16", "--set", "gptq.type=float"], "is E4M3 with a scale per row"),
        (["w8a8-int8", "--set", "gptq.observer=minmax"], "is for static activations"),
        (["w8a8-int8", "--set", "format=pack-quantized"], "pack-quantized is not for int codes and rounded inputs"),
        (["w8a8-fp8", "--set", "format=dense"], "dense has no place for how the inputs"),
        (["gptq-w4a16", "--set", "gptq.damping=high"], "must be a number"),
        (["gptq-w4a16", "--set", "gptq.damping=2"], "between 0 and 1"),
        (["gptq-w4a16", "--set", "gptq.scales=serach"], "Did you mean 'search'?"),
        (["gptq-w4a16", "--set", "gptq.targets=[q_porj]"], "Did you mean 'q_proj'?"),
        (["gptq-w4a16", "--set", "gptq.ignore=['re:(']"], "no regular expression"),
        (["gptq-w4a16", "--set", "gptq.ignore=['re:.*_proj']"], "leaves every linear of this model alone"),
        (["gptq-w4a16", "--set", "gptq.bits"], "write --set step.key=value"),
        (["gptq-w4a16", "--set", "calibration.sample=3"], "Did you mean 'samples'?"),
        (["gptq-w4a16", "--set", "format=compressed_tensors"], "Did you mean 'compressed-tensors'?"),
        (["gptq-w4a16", "--set", "evaluation.gate={kl_men: 1}"], "Did you mean 'kl_mean'?"),
        (["gptq-w4a16", "--no-eval", "--set", "evaluation.gate={kl_mean: 1}"], "needs the evaluation"),
        (["gptq-w4a16", "--device", "gpu"], "There is no device 'gpu'"),
        (["gptq-w4a16", "--dtype", "int4"], "There is no dtype 'int4'"),
        (["gptq-w4a16", "--memory-limit", "much"], "'much' is no size"),
        (["gptq-w4a16", "--resume", "--overwrite"], "give one of them"),
        (["gptq-w4a16", "--samples", "none"], "--samples"),
        (["gptq-w4a16", "--seed", "-1"], "calibration.seed is -1; it must be at least 0"),
        (["gptq-w4a16", "--set", "evaluation.seq_len=1"], "evaluation.seq_len is 1; it must be at least 2"),
        (["gptq-w4a16", "--device", "meta"], "The device 'meta' is not supported"),
        (["gptq-w4a16", "--colour"], "--colour"),
    ],
)
def test_a_recipe_or_an_option_that_cannot_be(refused, tmp_path, arguments, expected):
    if "--output" not in arguments:
        arguments = [*arguments, "--output", tmp_path / "out"]
    assert expected in refused("run", *arguments)


def test_cuda_where_there_is_none(refused, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "no CUDA device" in refused("run", "gptq-w4a16", "--device", "cuda", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("recipe: [", "not valid YAML"),
        ("- 1", "needs a key 'recipe'"),
        ("recipe:\n  - gtpq: {bits: 4}", "Did you mean 'gptq'?"),
        ("recipe:\n  - gptq: {bits: 4}\ncalibraton: {}", "Did you mean 'calibration'?"),
        ("recipe:\n  - gptq: 4", "must be a mapping"),
        ("recipe: []", "must be a list of steps"),
        ("recipe:\n  - rtn: {}\n  - gptq: {}", "is a target of rtn and gptq"),
        ("recipe: [rtn: {}, kv_cache: {}, kv_cache: {}]", "has the step kv_cache twice; leave one"),
        ("recipe: [kv_cache: {}]", "kv_cache needs a step beside it"),
        ("recipe: [rtn: {}, kv_cache: {}]\nformat: dense", "no place for the scales of the step kv_cache"),
        ("recipe: [kv_cache: {targets: [k_proj]}]", "is for the cache of every attention"),
    ],
)
def test_a_recipe_file_that_cannot_be(refused, tmp_path, text, expected):
    (tmp_path / "mine.yaml").write_text(text)
    assert expected in refused("run", tmp_path / "mine.yaml", "--output", tmp_path / "out")


def test_a_folder_that_holds_no_recipe(refused, saved_llama, tmp_path):
    assert "was not made by hfcompress" in refused("run", saved_llama, "--output", tmp_path / "out")


# the data


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((0, 32), dtype=np.int64), "is empty"),
        (np.zeros((4, 0), dtype=np.int64), "is empty"),
        (np.zeros((4, 32), dtype=np.float32), "must be integers"),
        (np.zeros(32, dtype=np.int64), "must be (rows, seq_len)"),
        (np.full((4, 32), 5000), "token id 5000, but the model's vocabulary has 128"),
        (np.full((4, 32), -1), "token id -1"),
        (np.zeros((4, 65), dtype=np.int64), "the model's context is 64"),
    ],
)
def test_token_ids_that_cannot_be(refused, saved_llama, tmp_path, array, expected):
    np.save(tmp_path / "ids.npy", array)
    said = refused(
        "run", "gptq-w4a16", *options(saved_llama, tmp_path / "ids.npy", tmp_path), "--set", "gptq.group_size=32"
    )
    assert expected in said


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent.npy", None, "There is no file"),
        ("absent.txt", None, "There is no file"),
        ("empty.npy", b"", "no array of token ids"),
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"Too little text.", "not one full row of 64"),
        ("broken.jsonl", b'{"text": ', "Line 1"),
        ("list.jsonl", b"[1]", "no JSON object"),
        ("column.jsonl", b'{"txt": "words"}', "has no column 'text'; it has txt"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}', "no chat template"),
        ("broken.parquet", b"PAR", "no parquet file"),
        ("notes.pdf", b"%PDF", "give .txt, .jsonl, .parquet or .npy"),
    ],
)
def test_calibration_data_that_cannot_be(refused, tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = ["--calibration", tmp_path / name, "--seq-len", "64", "--output", tmp_path / "out"]
    assert expected in refused("run", "gptq-w4a16", *arguments)


def test_a_hub_data_set_while_offline(refused, tmp_path):
    pytest.importorskip("datasets")
    said = refused("run", "gptq-w4a16", "--calibration", "someone/data:en:train", "--output", tmp_path / "out")
    assert "cannot be read from the Hub" in said


def test_a_missing_extra_is_named(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = refused("run", "gptq-w4a16", "--calibration", "someone/data", "--output", tmp_path / "out")
    assert "pip install 'hfcompress[datasets]'" in said


def test_text_for_a_model_without_a_tokenizer(refused, saved_llama, tmp_path):
    said = refused(
        "run", "gptq-w4a16", "--model", saved_llama, "--output", tmp_path / "out", "--set", "gptq.group_size=32"
    )
    assert "has no tokenizer" in said
    assert ".npy" in said


def test_fewer_tokens_than_the_widest_layer_is_a_warning_that_says_what_it_costs(
    hfcompress, saved_llama, ids, tmp_path
):
    arguments = [*options(saved_llama, ids, tmp_path), "--samples", "1", "--set", "gptq.group_size=32", "--no-eval"]
    code, said = hfcompress("run", "gptq-w4a16", *arguments)
    assert code == OK
    assert "note: only 32 calibration tokens for the 96 inputs of" in said
    assert "no better than rounding to nearest" in said


def test_fewer_rows_than_asked_for_is_said(hfcompress, tiny, tmp_path):
    (tmp_path / "words.txt").write_text("def words(): pass\n" * 200)
    arguments = [
        "--calibration",
        tmp_path / "words.txt",
        "--seq-len",
        "128",
        "--output",
        tmp_path / "out",
        "--no-eval",
    ]
    code, said = hfcompress("run", "gptq-w4a16", *arguments)
    assert code == OK
    assert "rows of 128 tokens, not the 128 that were asked for" in said


def test_evaluating_on_what_was_calibrated_on_is_said(hfcompress, saved_llama, ids, tmp_path):
    code, said = hfcompress("run", "gptq-w4a16", *options(saved_llama, ids, tmp_path), "--set", "gptq.group_size=32")
    assert code == OK
    assert "100.0% of the evaluation's text was calibrated on: the result will look better than it is" in said


# the output


def test_output_is_a_file(refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused("run", "w4a16-fast", "--output", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_output_exists(refused, hfcompress, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert "--overwrite" in refused("run", "w4a16-fast", "--output", tmp_path / "out", "--no-eval")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    assert hfcompress("run", "w4a16-fast", "--output", tmp_path / "out", "--no-eval", "--overwrite")[0] == OK
    assert not (tmp_path / "out" / "precious.txt").exists()


def test_a_failed_overwrite_leaves_the_good_output(refused, saved_llama, ids, tmp_path, hfcompress):
    arguments = [*options(saved_llama, ids, tmp_path), "--set", "gptq.group_size=32", "--no-eval"]
    assert hfcompress("run", "gptq-w4a16", *arguments)[0] == OK
    good = (tmp_path / "out" / "model.safetensors").read_bytes()
    weights = load_file(saved_llama / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, saved_llama / "model.safetensors", metadata={"format": "pt"})
    refused("run", "gptq-w4a16", *arguments, "--overwrite")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == good


@pytest.fixture
def mounted(tmp_path):
    """Mount a memory file system with some options, for those whom permissions do not stop."""
    folders = []

    def mount(options: str):
        folder = tmp_path / f"mounted-{len(folders)}"
        folder.mkdir()
        done = shutil.which("mount") and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if not done or done.returncode:
            pytest.skip("no file system can be mounted here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_output_is_not_writable(hfcompress, tmp_path, mounted):
    if os.geteuid() == 0:
        locked = mounted("ro")
    else:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
    code, said = hfcompress("run", "w4a16-fast", "--output", locked / "out", "--no-eval")
    assert code == USER_ERROR
    assert "is not writable; choose another --output" in said


def test_disk_full(hfcompress, mounted):
    small_disk = mounted("size=1m")
    code, said = hfcompress("run", "rtn-w8a16", "--output", small_disk / "out", "--no-eval")
    assert code == USER_ERROR
    assert "is full" in said
    assert not (small_disk / "out").exists()


def test_the_models_own_folder_is_never_an_output(refused, saved_llama, ids, tmp_path):
    for output in (saved_llama, saved_llama.parent, saved_llama / "out"):
        arguments = ["--model", saved_llama, "--calibration", ids, "--output", output, "--overwrite"]
        assert "the model's own folder" in refused("run", "gptq-w4a16", *arguments, "--set", "gptq.group_size=32")
    assert (saved_llama / "model.safetensors").is_file()


def test_the_working_folder_is_never_an_output(refused, tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert "the working folder" in refused("run", "w4a16-fast", "--output", tmp_path / "here", "--overwrite")


def test_output_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file is a file, so" in refused("run", "w4a16-fast", "--output", tmp_path / "file" / "out")


def test_output_is_a_mount_point(hfcompress, mounted):
    code, said = hfcompress("run", "w4a16-fast", "--output", mounted("size=9m"), "--no-eval")
    assert code == USER_ERROR
    assert "mount point" in said


def test_a_json_file_that_cannot_be_written_is_told_before_the_work(refused, tmp_path):
    said = refused("run", "w4a16-fast", "--output", tmp_path / "out", "--json", tmp_path / "nowhere" / "x.json")
    assert "cannot be written" in said


# the end


def test_ctrl_c_is_130_and_names_resume(hfcompress, tmp_path, monkeypatch):
    from hfcompress.passes.block_pass import BlockPass

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockPass, "run", interrupted)
    code, said = hfcompress("run", "w4a16-fast", "--output", tmp_path / "out")
    assert code == INTERRUPTED == 130
    assert "--resume" in said
    assert not (tmp_path / "out").exists()


def test_the_unexpected_gets_a_log_and_exit_code_1(hfcompress, tmp_path, monkeypatch):
    from hfcompress.passes.block_pass import BlockPass

    def broken(*args):
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(BlockPass, "run", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, said = hfcompress("run", "w4a16-fast", "--output", tmp_path / "out")
    assert code == 1
    [log] = tmp_path.glob("hfcompress-*.log")
    assert str(log) in said
    assert "by design" in log.read_text()


def test_a_gate_that_refuses_is_3_and_the_folder_stays(hfcompress, saved_llama, ids, tmp_path):
    arguments = [*options(saved_llama, ids, tmp_path), "--set", "gptq.group_size=32"]
    code, said = hfcompress("run", "gptq-w4a16", *arguments, "--set", "evaluation.gate={kl_mean: 1.0e-9}")
    assert code == REFUSED == 3
    assert "kl_mean is" in said
    assert "at most 1e-09" in said
    assert (tmp_path / "out" / "eval_results.json").is_file()


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_the_other_commands_too(refused, tmp_path, command):
    assert "There is no folder" in refused(command, tmp_path / "nowhere")


def test_a_baseline_with_another_vocabulary(refused, saved_llama, tiny, ids):
    said = refused("eval", saved_llama, "--baseline", tiny, "--data", ids)
    assert "vocabulary" in said


def test_a_damaged_manifest(refused, tmp_path):
    make_model(CONFIGS["llama"]()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "hfcompress.json").write_text("{")
    assert "is damaged" in refused("inspect", tmp_path / "model")


# what is measured, compared and pushed


@pytest.mark.parametrize("command", ["run", "eval"])
def test_an_unknown_measurement(refused, tiny, tmp_path, command):
    subject = ["gptq-w4a16", "--output", tmp_path / "out"] if command == "run" else [tiny]
    said = refused(command, *subject, "--measure", "quality,stabilty")
    assert "There is no measurement 'stabilty'; there are quality, tasks, " in said
    assert "Did you mean 'stability'?" in said


def test_a_task_that_is_not_there(refused, tiny, tmp_path):
    assert "continuaton" in refused("eval", tiny, "--samples", 1, "--tasks", "continuaton")
    assert "mine.yaml" in refused("eval", tiny, "--samples", 1, "--tasks", tmp_path / "mine.yaml")


def test_a_plot_that_cannot_be_written(refused, tiny, tmp_path):
    assert "--plot" in refused("compare", tiny, "--plot", tmp_path / "none" / "plot.png")


def test_comparing_what_is_not_there(refused, tiny, tmp_path):
    assert "There is no folder" in refused("compare", tiny, tmp_path / "none", "--plot", tmp_path / "plot.png")


def test_saving_in_a_model_of_others(refused, tiny):
    assert "was not made by hfcompress, so nothing can be saved in it" in refused("eval", tiny, "--save")


def test_a_teacher_cache_that_is_a_file(refused, tiny, tmp_path):
    (tmp_path / "cache").write_text("mine")
    said = refused("eval", tiny, "--samples", 1, "--teacher-cache", tmp_path / "cache")
    assert "cache cannot be a folder: a file is in its place; choose another one." in said


def test_measuring_without_an_evaluation(refused, tmp_path):
    for asked in (["--measure", "speed"], ["--tasks", "continuation"]):
        said = refused("run", "w4a16-fast", "--no-eval", *asked, "--output", tmp_path / "out")
        assert "Measurements are asked for, which needs the evaluation; leave out --no-eval" in said


def test_a_task_is_looked_up_before_the_work(refused, tmp_path):
    assert "mine.yaml" in refused("run", "w4a16-fast", "--tasks", "mine.yaml", "--output", tmp_path / "out")


def test_names_are_no_markup(hfcompress, tiny_w4, tmp_path, capsys):
    """A path or a layer's name may hold brackets, and a manifest may come from anyone."""
    folder = tmp_path / "out[v1]"
    shutil.copytree(tiny_w4.output_dir, folder)
    manifest = json.loads((folder / "hfcompress.json").read_text())
    manifest["linears"][0]["name"] = "[/red]x"
    (folder / "hfcompress.json").write_text(json.dumps(manifest))
    assert _guarded(app, ["inspect", str(folder)]) == OK
    out = capsys.readouterr().out
    assert "[/red]x" in out
    assert "out[v1]" in out


def test_json_that_cannot_be_written_by_inspect(refused, tiny, tmp_path):
    assert "--json" in refused("inspect", tiny, "--json", tmp_path / "none" / "a.json")


def test_logits_that_overflow(refused, tmp_path):
    model = make_model(CONFIGS["llama"]())
    model.lm_head.weight.data *= 60000 / model.lm_head.weight.abs().max()
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", token_ids(2, 16))
    said = refused(
        "eval",
        tmp_path / "model",
        "--baseline",
        tmp_path / "model",
        "--data",
        tmp_path / "ids.npy",
        "--dtype",
        "float16",
    )
    assert "are not finite in float16; give --dtype float32 or bfloat16." in said


def test_verifying_without_an_original(refused, tmp_path):
    said = refused("run", "w4a16-fast", "--verify", "--output", tmp_path / "out")
    assert "--verify needs a checkpoint to compare with" in said


def test_a_manifest_that_is_no_manifest(refused, tiny, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "hfcompress.json").write_text('{"base": []}')
    for command in (["run", tmp_path / "made"], ["push", tmp_path / "made", "me/it"]):
        assert "is damaged; download or copy that file again" in refused(*command)


def test_a_recipe_that_may_be_on_the_hub_while_offline(refused, tmp_path):
    said = refused("run", "someone/something", "--output", tmp_path / "out")
    assert "someone/something is not a folder here, and the Hub cannot be reached" in said


def test_an_interrupted_push_says_how_it_goes_on(hfcompress, tiny_w4, monkeypatch):
    from hfcompress import publishing

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "push", interrupted)
    code, said = hfcompress("push", tiny_w4.output_dir, "me/w4")
    assert code == INTERRUPTED
    assert f"is complete, and `hfcompress push {tiny_w4.output_dir} me/w4` goes on." in said


def test_a_measurement_that_fails_costs_no_weights(hfcompress, tmp_path, monkeypatch):
    """What was solved is kept, and --resume only measures."""
    from hfcompress import HfcompressError, compression

    original = compression.measure_all

    def failing(*_):
        raise HfcompressError("It cannot be measured.")

    monkeypatch.setattr(compression, "measure_all", failing)
    code, said = hfcompress("run", "w4a16-fast", "--output", tmp_path / "out")
    assert code == USER_ERROR
    assert "It cannot be measured. The weights are done: put that right, and go on with --resume." in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(compression, "measure_all", original)
    assert hfcompress("run", "w4a16-fast", "--output", tmp_path / "out", "--resume")[0] == OK
    assert json.loads((tmp_path / "out" / "hfcompress.json").read_text())["witness"]
