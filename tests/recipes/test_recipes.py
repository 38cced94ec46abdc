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
"""What a user writes: checked at once, the nearest name named, and the same after a trip through YAML."""

import dataclasses
import json
import re
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.errors import HfcompressError, InvalidValueError
from hfcompress.recipes import GPTQ, RTN, Job, KVCache, Steps, job_from_dict, load_job, shipped_recipes, with_changes
from hfcompress.recipes.job import GATED, LOWER_BOUNDS, CalibrationSettings, EvaluationSettings
from hfcompress.recipes.job import STEPS as ALL_STEPS
from hfcompress.recipes.quantization import Quantization


STEPS = [RTN, GPTQ]
KNOWN = ", ".join(ALL_STEPS)

every_step = pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)


def refused(call, *arguments, **keywords):
    """The sentence with which a call is refused."""
    with pytest.raises(InvalidValueError) as error:
        call(*arguments, **keywords)
    return str(error.value)


# a step


@every_step
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bits", 5, "bits is 5; it must be one of 2, 3, 4, 8."),
        ("bits", 16, "bits is 16; it must be one of 2, 3, 4, 8."),
        ("bits", 0, "bits is 0;"),
        ("bits", -4, "bits is -4;"),
        ("bits", "4", "bits is '4';"),
        ("bits", None, "bits is None;"),
        ("bits", True, "bits is True;"),
        ("bits", [4], "bits is [4];"),
        ("group_size", 16, "group_size is 16; it must be one of -1, 32, 64, 128."),
        ("group_size", 0, "group_size is 0;"),
        ("group_size", 256, "group_size is 256;"),
        ("group_size", "all", "group_size is 'all';"),
        ("symmetric", 1, "symmetric is 1; it must be true or false."),
        ("symmetric", "yes", "symmetric is 'yes'; it must be true or false."),
        ("symmetric", None, "symmetric is None; it must be true or false."),
        ("scales", "serach", "scales is 'serach'; it must be one of search, minmax. Did you mean 'search'?"),
        ("scales", False, "scales is False; it must be one of search, minmax."),
        (
            "on_indivisible",
            "chanel",
            "on_indivisible is 'chanel'; it must be one of error, channel, skip. Did you mean",
        ),
        ("targets", 3, "targets is 3; it must be a list of names or 're:' patterns."),
        ("targets", [3], "targets is [3]; it must be a list of names or 're:' patterns."),
        ("targets", None, "targets is None; it must be a list of names"),
        ("ignore", {"lm_head": True}, "ignore is {'lm_head': True}; it must be a list of names"),
        ("targets", ["re:(q_proj"], "'re:(q_proj' is no regular expression: missing )"),
        ("ignore", ["lm_head", "re:*"], "'re:*' is no regular expression: nothing to repeat"),
        ("overrides", {"re:[": {"bits": 8}}, "'re:[' is no regular expression"),
        ("overrides", ["q_proj"], "overrides is ['q_proj']; it must be a mapping."),
        ("overrides", {"q_proj": 8}, "overrides[q_proj] must be a mapping of keys to values."),
        ("overrides", {"q_proj": None}, "overrides[q_proj] must be a mapping of keys to values."),
        ("overrides", {"q_proj": {"bits": 7}}, "bits is 7; it must be one of 2, 3, 4, 8."),
        ("overrides", {"q_proj": {"bit": 8}}, "has no key 'bit'. Did you mean 'bits'?"),
        ("overrides", {"q_proj": {"symmetric": "no"}}, "symmetric is 'no'; it must be true or false."),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence(step, key, value, said):
    for sentence in (
        refused(step, **{key: value}),
        refused(job_from_dict, {"recipe": [{step.name: {key: value}}]}),
    ):
        assert said in sentence
        assert sentence.startswith(step.name)


EIGHT = {"bits": 8, "group_size": -1}


