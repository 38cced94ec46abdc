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
"""What is different in a model whose decoder reads what an encoder has made of another text.

A row holds both texts, the encoder's first, and so does its hidden state: what the encoder makes of its part, and behind
it the decoder's. The encoder's blocks change the one and the decoder's the other, so that rows, masks and gradients go
through such a model as through any. A little more than half of a row is the encoder's: the two parts are never equally
long, and the length of what a linear reads tells whose it is.
"""

import contextlib
import copy
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from hfcompress.errors import UnsupportedModelError


class _Encoded:
    """Stands, in how a decoder's block is called, where the encoder's states will be."""


ENCODED = _Encoded()
DECODER_BLOCKS = "num_decoder_layers", "decoder_layers"
ENCODERS_APART = {
    kind for kind, name in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.items() if name.endswith("EncoderModel")
}
FRAMES = 2  # that the encoder makes one position of
LEAST_TOKENS = 4  # of a row with a part for an encoder and one for a decoder


def reads_and_writes(config: PretrainedConfig) -> bool:
    """Whether a model has an encoder for what it is told and a decoder for what it says."""
    return bool(getattr(config, "is_encoder_decoder", False)) and not encodes_only(config)


def encodes_only(config: PretrainedConfig) -> bool:
    """Whether the checkpoint is the encoder alone of a model of a kind that has both, as text encoders made of T5 are."""
    return config.model_type in ENCODERS_APART and any(
        name.endswith("EncoderModel") for name in config.architectures or ()
    )


def hears(config: PretrainedConfig) -> bool:
    """Whether the encoder hears sound instead of reading a text."""
    kind = config.model_type
    speech = (
        kind in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES and kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    )
    return reads_and_writes(config) and speech


def sound_shape(config: PretrainedConfig) -> tuple[int, int]:
    """
    What an encoder hears at once: mel bins and frames.

    Raises:
        UnsupportedModelError: it hears in another form.
    """
    bins, positions = (getattr(config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if bins is None or positions is None:
        raise UnsupportedModelError(
            f"{config.model_type} hears sound in a form that is not supported yet; of models that hear only those like Whisper are."
        )
    return bins, FRAMES * positions


def block_count(config: PretrainedConfig) -> int:
    """How many blocks a model has, an encoder's and its decoder's together."""
    count = config.get_text_config().num_hidden_layers
    if not reads_and_writes(config):
        return count
    own = getattr(config, "encoder", None)
    said = next((n for key in DECODER_BLOCKS if (n := getattr(config, key, None))), count)
    return said + (count if own is None else own.get_text_config().num_hidden_layers)


def encoded(length: int) -> int:
    """How many of a row's tokens are the encoder's."""
    return length // 2 + 1


def towers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The encoder and the decoder."""
    towers: list[Any] = [model.get_encoder(), model.get_decoder()]
    if towers[0] is model or towers[0] is towers[1] or not all(isinstance(tower, nn.Module) for tower in towers):
        raise UnsupportedModelError(f"No encoder was found in {type(model).__name__}; it is not supported yet.")
    return towers


@contextlib.contextmanager
def watched_encoder(model: PreTrainedModel) -> Generator[list[Tensor]]:
    """Within, what the encoder returns is put into the list."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handle = towers_of(model)[0].register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


class TailWatch:
    """
    Follows what the last block of an encoder returns through the modules behind it.

    Args:
        parent (`nn.Module`): the module in which the encoder's blocks are.
        blocks (`nn.ModuleList`): them.
    """

    def __init__(self, parent: nn.Module, blocks: nn.ModuleList):
        self.at: Tensor | None = None
        self.modules: list[nn.Module] = []
        own = [module for module in parent.children() if module is not blocks]
        self.handles = [module.register_forward_hook(self._passed) for module in own]

    def _passed(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.at is not None and args and args[0] is self.at:
            self.at = output
            self.modules.append(module)

    def tail(self, states: Tensor) -> list[nn.Module]:
        """
        Copies of those modules, one behind the other.

        Args:
            states (`Tensor`): what the encoder returned.

        Raises:
            UnsupportedModelError: they do not lead to it.
        """
        for handle in self.handles:
            handle.remove()
        if states is not self.at:
            raise UnsupportedModelError(
                "This architecture changes what its encoder's last block returns by more than modules one behind the other; it "
                "is not supported yet."
            )
        return [copy.deepcopy(module).requires_grad_(False).eval() for module in self.modules]


def without_states(call: tuple[tuple, dict[str, Any]], states: Tensor) -> tuple[tuple, dict[str, Any]]:
    """How a decoder's block is called, with [`ENCODED`] in the place of the encoder's states."""
    return _replaced(call, lambda value: ENCODED if value is states else value)


def with_states(call: tuple[tuple, dict[str, Any]], states: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The opposite of [`without_states`]."""
    return _replaced(call, lambda value: states if value is ENCODED else value)


def require_states(calls: Sequence[tuple[tuple, dict[str, Any]]]) -> None:
    """
    Raises:
        UnsupportedModelError: a block of the decoder is not given what the encoder returned.
    """
    for args, kwargs in calls:
        if not any(value is ENCODED for value in (*args, *kwargs.values())):
            raise UnsupportedModelError(
                "This architecture hands its encoder's states to the decoder's blocks in another form; it is not supported yet."
            )


def _replaced(call: tuple[tuple, dict[str, Any]], new: Callable[[Any], Any]) -> tuple[tuple, dict[str, Any]]:
    args, kwargs = call
    return tuple(map(new, args)), {name: new(value) for name, value in kwargs.items()}


def joined(parts: Sequence[Tensor]) -> Tensor:
    """
    The hidden states of encoder and decoder, `(rows, positions, hidden_size)` each, behind one another.

    Raises:
        UnsupportedModelError: they are not equally wide.
    """
    if len({part.shape[-1] for part in parts}) > 1:
        widths = " and ".join(str(part.shape[-1]) for part in parts)
        raise UnsupportedModelError(f"Its encoder and decoder have states of {widths}; it is not supported yet.")
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]
