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
"""The card: its numbers are those of plain transformers, its snippets run, and it passes the Hub library's checks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS, in_fresh_process, make_model
from huggingface_hub import ModelCard

import hfcompress as hfc
from hfcompress.evaluation.limits import limits
from hfcompress.evaluation.numbers import percent
from hfcompress.hub.base_card import base_card, forbids_derivatives
from hfcompress.hub.card import benchmark_files, make_card, write_card
from hfcompress.hub.published import published
from hfcompress.hub.reload import Reload


ROOT = Path(__file__).parents[2]
PLAIN = """
import json, sys, numpy as np, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
folder, base, ids = sys.argv[1:]
torch.set_num_threads(1)
ids = torch.from_numpy(np.load(ids).astype(np.int64))
models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (folder, base)]
nll, kl, agree = [[], []], [], []
with torch.no_grad():
    for row in ids:
        ours, theirs = (m(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1) for m in models)
        for kept, found in zip(nll, (ours, theirs)):
            kept.append(-found.gather(-1, row[1:, None])[:, 0])
        kl.append((theirs.exp() * (theirs - ours)).sum(-1))
        agree.append((ours.argmax(-1) == theirs.argmax(-1)).double())
ours, theirs = (torch.cat(kept) for kept in nll)
kl, agree = torch.cat(kl), torch.cat(agree)
size = lambda path: sum(p.stat().st_size for p in Path(path).glob("model*.safetensors"))
print(json.dumps({
    "perplexity": ours.mean().exp().item(), "baseline_perplexity": theirs.mean().exp().item(),
    "kl_mean": kl.mean().item(), "kl_p99": kl.quantile(0.99).item(), "top1_agreement": agree.mean().item(),
    "size": size(folder), "baseline_size": size(base),
}))
"""


@pytest.fixture(scope="module")
def card(tiny_w4) -> ModelCard:
    return ModelCard.load(tiny_w4.output_dir / "README.md")


def test_its_numbers_are_those_of_plain_transformers(tiny_w4, tiny, card):
    """Computed from the two folders by a process that cannot import hfcompress."""
    folder = tiny_w4.output_dir
    plain = in_fresh_process(PLAIN, str(folder), str(tiny), str(tiny / "evaluation.npy"), forbid="hfcompress")
    results = [r for r in card.data.eval_results if r.dataset_name == "text bundled with hfcompress"]
    listed = {r.metric_type: r.metric_value for r in results}
    assert set(listed) == {"perplexity", "kl_mean", "kl_p99", "top1_agreement"}
    for key, value in listed.items():
        assert value == pytest.approx(plain[key], rel=2e-4), key
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", card.text, re.MULTILINE))
    original, ours, *_ = rows["perplexity"].split(" | ")
    assert float(original) == pytest.approx(plain["baseline_perplexity"], rel=1e-4)
    assert float(ours) == pytest.approx(plain["perplexity"], rel=1e-4)
    assert float(rows["KL to the original"].split(" | ")[1].split()[0]) == pytest.approx(plain["kl_mean"], rel=2e-3)
    agreement = rows["same most likely token"].split(" | ")[1].split()[0]
    assert float(agreement) == pytest.approx(100 * plain["top1_agreement"], rel=2e-3)
    original, ours, ratio = rows["weights on disk"].split(" | ")
    assert float(original.split()[0]) == pytest.approx(plain["baseline_size"] / 1e6, rel=1e-3)
    assert float(ours.split()[0]) == pytest.approx(plain["size"] / 1e6, rel=1e-3)
    assert float(ratio.split()[0]) == pytest.approx(plain["size"] / plain["baseline_size"], rel=2e-3)


def test_its_snippet_runs(tiny_w4, card):
    """As it stands there, with the folder in the place of the name; and what the text says of vLLM is not claimed."""
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    code = code.replace(f'"{tiny_w4.output_dir.name}"', repr(str(tiny_w4.output_dir)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The quick brown fox")
    assert f"vllm serve {tiny_w4.output_dir.name}" in card.text
    assert "this line was not run" in card.text


def test_its_front_matter(tiny_w4, card):
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "psf-2.0"  # the base's
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["language"] == "en"
    assert data["tags"] == ["hfcompress", "gptq", "compressed-tensors", "4-bit", "w4a16"]
    assert "base_model" not in data  # it is no repo on the Hub
    assert ModelCard(str(card)).data.to_dict() == data  # it reads back as it was written


def test_a_base_on_the_hub_is_named(tiny_w4):
    base = {
        **tiny_w4.manifest["base"],
        "model": "user/base@v1",
        "kind": "hub",
        "revision": "abc",
        "card": {"license": "apache-2.0"},
    }
    card = make_card({**tiny_w4.manifest, "base": base}, tiny_w4.report, "name", "me/name")
    data = card.data.to_dict()
    assert data["base_model"] == "user/base"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert "[user/base](https://huggingface.co/user/base) with 28 of its 29 linears" in card.text
    assert 'from_pretrained("me/name")' in card.text
    assert "hfcompress run me/name --output again --verify" in card.text
    assert "at revision `abc`" in card.text


def test_a_base_in_a_folder_is_named_without_its_path(tiny_w4):
    base = {**tiny_w4.manifest["base"], "model": "/home/someone/secret/model", "kind": "folder"}
    calibration = {**tiny_w4.manifest["calibration"], "data": "/home/someone/text.jsonl"}
    report = {**tiny_w4.report, "how": {**tiny_w4.report["how"], "data": "/home/someone/eval.npy"}}
    manifest = {**tiny_w4.manifest, "base": base, "calibration": calibration}
    recipe = {**manifest["recipe"], "calibration": {"data": "/home/someone/text.jsonl", "samples": 4}}
    told = published({**manifest, "recipe": recipe}, report)
    text = str(make_card(*told, "name")) + json.dumps(told)
    assert "someone" not in text
    assert "from text.jsonl" in text
    assert "name: eval.npy" in text
    assert "hfcompress run name --model model --calibration text.jsonl --output again --verify" in text
    assert "which you have to have, with the data that it was calibrated on" in text


def test_what_it_says_of_the_work(tiny_w4, card):
    manifest = tiny_w4.manifest
    assert "- 28 linears: GPTQ, 4 bits, groups of 128, symmetric" in card.text
    assert manifest["calibration"]["sha256"][:16] in card.text
    assert manifest["base"]["sha256"][:16] in card.text
    for library, version in manifest["versions"].items():
        assert f"{library} {version}" in card.text
    [recipe] = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert yaml.safe_load(recipe) == manifest["recipe"]
    for name in ("size_kl", "layer_errors", "kl_histogram", "bits_by_layer"):
        assert f"(plots/{name}.png)" in card.text
        assert (tiny_w4.output_dir / "plots" / f"{name}.png").is_file()
    rise = tiny_w4.report["perplexity"] / tiny_w4.report["baseline_perplexity"] - 1
    assert f"Perplexity rose by {percent(rise, 3)}" in card.text


def test_without_an_evaluation_it_says_so(tmp_path):
    result = hfc.compress(make_model(CONFIGS["llama"]()), hfc.RTN(group_size=32), tmp_path / "out", evaluate=False)
    text = (result.output_dir / "README.md").read_text()
    assert "Its quality was not measured." in text
    assert "What it costs" not in text
    assert ModelCard(text).data.eval_results is None


TASKS = {
    "scores": {
        "mmlu_pro": {
            "metric": "exact_match",
            "higher_is_better": True,
            "baseline": 0.42,
            "baseline_stderr": 0.01,
            "compressed": 0.37,
            "compressed_stderr": 0.01,
            "recovery": 0.881,
            "flips": 0.1,
            "documents": 12032,
            "metrics": {},
        },
        "arc_easy": {
            "metric": "acc",
            "higher_is_better": True,
            "baseline": 0.7,
            "baseline_stderr": 0.02,
            "compressed": 0.69,
            "compressed_stderr": 0.02,
            "recovery": 0.9857,
            "flips": 0.05,
            "documents": 100,
            "metrics": {},
        },
    },
    "recovery": 0.9333,
    "how": {"lm_eval": "0.4.13", "limit": None},
}


def test_tasks_with_their_recovery(tiny_w4, tmp_path):
    report = {**tiny_w4.report, "tasks": TASKS, "recovery": 0.9333}
    write_card(tmp_path, tiny_w4.manifest, report, "name", "me/name")
    card = ModelCard.load(tmp_path / "README.md")
    assert "| mmlu_pro (exact_match) | 0.420 ± 0.010 | 0.370 ± 0.010 | 88.10 % |" in card.text
    assert "| **average recovery** |  |  | **93.33 %** |" in card.text
    assert "- mmlu_pro: exact_match went from 0.4200 to 0.3700." in card.text
    assert "- arc_easy: acc went from 0.7000 to 0.6900, within two standard errors." in card.text
    values = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert values["mmlu_pro", "exact_match"] == 0.37
    [entry] = yaml.safe_load((tmp_path / ".eval_results" / "mmlu_pro.yaml").read_text())
    assert entry["dataset"] == {"id": "TIGER-Lab/MMLU-Pro", "task_id": "mmlu_pro"}
    assert entry["value"] == 37.0
    assert [p.name for p in (tmp_path / ".eval_results").iterdir()] == ["mmlu_pro.yaml"]  # no other is registered


def test_part_of_a_benchmark_is_no_result_of_it(tiny_w4):
    tasks = {**TASKS, "how": {**TASKS["how"], "limit": 10}}
    assert benchmark_files(tiny_w4.manifest, {**tiny_w4.report, "tasks": tasks}) == {}


def test_the_reload_check_is_told(tiny_w4):
    text = make_card(tiny_w4.manifest, tiny_w4.report, "n", reload=Reload("block by block", 1.5e-6, 32)).text
    assert "reloaded in a fresh process (block by block)" in text
    assert "was 1.5e-06, at 32 positions" in text


def test_limits_name_fallbacks_overlap_and_skipped_layers(tiny_w4):
    rows = [{**row, "fallback": "too few tokens"} for row in tiny_w4.manifest["linears"][:2]]
    manifest = {**tiny_w4.manifest, "linears": rows, "skipped": {"model.layers.0.x": "21 does not divide"}}
    report = {**tiny_w4.report, "how": {**tiny_w4.report["how"], "overlap_with_calibration": 0.25}}
    found = " ".join(limits(manifest, report))
    assert "2 linears were solved by a fallback" in found
    assert "model.layers.0.x was left alone: 21 does not divide." in found
    assert "25.0 % of the evaluation's text was also calibrated on" in found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\nlanguage: [en, de]\ntags: [x]\n---\n# A", {"license": "mit", "language": ["en", "de"]}),
        ("# no front matter", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\njust words\n---\n", {}),
        ("---\nlanguage: no\nlicense_link: 2024-05-01\n---\n", {"language": "no", "license_link": "2024-05-01"}),
        ("---\nlicense: mit\nlicense_name: |\n  x\n\n  # Free\n  [money](https://x)\n---\n", {"license": "mit"}),
        ("---\nlicense: mit\nlanguage: [[en], de]\n---\n", {"license": "mit"}),
        ("", {}),
    ],
)
def test_what_the_bases_card_hands_on(tmp_path, text, found):
    (tmp_path / "README.md").write_text(text)
    assert base_card(tmp_path) == found
    assert base_card(None) == {}


def test_licences_without_derivatives():
    assert forbids_derivatives("cc-by-nc-nd-4.0")
    assert not forbids_derivatives("cc-by-nc-sa-4.0")
    assert not forbids_derivatives(None)


def test_the_template_is_the_repos(tiny_w4):
    """`model_cards/template.md.jinja` is what the package uses, and it renders what the folder holds."""
    template = ROOT / "model_cards" / "template.md.jinja"
    assert template.read_text() == (ROOT / "hfcompress" / "hub" / "templates" / "card.md.jinja").read_text()
    assert json.loads((tiny_w4.output_dir / "hfcompress.json").read_text()) == json.loads(json.dumps(tiny_w4.manifest))


def test_the_bundled_examples_have_their_cards(tiny_w4):
    """`make cards` writes them; the one of the session's result says what was measured here."""
    from hfcompress.recipes import shipped_recipes

    for recipe in shipped_recipes():
        card = ModelCard.load(ROOT / "model_cards" / f"tiny-llama-{recipe}.md")
        assert {r.metric_type for r in card.data.eval_results} >= {"perplexity", "kl_mean", "top1_agreement"}
        assert "| continuation (acc_mutual_info) |" in card.text
        if recipe == "gptq-w4a16":
            measured = {r.metric_type: r.metric_value for r in card.data.eval_results if "bundled" in r.dataset_name}
            assert measured["kl_mean"] == pytest.approx(tiny_w4.report["kl_mean"], rel=0.05)
