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
hands in the real hidden states. No modelling code is copied, traced or patched. Of a model with an encoder and a decoder
the blocks of both are gone through, one behind the other (see [`hfcompress.models.encoder_decoder`]).
"""

import contextlib
import copy
import inspect
import re
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
from hfcompress.models.batch import Batch, made_up
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.encoder_decoder import (
    LEAST_TOKENS,
    TailWatch,
    joined,
    reads_and_writes,
    require_states,
    towers_of,
    watched_encoder,
    with_states,
)
from hfcompress.models.experts import are_apart, merges_experts, refuse_other_experts, take_apart, tell_row_length
from hfcompress.models.fused_experts import ExpertStorage
from hfcompress.models.recording import Recorder, Returns, Stop, Stub, first_of, shared_where_equal


PROBE_TOKENS = 8
CACHE = "past_key_values"


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
        block_names (`list[str]`): the blocks, an encoder's before its decoder's, as module names.
        encoder_blocks (`int`): how many of them are of an encoder that a decoder reads.
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
        lists = _block_lists(self.skeleton)
        self._places = [(blocks, index) for _, blocks in lists for index in range(len(blocks))]
        self.block_names = [f"{name}.{index}" for name, blocks in lists for index in range(len(blocks))]
        self.encoder_blocks = len(lists[0][1]) if len(lists) > 1 else 0
        refuse_other_experts(self.skeleton, self.block_names)
        stored = checkpoint.tensors if tensors is None else tensors
        names = {key: target for key, (target, _) in self._targets(stored).items()}
        self.tensors = self.experts.apart(stored, names)
        self._keys_of_block, self._outside_keys, self.sources = self._sort_keys()
        self.converts = len(self.sources) < len(self.tensors)
        self._returns: list[Returns] = []
        self._tail: list[nn.Module] = []  # behind the encoder's last block
        self.cache: Cache | None = None
        self._tied = self._ties()
        self._computed: list[str] = []  # parameters that are stored nowhere, as positions may be
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
        tied = self._tied
        missing = [n for n, _ in self.skeleton.named_parameters() if n not in self.sources and n not in tied]
        made = self.skeleton._keys_to_ignore_on_load_missing or ()
        self._computed = [n for n in missing if any(re.search(pattern, n) for pattern in made)]
        missing = [n for n in missing if n not in self._computed]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.name} has no weight for {missing[0]}; the checkpoint is incomplete or of another "
                "model."
            )

    def _ties(self) -> dict[str, str]:
        """
        Which parameters are others, by their names; as transformers has it, not where both are stored and differ, whatever the
        configuration says.
        """
        if not ties_embeddings(self.skeleton.config):
            return {}
        tied = self.skeleton.all_tied_weights_keys
        for target, source in list(tied.items()):
            keys = [self.sources.get(name) for name in (target, source)]
            if None in keys:
                continue
            own, other = (self.tensors[key] for key in keys if key is not None)
            if own.shape != other.shape or not torch.equal(own.read(), other.read()):
                del tied[target]
        return tied

    def _complete(self) -> None:
        """Give the skeleton what is not stored by itself: what is tied, and what transformers computes."""
        self.skeleton.tie_weights(recompute_mapping=False)
        for name in self._computed:
            module, _, own = name.rpartition(".")
            around = self.skeleton.get_submodule(module)
            empty = torch.empty_like(around.get_parameter(own), dtype=self.dtype, device=self.device)
            around._parameters[own] = nn.Parameter(empty, requires_grad=False)
            self.skeleton._init_weights(around)

    @property
    def _blocks(self) -> list[nn.Module]:
        return [blocks[index] for blocks, index in self._places]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def _repeats_leaders(self) -> bool:
        """Whether others are called with something that the first block makes, so that it is run to learn how they are called."""
        return any(returns.with_others for returns in self._returns)

    @property
    def _leaders(self) -> list[int]:
        """The first block of the encoder and that of the decoder, or of all."""
        return [0, self.encoder_blocks] if self.encoder_blocks else [0]

    def _sort_keys(self) -> tuple[list[list[str]], list[str], dict[str, str]]:
        """The names on disk by block, those outside every block, and parameter name -> name on disk."""
        by_block: list[list[str]] = [[] for _ in self._places]
        outside, sources = [], {}
        prefixes = {f"{name}.": index for index, name in enumerate(self.block_names)}
        stems = {self.block_names[leader].rpartition(".")[0] + "." for leader in self._leaders}
        for key, (target, converted) in self._targets(self.tensors).items():
            if converted is None:
                sources[target] = key
            own = (prefixes.get(s + target[len(s) :].partition(".")[0] + ".") for s in stems if target.startswith(s))
            index = next((found for found in own if found is not None), None)
            (outside if index is None else by_block[index]).append(key)
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
        self._complete()
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
        self._complete()
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
            self._learn_returns(model)
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
        with self.outside(head=False) as model, contextlib.ExitStack() as leaders:
            if not self._returns or self._repeats_leaders:
                for leader in (index for index in self._leaders if _is_released(self._blocks[index])):
                    leaders.enter_context(self.block(leader))
                self._learn_returns(model)
            if not self._repeats_leaders:
                leaders.close()
            for batch in batches:
                stream = self.stream(model, batch)
                if streams and streams[-1].batch.input_ids.shape == batch.input_ids.shape:
                    stream.calls = shared_where_equal(stream.calls, streams[-1].calls)
                if keep is not None:
                    stream.held = keep(stream.hidden)
                streams.append(stream)
        return streams

    def stream(self, model: nn.Module, batch: Batch) -> Stream:
        """What the first block receives for a batch, and how every block is called."""
        recorder = Recorder(len(self), self.encoder_blocks, self._returns)
        self._run(model, batch, recorder)
        if not self.encoder_blocks:
            return Stream(batch, recorder.firsts[0], recorder.calls)
        return Stream(batch, joined(recorder.firsts), recorder.calls)

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
        return self.embed([made_up(self.skeleton.config, ids[None])])[0]

    def call(self, block: nn.Module, index: int, stream: Stream) -> Tensor:
        """The output of block `index` for a stream that has reached it."""
        args, kwargs = stream.calls[index]
        hidden = stream.hidden
        if self.encoder_blocks:
            return self._call_part(block, index, hidden, stream)
        tell_row_length(block, hidden.shape[1])
        if self.cache is not None:
            args, kwargs = _with_cache(block, hidden, args, kwargs, self.cache)
        return first_of(block(hidden, *args, **kwargs))

    def _call_part(self, block: nn.Module, index: int, hidden: Tensor, stream: Stream) -> Tensor:
        """What [`StreamedModel.call`] gives where the block has to do with the encoder's or the decoder's part of a state."""
        read, said = hidden[:, : stream.batch.read], hidden[:, stream.batch.read :]
        if index >= self.encoder_blocks:
            args, kwargs = with_states(stream.calls[index], read)
            return torch.cat([read, first_of(block(said, *args, **kwargs))], 1)
        args, kwargs = stream.calls[index]
        read = first_of(block(read, *args, **kwargs))
        for module in self._tail if index == self.encoder_blocks - 1 else ():
            read = module(read)
        return torch.cat([read, said], 1)

    def part(self, index: int, stream: Stream, states: Tensor) -> Tensor:
        """Of something that every position of a stream has, the part of those that block `index` changes."""
        if not self.encoder_blocks:
            return states
        return states[:, : stream.batch.read] if index < self.encoder_blocks else states[:, stream.batch.read :]

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
        return answers(self._run(model, batch, self._last(hidden, batch)))

    def _last(self, hidden: Tensor, batch: Batch) -> "Recorder":
        """What hands in what comes out of the last block."""
        said = hidden[:, batch.read :] if self.encoder_blocks else hidden
        return Recorder(len(self), self.encoder_blocks, self._returns, final=said)

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
            raise Stop

        handle = head.register_forward_pre_hook(stop)
        try:
            self._run(model, stream.batch, self._last(stream.hidden, stream.batch))
        finally:
            handle.remove()
        return seen[0]

    @torch.no_grad()
    def _learn_returns(self, model: nn.Module) -> None:
        """What blocks return, seen on the first of each kind with a few tokens, and what is behind an encoder's last."""
        if self._returns:
            return
        ids = torch.zeros(1, LEAST_TOKENS if self.encoder_blocks else 2, dtype=torch.long)
        recorder = Recorder(len(self), self.encoder_blocks, None)
        if not self.encoder_blocks:
            self._run(model, Batch(ids), recorder)
        else:
            parent = self.skeleton.get_submodule(self.block_names[0].rpartition(".")[0].rpartition(".")[0])
            recorder.watch = TailWatch(parent, self._places[0][0])
            self._run(model, made_up(self.skeleton.config, ids), recorder)
            self._tail = recorder.watch.tail(recorder.states)
            require_states(recorder.calls[self.encoder_blocks :])
        self._returns = recorder.returns

    def _run(self, model: nn.Module, batch: Batch, recorder: "Recorder"):
        inputs = batch.inputs(self.skeleton.config, self.device, self.dtype)
        originals = self._blocks
        for number, (blocks, index) in enumerate(self._places):
            blocks[index] = Stub(originals[number], number, recorder)
        try:
            with watched_encoder(self.skeleton) if self.encoder_blocks else contextlib.nullcontext([]) as states:
                recorder.seen = states
                return model(**inputs, use_cache=False)
        except Stop:
            return None
        finally:
            for original, (blocks, index) in zip(originals, self._places, strict=True):
                blocks[index] = original


