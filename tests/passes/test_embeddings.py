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
"""Quantized input embeddings: what is written is what transformers loads, and what everything else is solved on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, StopAfter, in_fresh_process, make_model, token_ids
from safetensors.torch import load_file

import hfcompress as hfc
from hfcompress.cli import USER_ERROR, _guarded, app
from hfcompress.evaluation.inspection import inspect_checkpoint
from hfcompress.evaluation.logits import open_streamed
from hfcompress.formats import get_format
from hfcompress.formats.reading import decoded
from hfcompress.formats.stored import PackedTensor
from hfcompress.hub import reload
from hfcompress.hub.reload import STREAMED, WHOLE, _difference, check_reload
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.manifest import MANIFEST
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.forecast import Forecast
from hfcompress.passes.plan import make_plan
from hfcompress.passes.statistics import Statistics


LOGITS = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        np.save(folder + "/logits.npy", model(input_ids=torch.from_numpy(np.load(sys.argv[2]))).logits.numpy())
print(json.dumps([name for name in sys.modules if name.startswith("hfcompress.")]))
"""
IDS = token_ids(2, 16, seed=1)
EMBEDDINGS = ("embed_tokens",)
BOTH = ("Linear", *EMBEDDINGS)
FOUR, EIGHT = {"bits": 4, "group_size": 32}, {"bits": 8, "group_size": -1}
ONE_GRID = hfc.GPTQ(**FOUR) >> hfc.RTN(**FOUR, targets=EMBEDDINGS)
# name -> (architecture, tied, recipe, format)
CASES = {
    "untied": ("llama", False, hfc.RTN(**EIGHT, targets=(*BOTH, "lm_head")), "compressed-tensors"),
    "tied": ("llama", True, ONE_GRID, "compressed-tensors"),
    "asymmetric": ("llama", True, hfc.RTN(**FOUR, symmetric=False, targets=BOTH), "compressed-tensors"),
    "alone": ("llama", True, hfc.RTN(**EIGHT, targets=EMBEDDINGS), "compressed-tensors"),
    "bytes": (
        "llama",
        True,
        hfc.RTN(**FOUR, symmetric=False) >> hfc.RTN(bits=8, group_size=32, targets=EMBEDDINGS),
        "int-quantized",
    ),
    "dense": ("llama", True, hfc.RTN(**FOUR) >> hfc.RTN(**EIGHT, targets=EMBEDDINGS), "dense"),
    "scaled": ("gemma3", True, hfc.RTN(**FOUR, targets=BOTH), "compressed-tensors"),
    "positions": ("opt", True, hfc.RTN(**FOUR, targets=BOTH), "compressed-tensors"),
    "Conv1D": ("gpt2", True, hfc.RTN(**EIGHT, targets=("wte",)), "compressed-tensors"),
    "gguf": ("llama", True, hfc.RTN(**FOUR, targets=BOTH), "gguf"),
    "bfloat16": ("llama", True, hfc.RTN(**FOUR, targets=BOTH), "compressed-tensors"),
}
ROUNDED = {"gguf": torch.float16, "bfloat16": torch.bfloat16}


def model_of(name: str, tied: bool, dtype: torch.dtype = torch.float32):
    config = CONFIGS[name]()
    config.tie_word_embeddings = tied
    model = make_model(config, dtype)
    model.tie_weights()
    return model


def dtype_of(case: str) -> torch.dtype:
    return torch.bfloat16 if case == "bfloat16" else torch.float32


