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
"""What got worse, in sentences: named where it is real, not named where it is chance, and any part may be missing."""

import copy
import json

import pytest
from test_plots import made_up_manifest, made_up_report

from hfcompress.evaluation.limits import limits


DASH = "\N{EN DASH}"


def sides(baseline, compressed, *errors) -> dict:
    """What both models have, and the standard errors where there are any."""
    return {"baseline": baseline, "compressed": compressed} | dict(
        zip(("baseline_stderr", "compressed_stderr"), errors, strict=False)
    )


def speed(key: str, baseline, compressed, *errors) -> dict:
    rates = zip((baseline, compressed), errors or (None, None), strict=True)
    both = [{"batches": {"1": {f"{key}_tokens_per_second": r, f"{key}_stderr": e}}} for r, e in rates]
    return {"speed": sides(*both)}


def quality(**changed) -> dict:
    return {"perplexity": 14.0, "baseline_perplexity": 14.0, "top1_agreement": 1.0, "kl_mean": 0.01} | changed


def found(report: dict) -> list[str]:
    """The sentences of a report of which quality is well."""
    return limits({}, quality() | report)


def test_nothing_lost_is_no_limit():
    assert found({}) == []
    assert limits({}, {}) == limits({}, {"perplexity": None}) == ["Its quality was not measured."]


# chance and no chance: what is said of a change, and the two values on either side of two standard errors


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (
            lambda more: quality(perplexity=14.0 * (1 + 0.02 * more), log_perplexity_difference_stderr=0.01),
            "Perplexity rose by",
        ),
        (
            lambda more: {"robustness": {"calibration_error": sides(0.02, 0.02 + 0.01 * more, 0.003, 0.004)}},
            "Its confidence is further from the truth: the calibration error rose from 2.00 ± 0.30 % to",
        ),
        (
            lambda more: {"stability": {"repetition": sides(0.1, 0.1 + 0.1 * more, 0.03, 0.04)}},
            "It repeats itself more: the share of repeated word sequences rose from 10.0 ± 3.0 % to",
        ),
        (
            lambda more: speed("prefill", 900.0, 900.0 - 100.0 * more, 30.0, 40.0),
            "Loaded by plain transformers it reads a prompt at",
        ),
        (
            lambda more: speed("decode", 90.0, 90.0 - 10.0 * more, 3.0, 4.0),
            "Loaded by plain transformers it decodes at",
        ),
        (
            lambda more: {
                "energy": sides(
                    {"joules_per_token": 0.5, "joules_per_token_stderr": 0.003},
                    {"joules_per_token": 0.5 + 0.01 * more, "joules_per_token_stderr": 0.004},
                )
            },
            "Loaded by plain transformers it takes",
        ),
    ],
)
def test_within_two_standard_errors_nothing_is_said(report, sentence):
    assert found(report(0.95)) == found(report(-3.0)) == []
    [said] = found(report(1.05))
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (quality(perplexity=14.07), "Perplexity rose by 0.500 %, from 14.000 to 14.070."),
        (
            speed("prefill", 900.0, 720.0),
            (
                "Loaded by plain transformers it reads a prompt at 0.800 times the original's speed on the machine that "
                "measured it."
            ),
        ),
        (
            speed("decode", 40.0, 30.0),
            (
                "Loaded by plain transformers it decodes at 0.750 times the original's speed on the machine that measured "
                "it."
            ),
        ),
        (
            {
                "energy": sides({"joules_per_token": 0.5}, {"joules_per_token": 0.6})
                | {"how": {"source": "estimate", "text": "An estimate."}}
            },
            "Loaded by plain transformers it takes 1.20 times the original's energy a token, by an estimate.",
        ),
        (
            {"memory": sides({"peak_bytes": 100}, {"peak_bytes": 100})},
            "Loaded by plain transformers it takes no less memory than the original while generating.",
        ),
        (
            {"robustness": {"calibration_error": sides(0.021, 0.034)}},
            "Its confidence is further from the truth: the calibration error rose from 2.10 % to 3.40 %.",
        ),
        (
            {"robustness": {"conditions": {"clean": {"kl_mean": 0.01}, "token_swaps": {"kl_mean": 0.03}}}},
            "Under token swaps the divergence is 3.0 times that on clean text.",
        ),
        (
            {"tasks": {"scores": {"lambada": sides(5.0, 6.0) | {"metric": "perplexity", "higher_is_better": False}}}},
            "lambada: perplexity went from 5.000 to 6.000.",
        ),
        (
            quality(out_of_domain={"kl_mean": 0.03, "data": "source code"}),
            "On source code it is 3.0 times as far from the original.",
        ),
        (quality(top1_agreement=0.95), "The most likely next token is another one at 5.00 % of the positions."),
    ],
)
def test_what_is_said_where_no_standard_error_is_known(report, sentence):
    assert found(report) == [sentence]


