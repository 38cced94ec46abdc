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
"""Robustness against plain transformers on the same changed rows, and the attack against random swaps."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hfcompress.calibration.languages import texts
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, InvalidValueError
from hfcompress.evaluation import adversarial, noise, robustness, tasks
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.quality import diverge
from hfcompress.models.checkpoint import Checkpoint


TEXT_CONDITIONS = {"typos", "case", "whitespace", "code", "language"}


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


def log_probs(model, ids: np.ndarray) -> np.ndarray:
    """Float64, of the tokens that follow: `(rows, seq_len - 1, vocabulary)`."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids), use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits.double(), -1).numpy()


def plain_kl(baseline, candidate, ids: np.ndarray) -> np.ndarray:
    theirs, ours = log_probs(baseline, ids), log_probs(candidate, ids)
    return (np.exp(theirs) * (theirs - ours)).sum(-1)


@pytest.fixture(scope="module")
def trained(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def worse(trained):
    return damaged(trained, 0.3)


@pytest.fixture(scope="module")
def rows(tiny):
    ids = np.load(tiny / "evaluation.npy")[:4, :128].astype(np.int64)
    return Tokens(ids, "four rows")


@pytest.fixture(scope="module")
def comparison(tiny, worse, rows):
    tokenizer = Checkpoint.open(tiny).tokenizer
    return Comparison(candidate=Checkpoint.open(worse, tokenizer), baseline=Checkpoint.open(tiny), tokens=rows)


@pytest.fixture(scope="module")
def measured(comparison):
    """The measurement, with the state of torch's generator before and after, and the steps told."""
    before, progress = torch.get_rng_state(), Counted()
    told = dataclasses.replace(comparison, progress=progress)
    found = robustness.measure(told)
    assert torch.equal(before, torch.get_rng_state())
    assert progress.done == robustness.units(told)
    return found


@pytest.fixture
def untrained():
    """Two random models that share no tokenizer, context 64, and short rows."""
    baseline = make_model(CONFIGS["llama"]())
    tokens = Tokens(token_ids(9, 16), "random ids")
    return baseline, Comparison(
        candidate=Checkpoint.open(damaged(baseline, 0.5)), baseline=Checkpoint.open(baseline), tokens=tokens
    )


# conditions


def test_every_condition_is_there(measured):
    assert set(measured["conditions"]) == {"clean", "token_swaps", *TEXT_CONDITIONS}
    assert set(measured["how"]["conditions"]) == set(measured["conditions"])
    assert "absent" not in measured["how"]
    assert "tasks" not in measured


@pytest.mark.parametrize("name", ["clean", "token_swaps", "typos", "whitespace"])
def test_conditions_equal_a_plain_computation(measured, comparison, trained, worse, rows, name):
    if name == "clean":
        ids = rows.input_ids
    elif name == "token_swaps":
        ids = noise.swap_tokens(rows.input_ids, None, 1024, 0.05, np.random.default_rng(0))
    else:
        ids = noise.retokenized(rows, comparison.baseline, noise.perturbations(0)[name]).input_ids
    found = measured["conditions"][name]
    kl, targets = plain_kl(trained, worse, ids), ids[:, 1:, None]
    per_row = kl.mean(1)
    assert found["kl_mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl_mean_stderr"] == pytest.approx(per_row.std(ddof=1) / np.sqrt(len(per_row)), rel=1e-4)
    assert found["tokens"] == kl.size
    for model, key in ((trained, "baseline_perplexity"), (worse, "perplexity")):
        nll = -np.take_along_axis(log_probs(model, ids), targets, -1)
        assert found[key] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    agreement = log_probs(trained, ids).argmax(-1) == log_probs(worse, ids).argmax(-1)
    assert found["top1_agreement"] == pytest.approx(agreement.mean(), abs=2 / kl.size)


def test_noise_and_other_text_are_harder(measured):
    conditions = measured["conditions"]
    for name in conditions.keys() - {"clean"}:
        assert conditions[name]["baseline_perplexity"] > conditions["clean"]["baseline_perplexity"], name


def test_other_languages_are_what_is_read(measured, comparison, trained, worse, monkeypatch):
    read = {}

    def recorded(compared, tokens, label):
        read[label] = tokens
        return diverge(compared, tokens, label)

    monkeypatch.setattr(robustness, "diverge", recorded)
    few = dataclasses.replace(comparison, tokens=robustness.subset(comparison.tokens, 2, 0))
    clean = robustness.subset(few.tokens, 2, 0)
    found, _, absent = robustness._conditions(few, clean)
    assert not absent
    tokenizer = comparison.baseline.tokenizer
    for row in read["robustness: language"].input_ids:
        words = tokenizer.decode(row[1:-1]).strip("\ufffd").split(tokenizer.eos_token)[0]
        assert any(words in text for text in texts().values())
    kl = plain_kl(trained, worse, read["robustness: language"].input_ids)
    assert found["language"].kl.mean() == pytest.approx(kl.mean(), rel=1e-4)
    assert "import" in tokenizer.decode(read["robustness: code"].input_ids.flatten())


def test_more_damage_is_more_divergence_everywhere(measured, comparison, trained):
    wrecked = Checkpoint.open(damaged(trained, 1.0), comparison.baseline.tokenizer)
    found = robustness._conditions(dataclasses.replace(comparison, candidate=wrecked), comparison.tokens)[0]
    for name, divergence in found.items():
        assert divergence.kl.mean() > 2 * measured["conditions"][name]["kl_mean"] > 0, name


def test_a_model_against_itself(comparison):
    few = Tokens(comparison.tokens.input_ids[:2, :64], "two rows")
    found = robustness.measure(dataclasses.replace(comparison, candidate=comparison.baseline, tokens=few))
    for name, condition in found["conditions"].items():
        assert condition["kl_mean"] == pytest.approx(0, abs=1e-7), name
        assert condition["top1_agreement"] == 1
        assert condition["perplexity"] == condition["baseline_perplexity"]
    errors = found["calibration_error"]
    assert errors["baseline"] == errors["compressed"]
    assert found["reliability"]["baseline"] == found["reliability"]["compressed"]
    assert found["adversarial"]["kl_after"] == pytest.approx(0, abs=1e-7)
    assert all(bucket["kl_mean"] == pytest.approx(0, abs=1e-7) for bucket in found["positions"])


def test_seeds_are_reproducible_and_matter(untrained):
    _, comparison = untrained
    found = robustness.measure(comparison)
    assert found == robustness.measure(comparison)
    other = robustness.measure(dataclasses.replace(comparison, seed=1))
    assert other["conditions"]["token_swaps"] != found["conditions"]["token_swaps"]


def test_no_tokenizer_leaves_the_text_conditions_out(untrained):
    _, comparison = untrained
    progress = Counted()
    told = dataclasses.replace(comparison, progress=progress, tasks=("continuation",))
    found = robustness.measure(told)
    assert set(found["conditions"]) == {"clean", "token_swaps"}
    assert set(found["how"]["absent"]) == {*TEXT_CONDITIONS, "tasks"}
    assert all("no tokenizer" in reason for reason in found["how"]["absent"].values())
    assert progress.done == robustness.units(told)


def test_a_tokenizer_of_another_model_is_said(untrained, comparison):
    baseline, other = untrained
    strange = Checkpoint.open(baseline, comparison.baseline.tokenizer)
    ids = comparison.baseline.tokenizer("abc")["input_ids"]
    tokens = Tokens(np.full((2, 16), ids[0]) % 128, "a")
    found, _, absent = robustness._conditions(dataclasses.replace(other, baseline=strange, tokens=tokens), tokens)
    assert "clean" in found
    assert "but the model's vocabulary has 128" in absent["code"]


def test_padding_is_left_out(untrained):
    baseline, comparison = untrained
    ids = token_ids(3, 16)
    mask = np.arange(16) < np.array([[16], [9], [16]])
    masked = dataclasses.replace(comparison, tokens=Tokens(ids, "padded", mask))
    found = robustness.measure(masked)
    assert found["conditions"]["clean"]["tokens"] == 15 + 8 + 15
    candidate = comparison.candidate.model
    kl = [plain_kl(baseline, candidate, row[None, : m.sum()]) for row, m in zip(ids, mask, strict=True)]
    assert found["conditions"]["clean"]["kl_mean"] == pytest.approx(np.concatenate(kl, 1).mean(), rel=1e-4)
    assert found["adversarial"]["rows"] == 2  # those without padding
    assert found["positions"][-1]["to"] == 41  # 41 tokens in one row


# positions


def test_positions_cover_the_clean_rows_once(comparison, measured, rows):
    """The rows are half as long as the context and join to two whole ones."""
    edges = [(b["from"], b["to"]) for b in measured["positions"]]
    assert edges == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 128), (128, 256)]
    assert "positions" in measured["how"]


