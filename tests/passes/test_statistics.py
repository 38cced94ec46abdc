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
"""The sums over what a group of linears has read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.passes import statistics as module
from hfcompress.passes.processes import Processes
from hfcompress.passes.statistics import Statistics, sums_in_float32


CPU = torch.device("cpu")


def gram_of(batches, masks, width: int) -> torch.Tensor:
    statistics = Statistics(width, CPU)
    for batch, mask in zip(batches, masks, strict=True):
        statistics.add(batch, mask)
    statistics.complete(Processes(CPU), "a linear")
    return statistics.gram


def problem(width: int, rows: int, seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(rows, 5, width, generator=generator).to(dtype) for _ in range(2)]
    masks = [None, torch.rand(rows, 5, generator=generator) > 0.3]
    tokens = [b[m if m is not None else ...].reshape(-1, width) for b, m in zip(batches, masks, strict=True)]
    x = torch.cat(tokens).double()
    return batches, masks, x.T @ x / len(x)


@settings(deadline=None, max_examples=25)
@given(
    width=st.sampled_from([1, 8, 255, 257, 520]),
    rows=st.integers(1, 6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_gram_is_that_of_the_tokens_that_are_no_padding(width, rows, seed, dtype):
    batches, masks, wanted = problem(width, rows, seed, dtype)
    found = gram_of(batches, masks, width)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_a_cpu_does_not_add_up_in_another_dtype():
    assert not any(sums_in_float32(CPU, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))


def test_a_torch_that_knows_no_other_dtype_is_not_asked_for_it(monkeypatch):
    def older(rows, columns):
        raise AssertionError

    monkeypatch.setattr(torch, "mm", older)
    sums_in_float32.cache_clear()
    assert not sums_in_float32(CPU, torch.bfloat16)


def test_a_device_that_adds_up_in_float32_is_given_the_16_bits(monkeypatch):
    """As a GPU does it; what it would be given, computed by a CPU."""
    asked, mm = [], torch.mm

    def on_a_gpu(rows, columns, out_dtype):
        asked.append((rows.dtype, columns.dtype, out_dtype))
        return mm(rows.float(), columns.float())

    monkeypatch.setattr(module, "sums_in_float32", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", on_a_gpu)
    batches, masks, wanted = problem(300, 4, 0, torch.bfloat16)
    torch.testing.assert_close(gram_of(batches, masks, 300).double(), wanted, rtol=1e-5, atol=1e-5)
    assert set(asked) == {(torch.bfloat16, torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("extra", ["cross", "ranges"])
def test_what_else_is_summed_is_summed_in_float32(monkeypatch, extra):
    mm = torch.mm
    monkeypatch.setattr(module, "sums_in_float32", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", lambda rows, columns, out_dtype: mm(rows.float(), columns.float()))
    inputs = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    dense = inputs + 1
    found, wanted = Statistics(8, CPU, **{extra: True}), Statistics(8, CPU, **{extra: True})
    found.add(inputs, None, dense)
    wanted.add(inputs.float(), None, dense.float())
    torch.testing.assert_close(found.gram.tril(), wanted.gram.tril())
    if extra == "cross":
        torch.testing.assert_close(found.cross, wanted.cross)
    else:
        torch.testing.assert_close(found.magnitudes.counts, wanted.magnitudes.counts)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 6), seed=st.integers(0, 1000), padded=st.booleans())
def test_rows_that_are_held_out_are_in_the_sums_and_by_themselves(rows, seed, padded):
    generator = torch.Generator().manual_seed(seed)
    held = torch.rand(rows, generator=generator) > 0.5
    mask = torch.rand(rows, 4, generator=generator) > 0.3 if padded else torch.ones(rows, 4, dtype=torch.bool)
    inputs, dense = (torch.randn(rows, 4, 24, generator=generator) for _ in range(2))
    statistics = Statistics(24, CPU, cross=True, ranges=True)
    statistics.add(inputs, mask if padded else None, dense, held)
    statistics.complete(Processes(CPU), "a linear")

    def check(found, which):
        x, d = inputs[which][mask[which]].double(), dense[which][mask[which]].double()
        assert found.tokens == len(x)
        torch.testing.assert_close(found.gram.double(), x.T @ x / max(len(x), 1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.cross.double(), (d - x).T @ x / max(len(x), 1), rtol=1e-5, atol=1e-5)

    check(statistics, torch.ones(rows, dtype=torch.bool))
    assert statistics.magnitudes.counts.sum() == mask.sum() * 24
    if held.any() and mask[held].any():
        check(statistics.held_out, held)
    else:
        assert statistics.held_out is None


def test_the_share_of_a_correction_is_told_by_some_rows(monkeypatch):
    """Of a weight with many, as by all of them."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 8, 32, generator=generator)
    inputs = dense + 0.5 * torch.randn(64, 8, 32, generator=generator)
    weight = torch.randn(2000, 32, generator=generator)
    statistics = Statistics(32, CPU, cross=True)
    statistics.add(inputs, None, dense, torch.arange(64) % 8 == 7)
    statistics.complete(Processes(CPU), "a linear")
    shares = []
    for rows in (module.TRIED_ROWS, 2000):
        monkeypatch.setattr(module, "TRIED_ROWS", rows)
        target, share = statistics.target(weight, 0.01, True, "a linear", 2.0)
        shares.append(share)
        assert not torch.equal(target, weight)
    assert 0 < shares[0] < 2
    assert shares[0] == pytest.approx(shares[1], rel=0.03)
