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
"""The step that rotates: what it takes, where it stands, and the same after a trip through YAML."""

import pytest

import hfcompress as hfc
from hfcompress.errors import InvalidValueError
from hfcompress.recipes import Job, job_from_dict, with_changes
from hfcompress.recipes.rotate import rotation_of


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"when": "beter"}, "rotate.when is 'beter'; it must be one of better, always. Did you mean 'better'?"),
        ({"hidden": 1}, "rotate.hidden is 1; it must be true or false."),
        ({"heads": "yes"}, "rotate.heads is 'yes'; it must be true or false."),
        ({"seed": -1}, "rotate.seed is -1; it must be at least 0."),
        ({"seed": 0.5}, "rotate.seed is 0.5; it must be a whole number."),
        ({"hidden": False, "heads": False}, "rotate has both hidden and heads off; turn one on"),
        ({"targets": ("q_proj",)}, "rotate turns the whole model; leave its targets, ignore and overrides out."),
        ({"ignore": ("q_proj",)}, "rotate turns the whole model;"),
        ({"overrides": {"q_proj": {"seed": 2}}}, "rotate turns the whole model;"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence(settings, said):
    for call in (lambda: hfc.Rotate(**settings), lambda: job_from_dict({"recipe": [{"rotate": settings}, "gptq"]})):
        with pytest.raises(InvalidValueError) as error:
            call()
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (["rotate"], "rotate prepares the weights for the steps after it; write it first"),
        (["gptq", "rotate"], "write it first, before a step that quantizes such as gptq."),
        (["rotate", "gptq", "rotate"], "several steps 'rotate'; one is enough"),
    ],
)
def test_its_place_is_before_a_step_that_quantizes(steps, said):
    with pytest.raises(InvalidValueError, match=said):
        job_from_dict({"recipe": steps})


def test_through_yaml_and_back():
    job = Job.of(hfc.Rotate(heads=False, seed=3, when="always") >> hfc.GPTQ(bits=3))
    assert job.name == "rotate-gptq"
    assert job.to_dict()["recipe"][0] == {"rotate": {"heads": False, "seed": 3, "when": "always"}}
    assert job_from_dict(job.to_dict()).steps == job.steps
    changed = with_changes(job, ["rotate.seed=5", "gptq.bits=2"])
    assert (changed.rotation.seed, changed.steps[1].bits) == (5, 2)


def test_a_recipe_without_it_has_none():
    assert rotation_of((hfc.GPTQ(),)) is None
    assert Job.of(hfc.GPTQ()).rotation is None
