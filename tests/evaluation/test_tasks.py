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
"""The tasks measurement, against the same scores computed with plain transformers."""

import logging
import math
import os
import random
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfcompress.evaluation
from hfcompress.calibration.reference_text import reference_text
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, CheckpointError, HfcompressError, InvalidValueError, MissingExtraError
from hfcompress.evaluation import continuation, task_scores, tasks
from hfcompress.evaluation.comparison import Comparison
from hfcompress.models.checkpoint import Checkpoint


DATA = Path(__file__).parent / "data"
SCORED = 12  # documents of `continuation` that are scored here a second time


class Counted:
    """Counts the steps of progress."""

    def __init__(self):
        self.steps = 0

    def start(self, total):
        """Nothing."""

    def step(self, description, amount=1):
        """Count it."""
        self.steps += amount

    def note(self, message):
        """Nothing."""


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def dense(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def damaged(tiny):
    """The tiny model with so much noise on its weights that it answers some questions otherwise."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data += 0.7 * weight.std() * torch.randn_like(weight)
    return model


@pytest.fixture
def compare(tiny):
    """A comparison with the tiny model."""

    def make(candidate, *names, limit=None, **options):
        tokens = Tokens(np.zeros((1, 8), np.int64), "none")
        return Comparison(
            candidate=Checkpoint.open(candidate),
            baseline=Checkpoint.open(tiny),
            tokens=tokens,
            tasks=names,
            limit=limit,
            **options,
        )

    return make


@pytest.fixture
def in_data(monkeypatch):
    """Task files name their data relative to the working directory, as lm-eval has it."""
    monkeypatch.chdir(DATA)


# the same, by hand


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, answer: str) -> float:
    """Of the tokens that follow the context's; without a context, of all that follow the first token there is."""
    if context:
        ids, known = tokenizer.encode(context + answer), len(tokenizer.encode(context))
    else:
        ids, known = [tokenizer.bos_token_id, *tokenizer.encode(answer)], 1
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(known, len(ids)))


def answered(model, tokenizer, documents) -> dict[str, list[bool]]:
    """Whether each document's right answer is the most likely one."""
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_mutual_info": []}
    for document in documents:
        endings = document["endings"]
        given = np.array([log_likelihood(model, tokenizer, document["passage"], f" {e}") for e in endings])
        alone = np.array([log_likelihood(model, tokenizer, "", f" {e}") for e in endings])
        scores = {"acc": given, "acc_norm": given / [len(e) for e in endings], "acc_mutual_info": given - alone}
        for metric, score in scores.items():
            right[metric].append(int(score.argmax()) == document["answer"])
    return right


def values(score: dict, model: str) -> dict[str, float]:
    """Every metric's value."""
    return {score["metric"]: score[model], **{name: both[model] for name, both in score["metrics"].items()}}


# the bundled task


def test_continuation_is_held_out_and_well_formed():
    documents = continuation.documents("evaluation")
    held_out = " ".join(" ".join(reference_text("evaluation")).split())
    assert 150 <= len(documents) <= 300
    for document in documents:
        endings, answer = document["endings"], document["endings"][document["answer"]]
        assert len(set(endings)) == 4
        assert f"{document['passage']} {answer}" in held_out
        assert not any(f"{document['passage']} {e}" in held_out for e in endings if e != answer)
    seen = {d["passage"] for d in continuation.documents("calibration")}
    assert not seen & {d["passage"] for d in documents}
    assert np.bincount([d["answer"] for d in documents], minlength=4).min() > len(documents) / 8
    assert documents == continuation.documents("evaluation")


