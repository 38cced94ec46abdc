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
"""Vectors for the cache, as the step `kv_cache` learns them, and what is told of them."""

import pytest
import torch
from conftest import CONFIGS, MIXTURES, StopAfter, digest, make_model, token_ids
from safetensors.torch import load_file

import hfcompress as hfc
from hfcompress.errors import CalibrationError, InvalidValueError, UnsupportedModelError
from hfcompress.evaluation.numbers import number
from hfcompress.hub.push import carried_files
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.cache_vectors import Watched, learn_vectors
from hfcompress.progress import Silent
from hfcompress.recipes import KVCache
from hfcompress.runtime.vector_cache import FILE, VectorCache
from hfcompress.tables import report_tables


CALIBRATION, UNSEEN = token_ids(16, 48, seed=5), token_ids(4, 32, seed=9)


def recipe(**settings):
    return hfc.Lossless() >> KVCache(type="vector", **settings)


def kl_with_cache(folder) -> float:
    return hfc.evaluate(folder, folder, UNSEEN)["with_cache"]["kl_mean"]


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "gemma3", "phi3", "opt", "gpt2", "mixtral"])
def test_more_bits_lose_less_on_every_architecture(name, tmp_path):
    model = make_model({**CONFIGS, **MIXTURES}[name](), torch.float32)
    plain = name in ("gpt2", "mixtral")  # other formats have no place for their linears
    first = hfc.RTN(bits=8, group_size=-1) if plain else hfc.Lossless()
    found = []
    for bits in (1, 4):
        job = hfc.Job(steps=(first, KVCache(type="vector", bits=bits)), format="dense" if plain else "hfcompress")
        out = tmp_path / str(bits)
        result = hfc.compress(model, job, out, calibration=CALIBRATION, eval_data=UNSEEN)
        found.append(result.report["with_cache"]["kl_mean"])
        assert result.report["with_cache"]["dense_bytes"] == 32 // bits * result.report["with_cache"]["bytes"]
        assert result.manifest["cache_vectors"]["bits"] == bits
        assert result.report["kl_mean"] <= found[-1]
    assert 0 < found[1] < 0.3 * found[0]


def test_vectors_are_of_least_error_on_what_is_cached(llama, saved_llama):
    model = StreamedModel(Checkpoint.open(saved_llama))
    batch = Batch(torch.as_tensor(CALIBRATION))
    tensors = learn_vectors(model, batch, 2, torch.float32, 0, Silent())
    watched = Watched(model.skeleton.config, 1.0, 0)
    model.caching(watched).forward_blocks(model.caching(watched).embed([batch]))
    with torch.no_grad():
        theirs = llama(torch.as_tensor(CALIBRATION), use_cache=True).past_key_values
    for index, seen in watched.seen.items():
        for kind, states in zip(("keys", "values"), seen[0], strict=True):
            wanted = getattr(theirs.layers[index], kind).transpose(1, 2).flatten(0, 1)
            torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-5)
            book = tensors[f"layers.{index}.{kind}"]
            heads, groups, entries, length = book.shape
            assert (heads * groups * length, entries) == (states[0].numel(), 256)
            for head in range(heads):
                for group in range(groups):
                    points = states[:, head, group * length : (group + 1) * length].double()
                    vectors = book[head, group].double()
                    distances = torch.cdist(points, vectors)
                    for entry in distances.argmin(1).unique():  # each is, nearly, the mean of what is nearest to it
                        mean = points[distances.argmin(1) == entry].mean(0)
                        assert (vectors[entry] - mean).norm() < 0.2 * points.std()


def test_padding_is_not_learned_from(saved_llama):
    model = StreamedModel(Checkpoint.open(saved_llama))
    ids, mask = torch.as_tensor(CALIBRATION).clone(), torch.ones(16, 48, dtype=torch.bool)
    mask[:, 30:] = False
    found = []
    for filler in (0, 7):
        ids[:, 30:] = filler
        found.append(learn_vectors(model, Batch(ids, mask), 2, torch.float32, 0, Silent()))
    for name, book in found[0].items():
        assert torch.equal(book, found[1][name])