def positions(comparison):
    return robustness._positions(comparison, comparison.tokens, diverge(comparison))


def test_positions_of_joined_rows_equal_a_plain_computation(untrained):
    """Nine rows of 16 make two of 64, the context."""
    baseline, comparison = untrained
    found = positions(comparison)
    joined = comparison.tokens.input_ids.reshape(-1)[:128].reshape(2, 64)
    kl = plain_kl(baseline, comparison.candidate.model, joined)
    assert [b["to"] for b in found] == [2, 4, 8, 16, 32, 64]
    for bucket in found:
        part = kl[:, bucket["from"] - 1 : bucket["to"] - 1]  # kl[:, 0] is of position 1
        assert bucket["kl_mean"] == pytest.approx(part.mean(), rel=1e-4)
        assert bucket["kl_mean_stderr"] == pytest.approx(part.mean(1).std(ddof=1) / np.sqrt(2), rel=1e-3)


def test_rows_as_long_as_the_context_are_not_read_twice(untrained):
    baseline, comparison = untrained
    long = dataclasses.replace(comparison, tokens=Tokens(token_ids(4, 64), "long"))
    found = positions(long)
    kl = plain_kl(baseline, comparison.candidate.model, long.tokens.input_ids)
    assert found[-1]["kl_mean"] == pytest.approx(kl[:, 31:].mean(), rel=1e-4)