def test_continuation_scores_what_transformers_scores(compare, tiny_w4, dense, tokenizer):
    found = tasks.measure(compare(tiny_w4.output_dir, "continuation", limit=SCORED))
    score = found["scores"]["continuation"]
    documents = continuation.documents("evaluation")[:SCORED]
    compressed = AutoModelForCausalLM.from_pretrained(tiny_w4.output_dir, dtype=torch.float32).eval()
    for label, model in (("baseline", dense), ("compressed", compressed)):
        expected = {name: np.mean(right) for name, right in answered(model, tokenizer, documents).items()}
        assert values(score, label) == pytest.approx(expected, abs=1e-12)
        p = expected["acc_mutual_info"]
        assert score[f"{label}_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (SCORED - 1)))
    assert score["metric"] == "acc_mutual_info"
    assert score["documents"] == found["how"]["limit"] == SCORED
    assert score["recovery"] == score["compressed"] / score["baseline"] == found["recovery"]


def test_the_tiny_model_is_above_chance(compare, tiny):
    score = tasks.measure(compare(tiny, "continuation", limit=120))["scores"]["continuation"]
    assert score["baseline"] > 0.25 + 3 * score["baseline_stderr"]
    # the same model twice
    assert score["recovery"] == 1
    assert score["flips"] == 0


def test_flips_of_a_damaged_model_in_memory(compare, damaged, dense, tokenizer):
    candidate = Checkpoint.open(damaged, tokenizer=tokenizer)
    comparison = compare(candidate, "continuation", limit=SCORED, progress=Counted())
    score = tasks.measure(comparison)["scores"]["continuation"]
    documents = continuation.documents("evaluation")[:SCORED]
    before, after = (answered(m, tokenizer, documents)["acc_mutual_info"] for m in (dense, damaged))
    assert score["flips"] == np.mean(np.array(before) != np.array(after)) > 0
    assert comparison.progress.steps == tasks.units(comparison) > 0
    assert tokenizer.pad_token is None  # the caller's tokenizer is as it was


# the bundled task in which the model writes


def test_what_is_written_on_is_held_out():
    asked = continuation.config("continuation_generated")["custom_dataset"]()["test"]
    assert len(asked) == continuation.GENERATED_DOCUMENTS
    held_out = " ".join(" ".join(reference_text("evaluation")).split())
    passages = {d["passage"]: d["endings"][d["answer"]] for d in continuation.documents("evaluation")}
    for document in asked:
        assert len(document["following"].split()) == 10
        assert f"{document['passage']} {document['following']}" in held_out
        assert document["following"].startswith(passages[document["passage"]])


def test_the_right_words_are_an_exact_match():
    """Of the words that are asked for, whatever their case and punctuation."""
    from hfcompress.evaluation import task_library

    name = "continuation_generated"
    task = task_library.load([name], 0)[name]["tasks"][name]
    document = task.test_docs()[0]
    (answer,) = continuation._first_words([f"\n {document['following'].upper()}!  and so on"], [])
    found = task.process_results(document, [answer])
    assert (found["exact_match"], found["token_f1"], found["rougeL"]) == (1, 1, 1)
    almost = task.process_results(document, [f"not {answer}"])
    assert almost["exact_match"] == 0 < almost["token_f1"] < 1


def test_generated_continuations_are_scored_as_the_libraries_score(compare, damaged, dense, tokenizer):
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    candidate = Checkpoint.open(damaged, tokenizer=tokenizer)
    comparison = compare(candidate, "continuation_generated", limit=SCORED, progress=Counted())
    score = tasks.measure(comparison)["scores"]["continuation_generated"]
    asked = continuation.config("continuation_generated")["custom_dataset"]()["test"].to_list()[:SCORED]
    right = [document["following"] for document in asked]

    def written(model):
        for document in asked:
            ids = tokenizer(document["passage"], return_tensors="pt").input_ids
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
            yield " ".join(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split()[:10])

    def bare(text):
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    def f1(expected, given):
        rest, given = bare(expected), bare(given)
        whole = len(rest) + len(given)
        return 2 * sum(1 for word in given if word in rest and not rest.remove(word)) / whole

    scorer = RougeScorer(["rougeL"])
    answers = {"baseline": list(written(dense)), "compressed": list(written(damaged))}
    for label, given in answers.items():
        shared = np.array([f1(*pair) for pair in zip(right, given, strict=True)])
        found = values(score, label)
        assert found["token_f1"] == pytest.approx(shared.mean())
        assert score[f"{label}_stderr"] == pytest.approx(shared.std(ddof=1) / math.sqrt(SCORED))
        rouge = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(right, given, strict=True)]
        assert found["rougeL"] == pytest.approx(np.mean(rouge))
        assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(given, [right]).score)
        assert min(found["token_f1"], found["rougeL"], found["bleu"]) > 0
        assert found["exact_match"] == 0
    assert score["metric"] == "token_f1"
    assert score["recovery"] == score["compressed"] / score["baseline"]
    assert score["flips"] == np.mean([b != a for b, a in zip(*answers.values(), strict=True)]) > 0
    assert comparison.progress.steps == tasks.units(comparison)


