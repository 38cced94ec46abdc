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
"""Distillation: a student that earlier steps have left gets nearer to the original, and stays what it was otherwise."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.distillation import heard_rows
from hfcompress.distillation.objective import Objective
from hfcompress.distillation.signals import Live
from hfcompress.distillation.taught_trainer import Student, TaughtRows, collate, head_of
from hfcompress.errors import CalibrationError, CheckpointError, InvalidValueError, OutputError
from hfcompress.formats.writer import partial_path
from hfcompress.hub.published import published
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.tiny import tiny_folder
from hfcompress.passes.processes import Processes
from hfcompress.progress import Silent
from hfcompress.recipes import job_from_dict
from hfcompress.solvers.pattern import Pattern


IDS = token_ids(20, 24)
QUICK = {"steps": 6, "batch_size": 4, "held_out": 4, "learning_rate": 1e-3}
LONGER = {**QUICK, "steps": 24}
PRUNED = hfc.Prune(ffn=0.5, depth=0.3, rows=4, multiple=16, refit=False)


def run(model, output, recipe, **options):
    return hfc.compress(str(model), recipe, output, calibration=IDS, evaluate=False, **options)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("distill") / "base"
    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(folder)
    return folder


@torch.no_grad()
def divergence(student, teacher, rows: np.ndarray) -> float:
    """KL(teacher || student) of plain models in float64, mean over all predictions."""
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(torch.from_numpy(rows)).logits[:, :-1]
        for folder in (teacher, student)
    ]
    p, q = (each.log_softmax(-1) for each in logits)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_a_model_that_lost_a_block_gets_most_of_it_back(tmp_path):
    """On the bundled model, and on text that nothing was trained on."""
    ids = torch.as_tensor(np.load(tiny_folder() / "calibration.npy")[:48]).long()
    kl = {}
    for name, steps in {"pruned": (), "distilled": (hfc.Distill(epochs=1),)}.items():
        job = hfc.Job(steps=(hfc.Prune(depth=0.25, criterion="influence"), *steps))
        kl[name] = hfc.compress(None, job, tmp_path / name, calibration=ids).report["kl_mean"]
    assert kl["distilled"] < 0.75 * kl["pruned"]
    card = (tmp_path / "distilled" / "README.md").read_text()
    assert "tiny-llama cut to 3 of its 4 blocks, trained on its predictions: " in card
    assert "- every weight trained on the original's predictions, " in card
    assert "is the original's, bit for bit" not in card


def test_the_teacher_is_the_original_and_the_record_is_true(base, tmp_path):
    run(base, tmp_path / "pruned", PRUNED)
    result = run(base, tmp_path / "out", PRUNED >> hfc.Distill(**LONGER))
    record = result.manifest["training"]
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:4].sort().values.numpy()
    start = divergence(tmp_path / "pruned", base, IDS[chosen])
    assert record["history"][0][1] == pytest.approx(start, rel=1e-3)
    assert record["held_out_kl"] < 0.9 * start
    assert divergence(tmp_path / "out", base, IDS[chosen]) == pytest.approx(
        record["held_out_kl"], rel=2e-2
    )  # bfloat16
    assert result.manifest["base"]["model"] == str(base)
    assert result.manifest["pruning"]["ffn"] == {"before": 96, "after": 48}


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "gemma3", "phi3", "gpt2", "opt"])
def test_zeros_stay_and_everything_else_learns(name, tmp_path):
    make_model(CONFIGS[name](), torch.bfloat16).save_pretrained(tmp_path / "base")
    sparse = hfc.Sparsify("2:4", method="magnitude", refit=False)
    first = run(tmp_path / "base", tmp_path / "sparse", sparse)
    result = run(tmp_path / "base", tmp_path / "out", sparse >> hfc.Distill(**LONGER))
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("sparse", "out"))
    assert before.keys() == after.keys()
    stems = {row["name"] for row in first.manifest["linears"]}
    assert len(stems) == len(result.manifest["linears"])
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        if tensor.ndim == 2:
            assert not torch.equal(tensor, before[key]), key
        if key.removesuffix(".weight") in stems or key.removesuffix(".weight").removeprefix("transformer.") in stems:
            assert torch.equal(tensor == 0, before[key] == 0), key
    rows = result.manifest["linears"]
    assert {row["method"] for row in rows} == {"sparsify+distill"}
    assert {row["pattern"] for row in rows} == {"2:4"}
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:4].sort().values.numpy()
    lost = [divergence(tmp_path / folder, tmp_path / "base", IDS[chosen]) for folder in ("out", "sparse")]
    assert lost[0] < 0.98 * lost[1]


def test_a_pattern_of_half_zeros_holds_in_the_file(base, tmp_path):
    result = run(base, tmp_path / "out", hfc.Sparsify("unstructured") >> hfc.Distill(**QUICK))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    shares = [(stored[f"{row['name']}.weight"] == 0).float().mean().item() for row in result.manifest["linears"]]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    run(base, tmp_path / "grouped", hfc.Sparsify("4:8") >> hfc.Tune(iterations=2) >> hfc.Distill(**QUICK))
    stored = load_file(tmp_path / "grouped" / "model.safetensors")
    assert Pattern.parse("4:8").excess(stored["model.layers.0.mlp.up_proj.weight"].float()) == 0


def test_how_a_step_is_divided_makes_no_difference(base, tmp_path):
    found = [
        run(base, tmp_path / str(parts), PRUNED >> hfc.Distill(**QUICK, accumulation=parts)).manifest["training"]
        for parts in (1, 4)
    ]
    one, other = (np.array(record["history"]) for record in found)
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_a_start_that_cannot_be_beaten_is_kept(base, tmp_path):
    run(base, tmp_path / "pruned", PRUNED)
    result = run(base, tmp_path / "out", PRUNED >> hfc.Distill(**{**QUICK, "learning_rate": 30.0}))
    assert result.manifest["training"]["best_step"] == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "pruned")


def test_steps_behind_it_go_on_with_the_student(base, tmp_path):
    recipe = PRUNED >> hfc.Distill(**QUICK) >> hfc.GPTQ(group_size=-1)
    result = run(base, tmp_path / "out", recipe)
    assert [step for entry in result.manifest["recipe"]["recipe"] for step in entry] == ["prune", "distill", "gptq"]
    assert result.manifest["training"]["step"] == "distill"
    assert result.manifest["pruning"]["ffn"]["after"] == 48
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert not partial_path(tmp_path / "out").exists()


STUDENTS = {
    "every": {"student": {"every": 2}},
    "sliced": {"student": {"intermediate_size": 48, "num_hidden_layers": 2}},
    "random": {"student": {"hidden_size": 32}, "init": "random"},
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_that_is_made_of_the_original_gets_nearer_to_it(base, tmp_path, kind):
    """With its hidden states told too, where they are of another width by a map that is not stored."""
    settings = {**LONGER, **STUDENTS[kind], "features": 0.5, "balanced": True}
    result = run(base, tmp_path / "out", hfc.Distill(**settings))
    record = result.manifest["training"]
    assert record["held_out_kl"] < 0.9 * record["held_out_kl_start"]
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:4].sort().values.numpy()
    assert divergence(tmp_path / "out", base, IDS[chosen]) == pytest.approx(record["held_out_kl"], rel=2e-2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in settings["student"].items():
        assert config.get(key, value) == value
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == plain.state_dict().keys()
    assert plain.generate(
        torch.from_numpy(IDS[:1, :4]), min_new_tokens=3, max_new_tokens=3, do_sample=False
    ).shape == (1, 7)


def test_hidden_states_get_nearer_too(base, tmp_path):
    @torch.no_grad()
    def off(folder) -> float:
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(
                torch.from_numpy(IDS), output_hidden_states=True
            ).hidden_states[1]
            for each in (folder, base)
        )
        return ((ours - theirs).square().sum() / theirs.square().sum()).item()

    recipe = {**LONGER, "student": {"every": 2}, "feature_blocks": {0: 0}}
    for features in (0.0, 5.0):
        run(base, tmp_path / str(features), hfc.Distill(**recipe, features=features))
    assert off(tmp_path / "5.0") < 0.8 * off(tmp_path / "0.0")


@pytest.mark.parametrize("balanced", [False, True])
def test_how_a_step_is_divided_makes_no_difference_to_hidden_states(base, tmp_path, balanced):
    settings = {**QUICK, "student": {"hidden_size": 32}, "features": 0.5, "balanced": balanced}
    settings |= {"temperature": 2.0, "final_temperature": 1.0, "feature_loss": "cosine"}
    found = [
        run(base, tmp_path / str(parts), hfc.Distill(**settings, accumulation=parts)).manifest["training"]
        for parts in (1, 4)
    ]
    one, other = (np.array(record["history"]) for record in found)
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_the_budget_may_be_told_in_tokens(base, tmp_path):
    settings = {key: value for key, value in QUICK.items() if key != "steps"}
    result = run(base, tmp_path / "out", PRUNED >> hfc.Distill(**settings, tokens=300))
    assert result.manifest["training"]["steps"] == 4  # of 96 tokens


@pytest.mark.parametrize(
    ("signal", "size", "off"), [("top_k", 10_000, 1e-3), ("top_k", 48, 0.1), ("sampled", 512, 0.1)]
)
def test_a_teacher_on_disk_teaches_as_the_live_one_does(base, tmp_path, signal, size, off):
    live = run(base, tmp_path / "live", hfc.Distill(**LONGER, student={"every": 2})).manifest["training"]
    kept = {"signal": signal, "signal_size": size, "teacher_cache": str(tmp_path / "teachers")}
    run(base, tmp_path / "out", hfc.Distill(**LONGER, student={"every": 2}, **kept))
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:4].sort().values.numpy()
    assert divergence(tmp_path / "out", base, IDS[chosen]) == pytest.approx(live["held_out_kl"], rel=0.02 + off)
    told = Said()
    run(base, tmp_path / "again", hfc.Distill(**LONGER, student={"every": 2}, **kept), progress=told)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert any(note.startswith("what the teacher says is read from") for note in told.notes)


def test_a_teacher_that_was_interrupted_is_asked_for_the_rest_alone(base, tmp_path, monkeypatch):
    monkeypatch.setattr(heard_rows, "SHARD_TOKENS", 4 * 24)
    recipe = hfc.Distill(**QUICK, student={"every": 2}, signal="sampled", teacher_cache=str(tmp_path / "teachers"))
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out", recipe, progress=StopIn("distill: writing down what the teacher says, 4"))
    [folder] = (tmp_path / "teachers").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(before) == [f"rows-{number:05d}.safetensors" for number in range(3)]
    run(base, tmp_path / "out", recipe, resume=True)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(after) == 6  # five of rows, and the word that they are whole
    assert before.items() <= after.items()
    assert json.loads((folder / "teacher.json").read_text())["size"] == 64
    other = tmp_path / "other"
    run(
        base,
        tmp_path / "whole",
        hfc.Distill(**QUICK, student={"every": 2}, signal="sampled", teacher_cache=str(other)),
    )
    assert weights(tmp_path / "whole") == weights(tmp_path / "out")
    (folder / "rows-00001.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is damaged; delete that folder"):
        run(base, tmp_path / "damaged", recipe)


class Said(Silent):
    """Keeps what is noted."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_text_alone_teaches_too_but_less(base, tmp_path):
    found = {}
    for name, weights in {"text": (0.0, 1.0), "teacher": (1.0, 0.0)}.items():
        recipe = hfc.Distill(**LONGER, student={"every": 2}, loss_weight=weights[0], cross_entropy=weights[1])
        found[name] = run(base, tmp_path / name, recipe).manifest["training"]["held_out_kl"]
    assert found["teacher"] < 0.8 * found["text"]


