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

import functools
import itertools
import json
import operator

import numpy as np
import pytest
import torch
from conftest import CONFIGS, in_fresh_process, make_model, token_ids

import hfcompress as hfc
from hfcompress.errors import InvalidValueError
from hfcompress.passes.rows import spread_rows
from hfcompress.progress import Silent
from hfcompress.recipes import job_from_dict, load_job, with_changes
from hfcompress.solvers.pattern import Pattern


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pattern": "4:2"}, "'4:2' is no sparsity pattern; write N:M"),
        ({"sparsity": 1.0}, "sparsify.sparsity is 1.0; it must lie between 0 and 1."),
        ({"sparsity": 0.7}, "sparsify.pattern 2:4 has 50% zeros; leave sparsify.sparsity out, or set pattern to"),
        ({"method": "wandaa"}, "sparsify.method is 'wandaa'; it must be one of"),
        ({"rounds": -1}, "sparsify.rounds is -1; it must not be negative."),
        ({"curvature_rows": 0}, "sparsify.curvature_rows is 0; it must be at least 1."),
        (
            {"schedule": ["6:8", "4:8"]},
            "sparsify.schedule goes through 50% zeros before 50%; each stage must have fewer",
        ),
        ({"schedule": ["4:8x"]}, "'4:8x' is no sparsity pattern; write N:M"),
        ({"schedule": [0.3]}, "sparsify.pattern 2:4 has 50% zeros; leave sparsify.sparsity out"),
        ({"schedule": [None]}, "sparsify.schedule is [None]; it must be a list of numbers or texts."),
        ({"shift": 2.0}, "sparsify.shift is 2.0; it must lie between 0 and 1."),
        ({"damping": -0.1}, "sparsify.damping is -0.1; it must lie between 0 and 1."),
        ({"patern": "2:4"}, "sparsify has no key 'patern'. Did you mean 'pattern'?"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence(settings, said):
    with pytest.raises(InvalidValueError) as error:
        job_from_dict({"recipe": [{"sparsify": settings}]})
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (hfc.GPTQ() >> hfc.Sparsify(), "sparsify comes before the step that rounds; put it before gptq."),
        (hfc.Sparsify() >> hfc.GPTQ(shift=1.0), "set gptq.shift to 0, and sparsify.shift instead."),
        (hfc.AWQ() >> hfc.Sparsify(schedule=("6:8",)) >> hfc.GPTQ(), "calibrated several times: put it before awq."),
        (hfc.Sparsify() >> hfc.Budget(target_bits=3) >> hfc.GPTQ(), "budget does not reckon with zeros yet"),
    ],
)
def test_where_it_cannot_stand_is_told(recipe, said):
    with pytest.raises(InvalidValueError) as error:
        hfc.Job.of(recipe)
    assert said in str(error.value)


def test_a_pattern_is_enough_and_comes_back_from_yaml():
    job = hfc.Job.of(hfc.AWQ() >> hfc.Sparsify("2:4") >> hfc.GPTQ(bits=4))
    assert job.to_dict()["recipe"] == [{"awq": {}}, {"sparsify": {}}, {"gptq": {}}]
    job = hfc.Job.of(hfc.Sparsify("unstructured", sparsity=0.7, overrides={"o_proj": {"sparsity": 0.5}}))
    assert job_from_dict(job.to_dict(), job.name) == job


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "6:8", "unstructured", "16x1"])
def test_a_pattern_needs_no_quotes_in_yaml(pattern):
    """YAML takes 2:4 for a number in base 60."""
    [step] = with_changes(load_job("sparse24"), [f"sparsify.pattern={pattern}"]).steps
    assert step.pattern == pattern


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"pattern": "unstructured", "sparsity": 0.6, "schedule": [0.2, 0.4]}, [0.2, 0.4, 0.6]),
        ({"pattern": "2:4", "schedule": [368]}, [0.25, 0.5]),  # 6:8 without quotes
    ],
)
def test_a_schedule_is_stages(settings, stages):
    job, found = job_from_dict({"recipe": [{"sparsify": settings}, {"rtn": {}}]}), []
    while len(job.stages) > 1:
        earlier, last = job.stages
        found.insert(0, last)
        job = earlier
    found.insert(0, job)
    assert [each.steps[0].zeros for each in found] == stages
    assert [len(each.steps) for each in found] == [*(1 for _ in stages[1:]), 2]


