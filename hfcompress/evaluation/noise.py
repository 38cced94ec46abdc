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
"""
Seeded noise on text and on token ids: what people type, and what tokenizers stumble over.

Every function keeps what it does not name: typos keep every character that is no letter, case keeps the letters,
whitespace keeps everything else. A rate of zero changes nothing, and a generator in the same state changes the same.
"""

import functools
import itertools
import zlib
from collections.abc import Callable

import numpy as np

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError
from hfcompress.evaluation.rows import unpadded
from hfcompress.models.checkpoint import Checkpoint


TYPO_RATE = 0.02  # of letters
CASE_RATE = 0.1  # of words
BLANK_RATE = 0.1  # of blanks
SWAP_RATE = 0.05  # of tokens
REPLACEMENT = "\ufffd"
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEARBY = ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0))  # a key's row and column relative to another's


def _neighbours() -> dict[str, str]:
    places = {(i, j): key for i, row in enumerate(KEYBOARD) for j, key in enumerate(row)}
    return {
        key: "".join(places[i + di, j + dj] for di, dj in NEARBY if (i + di, j + dj) in places)
        for (i, j), key in places.items()
    }


NEIGHBOURS = _neighbours()


def perturbations(seed: int) -> dict[str, Callable[[str], str]]:
    """
    The three kinds of noise on text by their names, each a function of the text alone: the same text comes out the
    same, in whatever order texts are given.

    Args:
        seed (`int`): of the noise.
    """
    noises = (typos, case, whitespace)
    return {noise.__name__: functools.partial(_seeded, noise, seed) for noise in noises}


def _seeded(noise: Callable[[str, np.random.Generator], str], seed: int, text: str) -> str:
    return noise(text, np.random.default_rng((seed, zlib.crc32(text.encode("utf-8", "replace")))))


def typos(text: str, rng: np.random.Generator, rate: float = TYPO_RATE) -> str:
    """
    Slips of the finger: a letter is swapped with the letter that follows it, dropped, doubled, or replaced by a
    neighbour on a QWERTY keyboard, equally often (a letter that is not on it is doubled instead; one that no letter
    follows is dropped instead of swapped).

    Args:
        text (`str`): what was meant.
        rng (`np.random.Generator`): what is drawn from.
        rate (`float`, *optional*): share of letters that are hit.
    """
    typed, index = [], 0
    while index < len(text):
        letter, following = text[index], text[index + 1 : index + 2]
        index += 1
        if not letter.isalpha() or rng.random() >= rate:
            typed.append(letter)
            continue
        slip = rng.integers(4)
        if slip == 0 and following.isalpha():
            typed += [following, letter]
            index += 1
        elif slip == 2 or (slip == 3 and letter.lower() not in NEIGHBOURS):
            typed += [letter, letter]
        elif slip == 3:
            keys = NEIGHBOURS[letter.lower()]
            hit = keys[rng.integers(len(keys))]
            typed.append(hit.upper() if letter.isupper() else hit)
    return "".join(typed)


def case(text: str, rng: np.random.Generator, rate: float = CASE_RATE) -> str:
    """
    Wrong capitals: a word turns to upper case, to lower case, or has the case of one of its characters flipped, equally
    often. Characters whose other case is not one character that leads back are left alone.

    Args:
        text (`str`): what was meant.
        rng (`np.random.Generator`): what is drawn from.
        rate (`float`, *optional*): share of words that are hit.
    """
    words = text.split(" ")
    for index, word in enumerate(words):
        if not word or rng.random() >= rate:
            continue
        kind = rng.integers(3)
        flipped = [_other_case(c) for c in word]
        if kind == 0:
            chosen = [c.islower() for c in word]
        elif kind == 1:
            chosen = [c.isupper() for c in word]
        else:
            chosen = np.arange(len(word)) == rng.integers(len(word))
        words[index] = "".join(f if hit else c for c, f, hit in zip(word, flipped, chosen, strict=True))
    return " ".join(words)


def _other_case(character: str) -> str:
    other = character.swapcase()
    return other if len(other) == 1 and other.swapcase() == character else character


def whitespace(text: str, rng: np.random.Generator, rate: float = BLANK_RATE) -> str:
    """
    Careless spacing: a blank is doubled, dropped, or becomes a newline, equally often.

    Args:
        text (`str`): what was meant.
        rng (`np.random.Generator`): what is drawn from.
        rate (`float`, *optional*): share of blanks that are hit.
    """
    parts = text.split(" ")
    hit = rng.random(len(parts) - 1) < rate
    kinds = rng.integers(3, size=len(parts) - 1)
    blanks = [("  ", "", "\n")[kind] if changed else " " for kind, changed in zip(kinds, hit, strict=True)]
    return "".join(part + blank for part, blank in zip(parts, [*blanks, ""], strict=True))


def swap_tokens(
    ids: np.ndarray, mask: np.ndarray | None, vocabulary: int, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """
    Token ids of which a share is replaced by other ones, drawn evenly from the rest of the vocabulary.

    Args:
        ids (`np.ndarray`): int64 `(rows, seq_len)`.
        mask (`np.ndarray` or `None`): bool `(rows, seq_len)`, false on padding, which is left alone.
        vocabulary (`int`): the number of token ids, at least 2.
        rate (`float`): share of the tokens, rounded to a whole number of them.
        rng (`np.random.Generator`): what is drawn from.

    Returns:
        `np.ndarray`: int64 `(rows, seq_len)`.
    """
    places = np.flatnonzero(np.ones_like(ids, dtype=bool) if mask is None else mask)
    chosen = rng.permutation(places)[: round(rate * len(places))]
    swapped = ids.copy()
    swapped.flat[chosen] = (ids.flat[chosen] + rng.integers(1, vocabulary, len(chosen))) % vocabulary
    return swapped


def with_swaps(tokens: Tokens, vocabulary: int, seed: int, rate: float = SWAP_RATE) -> Tokens:
    """Rows with a share of their tokens swapped, see [`swap_tokens`]."""
    ids = swap_tokens(tokens.input_ids, tokens.mask, vocabulary, rate, np.random.default_rng(seed))
    return Tokens(ids, tokens.source, tokens.mask)


def retokenized(tokens: Tokens, checkpoint: Checkpoint, noise: Callable[[str], str]) -> Tokens:
    """
    Rows turned to text, changed, tokenized again and cut into rows of the same length; the tail is dropped, and so is
    what would make more rows than there were. Special tokens stay where they are.

    Args:
        tokens (`Tokens`): the rows.
        checkpoint (`Checkpoint`): whose tokenizer is used.
        noise (`Callable`): from text to text.

    Raises:
        CalibrationError: there is no tokenizer, or not one full row.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise CalibrationError(f"{checkpoint.name} has no tokenizer, so its text cannot be changed; give one with it.")
    special, ids = set(tokenizer.all_special_ids), []
    for row in unpadded(tokens):
        for is_special, run in itertools.groupby(row.tolist(), special.__contains__):
            if is_special:
                ids += run
                continue
            text = tokenizer.decode(list(run), clean_up_tokenization_spaces=False)
            text = text.strip(REPLACEMENT)  # a character of which the row holds only a part
            ids += tokenizer(noise(text), add_special_tokens=False, verbose=False)["input_ids"]
    count, seq_len = tokens.input_ids.shape
    rows = min(len(ids) // seq_len, count)
    if rows == 0:
        raise CalibrationError(
            f"The changed text gives {len(ids)} tokens, not one full row of {seq_len}; give more text."
        )
    return Tokens(np.array(ids[: rows * seq_len], dtype=np.int64).reshape(rows, seq_len), tokens.source)
