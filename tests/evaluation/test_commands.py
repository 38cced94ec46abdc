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
"""`hfcompress eval`, `inspect`, `recipes`: what they print and what their JSON holds."""

import json

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids

import hfcompress as hfc
from hfcompress.cli import OK, _guarded, app
from hfcompress.recipes import shipped_recipes


def run(capsys, *arguments) -> str:
    capsys.readouterr()
    assert _guarded(app, [str(a) for a in arguments]) == OK
    return capsys.readouterr().out


def test_eval_takes_the_base_from_the_manifest(capsys, tiny_w4, tmp_path):
    out = run(capsys, "eval", tiny_w4.output_dir, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    for key, value in tiny_w4.report.items():
        if isinstance(value, float):
            assert report[key] == pytest.approx(value, rel=1e-6), key
    assert f"{report['kl_mean']:.5f} ± {report['kl_mean_stderr']:.5f} nats" in out
    assert f"{report['perplexity']:.4f}" in out
    assert "\x1b" not in out  # no colour where there is no terminal


def test_a_model_against_itself(capsys, tiny, tmp_path):
    run(capsys, "eval", tiny, "--baseline", tiny, "--samples", 8, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kl_mean"] == pytest.approx(0, abs=1e-7)
    assert report["top1_agreement"] == 1
    assert report["perplexity"] == report["baseline_perplexity"]


def test_a_foreign_quantization_is_loaded_whole(tiny, monkeypatch):
    """A checkpoint that only its own quantizer reads goes through transformers, with the same numbers."""
    from hfcompress.evaluation import quality
    from hfcompress.evaluation.logits import WholeLogits

    streamed = hfc.evaluate(tiny, tiny, samples=4)
    monkeypatch.setattr(quality, "open_for_logits", WholeLogits)
    whole = hfc.evaluate(tiny, tiny, samples=4)
    assert whole["perplexity"] == pytest.approx(streamed["perplexity"], rel=1e-5)


def test_inspect_has_a_row_per_linear(capsys, tiny_w4, tmp_path):
    out = run(capsys, "inspect", tiny_w4.output_dir, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["linears"]
    assert len(rows) == 28
    for row in rows:
        assert row["name"] in out
        assert f"{row['relative_output_error']:.4f}" in out
        assert f"{row['bytes']:,}" in out


def test_inspect_reads_checkpoints_that_others_made(capsys, tiny_w4, tiny, tmp_path):
    import shutil

    shutil.copytree(tiny_w4.output_dir, tmp_path / "copy")
    (tmp_path / "copy" / "hfcompress.json").unlink()
    run(capsys, "inspect", tmp_path / "copy", "--json", tmp_path / "rows.json")
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["linears"]}
    assert len(rows) == 28
    assert all(row["bits"] == 4 and row["group_size"] == 128 for row in rows.values())
    written = {row["name"]: row for row in tiny_w4.manifest["linears"]}
    assert all(rows[name]["bytes"] == written[name]["bytes"] for name in written)
    run(capsys, "inspect", tiny, "--json", tmp_path / "dense.json")
    dense = json.loads((tmp_path / "dense.json").read_text())["linears"]
    assert {row["bits"] for row in dense} == {16}


def test_recipes_are_listed_a_line_each(capsys):
    lines = run(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == sorted(shipped_recipes())


def test_run_prints_the_table_and_where(capsys, tmp_path):
    model = make_model(CONFIGS["llama"](), torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    import numpy as np

    np.save(tmp_path / "ids.npy", token_ids(4, 32))
    np.save(tmp_path / "eval.npy", token_ids(4, 32, seed=1))
    arguments = ["--model", tmp_path / "model", "--calibration", tmp_path / "ids.npy", "--set", "gptq.group_size=32"]
    arguments += ["--eval-data", tmp_path / "eval.npy", "--output", tmp_path / "out", "--json", tmp_path / "run.json"]
    out = run(capsys, "run", "gptq-w4a16", *arguments)
    written = json.loads((tmp_path / "run.json").read_text())
    assert "21 of 22 linears compressed, 0 by a fallback" in out
    assert str(tmp_path / "out") in out.replace("\n", "")
    assert written["report"]["kl_mean"] > 0
    assert written["manifest"]["linears"]
