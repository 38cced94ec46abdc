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
"""GPTQ with everything that looks beyond one linear: on the trained model, each part pays."""

import pytest
from conftest import token_ids

import hfcompress as hfc
from hfcompress.errors import InvalidValueError
from hfcompress.recipes.job import EvaluationSettings


ROWS = {"samples": 16, "seq_len": 192}


def divergence(tmp_path, **settings) -> float:
    name = "-".join(settings) or "plain"
    recipe = hfc.Job(steps=(hfc.GPTQ(bits=2, group_size=64, **settings),), evaluation=EvaluationSettings(samples=16))
    result = hfc.compress(None, recipe, tmp_path / name, **ROWS)
    return result.report["kl_mean"]


def test_every_part_lowers_the_divergence_of_two_bit_weights(tmp_path):
    plain = divergence(tmp_path)
    refined = divergence(tmp_path, shift=1.0, refine=2)
    best = divergence(tmp_path, shift=1.0, refine=2, curvature=True)
    assert refined < 0.9 * plain
    assert best < 0.85 * refined
    assert best < 0.6 * plain


def test_the_share_of_the_shift_is_reported(llama, tmp_path):
    recipe = hfc.GPTQ(bits=2, group_size=32, shift=0.7)
    result = hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(24, 32), evaluate=False)
    shares = [row["shift"] for row in result.manifest["linears"]]
    assert shares[:3] == [0.0, 0.0, 0.0]  # nothing is lost before the first
    assert all(0 <= share <= 0.7 for share in shares)
    assert max(shares) > 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shift": 1.5}, "gptq.shift is 1.5; it must lie between 0 and 1"),
        ({"refine": -1}, "gptq.refine is -1; it must not be negative"),
        (
            {"bits": 8, "group_size": -1, "type": "float", "refine": 1},
            "gptq.curvature and gptq.refine are for integer codes: leave them out beside type float",
        ),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(InvalidValueError, match=said):
        hfc.GPTQ(**settings)
