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
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


def benchmark(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, text=True)


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


def test_speed_goes_on_when_a_peer_fails(tmp_path):
    (tmp_path / "llmcompressor_run.py").write_text("raise ValueError('no kernel in /some/where/kernel.so')")
    (tmp_path / "gptqmodel_run.py").write_text('print("log")\nprint(\'{"seconds": 2.5, "peak_mib": 100}\')')
    output = tmp_path / "speed.json"
    peers = ("--peer-scripts", tmp_path, "--llmcompressor", sys.executable, "--gptqmodel", sys.executable)
    done = benchmark("speed", "--settings", "w4g128", "--rows", 4, "--repeats", 1, "--output", output, *peers)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["llm-compressor GPTQ"]["error"] == "ValueError: no kernel in kernel.so"
    assert rows["llm-compressor GPTQ"]["seconds"] is None
    assert rows["GPTQModel GPTQ"]["runs"] == [2.5]
    assert rows["GPTQModel GPTQ"]["ratio"] == pytest.approx(rows["hfcompress GPTQ"]["seconds"] / 2.5)
    recomputed = rows["hfcompress GPTQ, recomputed"]
    assert rows["GPTQModel GPTQ"]["ratio_recomputed"] == pytest.approx(recomputed["seconds"] / 2.5)
    assert found["peers"]["gptqmodel"]["torch"]
    assert str(Path(sys.executable).parent) not in output.read_text()


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