@every_step
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"type": "fp8"}, "type is 'fp8'; it must be one of int, float."),
        ({"activations": True}, "activations is True; it must be one of none, dynamic, static."),
        ({"activations": "statik"}, "Did you mean 'static'?"),
        (
            {**EIGHT, "activations": "static", "observer": "max"},
            "observer is 'max'; it must be one of minmax, percentile",
        ),
        ({"type": "float"}, "type float is E4M3 with a scale per row: set"),
        ({"type": "float", "bits": 8}, "bits to 8, group_size to -1, and symmetric to true."),
        ({**EIGHT, "type": "float", "symmetric": False}, "and symmetric to true."),
        ({"activations": "dynamic"}, "activations dynamic needs weights of 8 bits with a scale per row: set"),
        ({"activations": "static", "bits": 8}, "bits to 8, group_size to -1, and symmetric to true."),
        ({**EIGHT, "activations": "dynamic", "symmetric": False}, "activations dynamic needs weights of 8 bits"),
        ({**EIGHT, "activations": "dynamic", "observer": "minmax"}, "observer is for static activations: set"),
        ({"observer": "percentile"}, "activations to static, or leave observer out."),
        ({"overrides": {"q_proj": {"activations": "dynamic"}}}, "activations dynamic needs weights of 8 bits"),
        ({**EIGHT, "overrides": {"q_proj": {"bits": 4, "type": "float"}}}, "type float is E4M3"),
    ],
)
def test_eight_bit_settings_that_do_not_go_together(step, keys, said):
    for sentence in (refused(step, **keys), refused(job_from_dict, {"recipe": [{step.name: keys}]})):
        assert said in sentence
        assert sentence.startswith(step.name)
        assert sentence.count(". ") <= 1


@every_step
def test_overrides_hold_for_activations_too(step):
    recipe = step(
        group_size=128,
        overrides={"q_proj": {**EIGHT, "type": "float", "activations": "static"}, "k_proj": {**EIGHT, "bits": 8}},
    )
    own = recipe.for_linear("model.layers.0.self_attn.q_proj")
    assert (own.type, own.activations, own.group_size, own.observer) == ("float", "static", -1, "mse")
    assert recipe.for_linear("model.layers.0.self_attn.k_proj").activations == "none"
    assert recipe.for_linear("model.layers.0.self_attn.v_proj").bits == 4


def test_the_cache_is_a_step_beside():
    [gptq, cache] = job_from_dict({"recipe": [{"gptq": {}}, {"kv_cache": {"type": "int"}}]}).steps
    assert cache == KVCache(type="int")
    assert cache.for_cache() is cache
    assert cache.for_linear("model.layers.0.self_attn.k_proj") is None
    assert gptq.for_cache() is None
    assert KVCache().to_dict() == {}
    assert "kv_cache.type is 'fp8'; it must be one of int, float, vector." in refused(KVCache, type="fp8")
    assert "kv_cache.observer is 'max'; it must be one of" in refused(KVCache, observer="max")
    for key, value in (("targets", ("k_proj",)), ("ignore", ("k_proj",)), ("overrides", {"k_proj": {"type": "int"}})):
        said = refused(KVCache, **{key: value})
        assert said.startswith("kv_cache is for the cache of every attention")
        assert "leave out targets, ignore and overrides" in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("damping", -0.01, "gptq.damping is -0.01; it must lie between 0 and 1."),
        ("damping", 1.5, "gptq.damping is 1.5; it must lie between 0 and 1."),
        ("damping", float("nan"), "gptq.damping is nan; it must lie between 0 and 1."),
        ("damping", "a little", "gptq.damping is 'a little'; it must be a number."),
        ("damping", True, "gptq.damping is True; it must be a number."),
        ("act_order", 1, "gptq.act_order is 1; it must be true or false."),
        ("overrides", {"q_proj": {"damping": 2}}, "gptq.damping is 2.0; it must lie between 0 and 1."),
    ],
)
def test_a_value_that_cannot_be_for_gptq(key, value, said):
    assert said in refused(GPTQ, **{key: value})


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_a_float_is_no_choice_of_whole_numbers(key):
    value = {"bits": 4.0, "group_size": 64.0}[key]
    try:
        made = getattr(GPTQ(**{key: value}), key)
    except InvalidValueError:
        return
    assert isinstance(made, int)