def test_a_killed_run_goes_on_to_the_same_vectors(saved_llama, tmp_path):
    job = hfc.Job(steps=recipe().steps, format="hfcompress")
    options = {"calibration": CALIBRATION, "evaluate": False}
    hfc.compress(saved_llama, job, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(saved_llama, job, tmp_path / "cut", **options, progress=StopAfter(5))  # within the cache
    hfc.compress(saved_llama, job, tmp_path / "cut", **options, resume=True)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert (tmp_path / "cut" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_it_is_told_generated_with_and_exported(tiny, tmp_path, monkeypatch):
    result = hfc.compress(tiny, recipe(), tmp_path / "made", samples=16, seq_len=256)
    coded = result.report["with_cache"]
    assert result.report["kl_mean"] < 1e-6 < coded["kl_mean"] < 0.4
    card = (tmp_path / "made/README.md").read_text()
    told = f"cache of {coded['bytes']:,} instead of {coded['dense_bytes']:,} bytes a token"
    assert told in card
    assert 'cache = hfc.VectorCache.from_pretrained("made")' in card
    assert "keys and values: 2 bits in vectors of 4, in a `VectorCache`" in card
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in report_tables(result.report):
        console.print(table)
    assert told in console.export_text()
    page = (tmp_path / "made/report.html").read_text()
    assert "with the cache</th>" in page
    assert number(coded["perplexity"]) in page
    from hfcompress.generating import generate

    used = []
    opened = VectorCache.from_pretrained
    monkeypatch.setattr(VectorCache, "from_pretrained", lambda *given: used.append(opened(*given)) or used[-1])
    found = generate(tmp_path / "made", "The module defines", max_new_tokens=150)
    [cache] = used
    assert cache.get_seq_length() >= found.tokens == 150
    assert cache.layers[0].numbers[0].shape[2] > 0  # some are vectors by now
    hfc.export(tmp_path / "made", "dense", tmp_path / "dense")
    assert load_file(tmp_path / "dense" / FILE).keys() == load_file(tmp_path / "made" / FILE).keys()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "vector", "bits": 8}, "kv_cache.bits is 8; with type: vector it is 1, 2 or 4"),
        (
            {"type": "int", "bits": 4},
            "kv_cache.bits is 4; with type: vector it is 1, 2 or 4, and 8 with the other types",
        ),
    ],
)
def test_other_bits_are_refused(settings, said):
    with pytest.raises(InvalidValueError, match=said):
        KVCache(**settings)


def test_alone_it_is_refused():
    with pytest.raises(InvalidValueError, match=r"kv_cache needs a step beside it: .* also lossless"):
        hfc.Job(steps=(KVCache(type="vector"),))


def test_what_cannot_be_learned_from_is_refused_before_any_work(llama, tmp_path):
    with pytest.raises(CalibrationError, match="learns 256 vectors, and there are 96 calibration tokens"):
        hfc.compress(llama, recipe(), tmp_path / "few", calibration=token_ids(2, 48), evaluate=False)
    sliding = make_model(CONFIGS["mistral-sliding"](), torch.float32)
    with pytest.raises(UnsupportedModelError, match="no attention that caches all tokens' keys and values"):
        hfc.compress(sliding, recipe(), tmp_path / "sliding", calibration=CALIBRATION, evaluate=False)
    narrow = CONFIGS["llama"]()
    narrow.head_dim = 4
    with pytest.raises(UnsupportedModelError, match="are 4 wide, which vectors of 8 do not divide"):
        hfc.compress(
            make_model(narrow, torch.float32),
            recipe(bits=1),
            tmp_path / "narrow",
            calibration=CALIBRATION,
            evaluate=False,
        )
    assert not any(tmp_path.iterdir())


def test_values_that_are_not_finite_are_said(saved_llama, monkeypatch):
    model = StreamedModel(Checkpoint.open(saved_llama))
    taken = Watched.update

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return taken(self, keys / 0, values, layer_idx)

    monkeypatch.setattr(Watched, "update", update)
    with pytest.raises(CalibrationError, match="keys or values of layer 0 hold NaN or infinity"):
        learn_vectors(model, Batch(torch.as_tensor(CALIBRATION)), 2, torch.float32, 0, Silent())


def test_attentions_that_keep_them_to_themselves_are_said(saved_llama, monkeypatch):
    model = StreamedModel(Checkpoint.open(saved_llama))
    monkeypatch.setattr(StreamedModel, "caching", lambda self, cache: self)
    with pytest.raises(UnsupportedModelError, match="keep keys and values of their own; leave out the step kv_cache"):
        learn_vectors(model, Batch(torch.as_tensor(CALIBRATION)), 2, torch.float32, 0, Silent())


def test_no_promise_of_memory_is_given(llama, tmp_path):
    with pytest.raises(InvalidValueError, match="which --memory-limit does not bound; leave out one of the two"):
        hfc.compress(llama, recipe(), tmp_path / "out", calibration=CALIBRATION, memory_limit=8 << 30, evaluate=False)
    with pytest.raises(InvalidValueError, match="or learns vectors for its cache; only recipes of one pass"):
        hfc.plan(llama, recipe(), calibration=CALIBRATION)
    assert not any(tmp_path.iterdir())


def test_a_push_takes_them_along(saved_llama, tmp_path):
    hfc.compress(saved_llama, recipe(), tmp_path / "made", calibration=CALIBRATION, eval_data=UNSEEN)
    assert FILE in carried_files(tmp_path / "made")
