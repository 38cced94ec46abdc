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
"""A budget from the recipe to the folder: kept to the byte, told in one table, and the same again."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_fresh_process, token_ids

import hfcompress as hfc
from hfcompress.budgeting.choices import Choices
from hfcompress.cli import USER_ERROR, _guarded, app
from hfcompress.errors import CalibrationError, InvalidValueError
from hfcompress.evaluation.logits import open_for_logits
from hfcompress.formats import get_format
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.progress import Silent


CHOICES = ("2g64", "4g64")
SIZE = 1_300_000
LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 35)[None]).logits
bits = sorted({m.quantization_scheme.weights.num_bits for m in model.modules() if hasattr(m, "quantization_scheme")})
print(json.dumps({"logits": logits[0, -4:].tolist(), "bits": bits}))
"""


class Notes(Silent):
    """Keeps what a person would be told."""

    def __init__(self):
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Stopped(Exception):
    """A run was killed."""


class StopsAt(Silent):
    """Ends a run when it comes to a step."""

    def __init__(self, description: str):
        self.description = description

    def step(self, description: str, amount: int = 1) -> None:
        if description == self.description and not amount:
            raise Stopped


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory):
    """The bundled model within a budget, from the command line: the folder, and what was said."""
    folder = tmp_path_factory.mktemp("budget")
    recipe = folder / "budget.yaml"
    listed = ", ".join(CHOICES)
    recipe.write_text(f"recipe:\n  - budget: {{target_size: 1.3MB, choices: [{listed}]}}\n  - gptq: {{}}\n")
    command = "import sys; from hfcompress.cli import main; main()"
    options = [
        "run",
        str(recipe),
        "--output",
        str(folder / "out"),
        "--samples",
        "16",
        "--json",
        str(folder / "all.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", command, *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out", done.stdout


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "hfcompress.json").read_text())


def test_the_size_is_kept_to_the_byte(budgeted):
    size = (budgeted[0] / "model.safetensors").stat().st_size
    assert 0.98 * SIZE < size <= SIZE  # the units of a model this small are a percent of it
    settled = manifest_of(budgeted[0])["budget"]
    assert settled["target"] == {"target_size": SIZE}
    assert settled["chosen"]["size_bytes"] == size


def test_fused_linears_share_a_choice_and_the_rows_have_it(budgeted):
    manifest = manifest_of(budgeted[0])
    rows = {row["name"]: (row["bits"], row["group_size"]) for row in manifest["linears"]}
    assert len(rows) == 28
    for unit in manifest["budget"]["units"]:
        bits, group_size = map(int, unit["choice"].split("g"))
        assert {rows.pop(name) for name in unit["linears"]} == {(bits, group_size)}
        assert sum(choice == unit["choice"] for choice in unit["choices"]) == 1
    assert not rows
    assert len(manifest["budget"]["units"]) == 16
    assert len({unit["choice"] for unit in manifest["budget"]["units"]}) > 1


def test_plain_transformers_loads_mixed_bits_and_says_the_same(budgeted):
    found = in_fresh_process(LOGITS, str(budgeted[0]), forbid="hfcompress")
    assert len(found["bits"]) > 1
    model = open_for_logits(Checkpoint.open(budgeted[0]), torch.device("cpu"), torch.float32)
    model.prepare([Batch(torch.arange(3, 35)[None])], Silent(), "")
    with model.head() as head:
        ours = model.logits(head, 0)[0, -4:]
    torch.testing.assert_close(torch.tensor(found["logits"]), ours, rtol=1e-4, atol=1e-4)


