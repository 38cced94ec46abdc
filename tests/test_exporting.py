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
"""Runs in the formats of others, and exports from one format to another."""

import json

import pytest
import torch
from conftest import token_ids
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.cli import OK, USER_ERROR, _guarded, app
from hfcompress.errors import InvalidValueError, MissingExtraError, OutputError, UnsupportedModelError
from hfcompress.evaluation.comparison import whole_model
from hfcompress.evaluation.inspection import inspect_checkpoint
from hfcompress.evaluation.logits import open_streamed
from hfcompress.formats.reading import decoded, missing_packages
from hfcompress.formats.writer import partial_path
from hfcompress.hub.reload import READ, _difference, _mode, check_reload
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.manifest import MANIFEST, format_of, read_manifest
from hfcompress.recipes import Job


IDS = token_ids(4, 24)
NEW = ("gptq", "gptq_v2", "awq")


def weights(folder):
    """The dense values of every tensor, whatever the format."""
    checkpoint = Checkpoint.open(folder)
    return {n: t.read().float() for n, t in decoded(checkpoint.tensors, checkpoint.quantization_config).items()}


def logits(folder):
    model = open_streamed(Checkpoint.open(folder), "cpu", torch.float32)
    [stream] = model.forward_blocks(model.embed([Batch(torch.from_numpy(IDS))]))
    with model.outside(head=True) as outside:
        return model.logits(outside, stream)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def compressed(model, output, layout, dtype=None, evaluate=False, **settings):
    recipe = hfc.RTN(**{"bits": 4, "group_size": 32, **settings})
    return hfc.compress(model, Job(steps=(recipe,), format=layout), output, evaluate=evaluate, eval_data=IDS)


@pytest.fixture
def llama16(llama, tmp_path):
    """The tiny random Llama as a folder in bfloat16, as most models are."""
    folder = tmp_path / "llama16"
    llama.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def packed(llama16, tmp_path):
    """It, compressed and measured, in compressed-tensors."""
    return compressed(llama16, tmp_path / "packed", "compressed-tensors", evaluate=True).output_dir