def test_an_override_for_a_number_is_refused_in_a_sentence():
    assert "0" in refused(RTN, overrides={0: {"bits": 8}})


def test_values_are_brought_into_form():
    step = GPTQ(targets=["q_proj", "k_proj"], ignore="lm_head", damping=0)
    assert step.targets == ("q_proj", "k_proj")
    assert step.ignore == ("lm_head",)
    assert (step.damping, type(step.damping)) == (0.0, float)
    assert GPTQ(damping=1).damping == 1.0


def test_defaults():
    step = GPTQ()
    assert (step.bits, step.group_size, step.symmetric, step.scales) == (4, 128, True, "search")
    assert (step.act_order, step.damping, step.on_indivisible) == (True, 0.01, "error")
    assert (step.targets, step.ignore, dict(step.overrides)) == (("Linear",), (), {})
    assert step.to_dict() == RTN().to_dict() == {}


def test_a_step_cannot_be_changed():
    step = RTN()
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.bits = 8


def test_settings_of_a_linear_follow_targets_ignore_and_the_first_override():
    step = GPTQ(
        bits=4,
        targets=("self_attn.q_proj", "down_proj", r"re:.*layers\.1\."),
        ignore=("model.layers.3.mlp.down_proj",),
        overrides={"re:.*down_proj$": {"bits": 8, "group_size": -1}, "down_proj": {"bits": 2}},
    )
    assert step.for_linear("model.layers.0.self_attn.q_proj") is step
    assert step.for_linear("model.layers.0.self_attn.k_proj") is None
    assert step.for_linear("model.layers.0.self_attn.kq_proj") is None
    assert step.for_linear("model.layers.1.self_attn.k_proj") is step
    assert step.for_linear("model.layers.11.self_attn.k_proj") is None
    assert step.for_linear("model.layers.3.mlp.down_proj") is None
    down = step.for_linear("model.layers.2.mlp.down_proj")
    assert (down.bits, down.group_size, down.act_order) == (8, -1, True)
    assert RTN().for_linear("anything.at.all") is not None
    assert RTN(ignore=("Linear",)).for_linear("anything.at.all") is None


def test_steps_chain():
    first, second, third = RTN(targets=("q_proj",)), GPTQ(targets=("k_proj",)), RTN(targets=("v_proj",), bits=8)
    assert (first >> second).steps == (first, second)
    assert (first >> second >> third).steps == (first, second, third)
    assert (first >> (second >> third)).steps == (first, second, third)
    assert isinstance(first >> second, Steps)
    with pytest.raises(TypeError):
        first >> 3
    job = Job.of(first >> second)
    assert (job.steps, job.name, job.format) == ((first, second), "rtn-gptq", "compressed-tensors")
    assert Job.of(job) is job
    assert Job.of(third).steps == (third,)


