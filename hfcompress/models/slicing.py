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
A checkpoint with a narrower residual stream, of which the first coordinates in a new orthogonal basis are kept.

The stream is turned by one matrix `Q` for the whole model, as in [`hfcompress.models.rotation`], and its last coordinates
are left out of everything that writes and reads it (SliceGPT, arXiv 2401.15024, which has a matrix for every block and
needs a product with `Q_i^T Q_(i+1)` between them; with one for all it is the identity, and the result a plain model of
the same architecture). An RMS norm over `d` of `D` coordinates gives `sqrt(d / D)` of what the norm over all would give
if the others were zero, where `eps` is `D / d` times as large; what reads it makes up for that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.checkpoint import Checkpoint, TensorView
from hfcompress.models.residual import UnknownRoleError
from hfcompress.models.rotation import Fold, Look, logits_of, require_equal
from hfcompress.models.shallow import changed_config, merged, nested, reason_of, stored_key
from hfcompress.models.streaming import StreamedModel, build_skeleton
from hfcompress.solvers.rotation import Rotation


NORM_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


@dataclass(frozen=True)
class SlicedTensor(TensorView):
    """
    The first entries of a tensor along a dimension; see [`hfcompress.models.checkpoint.StoredTensor`].

    Args:
        stored: the whole.
        dim (`int`): along which.
        size (`int`): how many.
        filled (`bool`, *optional*, defaults to `False`): keep the shape, with zeros in place of the others.
    """

    dim: int
    size: int
    filled: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        whole = tuple(self.stored.shape)
        return whole if self.filled else (*whole[: self.dim], self.size, *whole[self.dim + 1 :])

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes if self.filled else self.stored.nbytes // self.stored.shape[self.dim] * self.size

    def read(self) -> Tensor:
        """The sliced tensor; a copy."""
        value = self.stored.read()
        kept = value.narrow(self.dim, 0, self.size)
        if not self.filled:
            return kept.clone()
        found = torch.zeros_like(value)
        found.narrow(self.dim, 0, self.size).copy_(kept)
        return found

    def __getitem__(self, index) -> Tensor:
        return self.read()[index]


class Slicer:
    """
    Args:
        model (`StreamedModel`): the whole model, in float32.

    Raises:
        UnsupportedModelError: its stream cannot be turned.
    """

    def __init__(self, model: StreamedModel):
        self.model, self.look = model, Look(model, hidden=True, heads=False)
        if (why := self.look.reasons.get("hidden")) is not None:
            raise self._refusal(why)

    def narrow(self, size: int, basis: Tensor, rounded: bool = True) -> Checkpoint:
        """
        Args:
            size (`int`): coordinates that are kept.
            basis (`Tensor`): `Q`, float64 `(hidden_size, hidden_size)`, orthogonal; its first columns are kept.
            rounded (`bool`, *optional*, defaults to `True`): read the tensors in their own dtypes, not in float32.

        Returns:
            `Checkpoint`: the narrower checkpoint, whose tensors are read from the whole one.
        """
        ones = torch.ones(self.look.width, dtype=torch.float64)
        turn = Rotation(ones, (basis,))
        fold = self._fold(turn, Rotation(ones * (self.look.width / size) ** 0.5, (basis,)))
        made = fold.checkpoint(rounded)
        made.config = self.config(size)
        made.tensors = _sliced(made.tensors, fold, size)
        return made

    def check(self, size: int) -> None:
        """
        That the architecture builds such a model, and that this one says what the whole one would say if the other
        coordinates were zero.

        Raises:
            UnsupportedModelError: it does not.
        """
        turn = Rotation(torch.ones(self.look.width, dtype=torch.float64), (torch.eye(self.look.width).double(),))
        made = self.narrow(size, turn.factors[0], rounded=False)
        built = dict(build_skeleton(made, self.model.dtype).named_parameters())
        sources = {name: key for name, key in self.model.sources.items() if name in built}
        for name, key in sources.items():
            if tuple(built[name].shape) != tuple(made.tensors[key].shape):
                raise self._refusal(
                    f"{name} would be {list(made.tensors[key].shape)}, and transformers makes it {list(built[name].shape)}"
                )
        fold = self._fold(turn, turn)
        filled = fold.checkpoint(rounded=False)
        filled.tensors = _sliced(filled.tensors, fold, size, filled=True)
        device, batch = self.model.device, self.look.batch
        try:
            require_equal(made, batch, logits_of(StreamedModel(filled, device, torch.float32), batch), device)
        except UnknownRoleError as error:
            raise self._refusal("something in it depends on how wide the stream is") from error

    def config(self, size: int):
        """
        The configuration of such a model.

        Raises:
            UnsupportedModelError: transformers does not take it.
        """
        try:
            return changed_config(self.model.checkpoint.config, self.changes(size))
        except (ValueError, StrictDataclassError) as error:
            raise self._refusal(reason_of(error), "take another share, or leave out prune.hidden") from error

    def changes(self, size: int) -> dict[str, Any]:
        """What config.json must say of a model whose stream has `size` coordinates."""
        turn = Rotation(torch.ones(self.look.width), (torch.eye(self.look.width),))
        return merged(self._width_changes(size), self._fold(turn, turn).config_changes)

    def _width_changes(self, size: int) -> dict[str, Any]:
        text = self.model.skeleton.config.get_text_config()
        changes = {stored_key(text, "hidden_size"): size, "head_dim": self.look.head_dim}
        for key in NORM_KEYS:
            if isinstance(value := getattr(text, key, None), float):
                changes[key] = value * self.look.width / size
        return nested(self.model.checkpoint.config, changes)

    def _fold(self, turn: Rotation, reading: Rotation) -> Fold:
        fold = Fold(self.model)
        try:
            fold.residual(self.look, turn, reading, part=True)
        except UnknownRoleError as error:
            raise self._refusal(str(error)) from error
        return fold

    def _refusal(self, why: str, advice: str = "leave out prune.hidden") -> UnsupportedModelError:
        name = type(self.model.skeleton).__name__
        return UnsupportedModelError(
            f"The residual stream of {self.model.checkpoint.name} ({name}) cannot be made narrower ({why}); {advice}."
        )


def _sliced(tensors: Mapping[str, Any], fold: Fold, size: int, filled: bool = False) -> dict[str, Any]:
    across = fold.across
    return {k: SlicedTensor(t, across[k], size, filled) if k in across else t for k, t in tensors.items()}
