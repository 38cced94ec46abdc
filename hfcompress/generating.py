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
"""`generate()`: what a checkpoint says to a prompt, told as it says it."""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer

from hfcompress.errors import InvalidValueError
from hfcompress.evaluation.comparison import whole_model
from hfcompress.formats.dense_view import dense_view
from hfcompress.models.architecture import is_encoder
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.devices import find_device, find_dtype
from hfcompress.models.encoder_decoder import hears, reads_and_writes
from hfcompress.runtime.loading import load_checkpoint, runs_packed
from hfcompress.runtime.vector_cache import VectorCache, has_books


NEW_TOKENS = 256


@dataclass(frozen=True)
class Generated:
    """
    Args:
        text (`str`): what was said.
        tokens (`int`): how many tokens it has.
        seconds (`float`): how long it took, loading left out.
    """

    text: str
    tokens: int
    seconds: float


def generate(
    model: "str | Path | PreTrainedModel",
    prompt: str,
    *,
    tokenizer=None,
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    plain: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
) -> Generated:
    """
    Let a checkpoint go on with a prompt, or, if it has an encoder, answer it: as [`hfcompress.load`] loads it where weights stay packed, otherwise as plain transformers
    does; and with the cache that lies beside it, if one does.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): the checkpoint.
        prompt (`str`): what it is told.
        tokenizer (*optional*): of a model in memory.
        max_new_tokens (`int`, *optional*, defaults to 256): at most so many, and no more than the model has positions for.
        temperature (`float`, *optional*, defaults to 0.0): 0 takes the most likely token each time; above it tokens are drawn.
        seed (`int`, *optional*, defaults to 0): of the draws.
        plain (`bool`, *optional*, defaults to `False`): go on with the text itself, also where there is a chat template.
        device (`str`, *optional*): where.
        dtype (`str`, *optional*): of the arithmetic, and nothing stays packed then; by default that of the kernels where weights
            stay packed, otherwise float32 on a CPU and the checkpoint's on a GPU.
        trust_remote_code (`bool`, *optional*): run modelling code that the repo carries.
        say (`Callable`, *optional*): is told every piece of text as soon as it stands.

    Returns:
        [`Generated`]: all of it.

    Raises:
        InvalidValueError: there is no tokenizer, an empty prompt, one that is too long, or a number that cannot be.
    """
    if not prompt:
        raise InvalidValueError("The prompt is empty; give the model something to go on with.")
    if max_new_tokens < 1:
        raise InvalidValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if not 0 <= temperature < float("inf"):
        raise InvalidValueError(f"temperature is {temperature:g}; it must be 0 or above.")
    checkpoint = Checkpoint.open(model, tokenizer, trust_remote_code, dense_view)
    if is_encoder(checkpoint.config):
        raise InvalidValueError(f"{checkpoint.name} is an encoder, which does not go on with a text.")
    if hears(checkpoint.config):
        raise InvalidValueError(
            f"{checkpoint.name} hears sound and reads no prompt; use transformers' pipeline('automatic-speech-recognition', ...)."
        )
    reader = checkpoint.tokenizer
    if reader is None:
        raise InvalidValueError(
            f"{checkpoint.name} has no tokenizer, so it cannot be given text; copy the original's tokenizer files into it."
        )
    where = find_device(device)
    ids = _ids(reader, prompt, plain)
    answers = reads_and_writes(checkpoint.config)  # what it says begins anew
    behind = 1 if answers else len(ids[0])
    room = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    room = room or len(ids[0]) + max_new_tokens
    if len(ids[0]) >= room:
        raise InvalidValueError(
            f"The prompt has {len(ids[0]):,} tokens, and {checkpoint.name} has room for {room:,}; give a shorter one."
        )
    options = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with _loaded(checkpoint, where, dtype) as loaded:
        torch.manual_seed(seed)
        began = time.perf_counter()
        talker: Any = loaded
        cache = {"past_key_values": VectorCache.from_pretrained(checkpoint)} if has_books(checkpoint) else {}
        found = talker.generate(
            input_ids=ids.to(where),
            attention_mask=torch.ones_like(ids).to(where),
            max_new_tokens=min(max_new_tokens, room - behind),
            streamer=None if say is None else _Teller(reader, say),
            pad_token_id=reader.pad_token_id if reader.pad_token_id is not None else reader.eos_token_id,
            **options,
            **cache,
        )
        seconds = time.perf_counter() - began
    new = found[0, behind:]
    return Generated(reader.decode(new, skip_special_tokens=True), len(new), seconds)


@contextlib.contextmanager
def _loaded(checkpoint: Checkpoint, device: torch.device, dtype: str | None) -> Generator[PreTrainedModel]:
    if dtype is None and runs_packed(checkpoint, device):
        yield load_checkpoint(checkpoint, device)
        return
    with whole_model(checkpoint, device, find_dtype(dtype, device, checkpoint)) as model:
        yield model


def _ids(tokenizer, prompt: str, plain: bool) -> torch.Tensor:
    """The tokens of a prompt, as a turn of a chat where there is a template for it: int64 `(1, tokens)`."""
    if plain or not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


class _Teller(TextStreamer):
    """
    Tells text as soon as no later token can change it.

    Args:
        tokenizer: the tokenizer.
        say (`Callable`): is told every piece.
    """

    def __init__(self, tokenizer, say: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What transformers' streamer calls."""
        self.say(text)
