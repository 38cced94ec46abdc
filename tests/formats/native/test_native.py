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
"""The native format as users meet it: with the plug-in, without it, exported, measured, told apart from others."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CONFIGS, StopAfter, digest, in_fresh_process, make_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.cli import USER_ERROR, _guarded, app
from hfcompress.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.formats.native import numbers
from hfcompress.formats.native.vectors import VectorCodes
from hfcompress.formats.reading import decoded
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.pattern import Pattern


CODED, LOSSLESS, CODEBOOK, VECTORS = hfc.Entropy(bits=3.0), hfc.Lossless(), hfc.Codebook(bits=3), hfc.VQ(bits=2)
FACTORS = hfc.LowRank(ratio=0.6)
STEPS = {"coded": CODED, "lossless": LOSSLESS, "codebook": CODEBOOK, "vectors": VECTORS, "factors": FACTORS}
SHARED = hfc.Share(blocks=0.5, rank=4)
STEPS["shared"] = SHARED
ALONE = list(STEPS.values())
STEPS["groups"] = hfc.Codebook(bits=2, group_size=16, rounds=1)
STEPS["constrained"] = hfc.VQ(bits=4, length=2, rate=3.0, rounds=1)
STEPS["embeddings"] = hfc.Entropy(bits=4.0, targets=("embed_tokens",)) >> hfc.VQ(bits=2, rounds=1)
STEPS["books"] = hfc.VQ(bits=2, rounds=1, rows=48)
STEPS["wide numbers"] = hfc.VQ(bits=2.5, length=4, rounds=1)
STEPS["both as vectors"] = hfc.VQ(bits=2, rounds=1, targets=("Linear", "embed_tokens"))
CODES = [name for name in STEPS if name != "lossless"]
IDS = torch.from_numpy(token_ids(8, 32)).long()
LOADED = """
import json, sys
import hfcompress.integrations.transformers
import numpy as np, torch
from transformers import AutoModelForCausalLM
made, out, *names = sys.argv[1:]
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{made}/{name}", dtype=torch.float32).eval()
    with torch.no_grad():
        np.save(f"{out}/{name}.npy", model(torch.arange(24)[None]).logits.numpy())
    model.save_pretrained(f"{out}/{name}")
print(json.dumps("loaded"))
"""


@torch.no_grad()
def logits(folder):
    """By plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(24)[None]).logits


@pytest.fixture(scope="module", params=["llama", "qwen3-mixed", "gemma3", "opt"])
def made(request, tmp_path_factory):
    """A model of some architecture, and what each recipe makes of it."""
    parent = tmp_path_factory.mktemp(request.param)
    model = make_model(CONFIGS[request.param](), torch.bfloat16)
    model.resize_token_embeddings(512)  # enough to be worth a table
    model.save_pretrained(parent / "base")
    options = {"evaluate": False, "calibration": IDS}
    for name, step in STEPS.items():
        hfc.compress(str(parent / "base"), step, parent / name, **options)
    return parent


def test_transformers_loads_and_saves_what_was_solved(made, tmp_path):
    """The format itself in a process that knows nothing but the plug-in, against a dense export and the original."""
    in_fresh_process(LOADED, str(made), str(tmp_path), *STEPS)
    others = {"lossless": made / "base"}
    for name in CODES:
        others[name] = hfc.export(made / name, "dense", tmp_path / f"dense-{name}", dtype="float32").output_dir
    for name, other in others.items():
        assert torch.equal(torch.from_numpy(np.load(tmp_path / f"{name}.npy")), logits(other))
        assert torch.equal(logits(tmp_path / name), logits(other))


def test_lossless_is_the_original_bit_for_bit(made, tmp_path):
    assert hfc.export(made / "lossless", "dense", tmp_path / "dense").made["lossless"]
    before, after = (load_file(folder / "model.safetensors") for folder in (made / "base", tmp_path / "dense"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key].view(torch.uint8), value.view(torch.uint8)) for key, value in before.items())
    assert Checkpoint.open(made / "lossless").size_bytes < Checkpoint.open(made / "base").size_bytes


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (CODED, "AutoModelForCausalLM"),
        (LOSSLESS, "LlamaForCausalLM"),
        (CODEBOOK, "AutoModelForCausalLM"),
        (VECTORS, "AutoModelForCausalLM"),
        (FACTORS, "AutoModelForCausalLM"),
        (SHARED, "LlamaForCausalLM"),
    ],
)
def test_without_the_plugin_it_is_refused(tiny, tmp_path, recipe, kind):
    hfc.compress(None, recipe, tmp_path / "made", evaluate=False, calibration=IDS)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "hfcompress", "version": 1}
    code = f"import sys, transformers\ntransformers.{kind}.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "made")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"},
    )
    assert done.returncode != 0
    assert "mismatch" in done.stderr
    assert "hfcompress" in done.stderr  # which transformers does not know