def test_every_stage_of_a_schedule_is_calibrated_on_what_the_last_one_left(tmp_path):
    """As if each were run by hand; and a run that was stopped in the second goes on to the same bytes."""
    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(tmp_path / "model")
    options = {"calibration": token_ids(16, 32), "evaluate": False}
    settings = {"sparsity": 0.6, "ratios": "global"}
    recipe = hfc.Sparsify("unstructured", **settings, schedule=(0.3,))
    result = hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "out", **options)
    once = hfc.Sparsify("unstructured", **{**settings, "sparsity": 0.3})
    hfc.compress(str(tmp_path / "model"), once, tmp_path / "first", **options)
    hfc.compress(str(tmp_path / "first"), hfc.Sparsify("unstructured", **settings), tmp_path / "second", **options)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "second")]
    assert weights[0] == weights[1]
    assert result.manifest["base"]["model"] == str(tmp_path / "model")
    assert np.average([row["sparsity"] for row in result.manifest["linears"]]) == pytest.approx(0.6, abs=0.1)

    class Stop(Silent):
        blocks = 0

        def step(self, text, amount=1):
            self.blocks += text.startswith("block 2")
            if self.blocks == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "again", progress=Stop(), **options)
    hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "again", resume=True, **options)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights[0]


def test_a_linear_that_the_pattern_does_not_divide_is_named_or_skipped(llama, tmp_path):
    ids = token_ids(4, 32)
    with pytest.raises(
        InvalidValueError, match=r"The pattern 5:7 does not divide model.layers.0.self_attn.q_proj, whose"
    ):
        hfc.compress(llama, hfc.Sparsify("5:7"), tmp_path / "out", calibration=ids)
    recipe = hfc.Sparsify("17x1", on_indivisible="skip", method="magnitude", refit=False) >> hfc.RTN(group_size=32)
    result = hfc.compress(llama, recipe, tmp_path / "out", calibration=ids, evaluate=False)
    assert result.manifest["skipped"]["model.layers.0.mlp.down_proj"] == "the pattern 17x1 does not divide its weight"
    assert {row["method"] for row in result.manifest["linears"]} == {"rtn"}


def test_embeddings_are_not_sparsified(llama, tmp_path):
    with pytest.raises(InvalidValueError, match="sparsify needs the inputs of what it changes"):
        hfc.compress(llama, hfc.Sparsify(targets=("Linear", "embed_tokens")), tmp_path / "out")


def test_kv_cache_alone_beside_it_is_refused(llama, tmp_path):
    with pytest.raises(InvalidValueError, match="kv_cache needs a step beside it that rounds weights"):
        hfc.compress(llama, hfc.Sparsify() >> hfc.KVCache(), tmp_path / "out", calibration=token_ids(4, 32))


def bundled(name: str, rows: int) -> torch.Tensor:
    return torch.as_tensor(np.load(hfc.models.tiny.tiny_folder() / f"{name}.npy")[:rows]).long()


def divergence(recipe, folder) -> float:
    options = {"calibration": bundled("calibration", 16), "eval_data": bundled("evaluation", 16)}
    return hfc.compress(None, recipe, folder, **options).report["kl_mean"]


@pytest.mark.parametrize(("after", "rows"), [((), 16), ((hfc.GPTQ(group_size=32, curvature=True),), 64)])
def test_zeros_need_fewer_rows_for_the_curvature_than_codes(llama, tmp_path, monkeypatch, after, rows):
    asked = []

    def spread(batches, most, processes):
        asked.append(most)
        return spread_rows(batches, most, processes)

    monkeypatch.setattr("hfcompress.passes.curvature.spread_rows", spread)
    recipe = functools.reduce(operator.rshift, after, hfc.Sparsify())
    hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)
    assert asked == [rows]


