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
"""The main job, end to end on a trained model: what it costs, what it saves, and that the report tells the truth."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_fresh_process, token_ids

import hfcompress as hfc
from hfcompress.models.checkpoint import Checkpoint


INDEPENDENT = """
import json, math, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
dense, compressed = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in sys.argv[1:3])
ids = torch.from_numpy(np.load(sys.argv[3]).astype("int64"))
kl, nll, base, agree = [], [], [], []
with torch.no_grad():
    for row in ids.split(8):
        p, q = (m(input_ids=row).logits[:, :-1].double().log_softmax(-1) for m in (dense, compressed))
        kl.append((p.exp() * (p - q)).sum(-1).flatten())
        y = row[:, 1:, None]
        nll.append(-q.gather(-1, y).flatten())
        base.append(-p.gather(-1, y).flatten())
        agree.append((p.argmax(-1) == q.argmax(-1)).double().flatten())
kl, nll, base, agree = map(torch.cat, (kl, nll, base, agree))
print(json.dumps({"kl_mean": kl.mean().item(), "kl_median": kl.median().item(), "kl_p99": kl.quantile(0.99).item(),
    "perplexity": nll.mean().exp().item(), "baseline_perplexity": base.mean().exp().item(),
    "top1_agreement": agree.mean().item(), "tokens": len(kl)}))
"""


def test_the_report_is_what_plain_transformers_finds(tiny, tiny_w4):
    found = in_fresh_process(
        INDEPENDENT, str(tiny), str(tiny_w4.output_dir), str(tiny / "evaluation.npy"), forbid="hfcompress"
    )
    written = json.loads((tiny_w4.output_dir / "eval_results.json").read_text())
    assert written == json.loads(json.dumps(tiny_w4.report))
    for key, value in found.items():
        assert written[key] == pytest.approx(value, rel=2e-3), key
    size = sum(p.stat().st_size for p in tiny_w4.output_dir.glob("model*.safetensors"))
    assert written["size_bytes"] == size
    assert written["baseline_size_bytes"] == (tiny / "model.safetensors").stat().st_size


def test_the_readme_shows_what_the_demo_gives(tmp_path):
    shown = (Path(__file__).parents[1] / "README.md").read_text()
    recipe = re.search(r"^\$ hfcompress run (\S+)$", shown, re.MULTILINE)
    kl, agreement = re.search(r"([\d.]+) ± [\d.]+ nats", shown), re.search(r"([\d.]+)% │\n└", shown)
    report = hfc.compress(None, recipe[1], tmp_path / "shown").report
    assert float(kl[1]) == pytest.approx(report["kl_mean"], rel=0.05)
    assert float(agreement[1]) / 100 == pytest.approx(report["top1_agreement"], abs=0.005)


def test_four_bits_cost_little(tiny_w4):
    report = tiny_w4.report
    assert report["kl_mean"] < 0.006
    assert report["top1_agreement"] > 0.94
    assert report["perplexity"] / report["baseline_perplexity"] < 1.01
    assert report["size_bytes"] < 0.36 * report["baseline_size_bytes"]


def test_the_bundled_model_has_learnt(tiny, tiny_w4):
    """Its card and its record say what is measured."""
    record = json.loads((tiny / "training.json").read_text())
    assert tiny_w4.report["baseline_perplexity"] == pytest.approx(record["perplexity"], rel=1e-3)
    assert record["perplexity"] < record["unigram_perplexity"] / 20
    assert sum(p.stat().st_size for p in tiny.iterdir()) < 5_000_000
    calibration, evaluation = (np.load(tiny / f"{split}.npy") for split in ("calibration", "evaluation"))
    assert not {row.tobytes() for row in calibration} & {row.tobytes() for row in evaluation}
    card = (tiny.parents[2] / "model_cards" / "tiny-llama.md").read_text()
    for figure in (f"{record['perplexity']:.2f}", str(record["unigram_perplexity"]), f"{record['steps']} steps"):
        assert figure in card


def test_every_step_of_the_method_pays(tmp_path, tiny_w4):
    """GPTQ below RTN, the search below the plain range, act-order below none, more bits below fewer."""

    def kl(name, recipe) -> float:
        return hfc.compress(None, recipe, tmp_path / name).report["kl_mean"]

    full = tiny_w4.report["kl_mean"]
    assert full < kl("minmax", hfc.GPTQ(scales="minmax")) * 0.98
    three = kl("three", hfc.GPTQ(bits=3))
    assert three < kl("no-order", hfc.GPTQ(bits=3, act_order=False)) * 0.97
    rtn = kl("rtn", hfc.RTN(bits=3))
    assert three < rtn * 0.6
    assert rtn < kl("rtn-minmax", hfc.RTN(bits=3, scales="minmax")) * 0.95
    assert full < three / 3
    assert kl("eight", hfc.RTN(bits=8)) < 1e-4


def test_a_run_repeated_gives_the_same_bytes(tiny_w4, tmp_path):
    again = hfc.compress(None, "gptq-w4a16", tmp_path / "again", evaluate=False)
    first, second = ((r.output_dir / "model.safetensors").read_bytes() for r in (tiny_w4, again))
    assert first == second


def test_the_manifest_tells_how_it_was_made(tiny, tiny_w4):
    manifest = json.loads((tiny_w4.output_dir / "hfcompress.json").read_text())
    assert manifest["recipe"]["recipe"] == [{"gptq": {}}]  # the recipe's values are the defaults
    base = manifest["base"]
    assert (base["model"], base["revision"], base["sha256"]) == ("tiny-llama", None, Checkpoint.open(tiny).sha256)
    assert manifest["calibration"]["data"] == "bundled"
    assert manifest["calibration"]["tokens"] == 128 * 256
    assert len(manifest["calibration"]["sha256"]) == 64
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["phases"]) == {"prepare", "compress", "write", "evaluate"}
    assert manifest["coverage"] == {"compressed": 28, "linears": 29}
    for row in manifest["linears"]:
        assert 0 < row["relative_output_error"] < 0.1
        assert row["method"] == "gptq"
        assert row["bits"] == 4
        assert row["tokens"] == 128 * 256
    stored = sum(row["bytes"] for row in manifest["linears"])
    assert stored < tiny_w4.report["size_bytes"] < stored + 2 * 1024 * 256 + 20_000


def test_a_result_runs_its_own_recipe_again(tiny_w4, tmp_path):
    again = hfc.compress(None, str(tiny_w4.output_dir), tmp_path / "again", evaluate=False)
    assert (again.output_dir / "model.safetensors").read_bytes() == (
        tiny_w4.output_dir / "model.safetensors"
    ).read_bytes()


def test_a_model_in_memory_with_its_tokenizer(tiny, tiny_w4, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = np.load(tiny / "calibration.npy")
    result = hfc.compress(
        model, hfc.GPTQ(), tmp_path / "out", tokenizer=tokenizer, calibration=ids, eval_data=tiny / "evaluation.npy"
    )
    assert result.report["kl_mean"] == pytest.approx(tiny_w4.report["kl_mean"], rel=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("import os")["input_ids"]


def test_masked_rows_in_python(llama, tmp_path):
    data = {"input_ids": token_ids(6, 32), "attention_mask": np.ones((6, 32), dtype=int)}
    data["attention_mask"][0, :20] = 0
    result = hfc.compress(llama, hfc.GPTQ(group_size=32), tmp_path / "out", calibration=data, eval_data=data)
    assert all(row["tokens"] == 6 * 32 - 20 for row in result.manifest["linears"])
    assert result.report["tokens"] == 6 * 31 - 20
    assert math.isfinite(result.report["kl_mean"])
