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
"""scripts/benchmark.py, with few rows and without real peers."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarking import bench as bench_module
from benchmarking import main as main_module
from benchmarking import quality, shapes, speed
from benchmarking import tokens as tokens_module
from benchmarking.bench import Bench, Peer, Setting
from benchmarking.errors import RunError, UsageError
from benchmarking.ladder import ADDED, WHOLE, Rung, by_default, ladder
from benchmarking.main import plain
from benchmarking.processes import answer, answers
from benchmarking.quality import Outcome, Row, run_quality, summarize
from benchmarking.table import show
from benchmarking.tokens import draw, tokenize
from benchmarking.workers import WORKERS, missing
from hfcompress.models.tiny import tiny_folder
from hfcompress.recipes import job_from_dict
from hfcompress.recipes.job import load_job


SCRIPTS = Path(__file__).parents[2] / "scripts"
PYTHON = Path(sys.executable)
W4, W4_CHANNEL = Setting.parse("w4g128"), Setting.parse("w4channel")


def benchmark(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / "benchmark.py", *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two would wait for each other beside other tests
    return subprocess.run(command, env=one_thread, capture_output=True, check=False, text=True)


@pytest.fixture
def bench(tmp_path):
    """Two peers, of which one fails; token files that are not there."""
    (tmp_path / "llmcompressor_run.py").write_text("raise ValueError('no kernel in /some/where/kernel.so')")
    (tmp_path / "gptqmodel_run.py").write_text('print("log")\nprint(\'{"seconds": 2.5, "peak_mib": 100}\')')
    (tmp_path / "work").mkdir()
    return Bench(
        model=tmp_path,
        calibration=(tmp_path / "seed-0.npy", tmp_path / "seed-1.npy"),
        evaluation=tmp_path / "evaluation.npy",
        settings=(W4, W4_CHANNEL),
        interpreters={"llmcompressor": PYTHON, "gptqmodel": PYTHON},
        scripts=tmp_path,
        work=tmp_path / "work",
    )


# the ladder


@pytest.mark.parametrize("recipe", ["w4a16", "w3a16", "w2a16"])
def test_the_steps_that_are_on_by_default_are_those_of_the_recipe(recipe):
    [shipped] = load_job(recipe).steps
    setting = Setting.parse(f"w{shipped.bits}g{shipped.group_size}")
    rungs = ladder(setting)
    [whole] = [rung for rung in rungs if rung.label == WHOLE]
    assert job_from_dict({"recipe": whole.recipe}).steps == (shipped,)
    assert by_default(rungs) == {
        "RTN",
        "GPTQ",
        "+ act_order",
        "+ scale search",
        "+ shift",
        "+ refine",
        "+ curvature",
        WHOLE,
    }


@pytest.mark.parametrize("setting", ["w4g128", "w4channel", "w3g128", "w2g64", "w2g32"])
def test_a_rung_adds_one_thing_to_its_base(setting):
    rungs = {rung.label: rung for rung in ladder(Setting.parse(setting))}
    for rung in rungs.values():
        if rung.base is None or rung.label == "GPTQ":  # another way to round
            continue
        base = rungs[rung.base]
        ours, theirs = (
            {(n, k, v) for s in r.recipe for n, keys in s.items() for k, v in keys.items()} for r in (rung, base)
        )
        if len(rung.recipe) > len(base.recipe):  # a step of its own
            [step] = [step for step in rung.recipe if step not in base.recipe]
            assert [other for other in rung.recipe if other is not step] == base.recipe
        else:
            assert len(ours ^ theirs) == 1, rung.label
    assert [rung.base for rung in ladder(Setting.parse(setting))[-4:]] == [WHOLE] * 4


def test_the_scale_search_rung_is_gptq_by_default():
    [rung] = [rung for rung in ladder(W4) if rung.label == "+ scale search"]
    assert job_from_dict({"recipe": rung.recipe}).steps == job_from_dict({"recipe": "gptq"}).steps


def test_every_rung_is_a_recipe_or_known_to_be_missing():
    for rung in ladder(Setting.parse("w2g32"), seed=3):
        if missing(rung.recipe) is None:
            job_from_dict({"recipe": rung.recipe})
    drawn = {
        name: keys["seed"] for r in ladder(W4, seed=3) for s in r.recipe for name, keys in s.items() if "seed" in keys
    }
    assert drawn == {"rotate": 3, "tune": 3, "qat": 3}


def test_rungs_are_left_out_by_their_step():
    assert {r.label for r in ladder(W4)} - {r.label for r in ladder(W4, without=("awq", "qat"))} == {
        "AWQ, RTN, scale search",
        "all that, awq first",
        "all that, qat last",
    }
    for step in ADDED:  # what is left still rests on something
        left = ladder(W4, without=(step,))
        assert len(left) < len(ladder(W4))
        assert {rung.base for rung in left} - {None} <= {rung.label for rung in left}


def test_what_this_version_lacks_is_named():
    assert missing([{"gptq": {"bits": 4}}]) is None
    assert missing([{"gptq": {}}, {"levitate": {}}]) == "skipped: this version has no step levitate"
    assert missing([{"gptq": {"bits": 4, "warp": 1}}]) == "skipped: this version has no gptq.warp"


# quality


@pytest.mark.slow
def test_quality(tmp_path):
    output = tmp_path / "results" / "quality.json"
    done = benchmark("quality", "--settings", "w2g64", "--rows", 20, "--output", output)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(ladder(W4))  # a line for each run
    found = json.loads(output.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [rung.label for rung in ladder(W4)]
    for row in rows.values():
        assert row["setting"] == "w2g64"
        assert row["error"] is None
        assert row["method"] in done.stdout
        if row["skipped"] is None:
            assert row["kls"] == [row["kl"]]
            assert row["perplexity"] > row["dense_perplexity"]
            assert row["seconds"] > 0
    assert 0 < rows["+ curvature"]["kl"] < rows["+ refine"]["kl"] < rows["GPTQ"]["kl"] < rows["RTN"]["kl"]
    assert rows["GPTQ"]["change"] == pytest.approx(rows["GPTQ"]["kl"] / rows["RTN"]["kl"] - 1)
    assert set(found["machine"]) == {"cpu", "cores", "torch_threads", "fp32_gemm_gflops", "system"}
    assert all(found["machine"].values())
    assert set(found["versions"]) == {"python", "hfcompress", "torch", "transformers"}
    assert all(found["versions"].values())
    assert found["date"]
    assert found["peers"] == {}
    assert found["options"]["settings"] == "w2g64"
    assert found["data"]["evaluation"] == {"name": "evaluation.npy", "rows": 20, "seq_len": 256, "files": 1}
    assert str(tmp_path) not in output.read_text()


def test_quality_of_a_short_ladder_over_two_seeds(tmp_path, monkeypatch, capsys):
    """The workers do real work, if in this process: two rungs, a step that there is not, and one that fails."""
    monkeypatch.setattr(
        bench_module, "answers", lambda command, work, own, **_: WORKERS[command[2]](*map(str, command[3:]))
    )
    rtn, gptq = {"rtn": {"bits": 2, "group_size": 64}}, {"gptq": {"bits": 2, "group_size": 64}}
    rungs = [
        Rung("RTN", None, [rtn]),
        Rung("GPTQ", "RTN", [gptq]),
        Rung("levitated", "GPTQ", [{"levitate": {}}, gptq]),
        Rung("crooked", "GPTQ", [{"gptq": {"bits": 5}}]),
    ]
    monkeypatch.setattr(quality, "ladder", lambda setting, seed=0, without=(): rungs)
    (tmp_path / "work").mkdir()
    tiny = tiny_folder()
    np.save(tmp_path / "evaluation.npy", np.load(tiny / "evaluation.npy")[:4])
    bench = Bench(
        model=tiny,
        calibration=draw(tiny / "calibration.npy", 8, 2, tmp_path / "draws"),
        evaluation=tmp_path / "evaluation.npy",
        settings=(Setting.parse("w2g64"),),
        interpreters={},
        scripts=None,
        work=tmp_path / "work",
    )
    [found] = run_quality(bench)
    rows = {row.method: row for row in found}
    r, g = rows["RTN"], rows["GPTQ"]
    assert len(g.kls) == 2
    assert g.kls[0] != g.kls[1]  # calibrated on other rows
    assert g.kl == pytest.approx(sum(g.kls) / 2)
    assert g.kl_spread == pytest.approx(abs(g.kls[0] - g.kls[1]) / 2**0.5)
    changes = [a / b - 1 for a, b in zip(g.kls, r.kls, strict=True)]
    assert (g.change, g.change_spread) == (
        pytest.approx(sum(changes) / 2),
        pytest.approx(abs(changes[0] - changes[1]) / 2**0.5),
    )
    assert g.change < -0.2
    assert rows["levitated"].skipped == "skipped: this version has no step levitate"
    assert rows["crooked"].error.startswith("InvalidValueError: gptq.bits is 5")
    assert (rows["levitated"].kl, rows["crooked"].kl) == (None, None)
    told = capsys.readouterr().err  # bars of transformers among it
    assert told.count("/8] w2g64 ") == 8
    assert "[6/8] w2g64 GPTQ, seed 1: " in told
    assert list(bench.work.iterdir()) == []
    show(quality.COLUMNS, list(rows.values()), "quality")
    table = capsys.readouterr().out
    assert f"{g.kl:.5f} ± {g.kl_spread:.5f}" in table
    assert "skipped:" in table


def test_a_row_for_every_recipe(tmp_path, capsys):
    output = tmp_path / "recipes.json"
    names = ["w4a16-fast", "rtn-w8a16", "gguf-q4_0"]
    assert main_module.main(["recipes", "--names", ",".join(names), "--rows", "8", "--output", str(output)]) == 0
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == names
    assert rows["rtn-w8a16"]["kl"] < 1e-3 < rows["gguf-q4_0"]["kl"] < rows["w4a16-fast"]["kl"] < 0.05
    assert rows["gguf-q4_0"]["size_bytes"] < rows["rtn-w8a16"]["size_bytes"]  # of the GGUF file, not of what is beside
    table = capsys.readouterr().out
    for row in rows.values():
        assert 0.2 < row["size_ratio"] < 0.8
        assert row["method"] in table


def test_a_recipe_that_is_not_shipped(capsys):
    assert main_module.main(["recipes", "--names", "w5a17"]) == 2
    assert "no such recipe is shipped; there are " in capsys.readouterr().err


def test_the_measured_kl_is_that_of_the_formula(tmp_path):
    """Against a slow float64 reference; the original against itself is zero."""
    import torch
    from transformers import AutoModelForCausalLM

    tiny = tiny_folder()
    dense = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    ids = np.load(tiny / "evaluation.npy")[:3]
    np.save(tmp_path / "ids.npy", ids)
    same, changed = WORKERS["measure"](str(tiny), str(tmp_path / "ids.npy"), str(tiny), str(tmp_path / "other"))
    with torch.no_grad():
        p, q = (m(torch.from_numpy(ids).long()).logits.double().log_softmax(-1)[:, :-1] for m in (dense, other))
    reference = (p.exp() * (p - q)).sum(-1).mean().item()
    assert same["kl"] == 0
    assert same["top1"] == 1
    assert same["perplexity"] == same["dense_perplexity"] == changed["dense_perplexity"]
    assert reference > 1e-3
    assert changed["kl"] == pytest.approx(reference, rel=1e-4)
    targets = torch.from_numpy(ids[:, 1:, None]).long()
    assert changed["perplexity"] == pytest.approx((-q.gather(-1, targets)).mean().exp().item(), rel=1e-5)


def test_the_best_peer_stands_beside_every_row(bench, monkeypatch):
    """Of two peers one fails, and what is left is the measure; where none is left there is no ratio."""
    monkeypatch.setattr(
        quality, "run_ours", lambda bench, recipes, seed, progress, before: {label: found() for label in recipes}
    )
    monkeypatch.setattr(
        Bench, "measure", lambda self, outputs, python=None: iter([found(0.02).quality for _ in outputs])
    )

    def found(kl=0.01):
        return Outcome(1.0, {"kl": kl, "perplexity": 2.0, "dense_perplexity": 1.9, "top1": 0.9, "tokens": 1})

    rows = {(row.setting, row.method): row for rows in run_quality(bench) for row in rows}
    assert rows["w4g128", "llm-compressor GPTQ"].error == "ValueError: no kernel in kernel.so"
    assert rows["w4g128", "GPTQModel GPTQ"].kls == [0.02, 0.02]
    assert rows["w4g128", "GPTQModel GPTQ"].ratio_to_peer == 1
    assert rows["w4g128", "GPTQ"].ratio_to_peer == 0.5
    assert rows["w4channel", "GPTQModel GPTQ"].error.startswith("n/a")
    assert rows["w4channel", "GPTQ"].ratio_to_peer is None


def test_a_seed_that_failed_leaves_no_mean():
    row = Row("GPTQ", "w4g128")
    summarize(
        row, [Outcome(1.0, {"kl": 0.1, "perplexity": 2.0, "dense_perplexity": 1.9, "top1": 0.9}), Outcome(error="no")]
    )
    assert (row.error, row.kl, row.kls) == ("no", None, [])


def test_what_a_dying_process_had_not_reached_is_an_error(bench, monkeypatch):
    def dying(self, jobs, seed=0, memory_limit=None):
        yield {"seconds": 1.0, "peak_mib": 10}
        raise RunError("killed by signal 9")

    monkeypatch.setattr(Bench, "compress_ours", dying)
    monkeypatch.setattr(Bench, "measure", lambda self, outputs: iter([{"kl": 0.1} for _ in outputs]))
    recipes = {rung.label: rung.recipe for rung in ladder(W4)}
    outcomes = list(quality.run_ours(bench, recipes, 0, quality.Progress(14)).values())
    assert outcomes[0].quality == {"kl": 0.1}
    assert [outcome.error for outcome in outcomes[1:3]] == [
        "killed by signal 9",
        "not reached: the process had failed before",
    ]


def test_an_interrupted_benchmark_keeps_the_settings_that_are_done(tmp_path, monkeypatch):
    def interrupted(bench):
        yield [Row("RTN", "w4g128", kl=0.5)]
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "run_quality", interrupted)
    monkeypatch.setattr(main_module, "described_run", lambda bench, options: {"command": options.command})
    output = tmp_path / "new" / "quality.json"
    with pytest.raises(KeyboardInterrupt):
        main_module.benchmark(main_module.parser().parse_args(["quality", "--rows", "2", "--output", str(output)]))
    found = json.loads(output.read_text())
    assert (found["command"], [(row["method"], row["kl"]) for row in found["rows"]]) == ("quality", [("RTN", 0.5)])


# speed


def test_speed_takes_turns_and_outlives_a_failing_peer(bench, monkeypatch, capsys):
    times = iter([3.0, 6.0, 4.0, 9.0, 1.5, 1.0, 7.0, 4.0, 5.0, 1.5, 2.0, 8.0, 4.0, 7.0, 1.5] * 2)
    asked = []

    def ours(self, jobs, seed=0, memory_limit=None):
        asked.append((jobs[0][0], memory_limit))
        yield {"seconds": next(times), "peak_mib": 50, "imports_mib": 30}

    monkeypatch.setattr(Bench, "compress_ours", ours)
    monkeypatch.setattr(Bench, "imports", lambda self, peer: 40)
    rows = {(row.setting, row.method): row for rows in speed.run_speed(bench, repeats=3) for row in rows}
    gptq, recomputed, full = (rows["w4g128", label] for label in (speed.OURS, speed.RECOMPUTED, speed.FULL))
    assert (gptq.runs, gptq.seconds, gptq.fastest, gptq.slowest) == ([3, 1, 2], 2, 1, 3)
    assert (recomputed.runs, recomputed.seconds, recomputed.ratio) == ([6, 7, 8], 7, 2 / 7)
    assert (full.runs, full.seconds, full.ratio) == ([9, 5, 7], 7, 2 / 7)
    assert (gptq.peak_rss_mib, gptq.imports_mib) == (50, 30)
    assert rows["w4g128", speed.AWQ].ratio == 1
    assert [limit for _, limit in asked[:5]] == [None, "least", None, None, None]
    assert asked[0][0] == asked[1][0] == [{"gptq": {"bits": 4, "group_size": 128}}]
    assert asked[2][0][0]["gptq"]["shift"] > 0
    assert asked[3][0][0]["gptq"]["refine"] > 0
    assert list(asked[4][0][0]) == ["awq"]
    peer = rows["w4g128", "GPTQModel GPTQ"]
    assert (peer.runs, peer.peak_rss_mib, peer.ratio) == ([2.5] * 3, 100, 2 / 2.5)
    assert (peer.ratio_recomputed, peer.ratio_shift, peer.ratio_full) == (7 / 2.5, 4 / 2.5, 7 / 2.5)
    assert peer.imports_mib == 40
    peer = rows["w4g128", "GPTQModel AWQ"]
    assert (peer.ratio, peer.ratio_full) == (1.5 / 2.5, None)
    failed = rows["w4g128", "llm-compressor GPTQ"]
    assert (failed.error, failed.seconds, failed.ratio) == ("ValueError: no kernel in kernel.so", None, None)
    assert rows["w4channel", "GPTQModel GPTQ"].error.startswith("n/a")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 3 * 9
    assert lines[0] == "[1/54] w4g128 hfcompress GPTQ: 3.0 s"
    show(speed.COLUMNS, list(rows.values()), "speed")
    assert "ValueError:" in capsys.readouterr().out


def test_what_importing_a_peer_takes(bench):
    nothing, much = (bench.imports(Peer("", "gptqmodel", imports=code)) for code in ("", "import torch"))
    assert 0 < nothing < much


def test_a_peer_that_tells_no_seconds_failed(bench):
    (bench.scripts / "gptqmodel_run.py").write_text("print('{\"peak_mib\": 100}')")
    with pytest.raises(RunError, match="its JSON line has no 'seconds'"):
        bench.compress(Peer("GPTQModel GPTQ", "gptqmodel"), W4, bench.work / "output")


# processes


def test_answers_come_as_they_are_printed_and_a_failure_after_them(tmp_path):
    program = "print('{\"a\": 1}'); print('{no'); print('{\"a\": 2}', flush=True); raise OSError('gone: /a/b/c')"
    running = answers([PYTHON, "-c", program], tmp_path, own=True)
    assert [next(running), next(running)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(RunError, match=r"^OSError: gone: c$"):
        next(running)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["/no/such/python"], "cannot be started"),
        ([PYTHON, "-c", "print('nothing')"], "no JSON line"),
        ([PYTHON, "-c", "import os; os.abort()"], "killed by signal 6"),
        ([PYTHON, "-c", "raise SystemExit(7)"], "exit code 7"),
    ],
)
def test_a_process_that_fails_says_why(tmp_path, command, told):
    with pytest.raises(RunError, match=told):
        answer(command, tmp_path, own=True)


def test_a_process_whose_caller_stops_listening_is_ended(tmp_path):
    program = "import os, time; print('{\"pid\": %d}' % os.getpid(), flush=True); time.sleep(600)"
    running = answers([PYTHON, "-c", program], tmp_path, own=True)
    pid = next(running)["pid"]
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# tokens


def test_one_seed_takes_the_rows_as_they_are(tmp_path):
    rows = np.arange(40).reshape(10, 4)
    np.save(tmp_path / "rows.npy", rows)
    assert draw(tmp_path / "rows.npy", None, 1, tmp_path / "all") == (tmp_path / "rows.npy",)
    [first] = draw(tmp_path / "rows.npy", 3, 1, tmp_path / "first")
    assert np.array_equal(np.load(first), rows[:3])


def test_no_row_belongs_to_two_seeds(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(40).reshape(10, 4))
    drawn = [np.load(file) for file in draw(tmp_path / "rows.npy", None, 3, tmp_path / "draws")]
    assert [part.shape for part in drawn] == [(3, 4)] * 3
    assert len(np.unique(np.concatenate(drawn))) == 36
    again = draw(tmp_path / "rows.npy", None, 3, tmp_path / "again")
    assert all(np.array_equal(np.load(file), part) for file, part in zip(again, drawn, strict=True))


@pytest.mark.parametrize(("rows", "seeds"), [(None, 11), (4, 3)])
def test_too_few_rows_for_the_seeds(tmp_path, rows, seeds):
    np.save(tmp_path / "rows.npy", np.arange(40).reshape(10, 4))
    with pytest.raises(UsageError, match=r"rows.npy has 10 rows, too few for .* lower --seeds or --rows"):
        draw(tmp_path / "rows.npy", rows, seeds, tmp_path / "draws")


def test_a_text_is_tokenized_by_the_model(tmp_path):
    from transformers import AutoTokenizer

    text = "The list of names is sorted, and the last one is taken: né?\n" * 40
    (tmp_path / "some.txt").write_text(text, encoding="utf-8")
    file = tokenize(tiny_folder(), tmp_path / "some.txt", 3, 64, tmp_path / "folder")
    ids = np.load(file)
    assert file.name == "some.npy"
    assert ids.shape == (3, 64)
    decoded = [AutoTokenizer.from_pretrained(tiny_folder()).decode(row) for row in ids]
    assert all("names is sorted, and the last one" in row for row in decoded)


def test_a_text_too_short_for_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tokens_module, "answer", lambda command, work, own, **_: next(WORKERS[command[2]](*map(str, command[3:])))
    )
    (tmp_path / "some.txt").write_text("Short.")
    with pytest.raises(UsageError, match="not one full row of 64"):
        tokenize(tiny_folder(), tmp_path / "some.txt", 3, 64, tmp_path / "folder")


def test_options_are_told_without_folders():
    options = Namespace(text=[Path("/a/b.txt"), Path("/a/c.txt")], model=Path("/a/m"), rows=3)
    assert {key: plain(value) for key, value in vars(options).items()} == {
        "text": ["b.txt", "c.txt"],
        "model": "m",
        "rows": 3,
    }


def test_methods_are_asked_for_by_name_or_by_a_part_of_it(bench):
    labels = [speed._label(method) for method in speed._asked([*speed.RUNGS], "hfcompress GPTQ,AWQ")]
    assert labels == [speed.OURS, speed.AWQ]
    with pytest.raises(UsageError, match="--methods magic: there is no such method; there are hfcompress GPTQ"):
        speed._asked([*speed.RUNGS], "magic")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--gptqmodel", sys.executable), "--peer-scripts"),
        (("--gptqmodel", sys.executable, "--peer-scripts", Path(__file__).parent), "gptqmodel_run.py"),
        (("--autoround", "/no/such/python", "--peer-scripts", "."), "/no/such/python"),
        (("--settings", "w4x"), "w4x"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--calibration", "/no/such.npy"), "/no/such.npy"),
        (("--text", "/no/such.txt", "/no/other.txt"), "/no/such.txt"),
        (("--text", "a.txt", "b.txt", "--calibration", "a.npy"), "--text takes the place"),
        (("--without", "gptq"), "those of awq, rotate, tune, qat"),
        (("--seeds", "1000"), "too few for 1000 seeds"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, told):
    done = benchmark("quality", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert told in done.stderr


def test_a_shape_is_a_model_that_loads(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(shapes.SHAPES, "wide", {**shapes.SHAPES["wide"], "hidden_size": 64, "intermediate_size": 128})
    folder = shapes.make_shape("wide", tmp_path / "wide", tiny)
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert sum(parameter.nbytes for parameter in model.parameters()) == sum(
        load_file(path)[key].nbytes for path in folder.glob("*.safetensors") for key in load_file(path)
    )
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder) is not None
    assert np.load(folder / "calibration.npy").shape == (32, 512)


def test_a_shape_of_fewer_blocks_and_rows(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "8b", {**shapes.SHAPES["8b"], "hidden_size": 64, "intermediate_size": 128})
    options = main_module.parser().parse_args(["speed", "--shape", "8b", "--blocks", "1", "--rows", "2"])
    bench = main_module.prepare(options, tmp_path)
    assert json.loads((bench.model / "config.json").read_text())["num_hidden_layers"] == 1
    assert np.load(bench.calibration[0]).shape == (2, 2048)


def test_a_shape_takes_the_place_of_a_model(tiny, tmp_path):
    options = main_module.parser().parse_args(["speed", "--shape", "deep", "--model", str(tiny)])
    with pytest.raises(UsageError, match="--shape makes a model; give it or --model"):
        main_module.prepare(options, tmp_path)
