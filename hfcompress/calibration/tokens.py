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
"""From a source (see CalibrationSettings) to full rows of token ids.

Text is tokenized document by document, joined by the end token, and cut into rows of `seq_len`: no padding, no
truncation. Which rows are taken is seeded. An array of token ids is used as it is.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfcompress.calibration import sources
from hfcompress.calibration.reference_text import reference_text
from hfcompress.errors import CalibrationError
from hfcompress.models.batch import Batch
from hfcompress.models.encoder_decoder import FRAMES, hears, reads_and_writes


BUNDLED = "bundled"
GIVEN = "token ids"  # the source of data that came as an array
DEFAULT_CONTEXT = 2048
ANSWERED = 256  # tokens of a row, if not given, where the model itself says a part of it, one token after the other
POOL = 4  # rows tokenized for every row that is drawn


@dataclass(frozen=True)
class Tokens:
    """
    Args:
        input_ids (`np.ndarray`): int64 `(rows, seq_len)`.
        source (`str`): where they came from.
        mask (`np.ndarray` or `None`): bool `(rows, seq_len)`, false on padding.
        note (`str`): what the user should know of them.
        sound (`np.ndarray` or `None`): float32 `(rows, mel bins, frames)`: what an encoder hears.
        own_output (`bool`): whether what a decoder reads in them is what the model itself says to the rest.
    """

    input_ids: np.ndarray
    source: str
    mask: np.ndarray | None = None
    note: str = ""
    sound: np.ndarray | None = None
    own_output: bool = False

    @property
    def sha256(self) -> str:
        """A digest of the ids, the mask, and what is heard."""
        digest = hashlib.sha256(repr(self.input_ids.shape).encode() + np.ascontiguousarray(self.input_ids).tobytes())
        for part in (self.mask, self.sound):
            if part is not None:
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    @property
    def heard(self) -> int:
        """How many positions an encoder makes of what it hears."""
        return 0 if self.sound is None else self.sound.shape[2] // FRAMES

    @property
    def length(self) -> int:
        """How many positions a row has in all."""
        return self.heard + self.input_ids.shape[1]

    def rows(self, which: Any) -> "Tokens":
        """Some of the rows, by a slice or their numbers."""
        others = {name: part[which] for name in ("mask", "sound") if (part := getattr(self, name)) is not None}
        return replace(self, input_ids=self.input_ids[which], **others)

    @property
    def count(self) -> int:
        """Tokens that are no padding."""
        return self.input_ids.size if self.mask is None else int(self.mask.sum())

    def batch(self, rows: slice = slice(None)) -> Batch:
        """Some of the rows as tensors."""
        ids = torch.from_numpy(np.ascontiguousarray(self.input_ids[rows]))
        mask = None
        if self.mask is not None and not self.mask[rows].all():
            mask = torch.from_numpy(np.ascontiguousarray(self.mask[rows]))
        sound = None if self.sound is None else torch.from_numpy(np.ascontiguousarray(self.sound[rows]))
        return Batch(ids, mask, sound, self.heard)


def load_tokens(
    data: "str | np.ndarray | torch.Tensor | Mapping[str, Any]",
    checkpoint,
    split: str = "calibration",
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    tiny_folder: Path | None = None,
    default_samples: int = 128,
    default_seq_len: int = DEFAULT_CONTEXT,
) -> Tokens:
    """
    Args:
        data: a source as in a recipe; or token ids `(rows, seq_len)`; or a mapping with `input_ids` and
            `attention_mask`.
        checkpoint (`Checkpoint`): the model that will read them: its tokenizer, its vocabulary, its context.
        split (`str`, *optional*): `"calibration"` or `"evaluation"`, which part of the bundled text.
        samples (`int`, *optional*): rows; given, it also cuts token ids.
        seq_len (`int`, *optional*): tokens per row, at most the model's context; given, it also cuts token ids.
        seed (`int`, *optional*): which rows are taken.
        tiny_folder (`Path`, *optional*): the bundled tiny model's folder, whose own arrays serve it.
        default_samples (`int`, *optional*): rows if `samples` is not given.
        default_seq_len (`int`, *optional*): tokens per row if `seq_len` is not given; 2048 are 256 of an encoder-decoder.

    Raises:
        CalibrationError: the source is not there or cannot be used, or gives not one full row.
    """
    config = checkpoint.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    note = ""
    if hears(checkpoint.config):
        from hfcompress.calibration.speech import load_speech  # which makes of its own such tokens

        return load_speech(data, checkpoint, samples or default_samples, seq_len)
    if isinstance(data, str) and data == BUNDLED and tiny_folder is not None and checkpoint.folder == tiny_folder:
        tokens = _from_array(np.load(tiny_folder / f"{split}.npy"), BUNDLED, samples, seq_len)
    elif not isinstance(data, str):
        tokens = _from_memory(data, samples, seq_len)
    elif data.endswith(".npy"):
        tokens = _from_array(sources.read_array(Path(data)), data, samples, seq_len)
    else:
        if data == BUNDLED:
            texts: Iterable[str | list[int]] = reference_text(split)
            note = (
                f"{split} data: the running Python's reference text; a data set like the model's use is better "
                "(--calibration, --eval-data)"
            )
        else:
            texts = sources.read_texts(data, checkpoint.tokenizer)
        speaks = reads_and_writes(checkpoint.config) and default_seq_len == DEFAULT_CONTEXT
        usual = ANSWERED if speaks else default_seq_len
        length = min(seq_len or usual, context)
        tokens = pack_texts(texts, data, checkpoint, samples or default_samples, length, seed, note)
    _check_ids(tokens, config.vocab_size)
    if tokens.input_ids.shape[1] > context:
        raise CalibrationError(
            f"The rows of {tokens.source} are {tokens.input_ids.shape[1]} tokens long, but the model's context is "
            f"{context}; give --seq-len {context}."
        )
    return tokens


def _from_array(array: np.ndarray, source: str, samples: int | None, seq_len: int | None) -> Tokens:
    if not np.issubdtype(array.dtype, np.integer):
        raise CalibrationError(f"{source} holds {array.dtype} values; token ids must be integers.")
    if array.ndim != 2:
        raise CalibrationError(f"{source} has {array.ndim} dimensions; token ids must be (rows, seq_len).")
    array = array[:samples, :seq_len]
    if array.shape[0] == 0 or array.shape[1] < 2:
        raise CalibrationError(f"{source} is empty: there is not one row of at least two tokens in it.")
    return Tokens(array.astype(np.int64), source)


def _from_memory(data: Any, samples: int | None, seq_len: int | None) -> Tokens:
    mask = None
    if isinstance(data, Mapping):
        mask = data.get("attention_mask")
        data = data["input_ids"]
    tokens = _from_array(_array(data), GIVEN, samples, seq_len)
    if mask is not None:
        mask = _array(mask).astype(bool)[:samples, :seq_len]
        if mask.shape != tokens.input_ids.shape:
            raise CalibrationError(
                f"attention_mask is {mask.shape}, but input_ids are {tokens.input_ids.shape}; they must be alike."
            )
    return Tokens(tokens.input_ids, tokens.source, mask)


def _array(data: Any) -> np.ndarray:
    return data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)


def pack_texts(
    texts: Iterable[str | list[int]],
    source: str,
    checkpoint,
    samples: int,
    seq_len: int,
    seed: int = 0,
    note: str = "",
) -> Tokens:
    """
    Documents as full rows of token ids.

    Args:
        texts (`Iterable[str | list[int]]`): documents, or their token ids, taken as long as they are needed.
        source (`str`): what they are called in messages.
        checkpoint (`Checkpoint`): the model whose tokenizer is used.
        samples (`int`): rows.
        seq_len (`int`): tokens per row.
        seed (`int`, *optional*): which rows are taken, of four times as many.
        note (`str`, *optional*): what the user should know of them.

    Raises:
        CalibrationError: there is no tokenizer, or one for another vocabulary, or not one full row.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise CalibrationError(
            f"{checkpoint.name} has no tokenizer, so the text of {source} cannot be used; "
            "give token ids: an .npy of integers shaped (rows, seq_len)."
        )
    wanted = samples * seq_len
    ids: list[int] = []
    for text in texts:
        ids += _token_ids(tokenizer, text)
        if len(ids) >= POOL * wanted + seq_len:
            break
    rows = len(ids) // seq_len
    if rows == 0:
        raise CalibrationError(
            f"{source} gives {len(ids)} tokens, not one full row of {seq_len}; give more text or a smaller --seq-len."
        )
    if rows < samples:
        few = f"{source} gives {rows} rows of {seq_len} tokens, not the {samples} that were asked for"
        note = f"{note}; {few}" if note else few
    array = np.array(ids[: rows * seq_len], dtype=np.int64).reshape(rows, seq_len)
    chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:samples])
    tokens = Tokens(array[chosen], source, note=note)
    _check_ids(tokens, checkpoint.config.get_text_config().vocab_size)
    return tokens


def _token_ids(tokenizer, text: str | list[int]) -> Iterator[int]:
    if isinstance(text, list):
        yield from text
        return
    yield from tokenizer(text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id


def _check_ids(tokens: Tokens, vocabulary: int) -> None:
    low, high = tokens.input_ids.min(), tokens.input_ids.max()
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise CalibrationError(
            f"{tokens.source} holds the token id {wrong}, but the model's vocabulary has {vocabulary}; "
            "it was made with another tokenizer."
        )
