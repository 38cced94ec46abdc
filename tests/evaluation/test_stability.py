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
"""Stability: generation against transformers' own, drift against plain KL, repetition against counting."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hfcompress.calibration.tokens import Tokens
from hfcompress.evaluation import stability
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.quality import diverge
from hfcompress.models.checkpoint import Checkpoint


class Counted:
    """Progress that counts."""

    def __init__(self):
        self.done = 0

    def start(self, total):
        raise AssertionError("a measurement does not start the bar")

    def step(self, description, amount=1):
        self.done += amount

    def note(self, message):
        raise AssertionError(message)


def damaged(model, scale: float):
    """A copy with noise on the weights of its second block."""
    copied = type(model)(model.config).eval()
    copied.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    for parameter in copied.model.layers[1].parameters():
        parameter.data += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return copied


@pytest.fixture(scope="module")
def llama_pair():
    """Two random models that share no tokenizer, context 64."""
    baseline = make_model(CONFIGS["llama"]())
    return Comparison(
        candidate=Checkpoint.open(damaged(baseline, 0.3)),
        baseline=Checkpoint.open(baseline),
        tokens=Tokens(token_ids(6, 32), "random ids"),
    )


@pytest.fixture(scope="module")
def measured(llama_pair):
    """What was found, what both models read, and a check that torch's generator is as it was."""
    read, progress, before = [], Counted(), torch.get_rng_state()

    def recorded(compared, tokens, label):
        read.append(tokens.input_ids)
        return diverge(compared, tokens, label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stability, "diverge", recorded)
        told = dataclasses.replace(llama_pair, progress=progress)
        found = stability.measure(told)
    assert torch.equal(before, torch.get_rng_state())
    assert progress.done == stability.units(told)
    return found, read[0]


# generation


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "qwen3-mixed", "gemma3", "gpt2", "opt"])
def test_greedy_is_what_transformers_generates(name):
    model, prompts = make_model(CONFIGS[name]()), token_ids(3, 12)
    model.generation_config.eos_token_id = None  # transformers would stop there
    prompt = torch.from_numpy(prompts)
    with torch.no_grad():
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30)
    ours = stability.generate(model, prompts, 30)
    np.testing.assert_array_equal(ours, theirs[:, 12:].numpy())


def test_sampling_follows_the_distribution(llama):
    """Evenly spaced draws give every token its share, exactly."""
    prompt, count = token_ids(1, 12), 2000
    draws = ((np.arange(count) + 0.5) / count)[:, None]
    first = stability.generate(llama, np.repeat(prompt, count, axis=0), 1, draws)[:, 0]
    with torch.no_grad():
        probabilities = llama(torch.from_numpy(prompt)).logits[0, -1].double().softmax(-1).numpy()
    shares = np.bincount(first, minlength=128) / count
    assert np.abs(shares - probabilities).max() <= 1.01 / count


def test_a_row_is_the_same_in_any_batch_and_told_token_by_token(llama):
    prompts, told = token_ids(4, 8), []
    draws = np.random.default_rng(0).random((4, 20))
    together = stability.generate(llama, prompts, 20, draws, told.append)
    alone = [stability.generate(llama, prompts[i : i + 1], 20, draws[i : i + 1])[0] for i in range(4)]
    np.testing.assert_array_equal(together, alone)
    assert told == list(range(20))
    assert len({tuple(row) for row in together}) == 4


@settings(deadline=None)
@given(weights=st.lists(st.floats(-50, 50), min_size=2, max_size=20), draw=st.floats(0, 1, exclude_max=True))
def test_a_draw_picks_by_the_cumulative_sum(weights, draw):
    picked = stability._picked(torch.tensor([weights]), torch.tensor([[draw]], dtype=torch.float64)).item()
    logits = np.array(weights, dtype=np.float32).astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    cumulative = np.concatenate([[0], np.cumsum(probabilities / probabilities.sum())])
    assert cumulative[picked] <= draw + 1e-12
    assert draw <= cumulative[picked + 1] + 1e-12


def test_a_token_without_probability_is_never_picked():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for draw, token in ((0.0, 1), (0.49, 1), (0.5, 3), (1 - 1e-16, 3)):
        assert stability._picked(logits, torch.tensor([[draw]], dtype=torch.float64)).item() == token


# repetition


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=40), n=st.integers(1, 5))
def test_repetition_is_what_counting_gives(ids, n):
    grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    expected = sum(count - 1 for count in grams.values()) / grams.total() if grams else 0
    assert stability.repeated(np.array(ids, dtype=np.int64), n) == pytest.approx(expected)


def test_the_repetition_of_each_model(measured, llama_pair):
    """Both models write again, with the random numbers that the seed gives."""
    found, read = measured
    draws = np.random.default_rng(0).random((12, 56))
    rates = {}
    for side, checkpoint in llama_pair.models:
        written = stability.generate(checkpoint.model, read[:, :8], 56, draws)
        if side == "baseline":
            np.testing.assert_array_equal(read[:, 8:], written)
        grams = [[tuple(row[i : i + 4]) for i in range(53)] for row in written.tolist()]
        rates[side] = np.array([1 - len(set(g)) / 53 for g in grams])
        assert found["repetition"][side] == pytest.approx(rates[side].mean())
        assert found["repetition"][f"{side}_stderr"] == pytest.approx(rates[side].std(ddof=1) / np.sqrt(12))
    difference = rates["compressed"] - rates["baseline"]
    assert found["repetition"]["difference"] == pytest.approx(difference.mean())
    assert found["repetition"]["difference_stderr"] == pytest.approx(difference.std(ddof=1) / np.sqrt(12))


