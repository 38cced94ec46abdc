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
"""Law 2: what is saved is what was solved. The consumer is plain transformers, in a process without hfcompress."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, in_fresh_process, make_model, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfcompress as hfc
from hfcompress.formats import get_format
from hfcompress.models.roles import set_weight
from hfcompress.solvers.grid import Grid


LOGITS = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
for job in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(np.load(job["ids"]))).logits
    np.save(job["logits"], logits.numpy())
print(json.dumps([name for name in sys.modules if name.startswith("hfcompress.")]))
"""
IDS = token_ids(2, 16, seed=1)


def reloaded_logits(folders: dict[str, Path], ids: np.ndarray) -> dict[str, torch.Tensor]:
    """The logits of each folder, from one fresh process that cannot import hfcompress."""
    parent = next(iter(folders.values())).parent
    np.save(parent / "ids.npy", ids)
    jobs = [
        {"folder": str(folder), "ids": str(parent / "ids.npy"), "logits": str(parent / f"{index}.npy")}
        for index, folder in enumerate(folders.values())
    ]
    assert in_fresh_process(LOGITS, json.dumps(jobs), forbid="hfcompress") == []
    return {name: torch.from_numpy(np.load(job["logits"])) for name, job in zip(folders, jobs, strict=True)}


def widened(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


@torch.no_grad()
def solved_logits(model, folder: Path, ids: np.ndarray, rounded: bool = False) -> torch.Tensor:
    """The logits of the original with the weights that our own reader finds in the folder put in."""
    manifest = json.loads((folder / "hfcompress.json").read_text())
    layout = get_format(manifest["recipe"]["format"])
    stored = {k: v for path in folder.glob("model*.safetensors") for k, v in load_file(path).items()}
    for row in manifest["linears"]:
        grid = Grid(row["bits"], row["group_size"], row["symmetric"])
        module = model.get_submodule(row["name"])
        values = layout.restore(stored, row["name"], grid, not isinstance(module, torch.nn.Linear))
        set_weight(module, values.bfloat16().float() if rounded else values)
    return model(input_ids=torch.from_numpy(ids)).logits


CASES = {
    f"{name}-{layout}-{'symmetric' if symmetric else 'asymmetric'}-{bits}-{group_size}": (
        name,
        hfc.Job(steps=(hfc.GPTQ(bits=bits, group_size=group_size, symmetric=symmetric),), format=layout),
    )
    for name, layout, symmetric, bits, group_size in [
        *[
            ("llama", layout, symmetric, bits, group_size)
            for layout in ("compressed-tensors", "int-quantized", "dense")
            for symmetric in (True, False)
            for bits, group_size in ((4, 32), (3, -1), (8, -1), (2, 32))
        ],
        *[(name, "compressed-tensors", True, 4, 32) for name in CONFIGS if name not in ("llama", "gpt2")],
        ("gpt2", "dense", True, 4, 32),
    ]
}
CASES["overrides-and-head"] = (
    "llama",
    hfc.Job.of(
        hfc.GPTQ(
            group_size=32,
            targets=("Linear", "lm_head"),
            ignore=("k_proj",),
            overrides={"re:.*down_proj": {"bits": 8}},
        )
    ),
)
BEST = hfc.GPTQ(bits=2, group_size=32, shift=1.0, curvature=True, refine=2) >> hfc.Tune(iterations=3)
CASES["best-llama"] = ("llama", hfc.Job.of(BEST))
CASES["best-qwen3-mixed"] = ("qwen3-mixed", hfc.Job.of(BEST))
CASES["best-gpt2"] = ("gpt2", hfc.Job(steps=BEST.steps, format="dense"))


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Every case compressed, and its logits from the consumer."""
    parent = tmp_path_factory.mktemp("law2")
    folders = {}
    for case, (name, job) in CASES.items():
        model = make_model(CONFIGS[name](), torch.bfloat16)
        result = hfc.compress(model, job, parent / case, calibration=token_ids(8, 32), evaluate=False)
        folders[case] = result.output_dir
    return folders, reloaded_logits(folders, IDS)


@pytest.mark.parametrize("case", CASES)
def test_reloaded_logits_are_the_solved_ones(reloaded, case):
    folders, logits = reloaded
    name, job = CASES[case]
    # transformers unpacks an asymmetric weight while loading, in the dtype of its scales
    rounded = job.format == "compressed-tensors" and not job.steps[0].symmetric
    expected = solved_logits(widened(make_model(CONFIGS[name](), torch.bfloat16)), folders[case], IDS, rounded)
    torch.testing.assert_close(logits[case], expected, rtol=0, atol=2e-5)


def test_overrides_are_kept(reloaded):
    folders, _ = reloaded
    linears = json.loads((folders["overrides-and-head"] / "hfcompress.json").read_text())["linears"]
    bits = {row["name"]: row["bits"] for row in linears}
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["lm_head"] == bits["model.layers.2.self_attn.q_proj"] == 4
    assert not any("k_proj" in name for name in bits)


def test_a_symmetric_weight_has_no_zero_point_and_scales_have_the_models_dtype(reloaded):
    folders, _ = reloaded
    for case, folder in folders.items():
        tensors = load_file(folder / "model.safetensors")
        symmetric = CASES[case][1].steps[0].symmetric
        assert any(n.endswith("zero_point") for n in tensors) == (not symmetric and CASES[case][1].format != "dense")
        assert all(t.dtype == torch.bfloat16 for n, t in tensors.items() if n.endswith("weight_scale"))


def test_a_conv1d_is_refused_in_packed_form(tmp_path):
    model = make_model(CONFIGS["gpt2"](), torch.bfloat16)
    with pytest.raises(hfc.HfcompressError, match=r"Conv1D.*format=dense"):
        hfc.compress(model, hfc.GPTQ(group_size=32), tmp_path / "out", calibration=token_ids(8, 32))
    assert list(tmp_path.iterdir()) == []


def test_an_asymmetric_mixture_is_refused_in_packed_form(llama, tmp_path):
    recipe = hfc.GPTQ(group_size=32, symmetric=False, overrides={"down_proj": {"bits": 8}})
    with pytest.raises(hfc.HfcompressError, match="int-quantized"):
        hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(8, 32))
    assert list(tmp_path.iterdir()) == []


def test_the_main_job_reloads(tiny, tiny_w4, tmp_path):
    """The trained model: tied embeddings, tokenizer, generation config."""
    ids = np.load(tiny / "evaluation.npy").astype(np.int64)[:4]
    shutil.copytree(tiny_w4.output_dir, tmp_path / "copy")
    logits = reloaded_logits({"tiny": tmp_path / "copy"}, ids)["tiny"]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    torch.testing.assert_close(logits, solved_logits(model, tiny_w4.output_dir, ids), rtol=0, atol=5e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")("def f(x):")["input_ids"]
    assert (tmp_path / "copy" / "generation_config.json").is_file()
    assert "lm_head.weight" not in load_file(tmp_path / "copy" / "model.safetensors")
