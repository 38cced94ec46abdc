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
"""The cache of vectors: its arithmetic against a slow reference, and as transformers uses a cache."""

import numpy as np
import pytest
import torch
from conftest import CONFIGS, in_fresh_process, make_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import hfcompress as hfc
from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.runtime.vector_cache import (
    FILE,
    Books,
    CodedStates,
    VectorCache,
    VectorLayer,
    decoded,
    encoded,
    read_books,
)


IDS = torch.as_tensor(token_ids(2, 40))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(recent: int, heads: int = 2, width: int = 8, length: int = 4) -> VectorLayer:
    keys, values = (drawn(heads, width // length, 256, length, seed=seed) for seed in (1, 2))
    return VectorLayer(Books(keys, values), recent)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.integers(1, 3), st.sampled_from([2, 4, 8]))
def test_numbers_are_of_the_nearest_vectors(rows, heads, tokens, groups, length):
    states, book = drawn(rows, heads, tokens, groups * length), drawn(heads, groups, 256, length, seed=1)
    numbers = encoded(states, book)
    assert (numbers.dtype, numbers.shape) == (torch.uint8, (rows, heads, tokens, groups))
    back = decoded(numbers, book, torch.float32)
    assert back.shape == states.shape
    for row in range(rows):
        for head in range(heads):
            for token in range(tokens):
                for group in range(groups):
                    own = slice(group * length, (group + 1) * length)
                    point, vectors = states[row, head, token, own].double(), book[head, group].double()
                    distances = (vectors - point).square().sum(1)
                    number = int(numbers[row, head, token, group])
                    assert distances[number] <= distances.min() + 1e-5
                    assert torch.equal(back[row, head, token, own], book[head, group, number])


def test_recent_tokens_stay_as_they_are_and_older_ones_are_vectors():
    cached, states = layer(recent=3), drawn(1, 2, 11, 8)
    for token in range(11):
        keys, values = cached.update(states[:, :, token : token + 1], -states[:, :, token : token + 1])
        assert keys.shape == values.shape == (1, 2, token + 1, 8)
        assert cached.get_seq_length() == token + 1
    put_away = cached.numbers[0].shape[2]
    assert 3 <= cached.keys.shape[2] < 6
    assert put_away + cached.keys.shape[2] == 11
    assert torch.equal(keys[:, :, put_away:], states[:, :, put_away:])
    book = cached.books.keys
    assert torch.equal(keys[:, :, :put_away], decoded(encoded(states[:, :, :put_away], book), book, torch.float32))
    assert cached.nbytes == 2 * (put_away * 2 * 2 + (11 - put_away) * 2 * 8 * 4)


def test_a_prompt_is_seen_as_it_is_and_cached_as_vectors():
    cached, states = layer(recent=0), drawn(1, 2, 5, 8)
    keys, _ = cached.update(states, states)
    assert torch.equal(keys, states)
    keys, _ = cached.update(states[:, :, :1], states[:, :, :1])
    book = cached.books.keys
    assert torch.equal(keys[:, :, :5], decoded(encoded(states, book), book, torch.float32))
    assert torch.equal(keys[:, :, 5:], states[:, :, :1])


def filled(rows: int = 3, tokens: int = 9) -> VectorLayer:
    cached, states = layer(recent=2), drawn(rows, 2, tokens, 8)
    cached.update(states, -states)
    return cached


def everything(cached: VectorLayer) -> torch.Tensor:
    nothing = torch.zeros(cached.keys.shape[0], 2, 0, 8)
    return torch.stack(cached.update(nothing, nothing))


@pytest.mark.parametrize("removed", [0, 1, 2, 5, 9])
def test_the_last_tokens_can_be_forgotten(removed):
    cached = filled()
    before = everything(cached)
    cached.crop(-removed)
    assert cached.get_seq_length() == 9 - removed
    assert torch.equal(everything(cached), before[:, :, :, : 9 - removed])


def test_rows_can_be_chosen_and_repeated():
    before = everything(filled())
    for change, wanted in (
        (lambda cached: cached.reorder_cache(torch.tensor([2, 0, 0])), before[:, [2, 0, 0]]),
        (lambda cached: cached.batch_select_indices(torch.tensor([1])), before[:, [1]]),
        (lambda cached: cached.batch_repeat_interleave(2), before.repeat_interleave(2, dim=1)),
    ):
        cached = filled()
        change(cached)
        assert torch.equal(everything(cached), wanted)


def test_it_can_be_emptied():
    cached = filled()
    cached.reset()
    assert (cached.get_seq_length(), cached.nbytes) == (0, 0)
    states = drawn(1, 2, 4, 8)
    assert torch.equal(cached.update(states, states)[0], states)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "made"
    recipe = hfc.Lossless() >> hfc.KVCache(type="vector", bits=4)
    model = make_model(CONFIGS["qwen3-mixed"](), torch.float32)
    hfc.compress(model, recipe, folder, calibration=token_ids(16, 48, seed=5), evaluate=False)
    return folder


def written(model, cache, **options) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=16, past_key_values=cache, **options)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}])
def test_a_model_generates_with_it(made, options):
    model = hfc.load(made, device="cpu")
    plain = DynamicCache(config=model.config)
    wanted = written(model, plain, **options)
    assert torch.equal(written(model, VectorCache.from_pretrained(made, recent=1000), **options), wanted)
    coded = VectorCache.from_pretrained(made, recent=4)
    assert written(model, coded, **options).shape == wanted.shape
    assert coded.get_seq_length() == plain.get_seq_length() == 55
    # the layer with a sliding window is cached as it always is
    assert [type(layer).__name__ for layer in coded.layers].count("VectorLayer") == len(
        read_books(Checkpoint.open(made))
    )
    taken = sum(layer.nbytes for layer in coded.layers if isinstance(layer, VectorLayer))
    whole = sum(
        2 * plain.layers[index].keys.nbytes
        for index, layer in enumerate(coded.layers)
        if isinstance(layer, VectorLayer)
    )
    assert taken < 0.3 * whole  # float32 against 4 bits, and a few tokens as they are