# the measurement


def test_drift_equals_a_plain_computation(measured, llama_pair):
    found, read = measured
    assert read.shape == (12, 64)  # four prompts of an eighth of the context, three times
    assert {tuple(row[:8]) for row in read} <= {tuple(row[:8]) for row in llama_pair.tokens.input_ids}
    with torch.no_grad():
        theirs, ours = (
            torch.log_softmax(c.model(torch.from_numpy(read)).logits.double(), -1) for _, c in llama_pair.models
        )
    kl = (theirs.exp() * (theirs - ours)).sum(-1).numpy()
    buckets = found["kl_by_position"]
    assert [b["from"] for b in buckets] == [8, 15, 22, 29, 36, 43, 50, 57]
    assert buckets[-1]["to"] == 64
    for bucket in buckets:
        part = kl[:, bucket["from"] - 1 : bucket["to"] - 1]  # the token at p is predicted at p - 1
        assert bucket["kl_mean"] == pytest.approx(part.mean(), rel=1e-4)
        assert bucket["kl_mean_stderr"] == pytest.approx(part.mean(1).std(ddof=1) / np.sqrt(12), rel=1e-3)


def test_the_common_prefix_and_the_generations(measured, llama_pair):
    found, read = measured
    greedy = {side: stability.generate(c.model, read[:4, :8], 56) for side, c in llama_pair.models}
    lengths = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), 56)
        for one, other in zip(*greedy.values(), strict=True)
    ]
    assert found["common_prefix"] == np.mean(lengths)
    assert 0 < found["common_prefix"] < 56
    for index, generation in enumerate(found["generations"]):
        assert generation["prompt"] == " ".join(str(i) for i in read[index, :8])
        assert generation["compressed"] == " ".join(str(i) for i in greedy["compressed"][index])
        assert generation["baseline"] == " ".join(str(i) for i in greedy["baseline"][index])


def test_a_model_against_itself(llama_pair):
    found = stability.measure(dataclasses.replace(llama_pair, candidate=llama_pair.baseline))
    assert all(bucket["kl_mean"] == pytest.approx(0, abs=1e-7) for bucket in found["kl_by_position"])
    assert found["common_prefix"] == 56
    for kind in ("repetition", "greedy_repetition"):
        assert found[kind]["baseline"] == found[kind]["compressed"]
        assert found[kind]["difference"] == 0
    assert all(g["baseline"] == g["compressed"] for g in found["generations"])


def test_more_damage_is_more_drift(measured, llama_pair):
    found, _ = measured
    wrecked = Checkpoint.open(damaged(llama_pair.baseline.model, 3.0))
    worse = stability.measure(dataclasses.replace(llama_pair, candidate=wrecked))
    for mild, severe in zip(found["kl_by_position"], worse["kl_by_position"], strict=True):
        assert severe["kl_mean"] > 2 * mild["kl_mean"] > 0
    assert worse["common_prefix"] < found["common_prefix"]


def test_seeds_are_reproducible_and_matter(measured, llama_pair):
    found, _ = measured
    torch.manual_seed(123)
    assert stability.measure(llama_pair) == found
    other = stability.measure(dataclasses.replace(llama_pair, seed=1))
    assert other["kl_by_position"] != found["kl_by_position"]
    assert other["how"]["seed"] == 1


def test_text_where_there_is_a_tokenizer(tiny, monkeypatch):
    """On the trained model, cut to a shorter text; its own greedy words come from plain generate."""
    monkeypatch.setattr(stability, "LENGTH", 80)
    monkeypatch.setattr(stability, "PROMPTS", 2)
    checkpoint = Checkpoint.open(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokens = Tokens(np.load(tiny / "evaluation.npy")[:3, :64].astype(np.int64), "three rows")
    worse = Checkpoint.open(damaged(model, 0.5), checkpoint.tokenizer)
    found = stability.measure(Comparison(candidate=worse, baseline=checkpoint, tokens=tokens))
    assert len(found["generations"]) == 2
    for generation in found["generations"]:
        prompt = torch.tensor([checkpoint.tokenizer(generation["prompt"])["input_ids"]])
        with torch.no_grad():
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=70)
        assert prompt.shape[1] == 10
        assert generation["baseline"] == checkpoint.tokenizer.decode(ids[0, 10:])
        assert generation["compressed"] != generation["baseline"]


def test_a_context_of_a_few_tokens(llama_pair):
    """Fewer tokens than steps of progress and than a 4-gram has."""
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 4
    model, progress = make_model(config), Counted()
    small = Comparison(
        candidate=Checkpoint.open(model),
        baseline=Checkpoint.open(model),
        tokens=Tokens(token_ids(1, 4), "ids"),
        progress=progress,
    )
    found = stability.measure(small)
    assert progress.done == stability.units(small)
    assert found["repetition"]["baseline"] == 0
    assert found["common_prefix_stderr"] is None
    assert found["kl_by_position"][-1]["to"] == 4
