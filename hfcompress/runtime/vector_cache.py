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
A key-value cache whose older part is kept in vectors: a byte for every few channels of a head, the number of a vector in a book
for just these channels (coupled quantization: Zhang et al. 2024). The books lie in a checkpoint's `kv_cache/vectors.safetensors`
as `layers.N.keys` and `layers.N.values`, each `(heads, groups, 256, length)` in the checkpoint's dtype.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.models.checkpoint import Checkpoint


FILE = "kv_cache/vectors.safetensors"
ENTRIES = 256
RECENT = 64  # tokens, which attention leans on most
ROOM = 1 << 24  # distances that are held at a time


class Books(NamedTuple):
    """
    Of one attention, each float `(heads, groups, 256, length)`, of which a head has `groups * length` channels.

    Args:
        keys (`Tensor`): of the keys, as they are cached: rotated where the model rotates them.
        values (`Tensor`): of the values.
    """

    keys: Tensor
    values: Tensor


def encoded(states: Tensor, book: Tensor) -> Tensor:
    """
    The numbers of the nearest vectors.

    Args:
        states (`Tensor`): `(rows, heads, tokens, head_dim)`.
        book (`Tensor`): `(heads, groups, 256, length)`.

    Returns:
        `Tensor`: uint8 `(rows, heads, tokens, groups)`.
    """
    rows, heads, tokens, _ = states.shape
    _, groups, entries, length = book.shape
    book = book.to(states.device, torch.float32)
    points = states.float().reshape(rows, heads, tokens, groups, length).permute(1, 3, 0, 2, 4)
    points = points.reshape(heads * groups, rows * tokens, length)
    vectors = book.reshape(heads * groups, entries, length)
    lengths = vectors.square().sum(2)[:, None]
    at_once = max(1, ROOM // (heads * groups * entries))
    found = [
        torch.baddbmm(lengths, part, vectors.transpose(1, 2), alpha=-2).argmin(2).to(torch.uint8)
        for part in points.split(at_once, 1)
    ]
    numbers = torch.cat(found, 1).view(heads, groups, rows, tokens)
    return numbers.permute(2, 0, 3, 1).contiguous()


def decoded(numbers: Tensor, book: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors of these numbers, `(rows, heads, tokens, head_dim)`; see [`encoded`]."""
    heads, groups, entries, length = book.shape
    first = torch.arange(heads * groups, device=numbers.device, dtype=torch.int32).mul_(entries).view(heads, 1, groups)
    table = book.to(numbers.device, dtype).reshape(-1, length)
    return functional.embedding(numbers.to(torch.int32) + first, table).flatten(3)


class VectorLayer(DynamicLayer):
    """
    The cache of one attention: its last tokens as they are, and before them numbers of vectors.

    Args:
        books (`Books`): the vectors.
        recent (`int`): at least so many tokens stay as they are, and at most twice as many.
    """

    def __init__(self, books: Books, recent: int):
        super().__init__()
        self.books, self.recent = books, recent
        self.numbers: list[Tensor] = []  # of keys and of values, uint8 `(rows, heads, tokens, groups)`

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """What transformers calls before the first token."""
        super().lazy_initialization(key_states, value_states)
        self.books = Books(*(book.to(key_states.device, key_states.dtype) for book in self.books))
        pairs = zip((key_states, value_states), self.books, strict=True)
        self.numbers = [encoded(states[:, :, :0], book) for states, book in pairs]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """All keys and values so far, of which those that were cached before may be vectors."""
        super().update(key_states, value_states, *args, **kwargs)
        pairs = zip(self.numbers, self.books, strict=True)
        old = [decoded(numbers, book, self.dtype) for numbers, book in pairs]
        keys, values = (torch.cat(each, 2) for each in zip(old, self._as_they_are, strict=True))
        if self._fresh >= max(2 * self.recent, 1):
            self._put_away(self._fresh - self.recent)
        return keys, values

    @property
    def _as_they_are(self) -> tuple[Tensor, Tensor]:
        """The last tokens' keys and values, `(rows, heads, tokens, head_dim)`, or empty."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def _fresh(self) -> int:
        """How many of the tokens are as they are."""
        return self._as_they_are[0].shape[2] if self.is_initialized and self._as_they_are[0].dim() == 4 else 0

    def _put_away(self, tokens: int) -> None:
        """The oldest of those that are as they were become numbers."""
        pairs = zip(self.numbers, self._as_they_are, self.books, strict=True)
        self.numbers = [torch.cat([old, encoded(new[:, :, :tokens], book)], 2) for old, new, book in pairs]
        self.keys, self.values = (states[:, :, tokens:].clone() for states in self._as_they_are)

    def get_seq_length(self) -> int:
        """Tokens."""
        return self.numbers[0].shape[2] + self._fresh if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        """What the tokens take; the books, which do not grow with them, are left out."""
        return sum(tensor.nbytes for tensor in (*self.numbers, *self._as_they_are)) if self.is_initialized else 0

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.numbers = []

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, which are told as a negative number."""
        recent = self._fresh
        more = max(0, -tokens_to_remove - recent)
        super().crop(max(tokens_to_remove, -recent) if tokens_to_remove < 0 else tokens_to_remove)
        if more:
            self.numbers = [numbers[:, :, :-more] for numbers in self.numbers]

    def _rows(self, change) -> None:
        if self.get_seq_length():
            self.keys, self.values = (change(states) for states in self._as_they_are)
            self.numbers = [change(numbers) for numbers in self.numbers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """What beam search calls."""
        self._rows(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        self._rows(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        self._rows(lambda states: states[indices])

    def offload(self) -> None:
        """To the CPU."""
        super().offload()
        self.numbers = [numbers.to("cpu", non_blocking=True) for numbers in self.numbers]

    def prefetch(self) -> None:
        """Back to where the keys and values come from."""
        super().prefetch()
        self.numbers = [numbers.to(self.device, non_blocking=True) for numbers in self.numbers]


class VectorCache(DynamicCache):
    """
    For `past_key_values` of a model's `generate`, and of its forward. Attentions without books, such as those of a sliding
    window, are cached as transformers does.

    Args:
        books (`Mapping[int, Books]`): by the number of the layer.
        config (`PretrainedConfig`): the model's.
        recent (`int`, *optional*, defaults to 64): at least so many of the last tokens stay as they are.

    Raises:
        InvalidValueError: a negative `recent`.
    """

    def __init__(self, books: Mapping[int, Books], config: PretrainedConfig, recent: int = RECENT):
        if recent < 0:
            raise InvalidValueError(f"recent is {recent}; it must be 0 or above.")
        super().__init__(config=config)
        for index, own in books.items():
            self.layers[index] = VectorLayer(own, recent)

    @classmethod
    def from_pretrained(cls, model: "str | Path | Checkpoint", recent: int = RECENT) -> "VectorCache":
        """
        An empty cache with the books that the step `kv_cache` has put beside a model.

        Args:
            model (`str` or `Path`): the model's folder, or its repo on the Hub.
            recent (`int`, *optional*, defaults to 64): at least so many of the last tokens stay as they are.

        Raises:
            CheckpointError: there are no books, or they are damaged or of another model.
        """
        checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
        return cls(read_books(checkpoint), checkpoint.config.get_text_config(decoder=True), recent)

    @property
    def nbytes(self) -> int:
        """What the tokens in it take."""
        plain = (
            state for layer in self.layers for state in (getattr(layer, "keys", None), getattr(layer, "values", None))
        )
        whole = sum(state.nbytes for state in plain if state is not None)  # of those of vectors the last tokens
        numbers = (number for layer in self.layers if isinstance(layer, VectorLayer) for number in layer.numbers)
        return whole + sum(number.nbytes for number in numbers)


class CodedStates(DynamicCache):
    """
    Keeps nothing, and gives all keys and values back as they would be with no recent token left as it is: to measure with.

    Args:
        books (`Mapping[int, Books]`): by the number of the layer.
        config (`PretrainedConfig`): the model's.
    """

    def __init__(self, books: Mapping[int, Books], config: PretrainedConfig):
        super().__init__(config=config)
        self.books = books

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """What an attention calls."""
        if layer_idx not in self.books:
            return key_states, value_states
        pairs = zip((key_states, value_states), self.books[layer_idx], strict=True)
        keys, values = (decoded(encoded(states, book), book, states.dtype) for states, book in pairs)
        return keys, values


def has_books(checkpoint: Checkpoint) -> bool:
    """Whether the step `kv_cache` has put vectors beside a model."""
    return checkpoint.folder is not None and (checkpoint.folder / FILE).is_file()


def read_books(checkpoint: Checkpoint) -> dict[int, Books]:
    """
    By the number of the layer, each in the dtype that they are stored in.

    Raises:
        CheckpointError: there are none, or they are damaged or of another model.
    """
    if not has_books(checkpoint):
        raise CheckpointError(
            f"{checkpoint.name} has no vectors for its cache ({FILE}); make them with the step kv_cache: {{type: vector}}."
        )
    assert checkpoint.folder is not None
    try:
        with safe_open(checkpoint.folder / FILE, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{checkpoint.folder / FILE} is damaged; download or copy that file again.") from error
    found: dict[int, dict[str, Tensor]] = {}
    for name, book in stored.items():
        _, _, place = name.partition("layers.")
        number, _, kind = place.partition(".")
        if not number.isdecimal() or kind not in Books._fields or book.dim() != 4 or book.shape[2] != ENTRIES:
            raise CheckpointError(f"{checkpoint.folder / FILE} holds {name}, which are no vectors of a cache.")
        found.setdefault(int(number), {})[kind] = book
    config = checkpoint.config.get_text_config(decoder=True)
    fitting = all(index < config.num_hidden_layers and len(own) == len(Books._fields) for index, own in found.items())
    if not found or not fitting or not all(_fits(own, config) for own in found.values()):
        raise CheckpointError(f"{checkpoint.folder / FILE} is of another model than {checkpoint.name}.")
    return {index: Books(**own) for index, own in found.items()}


def bytes_of_a_token(checkpoint: Checkpoint) -> dict[str, int]:
    """What a token takes in the cache of the attentions that have books: `bytes` in vectors, `dense_bytes` as it is."""
    books = [book for own in read_books(checkpoint).values() for book in own]
    groups = [book.shape[0] * book.shape[1] for book in books]
    dense = [number * book.shape[3] * book.dtype.itemsize for number, book in zip(groups, books, strict=True)]
    return {"bytes": sum(groups), "dense_bytes": sum(dense)}


def _fits(books: dict[str, Tensor], config: Any) -> bool:
    """Whether they have the heads that the model has, and those the width, as far as its configuration tells."""
    heads, width = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    return all(
        heads in (None, len(book)) and width in (None, book.shape[1] * book.shape[3]) for book in books.values()
    )
