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
"""`compare` and `eval --save`: several candidates in one table, and a folder whose report grows."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

import hfcompress as hfc
from hfcompress.cli import OK, _guarded, app
from hfcompress.evaluation import quality


@pytest.fixture(scope="module")
def rtn(tmp_path_factory):
    return hfc.compress(None, "rtn-w8a16", tmp_path_factory.mktemp("rtn") / "w8", evaluate=False)


def test_candidates_in_one_table(tiny_w4, rtn, tmp_path, capsys, monkeypatch):
    measured: list[str] = []
    original = quality.measure
    monkeypatch.setattr(quality, "measure", lambda c: measured.append(c.candidate.name) or original(c))
    arguments = ["compare", tiny_w4.output_dir, rtn.output_dir, "--plot", tmp_path / "p.png", "--json", tmp_path / "c"]
    assert _guarded(app, [str(a) for a in arguments]) == OK
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "c").read_text())["candidates"]
    assert [row["name"] for row in rows] == ["w4", "w8"]
    assert [row["on_front"] for row in rows] == [True, True]
    assert [row["measured"] for row in rows] == [False, True]
    assert measured == [str(rtn.output_dir)]  # the other one's own report says the same
    assert rows[0]["kl_mean"] == tiny_w4.report["kl_mean"]
    assert rows[1]["kl_mean"] < rows[0]["kl_mean"]
    assert rows[1]["kl_mean"] == pytest.approx(hfc.evaluate(rtn.output_dir)["kl_mean"], rel=1e-6)
    assert f"{rows[1]['kl_mean']:.5f}" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_worse_in_both_is_not_on_the_front(tiny_w4, tiny):
    rows = hfc.compare([tiny_w4.output_dir, tiny, tiny], tiny, samples=4)
    assert [row["on_front"] for row in rows] == [True, True, True]  # equal ones share a place
    assert all(row["measured"] for row in rows)  # four rows are not what the report was measured on


def test_what_is_measured_later_goes_into_the_folder(tiny_w4, tmp_path, capsys):
    folder = tmp_path / "w4"
    shutil.copytree(tiny_w4.output_dir, folder)
    assert _guarded(app, ["eval", str(folder), "--measure", "explain", "--save"]) == OK
    assert "explain" in capsys.readouterr().out
    report = json.loads((folder / "eval_results.json").read_text())
    assert report["kl_mean"] == tiny_w4.report["kl_mean"]
    assert len(report["explain"]["blocks"]) == 4
    assert (folder / "plots" / "explain_blocks.png").is_file()
    assert "explain_blocks.png" in ModelCard.load(folder / "README.md").text
    assert "explain_blocks" in (folder / "report.html").read_text()


def test_nothing_is_saved_in_a_model_of_others(tiny):
    with pytest.raises(hfc.HfcompressError, match="was not made by hfcompress, so nothing can be saved in it"):
        hfc.evaluate(tiny, tiny, save=True)


def test_only_what_belongs_to_a_folder_is_saved_in_it(tiny_w4, tmp_path, llama):
    folder = tmp_path / "w4"
    shutil.copytree(tiny_w4.output_dir, folder)
    before = (folder / "eval_results.json").read_bytes()
    with pytest.raises(hfc.HfcompressError, match="is of other text"):
        hfc.evaluate(folder, samples=4, save=True)
    with pytest.raises(hfc.HfcompressError, match=r"is not what .* was made from"):
        hfc.evaluate(folder, tiny_w4.output_dir, save=True)
    assert (folder / "eval_results.json").read_bytes() == before


def test_a_copy_in_the_hubs_cache_stays_as_it_is(tiny_w4, monkeypatch):
    from hfcompress.models import checkpoint

    monkeypatch.setattr(checkpoint, "locate", lambda *_, **__: (tiny_w4.output_dir, "abc"))
    with pytest.raises(hfc.HfcompressError, match="is a copy in the Hub's cache, which must stay as it is"):
        hfc.evaluate("me/w4", save=True)


def test_quality_is_measured_for_a_folder_without_any(rtn, tmp_path):
    folder = tmp_path / "w8"
    shutil.copytree(rtn.output_dir, folder)
    report = hfc.evaluate(folder, measurements=["explain"], save=True)
    assert {"perplexity", "explain"} <= set(report)
    assert "at a KL divergence of " in (folder / "README.md").read_text()


def test_what_is_measured_at_last_is_no_longer_skipped():
    from hfcompress.evaluation.report import Report

    before = Report(kl_mean=0.1, recovery=0.9, skipped={"tasks": "no", "speed": "no"})
    after = before.updated(Report(tasks={"recovery": None}))
    assert after == {"kl_mean": 0.1, "tasks": {"recovery": None}, "skipped": {"speed": "no"}}
    assert "skipped" not in after.updated(Report(speed={}))


def test_a_report_of_other_weights_is_not_believed(tiny_w4, rtn, tmp_path):
    folder = tmp_path / "w4"
    shutil.copytree(tiny_w4.output_dir, folder)
    shutil.copy(rtn.output_dir / "model.safetensors", folder)
    shutil.copy(rtn.output_dir / "config.json", folder)
    [row] = hfc.compare([folder])
    assert row["measured"]
    assert row["kl_mean"] < tiny_w4.report["kl_mean"] / 10


def test_the_score_is_a_weighted_geometric_mean(tiny_w4):
    report = tiny_w4.report
    found = report.composite_score({"size": 1.0, "perplexity": 3.0, "speed": 5.0})
    assert set(found["parts"]) == {"size", "perplexity"}  # speed was not measured
    size = report["baseline_size_bytes"] / report["size_bytes"]
    perplexity = report["baseline_perplexity"] / report["perplexity"]
    assert found["value"] == pytest.approx((size * perplexity**3) ** 0.25)
    assert report.composite_score({"speed": 1.0}) is None
    assert report.composite_score({}) is None


def test_a_damaged_report_is_told(tiny_w4, tmp_path):
    from hfcompress.evaluation.report import Report

    (tmp_path / "eval_results.json").write_text("{")
    with pytest.raises(hfc.HfcompressError, match="is damaged; measure again with `hfcompress eval`"):
        Report.load(tmp_path)


def test_all_notes_what_cannot_be_measured(llama, monkeypatch):
    from hfcompress.evaluation import tasks

    def no(comparison):
        raise hfc.HfcompressError("It cannot.")

    monkeypatch.setattr(tasks, "measure", no)
    for name in ("speed", "memory", "energy", "robustness", "stability", "explain"):
        module = __import__(f"hfcompress.evaluation.{name}", fromlist=["measure"])
        monkeypatch.setattr(module, "measure", lambda comparison: {"how": {}})
    from conftest import token_ids

    report = hfc.evaluate(llama, llama, token_ids(2, 16), measurements=["all"])
    assert report["skipped"] == {"tasks": "It cannot."}
    assert "explain" in report
    with pytest.raises(hfc.HfcompressError, match="It cannot"):
        hfc.evaluate(llama, llama, token_ids(2, 16), measurements=["tasks"])
