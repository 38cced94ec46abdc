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
"""Noise keeps what it must keep, changes nothing at rate zero, and is the same for the same seed."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hfcompress.calibration.languages import texts
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError
from hfcompress.evaluation import noise
from hfcompress.models.checkpoint import Checkpoint


PROSE = " ".join(texts().values())
TEXT = st.text(max_size=200) | st.sampled_from(sorted(texts().values()))
RATE = st.floats(0, 1)
NOISES = (noise.typos, noise.case, noise.whitespace)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", NOISES)
@settings(deadline=None)
@given(text=TEXT, seed=st.integers(0, 99))
def test_no_rate_no_noise_and_one_seed_one_result(kind, text, seed):
    assert kind(text, rng(seed), 0.0) == text
    assert kind(text, rng(seed), 0.3) == kind(text, rng(seed), 0.3)


@settings(deadline=None)
@given(text=TEXT, rate=RATE)
def test_typos_touch_letters_only(text, rate):
    typed = noise.typos(text, rng(), rate)
    assert [c for c in typed if not c.isalpha()] == [c for c in text if not c.isalpha()]
    letters = sum(c.isalpha() for c in text)
    assert 0 <= sum(c.isalpha() for c in typed) <= 2 * letters


def test_typos_come_at_their_rate_and_in_four_kinds():
    """In words of one letter each, what became of a letter tells what happened to it."""
    words = "s " * 20_000
    kinds = {"": 0, "ss": 0, "near": 0}
    for word in noise.typos(words, rng(), 0.1).split(" ")[:-1]:
        if word != "s":
            kinds[word if word in kinds else "near"] += 1
            assert word in {"", "ss", *"adwezx"}  # what lies around s
    hit = sum(kinds.values())
    assert hit == pytest.approx(2000, abs=4 * np.sqrt(1800))
    expected = {"": hit / 2, "ss": hit / 4, "near": hit / 4}  # nothing to swap with: dropped
    for kind, count in kinds.items():
        assert count == pytest.approx(expected[kind], abs=4 * np.sqrt(hit / 4))


def test_typos_swap_neighbours():
    swapped = sum(noise.typos("ab", rng(seed), 1.0) == "ba" for seed in range(400))
    assert swapped == pytest.approx(100, abs=4 * np.sqrt(75))
    assert noise.typos("Q", rng(3), 1.0) in {"", "QQ", "W", "A"}  # capitals stay capitals


@settings(deadline=None)
@given(text=TEXT, rate=RATE)
def test_case_keeps_the_letters(text, rate):
    changed = noise.case(text, rng(), rate)
    assert len(changed) == len(text)
    assert all(b in (a, a.swapcase()) for a, b in zip(text, changed, strict=True))


def test_case_hits_words_at_its_rate():
    words = "Straße and River " * 2000
    changed = noise.case(words, rng(), 0.2)
    assert len(changed) == len(words)
    pairs = list(zip(words.split(), changed.split(), strict=True))
    differing = sum(a != b for a, b in pairs)
    # a third of the lower-case words' hits turn them to the lower case that they have
    assert differing == pytest.approx(0.2 * (6000 - 2000 / 3), rel=0.1)
    assert ("and", "AND") in pairs
    assert ("River", "river") in pairs
    assert ("and", "aNd") in pairs


@settings(deadline=None)
@given(text=TEXT, rate=RATE)
def test_whitespace_keeps_everything_else(text, rate):
    spaced = noise.whitespace(text, rng(), rate)
    kept = [[c for c in t if c not in " \n"] for t in (text, spaced)]
    assert kept[0] == kept[1]
    assert spaced.count("\n") - text.count("\n") <= text.count(" ")


def test_whitespace_hits_blanks_at_its_rate():
    spaced = noise.whitespace("a " * 10_000, rng(), 0.3)
    counts = [spaced.count(kind) for kind in ("  ", "aa", "\n")]
    assert counts == [pytest.approx(1000, abs=120)] * 3


@settings(deadline=None)
@given(
    ids=hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 6)),
    rate=RATE,
    seed=st.integers(0, 99),
    padded=st.booleans(),
)
def test_swaps_are_as_many_as_said_and_spare_the_padding(ids, rate, seed, padded):
    mask = rng(seed).random(ids.shape) < 0.7 if padded else None
    count = ids.size if mask is None else int(mask.sum())
    before = ids.copy()
    swapped = noise.swap_tokens(ids, mask, 7, rate, rng(seed))
    assert (swapped != ids).sum() == round(rate * count)
    assert swapped.min() >= 0
    assert swapped.max() < 7
    if mask is not None:
        assert (swapped == ids)[~mask].all()
    np.testing.assert_array_equal(ids, before)
    np.testing.assert_array_equal(swapped, noise.swap_tokens(ids, mask, 7, rate, rng(seed)))


def test_the_same_text_gets_the_same_noise_in_any_order():
    first, second, other = noise.perturbations(1), noise.perturbations(1), noise.perturbations(2)
    assert list(first) == ["typos", "case", "whitespace"]
    for name in first:
        changed = first[name](PROSE)
        second[name]("something else")
        assert second[name](PROSE) == changed != PROSE
        assert other[name](PROSE) != changed


def test_rows_become_text_and_rows_again(tiny):
    """The changed rows hold what the noise made of the rows' text, with the special tokens where they were."""
    checkpoint = Checkpoint.open(tiny)
    tokenizer = checkpoint.tokenizer
    ids = np.array(tokenizer("It rains. " * 40)["input_ids"])
    rows = Tokens(np.stack([ids[:64], ids[64:128]]), "rain")
    rows.input_ids[0, 30] = tokenizer.eos_token_id
    changed = noise.retokenized(rows, checkpoint, str.upper)
    parts = [rows.input_ids[0, :30], rows.input_ids[0, 31:], rows.input_ids[1]]
    upper = [tokenizer(tokenizer.decode(part).upper())["input_ids"] for part in parts]
    expected = [*upper[0], tokenizer.eos_token_id, *upper[1], *upper[2]][:128]
    assert changed.input_ids.flatten().tolist() == expected
    assert changed.input_ids.shape == (2, 64)
    same = noise.retokenized(rows, checkpoint, lambda text: text)
    assert tokenizer.decode(same.input_ids[0]) == tokenizer.decode(rows.input_ids[0])