# task files


def test_a_group_of_local_tasks(compare, damaged, tokenizer, in_data):
    candidate = Checkpoint.open(damaged, tokenizer=tokenizer)
    whole = tasks.measure(compare(candidate, "both.yaml"))
    parts = tasks.measure(compare(candidate, "choice.yaml", "choice_plain.yaml"))["scores"]
    assert list(whole["scores"]) == ["local_choices"]
    score = whole["scores"]["local_choices"]
    assert score["documents"] == 24
    expected = np.mean(
        [parts["local_choice"]["metrics"]["acc"]["compressed"], parts["local_choice_plain"]["compressed"]]
    )
    assert score["compressed"] == pytest.approx(expected) != score["baseline"]
    assert parts["local_choice"]["metric"] == "acc_norm"
    assert whole["how"]["num_fewshot"] == {"local_choice": 2, "local_choice_plain": 0}
    assert whole["how"]["versions"] == {"local_choice": 1.0, "local_choice_plain": 1.0, "local_choices": "2.0"}


def test_generation(compare, damaged, dense, tokenizer, in_data):
    candidate = Checkpoint.open(damaged, tokenizer=tokenizer)
    score = tasks.measure(compare(candidate, "answer.yaml"))["scores"]["local_answer"]
    documents = [yaml.safe_load(line) for line in (DATA / "answers.jsonl").read_text().splitlines()]

    def answers(model):
        for document in documents:
            ids = tokenizer(document["question"], return_tensors="pt").input_ids
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            yield tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split("\n\n")[0]

    def f1(expected, given):
        expected, given = expected.lower().split(), given.lower().split()
        rest = list(expected)
        shared = sum(1 for word in given if word in rest and not rest.remove(word))
        return 2 * shared / (len(expected) + len(given))

    before, after = list(answers(dense)), list(answers(damaged))
    for label, given in (("baseline", before), ("compressed", after)):
        expected = np.mean([f1(d["answer"], g) for d, g in zip(documents, given, strict=True)])
        assert values(score, label)["f1"] == pytest.approx(expected)
        assert values(score, label)["exact_match"] == np.mean(
            [d["answer"] == g for d, g in zip(documents, given, strict=True)]
        )
    assert score["flips"] == np.mean([b != a for b, a in zip(before, after, strict=True)]) > 0
    assert score["metric"] == "exact_match"
    assert set(score["metrics"]) == {"f1", "rougeL", "bleu"}
    assert score["metrics"]["bleu"]["baseline_stderr"] > 0  # by the bootstrap