# a job


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (None, "needs a key 'recipe' with a list of steps"),
        ([], "needs a key 'recipe' with a list of steps"),
        ("gptq", "needs a key 'recipe' with a list of steps"),
        ({"steps": ["rtn"]}, "needs a key 'recipe' with a list of steps"),
        ({"recipe": None}, "'recipe' must be a list of steps"),
        ({"recipe": []}, "'recipe' must be a list of steps"),
        ({"recipe": 4}, "'recipe' must be a list of steps"),
        ({"recipe": [4]}, "a step must be a mapping such as `gptq: {bits: 4}`, not 4."),
        ({"recipe": ["gpqt"]}, f"There is no step 'gpqt'; there are {KNOWN}. Did you mean 'gptq'?"),
        ({"recipe": [{"rnt": {"bits": 4}}]}, f"There is no step 'rnt'; there are {KNOWN}. Did you mean 'rtn'?"),
        ({"recipe": ["distillation"]}, f"There is no step 'distillation'; there are {KNOWN}."),
        ({"recipe": [{1: {}}]}, "There is no step '1'"),
        ({"recipe": [{"rtn": 4}]}, "rtn must be a mapping of keys to values, not 4."),
        ({"recipe": [{"rtn": ["bits"]}]}, "rtn must be a mapping of keys to values, not ['bits']."),
        ({"recipe": [{"rtn": {"bitz": 4}}]}, "rtn has no key 'bitz'. Did you mean 'bits'?"),
        ({"recipe": [{"gptq": {"groupsize": 4}}]}, "gptq has no key 'groupsize'. Did you mean 'group_size'?"),
        ({"recipe": [{"rtn": {"damping": 0.1}}]}, "rtn has no key 'damping'."),
        ({"recipe": [{"rtn": {"xyzzy": 1}}]}, "rtn has no key 'xyzzy'. There are targets, ignore, overrides, bits,"),
        ({"recipe": [{"rtn": {1: 2}}]}, "rtn has no key '1'."),
        ({"recipe": ["rtn"], "calibratoin": {}}, "mine has no key 'calibratoin'. Did you mean 'calibration'?"),
        (
            {"recipe": ["rtn"], "calibration": {"sample": 1}},
            "calibration has no key 'sample'. Did you mean 'samples'?",
        ),
        (
            {"recipe": ["rtn"], "calibration": {"samples": "x"}},
            "calibration.samples is 'x'; it must be a whole number.",
        ),
        (
            {"recipe": ["rtn"], "calibration": {"samples": 1.5}},
            "calibration.samples is 1.5; it must be a whole number.",
        ),
        ({"recipe": ["rtn"], "calibration": {"samples": True}}, "calibration.samples is True; it must be a whole"),
        ({"recipe": ["rtn"], "calibration": {"samples": 0}}, "calibration.samples is 0; it must be at least 1."),
        ({"recipe": ["rtn"], "calibration": {"seq_len": -1}}, "calibration.seq_len is -1; it must be at least 2."),
        ({"recipe": ["rtn"], "calibration": {"data": 3}}, "calibration.data is 3; it must be a text."),
        ({"recipe": ["rtn"], "calibration": "bundled"}, "'calibration' must be a mapping of keys to values."),
        ({"recipe": ["rtn"], "evaluation": [1]}, "'evaluation' must be a mapping of keys to values."),
        ({"recipe": ["rtn"], "evaluation": {"seed": 1}}, "evaluation has no key 'seed'."),
        ({"recipe": ["rtn"], "evaluation": {"gate": 3}}, "evaluation.gate is 3; it must be a mapping."),
        (
            {"recipe": ["rtn"], "evaluation": {"gate": {"perplexty": 3}}},
            "evaluation.gate has no key 'perplexty'. Did you mean 'perplexity'?",
        ),
        (
            {"recipe": ["rtn"], "evaluation": {"gate": {"kl_mean": "small"}}},
            "evaluation.gate.kl_mean is 'small'; it must be a finite number.",
        ),
        (
            {"recipe": ["rtn"], "evaluation": {"gate": {"kl_mean": True}}},
            "evaluation.gate.kl_mean is True; it must be a finite number.",
        ),
    ],
)
def test_a_document_that_cannot_be_is_refused_in_a_sentence(document, said):
    assert said in refused(job_from_dict, document, "mine")


@pytest.mark.parametrize("listed", [{}, [{}]])
def test_a_recipe_of_no_steps_is_refused(listed):
    assert "step" in refused(job_from_dict, {"recipe": listed}, "mine")


@pytest.mark.parametrize(("key", "least"), [("samples", 1), ("seq_len", 2)])
def test_an_evaluation_of_nothing_is_refused(key, least):
    assert f"must be at least {least}" in refused(EvaluationSettings, **{key: least - 1})


@pytest.mark.parametrize(
    "listed", ["gptq", ["gptq"], {"gptq": {}}, {"gptq": None}, [{"gptq": None}], [{"gptq": {"bits": 4}}]]
)
def test_the_short_ways_to_write_a_step(listed):
    assert job_from_dict({"recipe": listed}).steps == (GPTQ(),)


