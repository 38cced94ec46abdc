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
"""The model's own forward, one decoder block in memory at a time.

How it works: the model is built without weights. To learn what each block is called with, the model's forward is run
with every block replaced by a stub that notes its arguments and hands the hidden states on; masks, rotary embeddings
and whatever else the architecture makes for each block are then exactly its own, per block. The blocks are loaded and
called one after another with those arguments. For the logits the model's forward is run once more and the last stub
hands in the real hidden states. No modelling code is copied, traced or patched.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from hfcompress.errors import CheckpointError, UnsupportedModelError
from hfcompress.models.activations import await_scales, round_activations
from hfcompress.models.architecture import answers, auto_class, ties_embeddings
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.experts import are_apart, merges_experts, refuse_other_experts, take_apart, tell_row_length
from hfcompress.models.fused_experts import ExpertStorage


PROBE_TOKENS = 8
CACHE = "past_key_values"


@dataclass
class Batch:
    """
    Rows that go through the model together.

    Args:
        input_ids (`Tensor`): int64 `(rows, seq_len)`.
        mask (`Tensor` or `None`): bool `(rows, seq_len)`, false on padding; `None` where there is none.
    """

    input_ids: Tensor
    mask: Tensor | None = None

    def split(self, rows: int) -> "list[Batch]":
        """Pieces of at most `rows` rows."""
        ids = self.input_ids.split(rows)
        masks = self.mask.split(rows) if self.mask is not None else [None] * len(ids)
        return [Batch(i, m) for i, m in zip(ids, masks, strict=True)]


class Kept(Protocol):
    """A tensor that is not in memory."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        """The tensor."""
        ...

    def instead(self, tensor: Tensor) -> "Kept":
        """Another one, kept likewise."""
        ...


@dataclass
class Stream:
    """
    A batch on its way through the blocks.

    Args:
        batch (`Batch`): what went in.
        held (`Tensor` or `Kept`): the input of the next block, or where it lies.
        calls (`list`): for every block, the other positional arguments and the keyword arguments of its call.
    """

    batch: Batch
    held: Tensor | Kept
    calls: list[tuple[tuple, dict[str, Any]]] = field(repr=False)

    @property
    def hidden(self) -> Tensor:
        """The input of the next block, `(rows, seq_len, hidden_size)`."""
        return self.held if isinstance(self.held, Tensor) else self.held.read()

    def advanced(self, hidden: Tensor) -> "Stream":
        """The same stream with the output of a block."""
        return replace(self, held=hidden if isinstance(self.held, Tensor) else self.held.instead(hidden))


class StreamedModel:
    """
    Args:
        checkpoint (`Checkpoint`): the model; where its `quantization_config` says that activations are rounded, they
            are, as in plain transformers.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the arithmetic happens.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): what it happens in.
        tensors (`Mapping`, *optional*): read the weights from here instead of from `checkpoint.tensors`: a view in
            which compressed weights appear dense.

    Attributes:
        tensors (`Mapping`): the weights by their names on disk; those of experts one by one, however they are stored.
        experts (`ExpertStorage`): how experts are stored.
        block_names (`list[str]`): the decoder blocks, as module names.
        sources (`dict[str, str]`): parameter name -> name on disk, for those stored just as they are.
        converts (`bool`): whether some parameters are stored in another form than they are used in.

    Raises:
        UnsupportedModelError: the architecture is one that cannot be treated correctly.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tensors: Mapping[str, Any] | None = None,
    ):
        self.checkpoint = checkpoint
        self.device, self.dtype = torch.device(device), dtype
        self.skeleton, self.experts = _skeleton(checkpoint, dtype)
        self._awaited: set[str] = set()  # scales of activations that are not known yet
        if checkpoint.quantization_config is not None:
            round_activations(self.skeleton, checkpoint.quantization_config)
        list_name, self._blocks = _decoder_blocks(self.skeleton)
        self.block_names = [f"{list_name}.{index}" for index in range(len(self._blocks))]
        refuse_other_experts(self.skeleton, self.block_names)
        stored = checkpoint.tensors if tensors is None else tensors
        names = {key: target for key, (target, _) in self._targets(stored).items()}
        self.tensors = self.experts.apart(stored, names)
        self._keys_of_block, self._outside_keys, self.sources = self._sort_keys()
        self.converts = len(self.sources) < len(self.tensors)
        self._returns_tuple: bool | None = None
        self.cache: Cache | None = None
        self._require_complete()
        for module in self.skeleton.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)

    def will_round_activations(self, config: Mapping[str, Any]) -> None:
        """
        Let the linears and caches of a dense model round as they will once it is written with this
        `quantization_config`; those that store scales begin when [`set_scales`] gives them.
        """
        before = {name for name, _ in self.skeleton.named_parameters()}
        round_activations(self.skeleton, config)
        self._awaited = {name for name, _ in self.skeleton.named_parameters()} - before
        await_scales(self.skeleton, self._awaited)

    def _require_complete(self) -> None:
        """Every parameter is in the checkpoint, is tied to one that is, or is converted from others."""
        if self.converts:
            return
        tied = self.skeleton.all_tied_weights_keys if ties_embeddings(self.skeleton.config) else {}
        missing = [n for n, _ in self.skeleton.named_parameters() if n not in self.sources and n not in tied]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.name} has no weight for {missing[0]}; the checkpoint is incomplete or of another "
                "model."
            )

    def __len__(self) -> int:
        return len(self._blocks)

    def _sort_keys(self) -> tuple[list[list[str]], list[str], dict[str, str]]:
        """The names on disk by block, those outside every block, and parameter name -> name on disk."""
        by_block: list[list[str]] = [[] for _ in self._blocks]
        outside, sources = [], {}
        prefixes = {f"{name}.": index for index, name in enumerate(self.block_names)}
        stem = self.block_names[0].rpartition(".")[0] + "."
        for key, (target, converted) in self._targets(self.tensors).items():
            if converted is None:
                sources[target] = key
            if target.startswith(stem):
                index = prefixes.get(stem + target[len(stem) :].partition(".")[0] + ".")
                if index is not None:
                    by_block[index].append(key)
                    continue
            outside.append(key)
        return by_block, outside, sources

    def _targets(self, keys: Iterable[str]) -> dict[str, tuple[str, str | None]]:
        """Name on disk -> parameter, and the pattern of what converts it, if anything does."""
        mapping = _weight_mapping(self.skeleton)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        expected = {**self.skeleton.state_dict(), **{fused.name: fused for fused in self.experts.held}}
        prefix = self.skeleton.base_model_prefix
        return {key: rename_source_key(key, renamings, converters, prefix, expected) for key in keys}

    # loading

    def _load(self, keys: list[str]) -> None:
        with _quiet_loading():
            convert_and_load_state_dict_in_model(
                self.skeleton,
                {key: self.tensors[key] for key in keys},
                LoadStateDictConfig(
                    dtype=self.dtype,
                    device_map={"": self.device},
                    weight_mapping=_weight_mapping(self.skeleton),
                ),
            )

    @contextlib.contextmanager
    def block(self, index: int) -> Generator[nn.Module]:
        """Block `index` with its weights, which are given up on leaving."""
        module = self._blocks[index]
        self._load(self._keys_of_block[index])
        _require_loaded(module, self.block_names[index], self.checkpoint.name, self._awaited)
        try:
            yield module.eval()
        finally:
            _release(module)

    def whole(self, without: Collection[str] = ()) -> PreTrainedModel:
        """The model with all its weights but those of these names on disk, which stay."""
        self._load([key for key in self.tensors if key not in without])
        self.skeleton.tie_weights()
        _require_loaded(self.skeleton, type(self.skeleton).__name__, self.checkpoint.name)
        return self.skeleton.eval()

    def reading(self, tensors: Mapping[str, Any]) -> "StreamedModel":
        """The same model, with these weights, by their names on disk, in place of its own."""
        other = copy.copy(self)
        other.tensors = {**self.tensors, **tensors}
        return other

    def caching(self, cache: Cache) -> "StreamedModel":
        """The same model, whose attentions hand their keys and values to this and go on with what it returns."""
        other = copy.copy(self)
        other.cache = cache
        return other

    def keys_of_block(self, index: int) -> list[str]:
        """The names on disk of the tensors of block `index`."""
        return self._keys_of_block[index]

    @property
    def block_parameters(self) -> list[int]:
        """How many parameters every block has."""
        return [sum(p.numel() for p in block.parameters()) for block in self._blocks]

    @property
    def outside_keys(self) -> list[str]:
        """The names on disk of everything outside the blocks."""
        return self._outside_keys

    @contextlib.contextmanager
    def outside(self, head: bool) -> Generator[PreTrainedModel]:
        """The model with all weights but its blocks'; without `head`, also without a head of its own."""
        keys = self._outside_keys
        output = self.skeleton.get_output_embeddings()
        if not head and output is not None:
            names = {name for name, module in self.skeleton.named_modules() if module is output}
            own = {self.sources.get(f"{name}.{part}") for name in names for part in ("weight", "bias")}
            keys = [key for key in keys if key not in own]
        for part in [keys] if self.converts else [[key] for key in keys]:  # of two dtypes, one tensor at a time
            self._load(part)
        self.skeleton.tie_weights()
        try:
            yield self.skeleton
        finally:
            inside = {id(p) for block in self._blocks for p in block.parameters()}
            _release(self.skeleton, keep=inside)

    @contextlib.contextmanager
    def loaded(self) -> Generator[PreTrainedModel]:
        """The model with all its weights, for what must see all blocks at once; they are given up on leaving."""
        try:
            model = self.whole()
            if self._returns_tuple is None:
                self._learn_return_type(model, self._blocks[0])
            yield model
        finally:
            _release(self.skeleton)

    # running

    @torch.no_grad()
    def embed(self, batches: list[Batch], keep: Callable[[Tensor], Kept] | None = None) -> list[Stream]:
        """
        What the first block receives for each batch, and how every block is called.

        Args:
            batches (`list[Batch]`): the tokens.
            keep (`Callable`, *optional*): puts hidden states somewhere else than into memory.
        """
        streams: list[Stream] = []
        with self.outside(head=False) as model:
            if self._returns_tuple is None:
                with self.block(0) as block:
                    self._learn_return_type(model, block)
            for batch in batches:
                stream = self.stream(model, batch)
                if streams and streams[-1].batch.input_ids.shape == batch.input_ids.shape:
                    stream.calls = _shared_where_equal(stream.calls, streams[-1].calls)
                if keep is not None:
                    stream.held = keep(stream.hidden)
                streams.append(stream)
        return streams

    def stream(self, model: nn.Module, batch: Batch) -> Stream:
        """What the first block receives for a batch, and how every block is called."""
        recorder = _Recorder(len(self), self._returns_tuple)
        self._run(model, batch, recorder)
        return Stream(batch, recorder.first, recorder.calls)

    def final_hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """
        What the last block returns, `(rows, seq_len, hidden_size)`; gradients flow.

        Args:
            model (`nn.Module`): from [`StreamedModel.loaded`].
        """
        return self.hidden_states(model, batch, [len(self) - 1])[0]

    def hidden_states(self, model: nn.Module, batch: Batch, after: Sequence[int]) -> list[Tensor]:
        """
        What some blocks return, `(rows, seq_len, hidden_size)` each; gradients flow.

        Args:
            model (`nn.Module`): from [`StreamedModel.loaded`].
            batch (`Batch`): the tokens.
            after (`Sequence[int]`): which blocks.
        """
        stream, found = self.stream(model, batch), {}
        for index, block in enumerate(self._blocks):
            stream = stream.advanced(self.call(block, index, stream))
            if index in after:
                found[index] = stream.hidden
        return [found[index] for index in after]

    def probe(self) -> Stream:
        """A stream of a few tokens, to look at how a block treats its inputs."""
        ids = torch.arange(PROBE_TOKENS).remainder(self.skeleton.config.get_text_config().vocab_size)
        return self.embed([Batch(ids[None])])[0]

    def call(self, block: nn.Module, index: int, stream: Stream) -> Tensor:
        """The output of block `index` for a stream that has reached it."""
        args, kwargs = stream.calls[index]
        hidden = stream.hidden
        tell_row_length(block, hidden.shape[1])
        if self.cache is not None:
            args, kwargs = _with_cache(block, hidden, args, kwargs, self.cache)
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, block: nn.Module, index: int, streams: list[Stream]) -> None:
        """Streams go through block `index`, in place, so that no more than one of them is in memory twice."""
        for number, stream in enumerate(streams):
            streams[number] = stream.advanced(self.call(block, index, stream))

    @torch.no_grad()
    def forward_blocks(self, streams: list[Stream], on_block=None) -> list[Stream]:
        """All blocks over all streams, block by block; `on_block(index)` is called after each."""
        streams = list(streams)
        for index in range(len(self)):
            with self.block(index) as block:
                self.advance(block, index, streams)
            if on_block is not None:
                on_block(index)
        return streams

    def logits(self, model: nn.Module, stream: Stream, gradients: bool = False) -> Tensor:
        """
        The logits `(rows, seq_len, vocabulary)` of a stream that has passed every block; of a model without a head its states
        `(rows, seq_len, hidden_size)`.

        Args:
            model (`nn.Module`): from [`StreamedModel.outside`] with its head.
            stream (`Stream`): the stream.
            gradients (`bool`, *optional*, defaults to `False`): keep what is needed to go back from them.
        """
        with torch.set_grad_enabled(gradients):
            return self.head_logits(model, stream.hidden, stream.batch)

    def head_logits(self, model: nn.Module, hidden: Tensor, batch: Batch | None = None) -> Tensor:
        """
        The logits of what the last block returns, position by position; gradients flow.

        Args:
            model (`nn.Module`): with the weights that lie outside the blocks.
            hidden (`Tensor`): `(rows, seq_len, hidden_size)`.
            batch (`Batch`, *optional*): the tokens that they come from; which ones they are makes no difference.
        """
        if batch is None:
            batch = Batch(torch.zeros(hidden.shape[:2], dtype=torch.long))
        return answers(self._run(model, batch, _Recorder(len(self), self._returns_tuple, final=hidden)))

    @torch.no_grad()
    def head_input(self, model: nn.Module, head: nn.Module, stream: Stream) -> Tensor:
        """
        What the output head receives for a stream that has passed every block: `(rows, seq_len, hidden_size)`.

        Args:
            model (`nn.Module`): from [`StreamedModel.outside`] with its head.
            head (`nn.Module`): its output head, which is not run.
        """
        seen = []

        def stop(module, args):
            seen.append(args[0])
            raise _Stop

        handle = head.register_forward_pre_hook(stop)
        try:
            self._run(model, stream.batch, _Recorder(len(self), self._returns_tuple, final=stream.hidden))
        finally:
            handle.remove()
        return seen[0]

    @torch.no_grad()
    def _learn_return_type(self, model: nn.Module, block: nn.Module) -> None:
        """Whether a block returns a tensor or a tuple, seen on the first block with a few tokens."""
        seen = []

        def stop(module, args, output):
            seen.append(isinstance(output, tuple))
            raise _Stop

        handle = block.register_forward_hook(stop)
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        self._returns_tuple = seen[0]

    def _run(self, model: nn.Module, batch: Batch, recorder: "_Recorder"):
        kwargs = {} if batch.mask is None else {"attention_mask": batch.mask.long().to(self.device)}
        originals = list(self._blocks)
        for index, original in enumerate(originals):
            self._blocks[index] = _Stub(original, index, recorder)
        try:
            return model(input_ids=batch.input_ids.to(self.device), use_cache=False, **kwargs)
        except _Stop:
            return None
        finally:
            for index, original in enumerate(originals):
                self._blocks[index] = original