def test_perplexities(compare, damaged, dense, tokenizer, in_data):
    candidate = Checkpoint.open(damaged, tokenizer=tokenizer)
    found = tasks.measure(compare(candidate, "text.yaml", "last_word.yaml"))
    text, word = found["scores"]["local_text"], found["scores"]["local_last_word"]
    texts = [yaml.safe_load(line)["text"] for line in (DATA / "texts.jsonl").read_text().splitlines()]
    lines = [yaml.safe_load(line) for line in (DATA / "last_words.jsonl").read_text().splitlines()]
    for label, model in (("baseline", dense), ("compressed", damaged)):
        total = sum(log_likelihood(model, tokenizer, "", t) for t in texts)
        assert text[label] == pytest.approx(math.exp(-total / sum(len(t.split()) for t in texts)), rel=1e-4)
        last = [log_likelihood(model, tokenizer, line["text"], f" {line['last']}") for line in lines]
        assert word["metrics"]["perplexity"][label] == pytest.approx(math.exp(-np.mean(last)), rel=1e-4)
    assert (text["metric"], text["higher_is_better"], text["recovery"], text["flips"]) == (
        "word_perplexity",
        False,
        None,
        None,
    )
    assert text["baseline_stderr"] is None
    assert word["metric"] == "acc"


# under noise


def test_scores_under_noise(compare, damaged, dense, tokenizer, in_data):
    candidate = Checkpoint.open(damaged, tokenizer=tokenizer)
    comparison = compare(candidate, "continuation", "text.yaml", limit=SCORED)
    noise = {"none": str, "capitals": str.upper}
    found = tasks.scores_under(comparison, noise, shuffled=True)
    clean = tasks.measure(compare(candidate, "continuation", limit=SCORED))["scores"]["continuation"]
    # without the text of which the perplexity is taken, and with no examples to shuffle in either task
    assert set(found) == {"none", "capitals"}
    assert found["none"] == {"continuation": {label: clean[label] for label in ("baseline", "compressed")}}
    loud = [{**d, "passage": d["passage"].upper()} for d in continuation.documents("evaluation")[:SCORED]]
    for label, model in (("baseline", dense), ("compressed", damaged)):
        expected = np.mean(answered(model, tokenizer, loud)["acc_mutual_info"])
        assert found["capitals"]["continuation"][label] == pytest.approx(expected)


def test_steps_under_noise(compare, tiny, monkeypatch):
    """As many for each condition as the tasks have, also where a condition has no task, and while a task is run."""
    from hfcompress.evaluation import harness

    said, run = [], harness.run

    def marked(*arguments, **options):
        said.append("begun")
        results = run(*arguments, **options)
        said.append("done")
        return results

    monkeypatch.setattr(harness, "run", marked)
    comparison = compare(tiny, "continuation", limit=SCORED)
    tasks.scores_under(comparison, {"none": str}, shuffled=True, step=said.append)
    clean, shuffled = ("tasks: continuation, none, {}", "tasks: continuation, shuffled_few_shot, {}")
    assert [said.count(text.format(label)) for text in (clean, shuffled) for label in ("baseline", "compressed")] == [
        comparison.blocks
    ] * 4
    assert len(said) - said.count("begun") - said.count("done") == 2 * tasks.units(comparison)
    assert said.index("done") - said.index("begun") > 1


def test_a_context_that_is_destroyed(compare, tiny, dense, tokenizer, in_data):
    noise = {"none": str, "blank": lambda text: " " * len(text), "other": lambda text: "The harbour is a"}
    found = tasks.scores_under(compare(tiny, "choice_plain.yaml"), noise, shuffled=False)
    scores = {condition: score["local_choice_plain"]["baseline"] for condition, score in found.items()}
    documents = [yaml.safe_load(line) for line in (DATA / "choices.jsonl").read_text().splitlines()]
    for condition, context in (("blank", ""), ("other", "The harbour is a")):
        likely = [
            int(np.argmax([log_likelihood(dense, tokenizer, context, f" {choice}") for choice in d["choices"]]))
            for d in documents
        ]
        assert scores[condition] == np.mean([i == d["answer"] for i, d in zip(likely, documents, strict=True)])
        assert scores[condition] < scores["none"]