def padded_student(base, folder, by: int):
    """Another model of the same tokenizer, whose vocabulary is longer, and itself a little off."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = word_tokenizer(model.config.vocab_size)
    tokenizer.save_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + by)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer(size: int):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


def test_another_checkpoint_whose_vocabulary_is_padded_otherwise(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    padded_student(tmp_path / "base", tmp_path / "student", by=16)
    recipe = hfc.Distill(**LONGER, student=str(tmp_path / "student"))
    result = hfc.compress(str(tmp_path / "base"), recipe, tmp_path / "out", calibration=IDS, eval_data=IDS)
    record = result.manifest["training"]
    assert record["held_out_kl"] < 0.9 * record["held_out_kl_start"]
    assert result.manifest["student"]["model"] == str(tmp_path / "student")
    assert "base as student has learned it: " in (tmp_path / "out" / "README.md").read_text()
    told, _ = published(result.manifest, {})
    assert str(tmp_path) not in json.dumps([told["student"], told["recipe"]])
    with torch.no_grad():
        models = [
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (tmp_path / "base", tmp_path / "out")
        ]
        size = models[0].config.vocab_size
        assert models[1].config.vocab_size == size + 16
        p, q = (m(torch.from_numpy(IDS)).logits[:, :-1, :size].log_softmax(-1) for m in models)
    assert result.report["kl_mean"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_a_student_of_another_tokenizer_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    padded_student(tmp_path / "base", tmp_path / "student", by=16)
    word_tokenizer(100).save_pretrained(tmp_path / "student")
    recipe = hfc.Distill(**QUICK, student=str(tmp_path / "student"))
    with pytest.raises(CheckpointError, match="have different tokenizers: 'w100' is 100 in one of them alone"):
        run(tmp_path / "base", tmp_path / "out", recipe)


def test_another_student_is_another_run(base, tmp_path):
    shutil.copytree(base, tmp_path / "student")
    recipe = hfc.Distill(**QUICK, student=str(tmp_path / "student"))
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out", recipe, progress=StopIn("drawing"))
    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(tmp_path / "student")
    stored = load_file(tmp_path / "student" / "model.safetensors")
    stored["model.norm.weight"] += 1
    save_file(stored, tmp_path / "student" / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="differs in the student"):
        run(base, tmp_path / "out", recipe, resume=True)


class StopIn(Silent):
    """Ctrl-C where something is said."""

    def __init__(self, words):
        self.words = words

    def step(self, text, amount=1):
        if text.startswith(self.words):
            raise KeyboardInterrupt


@pytest.mark.parametrize("words", ["distill: step 3", "distill: writing 2", "drawing"])
def test_what_was_interrupted_goes_on_to_the_same_bytes(base, tmp_path, words):
    recipe = PRUNED >> hfc.Distill(**QUICK)
    run(base, tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out", recipe, progress=StopIn(words))
    run(base, tmp_path / "out", recipe, resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("opt", False)])
def test_the_gradient_of_every_weight_is_that_of_the_plain_model(name, tied, tmp_path):
    """In float64: the loss from hidden states, in chunks, against logits all at once; padding left out."""
    folders = []
    for seed in (1, 2):
        config = CONFIGS[name]()
        config.tie_word_embeddings = tied
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    ids, mask = torch.from_numpy(token_ids(3, 12)), torch.ones(3, 12, dtype=torch.bool)
    mask[0, :4] = False
    teacher, streamed = (StreamedModel(Checkpoint.open(str(folder)), dtype=torch.float64) for folder in folders)
    rows = TaughtRows(ids, mask, teacher.forward_blocks(teacher.embed([Batch(ids, mask)]))[0].hidden)
    with head_of(teacher) as teacher_logits, streamed.loaded() as whole:
        student = Student(streamed, whole.requires_grad_(), Live(teacher_logits))
        student.chunk = 5
        student.losses(collate([rows[index] for index in range(3)]), Objective())[0].backward()
        found = {name: parameter.grad.clone() for name, parameter in whole.named_parameters()}
    plain, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in reversed(folders))
    plain.requires_grad_()
    with torch.no_grad():
        wanted = other(ids, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
    given = plain(ids, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
    (wanted.exp() * (wanted - given)).sum(-1)[mask[:, 1:] & mask[:, :-1]].sum().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        gradient = torch.zeros_like(found[key]) if gradient is None else gradient
        torch.testing.assert_close(
            found[key], gradient, rtol=1e-6, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_an_output_head_that_shares_its_weight_is_written_once(tmp_path):
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    make_model(config, torch.bfloat16).save_pretrained(tmp_path / "base")
    sparse = hfc.Sparsify("2:4", method="magnitude", refit=False)
    result = run(tmp_path / "base", tmp_path / "out", sparse >> hfc.Distill(**LONGER))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    record = result.manifest["training"]
    assert record["held_out_kl"] < 0.98 * record["held_out_kl_start"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (hfc.Distill(), "put prune or sparsify right before it, such as prune >> distill, or set distill.student."),
        (hfc.Prune(ffn=0.5) >> hfc.Distill(student={"every": 2}), "so prune before it would be lost; leave one out."),
        (hfc.Distill(student={"every": 9}), "'every' stands alone, and is a whole number from 2 to 3, the blocks of"),
        (hfc.Distill(student="nowhere/at/all"), "nowhere/at/all"),
        (hfc.AWQ() >> hfc.Distill(), "put prune or sparsify right before it"),
        (hfc.Sparsify() >> hfc.GPTQ() >> hfc.Distill(), "that are not rounded yet: put it before gptq, or take qat."),
    ],
)
def test_where_it_cannot_stand_is_told(base, tmp_path, recipe, said):
    with pytest.raises((InvalidValueError, CheckpointError)) as error:
        run(base, tmp_path / "out", recipe)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "distill.epochs is 0; it must be at least 1."),
        ({"learning_rate": -1.0}, "distill.learning_rate is -1.0; it must be 0 or more."),
        ({"temperature": 0.0}, "distill.temperature is 0.0; it must be above 0."),
        ({"mix": 0.5}, "distill.mix is for jsd, skew_forward_kl, skew_reverse_kl; leave it out with"),
        ({"loss": "jsd", "mix": 2.0}, "distill.mix is 2.0; it must lie between 0 and 1."),
        ({"accumulation": 3}, "distill.accumulation (3) must divide distill.batch_size (4)."),
        ({"loss_weight": -1.0}, "distill.loss_weight is -1.0; it must be 0 or more."),
        ({"features": -1.0}, "distill.features is -1.0; it must be 0 or more."),
        ({"loss_weight": 0.0}, "distill has nothing to learn from"),
        ({"final_temperature": 0.0}, "distill.final_temperature is 0.0; it must be above 0."),
        ({"signal_size": 0}, "distill.signal_size is 0; it must be at least 1."),
        ({"teacher_cache": "x"}, "distill.teacher_cache is for signal=top_k or sampled; set one, or leave it out."),
        ({"signal": "top_k", "temperature": 2.0}, "distill.signal=top_k keeps probabilities at temperature 1"),
        ({"signal": "top_k", "features": 2.0}, "distill.signal=top_k keeps no hidden states; leave features out"),
        ({"signal": "sampled", "loss": "jsd"}, "distill.signal=sampled is for the forward KL; leave out loss=jsd"),
        ({"student": {}}, "distill.student is empty; name a checkpoint"),
        ({"student": 3}, "distill.student is 3; it must be"),
        ({"init": "random"}, "distill.init is for a distill.student that is told by its sizes"),
        ({"feature_blocks": {0: -1}}, "distill.feature_blocks: 0: -1 is no pair of blocks, counted from 0."),
        ({"feature_loss": "msee"}, "distill.feature_loss is 'msee'; it must be one of mse, cosine"),
        ({"steps": 3, "tokens": 9}, "distill has steps and tokens; give one of them."),
        ({"tokens": 0}, "distill.tokens is 0; it must be at least 1."),
        ({"targets": ["q_proj"]}, "distill takes no targets, ignore or overrides"),
        ({"los": "jsd"}, "distill has no key 'los'. Did you mean 'loss'?"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence(settings, said):
    with pytest.raises(InvalidValueError) as error:
        job_from_dict({"recipe": [{"prune": {"ffn": 0.5}}, {"distill": settings}]})
    assert str(error.value).startswith(said)


def test_too_few_rows_and_too_little_memory_are_told(base, tmp_path, monkeypatch):
    with pytest.raises(CalibrationError, match=r"distill has 20 calibration rows, which is less than held_out \(18\)"):
        run(base, tmp_path / "out", PRUNED >> hfc.Distill(**{**QUICK, "held_out": 18}))
    with pytest.raises(InvalidValueError, match="distill trains the whole model at once and needs about"):
        run(base, tmp_path / "out", PRUNED >> hfc.Distill(**QUICK), memory_limit=1, resume=True)

    class Two(Processes):
        def __init__(self, device):
            super().__init__(device)
            self.count = 2

    monkeypatch.setattr("hfcompress.preparing.Processes", Two)
    with pytest.raises(InvalidValueError, match="A recipe of several stages works in one process"):
        run(base, tmp_path / "other", PRUNED >> hfc.Distill(**QUICK))
