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

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


def benchmark(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two would wait for each other beside other tests
    return subprocess.run(command, env=one_thread, capture_output=True, check=False, text=True)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_quality(tmp_path):
    output = tmp_path / "results" / "quality.json"
    done = benchmark("quality", "--settings", "w4g128", "--rows", 8, "--output", output)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 2  # a line for each run
    found = json.loads(output.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"hfcompress GPTQ", "hfcompress RTN"}
    for row in rows.values():
        assert row["setting"] == "w4g128"
        assert row["error"] is None
        assert all(row[key] is not None for key in row if key != "error")
        assert row["method"] in done.stdout
    gptq, rtn = rows["hfcompress GPTQ"], rows["hfcompress RTN"]
    assert 0 < gptq["kl"] < rtn["kl"]
    assert gptq["ratio"] == 1
    assert rtn["ratio"] == pytest.approx(rtn["kl"] / gptq["kl"])
    assert set(found["machine"]) == {"cpu", "cores", "torch_threads", "fp32_gemm_gflops", "system"}
    assert all(found["machine"].values())
    assert set(found["versions"]) == {"python", "hfcompress", "torch", "transformers"}
    assert all(found["versions"].values())
    assert found["date"]
    assert found["peers"] == {}
    assert found["options"]["settings"] == "w4g128"
    assert found["data"]["evaluation"] == {"name": "evaluation.npy", "rows": 8, "seq_len": 256}
    assert str(tmp_path) not in output.read_text()


@pytest.fixture
def bench(script, tmp_path):
    """Two peers, of which one fails; our own runs are left to the test."""
    (tmp_path / "llmcompressor_run.py").write_text("raise ValueError('no kernel in /some/where/kernel.so')")
    (tmp_path / "gptqmodel_run.py").write_text('print("log")\nprint(\'{"seconds": 2.5, "peak_mib": 100}\')')
    (tmp_path / "work").mkdir()
    python = Path(sys.executable)
    return script.Bench(
        model=tmp_path,
        calibration=tmp_path / "calibration.npy",
        evaluation=tmp_path / "evaluation.npy",
        settings=(script.Setting.parse("w4g128"), script.Setting.parse("w4channel")),
        interpreters={"llmcompressor": python, "gptqmodel": python},
        scripts=tmp_path,
        work=tmp_path / "work",
    )


def test_speed_takes_turns_and_outlives_a_failing_peer(script, bench, monkeypatch, capsys):
    times = iter([3.0, 6.0, 1.0, 7.0, 2.0, 8.0] * 2)
    of_peers = script.Bench.compress

    def compress(self, method, setting, output):
        return of_peers(self, method, setting, output) if method.peer else (next(times), 50)

    monkeypatch.setattr(script.Bench, "compress", compress)
    rows = {(row.setting, row.method): row for row in script.run_speed(bench, repeats=3)}
    ours, recomputed = rows["w4g128", "hfcompress GPTQ"], rows["w4g128", "hfcompress GPTQ, recomputed"]
    assert (ours.runs, ours.seconds, ours.fastest, ours.slowest) == ([3, 1, 2], 2, 1, 3)
    assert (recomputed.runs, recomputed.seconds, recomputed.ratio) == ([6, 7, 8], 7, 2 / 7)
    peer = rows["w4g128", "GPTQModel GPTQ"]
    assert (peer.runs, peer.peak_rss_mib, peer.ratio, peer.ratio_recomputed) == ([2.5] * 3, 100, 2 / 2.5, 7 / 2.5)
    failed = rows["w4g128", "llm-compressor GPTQ"]
    assert (failed.error, failed.seconds, failed.ratio) == ("ValueError: no kernel in kernel.so", None, None)
    assert rows["w4channel", "GPTQModel GPTQ"].error.startswith("n/a")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 3 * 4
    assert lines[0] == "[1/24] w4g128 hfcompress GPTQ: 3.0 s"
    script.show(script.SPEED_COLUMNS, list(rows.values()), "speed")
    assert "no kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--gptqmodel", sys.executable), "--peer-scripts"),
        (("--gptqmodel", sys.executable, "--peer-scripts", Path(__file__).parent), "gptqmodel_run.py"),
        (("--autoround", "/no/such/python", "--peer-scripts", "."), "/no/such/python"),
        (("--settings", "w4x"), "w4x"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--calibration", "/no/such.npy"), "/no/such.npy"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, told):
    done = benchmark("quality", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert told in done.stderr
