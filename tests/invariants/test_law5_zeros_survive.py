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

import numpy as np
import pytest
import torch
from conftest import token_ids
from safetensors.torch import load_file, save_file

import hfcompress as hfc
from hfcompress.errors import OutputError
from hfcompress.formats.reading import decoded
from hfcompress.formats.zeros import check_zeros
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.recipes.sparsify import Sparsify
from hfcompress.solvers.pattern import Pattern


SPARSE = hfc.Sparsify("2:4")
STEPS = {
    "rtn": SPARSE >> hfc.RTN(group_size=32),
    "rtn with zero points": SPARSE >> hfc.RTN(group_size=32, symmetric=False),
    "fp8": SPARSE >> hfc.RTN(bits=8, group_size=-1, type="float"),
    "gptq": SPARSE >> hfc.GPTQ(group_size=32),
    "gptq with zero points": SPARSE >> hfc.GPTQ(group_size=32, bits=3, symmetric=False),
    "gptq refined": SPARSE >> hfc.GPTQ(group_size=32, bits=2, curvature=True, refine=3),
    "awq": hfc.AWQ() >> SPARSE >> hfc.GPTQ(group_size=32),
    "rotate": hfc.Rotate(when="always") >> SPARSE >> hfc.GPTQ(group_size=32),
    "tune": SPARSE >> hfc.GPTQ(group_size=32, bits=3) >> hfc.Tune(iterations=8),
    "tune alone": SPARSE >> hfc.Tune(iterations=8, batch_tokens=512),
    "qat": SPARSE >> hfc.GPTQ(group_size=32, bits=3) >> hfc.QAT(steps=4, batch_size=2, held_out=2, train="weights"),
    "4:8": hfc.Sparsify("4:8") >> hfc.GPTQ(group_size=32, symmetric=False),
    "unstructured": hfc.Sparsify("unstructured", sparsity=0.6) >> hfc.GPTQ(group_size=32),
    "blocks": hfc.Sparsify("4x1") >> hfc.GPTQ(group_size=32),
}


@pytest.mark.parametrize("name", STEPS)
def test_no_later_step_undoes_a_zero(name, tmp_path):
    recipe = STEPS[name]
    ids = np.load(hfc.models.tiny.tiny_folder() / "calibration.npy")[:12]
    result = hfc.compress(None, recipe, tmp_path / "out", calibration=torch.as_tensor(ids).long(), evaluate=False)
    [step] = [step for step in recipe.steps if isinstance(step, Sparsify)]
    made = Checkpoint.open(result.output_dir)
    weights = decoded(made.tensors, made.quantization_config)
    excess = [step.structure.excess(weights[f"{row['name']}.weight"].read()) for row in result.manifest["linears"]]
    assert len(excess) == 28
    assert not any(excess) if step.structure.is_grouped else sum(excess) < len(excess)
    assert all(row["pattern"] == step.pattern for row in result.manifest["linears"])


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq", "int-quantized", "dense"])
def test_in_every_format_the_zeros_are_zeros(layout, tmp_path):
    """The check reads the finished folder, and would refuse it."""
    ids = np.load(hfc.models.tiny.tiny_folder() / "calibration.npy")[:8]
    job = hfc.Job(steps=(SPARSE, hfc.RTN(group_size=32, symmetric=layout != "awq")), format=layout)
    result = hfc.compress(None, job, tmp_path / "out", calibration=torch.as_tensor(ids).long(), evaluate=False)
    assert all(row["sparsity"] >= 0.5 for row in result.manifest["linears"])


def test_what_was_undone_is_told(saved_llama, tmp_path):
    hfc.compress(str(saved_llama), SPARSE, tmp_path / "out", calibration=token_ids(4, 32), evaluate=False)
    name = "model.layers.1.mlp.up_proj"
    patterns = [(name, Pattern.parse("2:4"), False)]
    assert check_zeros(Checkpoint.open(tmp_path / "out"), patterns)[name] >= 0.5
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stored[f"{name}.weight"][0, 4:7] = 1.0
    save_file(stored, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputError, match=rf"the zeros of {name} do not lie as its pattern asks for"):
        check_zeros(Checkpoint.open(tmp_path / "out"), patterns)
    with pytest.raises(OutputError, match="holds fewer zeros than its pattern asks for"):
        check_zeros(Checkpoint.open(tmp_path / "out"), [(name, Pattern.parse("unstructured", 0.6), False)])
