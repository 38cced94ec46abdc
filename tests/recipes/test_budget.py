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
"""What a budget accepts, what it refuses and how it says so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hfcompress as hfc
from hfcompress.errors import InvalidValueError
from hfcompress.recipes import job_from_dict, with_changes
from hfcompress.recipes.budget import BITS, CHOICES, GROUP_SIZES, find_budget, parse_choice


def refused(call, *arguments, **keywords) -> str:
    with pytest.raises(InvalidValueError) as error:
        call(*arguments, **keywords)
    return str(error.value)


@pytest.mark.parametrize(
    ("given_", "size"), [("3.5GB", 3_500_000_000), (1_000_000, 1_000_000), ("1.5 MiB", 3 * 2**19), ("2e6", 2_000_000)]
)
def test_sizes_are_bytes(given_, size):
    budget = hfc.Budget(target_size=given_)
    assert budget.target == ("target_size", size)
    assert hfc.Budget(**budget.to_dict()) == budget
    assert budget.to_dict() == {"target_size": size}


@pytest.mark.parametrize("targets", [{"target_size": 1, "target_kl": 0.1}, {"target_bits": 3, "target_kl": 1}])
def test_one_target_at_most(targets):
    said = refused(hfc.Budget, **targets)
    assert said == f"budget has {' and '.join(targets)}; give one of target_size, target_bits, target_kl."


def test_without_a_target_it_is_bits_per_weight():
    assert hfc.Budget().target == ("target_bits", 3.25)
    assert hfc.Budget().to_dict() == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("target_size", 0), ("target_bits", -1.0), ("target_kl", float("nan")), ("target_kl", float("inf"))],
)
def test_targets_are_numbers_above_zero(key, value):
    assert refused(hfc.Budget, **{key: value}) == f"budget.{key} is {value}; it must be a number above 0."


def test_a_size_that_is_none():
    assert "'big' is no size" in refused(hfc.Budget, target_size="big")


@given(st.sampled_from(BITS), st.sampled_from(GROUP_SIZES))
def test_every_grid_of_the_quantizing_steps_is_a_choice(bits, group_size):
    assert parse_choice(f"{bits}g{group_size}") == (bits, group_size)


def test_the_choices_are_valid():
    assert hfc.Budget(target_kl=1).choices == CHOICES
    assert hfc.Budget(target_kl=1, choices=["2g32", "8g-1"]).choices == ("2g32", "8g-1")


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (["4"], "budget.choices: '4' is none; write bits and group size like 4g128."),
        ([4], "budget.choices: '4' is none; write bits and group size like 4g128."),
        (["4b128"], "budget.choices: '4b128' is none; write bits and group size like 4g128."),
        (["7g128"], "budget.choices: '7g128' has the bits 7; there are 2, 3, 4, 8."),
        (["4g48"], "budget.choices: '4g48' has the group size 48; there are -1, 32, 64, 128."),
        ([], f"budget.choices is empty; give some, such as {', '.join(CHOICES)}."),
    ],
)
def test_choices_that_are_none(choices, sentence):
    assert refused(hfc.Budget, target_kl=1, choices=choices) == sentence


def test_overrides_set_choices_alone():
    budget = hfc.Budget(target_bits=3, overrides={"down_proj": {"choices": ["4g128", "8g128"]}})
    assert budget.for_linear("model.layers.0.mlp.down_proj").choices == ("4g128", "8g128")
    assert budget.for_linear("model.layers.0.mlp.up_proj").choices == CHOICES
    said = refused(hfc.Budget, target_bits=3, overrides={"down_proj": {"target_bits": 4}})
    assert said == "budget.overrides[down_proj] can set choices and nothing else."


def test_it_is_for_the_step_behind_it():
    budget, gptq = hfc.Budget(target_bits=3), hfc.GPTQ()
    assert find_budget((budget, gptq)) == (budget, gptq)
    assert find_budget((gptq,)) is None
    behind = "budget chooses the bits of the step behind it, so put a quantizing step there, such as `- gptq: {}`."
    for steps in ((budget,), (gptq, budget)):
        assert refused(hfc.Job, steps=steps) == behind
    said = refused(hfc.Job, steps=(budget, gptq, budget, gptq))
    assert said == "A recipe can have one budget, and this one has several."


def test_through_yaml_and_the_command_line():
    document = {"recipe": [{"budget": {"target_size": "1.2MB", "choices": ["2g64", "4g64"]}}, {"rtn": {}}]}
    job = job_from_dict(document)
    assert job_from_dict(job.to_dict()).steps == job.steps
    assert with_changes(job, ["budget.target_size=2MB"]).steps[0].target_size == 2_000_000
    assert "no step 'budgets'" in refused(job_from_dict, {"recipe": [{"budgets": {}}]})
    assert "Did you mean 'target_size'?" in refused(job_from_dict, {"recipe": [{"budget": {"size": 1}}, "gptq"]})
