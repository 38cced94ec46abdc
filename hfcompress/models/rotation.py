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
A checkpoint turned into an equivalent one whose weights are spread more evenly, so that they lose less on a grid.

Two rotations are folded into the weights (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406); the result is a plain
checkpoint of the same architecture. R1 turns the residual stream: the gains of the norms move into the linears that
read them (an RMS norm without gain commutes with a rotation), everything that writes the stream is rotated and
everything that reads it rotated back; tied embeddings part where the head takes over the last norm's gain. R2 turns the
values of each attention head and turns them back in the output projection. Who reads and writes is discovered on the
running model, and the model that comes out must give the logits of the one that went in; otherwise it is left alone.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.models.architecture import ties_embeddings
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint, StoredTensor
from hfcompress.models.residual import (
    Heads,
    Norm,
    Recording,
    Residual,
    UnknownRoleError,
    heads_of_block,
    readers_of,
    residual_of_block,
)
from hfcompress.models.rotated_tensor import Gain, RotatedTensor, Turn
from hfcompress.models.streaming import Stream, StreamedModel
from hfcompress.solvers.rotation import Rotation, random_rotation


ROWS, TOKENS = 2, 24  # of the forward that is compared, and from which the roles are read
SINGLES = 8  # rows of one token, from which the heads are read
TOLERANCE = 1e-4  # of the logits, as a share of how much they vary


@dataclass
class Rotated:
    """
    Args:
        checkpoint (`Checkpoint` or `None`): the equivalent checkpoint; `None` if nothing could be rotated.
        hidden (`bool`): whether its residual stream is rotated.
        heads (`int`): in how many blocks the heads' values are.
        added_bytes (`int`): of an output head that shared its weight and now has its own.
        config_changes (`dict`): what config.json must say of that.
        reasons (`dict[str, str]`): `hidden` or `heads` -> why it was asked for and not done; a clause.
    """

    checkpoint: Checkpoint | None = None
    hidden: bool = False
    heads: int = 0
    added_bytes: int = 0
    config_changes: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def rotated(
    checkpoint: Checkpoint,
    hidden: bool = True,
    heads: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Rotated:
    """
    Args:
        checkpoint (`Checkpoint`): a dense checkpoint.
        hidden (`bool`, *optional*, defaults to `True`): rotate the residual stream (R1).
        heads (`bool`, *optional*, defaults to `True`): rotate the values of each head (R2).
        seed (`int`, *optional*, defaults to 0): of both.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the model is looked at.

    Returns:
        `Rotated`: what could be done. Its checkpoint gives the logits of the original, in float32, before its tensors
        are rounded to the original's dtype.
    """
    model = StreamedModel(checkpoint, device, torch.float32)
    look = Look(model, hidden, heads)
    result = Rotated(reasons=dict(look.reasons))
    wanted = {"hidden": hidden and "hidden" not in look.reasons, "heads": heads and "heads" not in look.reasons}
    for parts in ({"hidden", "heads"}, {"hidden"}, {"heads"}):
        if result.checkpoint is not None or not all(wanted[part] for part in parts):
            continue
        fold = Fold(model)
        try:
            if "hidden" in parts:
                fold.residual(look, random_rotation(look.width, seed))
            if "heads" in parts:
                fold.heads(look.heads, random_rotation(look.head_dim, seed + 1))
            require_equal(fold.checkpoint(rounded=False), look.batch, look.logits, device)
        except UnknownRoleError as error:
            result.reasons |= dict.fromkeys(parts, str(error))
            continue
        result.checkpoint, result.added_bytes = fold.checkpoint(), fold.added_bytes
        result.config_changes = fold.config_changes
        result.hidden, result.heads = "hidden" in parts, len(look.heads) if "heads" in parts else 0
        result.reasons = {part: why for part, why in result.reasons.items() if part not in parts}
    return result


class Look:
    """
    One walk over the original: who reads and writes what, and the logits that must come out again.

    Attributes:
        residual (`Residual`): of all blocks together.
        final (`dict[str, Norm]`): the output head -> the norm that it reads.
        head (`str`): its name.
        heads (`list[Heads]`): of each block that has them.
        logits (`Tensor`): `(rows, tokens, vocabulary)` for `batch`.
        reasons (`dict[str, str]`): what cannot be rotated, and why.
    """

    def __init__(self, model: StreamedModel, hidden: bool, heads: bool):
        config = model.skeleton.config.get_text_config()
        self.width, self.head_dim = config.hidden_size, _head_dim(config)
        self.residual, self.final, self.head = Residual(), {}, ""
        self.heads: list[Heads] = []
        self.reasons: dict[str, str] = {}
        length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (ROWS, length), generator=generator)
        singles = torch.randint(config.vocab_size, (SINGLES, 1), generator=generator)
        self.batch = Batch(ids)
        self._walk(model, Batch(singles), hidden, heads)

    @torch.no_grad()
    def _walk(self, model: StreamedModel, singles: Batch, hidden: bool, heads: bool) -> None:
        stream, single = model.embed([self.batch, singles])
        for index, name in enumerate(model.block_names):
            with model.block(index) as block:
                with Recording(block, name, self.width) as seen:
                    after = model.call(block, index, stream)
                if hidden and "hidden" not in self.reasons:
                    self._residual_of(name, seen, stream.hidden, after)
                stream = stream.advanced(after)
                with Recording(block, name, self.width) as seen:
                    single = single.advanced(model.call(block, index, single))
                if heads and (found := heads_of_block(seen.events, self.head_dim)) is not None:
                    self.heads.append(found)
        with model.outside(head=True) as whole:
            stem = model.block_names[0].rpartition(".")[0] + "."
            with Recording(whole, "", self.width, skip=stem) as seen:
                self.logits = model.logits(whole, stream)
            if hidden and "hidden" not in self.reasons:
                self._final(whole, seen, stream)
        if heads and not self.heads:
            self.reasons["heads"] = "no output projection reads the values of attention heads unchanged"

    def _residual_of(self, block: str, seen: Recording, before: Tensor, after: Tensor) -> None:
        try:
            found = residual_of_block(seen.events, *(t.reshape(-1, t.shape[-1]) for t in (before, after)))
        except UnknownRoleError as error:
            self.reasons["hidden"] = f"{error}, as in {block}"
            return
        self.residual.readers |= found.readers
        self.residual.writers |= found.writers

    def _final(self, model: PreTrainedModel, seen: Recording, stream: Stream) -> None:
        """The norm after the last block, and the head that reads it."""
        last = stream.hidden.reshape(-1, self.width)
        norms = [e for e in seen.events if e.inputs.shape == last.shape and torch.equal(e.inputs, last)]
        names = {id(module): name for name, module in model.named_modules()}
        output = model.get_output_embeddings()
        self.head = names.get(id(output), "")
        try:
            if len(norms) != 1:
                raise UnknownRoleError("the last block's output is read by more or else than one norm")
            self.final = readers_of(norms[0], seen.events)
            if set(self.final) != {self.head}:
                raise UnknownRoleError(f"what {norms[0].name} returns is not what the output head reads")
        except UnknownRoleError as error:
            self.reasons["hidden"] = str(error)


