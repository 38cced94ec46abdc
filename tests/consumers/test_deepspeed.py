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
"""
The public trainer's loss on a student that DeepSpeed has divided, in an environment of its own: `make test-consumers`.

accelerate takes DeepSpeed (and FSDP) only where there is an accelerator: on a CPU its state knows DDP alone. So DeepSpeed's
own engine is put around the student here, as accelerate would do.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest


pytestmark = pytest.mark.consumers

ROOT = Path(__file__).parents[2]
BIN = Path(os.environ.get("HFCOMPRESS_CONSUMERS", ".consumers")).absolute() / "deepspeed/bin"
CODE = """
import json, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/distillation"]
import deepspeed, torch
from deepspeed.utils import safe_get_full_grad
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
import hfcompress as hfc
from hfcompress.distillation.trainer import DistillationCollator
from test_trainer import config, defined, pair, rows
rank = torch.distributed.get_rank()
student, teacher = pair()
trainer = hfc.DistillationTrainer(student, teacher, args=config({folder!r}), train_dataset=rows())
zero = {{"stage": {stage}, "stage3_param_persistence_threshold": 0}}
settings = {{"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}}
settings["zero_force_ds_cpu_optimizer"] = False
optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
engine, *_ = deepspeed.initialize(model=student, config=settings, optimizer=optimizer)
count = sum(len(row["input_ids"]) - 1 for row in rows())
engine.backward(trainer.compute_loss(engine, DistillationCollator()(rows()[rank::2]), num_items_in_batch=count))
wanted, _ = defined("llama", rows())
off = {{}}
for name, parameter in student.named_parameters():
    found = safe_get_full_grad(parameter)
    off[name] = ((found - wanted[name]).norm() / wanted[name].norm()).item()
if rank == 0:
    with open({folder!r} + "/off.json", "w") as file:
        json.dump(off, file)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_are_those_of_the_definition(stage, tmp_path):
    """Two gloo processes; in stage 3 every parameter is in two parts, the output head's too."""
    script = tmp_path / "two.py"
    script.write_text(CODE.format(tests=str(ROOT / "tests"), folder=str(tmp_path), stage=stage))
    done = subprocess.run(
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    off = json.loads((tmp_path / "off.json").read_text())
    assert len(off) > 20
    assert max(off.values()) < 1e-5
