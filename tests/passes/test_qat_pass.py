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
"""Quantization-aware training, end to end: from the solver's codes exactly, never to worse, and what is reported is true."""

import json

import numpy as np
import pytest
import torch
from conftest import CONFIGS, digest, in_fresh_process, make_model, token_ids
from safetensors.torch import load_file

import hfcompress as hfc
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, InvalidValueError
from hfcompress.formats import get_format
from hfcompress.formats.writer import CheckpointWriter, partial_path
from hfcompress.hub.reload import READ, WHOLE, _difference
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.roles import set_weight
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes import qat_pass
from hfcompress.passes.plan import make_plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.qat_pass import QatPass
from hfcompress.progress import Silent
from hfcompress.solvers.grid import Grid


IDS = token_ids(20, 24)
QUICK = {
    "train": "both",
    "steps": 24,
    "batch_size": 4,
    "held_out": 4,
    "learning_rate": 0.01,
    "scale_learning_rate": 0.02,
}
START = hfc.RTN(bits=2, group_size=32, scales="minmax")  # leaves much to learn
LOGITS = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    np.save(sys.argv[3], model(input_ids=torch.from_numpy(np.load(sys.argv[2]))).logits.numpy())
print(json.dumps(True))
"""


def run(model, output, recipe=None, **options):
    recipe = recipe or START >> hfc.QAT(**QUICK)
    return hfc.compress(model, recipe, output, calibration=IDS, evaluate=False, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A random Llama rounded, and rounded and trained."""
    folder = tmp_path_factory.mktemp("qat")
    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(folder / "base")
    ptq = run(folder / "base", folder / "ptq", START)
    return folder, ptq, run(folder / "base", folder / "out")


def kl(folder, ids: np.ndarray, base) -> float:
    """In float64, by an independent way: weights restored into a plain model."""
    logits = []
    for source in (None, folder):
        model = make_model(CONFIGS["llama"](), torch.bfloat16).double()
        if source is not None:
            stored, layout = load_file(source / "model.safetensors"), get_format("compressed-tensors")
            for row in json.loads((source / "hfcompress.json").read_text())["linears"]:
                grid = Grid(row["bits"], row["group_size"], row["symmetric"])
                set_weight(model.get_submodule(row["name"]), layout.restore(stored, row["name"], grid, False))
        with torch.no_grad():
            logits.append(torch.log_softmax(model(input_ids=torch.from_numpy(ids)).logits, -1))
    p, q = (x[:, :-1] for x in logits)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_it_helps_and_the_record_is_true(trained):
    folder, ptq, result = trained
    record = result.manifest["training"]
    assert record["held_out_kl"] < 0.9 * record["held_out_kl_start"]
    assert record["history"][0][1] == record["held_out_kl_start"]
    assert min(value for _, value in record["history"]) == record["held_out_kl"]
    assert dict(map(tuple, record["history"]))[record["best_step"]] == record["held_out_kl"]
    chosen = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))[:4]
    held_out = IDS[np.sort(chosen.numpy())]
    assert kl(folder / "ptq", held_out, folder / "base") == pytest.approx(record["held_out_kl_start"], rel=2e-3)
    assert kl(folder / "out", held_out, folder / "base") == pytest.approx(record["held_out_kl"], rel=2e-3)
    assert ptq.manifest["training"] is None


def test_rows_tell_what_was_trained(trained):
    folder, ptq, result = trained
    before, after = (load_file(folder / name / "model.safetensors") for name in ("ptq", "out"))
    assert before.keys() == after.keys()
    for old, new in zip(ptq.manifest["linears"], result.manifest["linears"], strict=True):
        assert (old["method"], new["method"]) == ("rtn", "rtn+qat")
        grid = Grid(new["bits"], new["group_size"], new["symmetric"])
        layout, name = get_format("compressed-tensors"), new["name"]
        codes = [
            layout.unpack({k: s[f"{name}.{k}"] for k in ("weight_packed", "weight_scale", "weight_shape")}, grid).codes
            for s in (before, after)
        ]
        assert new["changed_codes"] == pytest.approx((codes[0] != codes[1]).float().mean().item())
        weight = load_file(folder / "base" / "model.safetensors")[f"{name}.weight"].float()
        values = layout.restore(after, name, grid, False)
        error = ((weight - values).norm() / weight.norm()).item()
        assert new["relative_weight_error"] == pytest.approx(error, rel=1e-4)
        assert new["bytes"] == old["bytes"]
        assert 0 < new["relative_output_error"] < 1
    assert result.manifest["training"]["changed_codes"] > 0
    same = [k for k in before if not any(k.startswith(f"{row['name']}.") for row in result.manifest["linears"])]
    assert same
    assert all(torch.equal(before[key], after[key]) for key in same)  # embeddings, norms, head