def run(model, recipe, output: Path, layout: str = "compressed-tensors", **options):
    job = hfc.Job(steps=hfc.Job.of(recipe).steps, format=layout)
    return hfc.compress(model, job, output, calibration=token_ids(9, 32), evaluate=False, **options)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor dense, by our own reader."""
    checkpoint = Checkpoint.open(folder)
    return {n: t.read() for n, t in decoded(checkpoint.tensors, checkpoint.quantization_config).items()}


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=torch.from_numpy(IDS)).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every case compressed, and its logits from plain transformers in one process without hfcompress."""
    parent = tmp_path_factory.mktemp("embeddings")
    results = {
        case: run(model_of(name, tied, dtype_of(case)), recipe, parent / case, layout)
        for case, (name, tied, recipe, layout) in CASES.items()
    }
    np.save(parent / "ids.npy", IDS)
    folders = [str(parent / case) for case in CASES]
    assert in_fresh_process(LOGITS, json.dumps(folders), str(parent / "ids.npy"), forbid="hfcompress") == []
    return results


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_was_solved(made, case):
    name, tied, _, layout = CASES[case]
    folder = made[case].output_dir
    model, weights = model_of(name, tied, dtype_of(case)), stored(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    model.tie_weights()
    table = model.get_input_embeddings().weight
    key = next(n for n, p in model.named_parameters() if p is table)
    before = table.detach().clone()
    if case in ROUNDED:  # transformers unpacks into the dtype of the scales
        packed = {row["name"] for row in made[case].manifest["linears"]}
        weights |= {f"{n}.weight": weights[f"{n}.weight"].to(ROUNDED[case]).float() for n in packed}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    row = made[case].manifest["linears"][0]
    error = ((table - before).norm() / before.norm()).item()
    assert error == pytest.approx(row["relative_weight_error"], rel=0.01)
    assert 0 < error < (0.015 if row["bits"] == 8 else 0.15)
    if tied:
        assert model.get_output_embeddings().weight is table
        assert "lm_head.weight" not in weights
    logits = torch.from_numpy(np.load(folder / "logits.npy"))
    torch.testing.assert_close(logits, logits_of(model), rtol=0, atol=2e-5)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    assert config.get("dequantize", False) == (layout != "dense")
    assert f"{row['name']}.weight" == key
    assert row["method"] == "rtn"
    assert row["relative_output_error"] is None
    assert row["shape"] == list(table.shape)
    assert row["bytes"] == sum(
        t.nbytes for n, t in load_file(folder / "model.safetensors").items() if n.startswith(f"{row['name']}.")
    )


@pytest.mark.parametrize("case", CASES)
def test_the_witness_saw_them(made, case):
    for mode in (WHOLE, STREAMED):
        assert _difference(made[case].output_dir, mode) < (0.05 if case in ROUNDED else 1e-4)


def test_the_check_before_a_push_knows_that_they_are_unpacked_in_the_models_dtype(made, monkeypatch):
    monkeypatch.setattr(reload, "_in_fresh_process", lambda folder, mode, trusted: _difference(folder, mode))
    found = check_reload(made["bfloat16"].output_dir, made["bfloat16"].manifest)
    assert reload.TOLERANCE < found.difference < 0.05


def test_they_are_smaller_and_are_forecast_to_the_byte(made):
    for case in ("untied", "tied", "bytes", "dense"):
        name, tied, recipe, layout = CASES[case]
        model = StreamedModel(Checkpoint.open(model_of(name, tied)))
        steps = hfc.Job.of(recipe).steps
        expected = Forecast(model, get_format(layout)).output_bytes(make_plan(model, steps, get_format(layout)))
        assert expected == (made[case].output_dir / "model.safetensors").stat().st_size
    [alone, tied] = [made[case].manifest["linears"][0]["bytes"] for case in ("alone", "tied")]
    # codes, scales of float32 and the shape of 128 by 64
    assert alone == 128 * 64 + 128 * 4 + 16
    assert tied == 128 * 64 // 2 + 128 * 2 * 4 + 16
    dense = sum(t.nbytes for t in Checkpoint.open(model_of("llama", True)).tensors.values())
    assert Checkpoint.open(made["alone"].output_dir).size_bytes < dense


def test_a_gguf_file_holds_them(made):
    gguf = pytest.importorskip("gguf")
    [path] = made["gguf"].output_dir.glob("*.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    values = gguf.quants.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert np.array_equal(values, stored(made["gguf"].output_dir)["model.embed_tokens.weight"].numpy())


def test_inspect_shows_them_without_a_manifest(made, tmp_path):
    folder = made["tied"].output_dir
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    [row] = [r for r in inspect_checkpoint(Checkpoint.open(tmp_path))["linears"] if "embed" in r["name"]]
    assert (row["bits"], row["group_size"], row["method"]) == (4, 32, "compressed-tensors")
    checkpoint = Checkpoint.open(folder)
    tensor = decoded(checkpoint.tensors, checkpoint.quantization_config)["model.embed_tokens.weight"]
    assert isinstance(tensor, PackedTensor)
    assert tensor.grid.bits == 4
    assert not open_streamed(checkpoint, "cpu", torch.float32).converts


@pytest.mark.parametrize(("case", "compressed", "linears"), [("untied", 22, 22), ("tied", 22, 22), ("alone", 1, 22)])
def test_the_card_and_the_manifest_tell_them_from_linears(made, case, compressed, linears):
    manifest = made[case].manifest
    assert manifest["embeddings"] == "model.embed_tokens"
    assert manifest["coverage"] == {"compressed": compressed, "linears": linears}
    card = (made[case].output_dir / "README.md").read_text()
    assert f"{compressed} of its {linears} linears and its embeddings in" in card
    assert "embeddings: round to nearest, " in card
    assert "everything else (norms" in card
    assert "vllm serve" not in card


def test_they_are_exported(made, tmp_path):
    source = made["tied"].output_dir
    for layout, options in (("int-quantized", {}), ("dense", {"dtype": "float32"}), ("pack-quantized", {})):
        said = hfc.export(source, layout, tmp_path / layout, **options).made
        assert said["lossless"]
        assert _difference(tmp_path / layout, WHOLE) < 1e-4
    assert (tmp_path / "pack-quantized" / "config.json").read_text() == (source / "config.json").read_text()
    with pytest.raises(hfc.HfcompressError, match="gptq has no place for quantized embeddings"):
        hfc.export(source, "gptq", tmp_path / "gptq")


# what else is solved on them


def test_the_linears_are_solved_on_the_rounded_embeddings(made, tmp_path):
    """Law 1: as if the model had come with them."""
    model = model_of("llama", True)
    ours = stored(made["tied"].output_dir)
    model.get_input_embeddings().weight.data.copy_(ours["model.embed_tokens.weight"])
    run(model, hfc.GPTQ(**FOUR), tmp_path / "out")
    expected = stored(tmp_path / "out")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_the_dense_stream_keeps_the_dense_embeddings(tmp_path, monkeypatch):
    crosses = []
    complete = Statistics.complete

    def noted(self, processes, name):
        complete(self, processes, name)
        if self.tokens == 9 * 32:  # not what is held out of them
            crosses.append((name, self.cross, self.gram))

    monkeypatch.setattr(Statistics, "complete", noted)
    monkeypatch.setattr(hfc.GPTQ, "needs_dense_stream", True)
    model = model_of("llama", False)
    run(model, ONE_GRID, tmp_path / "out")
    name, cross, gram = crosses[0]
    assert name == "model.layers.0.self_attn.q_proj"
    norm, ids = model.model.layers[0].input_layernorm, torch.from_numpy(token_ids(9, 32)).flatten()
    with torch.no_grad():
        dense = norm(model.model.embed_tokens.weight[ids])
        solved = norm(stored(tmp_path / "out")["model.embed_tokens.weight"][ids])
    torch.testing.assert_close(gram, solved.T @ solved / len(ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross, (dense - solved).T @ solved / len(ids), rtol=1e-4, atol=1e-5)
    assert cross.abs().max() > 1e-3


@pytest.mark.parametrize(("layout", "dense_stream"), [("compressed-tensors", True), ("dense", False)])
def test_a_run_goes_on(tmp_path, monkeypatch, layout, dense_stream):
    monkeypatch.setattr(hfc.GPTQ, "needs_dense_stream", dense_stream)
    model = model_of("llama", True, torch.bfloat16)
    whole = run(model, ONE_GRID, tmp_path / "whole", layout)
    with pytest.raises(KeyboardInterrupt):
        run(model, ONE_GRID, tmp_path / "out", layout, progress=StopAfter(1))
    result = run(model, ONE_GRID, tmp_path / "out", layout, resume=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for key in ("linears", "witness"):
        assert result.manifest[key] == whole.manifest[key]


@pytest.mark.parametrize("tied", [False, True])
def test_rotated_embeddings(tmp_path, tied):
    model = model_of("llama", tied)
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(0.5, 1.5, 64))  # so that a tied head gets its own weight
    result = run(model, hfc.Rotate(when="always") >> ONE_GRID, tmp_path / "out")
    assert result.manifest["rotation"]["hidden"]
    assert _difference(tmp_path / "out", WHOLE) < 1e-4
    weights = stored(tmp_path / "out")
    rotated, plain = weights["model.embed_tokens.weight"], model.model.embed_tokens.weight.detach()
    assert not torch.allclose(rotated, plain, atol=0.1)
    # a rotation keeps the angles between tokens
    torch.testing.assert_close(rotated @ rotated.T, plain @ plain.T, rtol=0, atol=0.1 * (plain @ plain.T).max().item())
    assert "lm_head.weight" in weights


# what is refused


REFUSED = {
    "gptq": (
        hfc.GPTQ(**FOUR, targets=BOTH),
        "compressed-tensors",
        r"gptq needs the inputs.*rtn with targets: \[embed_t",
    ),
    "static": (hfc.RTN(**EIGHT, activations="static", targets=BOTH), "compressed-tensors", "rounded inputs nowhere"),
    "float": (hfc.RTN(**EIGHT, type="float", targets=BOTH), "compressed-tensors", "float codes nowhere.*type is int"),
    "activations": (
        hfc.RTN(**EIGHT, activations="dynamic") >> hfc.RTN(**EIGHT, targets=EMBEDDINGS),
        "compressed-tensors",
        "rounds neither inputs.*take model.embed_tokens out of targets",
    ),
    "cache": (hfc.RTN(**EIGHT, targets=BOTH) >> hfc.KVCache(), "compressed-tensors", "key-value cache"),
    "grids": (
        hfc.RTN(**FOUR) >> hfc.RTN(**EIGHT, targets=EMBEDDINGS),
        "compressed-tensors",
        "only on the grid of the linears.*format=int-quantized",
    ),
    "float grids": (
        hfc.RTN(**EIGHT, type="float") >> hfc.RTN(**EIGHT, targets=EMBEDDINGS),
        "compressed-tensors",
        "only on the grid of the linears.*type alike",
    ),
    "groups": (hfc.RTN(**FOUR) >> hfc.RTN(**EIGHT, targets=EMBEDDINGS), "int-quantized", "only at the group_size"),
    "tied head": (
        hfc.RTN(**EIGHT, targets=("Linear", "lm_head")),
        "compressed-tensors",
        "lm_head shares its weight with the embeddings.*name model.embed_tokens",
    ),
    "budget": (
        hfc.Budget(target_bits=5, choices=("4g32", "8g32")) >> hfc.RTN(**FOUR, targets=BOTH),
        "compressed-tensors",
        "A budget gives linears grids of their own",
    ),
    **{
        layout: (hfc.RTN(**FOUR, targets=BOTH), layout, f"{layout} has no place for quantized embeddings")
        for layout in ("gptq", "gptq_v2", "awq")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_load_is_refused(tmp_path, case):
    recipe, layout, message = REFUSED[case]
    with pytest.raises(hfc.HfcompressError, match=message) as raised:
        run(model_of("llama", True), recipe, tmp_path / "out", layout)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_they_must_be_named(tmp_path):
    result = run(model_of("llama", False), hfc.RTN(**EIGHT), tmp_path / "out")
    assert not any("embed" in row["name"] for row in result.manifest["linears"])


def test_from_the_command_line(tmp_path, tiny, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("recipe:\n  - rtn: {targets: [embed_tokens], bits: 8, group_size: -1}\n")
    _guarded(app, ["run", str(recipe), "--output", str(tmp_path / "out"), "--no-eval"])
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert [row["name"] for row in manifest["linears"]] == ["model.embed_tokens"]
    assert _difference(tmp_path / "out", WHOLE) < 0.05
    assert Checkpoint.open(tmp_path / "out").size_bytes < Checkpoint.open(tiny).size_bytes - 1024 * 256 // 2
    recipe.write_text("recipe:\n  - gptq: {targets: [embed_tokens]}\n")
    capsys.readouterr()
    assert _guarded(app, ["run", str(recipe), "--output", str(tmp_path / "other")]) == USER_ERROR
    assert "error: gptq needs the inputs" in capsys.readouterr().err
