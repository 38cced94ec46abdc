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
"""What the decoder of an encoder-decoder reads: what the model itself says to the text that its encoder reads.

It is drawn from the model's own distribution, token by token. So the mean divergence at its tokens is, in expectation, that of
what the two models say as a whole; and the linears of the decoder see what they will see in use, whatever the model was
trained for.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, CheckpointError, UnsupportedModelError
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.encoder_decoder import encoded
from hfcompress.models.streaming import StreamedModel


ROWS = 32  # that are drawn for together
LEAST_SAID = 2  # tokens: the first is the one that it starts with
DRAWN = {  # as the model's distribution has it, without what generation puts on top of it
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "num_beams": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "forced_eos_token_id": None,
    "max_length": None,
    "max_time": None,
}


def answered(
    tokens: Tokens, model: StreamedModel, seed: int = 0, tell: Callable[[int], None] = lambda row: None
) -> Tokens:
    """
    Rows as an encoder-decoder takes them: the encoder's part of the text, or what it hears, and in the place of the rest what the
    model says to it.

    Args:
        tokens (`Tokens`): rows of text, or sound.
        model (`StreamedModel`): an encoder-decoder; all its weights are in memory meanwhile.
        seed (`int`, *optional*, defaults to 0): of what is drawn.
        tell (`Callable`, *optional*): is told which row it is at.

    Raises:
        CalibrationError: the rows have no room for what it says.
        CheckpointError: what it says is not finite.
        UnsupportedModelError: it does not say how it starts to speak.
    """
    read, read_mask = _read(tokens, model.checkpoint)
    rows, length = tokens.input_ids.shape
    room = length - read.shape[1]
    if room < LEAST_SAID:
        raise CalibrationError(
            f"The rows of {tokens.source} are {length} tokens long, of which {model.checkpoint.name} would read {read.shape[1]}; it needs "
            "room to say something as well: give longer rows (--seq-len)."
        )
    settings = _generation(model.checkpoint)
    settings.max_new_tokens = max(1, room - 1)
    padding = settings.pad_token_id if settings.pad_token_id is not None else 0
    said = np.full((rows, room), padding, dtype=np.int64)
    mask = np.zeros((rows, room), dtype=bool)
    ends = set(np.atleast_1d(settings.eos_token_id).tolist()) if settings.eos_token_id is not None else set()
    with model.loaded() as loaded, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        talker: Any = loaded
        for first in range(0, rows, ROWS):
            tell(first)
            part = slice(first, first + ROWS)
            given: dict[str, Any]
            if tokens.sound is not None:
                given = {"input_features": torch.from_numpy(tokens.sound[part]).to(model.device, model.dtype)}
            else:
                given = {"input_ids": read[part], "attention_mask": read_mask[part].astype(np.int64)}
                given = {name: torch.from_numpy(array).to(model.device) for name, array in given.items()}
            try:
                found = GenerationMixin.generate(talker, **given, generation_config=settings)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise CheckpointError(
                    f"The logits of {model.checkpoint.name} are not finite in {str(model.dtype).removeprefix('torch.')}; give --dtype "
                    "float32 or bfloat16."
                ) from error
            for row, ids in enumerate(found[:, :room].tolist(), start=first):
                stop = next((place + 1 for place in range(1, len(ids)) if ids[place] in ends), len(ids))
                said[row, :stop] = ids[:stop]
                mask[row, :stop] = True
    return replace(
        tokens,
        input_ids=np.concatenate([read, said], 1),
        mask=np.concatenate([read_mask, mask], 1),
        own_output=True,
    )


def continued(tokens: Tokens, checkpoint: Checkpoint) -> Tokens:
    """
    The same where a whole model would not fit: the decoder reads how the text goes on.

    Args:
        tokens (`Tokens`): rows of text.
        checkpoint (`Checkpoint`): an encoder-decoder.
    """
    read, read_mask = _read(tokens, checkpoint)
    own = read.shape[1]
    start = _generation(checkpoint).decoder_start_token_id
    said = tokens.input_ids[:, own:]
    if start is not None:
        said = np.concatenate([np.full((len(said), 1), start, dtype=np.int64), said[:, :-1]], 1)
    mask = np.ones_like(said, dtype=bool) if tokens.mask is None else tokens.mask[:, own:]
    return replace(tokens, input_ids=np.concatenate([read, said], 1), mask=np.concatenate([read_mask, mask], 1))


def _read(tokens: Tokens, checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder reads, int64 and its mask, bool, `(rows, positions)`; it begins and ends as the tokenizer has it."""
    own = encoded(tokens.input_ids.shape[1]) if tokens.sound is None else 0
    ids = tokens.input_ids[:, :own].copy()
    mask = np.ones_like(ids, dtype=bool) if tokens.mask is None else tokens.mask[:, :own].copy()
    before, behind = ([], []) if checkpoint.tokenizer is None else _frame(checkpoint.tokenizer)
    if len(before) + len(behind) < own:
        ids[:, : len(before)] = before
        for row, kept in zip(ids, mask, strict=True):
            places = np.flatnonzero(kept)[-len(behind) :] if behind else []
            row[places] = behind[len(behind) - len(places) :]
    return ids, mask


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before a text, and behind it."""
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _generation(checkpoint: Checkpoint) -> GenerationConfig:
    """
    How the checkpoint starts and ends what it says, and otherwise as its distribution has it.

    Raises:
        UnsupportedModelError: it does not say how it starts.
    """
    settings = copy.deepcopy(checkpoint.generation_config)
    if settings is None and checkpoint.folder is not None and (checkpoint.folder / GENERATION_CONFIG_NAME).is_file():
        settings = GenerationConfig.from_pretrained(checkpoint.folder)
    if settings is None:
        settings = GenerationConfig.from_model_config(checkpoint.config)
    if settings.decoder_start_token_id is None:
        starts = (getattr(checkpoint.config, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
        settings.decoder_start_token_id = next((start for start in starts if start is not None), None)
    if settings.decoder_start_token_id is None:
        raise UnsupportedModelError(
            f"{checkpoint.name} does not say with which token its decoder begins; put decoder_start_token_id into its "
            "generation_config.json."
        )
    settings.update(**DRAWN)
    return settings