def test_the_witness_is_what_a_fresh_process_says(trained, tmp_path):
    folder, _, result = trained
    witness = result.manifest["witness"]
    np.save(tmp_path / "ids.npy", np.array([witness["input_ids"]]))
    in_fresh_process(
        LOGITS, str(folder / "out"), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy"), forbid="hfcompress"
    )
    found = torch.log_softmax(torch.from_numpy(np.load(tmp_path / "logits.npy"))[0].double(), -1)
    found = found.gather(-1, torch.tensor(witness["top_ids"]))
    assert torch.allclose(found, torch.tensor(witness["top_log_probs"]).double(), atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_step_zero_has_exactly_the_logits_of_the_block_pass(tmp_path, symmetric):
    model = StreamedModel(Checkpoint.open(make_model(CONFIGS["llama"](), torch.bfloat16)))
    step = hfc.GPTQ(bits=2, group_size=32, symmetric=symmetric, targets=("Linear", "lm_head"))
    layout = get_format("compressed-tensors")
    plan = make_plan(model, (step, hfc.QAT()), layout)
    writer = CheckpointWriter(tmp_path / "out")
    writer.open()
    journal = qat_pass.Journal(writer.partial / "journal.json", {})
    from hfcompress.passes.block_pass import BlockPass

    BlockPass(model, plan, layout, writer, journal, Processes(model.device), Silent(), True).run(
        [Batch(torch.from_numpy(IDS))]
    )
    training = QatPass(model, plan, layout, hfc.QAT(**QUICK), Tokens(IDS, "test"))
    solved = training._solved(writer)
    ids = Batch(torch.from_numpy(token_ids(2, 16, seed=3)))
    logits = []
    for fake in (False, True):
        with model.loaded() as whole, torch.no_grad():
            whole.requires_grad_(False)
            if fake:
                learning = training._install(whole, solved)
                assert learning.keys() == solved.keys() == plan.tasks.keys()
                whole.train()
            else:
                for name, weight in solved.items():
                    set_weight(whole.get_submodule(name), layout.values(weight))
            logits.append(model.head_logits(whole, model.final_hidden(whole, ids), ids))
            if fake:
                for name in learning:
                    torch.nn.utils.parametrize.remove_parametrizations(whole.get_submodule(name), "weight")
    assert torch.equal(*logits)


def test_only_what_is_asked_for_is_trained(tmp_path, trained):
    folder, _, _ = trained
    recipe = START >> hfc.QAT(**{**QUICK, "train": "scales"}, ignore=("down_proj",), targets=("re:.*mlp",))
    result = run(folder / "base", tmp_path / "out", recipe)
    before, after = (load_file(f / "model.safetensors") for f in (folder / "ptq", tmp_path / "out"))
    methods = {row["name"]: row["method"] for row in result.manifest["linears"]}
    for name, method in methods.items():
        assert (method == "rtn+qat") == (".mlp." in name and "down_proj" not in name)
        assert torch.equal(before[f"{name}.weight_packed"], after[f"{name}.weight_packed"])
        same = torch.equal(before[f"{name}.weight_scale"], after[f"{name}.weight_scale"])
        assert same == (method == "rtn")
    record = result.manifest["training"]
    assert record["held_out_kl"] < record["held_out_kl_start"]


def test_a_start_that_cannot_be_beaten_is_kept(tmp_path, trained):
    folder, _, _ = trained
    recipe = START >> hfc.QAT(**{**QUICK, "steps": 2, "learning_rate": 30.0, "scale_learning_rate": 3.0})
    said = []

    class Notes(Silent):
        def note(self, message):
            said.append(message)

    result = run(folder / "base", tmp_path / "out", recipe, progress=Notes())
    assert result.manifest["training"]["best_step"] == 0
    assert result.manifest["training"]["changed_codes"] == 0
    assert digest(tmp_path / "out") == digest(folder / "ptq")
    assert any("nothing that is better" in message for message in said)


@pytest.mark.parametrize("moment", ["training", "applying"])
def test_a_killed_run_trains_again_from_the_finished_block_pass(tmp_path, trained, monkeypatch, moment):
    folder, _, whole = trained
    with monkeypatch.context() as patch:

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        if moment == "training":
            patch.setattr(qat_pass.QatPass, "_fit", stop)
        else:
            write, written = CheckpointWriter.write_part, []

            def stop_after_one(writer, name, tensors):
                if (writer.partial / "qat.safetensors").exists():
                    if written:
                        raise KeyboardInterrupt
                    written.append(name)
                write(writer, name, tensors)

            patch.setattr(CheckpointWriter, "write_part", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "base", tmp_path / "out")
    assert partial_path(tmp_path / "out").is_dir()
    from hfcompress.passes import block_pass

    monkeypatch.setattr(block_pass.BlockPass, "run", lambda *args: pytest.fail("the block pass was finished"))
    result = run(folder / "base", tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == digest(folder / "out")
    assert result.manifest["witness"] == whole.manifest["witness"]
    assert [r["method"] for r in result.manifest["linears"]] == ["rtn+qat"] * 21


def test_gptq_starts_it_too_and_accumulation_changes_next_to_nothing(tmp_path, trained):
    folder, _, _ = trained
    gptq, settings = hfc.GPTQ(bits=2, group_size=32), {**QUICK, "steps": 4}
    found = [
        run(folder / "base", tmp_path / str(parts), gptq >> hfc.QAT(**settings, accumulation=parts)).manifest
        for parts in (1, 4)
    ]
    one, other = (manifest["training"]["history"] for manifest in found)
    assert one[0][1] == pytest.approx(other[0][1], rel=1e-5)
    assert one[1][1] == pytest.approx(other[1][1], rel=0.05)  # sums in another order, and a code flips
    assert one[1][1] != one[0][1]


@pytest.mark.parametrize(
    "loss",
    [
        {"loss": "reverse_kl"},
        {"loss": "jsd", "mix": 0.3, "temperature": 2.0},
        {"loss": "skew_forward_kl"},
        {"loss": "total_variation"},
    ],
    ids=lambda loss: loss["loss"],
)
def test_other_divergences_lead_to_the_dense_model_too(tmp_path, trained, loss):
    folder, *_ = trained
    result = run(folder / "base", tmp_path / "out", START >> hfc.QAT(**QUICK, **loss))
    training = result.manifest["training"]
    assert training["held_out_kl"] < 0.9 * training["history"][0][1]  # by the forward KL, whatever was trained on
    assert digest(tmp_path / "out") != digest(folder / "out")


def test_it_starts_from_all_that_gptq_can_do(tmp_path, trained):
    folder, _, _ = trained
    gptq = hfc.GPTQ(bits=2, group_size=32, shift=0.5, curvature=True, refine=2, targets=("down_proj",))
    run(folder / "base", tmp_path / "ptq", gptq)
    record = run(folder / "base", tmp_path / "out", gptq >> hfc.QAT(**{**QUICK, "steps": 2})).manifest["training"]
    chosen = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))[:4]
    held_out = IDS[np.sort(chosen.numpy())]
    assert kl(tmp_path / "ptq", held_out, folder / "base") == pytest.approx(record["held_out_kl_start"], rel=2e-3)
    assert kl(tmp_path / "out", held_out, folder / "base") == pytest.approx(record["held_out_kl"], rel=2e-3)


