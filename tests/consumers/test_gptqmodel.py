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
"""GPTQ and AWQ folders, loaded by transformers and by GPTQModel in an environment of their own: `make test-consumers`."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.evaluation.logits import open_streamed
from hfcompress.formats.reading import decoded
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.tiny import tiny_folder
from hfcompress.recipes import Job


pytestmark = pytest.mark.consumers

PYTHON = Path(os.environ.get("HFCOMPRESS_CONSUMERS", ".consumers")) / "gptqmodel/bin/python"
SCRIPT = Path(__file__).with_name("load_with_gptqmodel.py")
KL = 1e-4  # nats: their kernels compute in float16, we in float32
IDS = np.random.default_rng(0).integers(0, 1024, (2, 48)).tolist()
# name -> format, bits, group size, symmetric
CASES = {
    "gptq-4": ("gptq", 4, 128, True),
    "gptq-2": ("gptq", 2, 32, True),
    "gptq-3": ("gptq", 3, -1, True),
    "gptq-8": ("gptq", 8, 64, True),
    "gptq-4-zeros": ("gptq", 4, 32, False),
    "gptq-3-zeros": ("gptq", 3, 32, False),
    "gptq_v2-4": ("gptq_v2", 4, 128, True),
    "gptq_v2-2-zeros": ("gptq_v2", 2, 64, False),
    "gptq_v2-3-zeros": ("gptq_v2", 3, 32, False),
    "gptq_v2-8-zeros": ("gptq_v2", 8, -1, False),
    "awq": ("awq", 4, 128, True),
    "awq-zeros": ("awq", 4, 32, False),
    "awq-row": ("awq", 4, -1, True),
    "exported-gptq": ("compressed-tensors", 4, 128, True),
    "exported-awq": ("int-quantized", 4, 32, False),
}
EXPORTS = {"exported-gptq": "gptq", "exported-awq": "awq"}
# GPTQModel's loader takes version 1 with zero points from its own quantizer alone, by what config.json says
ONLY_TRANSFORMERS = ("gptq-4-zeros", "gptq-3-zeros")
ANSWERS = [
    (name, loader)
    for name in CASES
    for loader in ("transformers", "gptqmodel")
    if loader == "transformers" or name not in ONLY_TRANSFORMERS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("consumers")
    lifted = _with_one_sided_groups(root / "lifted")
    made = {}
    for name, (layout, bits, group_size, symmetric) in CASES.items():
        recipe = hfc.RTN(bits=bits, group_size=group_size, symmetric=symmetric)
        made[name] = hfc.compress(
            None if symmetric else lifted, Job(steps=(recipe,), format=layout), root / name, evaluate=False
        ).output_dir
        if name in EXPORTS:
            made[name] = hfc.export(made[name], EXPORTS[name], root / f"{name}-made", evaluate=False).output_dir
    return made


@pytest.fixture(scope="module")
def answers(folders):
    assert PYTHON.is_file(), f"{PYTHON} is missing; `make test-consumers` builds it"
    jobs = [
        {
            "folder": str(folders[name]),
            "loader": loader,
            "output": str(_answer(folders, name, loader)),
            "input_ids": IDS,
        }
        for name, loader in ANSWERS
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(PYTHON), str(SCRIPT)],
        input=json.dumps(jobs),
        text=True,
        capture_output=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.parametrize(("name", "loader"), ANSWERS)
def test_they_compute_with_the_weights_that_were_written_and_say_the_same(answers, name, loader):
    path = _answer(answers, name, loader)
    assert path.read_bytes()[:1] != b"{", path.read_text()
    theirs = load_file(path)
    checkpoint = Checkpoint.open(answers[name])
    ours = decoded(checkpoint.tensors, checkpoint.quantization_config)
    linears = [key for key in theirs if key != "logits"]
    assert len(linears) == 28
    for linear in linears:  # bit for bit what a correctly rounded float16 product gives
        assert torch.equal(theirs[linear], ours[f"{linear}.weight"].read().half()), linear
    if CASES[name][3] or name in ONLY_TRANSFORMERS:  # signed scales, and groups that version 1 turns round
        assert any((checkpoint.tensors[f"{linear}.scales"].read() < 0).any() for linear in linears)
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (_logits(checkpoint), theirs["logits"]))
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < KL


def _with_one_sided_groups(folder: Path) -> Path:
    """The tiny model with a linear of no negative weight: zero points of zero, which version 1 has no place for."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder())
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.abs_()
    model.save_pretrained(folder)
    for path in tiny_folder().glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def _answer(folders, name, loader) -> Path:
    return folders[name].with_name(f"{folders[name].name}.{loader}")


def _logits(checkpoint):
    model = open_streamed(checkpoint, "cpu", torch.float32)
    [stream] = model.forward_blocks(model.embed([Batch(torch.tensor(IDS))]))
    with model.outside(head=True) as outside:
        return model.logits(outside, stream)