def test_a_rate_that_tables_alone_exceed_is_told(tmp_path):
    model = make_model(CONFIGS["llama"](), torch.float32)
    step = hfc.VQ(bits=4, length=2, rate=0.5, rounds=0)
    made = hfc.compress(model, step, tmp_path / "made", evaluate=False, calibration=IDS)
    told = [row["fallback"] for row in made.manifest["linears"]]
    assert all(f"bits a weight, where {step.rate:g} were asked for: see vq.rate" in each for each in told)


def test_a_run_goes_on_and_ends_with_the_same_bytes(made, tmp_path):
    options = {"evaluate": False, "calibration": IDS}
    for name, step in STEPS.items():
        with pytest.raises(KeyboardInterrupt):
            hfc.compress(str(made / "base"), step, tmp_path / name, progress=StopAfter(2), **options)
        hfc.compress(str(made / "base"), step, tmp_path / name, resume=True, **options)
        assert digest(tmp_path / name) == digest(made / name)


def test_it_is_measured_as_loaded_and_the_card_says_how(tiny, tmp_path):
    calibration, evaluation = (np.load(tiny / f"{name}.npy") for name in ("calibration", "evaluation"))
    data = {
        "calibration": torch.as_tensor(calibration[:8]).long(),
        "eval_data": torch.as_tensor(evaluation[:8]).long(),
    }
    found = hfc.compress(None, CODED, tmp_path / "out", **data)
    fixed = hfc.compress(
        None, hfc.GPTQ(bits=3, group_size=128, damping=0.03, shift=1.0, curvature=True), tmp_path / "w3", **data
    )
    linears, bytes_ = (found.manifest["linears"], fixed.manifest["linears"])
    assert sum(row["bytes"] for row in linears) < sum(row["bytes"] for row in bytes_)
    assert found.report["kl_mean"] < 0.6 * fixed.report["kl_mean"]
    weights = sum(np.prod(row["shape"]) for row in linears)
    assert 8 * sum(row["bytes"] for row in linears) / weights == pytest.approx(3.0, rel=0.01)
    assert len({round(row["bits"], 2) for row in linears}) > 5  # more where it counts
    assert found.report["size_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import hfcompress.integrations.transformers" in card
    assert "vllm serve" not in card
    assert "28 of its 29 linears in 3-bit weights" in card
    assert re.search(r"28 linears: entropy, [\d.]+ to [\d.]+ bits, 3 on average, a step for each row and column", card)
    assert "- 3-bit\n- w3a16\n" in card
    assert "entropy, 3 bits" in (tmp_path / "out" / "report.html").read_text()
    assert _guarded(app, ["inspect", str(tmp_path / "out")]) == 0
    plan = hfc.plan(None, CODED, calibration=data["calibration"])
    assert plan.output_bytes == pytest.approx(found.report["size_bytes"], rel=0.01)


@pytest.mark.parametrize(
    "step", [hfc.Entropy(shift=0.0), hfc.Codebook(shift=0.0), hfc.VQ(bits=4, length=1, shift=0.0)]
)
def test_zeros_survive_and_take_next_to_nothing(saved_llama, tmp_path, step):
    options = {"evaluate": False, "calibration": IDS}
    found = hfc.compress(str(saved_llama), hfc.Sparsify("2:4") >> step, tmp_path / "coded", **options)
    assert all(row["sparsity"] >= 0.5 and row["pattern"] == "2:4" for row in found.manifest["linears"])
    hfc.export(tmp_path / "coded", "dense", tmp_path / "dense", dtype="float32")
    weight = load_file(tmp_path / "dense" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert Pattern.parse("2:4").holds(weight)


def test_a_rotated_model_is_coded_too(saved_llama, tmp_path):
    steps = hfc.Rotate(when="always") >> CODED
    found = hfc.compress(str(saved_llama), steps, tmp_path / "coded", evaluate=False, calibration=IDS)
    assert {row["type"] for row in found.manifest["linears"]} == {"coded"}


@pytest.mark.parametrize("other", [hfc.AWQ(), hfc.GPTQ(), hfc.KVCache(), hfc.Tune(), hfc.QAT()])
@pytest.mark.parametrize("step", ALONE)
def test_what_cannot_stand_beside_it_is_told(step, other):
    if other.name == "qat" and step.trainable:
        assert hfc.Job.of(step >> other).steps
        return
    with pytest.raises(
        InvalidValueError, match=f"{step.name} can stand beside .*, and not beside {other.name}; leave one"
    ):
        hfc.Job.of(step >> other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["entropy-2.5bit", "--set", "format=gptq"], "gptq has no place for entropy-coded weights, which"),
        (["entropy-2.5bit", "--set", "entropy.bits=9"], "entropy.bits is 9; it must lie above 0 and not above 6"),
        (["entropy-2.5bit", "--set", "entropy.bits=0"], "entropy.bits is 0; it must lie above 0"),
        (["entropy-2.5bit", "--set", "entropy.shift=2"], "entropy.shift is 2.0; it must lie between 0 and 1"),
        (["codebook-3bit", "--set", "codebook.damping=2"], "codebook.damping is 2.0; it must lie between 0 and 1"),
        (["codebook-3bit", "--set", "codebook.bits=5"], "codebook.bits is 5; it must be one of 1, 2, 3, 4"),
        (["codebook-3bit", "--set", "codebook.rounds=-1"], "codebook.rounds is -1; it must not be negative"),
        (["codebook-3bit", "--set", "format=gptq"], "gptq has no place for codebooks, which"),
        (["vq-2bit", "--set", "format=gptq"], "gptq has no place for vectors, which"),
        (
            ["vq-2bit", "--set", "vq.bits=4", "--set", "vq.length=8"],
            "vq.bits 4 for vectors of 8 from 1 tables would take 32 bits a number",
        ),
        (
            ["vq-2bit", "--set", "vq.bits=2.3"],
            "choose bits, length and tables so that bits * length / tables is a whole",
        ),
        (
            ["vq-2bit", "--set", "vq.rate=3"],
            "vq.rate is 3, with vq.bits 2 and 1 tables, numbers taking 8 bits; it is for one table and numbers of at",
        ),
        (["vq-2bit", "--set", "vq.rows=0"], "vq.rows is 0; it must be positive"),
        (["vq-2bit", "--set", "vq.start=x"], "vq.start is 'x'; choose k-means++ or split"),
        (["codebook-3bit", "--set", "codebook.group_size=7"], "codebook.group_size is 7; it must be one of -1, 16"),
        (["codebook-3bit", "--set", "codebook.start=x"], "codebook.start is 'x'; it must be one of"),
        (["vq-2bit", "--set", "vq.tables=9"], "vq.tables is 9; it must be from 1 to 8"),
        (["vq-2bit", "--set", "vq.shift=2"], "vq.shift is 2.0; it must lie between 0 and 1"),
        (["vq-2bit", "--set", "vq.seed=-1"], "vq.seed is -1; it must not be negative"),
        (["shared-layers", "--set", "share.blocks=0.7"], "share.blocks is 0.7; it must lie above 0 and not above 0.5"),
        (["shared-layers", "--set", "share.rank=0"], "share.rank is 0; it must be at least 1"),
        (["shared-layers", "--set", "share.shift=-1"], "share.shift is -1.0; it must lie between 0 and 1"),
        (
            ["shared-layers", "--set", "share.overrides={q_proj: {rank: 4}}"],
            "share takes no overrides: a block leans on",
        ),
        (["lowrank-80", "--set", "format=gptq"], "gptq has no place for factors, which"),
        (["lowrank-80", "--set", "lowrank.ratio=1"], "lowrank.ratio is 1; it must lie above 0 and below 1"),
        (["lowrank-80", "--set", "lowrank.multiple=0"], "lowrank.multiple is 0; it must be at least 1"),
        (["lowrank-80", "--set", "lowrank.shrinkage=2"], "lowrank.shrinkage is 2.0; it must lie between 0 and 1"),
        (["w4a16-fast", "--set", "format=hfcompress"], "hfcompress is not for fixed grids, and"),
    ],
)
def test_what_does_not_fit_is_told(options, said, tmp_path, capsys):
    assert _guarded(app, ["run", *options, "--output", str(tmp_path / "out")]) == USER_ERROR
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [hfc.VQ(shift=0.0), hfc.LowRank(shift=0.0), hfc.Share(shift=0.0)])
def test_vectors_and_factors_keep_no_zeros(step):
    with pytest.raises(
        InvalidValueError, match=f"{step.name} does not keep zeros; leave out sparsify, or take entropy"
    ):
        hfc.Job.of(hfc.Sparsify("2:4") >> step)