@pytest.mark.parametrize(
    "before",
    [hfc.Rotate() >> START, hfc.Budget(target_bits=3, choices=("2g32", "4g32")) >> START],
    ids=["rotated", "budget"],
)
def test_it_goes_on_from_what_was_settled_before(tmp_path, trained, before):
    folder, _, _ = trained
    recipe = before >> hfc.QAT(**{**QUICK, "train": "scales", "steps": 8})
    start, result = (run(folder / "base", tmp_path / name, made) for name, made in (("a", before), ("b", recipe)))
    record = result.manifest["training"]
    assert record["held_out_kl"] < 0.99 * record["held_out_kl_start"]
    lost = [hfc.evaluate(tmp_path / name, folder / "base", data=IDS)["kl_mean"] for name in ("a", "b")]
    assert lost[1] < lost[0]
    assert _difference(tmp_path / "b", WHOLE) < 1e-3
    bits = [[row["bits"] for row in done.manifest["linears"]] for done in (start, result)]
    assert bits[0] == bits[1]
    ours, trained_ = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(ours[key], trained_[key]) for key in ours if not key.endswith(".weight_scale"))


@pytest.mark.parametrize("layout", ["gptq", "gguf"])
def test_other_formats_hold_what_was_trained(tmp_path, trained, layout):
    folder, _, _ = trained
    qat = hfc.QAT(**{**QUICK, "train": "scales", "steps": 4})
    job = hfc.Job(steps=(hfc.RTN(bits=4, group_size=32, scales="minmax"), qat), format=layout)
    record = run(folder / "base", tmp_path / "out", job).manifest["training"]
    assert record["held_out_kl"] < record["held_out_kl_start"]
    assert _difference(tmp_path / "out", READ) < 1e-3