def test_half_a_character_at_a_rows_edge_is_dropped(tiny):
    """The tokenizer's tokens are bytes, and a Greek letter is two of them."""
    checkpoint, seen = Checkpoint.open(tiny), []
    ids = np.array(checkpoint.tokenizer(texts()["Greek"])["input_ids"])
    for first in range(8):
        noise.retokenized(
            Tokens(ids[None, first : first + 40], "Greek"), checkpoint, lambda text: seen.append(text) or text * 2
        )
    assert any("\ufffd" in checkpoint.tokenizer.decode(ids[first : first + 40]) for first in range(8))
    assert all(text and text in texts()["Greek"] for text in seen)


def test_padding_is_no_text(tiny):
    checkpoint = Checkpoint.open(tiny)
    ids = np.array(checkpoint.tokenizer("It rains and rains. " * 20)["input_ids"])[:64]
    mask = np.arange(64) >= np.array([[0], [40]])
    padded = Tokens(np.stack([ids, np.where(mask[1], ids, 5)]), "rain", mask)
    flat = [*ids, *ids[40:]]
    assert noise.unpadded(padded)[1].tolist() == ids[40:].tolist()
    assert noise.retokenized(padded, checkpoint, lambda text: text).input_ids.flatten().tolist() == flat[:64]


def test_errors_say_what_is_missing(tiny, saved_llama):
    rows = Tokens(np.ones((1, 16), dtype=np.int64), "ones")
    with pytest.raises(CalibrationError, match=r"llama has no tokenizer, so its text cannot be changed"):
        noise.retokenized(rows, Checkpoint.open(saved_llama), str)
    with pytest.raises(CalibrationError, match="gives 0 tokens, not one full row of 16; give more text"):
        noise.retokenized(rows, Checkpoint.open(tiny), lambda text: "")


def test_the_languages_are_prose_of_their_own():
    assert len(texts()) >= 6
    for language, text in texts().items():
        assert 900 < len(text) < 1300, language
        assert "  " not in text
        assert "\n" not in text
    assert "CYRILLIC" in unicodedata.name(texts()["Russian"][0])
    assert "GREEK" in unicodedata.name(texts()["Greek"][0])