# runs


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", NEW)
def test_a_run_is_measured_as_reloaded_and_says_what_the_solved_model_said(llama16, tmp_path, layout, symmetric):
    done = compressed(llama16, tmp_path / "out", layout, evaluate=True, symmetric=symmetric)
    assert 0 < done.report["kl_mean"] < 1
    assert len(done.report["generations"][0]["compressed"].split()) > 1
    again = hfc.evaluate(done.output_dir, data=IDS)
    assert again["kl_mean"] == pytest.approx(done.report["kl_mean"], abs=1e-9)
    assert _difference(done.output_dir, READ) < 1e-4
    config = json.loads((done.output_dir / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == layout.partition("_")[0]
    assert (done.output_dir / "quantize_config.json").is_file() == (layout != "awq")
    card = (done.output_dir / "README.md").read_text()
    assert "pip install gptqmodel" in card
    assert f"- {config['quant_method']}\n" in card
    assert "compressed-tensors`" not in card


@pytest.mark.parametrize("layout", NEW)
def test_inspect_knows_the_grid_without_a_manifest(llama16, tmp_path, layout):
    folder = compressed(llama16, tmp_path / "out", layout).output_dir
    (folder / MANIFEST).unlink()
    rows = {row["name"]: row for row in inspect_checkpoint(Checkpoint.open(folder))["linears"]}
    row = rows["model.layers.0.mlp.up_proj"]
    assert (row["method"], row["bits"], row["group_size"]) == (layout.partition("_")[0], 4, 32)
    assert row["bytes"] > 96 * 64 // 2
    assert rows["lm_head"]["method"] == "dense"


@pytest.mark.parametrize(
    ("layout", "settings", "said"),
    [
        ("awq", {"bits": 3}, "awq holds 4 bits"),
        ("gptq", {"ignore": ("up_proj",)}, "up_proj would stay dense"),
        ("awq", {"overrides": {"up_proj": {"group_size": -1}}}, "awq holds one grid"),
        ("gptq_v2", {"targets": ("Linear", "lm_head")}, "cannot hold lm_head"),
    ],
)
def test_what_such_a_format_cannot_hold_is_refused_before_the_work(llama16, tmp_path, layout, settings, said):
    with pytest.raises(InvalidValueError, match=said):
        compressed(llama16, tmp_path / "out", layout, **settings)
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()


@pytest.mark.skipif(not missing_packages({"quant_method": "gptq"}), reason="gptqmodel is here")
def test_what_runs_packed_weights_names_the_package_that_is_missing(llama16, tmp_path):
    checkpoint = Checkpoint.open(compressed(llama16, tmp_path / "out", "gptq").output_dir)
    with (
        pytest.raises(MissingExtraError, match=r"pip install gptqmodel.*hfcompress\[gptq\]"),
        whole_model(checkpoint, torch.device("cpu"), torch.float32, packed=True),
    ):
        pass


# exact exports


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_round_through_all_formats_changes_no_value(llama16, tmp_path, symmetric):
    first = compressed(llama16, tmp_path / "0", "compressed-tensors", symmetric=symmetric).output_dir
    expected, said = weights(first), logits(first)
    folder = first
    for number, layout in enumerate(["gptq", "awq", "gptq_v2", "int-quantized", "compressed-tensors"], 1):
        exported = hfc.export(folder, layout, tmp_path / str(number))
        assert exported.made["lossless"]
        assert exported.made["relative_weight_error"] == 0
        assert "kl_mean" not in exported.made
        folder = exported.output_dir
        assert same(weights(folder), expected)
        assert torch.equal(logits(folder), said)
        assert format_of(read_manifest(folder)) == layout
    assert [made["source_format"] for made in read_manifest(folder)["exports"]] == [
        "pack-quantized",
        "gptq",
        "awq",
        "gptq_v2",
        "int-quantized",
    ]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = loaded(input_ids=torch.from_numpy(IDS)).logits
    # where there are zero points transformers unpacks while loading, into the dtype of the scales
    assert torch.allclose(theirs, said, atol=1e-4 if symmetric else 1e-2)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_go_to_gptq_and_back(llama16, tmp_path, bits):
    first = compressed(llama16, tmp_path / "0", "int-quantized", bits=bits).output_dir
    second = hfc.export(first, "gptq", tmp_path / "1").output_dir
    third = hfc.export(second, "int-quantized", tmp_path / "2").output_dir
    assert same(weights(first), weights(second))
    codes = (
        Checkpoint.open(folder).tensors["model.layers.1.mlp.down_proj.weight"].read() for folder in (first, third)
    )
    assert torch.equal(*codes)


def test_an_exact_export_keeps_what_was_measured_of_the_values_and_can_be_pushed(packed, tmp_path):
    before = json.loads((packed / "eval_results.json").read_text())
    (packed / "eval_results.json").write_text(json.dumps({**before, "speed": {"of": "the old format"}}))
    folder = hfc.export(packed, "gptq", tmp_path / "made").output_dir
    report, manifest = json.loads((folder / "eval_results.json").read_text()), read_manifest(folder)
    assert report["kl_mean"] == before["kl_mean"]
    assert "speed" not in report
    assert report["size_bytes"] == Checkpoint.open(folder).size_bytes != before["size_bytes"]
    assert report["how"]["candidate_sha256"] == manifest["sha256"] == Checkpoint.open(folder).sha256
    assert hfc.evaluate(folder, data=IDS)["kl_mean"] == pytest.approx(before["kl_mean"], abs=1e-9)
    assert "measured before" in (folder / "README.md").read_text()
    rows = {row["name"]: row["bytes"] for row in manifest["linears"]}
    name = "model.layers.0.mlp.up_proj"
    parts = [t.nbytes for n, t in Checkpoint.open(folder).tensors.items() if n.startswith(f"{name}.")]
    assert rows[name] == sum(parts)
    if _mode(folder, False) == READ:
        found = check_reload(folder, manifest)
        assert found.difference < 1e-3
        assert "own reader" in found.how


def test_dense_in_float32_is_exact_and_loads_anywhere(packed, tmp_path):
    exported = hfc.export(packed, "dense", tmp_path / "made", dtype="float32")
    assert exported.made["lossless"]
    loaded = AutoModelForCausalLM.from_pretrained(exported.output_dir).eval()
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=torch.from_numpy(IDS)).logits, logits(packed), atol=1e-5)


def test_a_checkpoint_of_others_is_exported_without_a_manifest(packed, tmp_path):
    (packed / MANIFEST).unlink()
    exported = hfc.export(packed, "awq", tmp_path / "made")
    assert exported.made["lossless"]
    assert not (exported.output_dir / MANIFEST).exists()
    assert same(weights(exported.output_dir), weights(packed))


def test_rounded_activations_and_caches_are_taken_along_or_refused(llama16, tmp_path):
    job = Job(steps=(hfc.RTN(bits=8, group_size=-1, activations="static"), hfc.KVCache()))
    source = hfc.compress(llama16, job, tmp_path / "0", calibration=IDS, evaluate=False).output_dir
    exported = hfc.export(source, "int-quantized", tmp_path / "1")
    assert exported.made["lossless"]
    assert torch.equal(logits(exported.output_dir), logits(source))
    for layout, said in (("gptq", "gptq is not for int codes and rounded inputs"), ("dense", "dense has no place")):
        with pytest.raises(InvalidValueError, match=said):
            hfc.export(source, layout, tmp_path / "made")
    job = Job(steps=(hfc.RTN(bits=4, group_size=32), hfc.KVCache()))
    source = hfc.compress(llama16, job, tmp_path / "2", calibration=IDS, evaluate=False).output_dir
    with pytest.raises(InvalidValueError, match="awq has no place for the scales of the step kv_cache"):
        hfc.export(source, "awq", tmp_path / "made")