def test_it_is_predicted_by_what_is_measured(budgeted):
    """The gradients order single swaps as their measured KL does, and the whole is what was expected of it."""
    settled = manifest_of(budgeted[0])["budget"]
    pairs = [
        (o["second_order_kl"], o["measured_kl"])
        for unit in settled["units"]
        for o in unit["choices"].values()
        if "measured_kl" in o
    ]
    assert len(pairs) == 32  # both choices of every unit
    ranks = [np.argsort(np.argsort(values)) for values in zip(*pairs, strict=True)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9
    kl = json.loads((budgeted[0] / "eval_results.json").read_text())["kl_mean"]
    assert 0.6 < kl / settled["chosen"]["kl"] < 1.7
    assert settled["chosen"]["bound"] <= settled["chosen"]["kl"] <= 1.1 * settled["chosen"]["bound"]
    assert [point["kl"] for point in settled["curve"]] == sorted((p["kl"] for p in settled["curve"]), reverse=True)


def test_the_table_and_the_picture_are_shown_and_kept(budgeted):
    folder, said = budgeted
    assert "budget, target_size 1.300 MB" in said
    assert "→ chosen" in said
    for choice in CHOICES:
        assert f"{choice} everywhere" in said
    assert (folder / "plots" / "budget.png").is_file()
    assert "plots/budget.png" in (folder / "README.md").read_text()


def test_the_recipe_stays_the_users_and_gives_the_same_again(saved_llama, tmp_path):
    np.save(tmp_path / "ids.npy", token_ids(8, 32))
    recipe = hfc.Budget(target_size=120_000, choices=("2g32", "4g32", "8g32")) >> hfc.GPTQ()
    first = hfc.compress(
        str(saved_llama), recipe, tmp_path / "first", calibration=str(tmp_path / "ids.npy"), evaluate=False
    )
    assert first.manifest["recipe"]["recipe"] == [recipe_step(step) for step in recipe.steps]
    assert (first.output_dir / "model.safetensors").stat().st_size <= 120_000
    again = hfc.compress(None, str(first.output_dir), tmp_path / "again", evaluate=False)
    one, other = ((r.output_dir / "model.safetensors").read_bytes() for r in (first, again))
    assert one == other
    assert again.manifest["budget"] == first.manifest["budget"]


def recipe_step(step: hfc.Recipe) -> dict:
    """As YAML has it."""
    return {step.name: step.to_dict()}


def test_a_resumed_run_keeps_its_choice(llama, tmp_path, monkeypatch):
    recipe = hfc.Budget(target_bits=3.6, choices=("2g32", "4g32")) >> hfc.GPTQ()
    ids = token_ids(8, 32)
    straight = hfc.compress(llama, recipe, tmp_path / "straight", calibration=ids, evaluate=False)
    stops = StopsAt("block 3 of 3")
    with pytest.raises(Stopped):
        hfc.compress(llama, recipe, tmp_path / "out", calibration=ids, evaluate=False, progress=stops)
    monkeypatch.setattr("hfcompress.compression.settle", None)
    resumed = hfc.compress(llama, recipe, tmp_path / "out", calibration=ids, evaluate=False, resume=True)
    first, second = ((r.output_dir / "model.safetensors").read_bytes() for r in (straight, resumed))
    assert first == second
    bits = 8 * sum(row["bytes"] for row in resumed.manifest["linears"])
    bits /= sum(np.prod(row["shape"]) for row in resumed.manifest["linears"])
    assert 3.2 < bits <= 3.6
    assert resumed.manifest["budget"]["chosen"]["bits_per_weight"] == pytest.approx(bits)


def test_a_bound_on_kl_is_measured_on_rows_that_were_held_out(llama, tmp_path):
    bound = 0.02
    recipe = hfc.Budget(target_kl=bound, choices=("2g32", "3g32", "4g32", "8g32")) >> hfc.RTN()
    result = hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(16, 32), evaluate=False)
    settled = result.manifest["budget"]
    kept = [trial for trial in settled["trials"] if trial["measured_kl"] <= bound]
    assert settled["chosen"]["size_bytes"] == min(trial["size_bytes"] for trial in kept)
    assert 0.5 * bound < min(kept, key=lambda t: t["size_bytes"])["measured_kl"] <= bound
    assert not list((tmp_path).glob(".*"))
    assert result.manifest["calibration"]["samples"] == 16  # rounding to nearest, but chosen by data


def test_settings_of_the_step_are_kept(llama, tmp_path):
    overrides = {"o_proj": {"bits": 8, "group_size": 64}, "down_proj": {"damping": 0.05}}
    gptq = hfc.GPTQ(group_size=32, overrides=overrides, targets=("Linear", "lm_head"))
    budget = hfc.Budget(target_bits=4.0, choices=("2g32", "4g32"), ignore=("lm_head",))
    ids = token_ids(8, 32)
    hfc.compress(llama, budget >> gptq, tmp_path / "out", calibration=ids, evaluate=False)
    rows = {row["name"]: row for row in manifest_of(tmp_path / "out")["linears"]}
    assert {(r["bits"], r["group_size"]) for n, r in rows.items() if n.endswith("o_proj")} == {(8, 64)}
    assert {r["damping"] for n, r in rows.items() if n.endswith("down_proj")} == {0.05}
    assert (rows["lm_head"]["bits"], rows["lm_head"]["group_size"]) == (4, 32)


def test_the_head_is_a_unit_where_it_is_named(llama, tmp_path):
    recipe = hfc.Budget(target_bits=4.0, choices=("2g32", "4g32", "8g32")) >> hfc.GPTQ(targets=("Linear", "lm_head"))
    result = hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False)
    head = result.manifest["budget"]["units"][-1]
    assert head["linears"] == ["lm_head"]
    assert all(option["kl"] > 0 for option in head["choices"].values())


def test_a_budget_above_the_most_buys_the_best(llama, tmp_path):
    notes = Notes()
    recipe = hfc.Budget(target_size="1GB", choices=("2g32", "8g32")) >> hfc.RTN()
    ids = token_ids(4, 32)
    result = hfc.compress(llama, recipe, tmp_path / "out", calibration=ids, evaluate=False, progress=notes)
    assert {row["bits"] for row in result.manifest["linears"]} == {8}
    assert any(note.startswith("everything fits at the best choice: ") for note in notes.notes)