@pytest.mark.parametrize(
    "steps",
    [
        hfc.Codebook(bits=2, rounds=0, shift=0.0),
        hfc.VQ(bits=1, length=4, rounds=0, shift=0.0),
        hfc.Sparsify("2:4", shift=0.0) >> hfc.VQ(bits=2, length=1, rounds=0, shift=0.0),
    ],
)
def test_what_codes_stand_for_is_trained(tmp_path, trained, steps):
    folder, _, _ = trained
    qat = hfc.QAT(**{**QUICK, "train": "scales"})
    before, found = run(folder / "base", tmp_path / "ptq", steps), run(folder / "base", tmp_path / "out", steps >> qat)
    assert found.manifest["training"]["held_out_kl"] < 0.99 * found.manifest["training"]["held_out_kl_start"]
    values = []
    for name in ("ptq", "out"):
        hfc.export(tmp_path / name, "dense", tmp_path / f"{name}-dense", dtype="float32")
        values.append(load_file(tmp_path / f"{name}-dense" / "model.safetensors"))
    for row in found.manifest["linears"]:
        old, new = (each[f"{row['name']}.weight"] for each in values)
        assert row["changed_codes"] == 0
        assert not torch.equal(old, new)
        assert torch.equal(old == 0, new == 0)
        size = sum(
            t.nbytes
            for key, t in load_file(tmp_path / "out" / "model.safetensors").items()
            if key.startswith(f"{row['name']}.")
        )
        assert row["bytes"] == size
    assert len(before.manifest["linears"]) == len(found.manifest["linears"])
    witness = found.manifest["witness"]
    np.save(tmp_path / "ids.npy", np.array([witness["input_ids"]]))
    in_fresh_process(LOGITS, str(tmp_path / "out-dense"), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy"))
    logits = torch.log_softmax(torch.from_numpy(np.load(tmp_path / "logits.npy"))[0].double(), -1)
    logits = logits.gather(-1, torch.tensor(witness["top_ids"]))
    assert torch.allclose(logits, torch.tensor(witness["top_log_probs"]).double(), atol=1e-3)


def test_codes_that_number_something_stay(tmp_path, trained):
    folder, _, _ = trained
    with pytest.raises(
        InvalidValueError, match=r"stay what they are, and what they stand for is trained; set qat.train"
    ):
        run(folder / "base", tmp_path / "out", hfc.VQ(bits=2) >> hfc.QAT(**QUICK))


def test_what_is_rounded_beside_the_weights_cannot_be_trained(tmp_path, trained):
    folder, _, _ = trained
    eight, qat = {"bits": 8, "group_size": -1}, hfc.QAT(**QUICK)
    for recipe, said in (
        (
            hfc.RTN(**eight, activations="dynamic") >> qat,
            "q_proj is to have int codes and rounded inputs; leave out qat",
        ),
        (hfc.RTN(**eight, type="float") >> qat, "q_proj is to have float codes; leave out qat"),
        (hfc.RTN(**eight) >> hfc.KVCache() >> qat, "kv_cache rounds what it would learn from"),
    ):
        with pytest.raises(InvalidValueError, match=said):
            run(folder / "base", tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_before_any_work(tmp_path, trained):
    folder, _, _ = trained
    base, gptq = folder / "base", START
    with pytest.raises(CalibrationError, match=r"20 calibration rows.*held_out \(18\).*--samples"):
        run(base, tmp_path / "out", gptq >> hfc.QAT(held_out=18, batch_size=4))
    with pytest.raises(InvalidValueError, match="leaves every quantized linear alone"):
        run(base, tmp_path / "out", gptq >> hfc.QAT(ignore=("Linear",), held_out=4))
    with pytest.raises(InvalidValueError, match=r"'dense' does not keep them.*format=compressed-tensors"):
        run(base, tmp_path / "out", hfc.Job(steps=(gptq, hfc.QAT(held_out=4)), format="dense"))
    with pytest.raises(InvalidValueError, match=r"needs about .* GB are free; leave out the step"):
        run(base, tmp_path / "out", memory_limit=1000)
    with pytest.raises(InvalidValueError, match=r"no linear of this model is called 'q_porj'.*q_proj"):
        run(base, tmp_path / "out", gptq >> hfc.QAT(targets=("q_porj",)))
    model = StreamedModel(Checkpoint.open(base))
    layout = get_format("compressed-tensors")
    training = QatPass(model, make_plan(model, (gptq,), layout), layout, hfc.QAT(**QUICK), Tokens(IDS, "test"))
    processes = Processes(model.device)
    processes.count = 2
    with pytest.raises(InvalidValueError, match="in one process; start it without torchrun"):
        training.check(processes, None)
    assert not (tmp_path / "out").exists()
    assert not partial_path(tmp_path / "out").exists()