def test_float_codes_are_exported_as_they_are(llama16, tmp_path):
    job = Job(steps=(hfc.RTN(bits=8, group_size=-1, type="float"),))
    source = hfc.compress(llama16, job, tmp_path / "0", evaluate=False).output_dir
    exported = hfc.export(source, "float-quantized", tmp_path / "1")
    assert exported.made["lossless"]
    assert torch.equal(logits(exported.output_dir), logits(source))
    dense = hfc.export(source, "dense", tmp_path / "2", dtype="float32").output_dir
    assert same(weights(dense), weights(source))
    with pytest.raises(InvalidValueError, match="gptq is not for float codes"):
        hfc.export(source, "gptq", tmp_path / "made")


# one file of GGUF


def read_gguf(path):
    gguf = pytest.importorskip("gguf")
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in tensors}


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "awq"])
def test_gguf_from_any_format_holds_its_values(llama16, tmp_path, layout):
    source = compressed(llama16, tmp_path / "packed", layout).output_dir
    exported = hfc.export(source, "gguf", tmp_path / "made.gguf")
    assert exported.made["lossless"]
    found, expected = read_gguf(exported.output_dir), weights(source)
    assert found["blk.1.ffn_down.weight"].equal(expected["model.layers.1.mlp.down_proj.weight"])
    assert found["blk.0.ffn_up.weight"].equal(expected["model.layers.0.mlp.up_proj.weight"])
    assert exported.made["gguf"]["types"]["linears"] == {"Q4_0": 21}


def test_gguf_is_a_file_or_a_folder_with_one(packed, llama16, tmp_path, capsys):
    command = ["export", str(packed), "--format", "gguf", "--output"]
    assert _guarded(app, [*command, str(tmp_path / "folder"), "--json", str(tmp_path / "made.json")]) == OK
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model-q4_0.gguf"]
    assert json.loads((tmp_path / "made.json").read_text())["lossless"]
    assert "pack-quantized to gguf: the same values, bit for bit" in capsys.readouterr().out
    assert _guarded(app, [*command, str(tmp_path / "one.gguf")]) == OK
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "folder" / "model-q4_0.gguf").read_bytes()
    assert _guarded(app, [*command, str(tmp_path / "one.gguf")]) == USER_ERROR
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert _guarded(app, [*command, str(tmp_path / "folder")]) == USER_ERROR
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert _guarded(app, [*command, str(tmp_path / "one.gguf"), "--overwrite"]) == OK
    (tmp_path / "two.gguf").mkdir()
    assert _guarded(app, [*command, str(tmp_path / "two.gguf")]) == USER_ERROR
    assert "is a folder; choose another --output" in capsys.readouterr().err
    assert _guarded(app, [*command, str(tmp_path / "three"), "--dtype", "float16"]) == USER_ERROR
    assert "--dtype is for --format dense" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()
    plain = hfc.export(llama16, "gguf", tmp_path / "plain")
    assert plain.made["source_format"] == "dense"
    assert plain.made["lossless"]