def test_shuffled_examples_are_the_same_in_another_order(compare, tiny, monkeypatch):
    from hfcompress.evaluation import harness

    read = []
    scored = harness.TaskModel.loglikelihood

    def remembered(self, requests, disable_tqdm=False):
        read.append([request.args[0].split("\n\n") for request in requests if request.args[0]])
        return scored(self, requests, disable_tqdm)

    monkeypatch.setattr(harness.TaskModel, "loglikelihood", remembered)
    comparison = compare(tiny, "continuation_2shot", limit=6)
    found = tasks.scores_under(comparison, {"as it is": lambda text: text}, shuffled=True)
    assert list(found) == ["as it is", "shuffled_few_shot"]
    plain, shuffled = read[:2]
    assert len(plain) == len(shuffled) == 6 * 4
    for before, after in zip(plain, shuffled, strict=True):
        assert after == [before[1], before[0], before[2]]
    same = found["shuffled_few_shot"]["continuation_2shot"]
    assert same["baseline"] == same["compressed"]


def test_what_a_run_leaves_behind(compare, tiny, in_data, capfd):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).rand(), torch.rand(1, generator=_generator(5))
    level, environment = logging.getLogger("lm_eval").level, dict(os.environ)
    tasks.measure(compare(tiny, "last_word.yaml"))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert (logging.getLogger("lm_eval").level, dict(os.environ)) == (level, environment)
    assert capfd.readouterr() == ("", "")


def _generator(seed):
    return torch.Generator().manual_seed(seed)


# which metric stands for a task


@pytest.mark.parametrize(
    ("metrics", "main"),
    [
        ({"acc,none": True, "acc_norm,none": True}, ("acc_norm", "none")),
        ({"perplexity,none": False, "acc,none": True}, ("acc", "none")),
        ({"bleu,none": True, "exact_match,strict": True, "exact_match,loose": True}, ("exact_match", "strict")),
        ({"exact_match,none": True, "token_f1,none": True}, ("token_f1", "none")),
        ({"loss,none": False, "score,none": True}, ("score", "none")),
        ({"word_perplexity,none": False, "bits_per_byte,none": False}, ("word_perplexity", "none")),
    ],
)
def test_main_metric(metrics, main):
    results = {
        "results": {"t": {"alias": "t", **dict.fromkeys(metrics, 0.5), "acc_norm_stderr,none": 0.1}},
        "higher_is_better": {"t": {name.partition(",")[0]: better for name, better in metrics.items()}},
    }
    assert task_scores.main_metric(results, "t") == main


# what cannot be done


def refused(comparison, error=InvalidValueError) -> str:
    with pytest.raises(error) as caught:
        tasks.measure(comparison)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_task_and_no_documents(compare, tiny):
    assert "No task is named; give tasks, such as 'continuation'" in refused(compare(tiny))
    assert "limit is 0; give the documents per task" in refused(compare(tiny, "continuation", limit=0))
    assert tasks.units(compare(tiny)) == 0


@pytest.fixture
def small_library(monkeypatch):
    """lm-eval's own tasks, but for all except one folder: there are thousands of files."""
    import lm_eval.tasks

    from hfcompress.evaluation import task_library

    folder = Path(lm_eval.tasks.__file__).parent / "hellaswag"

    def library(include_defaults=True, include_path=None):
        return lm_eval.tasks.TaskManager(include_path=include_path or folder, include_defaults=False)

    monkeypatch.setattr(task_library, "TaskManager", library)


def test_unknown_name(compare, tiny, small_library):
    said = refused(compare(tiny, "helaswag"))
    assert "There is no task 'helaswag'" in said
    assert said.endswith("Did you mean 'hellaswag'?")
    assert refused(compare(tiny, "continuatoin")).endswith("Did you mean 'continuation'?")