@pytest.mark.parametrize(
    ("step", "grid", "most", "said"),
    [
        (
            CODEBOOK,
            hfc.GPTQ(bits=3, group_size=-1, damping=0.03, shift=1.0),
            0.85,
            "codebook, 3 bits, levels of each row",
        ),
        (VECTORS, hfc.GPTQ(bits=2, group_size=64, damping=0.1, shift=1.0), 0.8, "vq, 2 bits, vectors of 4"),
    ],
)
def test_levels_and_vectors_beat_a_grid(tiny, tmp_path, step, grid, most, said):
    calibration, evaluation = (np.load(tiny / f"{name}.npy") for name in ("calibration", "evaluation"))
    data = {
        "calibration": torch.as_tensor(calibration[:8]).long(),
        "eval_data": torch.as_tensor(evaluation[:8]).long(),
    }
    found = hfc.compress(None, step, tmp_path / "out", **data)
    other = hfc.compress(None, grid, tmp_path / "grid", **data)
    assert found.report["kl_mean"] < most * other.report["kl_mean"]
    expected = hfc.plan(None, step, calibration=data["calibration"]).output_bytes
    assert 0.95 * expected < found.report["size_bytes"] <= expected  # less where entropy coding pays
    assert f"28 linears: {said}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("step", "local", "what"),
    [
        (CODEBOOK, "_codebook", "on codebooks"),
        (VECTORS, "_vectors", "of vectors"),
        (hfc.LowRank(ratio=0.6, curvature=False), "_right", "of two factors"),
    ],
)
def test_damaged_levels_and_vectors_are_told(tiny, tmp_path, step, local, what):
    calibration = torch.as_tensor(np.load(tiny / "calibration.npy")[:2]).long()
    hfc.compress(None, step, tmp_path / "made", evaluate=False, calibration=calibration)
    stem = "model.layers.0.mlp.up_proj.weight"
    whole = load_file(tmp_path / "made" / "model.safetensors")
    cuts = [(local, lambda t: t[:, :-1]), (local, lambda t: t[:-1]), ("", lambda t: t[:-1])]
    for changed, cut in cuts[1:2] if local == "_right" else cuts:  # of factors, only what they share can disagree
        tensors = {**whole, f"{stem}{changed}": cut(whole[f"{stem}{changed}"]).contiguous()}
        save_file(tensors, tmp_path / "made" / "model.safetensors", metadata={"format": "pt"})
        made = Checkpoint.open(tmp_path / "made")
        said = f"(A weight {what} is|An entropy-coded tensor is|of a codebook are) damaged; download or copy"
        with pytest.raises(CheckpointError, match=said):
            decoded(made.tensors, made.quantization_config)[stem].read()


