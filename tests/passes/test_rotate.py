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
"""Rotated or not: chosen by what is measured, told to the user, and nothing half done where it is not."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids, with_outliers
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.models import rotation
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.passes import rotate
from hfcompress.progress import Silent


STEP = hfc.GPTQ(bits=3, group_size=-1)


class Notes(Silent):
    """Keeps what the user is told."""

    def __init__(self):
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def run(model, recipe, output, tiny, **options):
    """Compressed on the tiny model's own rows, and its divergence on rows that no one has seen."""
    notes = Notes()
    calibration = np.load(tiny / "calibration.npy").astype(np.int64)[:16]
    result = hfc.compress(model, recipe, output, calibration=calibration, evaluate=False, progress=notes, **options)
    return result.manifest, notes.said


@torch.no_grad()
def divergence(model, folder, tiny) -> float:
    ids = torch.from_numpy(np.load(tiny / "evaluation.npy").astype(np.int64)[:24])
    solved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, solved))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_where_weights_have_outliers_it_is_rotated_and_loses_far_less(tiny, tmp_path):
    model = with_outliers(tiny)
    manifest, said = run(model, hfc.Rotate() >> STEP, tmp_path / "rotated", tiny)
    found = manifest["rotation"]
    assert found["hidden"]
    assert found["blocks_with_rotated_heads"] == 4
    assert found["reasons"] == {}
    assert found["kl_rotated"] < found["kl_as_it_is"] / 2
    assert any(
        said_.startswith("rotated: ")
        and f"{found['kl_rotated']:.5f}" in said_
        and f"{found['kl_as_it_is']:.5f}" in said_
        for said_ in said
    )
    run(model, STEP, tmp_path / "plain", tiny)
    lost, lost_without = (divergence(model, tmp_path / name, tiny) for name in ("rotated", "plain"))
    assert lost < lost_without / 2
    # the trial was on other and fewer rows, and the numbers are what such rows give
    assert lost == pytest.approx(found["kl_rotated"], rel=0.3)
    assert lost_without == pytest.approx(found["kl_as_it_is"], rel=0.3)


def test_where_it_does_not_help_the_result_is_that_of_the_steps_alone(tiny, tmp_path, monkeypatch):
    kl = iter([0.2, 0.1])  # with, without
    monkeypatch.setattr(rotate, "trial", lambda *arguments: next(kl))
    manifest, said = run(str(tiny), hfc.Rotate() >> STEP, tmp_path / "chosen", tiny)
    assert any(s.startswith("not rotated: ") and "0.20000 nats" in s and "0.10000 without" in s for s in said)
    assert manifest["rotation"]["hidden"] is False
    assert manifest["rotation"]["blocks_with_rotated_heads"] == 0
    run(str(tiny), STEP, tmp_path / "plain", tiny)
    assert Checkpoint.open(tmp_path / "chosen").sha256 == Checkpoint.open(tmp_path / "plain").sha256


def test_a_trial_that_gives_no_number_chooses_no_rotation(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(rotate, "trial", lambda *arguments: math.nan)
    options = {"calibration": token_ids(4, 32), "evaluate": False}
    result = hfc.compress(llama, hfc.Rotate() >> STEP, tmp_path / "out", **options)
    assert result.manifest["rotation"]["hidden"] is False


def test_always_asks_no_one_and_a_head_with_its_own_weight_can_be_quantized(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rotate, "trial", None)  # must not be called
    step = hfc.GPTQ(bits=4, group_size=32, targets=("Linear", "lm_head"))
    with pytest.raises(hfc.HfcompressError, match="shares its weight with the embeddings"):
        run(str(tiny), step, tmp_path / "plain", tiny)
    manifest, said = run(str(tiny), hfc.Rotate(when="always") >> step, tmp_path / "out", tiny)
    assert manifest["rotation"]["hidden"]
    assert "kl_rotated" not in manifest["rotation"]
    assert manifest["rotation"]["added_bytes"] == 524_288
    assert any("524,288 bytes more" in s for s in said)
    assert any(row["name"] == "lm_head" for row in manifest["linears"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((tiny / "config.json").read_text())
    assert {k: v for k, v in config.items() if original.get(k) != v} == {
        "tie_word_embeddings": False,
        "quantization_config": config["quantization_config"],
    }
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    assert divergence(model, tmp_path / "out", tiny) < 0.02


def test_rounding_to_nearest_is_tried_on_calibration_rows_too(tiny, tmp_path):
    """A step that needs no data of its own: the rows that the choice rests on are in the manifest."""
    model = with_outliers(tiny)
    manifest, _ = run(model, hfc.Rotate() >> hfc.RTN(bits=4, group_size=-1), tmp_path / "out", tiny)
    assert manifest["rotation"]["kl_rotated"] < manifest["rotation"]["kl_as_it_is"]
    assert manifest["calibration"]["samples"] == 16
    manifest, _ = run(model, hfc.Rotate(when="always") >> hfc.RTN(bits=4), tmp_path / "always", tiny)
    assert manifest["calibration"] is None


def test_what_cannot_be_rotated_is_told_and_the_run_goes_on(tmp_path):
    notes = Notes()
    model = make_model(CONFIGS["gemma3"]())
    recipe = hfc.Rotate(heads=False) >> hfc.GPTQ(group_size=32)
    options = {"calibration": token_ids(8, 32), "evaluate": False}
    result = hfc.compress(model, recipe, tmp_path / "out", progress=notes, **options)
    [said] = [s for s in notes.said if "rotated" in s]
    assert said.startswith("the residual stream cannot be rotated and stays as it is: what a block adds")
    assert result.manifest["rotation"]["hidden"] is False
    assert "what a block adds" in result.manifest["rotation"]["reasons"]["hidden"]
    hfc.compress(model, hfc.GPTQ(group_size=32), tmp_path / "plain", **options)
    assert Checkpoint.open(tmp_path / "out").sha256 == Checkpoint.open(tmp_path / "plain").sha256


def test_blocks_whose_heads_cannot_be_rotated_are_counted(llama, tmp_path, monkeypatch):
    found = rotation.heads_of_block
    monkeypatch.setattr(
        rotation, "heads_of_block", lambda events, width: None if ".0." in events[0].name else found(events, width)
    )
    notes, recipe = Notes(), hfc.Rotate(when="always") >> STEP
    options = {"calibration": token_ids(8, 32), "evaluate": False, "progress": notes}
    manifest = hfc.compress(llama, recipe, tmp_path / "out", **options).manifest
    assert manifest["rotation"]["blocks_with_rotated_heads"] == 2
    assert "the values of the attention heads can be rotated in 2 of 3 blocks" in notes.said
