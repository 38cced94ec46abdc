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
The check before a push: the folder, reloaded in a fresh process, says what the solved model said.

The manifest holds what the solved model made of a few tokens (its witness). The folder is loaded whole by plain
transformers where the dense weights fit in memory, and block by block through the consumer's own decompressor where
they do not, or where transformers would need a package that is not there; `python -m hfcompress.hub.reload FOLDER whole|streamed|read [trusted]` is what the fresh process runs.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError, RefusedError
from hfcompress.models.manifest import is_as_solved


WHOLE, STREAMED, READ = "whole", "streamed", "read"
HOW = {
    WHOLE: "whole, by plain transformers",
    STREAMED: "block by block, through the decompressor that transformers uses",
    READ: "block by block, through hfcompress's own reader of the format",
}
TRUSTED = "trusted"  # an argument: the checkpoint's own modelling code may run
TOLERANCE = 1e-3  # nats; a right folder differs by 1e-6 where both compute in float32
# where the solver computed in fewer bits, transformers unpacks into the model's dtype, or activations are rounded, of
# which one at a tie may fall to the other side
ROUNDED_TOLERANCE = 0.1
BYTES_PER_WEIGHT = 6  # float32, and what is packed beside it


@dataclass(frozen=True)
class Reload:
    """
    Args:
        how (`str`): how the folder was loaded, in words.
        difference (`float`): the largest difference of a log-probability, in nats.
        positions (`int`): at how many positions they were compared.
    """

    how: str
    difference: float
    positions: int


def check_reload(folder: Path, manifest: dict[str, Any], trust_remote_code: bool = False) -> Reload:
    """
    Args:
        folder (`Path`): the compressed checkpoint.
        manifest (`dict`): what its `hfcompress.json` holds.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run modelling code that it carries.

    Raises:
        CheckpointError: the folder cannot be loaded, or carries no witness.
        RefusedError: it says something else than the solved model did.
    """
    witness = manifest.get("witness")
    if not witness:
        raise CheckpointError(
            f"{folder} carries no witness of what was solved; compress it again with `hfcompress run`."
        )
    mode = _mode(folder, trust_remote_code)
    difference = _in_fresh_process(folder, mode, trust_remote_code)
    exact = is_as_solved(manifest) and not manifest.get("kv_cache")
    exact = exact and all(row["symmetric"] and row.get("activations", "none") == "none" for row in manifest["linears"])
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    exact = exact and not config.get("dequantize")
    bound = TOLERANCE if witness["dtype"] == "float32" and exact else ROUNDED_TOLERANCE
    if not difference <= bound:
        raise RefusedError(
            f"{folder} does not say what the solved model said (a log-probability differs by {difference:.3g} "
            f"nats, and {bound:g} is allowed), so it is not pushed; compress it again with `hfcompress run`."
        )
    return Reload(HOW[mode], difference, len(witness["top_ids"]))


def _in_fresh_process(folder: Path, mode: str, trust_remote_code: bool) -> float:
    from hfcompress.evaluation.fresh_process import run_module

    done = run_module("hfcompress.hub.reload", str(folder), mode, *([TRUSTED] if trust_remote_code else []))
    if done.returncode != 0:
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "it was killed")
        raise CheckpointError(f"{folder} does not load in a fresh process, so it is not pushed: {last}")
    return json.loads(done.stdout.splitlines()[-1])["difference"]


def _mode(folder: Path, trust_remote_code: bool) -> str:
    """Whole where transformers can load the format here, and the dense weights fit in half of the free memory."""
    import psutil
    import torch

    from hfcompress.evaluation.logits import open_streamed
    from hfcompress.formats.reading import is_read_by_us, missing_packages
    from hfcompress.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder, trust_remote_code=trust_remote_code)
    config = checkpoint.quantization_config
    skeleton = open_streamed(checkpoint, "cpu", torch.float32).skeleton
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    if not missing_packages(config) and weights * BYTES_PER_WEIGHT < psutil.virtual_memory().available // 2:
        return WHOLE
    return READ if is_read_by_us(config) else STREAMED


def _whole_logits(folder: Path, input_ids, trust_remote_code: bool):
    import torch
    from transformers import AutoConfig

    from hfcompress.formats.reading import teach_transformers
    from hfcompress.models.architecture import answers, auto_class
    from hfcompress.models.batch import made_up

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    teach_transformers(json.loads((folder / "config.json").read_text()).get("quantization_config"))
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    with torch.no_grad():
        return answers(model.eval()(**made_up(config, input_ids).inputs(config)))


def _streamed_logits(folder: Path, input_ids, trust_remote_code: bool):
    import torch

    from hfcompress.evaluation.logits import open_streamed
    from hfcompress.models.batch import made_up
    from hfcompress.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder, trust_remote_code=trust_remote_code)
    model = open_streamed(checkpoint, "cpu", torch.float32)
    [stream] = model.forward_blocks(model.embed([made_up(checkpoint.config, input_ids)]))
    with model.outside(head=True) as outside:
        return model.logits(outside, stream)


def _difference(folder: Path, mode: str, trust_remote_code: bool = False) -> float:
    """The largest difference of a log-probability to the manifest's witness."""
    import torch

    witness = json.loads((folder / "hfcompress.json").read_text())["witness"]
    logits_of = {WHOLE: _whole_logits, STREAMED: _streamed_logits, READ: _streamed_logits}[mode]
    logits = logits_of(folder, torch.tensor([witness["input_ids"]]), trust_remote_code)
    ours = torch.log_softmax(logits[0].double(), -1).gather(-1, torch.tensor(witness["top_ids"]))
    return (ours - torch.tensor(witness["top_log_probs"], dtype=torch.float64)).abs().max().item()


if __name__ == "__main__":
    print(json.dumps({"difference": _difference(Path(sys.argv[1]), sys.argv[2], TRUSTED in sys.argv[3:])}))