def test_a_block_that_leans_on_one_that_leans_is_told(tiny, tmp_path):
    calibration = torch.as_tensor(np.load(tiny / "calibration.npy")[:2]).long()
    hfc.compress(None, hfc.Share(), tmp_path / "made", evaluate=False, calibration=calibration)
    file = tmp_path / "made" / "model.safetensors"
    whole = load_file(file)
    [name, *_] = [key for key in whole if key.endswith("weight_base")]
    own = int(name.split(".")[2])
    for other in (own, 99):  # itself, and a block that there is not
        save_file({**whole, name: torch.tensor([other])}, file, metadata={"format": "pt"})
        made = Checkpoint.open(tmp_path / "made")
        with pytest.raises(CheckpointError, match="does not hold what its quantization_config promises"):
            decoded(made.tensors, made.quantization_config)


def test_a_single_block_has_none_to_lean_on(tmp_path):
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    with pytest.raises(InvalidValueError, match="share needs a model of at least two blocks; leave the step out"):
        hfc.compress(make_model(config), SHARED, tmp_path / "out", calibration=IDS)


def test_numbers_of_no_shape_are_told(tiny, tmp_path):
    calibration = torch.as_tensor(np.load(tiny / "calibration.npy")[:2]).long()
    step = hfc.VQ(bits=2, rounds=0)
    hfc.compress(None, step, tmp_path / "made", evaluate=False, calibration=calibration)
    file = tmp_path / "made" / "model.safetensors"
    whole = load_file(file)
    [name, *_] = [key for key in whole if key.endswith("weight_shape")]
    save_file({**whole, name: torch.tensor([1])}, file, metadata={"format": "pt"})
    made = Checkpoint.open(tmp_path / "made")
    with pytest.raises(CheckpointError, match="does not hold what its quantization_config promises"):
        decoded(made.tensors, made.quantization_config)