def _head_dim(config) -> int:
    found = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    return found or config.hidden_size // config.num_attention_heads


class Fold:
    """
    The changes of each tensor, and the checkpoint that they make.

    Attributes:
        across (`dict[str, int]`): name on disk -> the dimension of that tensor that is as wide as the residual stream.
    """

    def __init__(self, model: StreamedModel):
        self.model = model
        self.across: dict[str, int] = {}
        self.changes: dict[str, list[Gain | Turn]] = {}
        self.neutral: dict[str, Norm] = {}
        self.parted_head: tuple[str, str] | None = None  # its name on disk, and the name of what it shared
        self.added_bytes = 0

    def residual(self, look: Look, turn: Rotation, reading: Rotation | None = None, part: bool = False) -> None:
        """
        R1.

        Args:
            look (`Look`): who reads and writes the stream.
            turn (`Rotation`): of the stream.
            reading (`Rotation`, *optional*): what the readers' inputs are multiplied by, if not by the same.
            part (`bool`, *optional*): give a head that shares its weight one of its own in any case.

        Raises:
            UnknownRoleError: a weight is stored in another form than it is used in.
        """
        skeleton, roles, head = self.model.skeleton, look.residual, look.head
        reading = reading or turn
        if skeleton.config.get_text_config() is not skeleton.config:
            raise UnknownRoleError("what the model makes of images enters the residual stream beside the embeddings")
        embedding = self._name_of(skeleton.get_input_embeddings())
        embedding_key = self._key(f"{embedding}.weight")
        if self.model.tensors[embedding_key].shape[-1] != look.width:
            raise UnknownRoleError("the embeddings are not as wide as the residual stream")
        self._across(embedding_key, 1, Turn(1, (0,), turn))
        for name in roles.writers:
            dim = self._dims(name)[1]
            self._across(self._key(f"{name}.weight"), dim, Turn(dim, (0,), turn))
            if (bias := self.model.sources.get(f"{name}.bias")) is not None:
                self._across(bias, 0, Turn(0, (0,), turn))
        for name, norm in roles.readers.items():
            self._read(self._key(f"{name}.weight"), self._dims(name)[0], norm, reading)
        norm = look.final[head]
        tied = head in {name.removesuffix(".weight") for name in skeleton.all_tied_weights_keys}
        if not (tied and ties_embeddings(skeleton.config)):
            return self._read(self._key(f"{head}.weight"), 1, norm, reading)
        gain = Gain(1, self.model.tensors[self._key(norm.parameter)], norm).values()
        if part or not (gain == gain[0]).all():  # one number for all commutes with the rotation, and the tie may stay
            key = self.model.sources.get(f"{head}.weight", f"{head}.weight")
            self.parted_head = key, embedding_key
            self.added_bytes = self.model.tensors[embedding_key].nbytes
            self._read(key, 1, norm, reading)

    def heads(self, blocks: list[Heads], turn: Rotation) -> None:
        """
        R2.

        Raises:
            UnknownRoleError: a weight is stored in another form than it is used in.
        """
        for found in blocks:
            self._add(self._key(f"{found.values}.weight"), Turn(self._dims(found.values)[1], found.rows, turn))
            if (bias := self.model.sources.get(f"{found.values}.bias")) is not None:
                self._add(bias, Turn(0, found.rows, turn))
            self._add(self._key(f"{found.output}.weight"), Turn(self._dims(found.output)[0], found.columns, turn))

    def checkpoint(self, rounded: bool = True) -> Checkpoint:
        """The checkpoint, its tensors read in the original's dtype or, if not `rounded`, in float32."""
        base = self.model.checkpoint
        tensors = dict(self.model.tensors)
        if self.parted_head is not None:
            tensors[self.parted_head[0]] = tensors[self.parted_head[1]]
        for key, changes in self.changes.items():
            # gains belong to what comes in, before it is turned
            ordered = sorted(changes, key=lambda change: isinstance(change, Turn))
            tensors[key] = RotatedTensor(tensors[key], tuple(ordered), rounded)
        for key, norm in self.neutral.items():
            one = torch.full(tensors[key].shape, (1 - norm.offset) / norm.slope, dtype=tensors[key].dtype)
            tensors[key] = StoredTensor(key, one.dtype, tuple(one.shape), value=one)
        config = copy.deepcopy(base.config)
        if self.parted_head is not None:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        made = Checkpoint(
            config, base.name, tensors, base.folder, base.revision, base._tokenizer, base.trust_remote_code
        )
        made.generation_config = base.generation_config
        return made

    @property
    def config_changes(self) -> dict[str, Any]:
        """What config.json must say, in which a model of several parts has a section for its text."""
        if self.parted_head is None:
            return {}
        config, untied = self.model.checkpoint.config, {"tie_word_embeddings": False}
        sections = [name for name in config.sub_configs if getattr(config, name, None) is config.get_text_config()]
        return untied | dict.fromkeys(sections, untied)

    def _read(self, key: str, dim: int, norm: Norm, turn: Rotation) -> None:
        norm_key = self._key(norm.parameter)
        self.neutral[norm_key] = norm
        self.across |= {key: dim, norm_key: 0}
        self._add(key, Gain(dim, self.model.tensors[norm_key], norm), Turn(dim, (0,), turn))

    def _across(self, key: str, dim: int, turn: Turn) -> None:
        self.across[key] = dim
        self._add(key, turn)

    def _add(self, key: str, *changes: Gain | Turn) -> None:
        self.changes.setdefault(key, []).extend(changes)

    def _key(self, parameter: str) -> str:
        key = self.model.sources.get(parameter)
        if key is None:
            raise UnknownRoleError(f"{parameter} is stored in another form than it is used in")
        return key

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.model.skeleton.named_modules() if other is module)

    def _dims(self, linear: str) -> tuple[int, int]:
        """The dimensions of a linear's weight that belong to its input and to its output."""
        return (0, 1) if isinstance(self.model.skeleton.get_submodule(linear), Conv1D) else (1, 0)


@torch.no_grad()
def require_equal(checkpoint: Checkpoint, batch: Batch, logits: Tensor, device: torch.device | str) -> None:
    """
    Raises:
        UnknownRoleError: for `batch` the checkpoint does not give these logits, `(rows, tokens, vocabulary)`.
    """
    found = logits_of(StreamedModel(checkpoint, device, torch.float32), batch)
    varying = (logits - logits.mean(-1, keepdim=True)).norm()
    difference = ((found - logits).norm() / varying).item()
    if not difference <= TOLERANCE:
        raise UnknownRoleError(f"the rotated model's logits would differ by {difference:.2g} of what they vary")


@torch.no_grad()
def logits_of(model: StreamedModel, batch: Batch) -> Tensor:
    """What a model says to a batch: `(rows, tokens, vocabulary)`."""
    [stream] = model.forward_blocks(model.embed([batch]))
    with model.outside(head=True) as whole:
        return model.logits(whole, stream)
