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
"""The steps that move factors before rounding: checked at once, the same after YAML, and never alone."""

import pytest
from conftest import token_ids

import hfcompress as hfc
from hfcompress.cli import USER_ERROR, _guarded, app
from hfcompress.errors import InvalidValueError
from hfcompress.recipes import job_from_dict


@pytest.mark.parametrize(
    ("step", "key", "value", "said"),
    [
        ("awq", "grid", 0, "awq.grid is 0; it must be at least 1."),
        ("awq", "rows", -1, "awq.rows is -1; it must be at least 1."),
        ("awq", "grid", 2.5, "awq.grid is 2.5; it must be a whole number."),
        ("awq", "grids", 3, "awq has no key 'grids'. Did you mean 'grid'?"),
        ("awq", "overrides", {"q_proj": {"grid": 0}}, "awq.grid is 0; it must be at least 1."),
        ("awq", "bits", 4, "awq has no key 'bits'."),
        ("smooth", "strength", 1.5, "smooth.strength is 1.5; it must lie between 0 and 1."),
        ("smooth", "strength", float("nan"), "smooth.strength is nan; it must lie between 0 and 1."),
        ("smooth", "strength", "much", "smooth.strength is 'much'; it must be a number."),
        ("smooth", "rows", 4, "smooth has no key 'rows'."),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence(step, key, value, said):
    with pytest.raises(InvalidValueError) as error:
        job_from_dict({"recipe": [{step: {key: value}}, "gptq"]})
    assert str(error.value).startswith(said)


def test_steps_chain_and_come_back_from_yaml():
    recipe = hfc.Smooth(strength=0.7) >> hfc.AWQ(grid=5, rows=2, ignore=("o_proj",)) >> hfc.GPTQ(bits=3)
    job = hfc.Job.of(recipe)
    assert job.name == "smooth-awq-gptq"
    document = job.to_dict()
    assert document["recipe"] == [
        {"smooth": {"strength": 0.7}},
        {"awq": {"ignore": ["o_proj"], "grid": 5, "rows": 2}},
        {"gptq": {"bits": 3}},
    ]
    assert job_from_dict(document, job.name) == job


@pytest.mark.parametrize("step", [hfc.AWQ(), hfc.Smooth()])
@pytest.mark.parametrize("before", [False, True])
def test_a_step_with_nothing_behind_it_that_rounds_is_refused(llama, tmp_path, step, before):
    recipe = hfc.Job(steps=(hfc.RTN(group_size=32), step) if before else (step,))
    with pytest.raises(InvalidValueError) as error:
        hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(4, 32))
    assert str(error.value) == (
        f"{step.name} only prepares weights for rounding and compresses nothing; put a step behind it that rounds, such "
        f"as gptq: {step.name} >> gptq."
    )
    assert list(tmp_path.iterdir()) == []


def test_on_the_command_line_it_is_one_line_and_2(tmp_path, capsys):
    (tmp_path / "alone.yaml").write_text("recipe:\n  - awq: {}\n")
    assert _guarded(app, ["run", str(tmp_path / "alone.yaml"), "--output", str(tmp_path / "out")]) == USER_ERROR
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "awq only prepares weights for rounding" in line


def test_a_target_that_is_not_there_is_named(llama, tmp_path):
    with pytest.raises(InvalidValueError, match="awq: no linear of this model is called 'q_porj'"):
        hfc.compress(llama, hfc.AWQ(targets=("q_porj",)) >> hfc.RTN(group_size=32), tmp_path / "out")