def _with_cache(block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any], cache: Cache):
    """How a block is called, but with a cache."""
    bound = inspect.signature(block.forward).bind(hidden, *args, **kwargs)
    if CACHE in bound.signature.parameters:
        bound.arguments[CACHE] = cache
        return bound.args[1:], bound.kwargs
    return args, {**kwargs, CACHE: cache}


class _Stop(Exception):
    """Ends a forward that has done what it was run for."""


class _Recorder:
    """What the stubs of one forward note, and what the last of them hands back."""

    def __init__(self, blocks: int, returns_tuple: bool | None, final: Tensor | None = None):
        self.blocks, self.returns_tuple, self.final = blocks, returns_tuple, final
        self.calls: list[tuple[tuple, dict[str, Any]]] = []
        self.first: Tensor = torch.empty(0)

    def receive(self, index: int, hidden: Any, args: tuple, kwargs: dict[str, Any]):
        if index == 0:
            self.first = hidden
        if not isinstance(hidden, Tensor) or hidden is not self.first or index != len(self.calls):
            raise UnsupportedModelError(
                "This architecture changes the hidden states between its decoder blocks, or calls them out of order; "
                "it is not supported yet."
            )
        self.calls.append((args, kwargs))
        output = hidden
        if index == self.blocks - 1:
            if self.final is None:
                raise _Stop
            output = self.final
        return (output,) if self.returns_tuple else output


