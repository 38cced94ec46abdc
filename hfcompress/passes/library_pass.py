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
A pass that another library makes: transformers quantizes with it while it loads the whole model.

How it works: `from_pretrained` with the library's configuration, `save_pretrained` before any forward (bitsandbytes
changes its 4-bit weights in place on a CPU's first one, and would then save something else), and only then the model is
asked for its witness. What there is to report of each linear is read back from the saved folder.
"""

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Generator
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from hfcompress.errors import InvalidValueError, UnsupportedModelError
from hfcompress.formats.reading import decoded
from hfcompress.formats.writer import CheckpointWriter, disk_errors
from hfcompress.models.architecture import auto_class
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.experts import ExpertLinear
from hfcompress.models.roles import find_linears
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.passes.journal import Journal
from hfcompress.passes.plan import Plan, Step, check_patterns
from hfcompress.passes.processes import Processes
from hfcompress.passes.witness import testimony, witness_batch
from hfcompress.progress import Progress


class Library(Step, Protocol):
    """What the pass asks of the step."""

    def require(self) -> None:
        """Raises an error where the library is not installed."""

    def quantization_config(self, skipped: list[str], dtype: Any) -> Any:
        """What `from_pretrained` takes."""

    def described(self) -> dict[str, Any]:
        """What is the same for every linear."""


class LibraryPass:
    """
    Args:
        model (`StreamedModel`): the dense model.
        step (`Library`): the step.

    Raises:
        MissingExtraError: the library is not installed.
        InvalidValueError: it leaves every linear alone, or a pattern means nothing.
        UnsupportedModelError: the blocks hold linears that the library does not see.
    """

    def __init__(self, model: StreamedModel, step: Library):
        step.require()
        self.model, self.step = model, step
        blocks = [find_linears(model.skeleton.get_submodule(name), name) for name in model.block_names]
        in_blocks = {name: module for block in blocks for name, module in block.items()}
        check_patterns([step], list(in_blocks))
        self.linears = [name for name in in_blocks if step.for_linear(name) is not None]
        if not self.linears:
            raise InvalidValueError(
                "The recipe leaves every linear of this model alone; check its targets and ignore."
            )
        for name in self.linears:
            if not isinstance(in_blocks[name], nn.Linear):
                raise UnsupportedModelError(
                    f"{name} is a {type(in_blocks[name]).__name__}, which {step.name} does not quantize as the plan "
                    "would say; use rtn or gptq with --set format=dense."
                )
            if isinstance(in_blocks[name], ExpertLinear):
                raise UnsupportedModelError(
                    f"{name} is of an expert, which transformers merges with the others while loading and {step.name} then passes "
                    f"over; leave experts alone with --set {step.name}.ignore=[re:.*experts.*], or use rtn or gptq."
                )
        block = step.described()["group_size"]
        uneven = [name for name in self.linears if block > 0 and in_blocks[name].weight.shape[1] % block]
        if uneven and model.device.type == "cpu":  # it is quantized, and fails at the first forward
            raise UnsupportedModelError(
                f"{uneven[0]} is {in_blocks[uneven[0]].weight.shape[1]} wide, and on a CPU {step.name} runs only widths "
                f"that its blocks of {block} divide; leave such linears alone with --set {step.name}.ignore=[...]."
            )
        named = [name for name, module in model.skeleton.named_modules() if isinstance(module, nn.Linear)]
        untouched = [name for name in named if name not in self.linears]
        self.plan = Plan(blocks=[{} for _ in blocks], head=None, untouched=untouched)

    def run(
        self, writer: CheckpointWriter, journal: Journal, processes: Processes, progress: Progress
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """
        Quantize, and put weights and config.json into the writer's result.

        Returns:
            what there is to report of every linear, and the `quantization_config`.
        """
        progress.step(f"{self.step.name}: loading and quantizing", amount=0)
        if processes.writes and self.step.name not in journal.stages:
            saved = writer.partial / "saved"
            with _silent(), disk_errors(writer.output):
                shutil.rmtree(saved, ignore_errors=True)
                loaded = self._load(writer)
                loaded.save_pretrained(saved)
                for path in saved.iterdir():
                    os.replace(path, writer.result / path.name)
                witness = self._witness(loaded)
            del loaded
            made = Checkpoint.open(writer.result)
            journal.commit_stage(self.step.name, {}, {self.step.name: self._rows(made)}, witness)
        progress.step(self.step.name, amount=len(self.model))
        config = Checkpoint.open(writer.result).quantization_config if processes.writes else None
        return journal.blocks.get(self.step.name, []), config or {}

    def _load(self, writer: CheckpointWriter):
        checkpoint = self.model.checkpoint
        folder = checkpoint.folder
        if folder is None:
            assert checkpoint.model is not None
            folder = writer.partial / "base"
            checkpoint.model.save_pretrained(folder)
        dtype = checkpoint.config.dtype if isinstance(checkpoint.config.dtype, torch.dtype) else torch.bfloat16
        return (
            auto_class(checkpoint.config)
            .from_pretrained(
                folder,
                dtype=dtype,
                quantization_config=self.step.quantization_config(self.plan.untouched, dtype),
                device_map={"": self.model.device},
                trust_remote_code=checkpoint.trust_remote_code,
            )
            .eval()
        )

    @torch.no_grad()
    def _witness(self, loaded: PreTrainedModel) -> dict[str, Any]:
        """What the model that was saved says, in the dtype that it computes in."""
        batch = witness_batch(self.model)
        inputs = batch.inputs(self.model.skeleton.config, self.model.device, loaded.dtype)
        logits = loaded(**inputs, use_cache=False).logits
        return testimony(Stream(batch, logits, []), logits)

    def _rows(self, made: Checkpoint) -> list[dict[str, Any]]:
        stored = made.tensors
        view = decoded(stored, made.quantization_config)
        rows = []
        for name in self.linears:
            key = self.model.sources[f"{name}.weight"]
            weight, values = self.model.tensors[key].read().float(), view[key].read()
            stem = key.removesuffix("weight")
            size = sum(t.nbytes for n, t in stored.items() if n.startswith(stem) and not n.endswith(".bias"))
            rows.append(
                {
                    "name": name,
                    "method": self.step.name,
                    **self.step.described(),
                    "shape": list(weight.shape),
                    "sparsity": (values == 0).float().mean().item(),
                    "relative_output_error": None,
                    "relative_weight_error": ((weight - values).norm() / weight.norm().clamp(min=1e-30)).item(),
                    "tokens": 0,
                    "fallback": None,
                    "bytes": size,
                }
            )
        return rows


@contextlib.contextmanager
def _silent() -> Generator[None]:
    """Without the bars, the warnings and the logs of the libraries; errors are raised."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if shown:
            transformers_logging.enable_progress_bar()
