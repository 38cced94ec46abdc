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
"""The studies of what is not kept, on numbers whose answer is known; and that every point of `rate` is a recipe."""

import math

import pytest
import torch
from measure_clustering import clusters, merged, predicted, refitted
from measure_clustering import compared as compared_clusters
from measure_clustering import lost as lost_outputs
from measure_experts import OURS, WAYS, counted
from measure_hidden_states import lost, narrower, rounded
from measure_transforms import TRANSFORMS, compared, found, huffman, told, transformed
from transformers import AutoModelForCausalLM

from benchmarking import rate
from benchmarking.bench import PEER_GPTQ, Bench, Progress, Setting
from benchmarking.quality import Outcome
from benchmarking.workers import WORKERS, weight_bytes
from hfcompress.models.tiny import tiny_folder
from hfcompress.passes import statistics
from hfcompress.recipes import job_from_dict


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_orthonormal_and_keep_lengths(name):
    matrix = TRANSFORMS[name](64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64), atol=1e-5, rtol=0)
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(0))
    other = transformed(weight, matrix)
    torch.testing.assert_close(other.norm(), weight.norm())
    torch.testing.assert_close(other[64:, :64], matrix @ weight[64:, :64] @ matrix.T, atol=1e-4, rtol=1e-4)


def test_a_smooth_weight_gains_by_cosines_and_noise_by_nothing():
    place = torch.arange(128) / 128
    noise = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    smooth = torch.sin(3 * place)[:, None] * torch.cos(5 * place) + 0.2 * noise
    for weight, least, most in ((smooth, 0.0, 0.8), (noise, 0.98, 1.02)):
        bits, error, _ = found(weight, 2.0, by_error=False)
        assert bits == pytest.approx(2.0, abs=0.05)
        other = found(transformed(weight, TRANSFORMS["cosine"](64)), error, by_error=True)
        assert other[1] == pytest.approx(error, rel=0.05)
        assert least * bits <= other[0] <= most * bits


@pytest.mark.parametrize("size", [1, 4])
def test_units_that_say_alike_are_one_cluster_and_lose_nothing_merged(size):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 3, size, generator=generator, dtype=torch.float64)
    mixing = torch.randn(8, size, size, generator=generator, dtype=torch.float64)
    of = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    rows = torch.einsum("tui,uij->tuj", inputs[:, of], mixing).flatten(1)
    gram, target = rows.T @ rows / 500, torch.randn(6, 8 * size, generator=generator, dtype=torch.float64)
    chosen, member = clusters(predicted(target, gram, size), 3)
    assert all((member[of == kind] == member[of == kind][0]).all() for kind in range(3))
    assert lost_outputs(target, gram, *merged(target, gram, size, chosen, member)) < 1e-9
    columns, values = merged(target, gram, size, *clusters(predicted(target, gram, size), 2))
    best = refitted(target, gram, columns)
    assert lost_outputs(target, gram, columns, best) < lost_outputs(target, gram, columns, values)
    error = target.clone()
    error[:, columns] -= best
    assert (error @ gram[:, columns]).abs().max() < 1e-8  # nothing is left that they could say
    found = compared_clusters(target.float(), gram.float(), size, 0.25)
    assert found["removed"] <= found["refitted"] * 1.2
    assert found["refitted"] <= found["merged"]


def test_a_unit_costs_what_another_does_not_say_of_it():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    rows[:, 2:4] += rows[:, :2]
    target = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    costs = predicted(target, rows.T @ rows / 300, 2)
    for first in range(3):
        for second in range(3):
            own, other = (slice(2 * unit, 2 * unit + 2) for unit in (first, second))
            left = rows[:, own] - rows[:, other] @ torch.linalg.lstsq(rows[:, other], rows[:, own]).solution
            wanted = (left @ target[:, own].T).square().sum().item() / 300
            assert costs[first, second].item() == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_huffmans_code_is_the_best_of_whole_bits():
    assert huffman(torch.tensor([8, 4, 2, 1, 1])) == 8 + 2 * 4 + 3 * 2 + 4 * 2
    assert huffman(torch.tensor([0, 7, 0])) == 7
    _, _, symbols = told(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), 0.5)
    bits = compared(symbols)
    assert bits["entropy"] <= bits["huffman"] <= bits["entropy"] + 1
    assert bits["entropy"] <= bits["rans"] <= 1.01 * bits["entropy"]


def test_a_bent_line_is_learned_where_principal_components_fail():
    """Points on a parabola in one number."""
    x = torch.linspace(-1, 1, 4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))]
    values = torch.stack([x, x.square(), x * 0.1, -x.square()], 1)
    told = narrower(values[:3072], values[3072:], 0.25, 300)
    assert told["principal"] > 0.2
    assert told["autoencoder"] < 0.2 * told["principal"]
    assert lost(values, values) == 0


def test_vectors_of_what_is_alike_lose_less_than_a_grid():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(16, 4, generator=generator)
    values = few[torch.randint(16, (2000, 16), generator=generator)].flatten(1)
    told = rounded(values[:1500], values[1500:])
    assert told["vectors"] < 0.1 * told["grid"]


@pytest.mark.parametrize("kind", rate.recipes())
def test_every_point_is_a_recipe(kind):
    for label, steps in rate.recipes()[kind].items():
        job = job_from_dict({"recipe": steps})
        assert job.steps, label
    assert math.isclose(
        rate.beside_grids(
            rate.Point("x", "y", bits=3.0, kl=0.1),
            [rate.Point("a", "b", bits=2.0, kl=0.4), rate.Point("a", "b", bits=4.0, kl=0.1)],
        ),
        0.5,
    )


def test_what_loading_takes_and_how_many_weights_are_told():
    model = AutoModelForCausalLM.from_pretrained(tiny_folder())
    weights = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    assert list(WORKERS["linears"](str(tiny_folder()))) == [{"weights": weights}]
    [told] = WORKERS["load"](str(tiny_folder()))
    assert told["seconds"] > 0
    assert told["mib"] >= 0


def test_the_bits_of_a_peer_are_those_of_its_files(monkeypatch, tmp_path):
    bench = Bench(tiny_folder(), (tmp_path,), tmp_path, (), {}, None, tmp_path / "work")
    bench.work.mkdir()
    quality = {"kl": 0.1, "perplexity": 2.0, "dense_perplexity": 1.9, "top1": 0.9}
    size = weight_bytes(tiny_folder()) - bench.linear_weights() * 3 // 2
    monkeypatch.setattr(rate, "run_peer", lambda *_: Outcome(1.0, quality, size_bytes=size))
    point = rate._of_peer(bench, PEER_GPTQ[0], Setting.parse("w4g128"), Progress(1))
    assert (point.method, point.kl) == ("llm-compressor GPTQ w4g128", 0.1)
    assert point.bits == pytest.approx(4.0, abs=0.01)


def test_a_study_leaves_the_constants_that_it_tries_as_they_were():
    before = statistics.GATE_POWER, statistics.SHOWN_WEIGHT
    with counted(0.0, 7.0):
        assert (statistics.GATE_POWER, statistics.SHOWN_WEIGHT) == (0.0, 7.0)
    assert (statistics.GATE_POWER, statistics.SHOWN_WEIGHT) == before == WAYS[OURS]
