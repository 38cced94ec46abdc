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
"""By which of transformers' classes a model is built and loaded."""

import copy
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hfcompress.models.encoder_decoder import encodes_only, hears, reads_and_writes


AutoClass = (
    type[AutoModelForCausalLM]
    | type[AutoModelForImageTextToText]
    | type[AutoModelForMaskedLM]
    | type[AutoModelForSeq2SeqLM]
    | type[AutoModelForSpeechSeq2Seq]
    | type[AutoModelForTextEncoding]
    | type[AutoModel]
)


def auto_class(config: PretrainedConfig) -> AutoClass:
    """
    The class that has a head for tokens: the one for those that are masked where the checkpoint was written by such a model; the
    one for images and text where a model has more parts than one for text, or no other class; otherwise the one for the next
    token, which also knows what the repo's own code stands for. Of an encoder that was written without a head, the class without
    one; of an encoder with a decoder, the one for both, and of such an encoder by itself its own.
    """
    if reads_and_writes(config) and config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForSpeechSeq2Seq if hears(config) else AutoModelForSeq2SeqLM
    if encodes_only(config):
        return AutoModelForTextEncoding
    if is_headless(config):
        return AutoModel
    if predicts_masked(config):
        return AutoModelForMaskedLM
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if sees and (config.get_text_config() is not config or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def predicts_masked(config: PretrainedConfig) -> bool:
    """Whether the model is an encoder that predicts masked tokens, by what its configuration says of itself."""
    return any(name.endswith("ForMaskedLM") for name in config.architectures or ())


def is_headless(config: PretrainedConfig) -> bool:
    """Whether the model is an encoder that predicts no tokens but returns states, by what its configuration says of itself."""
    if reads_and_writes(config) or encodes_only(config):
        return encodes_only(config)
    written = config.architectures or ()
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and any(
        name.endswith("Model") and not name.endswith("LMHeadModel") for name in written
    )


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the model has no decoder, so that it says nothing but what it makes of a text."""
    return predicts_masked(config) or is_headless(config)


def goes_on(config: PretrainedConfig) -> bool:
    """Whether the model is one that goes on with a text."""
    return not is_encoder(config) and not reads_and_writes(config)


def ties_embeddings(config: PretrainedConfig) -> bool:
    """Whether a model's output head is its input embeddings: what transformers goes by, of models with several parts too."""
    return getattr(config, "tie_word_embeddings", False)


def answers(output: Any) -> Tensor:
    """What a model returns for every token: logits, or states where it has no head for any."""
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def must_be_unpacked(model: PreTrainedModel, linears: Collection[str]) -> bool:
    """
    Whether packed weights must be unpacked while transformers loads them, not when the model is first run: generating runs an
    encoder by itself; and some modules initialize the weights of linears in them, which have none meanwhile.

    Args:
        model (`PreTrainedModel`): without weights.
        linears (`Collection[str]`): the names of the linears that would have no weight.
    """
    plain = [name for name in linears if type(model.get_submodule(name)) is nn.Linear]
    return reads_and_writes(model.config) or initialized_from_outside(model, plain) is not None


def initialized_from_outside(model: PreTrainedModel, linears: Collection[str]) -> str | None:
    """
    The first of these linears whose weight transformers asks for when it initializes the module around it, as it does while it
    loads; without a weight it could not be loaded.

    Args:
        model (`PreTrainedModel`): without weights.
        linears (`Collection[str]`): the names of some of its linears.
    """
    tried = set()
    for name in linears:
        parent, _, own = name.rpartition(".")
        around, linear = model.get_submodule(parent), model.get_submodule(name)
        if (type(around), own) in tried:
            continue
        tried.add((type(around), own))
        bare = copy.copy(linear)
        bare._parameters = {key: value for key, value in linear._parameters.items() if key != "weight"}
        stand_in: nn.Module = copy.copy(around)
        stand_in._modules = {**around._modules, own: bare}
        try:
            model._init_weights(stand_in)
        except AttributeError:
            return name
    return None
