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
"""Steps that work on the whole model: their settings, their place among the steps, and what they write."""

import sys

import pytest

import hfcompress as hfc
from hfcompress.errors import InvalidValueError, MissingExtraError
from hfcompress.recipes import job_from_dict, load_job, with_changes


def test_qat_comes_last_after_a_step_that_quantizes():
    assert hfc.Job.of(hfc.GPTQ() >> hfc.QAT()).training == hfc.QAT()
    assert hfc.Job.of(hfc.GPTQ()).training is None
    for recipe in (hfc.QAT(), hfc.QAT() >> hfc.GPTQ()):
        with pytest.raises(InvalidValueError, match="starts from a quantized model: put gptq or rtn before it"):
            hfc.Job.of(recipe)
    with pytest.raises(InvalidValueError, match="must be the last step; put rtn before it"):
        hfc.Job.of(hfc.GPTQ(targets=("q_proj",)) >> hfc.QAT() >> hfc.RTN(ignore=("q_proj",)))


def test_qat_does_not_follow_a_step_that_rescales_the_weights():
    for step in (hfc.AWQ(), hfc.Smooth()):
        with pytest.raises(InvalidValueError, match=f"{step.name} rescales them first; leave one of the two out"):
            hfc.Job.of(step >> hfc.RTN() >> hfc.QAT())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epochs": 0}, r"qat\.epochs is 0; it must be at least 1"),
        ({"steps": 0}, r"qat\.steps is 0; it must be at least 1"),
        ({"held_out": 0}, r"qat\.held_out is 0; it must be at least 1"),
        ({"learning_rate": -1.0}, r"qat\.learning_rate is -1\.0; it must be 0 or more"),
        ({"scale_learning_rate": float("nan")}, r"qat\.scale_learning_rate is nan; it must be 0 or more"),
        ({"batch_size": 4, "accumulation": 3}, r"accumulation \(3\) must divide qat\.batch_size \(4\)"),
        ({"temperature": 0.0}, r"qat\.temperature is 0\.0; it must be above 0"),
        (
            {"mix": 0.5},
            r"qat\.mix is for jsd, skew_forward_kl, skew_reverse_kl; leave it out with qat\.loss=forward_kl",
        ),
        ({"loss": "jsd", "mix": 1.0}, r"qat\.mix is 1\.0; it must lie between 0 and 1"),
        ({"loss": "jds"}, r"qat\.loss is 'jds'; it must be one of forward_kl.*'jsd'"),
        ({"train": "scale"}, r"qat\.train is 'scale'; it must be one of scales, weights, both.*'scales'"),
        ({"overrides": {"q_proj": {"steps": 3}}}, "qat takes no overrides"),
    ],
)
def test_qat_settings_are_checked(settings, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        hfc.QAT(**settings)


def test_qat_round_trips_through_yaml():
    job = job_from_dict({"recipe": [{"gptq": {"bits": 3}}, {"qat": {"learning_rate": "1e-3", "train": "both"}}]})
    assert job.training == hfc.QAT(learning_rate=0.001, train="both")
    assert job_from_dict(job.to_dict()).steps == job.steps
    assert with_changes(job, ["qat.steps=5"]).training == hfc.QAT(learning_rate=0.001, train="both", steps=5)


@pytest.mark.parametrize("step", [hfc.BitsAndBytes(), hfc.TorchAo()])
def test_a_library_step_stands_alone_and_brings_its_format(step):
    job = hfc.Job.of(step)
    assert job.library == step
    assert job.format == step.name
    assert job_from_dict(job.to_dict()).library == step
    for recipe in (step >> hfc.GPTQ(), hfc.GPTQ() >> step):
        with pytest.raises(InvalidValueError, match=f"{step.name} quantizes the whole model by itself; take gptq out"):
            hfc.Job.of(recipe)
    with pytest.raises(InvalidValueError, match=f"{step.name} writes its own format; leave out format=dense"):
        hfc.Job(steps=(step,), format="dense")
    with pytest.raises(InvalidValueError, match="takes no overrides"):
        type(step)(overrides={"q_proj": {}})


def test_library_settings_are_checked():
    with pytest.raises(InvalidValueError, match=r"bitsandbytes\.type is 'nf8'; it must be one of nf4, int8"):
        hfc.BitsAndBytes(type="nf8")
    with pytest.raises(InvalidValueError, match="double_quant is for type nf4"):
        hfc.BitsAndBytes(type="int8", double_quant=True)


@pytest.mark.parametrize(
    ("step", "extra"), [(hfc.BitsAndBytes(), "bnb"), (hfc.TorchAo(), "torchao")], ids=["bitsandbytes", "torchao"]
)
def test_a_missing_library_is_named_with_its_extra(step, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, step.package, None)
    monkeypatch.setattr("hfcompress.recipes.library_step.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"needs {step.package}: pip install 'hfcompress\[{extra}\]'"):
        hfc.compress(None, step, tmp_path / "out", evaluate=False)
    assert list(tmp_path.iterdir()) == []


def test_shipped():
    assert load_job("nf4").steps == (hfc.BitsAndBytes(type="nf4"),)
    assert load_job("torchao-int8").steps == (hfc.TorchAo(type="int8"),)
