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
"""Two checkpoints side by side: what every measurement is given."""

import contextlib
import copy
import os
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hfcompress.calibration.tokens import Tokens
from hfcompress.formats.reading import needs_our_reader, require_packages, teach_transformers
from hfcompress.models.architecture import auto_class
from hfcompress.models.batch import made_up
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.encoder_decoder import LEAST_TOKENS, block_count
from hfcompress.models.manifest import read_manifest
from hfcompress.progress import Progress, Silent
from hfcompress.runtime.loading import load_checkpoint


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    Args:
        candidate (`Checkpoint`): the model that is measured.
        baseline (`Checkpoint`): what it was made from.
        tokens (`Tokens`): the evaluation's token ids `(rows, seq_len)`.
        device (`torch.device`, *optional*): where the arithmetic happens.
        dtype (`torch.dtype`, *optional*): what it happens in.
        seed (`int`, *optional*, defaults to 0): of everything that is drawn.
        tasks (`tuple[str, ...]`, *optional*): names of lm-eval tasks, or paths of task YAML files.
        limit (`int`, *optional*): documents per task; all of them if not given.
        teacher_cache (`Path`, *optional*): a folder in which the baseline's log-probabilities are kept for reuse.
        lean (`bool`, *optional*, defaults to `False`): no whole model may be in memory.
        seconds (`float`, *optional*, defaults to 10): the least time over which speed and energy are taken.
        progress (`Progress`, *optional*): is told how far it is.
    """

    candidate: Checkpoint
    baseline: Checkpoint
    tokens: Tokens
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seed: int = 0
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    teacher_cache: Path | None = None
    lean: bool = False
    seconds: float = 10.0
    progress: Progress = field(default_factory=Silent)

    @property
    def blocks(self) -> int:
        """Its blocks: the unit of the progress bar."""
        return block_count(self.baseline.config)

    @property
    def baseline_sha256(self) -> str:
        """The digest of the baseline's weights."""
        return self.baseline.sha256

    @property
    def loaded_dtype(self) -> torch.dtype:
        """What plain `from_pretrained` loads the two models in: what speed, memory and energy are taken in."""
        stored = self.baseline.config.dtype
        return stored if isinstance(stored, torch.dtype) else self.dtype

    @property
    def manifest(self) -> dict[str, Any]:
        """What the candidate's `hfcompress.json` holds; empty where there is none."""
        return read_manifest(self.candidate.folder)

    @property
    def models(self) -> tuple[tuple[str, Checkpoint], tuple[str, Checkpoint]]:
        """The two, with the keys that reports have them under: `baseline` first, then `compressed`."""
        return ("baseline", self.baseline), ("compressed", self.candidate)


@contextlib.contextmanager
def _quiet_loading() -> Generator[None]:
    """Without the bars of transformers and compressed-tensors, which know of no other switch; errors are raised."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def whole_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
    packed: bool = False,
) -> Generator[PreTrainedModel]:
    """
    The whole model in memory: for what cannot be streamed, such as generation. Plain `from_pretrained` loads it, except
    where transformers would need a package that is not there and hfcompress reads the format itself.

    Args:
        checkpoint (`Checkpoint`): the model.
        device (`torch.device`): where.
        dtype (`torch.dtype`): of its dense weights.
        attention (`str`, *optional*): transformers' `attn_implementation`.
        packed (`bool`, *optional*, defaults to `False`): leave compressed weights as they are stored, which takes
            transformers' own loader; it unpacks them on the first forward.

    Raises:
        MissingExtraError: `packed` weights in a format for which transformers needs a package that is not there.
    """
    with _quiet_loading():
        if checkpoint.model is not None:
            model = copy.deepcopy(checkpoint.model).to(dtype=dtype)
            if attention is not None:
                model.set_attn_implementation(attention)
        elif not packed and needs_our_reader(checkpoint.quantization_config):
            model = _read_by_us(checkpoint, device, dtype, attention)
        else:
            require_packages(checkpoint.name, checkpoint.quantization_config)
            teach_transformers(checkpoint.quantization_config)
            assert checkpoint.folder is not None
            options = {} if attention is None else {"attn_implementation": attention}
            model = auto_class(checkpoint.config).from_pretrained(
                checkpoint.folder, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code, **options
            )
            if checkpoint.quantization_config is not None and not packed:
                with torch.no_grad():
                    few = made_up(model.config, torch.zeros(1, LEAST_TOKENS, dtype=torch.long))
                    model.to(device)(**few.inputs(model.config, device, model.dtype))
        model.to(device).eval()
    try:
        yield model
    finally:
        del model  # whoever was given it lets go of it too
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _read_by_us(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: str | None):
    """The dense model that a checkpoint stands for, through our own reader of its format."""
    model = load_checkpoint(checkpoint, device, dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model