def test_gguf_that_would_round_is_refused_or_made_when_asked_for(llama16, tmp_path, capsys):
    source = compressed(llama16, tmp_path / "packed", "int-quantized", bits=8, symmetric=False).output_dir
    with pytest.raises(UnsupportedModelError, match=r"asymmetric type of 8 bits.*--lossy"):
        hfc.export(source, "gguf", tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert not partial_path(tmp_path / "made").exists()
    command = ["export", str(source), "--format", "gguf", "--output", str(tmp_path / "made"), "--lossy"]
    assert _guarded(app, command) == OK
    assert "values of 21 linears changed" in capsys.readouterr().out
    made = read_gguf(next((tmp_path / "made").iterdir()))["blk.0.ffn_up.weight"]
    exact = weights(source)["model.layers.0.mlp.up_proj.weight"]
    assert 0 < (made - exact).norm() / exact.norm() < 0.01


# exports that lose something


def test_rounding_is_refused_and_when_asked_for_measured(packed, tmp_path):
    with pytest.raises(InvalidValueError, match=r"dense would round .*relative error.*--dtype float32.*--lossy"):
        hfc.export(packed, "dense", tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert not partial_path(tmp_path / "made").exists()
    exported = hfc.export(packed, "dense", tmp_path / "made", lossy=True, data=IDS)
    exact, now = weights(packed), weights(exported.output_dir)
    lost = sum((exact[n] - now[n]).double().square().sum() for n in exact if n.endswith("proj.weight"))
    whole = sum(exact[n].double().square().sum() for n in exact if n.endswith("proj.weight"))
    assert exported.made["relative_weight_error"] == pytest.approx(((lost / whole) ** 0.5).item(), rel=1e-6)
    log_p, log_q = (torch.log_softmax(logits(f).double(), -1)[:, :-1] for f in (packed, exported.output_dir))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert exported.made["kl_mean"] == pytest.approx(expected, rel=0.05, abs=1e-9)
    assert read_manifest(exported.output_dir)["exports"] == [exported.made]
    assert not (exported.output_dir / "eval_results.json").exists()
    card = (exported.output_dir / "README.md").read_text()
    assert "changed values" in card
    assert "What it costs" not in card


def test_scales_that_float16_cannot_hold(llama, tmp_path):
    """float32 scales are rounded; tiny ones vanish; huge ones cannot be written at all."""
    llama.save_pretrained(tmp_path / "llama")
    folder = compressed(tmp_path / "llama", tmp_path / "packed", "compressed-tensors").output_dir
    with pytest.raises(InvalidValueError, match=r"gptq would round .*choose another --format.*--lossy"):
        hfc.export(folder, "gptq", tmp_path / "made")
    exported = hfc.export(folder, "gptq", tmp_path / "made", lossy=True, evaluate=False)
    assert 1e-5 < exported.made["relative_weight_error"] < 5e-4
    assert exported.made["linears_changed"] == 21
    assert "kl_mean" not in exported.made
    llama.model.layers[0].mlp.up_proj.weight.data *= 1e7
    llama.save_pretrained(tmp_path / "huge")
    folder = compressed(tmp_path / "huge", tmp_path / "huge-packed", "compressed-tensors").output_dir
    with pytest.raises(InvalidValueError, match=r"cannot hold model.layers.0.mlp.up_proj: its scales are too large"):
        hfc.export(folder, "awq", tmp_path / "huge-made", lossy=True)


# bad input


def test_what_cannot_be_exported(packed, llama16, tmp_path):
    for model, layout, options, error, said in (
        (llama16, "gptq", {}, InvalidValueError, "plain weights.*hfcompress run"),
        (packed, "gptk", {}, InvalidValueError, "Did you mean 'gptq'"),
        (packed, "gptq", {"dtype": "float32"}, InvalidValueError, "--dtype is for --format dense"),
        (packed, "dense", {"dtype": "float8"}, InvalidValueError, "no dtype 'float8'"),
        (packed, "gptq", {"output_dir": packed}, OutputError, "model's own folder"),
        (packed, "gptq", {"output_dir": tmp_path}, OutputError, "model's own folder"),
    ):
        with pytest.raises(error, match=said):
            hfc.export(model, layout, **{"output_dir": tmp_path / "made", **options})
    assert not (tmp_path / "made").exists()
    eight = compressed(llama16, tmp_path / "eight", "compressed-tensors", bits=8).output_dir
    with pytest.raises(InvalidValueError, match="awq holds 4 bits"):
        hfc.export(eight, "awq", tmp_path / "made", lossy=True)
    part = compressed(llama16, tmp_path / "part", "compressed-tensors", ignore=("up_proj",)).output_dir
    with pytest.raises(InvalidValueError, match="up_proj would stay dense"):
        hfc.export(part, "gptq", tmp_path / "made")
    config = json.loads((packed / "config.json").read_text())
    for method in ("hqq", "bitsandbytes", "torchao"):
        config["quantization_config"]["quant_method"] = method
        (packed / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModelError, match=f"quantized by {method}, whose codes no other format takes"):
            hfc.export(packed, "gptq", tmp_path / "made")
        with pytest.raises(UnsupportedModelError, match=f"is quantized by {method}; GGUF is written from"):
            hfc.export(packed, "gguf", tmp_path / "made")


def test_the_command(packed, tmp_path, capsys):
    command = ["export", str(packed), "--format", "gptq", "--output", str(tmp_path / "made")]
    assert _guarded(app, [*command, "--json", str(tmp_path / "made.json")]) == OK
    assert "pack-quantized to gptq: the same values, bit for bit" in capsys.readouterr().out
    assert json.loads((tmp_path / "made.json").read_text())["lossless"]
    assert _guarded(app, command) == USER_ERROR
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert _guarded(app, [*command, "--overwrite"]) == OK
    assert _guarded(app, ["run", str(tmp_path / "made"), "--verify"]) == USER_ERROR
    assert "leave out --verify" in capsys.readouterr().err
    dense = ["export", str(packed), "--format", "dense", "--output", str(tmp_path / "dense"), "--lossy", "--no-eval"]
    assert _guarded(app, dense) == OK
    assert "values of 21 linears changed, relative weight error" in capsys.readouterr().out
