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
"""Single units swapped in while the model is walked, against the whole model with that unit swapped in."""

import pytest
import torch
from conftest import token_ids

import hfcompress as hfc
from hfcompress.formats import get_format
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.plan import make_plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.sensitivity import unit_errors
from hfcompress.passes.swaps import corrected
from hfcompress.progress import Silent
from hfcompress.solvers.rtn import rtn


CHOICES = {"2g32": 2, "3g32": 3, "4g32": 4}
TARGETS = ("Linear", "lm_head")


@pytest.fixture
def units(llama):
    """The units of the tiny random Llama, head included, rounded to nearest."""
    model, layout = StreamedModel(Checkpoint.open(llama)), get_format("compressed-tensors")
    options: dict = {}
    for choice, bits in CHOICES.items():
        plan = make_plan(model, [hfc.RTN(bits=bits, group_size=32, scales="minmax", targets=TARGETS)], layout)
        for name, task in plan.tasks.items():
            options.setdefault(name, {})[choice] = task
    ids = torch.from_numpy(token_ids(6, 24))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :5] = False
    batches = [Batch(ids[:4], mask[:4]), Batch(ids[4:], mask[4:])]
    found = unit_errors(model, options, layout, batches, batches, Processes(torch.device("cpu")), Silent())
    return found, options, Batch(ids, mask)


def whole_log_probs(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.mask.long()).logits[:, :-1]
    return logits[batch.mask[:, 1:]].double().log_softmax(-1)


def test_units_are_what_engines_fuse(units):
    parts = [tuple(name.rpartition(".")[2] for name in unit.names) for unit in units[0]]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert parts == [*block * 3, ("lm_head",)]


def test_what_is_measured_is_what_the_whole_model_says(units, llama):
    found, options, batch = units
    dense = whole_log_probs(llama, batch)
    for unit in found:
        assert list(unit.measured) == ["2g32", "3g32"]
        for choice, kl in unit.measured.items():
            kept = {name: llama.get_submodule(name).weight.data.clone() for name in unit.names}
            for name, weight in kept.items():
                grid = options[name][choice].grid
                llama.get_submodule(name).weight.data.copy_(
                    rtn(weight, grid, torch.float32, search=False).dequantize()
                )
            other = whole_log_probs(llama, batch)
            for name, weight in kept.items():
                llama.get_submodule(name).weight.data.copy_(weight)
            assert kl == pytest.approx((dense.exp() * (dense - other)).sum(-1).mean().item(), rel=1e-3), unit.names


def test_the_errors_are_those_of_the_outputs(units, llama):
    found, options, batch = units
    unit = found[-2]
    inputs = []
    handle = llama.get_submodule(unit.names[0]).register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    whole_log_probs(llama, batch)
    handle.remove()
    x = inputs[0][batch.mask].double()
    for choice, errors in unit.errors.items():
        for name, error in errors.items():
            weight = llama.get_submodule(name).weight.data
            rounded = rtn(weight, options[name][choice].grid, torch.float32, search=False).dequantize()
            expected = (x @ (weight - rounded).double().T).square().mean(0)
            torch.testing.assert_close(error.double(), expected, rtol=1e-3, atol=1e-9)


def test_a_prediction_is_brought_in_line_with_what_was_measured():
    predicted = {"2": 1.0, "3": 0.1, "4": 0.01, "8": 0.0}
    assert corrected(predicted, {}) == predicted
    assert corrected(predicted, {"2": 0.0}) == predicted
    found = corrected(predicted, {"2": 4.0, "4": 0.01})
    assert found == pytest.approx({"2": 4.0, "3": 0.2, "4": 0.01, "8": 0.0})  # the ratio, 2, is halfway in logarithms
    assert corrected(predicted, {"3": 0.3})["4"] == pytest.approx(0.03)