def test_a_conv1d_is_refused(tmp_path):
    with pytest.raises(InvalidValueError, match=r"hfcompress cannot hold .*c_attn: it is a Conv1D"):
        hfc.compress(make_model(CONFIGS["gpt2"]()), CODED, tmp_path / "out", calibration=IDS)


def test_what_other_formats_cannot_take_over_is_told(saved_llama, tmp_path):
    options = {"evaluate": False, "calibration": IDS}
    hfc.compress(str(saved_llama), CODED, tmp_path / "coded", **options)
    hfc.compress(str(saved_llama), LOSSLESS, tmp_path / "lossless", **options)
    with pytest.raises(InvalidValueError, match="gptq has no place for entropy-coded weights"):
        hfc.export(tmp_path / "coded", "gptq", tmp_path / "out")
    with pytest.raises(InvalidValueError, match=r"holds the values of the original.*give --format dense"):
        hfc.export(tmp_path / "lossless", "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_bits_are_told_as_a_fallback(saved_llama, tmp_path):
    step = hfc.Entropy(bits=0.1, allocation="uniform")
    found = hfc.compress(str(saved_llama), step, tmp_path / "out", evaluate=False, calibration=IDS)
    assert all("every weight is rounded to zero" in row["fallback"] for row in found.manifest["linears"])


def test_a_later_version_and_a_damaged_file_are_told(tiny, tmp_path):
    hfc.compress(None, LOSSLESS, tmp_path / "made", evaluate=False)
    made = Checkpoint.open(tmp_path / "made")
    with pytest.raises(UnsupportedModelError, match=r"is in version 2 of the format hfcompress.*update hfcompress"):
        decoded(made.tensors, {**made.quantization_config, "version": 2})
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    tensors[name][0] = int(tensors[name][0]) ^ 1
    save_file(tensors, tmp_path / "made" / "model.safetensors", metadata={"format": "pt"})
    again = Checkpoint.open(tmp_path / "made")
    with pytest.raises(CheckpointError, match="An entropy-coded tensor is damaged; download or copy its file again"):
        decoded(again.tensors, again.quantization_config)[name].read()
    tensors.pop(f"{name}_bfloat16")
    save_file(tensors, tmp_path / "made" / "model.safetensors", metadata={"format": "pt"})
    again = Checkpoint.open(tmp_path / "made")
    with pytest.raises(CheckpointError, match="does not hold what its quantization_config promises"):
        decoded(again.tensors, again.quantization_config)


def test_a_correction_of_low_rank_stands_beside_vectors(tiny, tmp_path):
    calibration, evaluation = (np.load(tiny / f"{name}.npy") for name in ("calibration", "evaluation"))
    data = {
        "calibration": torch.as_tensor(calibration[:12]).long(),
        "eval_data": torch.as_tensor(evaluation[:4]).long(),
    }
    steps = hfc.VQ(bits=2, rounds=1) >> hfc.LoRA(steps=4, held_out=4)
    found = hfc.compress(None, steps, tmp_path / "out", **data)
    assert found.report["with_adapter"]["kl_mean"] < 0.9 * found.report["kl_mean"]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("import hfcompress.integrations.transformers") < card.index("PeftModel.from_pretrained")


def test_books_that_rows_cannot_be_divided_into_are_told():
    """Eight rows make four books of two, or eight of one, and never five."""
    grid = Grid(0, 2, type="vector", rate=1.0)
    codes, scales = torch.zeros(8, 3, 1, dtype=torch.uint8), torch.ones(8, 1).half()
    stored = VectorCodes().pack(QuantizedWeight(codes, scales, None, grid, vectors=torch.rand(4, 1, 4, 2).half()))
    assert VectorCodes().unpack(stored, grid).vectors.shape == (4, 1, 4, 2)
    damaged = {**stored, "weight_vectors": torch.rand(5, 1, 4, 2).half()}
    damaged |= numbers.packed(codes.flatten(1), 2, damaged["weight_vectors"])
    with pytest.raises(CheckpointError, match="A weight of vectors is damaged; download or copy its file again"):
        VectorCodes().unpack(damaged, grid)