def test_repetition_goes_by_the_paired_difference_where_there_is_one():
    """The two models wrote after the same prompts: their difference is better known than either."""
    rate = sides(0.1, 0.12, 0.05, 0.05)
    assert found({"stability": {"repetition": rate}}) == []
    [said] = found({"stability": {"repetition": rate | {"difference": 0.02, "difference_stderr": 0.004}}})
    assert said.endswith("rose from 10.0 ± 5.0 % to 12.0 ± 5.0 %.")
    assert found({"stability": {"repetition": rate | {"difference": 0.02, "difference_stderr": 0.02}}}) == []


def test_drift_along_a_text():
    def along(*kl):
        return {
            "stability": {
                "kl_by_position": [{"from": 32 + 64 * i, "to": 96 + 64 * i, "kl_mean": k} for i, k in enumerate(kl)]
            }
        }

    assert found(along(0.004, 0.02, 0.008)) == found(along(0.004)) == found(along()) == []
    [said] = found(along(0.004, 0.006, 0.009))
    assert said == (
        f"It drifts away from the original along a text: the KL is 0.00400 nats over positions 32{DASH}95 and 0.00900 "
        f"nats over positions 160{DASH}223."
    )


def test_the_block_that_hurts_most():
    blocks = [
        {"block": i, "name": f"model.layers.{i}", "kl_swapped_in": kl, "kl_swapped_in_stderr": 0.0002}
        for i, kl in enumerate((0.001, 0.0052, None, 0.003))
    ]
    sentence = "Of all blocks {} hurts most: compressed alone, it costs a KL of 0.00520 ± 0.00020 nats."
    assert found({"explain": {"blocks": blocks}}) == [sentence.format("model.layers.1")]
    del blocks[1]["name"]
    assert found({"explain": {"blocks": blocks}}) == [sentence.format("block 1")]
    assert found({"explain": {"blocks": [{"block": 0, "kl_swapped_in": 0.0}]}}) == []


def test_what_the_manifest_tells():
    linears = [{"name": "a", "fallback": None}, {"name": "b", "fallback": "too few tokens"}]
    assert limits({"linears": linears, "skipped": {"c": "it is tied"}}, quality()) == [
        "1 linear was solved by a fallback, the first of them b.",
        "c was left alone: it is tied.",
    ]
    gates = {f"model.layers.{index}.mlp.gate": "it decides what of a token goes to experts" for index in range(3)}
    assert limits({"linears": [], "skipped": {**gates, "c": "it is tied"}}, quality()) == [
        "3 linears, the first of them model.layers.0.mlp.gate, were left alone: it decides what of a token goes to experts.",
        "c was left alone: it is tied.",
    ]
    experts = {"count": 16, "fewest": 3, "few": 2, "unseen": 0}
    [sentence] = limits({"linears": [], "experts": experts}, quality())
    assert sentence.startswith(
        "Of 16 experts 2 were sent fewer calibration tokens than their linears have inputs, the fewest 3;"
    )
    assert limits({"linears": [], "experts": {**experts, "few": 0}}, quality()) == []
    assert limits({"linears": None, "skipped": None}, quality()) == []


def without_each_part(whole, path=()):
    """The path to every part that lies in mappings and lists."""
    for key in whole if isinstance(whole, dict) else range(len(whole)):
        yield (*path, key)
        if isinstance(whole[key], (dict, list)):
            yield from without_each_part(whole[key], (*path, key))


@pytest.mark.parametrize("of", ["manifest", "report"])
def test_any_part_may_be_missing_or_null(of):
    """Whatever is taken away, the other sections' sentences stay, and none tells of a value that is not there."""
    whole = {"manifest": made_up_manifest(1), "report": made_up_report(2)}
    complete = limits(**whole)
    assert len(complete) >= 10
    for *way, last in without_each_part(whole[of]):
        for null in (True, False):
            cut = copy.deepcopy(whole)
            holder = cut[of]
            for key in way:
                holder = holder[key]
            if null:
                holder[last] = None
            else:
                del holder[last]
            left = limits(**cut)
            assert len(left) >= len(complete) - 5, (way, last)
            assert "None" not in " ".join(left), (way, last, null)
            assert "—" not in " ".join(left), (way, last, null)


def test_a_report_as_it_is_saved():
    """Through JSON and back, which a report of an earlier run has gone."""
    report = made_up_report()
    assert limits(made_up_manifest(), json.loads(json.dumps(report))) == limits(made_up_manifest(), report)