def test_a_document_with_everything():
    job = job_from_dict(
        {
            "description": "mine",
            "recipe": [{"rtn": {"bits": 8, "targets": ["q_proj"]}}, {"gptq": {"ignore": ["q_proj"]}}],
            "format": "int-quantized",
            "calibration": {"data": "mine.txt", "samples": 3, "seq_len": 5, "seed": 7},
            "evaluation": {"data": "other.txt", "samples": 4, "seq_len": 6, "gate": {"perplexity": 9}},
        },
        "full",
    )
    assert job == Job(
        steps=(RTN(bits=8, targets=("q_proj",)), GPTQ(ignore=("q_proj",))),
        format="int-quantized",
        calibration=CalibrationSettings(data="mine.txt", samples=3, seq_len=5, seed=7),
        evaluation=EvaluationSettings(data="other.txt", samples=4, seq_len=6, gate={"perplexity": 9}),
        name="full",
        description="mine",
    )


# there and back


names = st.text(string.ascii_letters + string.digits + "._: #'-", min_size=1, max_size=12).filter(
    lambda name: not name.startswith("re:")
)
patterns = st.one_of(
    names, st.sampled_from(["Linear", "q_proj", r"re:.*layers\.[0-9]+\.mlp", "re:^model", "no", "1", "~", "null"])
)
choices = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "group_size": st.sampled_from([-1, 32, 64, 128]),
    "symmetric": st.booleans(),
    "scales": st.sampled_from(["search", "minmax"]),
    "on_indivisible": st.sampled_from(["error", "channel", "skip"]),
}
only_gptq = {"act_order": st.booleans(), "damping": st.floats(0, 1)}
targeting = {
    "targets": st.lists(patterns, max_size=3).map(tuple),
    "ignore": st.lists(patterns, max_size=3).map(tuple),
}


def steps_of(kind, keys):
    overrides = st.dictionaries(patterns, st.fixed_dictionaries({}, optional=keys), max_size=2)
    return st.fixed_dictionaries({}, optional={**keys, **targeting, "overrides": overrides}).map(lambda k: kind(**k))


observers = st.sampled_from(["minmax", "percentile", "mse"])
eight_bits = st.builds(
    lambda kind, **keys: kind(bits=8, group_size=-1, **keys),
    kind=st.sampled_from([RTN, GPTQ]),
    type=st.sampled_from(["int", "float"]),
    activations=st.just("static"),
    observer=observers,
)
caches = st.builds(KVCache, type=st.sampled_from(["int", "float"]), observer=observers)
jobs = st.builds(
    Job,
    steps=st.lists(
        st.one_of(steps_of(RTN, choices), steps_of(GPTQ, choices | only_gptq), eight_bits, caches),
        min_size=1,
        max_size=3,
    )
    .filter(lambda steps: len(steps) > 1 or not isinstance(steps[0], KVCache))  # alone it is refused
    .map(tuple),
    format=st.sampled_from(["compressed-tensors", "pack-quantized", "int-quantized", "dense"]),
    calibration=st.builds(
        CalibrationSettings,
        data=names,
        samples=st.integers(1, 10**6),
        seq_len=st.integers(2, 10**6),
        seed=st.integers(0, 2**40),
    ),
    evaluation=st.builds(
        EvaluationSettings,
        data=names,
        samples=st.integers(1, 100),
        seq_len=st.integers(2, 100),
        gate=st.dictionaries(
            st.sampled_from(GATED),
            st.one_of(st.integers(0, 10**12), st.floats(allow_nan=False, allow_infinity=False)),
            max_size=3,
        ),
    ),
)


@settings(deadline=None, max_examples=40)
@given(job=jobs)
def test_a_job_is_the_same_after_yaml_and_after_json(job):
    document = job.to_dict()
    assert job_from_dict(document) == job
    assert job_from_dict(yaml.safe_load(yaml.safe_dump(document))) == job
    assert job_from_dict(json.loads(json.dumps(document))) == job
    assert job_from_dict(document).to_dict() == document


def test_only_what_differs_from_the_defaults_is_written():
    job = Job.of(GPTQ(bits=3, ignore=("lm_head",)))
    assert job.to_dict() == {
        "recipe": [{"gptq": {"ignore": ["lm_head"], "bits": 3}}],
        "format": "compressed-tensors",
        "calibration": {"data": "bundled", "samples": 128, "seq_len": 2048, "seed": 0},
        "evaluation": {
            "data": "bundled",
            "samples": 128,
            "seq_len": 2048,
            "measure": ["quality"],
            "tasks": [],
            "limit": None,
            "gate": {},
            "score": {},
        },
    }