def test_a_plan_of_choices_is_the_recipes_own(llama):
    """Sizes are told of the plan that overrides give."""
    gptq = hfc.GPTQ(group_size=32, overrides={"o_proj": {"bits": 8}, "down_proj": {"damping": 0.05}})
    steps = (hfc.Budget(target_kl=1, choices=("2g32", "4g-1")), gptq)
    opened = Choices(StreamedModel(Checkpoint.open(llama)), steps, get_format("compressed-tensors"))
    chosen = {name: ("2g32", "4g-1")[index % 2] for index, name in enumerate(opened.options)}
    assert len(chosen) == 19  # o_proj has its bits, and the head is its own
    plan, resolved = opened.plan(chosen), opened.resolved(chosen)
    assert plan == resolved
    assert {(task.grid.bits, task.grid.group_size) for task in plan.tasks.values()} == {(2, 32), (4, -1), (8, 32)}


# what is refused


def refused(model, *steps, layout: str = "compressed-tensors") -> str:
    with pytest.raises(InvalidValueError) as error:
        Choices(StreamedModel(Checkpoint.open(model)), steps, get_format(layout))
    return str(error.value)


def test_a_target_below_the_least_names_it(llama):
    choices = ("2g32", "4g32")
    said = refused(llama, hfc.Budget(target_size=1000, choices=choices), hfc.GPTQ())
    found = re.fullmatch(
        r"budget.target_size is 1,000, and with these choices the least is ([\d,]+) bytes and the most ([\d,]+); give at "
        r"least that, or choices of fewer bits\.",
        said,
    )
    least, most = (int(text.replace(",", "")) for text in found.groups())
    assert 1000 < least < most
    Choices(
        StreamedModel(Checkpoint.open(llama)),
        (hfc.Budget(target_size=least, choices=choices), hfc.GPTQ()),
        get_format("compressed-tensors"),
    )
    said = refused(llama, hfc.Budget(target_bits=1.5, choices=choices), hfc.GPTQ())
    assert "budget.target_bits is 1.5, and with these choices the least is 3." in said


def test_choices_that_fit_no_linear(llama):
    said = refused(llama, hfc.Budget(target_kl=1, choices=("4g128",)), hfc.GPTQ())
    assert said == (
        "None of budget.choices (4g128) fits a linear that is open to choice; give others, or check budget.targets and the "
        "overrides of the step behind it."
    )


def test_a_format_in_which_all_choices_take_the_same(llama):
    said = refused(llama, hfc.Budget(target_size="1MB", choices=("2g32", "4g32")), hfc.RTN(), layout="dense")
    assert said == (
        "In the format dense every choice of the budget takes the same bytes; write --set format=compressed-tensors."
    )


def test_patterns_that_mean_nothing(llama):
    said = refused(llama, hfc.Budget(target_kl=1, choices=("4g32",), ignore=("dwn_proj",)), hfc.GPTQ())
    assert said == "budget: no linear that is compressed is called 'dwn_proj'. Did you mean 'down_proj'?"


def test_grids_that_cannot_be_mixed(llama):
    said = refused(llama, hfc.Budget(target_kl=1, choices=("2g32", "4g32")), hfc.RTN(symmetric=False))
    assert "holds an asymmetric grid only when all linears share it" in said


def test_fused_linears_without_a_common_choice(llama, tmp_path):
    budget = hfc.Budget(target_kl=1, choices=("2g32",), overrides={"v_proj": {"choices": ["4g32"]}})
    with pytest.raises(InvalidValueError) as error:
        hfc.compress(llama, budget >> hfc.RTN(), tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)
    assert str(error.value) == (
        "model.layers.0.self_attn.q_proj and model.layers.0.self_attn.k_proj and model.layers.0.self_attn.v_proj read the "
        "same tensor and so share a choice, but have none in common; give them the same choices in budget.overrides."
    )


def test_a_bound_on_kl_that_cannot_be_kept_or_measured(llama, tmp_path):
    recipe = hfc.Budget(target_kl=1e-9, choices=("2g32",)) >> hfc.RTN()
    with pytest.raises(
        InvalidValueError, match=r"budget.target_kl is 1e-09, but the closest of 3 trials left [\d.]+ nats"
    ):
        hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)
    with pytest.raises(CalibrationError, match="there is one row; give more --samples"):
        hfc.compress(llama, recipe, tmp_path / "out", calibration=token_ids(1, 32), evaluate=False)
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_it_in_one_sentence(tmp_path, capsys):
    recipe = tmp_path / "budget.yaml"
    recipe.write_text("recipe:\n  - budget: {target_size: 1kB}\n  - gptq: {}\n")
    code = _guarded(app, ["run", str(recipe), "--output", str(tmp_path / "out"), "--samples", "2"])
    said = capsys.readouterr().err
    assert code == USER_ERROR
    assert "error: budget.target_size is 1,000, and with these choices the least is" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
