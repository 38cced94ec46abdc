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
"""Every figure of the quality measurement against a plain computation; the teacher cache gives the same."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

import hfcompress as hfc
from hfcompress.calibration.tokens import Tokens
from hfcompress.evaluation import quality
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.quality import clustered, diverge, histogram
from hfcompress.models.checkpoint import Checkpoint


def perturbed(model, amount=0.02):
    torch.manual_seed(1)
    other = make_model(model.config)
    other.load_state_dict(model.state_dict())
    for parameter in other.parameters():
        parameter.data += amount * torch.randn_like(parameter)
    return other


@torch.no_grad()
def plain(candidate, baseline, ids, mask=None) -> dict[str, np.ndarray]:
    """Log-probabilities of both models in float64, position by position."""
    found = {"kl": [], "nll": [], "baseline_nll": [], "agree": [], "change": [], "row": []}
    inputs = {"input_ids": torch.from_numpy(ids)}
    if mask is not None:
        inputs["attention_mask"] = torch.from_numpy(mask).long()
    ours, theirs = (model(**inputs).logits.double().log_softmax(-1) for model in (candidate, baseline))
    for row in range(len(ids)):
        for position in range(ids.shape[1] - 1):
            if mask is not None and not (mask[row, position] and mask[row, position + 1]):
                continue
            p, q, target = theirs[row, position], ours[row, position], ids[row, position + 1]
            found["kl"].append((p.exp() * (p - q)).sum().item())
            found["nll"].append(-q[target].item())
            found["baseline_nll"].append(-p[target].item())
            found["agree"].append(bool(p.argmax() == q.argmax()))
            found["change"].append((q[target].exp() - p[target].exp()).item())
            found["row"].append(row)
    return {key: np.array(value) for key, value in found.items()}


@pytest.fixture(params=[False, True], ids=["whole", "padded"])
def pair(request, llama):
    ids = token_ids(6, 24)
    mask = None
    if request.param:
        mask = np.ones_like(ids, dtype=bool)
        for row in range(len(ids)):
            mask[row, : 2 * row] = False
    return perturbed(llama), llama, ids, mask


def test_every_figure_is_that_of_a_plain_computation(pair):
    candidate, baseline, ids, mask = pair
    data = ids if mask is None else {"input_ids": ids, "attention_mask": mask}
    report = hfc.evaluate(candidate, baseline, data)
    found = plain(candidate, baseline, ids, mask)
    expected = {
        "perplexity": math.exp(found["nll"].mean()),
        "baseline_perplexity": math.exp(found["baseline_nll"].mean()),
        "log_perplexity_difference": (found["nll"] - found["baseline_nll"]).mean(),
        "kl_mean": found["kl"].mean(),
        "kl_median": np.median(found["kl"]),
        "kl_p99": np.quantile(found["kl"], 0.99),
        "kl_max": found["kl"].max(),
        "top1_agreement": found["agree"].mean(),
        "rms_probability_change": math.sqrt((found["change"] ** 2).mean()),
        "tokens": len(found["kl"]),
    }
    for key, value in expected.items():
        assert report[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    assert sum(report["kl_histogram"]["counts"]) == report["tokens"]
    assert report["how"]["out_of_domain"].endswith("give token ids: an .npy of integers shaped (rows, seq_len).")
    assert json.loads(json.dumps(report)) == report


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_standard_errors_are_those_of_row_sums(seed, rows):
    """With rows of one length the clustered error is the error of the mean of the rows' means."""
    values = np.random.default_rng(seed).normal(size=(rows, 5)) + np.arange(rows)[:, None]
    mean, error = clustered(values.flatten(), np.repeat(np.arange(rows), 5))
    means = values.mean(1)
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(rows))


def test_one_row_has_no_standard_error():
    assert clustered(np.array([1.0, 3.0]), np.array([0, 0])) == (2.0, None)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 50), min_size=1, max_size=30))
def test_the_histogram_counts_every_position(values):
    found = histogram(np.array(values))
    assert sum(found["counts"]) == len(values)
    assert len(found["edges"]) == len(found["counts"]) + 1