# --set


def test_changes_reach_every_section():
    job = Job(steps=(GPTQ(),), name="mine", description="a line")
    changed = with_changes(
        job,
        [
            "gptq.bits=3",
            "gptq.symmetric=false",
            "gptq.ignore=[lm_head, re:.*down_proj]",
            "gptq.damping=0.05",
            "calibration.seed=5",
            "calibration.data=/a/path=with an equals sign.txt",
            "evaluation.gate.top1_agreement=0.9",
            "format=dense",
        ],
    )
    assert changed == Job(
        steps=(GPTQ(bits=3, symmetric=False, ignore=("lm_head", "re:.*down_proj"), damping=0.05),),
        format="dense",
        calibration=CalibrationSettings(seed=5, data="/a/path=with an equals sign.txt"),
        evaluation=EvaluationSettings(gate={"top1_agreement": 0.9}),
        name="mine",
        description="a line",
    )
    assert job == Job(steps=(GPTQ(),), name="mine", description="a line")
    assert with_changes(job, []) == job


@pytest.mark.parametrize("text", ["1e-2", "1e-02", "5e-3"])
def test_a_number_may_be_written_with_an_exponent(text):
    [step] = with_changes(Job.of(GPTQ()), [f"gptq.damping={text}"]).steps
    assert step.damping == float(text)


def test_a_later_change_counts():
    assert with_changes(Job.of(RTN()), ["rtn.bits=8", "rtn.bits=2"]).steps == (RTN(bits=2),)


def test_changes_reach_into_overrides():
    job = Job.of(RTN(overrides={"q_proj": {"bits": 8}}))
    changed = with_changes(job, ["rtn.overrides.k_proj.bits=2", "rtn.overrides.q_proj.group_size=-1"])
    assert changed.steps == (RTN(overrides={"q_proj": {"bits": 8, "group_size": -1}, "k_proj": {"bits": 2}}),)


def test_changes_leave_the_overrides_of_the_original_alone():
    job = Job.of(RTN(overrides={"q_proj": {"bits": 8}}))
    with_changes(job, ["rtn.overrides.q_proj.bits=3"])
    assert job == Job.of(RTN(overrides={"q_proj": {"bits": 8}}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("gptq.bits", "--set gptq.bits is not understood; write --set step.key=value."),
        ("gptq.bits=[3", "--set gptq.bits=[3: the value is not valid YAML."),
        ("gptq.bits=5", "gptq.bits is 5; it must be one of 2, 3, 4, 8."),
        ("gptq.bits=", "gptq.bits is None;"),
        ("gptq.bit=3", "gptq has no key 'bit'. Did you mean 'bits'?"),
        ("gtpq.bits=3", "has no step 'gtpq'. Did you mean 'gptq'?"),
        ("rtn.bits=3", "has no step 'rtn'."),
        ("calibration.sampels=3", "calibration has no key 'sampels'. Did you mean 'samples'?"),
        ("calibration.samples.x=3", "--set calibration.samples.x=3"),
        ("evaluation.gate.kl=3", "evaluation.gate has no key 'kl'."),
        ("calibrate.samples=3", "Did you mean 'calibration'?"),
        ("=3", "--set =3"),
        ("gptq=3", "--set gptq=3"),
    ],
)
def test_a_change_that_cannot_be_is_refused_in_a_sentence(change, said):
    assert said in refused(with_changes, Job.of(GPTQ()), [change])


@pytest.mark.parametrize("change", ["gptq=3", "gptq.=3", "calibration=3"])
def test_a_section_without_a_key_is_not_said_to_be_missing(change):
    assert "has no step" not in refused(with_changes, Job.of(GPTQ()), [change])


# gates


RESULTS = {
    "perplexity": 10.0,
    "kl_mean": 0.02,
    "kl_median": 0.01,
    "kl_p99": 0.3,
    "kl_max": 2.5,
    "rms_probability_change": 0.02,
    "top1_agreement": 0.93,
    "recovery": 0.98,
    "size_bytes": 1000,
}