class _Stub(nn.Module):
    """Stands in for a block; what the model asks of the block besides its forward is answered by the block."""

    def __init__(self, original: nn.Module, index: int, recorder: _Recorder):
        super().__init__()
        self.__dict__["original"], self.index, self.recorder = original, index, recorder

    def __getattr__(self, name: str):
        return getattr(self.__dict__["original"], name)

    def forward(self, *args, **kwargs):
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states", None)
        return self.recorder.receive(self.index, hidden, args, kwargs)


def _shared_where_equal(calls, others):
    """`calls` with every tensor that equals its counterpart in `others` replaced by it: one copy in memory."""
    memo: dict[int, Any] = {}

    def shared(value, other):
        if id(value) in memo:
            return memo[id(value)]
        result = value
        if isinstance(value, Tensor):
            same = isinstance(other, Tensor) and value.shape == other.shape and value.dtype == other.dtype
            result = other if same and torch.equal(value, other) else value
        elif isinstance(value, (tuple, list)) and isinstance(other, type(value)) and len(value) == len(other):
            result = type(value)(shared(v, o) for v, o in zip(value, other, strict=True))
        elif isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
            result = {k: shared(v, other[k]) for k, v in value.items()}
        memo[id(value)] = result
        return result

    return [(shared(a, oa), shared(k, ok)) for (a, k), (oa, ok) in zip(calls, others, strict=True)]


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers real; every expert has linears of its own."""
    return _skeleton(checkpoint, dtype)[0]


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[PreTrainedModel, ExpertStorage]:
    config = copy.deepcopy(checkpoint.config)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{checkpoint.name} is an encoder-decoder ({config.model_type}); only decoder-only language models are "
            "supported yet."
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with init_empty_weights():
            made = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=checkpoint.trust_remote_code)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{checkpoint.name} ({config.model_type}) is not a language model that this transformers knows; "
            "update transformers, or give --trust-remote-code if the repo carries its own modelling code."
        ) from error
    model: PreTrainedModel = made
    storage = take_apart(model, _weight_mapping(model))
    return model.eval(), storage


def _weight_mapping(model: PreTrainedModel) -> list[WeightRenaming | WeightConverter]:
    """How names on disk become parameters; fresh at each call, since loading leaves its traces in it."""
    known = [m for m in get_model_conversion_mapping(model) if isinstance(m, (WeightRenaming, WeightConverter))]
    return [m for m in known if not merges_experts(m)] if are_apart(model) else known


def _decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks: as long as the configuration says, all of one class or nearly so, the largest."""
    layers = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise UnsupportedModelError(
            f"No list of {layers} decoder blocks was found in {type(model).__name__}; it is not supported yet."
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _require_loaded(module: nn.Module, name: str, checkpoint: str, awaited: AbstractSet[str] = frozenset()) -> None:
    missing = [n for n, p in module.named_parameters() if p.device.type == "meta" and f"{name}.{n}" not in awaited]
    if missing:
        raise CheckpointError(
            f"{checkpoint} has no weight for {name}.{missing[0]}; the checkpoint is incomplete or of another model."
        )


def _release(module: nn.Module, keep: AbstractSet[int] = frozenset()) -> None:
    """Give up the weights of a module: its parameters go back to the meta device."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.device.type != "meta" and id(parameter) not in keep:
                child._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


@contextlib.contextmanager
def _quiet_loading() -> Generator[None]:
    """Transformers' own loading bar would appear once per block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