def _with_cache(block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any], cache: Cache):
    """How a block is called, but with a cache."""
    bound = inspect.signature(block.forward).bind(hidden, *args, **kwargs)
    if CACHE in bound.signature.parameters:
        bound.arguments[CACHE] = cache
        return bound.args[1:], bound.kwargs
    return args, {**kwargs, CACHE: cache}


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers real; every expert has linears of its own."""
    return _skeleton(checkpoint, dtype)[0]


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[PreTrainedModel, ExpertStorage]:
    config = copy.deepcopy(checkpoint.config)
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


def _block_lists(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """
    The decoder's list of blocks, as long as the configuration says, all of one class or nearly so, the largest; where there is an
    encoder too, its list and the decoder's.
    """
    if reads_and_writes(model.config):
        return [_largest_list(model, tower) for tower in towers_of(model)]
    layers = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise UnsupportedModelError(
            f"No list of {layers} decoder blocks was found in {type(model).__name__}; it is not supported yet."
        )
    return [max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))]


def _largest_list(model: PreTrainedModel, tower: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list with most parameters in the encoder or the decoder, with its name in the model."""
    inside = {id(module) for module in tower.modules()}
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and id(m) in inside]
    if not lists:
        raise UnsupportedModelError(
            f"No list of blocks was found in the {type(tower).__name__} of {type(model).__name__}; it is not supported yet."
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _require_loaded(module: nn.Module, name: str, checkpoint: str, awaited: AbstractSet[str] = frozenset()) -> None:
    missing = [n for n, p in module.named_parameters() if p.device.type == "meta" and f"{name}.{n}" not in awaited]
    if missing:
        raise CheckpointError(
            f"{checkpoint} has no weight for {name}.{missing[0]}; the checkpoint is incomplete or of another model."
        )


def _is_released(module: nn.Module) -> bool:
    """Whether a module has no weights at present."""
    return any(parameter.device.type == "meta" for parameter in module.parameters())


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
