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
"""Memory: models of known size, and the gauges against an array of known size."""

import json
import mmap
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import token_ids
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from hfcompress.calibration.tokens import Tokens
from hfcompress.evaluation import memory
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.fresh_process import Request, run
from hfcompress.models.checkpoint import Checkpoint


MEGABYTE = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc and /proc are Linux's")


@pytest.fixture(scope="module")
def report(tiny, tiny_w4):
    comparison = Comparison(
        candidate=Checkpoint.open(tiny_w4.output_dir),
        baseline=Checkpoint.open(tiny),
        tokens=Tokens(token_ids(4, 64), "random"),
    )
    return memory.measure(comparison)


def stored_bytes(folder: Path) -> int:
    """Of the tensors in the folder's safetensors."""
    total = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as shard:
            for tensor in map(shard.get_tensor, shard.keys()):
                total += tensor.nbytes
    return total


def test_report_is_whole_and_in_order(report, tiny, tiny_w4):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for key, folder in (("baseline", tiny), ("compressed", tiny_w4.output_dir)):
        found = report[key]
        assert found["disk_bytes"] == sum(p.stat().st_size for p in Path(folder).glob("model*.safetensors"))
        assert found["tensor_bytes"] == pytest.approx(stored_bytes(Path(folder)), rel=0.001)  # and rotary buffers
        assert found["peak_bytes"] >= found["after_forward_bytes"] > 0
    assert report["how"]["dtype"] == "bfloat16"  # the checkpoint's own, which plain from_pretrained loads it in


@linux
def test_a_packed_model_is_small_until_its_first_forward(report):
    dense, packed = report["baseline"], report["compressed"]
    assert packed["at_rest_bytes"] < dense["at_rest_bytes"]
    assert packed["tensor_bytes"] < dense["tensor_bytes"] / 2
    assert packed["after_forward_bytes"] >= packed["tensor_bytes_after_forward"] >= dense["tensor_bytes"]
    assert "on its first forward" in report["how"]["note"]


@linux
def test_memory_at_rest_is_that_of_the_weights(tmp_path):
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 200e6
    model.save_pretrained(tmp_path)
    request = Request(
        measurement="memory",
        folder=str(tmp_path),
        trust_remote_code=False,
        device="cpu",
        dtype="float32",
        threads=1,
        prompts=token_ids(1, 32).tolist(),
        new_tokens=4,
    )
    reading = run(request, "big", memory.ALLOCATOR)
    assert reading["tensor_bytes"] == pytest.approx(weights, rel=1e-4)
    assert reading["at_rest_bytes"] == pytest.approx(weights, rel=0.1)
    assert reading["peak_bytes"] >= reading["after_forward_bytes"] >= 0.9 * weights


@pytest.mark.parametrize("process", [Path("/proc/self"), Path("/nowhere")], ids=["kernel", "sampled"])
def test_the_peak_is_what_was_held_in_between(process):
    def work():
        with mmap.mmap(-1, 64 * MEGABYTE) as held:  # from the kernel, not from what the process has freed before
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            time.sleep(0.1)

    gauge = memory.ResidentMemory(process)
    gauge.peak_of(work)  # what comes first does not count
    before = gauge.now()
    assert gauge.peak_of(lambda: None) - before < 32 * MEGABYTE
    assert 60 * MEGABYTE < gauge.peak_of(work) - before < 96 * MEGABYTE