def test_another_process_writes_the_same(made):
    code = (
        "import json, sys, torch; import hfcompress.integrations.transformers; from hfcompress import VectorCache\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "cache = VectorCache.from_pretrained(sys.argv[1], recent=4)\n"
        "options = {'attention_mask': torch.ones_like(ids), 'max_new_tokens': 16, 'do_sample': False}\n"
        "print(json.dumps(model.generate(ids, past_key_values=cache, **options).tolist()))"
    )
    told = in_fresh_process(code, str(made), str(IDS.tolist()))
    mine = written(hfc.load(made, device="cpu"), VectorCache.from_pretrained(made, recent=4), do_sample=False)
    assert told == mine.tolist()


def test_what_is_measured_with_is_what_older_tokens_become(made):
    checkpoint = Checkpoint.open(made)
    books = read_books(checkpoint)
    index, own = next(iter(books.items()))
    heads, groups, _, length = own.keys.shape
    states = drawn(1, heads, 6, groups * length)
    measured, _ = CodedStates(books, checkpoint.config).update(states, states, index)
    cached = VectorCache(books, checkpoint.config, recent=0)
    cached.update(states, states, index)
    nothing = states[:, :, :0]
    assert torch.equal(cached.update(nothing, nothing, index)[0], measured)


def test_a_negative_number_of_recent_tokens_is_refused(made):
    with pytest.raises(InvalidValueError, match="recent is -1; it must be 0 or above"):
        VectorCache.from_pretrained(made, recent=-1)


def test_a_model_without_vectors_is_said(tiny):
    with pytest.raises(CheckpointError, match=r"no vectors for its cache .* step kv_cache: \{type: vector\}"):
        VectorCache.from_pretrained(tiny)


def changed(book):
    return {
        "another shape": book[0],
        "few vectors": book[:, :, :9],
        "other heads": torch.cat([book, book]),
        "another width": book[:, :1],
    }


@pytest.mark.parametrize(
    "kind", ["another shape", "few vectors", "other heads", "another width", "another layer", "one of two", "bytes"]
)
def test_damaged_vectors_are_said(made, tmp_path, kind):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in made.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    (folder / FILE).parent.mkdir()
    tensors = load_file(made / FILE)
    name = next(iter(tensors))
    if kind == "bytes":
        (folder / FILE).write_bytes((made / FILE).read_bytes()[:-9])
    elif kind == "one of two":
        save_file({key: value for key, value in tensors.items() if key != name}, folder / FILE)
    elif kind == "another layer":
        save_file(
            {f"layers.99.{kind}": value for kind, value in zip(Books._fields, tensors.values(), strict=False)},
            folder / FILE,
        )
    else:
        save_file({**tensors, name: changed(tensors[name])[kind].contiguous()}, folder / FILE)
    with pytest.raises(CheckpointError, match=r"is damaged|no vectors of a cache|of another model"):
        VectorCache.from_pretrained(folder)


def test_the_numbers_of_many_tokens_are_found_in_parts(monkeypatch):
    states, book = drawn(2, 2, 50, 8), drawn(2, 2, 256, 4, seed=1)
    whole = encoded(states, book)
    monkeypatch.setattr("hfcompress.runtime.vector_cache.ROOM", 1)
    assert np.array_equal(encoded(states, book), whole)