@pytest.mark.parametrize("key", [key for key in RESULTS if key not in LOWER_BOUNDS])
def test_a_gate_is_an_upper_bound(key):
    value = RESULTS[key]
    assert EvaluationSettings(gate={key: value}).refusals(RESULTS) == []
    assert EvaluationSettings(gate={key: value * 1.01}).refusals(RESULTS) == []
    [sentence] = EvaluationSettings(gate={key: value * 0.99}).refusals(RESULTS)
    assert sentence.startswith(f"{key} is {value:.6g}")
    assert "at most" in sentence


def test_the_gate_of_agreement_is_a_lower_bound():
    assert EvaluationSettings(gate={"top1_agreement": 0.93, "recovery": 0.97}).refusals(RESULTS) == []
    assert EvaluationSettings(gate={"top1_agreement": 0.9}).refusals(RESULTS) == []
    assert EvaluationSettings(gate={"top1_agreement": 0.95}).refusals(RESULTS) == [
        "top1_agreement is 0.93, off by 0.02: the gate asks for at least 0.95"
    ]


def test_every_bound_that_is_not_kept_is_a_sentence():
    gate = {"perplexity": 9.5, "kl_mean": 0.1, "top1_agreement": 0.99, "size_bytes": 999}
    assert EvaluationSettings(gate=gate).refusals(RESULTS) == [
        "perplexity is 10, off by 0.5: the gate asks for at most 9.5",
        "top1_agreement is 0.93, off by 0.06: the gate asks for at least 0.99",
        "size_bytes is 1000, off by 1: the gate asks for at most 999",
    ]
    assert EvaluationSettings().refusals(RESULTS) == []


def test_a_result_that_is_infinite_is_refused():
    [sentence] = EvaluationSettings(gate={"perplexity": 5}).refusals({**RESULTS, "perplexity": float("inf")})
    assert sentence.startswith("perplexity is inf")


@pytest.mark.parametrize("key", GATED)
def test_a_result_that_is_not_a_number_is_refused(key):
    assert len(EvaluationSettings(gate={key: 5}).refusals({**RESULTS, key: float("nan")})) == 1


def test_a_bound_on_what_was_not_measured_is_not_kept():
    [sentence] = EvaluationSettings(gate={"recovery": 0.9}).refusals({"perplexity": 10.0})
    assert sentence == "recovery was not measured, and the gate asks for 0.9"


def test_what_is_measured():
    assert EvaluationSettings().measurements == ("quality",)
    assert EvaluationSettings(measure=("speed",)).measurements == ("quality", "speed")
    assert EvaluationSettings(tasks=("arc_easy",)).measurements == ("quality", "tasks")
    assert EvaluationSettings(gate={"recovery": 0.9}).measurements == ("quality", "tasks")
    assert "Did you mean 'stability'?" in refused(EvaluationSettings, measure=("stabilty",))
    assert "evaluation.limit is 0" in refused(EvaluationSettings, limit=0)
    assert "evaluation.score has no key 'kl'" in refused(EvaluationSettings, score={"kl": 1})
    assert "must not be negative" in refused(EvaluationSettings, score={"kl_mean": -1})


def test_a_bound_that_is_not_a_number_is_refused():
    assert "perplexity" in refused(EvaluationSettings, gate={"perplexity": float("nan")})


# where recipes come from


def test_every_shipped_recipe_loads_and_says_what_it_is():
    found = shipped_recipes()
    assert {"gptq-w3a16", "gptq-w4a16", "rtn-w8a16", "w8a8-int8", "w8a8-fp8", "gguf-q4_0"} <= found.keys()
    assert {"w4a16", "w3a16", "w2a16", "w4a16-fast", "budget"} <= found.keys()
    for name, description in found.items():
        job = load_job(name)
        assert job.name == name
        assert job.description == description
        assert len(description) > 20
        assert dataclasses.replace(job_from_dict(job.to_dict(), name), description=description) == job
        rounding = [step for step in job.steps if isinstance(step, Quantization)]
        bits = re.search(r"[wq](\d)", name)
        if bits is not None and rounding:
            assert {step.bits for step in rounding} == {int(bits[1])}
        inputs = re.search(r"a(\d+)", name)
        assert {step.activations for step in rounding} <= {"dynamic" if inputs and inputs[1] == "8" else "none"}
        assert {step.type for step in rounding} <= {"float" if name.endswith("fp8") else "int"}
        if name.partition("-")[0] in ("gptq", "rtn"):
            assert [step.name for step in job.steps] == [name.partition("-")[0]]


