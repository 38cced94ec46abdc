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
lm-eval, quietly: a model as it wants one, and one run of it on some tasks.

Importing this module imports lm-eval, so [`hfcompress.evaluation.tasks`] does it when tasks were asked for.
"""

import contextlib
import copy
import dataclasses
import logging
import os
import random
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks.manager import TaskDict
from transformers.utils import logging as transformers_logging

from hfcompress.errors import CheckpointError, HfcompressError, InvalidValueError
from hfcompress.evaluation.comparison import Comparison, whole_model
from hfcompress.models.checkpoint import Checkpoint


MAX_ROWS = 32  # of a batch
LOGIT_BYTES = 1 << 30  # of one batch's logits in float32
GENERATED_ROWS = 8  # generation keeps keys and values of every row
BOOTSTRAPS = 200  # a standard error from so many is right to about 5 %
NOT_RUN = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, TemplateError)


class TaskModel(HFLM):
    """
    A causal model for lm-eval: batches as long texts allow, contexts changed on the way in where that is asked for.

    Attributes:
        perturb (`Callable[[str], str]` or `None`): applied to every context, and to no answer.
        answered (`Callable[[int], None]`): told how many sequences a forward pass or a generation was for.
        truncated (`int`): requests that were longer than the model's context and lost their beginning.
    """

    def __init__(self, model, tokenizer):
        # lm-eval gives the tokenizer a padding token, and the caller's is not ours to change
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=MAX_ROWS)
        self.perturb: Callable[[str], str] | None = None
        self.answered: Callable[[int], None] = lambda sequences: None
        self.truncated = 0

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where the task does not say."""
        return min(256, self.max_length // 2)

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        """Of answers, given contexts."""
        return super().loglikelihood(self._perturbed(requests), disable_tqdm)

    def generate_until(self, requests, disable_tqdm: bool = False):
        """Answers, given contexts."""
        for request in requests:
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if wanted >= self.max_length:
                raise InvalidValueError(
                    f"The task '{request.task_name}' generates up to {wanted} tokens and the model's context has "
                    f"{self.max_length}; choose another task, or lower its max_gen_toks."
                )
        self.batch_size_per_gpu = GENERATED_ROWS
        return super().generate_until(self._perturbed(requests), disable_tqdm)

    def _perturbed(self, requests):
        if self.perturb is None:
            return requests
        return [dataclasses.replace(r, arguments=(self._context(r.args[0]), *r.args[1:])) for r in requests]

    def _context(self, text: str) -> str:
        changed = self.perturb(text) if self.perturb and text else text
        return changed if changed.strip() else ""  # lm-eval takes no context that is only spaces

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        lengths = [len(context) + len(answer) for _, context, answer in requests]
        self.truncated += sum(length > self.max_length + 1 for length in lengths)
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = LOGIT_BYTES // (4 * min(max(lengths), self.max_length) * vocabulary)
        self.batch_size_per_gpu = max(1, min(MAX_ROWS, rows))
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _model_call(self, inps, *arguments, **options):
        logits = super()._model_call(inps, *arguments, **options)
        self.answered(len(inps))
        return logits

    def _model_generate(self, context, *arguments, **options):
        tokens = super()._model_generate(context, *arguments, **options)
        self.answered(len(context))
        return tokens


@contextlib.contextmanager
def task_model(comparison: Comparison, checkpoint: Checkpoint) -> Generator[TaskModel]:
    """
    One of the two models, loaded whole.

    Raises:
        CheckpointError: there is no tokenizer, or none that lm-eval can use.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer, and tasks are made of text; put the tokenizer's files beside the "
            "weights, or give the tokenizer with the model."
        )
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"The tokenizer of {checkpoint.name} has no end-of-text token, which tasks need; set its eos_token."
        )
    with whole_model(checkpoint, comparison.device, comparison.dtype) as model:
        with quiet():
            lm = TaskModel(model, tokenizer)
        yield lm


def run(lm: TaskModel, suite: TaskDict, comparison: Comparison, bootstraps: int = BOOTSTRAPS) -> dict[str, Any]:
    """
    Args:
        lm (`TaskModel`): the model.
        suite (`TaskDict`): of [`hfcompress.evaluation.task_library.load`].
        comparison (`Comparison`): for `limit` and `seed`.
        bootstraps (`int`, *optional*): resamplings where a standard error has no closed form; 0 for none at all.

    Returns:
        `dict`: what `lm_eval.evaluate` returns, with the documents' samples.

    Raises:
        InvalidValueError: a task cannot be run on this model, or its own code fails.
    """
    try:
        with quiet(), seeded(comparison.seed, comparison.device):
            for task in suite["tasks"].values():
                task.set_fewshot_seed(comparison.seed)
            return evaluate(lm=lm, task_dict=suite, limit=comparison.limit, bootstrap_iters=bootstraps)
    except HfcompressError:
        raise
    except NOT_RUN as error:  # a metric, a template or a filter of the task
        names = ", ".join(suite["tasks"])
        raise InvalidValueError(f"The task '{names}' cannot be run: {reason(error)}") from error


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Generator[None]:
    """Python's, NumPy's and torch's generators, which tasks draw from, start from `seed`; afterwards as before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without lm-eval's lines, bars and pools of processes: whoever watches has one progress bar."""
    logger, pools = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    logger.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with open(os.devnull, "w") as dark, contextlib.redirect_stdout(dark), contextlib.redirect_stderr(dark):
            yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if pools is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = pools


def reason(error: Exception) -> str:
    """Its message on one line, without a stop."""
    said = " ".join(str(error).split()) or type(error).__name__
    return (said if len(said) <= 300 else said[:300] + "...").rstrip(".")
