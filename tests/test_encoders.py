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
"""Encoders that predict masked tokens: compressed like any model, and measured on what they are for."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import ENCODERS, VOCABULARY, make_any_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

import hfcompress as hfc
from hfcompress.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.evaluation.embedding import embedded
from hfcompress.evaluation.masking import SHARE, masked
from hfcompress.generating import generate
from hfcompress.hub.reload import check_reload
from hfcompress.models.architecture import answers
from hfcompress.models.batch import Batch
from hfcompress.recipes import KVCache
from hfcompress.tables import report_tables


MASK = 5
GPTQ = hfc.GPTQ(bits=4, group_size=32)
PACKED = hfc.GPTQ(bits=4, group_size=32, symmetric=False)  # which transformers unpacks while it loads, of any model
IDS, UNSEEN = token_ids(8, 48), token_ids(4, 32, seed=7)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": MASK}
    words |= {f"word{number}": number for number in range(VOCABULARY) if number not in words.values()}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token="[MASK]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def make_encoder(name: str, kind=AutoModelForMaskedLM):
    return make_any_model(ENCODERS[name](), kind)


@pytest.fixture(params=ENCODERS)
def saved(request, tmp_path):
    make_encoder(request.param).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def bert(tmp_path):
    make_encoder("bert").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def said(kind, folder, ids) -> torch.Tensor:
    return answers(kind.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=torch.as_tensor(ids)))


logits, states = partial(said, AutoModelForMaskedLM), partial(said, AutoModel)


def test_it_is_measured_on_masked_tokens(saved, tmp_path):
    result = hfc.compress(saved, PACKED, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    report = result.report
    asked, chosen = masked(Batch(torch.as_tensor(UNSEEN)), MASK, 0)
    ours, theirs = (logits(folder, asked.input_ids).log_softmax(-1) for folder in (tmp_path / "made", saved))
    divergences = (theirs.exp() * (theirs - ours)).sum(-1)[chosen]
    assert report["kl_mean"] == pytest.approx(float(divergences.mean()), rel=0.02)
    assert 0 < report["kl_mean"] < 0.05
    told = ours[chosen].gather(-1, torch.as_tensor(UNSEEN)[chosen][:, None])
    assert report["perplexity"] == pytest.approx(float(torch.exp(-told.mean())), rel=0.01)
    assert (report["tokens"], report["how"]["masked"]) == (int(chosen.sum()), SHARE)
    assert report.get("generations") is None
    card = (tmp_path / "made/README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM.from_pretrained" in card
    assert "generate(" not in card
    assert "All figures are of 15 % of the tokens, which were masked and predicted from the others" in card
    again = hfc.evaluate(tmp_path / "made", saved, UNSEEN)
    assert again["kl_mean"] == pytest.approx(report["kl_mean"], rel=1e-5)


STEPS = {
    "zeros": hfc.Sparsify(),
    "entropy-coded": hfc.Entropy(bits=3),
    "vectors": hfc.VQ(bits=2, rounds=1),
    "eight bits": hfc.GPTQ(bits=8, group_size=-1, activations="dynamic"),
    "awq": hfc.AWQ() >> hfc.RTN(bits=4, group_size=32, symmetric=False),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_kind_of_step_applies(name, saved, tmp_path):
    result = hfc.compress(saved, STEPS[name], tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    assert 0 < result.report["kl_mean"] < 0.5
    packed = hfc.load(tmp_path / "made", device="cpu", packed=False)
    assert type(packed).__name__.endswith("ForMaskedLM")
    with torch.no_grad():
        found = packed(input_ids=torch.as_tensor(UNSEEN)).logits
    if name in ("zeros", "eight bits", "awq"):  # which plain transformers reads without a plug-in
        torch.testing.assert_close(found, logits(tmp_path / "made", UNSEEN), rtol=1e-3, atol=1e-3)
    else:
        hfc.export(tmp_path / "made", "dense", tmp_path / "dense", lossy=True)
        torch.testing.assert_close(found, logits(tmp_path / "dense", UNSEEN), rtol=1e-3, atol=1e-3)


def test_what_transformers_could_not_hold_packed_is_unpacked_while_it_loads(tmp_path):
    make_encoder("modernbert").save_pretrained(tmp_path / "base")
    for name in ("compressed-tensors", "int-quantized", "dense"):
        hfc.compress(
            tmp_path / "base", hfc.Job(steps=(GPTQ,), format=name), tmp_path / name, calibration=IDS, evaluate=False
        )
    wanted = logits(tmp_path / "dense", UNSEEN)
    for name in ("compressed-tensors", "int-quantized"):
        torch.testing.assert_close(logits(tmp_path / name, UNSEEN), wanted, rtol=1e-4, atol=1e-4)


def test_what_is_unpacked_while_it_loads_takes_one_scheme(tmp_path):
    mixed = hfc.GPTQ(bits=4, group_size=32, overrides={"Wo": {"bits": 8}})
    rounded = hfc.RTN(bits=8, group_size=-1, activations="dynamic")
    budget = hfc.Budget(target_bits=5, choices=("4g32", "8g32")) >> hfc.RTN(bits=4, group_size=32)
    for recipe, reason in (
        (mixed, "only on the grid of one another.*format=int-quantized"),
        (budget, "grids of their own, and of this architecture transformers unpacks one alone; leave budget out"),
    ):
        with pytest.raises(InvalidValueError, match=reason):
            hfc.compress(make_encoder("modernbert"), recipe, tmp_path / "made", calibration=IDS, evaluate=False)
    hfc.compress(
        make_encoder("modernbert"), rounded, tmp_path / "rounded", evaluate=False
    )  # its weights are not hidden
    assert [path.name for path in tmp_path.iterdir()] == ["rounded"]


def test_names_of_the_first_checkpoints_are_read(bert, tmp_path):
    tensors = load_file(bert / "model.safetensors")
    wanted = logits(bert, UNSEEN)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old |= {"cls.seq_relationship.weight": torch.ones(2, 64), "cls.seq_relationship.bias": torch.ones(2)}
    save_file(old, bert / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(bert, UNSEEN), wanted)
    result = hfc.compress(bert, GPTQ, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    assert 0 < result.report["kl_mean"] < 0.05
    assert (logits(tmp_path / "made", UNSEEN) - wanted).abs().mean() < 0.1 * wanted.std()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99), st.booleans())
def test_every_row_is_asked_something_and_padding_nothing(rows, length, seed, padded):
    ids = torch.randint(6, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[:, length // 2 + 1 :] = False
    asked, chosen = masked(Batch(ids, mask if padded else None), MASK, seed)
    assert chosen.any(1).all()
    assert not chosen[~mask].any()
    assert torch.equal(asked.input_ids, ids.masked_fill(chosen, MASK))
    again, _ = masked(Batch(ids, mask if padded else None), MASK, seed)
    assert torch.equal(again.input_ids, asked.input_ids)


def test_so_many_are_asked_for():
    _, chosen = masked(Batch(torch.zeros(64, 512, dtype=torch.long)), MASK, 0)
    assert float(chosen.float().mean()) == pytest.approx(SHARE, abs=0.01)


@pytest.mark.parametrize(
    "step", [hfc.QAT(), hfc.LoRA(), KVCache(), KVCache(type="vector")], ids=lambda step: step.name
)
def test_steps_for_models_that_go_on_are_refused(step, bert, tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=f"is an encoder, and {step.name} is for models that go on with a text"
    ):
        hfc.compress(bert, hfc.RTN(bits=8, group_size=-1) >> step, tmp_path / "made", calibration=IDS)
    assert not (tmp_path / "made").exists()


def test_what_only_text_can_be_asked_is_refused(bert, tmp_path):
    hfc.compress(bert, hfc.RTN(bits=8, group_size=-1), tmp_path / "made", evaluate=False)
    with pytest.raises(
        UnsupportedModelError, match=r"of which nothing but quality is measured; leave speed out of --measure"
    ):
        hfc.evaluate(tmp_path / "made", bert, UNSEEN, measurements=["speed"])
    with pytest.raises(InvalidValueError, match="is an encoder, which does not go on with a text"):
        generate(tmp_path / "made", "word9 word10")
    report = hfc.evaluate(tmp_path / "made", bert, UNSEEN, measurements="all")
    assert {"speed", "memory", "stability", "robustness"} <= set(report["skipped"])


def test_without_a_token_that_masks_it_is_said_before_any_work(tmp_path):
    make_encoder("bert").save_pretrained(tmp_path / "base")
    with pytest.raises(
        UnsupportedModelError, match="predicts tokens that are masked, and has no tokenizer that says how"
    ):
        hfc.compress(tmp_path / "base", GPTQ, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    assert not (tmp_path / "made").exists()
    hfc.compress(tmp_path / "base", GPTQ, tmp_path / "made", calibration=IDS, evaluate=False)


@pytest.fixture(params=ENCODERS)
def headless(request, tmp_path):
    make_encoder(request.param, AutoModel).save_pretrained(tmp_path / "base")
    (tmp_path / "base/1_Pooling").mkdir()
    (tmp_path / "base/1_Pooling/config.json").write_text(
        '{"word_embedding_dimension": 64, "pooling_mode_mean_tokens": true}'
    )
    (tmp_path / "base/modules.json").write_text("[]")
    return tmp_path / "base"


def test_without_a_head_it_is_measured_by_what_it_returns(headless, tmp_path):
    result = hfc.compress(headless, PACKED, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    report = result.report
    ours, theirs = states(tmp_path / "made", UNSEEN), states(headless, UNSEEN)
    cosines = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert report["cosine_mean"] == pytest.approx(float(cosines.mean()), abs=2e-4)
    assert report["cosine_min"] == pytest.approx(float(cosines.min()), abs=1e-3)
    assert 0.9 < report["cosine_mean"] < 1
    mine, wanted = (torch.nn.functional.normalize(each.mean(1), dim=-1) for each in (ours, theirs))
    assert report["embedding_cosine_mean"] == pytest.approx(float((mine * wanted).sum(1).mean()), abs=2e-4)
    changes = [float(mine[i] @ mine[j] - wanted[i] @ wanted[j]) for i in range(4) for j in range(i)]
    assert report["likeness_change"] == pytest.approx(float(np.sqrt(np.mean(np.square(changes)))), rel=0.05, abs=1e-4)
    card = (tmp_path / "made/README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "cosine to the original, of a token" in card
    assert "AutoModel.from_pretrained" in card
    assert f"{report['cosine_mean']:.5f}" in (tmp_path / "made/README.md").read_text()
    assert next(table.title for table in report_tables(report)).startswith("measured on 4 rows")
    page = (tmp_path / "made/report.html").read_text()
    assert f"{report['embedding_cosine_mean']:.5f} (least" in page
    for name in ("1_Pooling/config.json", "modules.json"):
        assert (tmp_path / "made" / name).read_text() == (headless / name).read_text()
    again = hfc.evaluate(tmp_path / "made", headless, UNSEEN)
    assert again["cosine_mean"] == pytest.approx(report["cosine_mean"], abs=1e-6)


def test_without_a_head_more_bits_and_better_steps_lose_less(headless, tmp_path):
    lost = {}
    for name, step in {
        "two bits": hfc.GPTQ(bits=2, group_size=32, symmetric=False),
        "four bits, to the nearest": hfc.RTN(bits=4, group_size=32, symmetric=False),
        "four bits": hfc.GPTQ(bits=4, group_size=32, symmetric=False),
        "eight bits": hfc.RTN(bits=8, group_size=-1, symmetric=False),
    }.items():
        report = hfc.compress(headless, step, tmp_path / name, calibration=IDS, eval_data=UNSEEN).report
        lost[name] = 1 - report["cosine_mean"]
    assert list(lost) == sorted(lost, key=lambda name: -lost[name])
    with pytest.raises(
        UnsupportedModelError, match="is an encoder, and rotate is for models that have a head for tokens"
    ):
        hfc.compress(headless, hfc.Rotate() >> PACKED, tmp_path / "turned", calibration=IDS)


def test_padding_is_no_part_of_an_embedding():
    hidden = torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    found = embedded(hidden, mask)
    torch.testing.assert_close(found[0], hidden[0, :4].mean(0))
    torch.testing.assert_close(found[1], hidden[1].mean(0))


def test_it_passes_the_check_before_a_push(headless, tmp_path):
    made = hfc.compress(headless, PACKED, tmp_path / "made", calibration=IDS, evaluate=False)
    assert check_reload(tmp_path / "made", made.manifest).difference < 1e-3


def test_what_an_export_loses_is_told_without_a_head_too(headless, tmp_path):
    hfc.compress(headless, PACKED, tmp_path / "made", calibration=IDS, evaluate=False)
    made = hfc.export(tmp_path / "made", "dense", tmp_path / "dense", lossy=True, dtype="bfloat16", data=UNSEEN)
    assert 0.99 < made.made["cosine_mean"] < 1 + 1e-5
    with pytest.raises(UnsupportedModelError, match="encoder without a head, so that it has no divergence to compare"):
        hfc.compare([tmp_path / "made"], headless, UNSEEN)


def test_states_that_are_not_finite_are_said(tmp_path):
    model = make_encoder("bert", AutoModel)
    model.embeddings.word_embeddings.weight.data *= 1e30  # whose squares are too large
    with pytest.raises(CheckpointError, match="are not finite in float32; give --dtype float32 or bfloat16"):
        hfc.evaluate(model, model, UNSEEN)