def test_each_addition_pays_on_the_trained_model(tmp_path):
    """Wanda, SparseGPT, then the refit, the curvature, and ALPS's masks; `scripts/benchmark.py sparsity` has all."""
    plain = {"refit": False, "shift": 0.0, "curvature": False}
    ladder = {
        "wanda": hfc.Sparsify(method="wanda", **plain),
        "sparsegpt": hfc.Sparsify(method="sparsegpt", **plain),
        "refit": hfc.Sparsify(method="sparsegpt", **{**plain, "refit": True}),
        "curvature": hfc.Sparsify(method="sparsegpt"),
        "alps": hfc.Sparsify(),
    }
    found = {name: divergence(recipe, tmp_path / name) for name, recipe in ladder.items()}
    values = list(found.values())
    assert all(after < before for before, after in itertools.pairwise(values)), found
    assert found["alps"] < 0.5 * found["sparsegpt"]


def test_the_shipped_recipes_keep_what_they_promise(tmp_path):
    found = {}
    for name in ("sparse24", "sparse24-w4a16", "unstructured50"):
        result = hfc.compress(None, load_job(name), tmp_path / name, samples=24, eval_data=bundled("evaluation", 16))
        found[name] = result.report["kl_mean"]
        share = sum(row["sparsity"] * np.prod(row["shape"]) for row in result.manifest["linears"])
        assert share / sum(np.prod(row["shape"]) for row in result.manifest["linears"]) >= 0.499
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "sparsity_config" not in json.dumps(config)
        assert ("quantization_config" in config) == (name == "sparse24-w4a16")
        card = (tmp_path / name / "README.md").read_text()
        assert "zeros are stored like any other" in card
    assert found["sparse24-w4a16"] < 1.2 * found["sparse24"]
    assert found["unstructured50"] < 0.6 * found["sparse24"]
    card = (tmp_path / "sparse24" / "README.md").read_text()
    assert "in 2:4-sparse weights: " in card
    assert "- 28 linears: weights set to zero, pattern 2:4, 16 bits" in card
    assert "compressed-tensors" not in card.partition("versions")[0].partition("## What was done")[0]
    assert "in 2:4-sparse 4-bit weights: " in (tmp_path / "sparse24-w4a16" / "README.md").read_text()


LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
weights = {n: p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n or ".h." in n and p.dim() == 2}
with torch.no_grad():
    logits = model(torch.arange(24)[None]).logits
generated = model.generate(torch.arange(8)[None], max_new_tokens=4, do_sample=False)
print(json.dumps({"logits": logits.flatten().tolist(), "zeros": {n: (p == 0).float().mean().item() for n, p in weights.items()},
                  "generated": generated.shape[1]}))
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_an_ordinary_checkpoint_for_plain_transformers(name, tmp_path):
    model = make_model(CONFIGS[name]())
    model.save_pretrained(tmp_path / "base")
    hfc.compress(
        str(tmp_path / "base"), hfc.Sparsify("2:4"), tmp_path / "out", calibration=token_ids(8, 32), evaluate=False
    )
    found = in_fresh_process(LOGITS, str(tmp_path / "out"), forbid="hfcompress")
    assert found["generated"] == 12
    halves = [share for share in found["zeros"].values() if share > 0]
    assert halves
    assert all(share >= 0.5 for share in halves)


def test_masks_are_those_of_the_criterion(llama, tmp_path):
    result = hfc.compress(
        llama, hfc.Sparsify("4:8", method="magnitude", refit=False), tmp_path / "out", evaluate=False
    )
    assert result.manifest["calibration"] is None
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, before in llama.state_dict().items():
        if name.startswith("model.layers") and before.dim() == 2:
            mask = Pattern.parse("4:8").mask(before.abs())
            assert torch.equal(stored[name].float(), (before * mask).float())