def test_text_of_another_domain_stands_beside(tiny_w4, tiny):
    """Its figures are what evaluating on that text gives."""
    report, other = tiny_w4.report, tiny_w4.report["out_of_domain"]
    assert other["kl_mean"] != report["kl_mean"]
    assert other["perplexity"] > report["perplexity"]  # documentation is what the tiny model was trained on
    assert other["rows"] == 24
    assert "Python source code" in other["data"]
    assert report["how"]["overlap_with_calibration"] == 0


def test_text_that_was_calibrated_on_is_found_later(tiny_w4, tiny):
    """From the manifest's sketch alone, at other places in rows of another length."""
    rows = np.load(tiny / "calibration.npy")[:16].reshape(8, 512)[:, 100:356]
    notes = []

    class Notes(hfc.evaluate.__globals__["Silent"]):
        def note(self, message):
            notes.append(message)

    report = hfc.evaluate(tiny_w4.output_dir, data=rows, progress=Notes())
    assert report["how"]["overlap_with_calibration"] > 0.8
    assert any("was calibrated on: the result will look better than it is" in note for note in notes)


@pytest.mark.parametrize("whole", [True, False])
def test_the_teacher_is_computed_once(llama, tmp_path, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr("hfcompress.evaluation.teacher.WHOLE", 10)
        monkeypatch.setattr("hfcompress.evaluation.teacher.TOP_K", 100)
    ids = token_ids(6, 24)
    first, second = perturbed(llama, 0.02), perturbed(llama, 0.05)
    live = [hfc.evaluate(model, llama, ids) for model in (first, second)]
    cached = [hfc.evaluate(first, llama, ids, teacher_cache=tmp_path)]
    opened = []
    original = quality.open_for_logits
    monkeypatch.setattr(quality, "open_for_logits", lambda c, *rest: opened.append(c) or original(c, *rest))
    cached.append(hfc.evaluate(second, llama, ids, teacher_cache=tmp_path))
    assert len(opened) == 1  # the candidate alone
    for ours, theirs in zip(cached, live, strict=True):
        for key in ("perplexity", "baseline_perplexity", "top1_agreement", "rms_probability_change"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
        if whole:
            assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"], rel=1e-6)
            assert ours["how"]["teacher"] == "cached: every log-probability"
        else:
            assert 0.9 * theirs["kl_mean"] < ours["kl_mean"] <= theirs["kl_mean"]
            assert ours["how"]["teacher"].endswith("so KL is a lower bound")


def test_the_cache_is_of_one_baseline_and_one_text(llama, tmp_path):
    ids = token_ids(2, 24)
    hfc.evaluate(llama, llama, ids, teacher_cache=tmp_path)
    hfc.evaluate(llama, llama, ids, teacher_cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    hfc.evaluate(llama, llama, token_ids(2, 24, seed=1), teacher_cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    report = hfc.evaluate(perturbed(llama), perturbed(llama), ids, teacher_cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert report["kl_mean"] == pytest.approx(0, abs=1e-6)


def test_an_unfinished_cache_is_made_again_and_a_damaged_one_is_named(llama, tmp_path):
    ids = token_ids(2, 24)
    first = hfc.evaluate(llama, llama, ids, teacher_cache=tmp_path)
    [folder] = tmp_path.iterdir()
    (folder / "teacher.json").unlink()
    (folder / "batch-00000.safetensors").write_bytes(b"torn")
    assert hfc.evaluate(llama, llama, ids, teacher_cache=tmp_path) == first
    (folder / "batch-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(hfc.HfcompressError, match=r"is damaged; delete that folder\.$"):
        hfc.evaluate(llama, llama, ids, teacher_cache=tmp_path)


def test_different_vocabularies_are_refused(llama):
    config = CONFIGS["llama"]()
    config.vocab_size = 64
    with pytest.raises(hfc.HfcompressError, match="give the baseline that it was made from"):
        hfc.evaluate(make_model(config), llama, token_ids(2, 8, vocabulary=64))


def test_positions_and_rows_say_where_a_prediction_is(llama):
    mask = np.ones((2, 8), dtype=bool)
    mask[1, :3] = False
    tokens = Tokens(token_ids(2, 8), "test", mask)
    checkpoint = Checkpoint.open(llama)
    found = diverge(Comparison(candidate=checkpoint, baseline=checkpoint, tokens=tokens))
    assert found.row.tolist() == [0] * 7 + [1] * 4
    assert found.position.tolist() == [1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
