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
"""What a trial promises is what a run of the same steps on the same rows gives."""

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.calibration.tokens import Tokens
from hfcompress.formats import get_format
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.plan import make_plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.trial import halves, trial


LAYOUT = get_format("dense")


def tried(model, step, tokens: Tokens, suspended: bool = True) -> float:
    checkpoint = Checkpoint.open(model)
    streamed = StreamedModel(checkpoint)
    plan = make_plan(streamed, (step,), LAYOUT)
    return trial(streamed, plan, LAYOUT, tokens, checkpoint, Processes(torch.device("cpu")), suspended)


@torch.no_grad()
def divergence(model, folder, ids: np.ndarray, mask=None) -> float:
    """By plain transformers, in float64."""
    solved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {"input_ids": torch.from_numpy(ids)}
    if mask is not None:
        inputs["attention_mask"] = torch.from_numpy(mask).long()
    p, q = (m(**inputs).logits.double().log_softmax(-1) for m in (model, solved))
    kl = (p.exp() * (p - q)).sum(-1)
    return (kl if mask is None else kl[torch.from_numpy(mask)]).mean().item()


@pytest.mark.parametrize(
    "step",
    [
        hfc.GPTQ(bits=2, group_size=32),
        hfc.RTN(bits=3, group_size=-1),
        hfc.GPTQ(bits=3, group_size=32, targets=("Linear", "lm_head")),
    ],
    ids=["gptq", "rtn", "head"],
)
def test_it_is_the_divergence_of_a_real_run(step, tmp_path):
    model = make_model(CONFIGS["llama"]())
    ids = token_ids(20, 32)  # the last four are not taken
    found = tried(model, step, Tokens(ids, "test"))
    job = hfc.Job(steps=(step,), format="dense")
    hfc.compress(model, job, tmp_path / "out", calibration=ids[:8], evaluate=False)
    assert found == pytest.approx(divergence(model, tmp_path / "out", ids[8:16]), rel=1e-3)
    assert found > 0.01


def test_padding_is_neither_calibrated_nor_measured_on(tmp_path):
    model = make_model(CONFIGS["llama"]())
    ids, mask = token_ids(6, 32), np.ones((6, 32), dtype=bool)
    mask[2:4, 20:] = False
    step = hfc.GPTQ(bits=2, group_size=32)
    found = tried(model, step, Tokens(ids, "test", mask))
    assert tried(model, step, Tokens(ids, "test", mask), suspended=False) == pytest.approx(found, rel=1e-4)
    job = hfc.Job(steps=(step,), format="dense")
    given = {"input_ids": ids[:3], "attention_mask": mask[:3]}
    hfc.compress(model, job, tmp_path / "out", calibration=given, evaluate=False)
    assert found == pytest.approx(divergence(model, tmp_path / "out", ids[3:], mask[3:]), rel=1e-3)


def test_nothing_is_lost_where_nothing_is_solved(tmp_path, monkeypatch):
    """The other linears pass as they are, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    model = make_model(CONFIGS["llama"]())
    one = hfc.GPTQ(bits=8, group_size=-1, targets=("model.layers.0.self_attn.k_proj",))
    assert tried(model, one, Tokens(token_ids(4, 32), "test")) < 1e-5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rows", "length", "expected"), [(40, 8, (8, 8)), (5, 8, (3, 2)), (2, 8, (1, 1))])
def test_rows_are_halved(rows, length, expected):
    ids = token_ids(rows, length)
    first, second = halves(Tokens(ids, "test"))
    assert (len(first.input_ids), len(second.input_ids)) == expected
    assert np.array_equal(torch.cat([first.input_ids, second.input_ids]).numpy(), ids[: sum(expected)])


def test_a_single_row_is_cut_in_two():
    ids = token_ids(1, 9)
    first, second = halves(Tokens(ids, "test"))
    assert np.array_equal(torch.cat([first.input_ids, second.input_ids], 1).numpy(), ids)
    assert (first.input_ids.shape, second.input_ids.shape) == ((1, 5), (1, 4))