@pytest.mark.parametrize(("name", "grid"), [("w4a16", (4, 128)), ("w3a16", (3, 128)), ("w2a16", (2, 64))])
def test_the_best_recipes_have_a_gptq_step_that_owns_bits_and_groups(name, grid):
    [step] = load_job(name).steps
    assert isinstance(step, GPTQ)
    assert (step.bits, step.group_size) == grid
    assert step.shift > 0
    assert step.curvature
    assert step.refine > 0
    [changed] = with_changes(load_job(name), ["gptq.bits=8", "gptq.group_size=32"]).steps
    assert (changed.bits, changed.group_size) == (8, 32)


def test_a_recipe_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("description: für mich\nrecipe:\n  - gptq: {bits: 3, ignore: [lm_head]}\n", encoding="utf-8")
    job = load_job(str(path))
    assert (job.name, job.description, job.steps) == ("mine", "für mich", (GPTQ(bits=3, ignore=("lm_head",)),))


def test_a_recipe_from_a_finished_folder(tmp_path):
    job = Job.of(GPTQ(bits=2, overrides={"q_proj": {"bits": 8}}))
    write_manifest(tmp_path, job)
    loaded = load_job(str(tmp_path))
    assert loaded.name == tmp_path.name
    assert loaded.origin == tmp_path
    assert loaded.to_dict() == job.to_dict()
    assert with_changes(loaded, ["gptq.bits=3"]).origin == tmp_path


def test_a_task_file_that_a_checkpoint_names_is_not_run(tmp_path):
    """Such a file may hold code, so only the user names one."""
    tasks = ("arc_easy", "evil.yaml", "/somewhere/task.yml")
    write_manifest(tmp_path, Job(steps=(GPTQ(),), evaluation=EvaluationSettings(tasks=tasks)))
    assert load_job(str(tmp_path)).evaluation.tasks == ("arc_easy",)


def write_manifest(folder, job):
    base = {"model": "user/base", "revision": None}
    manifest = {"recipe": job.to_dict(), "base": base, "linears": [], "calibration": None}
    (folder / "hfcompress.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "mine is not a recipe: it needs a key 'recipe'"),
        (b"just words", "mine is not a recipe: it needs a key 'recipe'"),
        (b"recipe: [", "mine.yaml is not valid YAML:"),
        (b"recipe: 'rtn", "mine.yaml is not valid YAML:"),
        (b"a: b: c", "mine.yaml is not valid YAML:"),
        (b"\xff\xfe\x00\xd8", "mine.yaml is not valid YAML:"),
        (b"recipe: !!python/object/apply:os.getcwd []", "mine.yaml is not valid YAML:"),
        (b"recipe: [rnt]", "There is no step 'rnt'"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    sentence = refused(load_job, str(path))
    assert said in sentence
    assert "\n" not in sentence


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest(tmp_path):
    assert "no recipe 'gptq-w4a15'" in refused(load_job, "gptq-w4a15")
    assert "Did you mean 'gptq-w4a16'?" in refused(load_job, "gptq-w4a15")
    assert "`hfcompress recipes` lists the shipped ones" in refused(load_job, str(tmp_path / "Q" / "Q.Q"))
    assert "has no hfcompress.json" in refused(load_job, str(tmp_path))


@pytest.mark.parametrize("content", ["{not json", "{}", "[]"])
def test_a_damaged_manifest_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "hfcompress.json").write_text(content)
    with pytest.raises(HfcompressError, match=r"hfcompress\.json"):
        load_job(str(tmp_path))