# calibration error


@settings(deadline=None)
@given(answers=st.lists(st.tuples(st.floats(0.01, 1), st.booleans(), st.integers(0, 4)), min_size=1, max_size=60))
def test_the_calibration_error_by_hand(answers):
    confidence, correct, row = (np.array(column) for column in zip(*answers, strict=True))

    def by_hand(chosen):
        total = 0.0
        for low in range(15):
            inside = [
                (c, y) for c, y, r in answers if r in chosen and (low <= c * 15 < low + 1 or (low == 14 and c == 1))
            ]
            if inside:
                accuracy = sum(y for _, y in inside) / len(inside)
                total += len(inside) * abs(accuracy - sum(c for c, _ in inside) / len(inside))
        return total / sum(r in chosen for r in row)

    everywhere = set(row.tolist())
    error, stderr, bins = robustness.calibration_error(confidence, correct, row)
    assert error == pytest.approx(by_hand(everywhere), abs=1e-12)
    assert sum(b["tokens"] for b in bins) == len(answers)
    assert error == pytest.approx(sum(b["tokens"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(answers))
    if len(everywhere) == 1:
        assert stderr is None
    else:
        without = np.array([by_hand(everywhere - {r}) for r in everywhere])
        assert stderr == pytest.approx(np.sqrt(without.var() * (len(without) - 1)), abs=1e-12)


def test_the_calibration_error_of_the_clean_rows(measured, trained, worse, rows):
    for model, side in ((trained, "baseline"), (worse, "compressed")):
        found = log_probs(model, rows.input_ids)
        confidence, correct = np.exp(found.max(-1)), found.argmax(-1) == rows.input_ids[:, 1:]
        where = np.repeat(np.arange(4), 127)
        expected, stderr, _ = robustness.calibration_error(confidence.flatten(), correct.flatten(), where)
        assert measured["calibration_error"][side] == pytest.approx(expected, abs=1e-4)
        assert measured["calibration_error"][f"{side}_stderr"] == pytest.approx(stderr, abs=1e-3)


# the attack


def test_the_attack_beats_a_random_search(trained, rows):
    """As many swaps and as many trials, but at places and to tokens that are drawn."""
    ids, allowed = torch.from_numpy(rows.input_ids[:3, :64]), torch.arange(1, 1024)
    attacked, searched, before = [], [], []
    generator = torch.Generator().manual_seed(0)
    for row in ids:
        found = adversarial.hotflip(trained, row, allowed, swaps=3, candidates=4)
        assert (found[32:] == row[32:]).all()
        assert 1 <= (found != row).sum() <= 3
        with torch.no_grad():
            attacked.append(adversarial.second_half_nll(trained, found[None]).item())
            current, loss = row, adversarial.second_half_nll(trained, row[None]).item()
            before.append(loss)
            for _ in range(3):
                tried = current.repeat(4, 1)
                places = torch.randint(32, (4,), generator=generator)
                tried[torch.arange(4), places] = torch.randint(1, 1024, (4,), generator=generator)
                losses = adversarial.second_half_nll(trained, tried)
                if losses.max() > loss:
                    current, loss = tried[losses.argmax()], losses.max().item()
            searched.append(loss)
    assert all(a > b for a, b in zip(attacked, before, strict=True))
    assert np.mean(attacked) > np.mean(searched)


def test_the_gain_is_the_slope(untrained):
    """The loss along the first step from one embedding towards another rises as the gain says."""
    model, _ = untrained
    model = model.double()
    ids = torch.from_numpy(token_ids(1, 16)[0])
    table = model.get_input_embeddings().weight.detach()
    gain = adversarial.first_order_gain(model, ids, table)
    assert gain.shape == (8, 128)
    whole = model.get_input_embeddings()(ids[None]).detach()
    for position, token in ((0, 5), (3, 77), (7, 100)):
        losses = []
        for size in (-1e-2, 1e-2):
            moved = whole.clone()
            moved[0, position] += size * (table[token] - whole[0, position])
            with torch.no_grad():
                losses.append(adversarial.second_half_nll(model, ids[None], moved).item())
        assert (losses[1] - losses[0]) / 2e-2 == pytest.approx(gain[position, token].item(), rel=2e-2)


@pytest.mark.parametrize("seed", range(4))
def test_every_swap_has_a_place_of_its_own_and_raises_the_loss(untrained, seed):
    """Of six tokens only, so that soon no swap is left that does."""
    model, _ = untrained
    row, before = torch.from_numpy(token_ids(1, 16, seed)[0]), None
    for swaps in range(9):
        found = adversarial.hotflip(model, row, torch.arange(5, 11), swaps, candidates=3)
        with torch.no_grad():
            loss = adversarial.second_half_nll(model, found[None]).item()
        if before is not None:
            changed = found != before[0]
            assert changed.sum() <= 1
            assert (before[0][changed] == row[changed]).all()
            assert loss > before[1] if changed.any() else loss == before[1]
        before = found, loss
    assert 0 < (found != row).sum() <= 8


def test_the_second_half_is_what_is_scored(trained, rows):
    ids = rows.input_ids[:2]
    nll = -np.take_along_axis(log_probs(trained, ids), ids[:, 1:, None], -1)[:, 63:, 0].mean(1)
    with torch.no_grad():
        found = adversarial.second_half_nll(trained, torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(found, nll, rtol=1e-4)


def test_what_the_attack_reports(measured, trained, worse, rows, monkeypatch):
    found = measured["adversarial"]
    assert found["rows"] == 4
    assert 1 <= found["swaps_made"] <= found["swaps"] == adversarial.SWAPS
    assert found["baseline_nll_after"] > found["baseline_nll_before"] + 0.1
    assert found["baseline_nll_after"] > found["baseline_nll_random"]
    for model, side in ((trained, "baseline"), (worse, "compressed")):
        nll = -np.take_along_axis(log_probs(model, rows.input_ids), rows.input_ids[:, 1:, None], -1)[:, 63:]
        assert found[f"{side}_nll_before"] == pytest.approx(nll.mean(), rel=1e-4)
    kl = plain_kl(trained, worse, rows.input_ids)[:, 63:]
    assert found["kl_before"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl_before_stderr"] == pytest.approx(kl.mean(1).std(ddof=1) / np.sqrt(4), rel=1e-3)


@settings(deadline=None)
@given(seed=st.integers(0, 99), counts=st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_random_swaps_are_as_many(seed, counts):
    before = token_ids(3, 10, vocabulary=4)
    swapped = adversarial.random_swaps(before, counts, np.array([1, 2, 3]), np.random.default_rng(seed))
    assert ((swapped != before)[:, :5].sum(1) == counts).all()
    assert (swapped[:, 5:] == before[:, 5:]).all()
    assert swapped[swapped != before].min(initial=1) >= 1  # only what is allowed is put in


def test_special_tokens_are_not_put_in(comparison):
    allowed = adversarial._allowed(comparison)
    assert comparison.baseline.tokenizer.eos_token_id not in allowed
    assert len(allowed) == 1023


def test_large_models_are_not_attacked(comparison, monkeypatch, measured):
    monkeypatch.setattr(adversarial, "MAX_PARAMETERS", 1000)
    progress = Counted()
    few = robustness.subset(comparison.tokens, 2, 0)
    told = dataclasses.replace(comparison, progress=progress, tokens=few)
    found = robustness.measure(told)
    assert "adversarial" not in found
    assert "adversarial" not in found["how"]
    reason = found["how"]["absent"]["adversarial"]
    assert "million parameters; adversarial swaps are searched for on models of up to" in reason
    assert progress.done == robustness.units(told)


def test_short_rows_are_not_attacked(untrained):
    with pytest.raises(
        CalibrationError, match="Rows of 3 tokens are too short to attack; give longer evaluation text"
    ):
        adversarial.measure(untrained[1], token_ids(2, 3))


# tasks


def test_tasks_are_answered_under_noise(comparison):
    pytest.importorskip("lm_eval")
    progress = Counted()
    asked = dataclasses.replace(comparison, tasks=("continuation",), limit=6, progress=progress)
    found = robustness._tasks(asked)
    assert progress.done == robustness._task_units(asked)
    assert set(found) == {"clean", "typos", "case", "whitespace"}  # no few-shot examples to reorder
    scores = tasks.measure(dataclasses.replace(asked, progress=Counted()))["scores"]
    for name, score in scores.items():
        assert found["clean"][name] == {"baseline": score["baseline"], "compressed": score["compressed"]}


def test_the_bar_is_whole_where_tasks_fail_on_the_way(comparison, monkeypatch):
    pytest.importorskip("lm_eval")
    from hfcompress.evaluation import harness

    run, runs = harness.run, []

    def failing(*arguments, **options):
        runs.append(arguments)
        if len(runs) == 3:
            raise InvalidValueError("No more.")
        return run(*arguments, **options)

    monkeypatch.setattr(harness, "run", failing)
    progress = Counted()
    asked = dataclasses.replace(comparison, tasks=("continuation",), limit=2, progress=progress)
    with pytest.raises(InvalidValueError, match="No more"):
        robustness._tasks(asked)
    assert progress.done == robustness._task_units(asked)