def test_data_set_out_of_reach(compare, tiny, small_library):
    said = refused(compare(tiny, "hellaswag"), CalibrationError)
    assert "The data of the task 'hellaswag' cannot be had (Couldn't reach" in said
    assert said.endswith("connect to the Hub once, or give a task file whose data is local.")


def test_task_files_that_are_missing_or_broken(compare, tiny, tmp_path, in_data):
    missing, broken = tmp_path / "missing.yaml", tmp_path / "broken.yaml"
    assert refused(compare(tiny, str(missing))) == (
        f"There is no task file {missing}; give the path of a task's .yaml file."
    )
    good = {**yaml.safe_load((DATA / "text.yaml").read_text()), "task": "local_broken"}
    for content, reason in (
        ("task: [", "while parsing a flow"),
        ("just words", "Expected YAML dict"),
        (yaml.safe_dump({**good, "output_type": "loud"}), "Got invalid output_type 'loud'"),
        (yaml.safe_dump({**good, "doc_to_target": "{{nothing}}"}), "'nothing' is undefined"),
        ("task: t\nprocess_docs: !function nowhere.f", "annot import module 'nowhere'"),
    ):
        broken.write_text(content)
        said = refused(compare(tiny, str(broken)), HfcompressError)
        assert said.startswith(f"The task '{broken}'"), said
        assert reason in said
    broken.write_text(yaml.safe_dump({**good, "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}))
    assert "The data of the task" in refused(compare(tiny, str(broken)), CalibrationError)


def test_the_same_task_twice(compare, tiny, in_data):
    said = refused(compare(tiny, "choice.yaml", "both.yaml"))
    assert said == "Both 'choice.yaml' and 'both.yaml' hold the task 'local_choice'; ask for one of them."


def test_a_metric_that_is_on_the_hub(compare, tiny, tmp_path, in_data):
    metric = {"metric": "rouge", "aggregation": "mean", "higher_is_better": True}
    answer = (DATA / "answer.yaml").read_text().partition("metric_list:")[0]
    path = tmp_path / "answer.yaml"
    path.write_text(answer + yaml.safe_dump({"metric_list": [metric]}))
    said = refused(compare(tiny, str(path)), CalibrationError)
    assert "The metric 'rouge' of the task 'local_answer' is not lm-eval's own" in said
    assert "metric: !function" in said


def test_tasks_that_fail_while_they_run(compare, tiny, tmp_path, in_data):
    answer = yaml.safe_load((DATA / "answer.yaml").read_text().partition("metric_list:")[0])
    path = tmp_path / "answer.yaml"
    path.write_text(yaml.safe_dump({**answer, "generation_kwargs": {"until": ["."], "max_gen_toks": 256}}))
    assert refused(compare(tiny, str(path))) == (
        "The task 'local_answer' generates up to 256 tokens and the model's context has 256; choose another task, or "
        "lower its max_gen_toks."
    )
    path.write_text(yaml.safe_dump({**answer, "unsafe_code": True}))
    said = refused(compare(tiny, str(path)))
    assert said.startswith("The task 'local_answer' cannot be run: ")
    assert "unsafe" in said


def test_model_without_a_tokenizer(compare, dense, tokenizer):
    said = refused(compare(Checkpoint.open(dense), "continuation", limit=2), CheckpointError)
    assert "has no tokenizer, and tasks are made of text" in said
    endless = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token=None)
    said = refused(compare(Checkpoint.open(dense, tokenizer=endless), "continuation", limit=2), CheckpointError)
    assert "has no end-of-text token" in said


def test_without_lm_eval(compare, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what an import finds that finds nothing
    monkeypatch.delitem(sys.modules, "hfcompress.evaluation.harness", raising=False)
    monkeypatch.delattr(hfcompress.evaluation, "harness", raising=False)
    said = refused(compare(tiny, "continuation"), MissingExtraError)
    assert said == "The measurement 'tasks' needs lm-eval: pip install 'hfcompress[tasks]'."
