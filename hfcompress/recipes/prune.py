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
"""Prune: an ordinary smaller model, with fewer blocks, feed-forward channels, groups of heads or experts."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from hfcompress.errors import InvalidValueError
from hfcompress.recipes.base import Recipe
from hfcompress.sizes import parse_size


DIMENSIONS = ("depth", "hidden", "ffn", "heads", "experts")
TARGETS = ("target_parameters", "target_size", "target_latency")


@dataclass(frozen=True, kw_only=True)
class Prune(Recipe):
    """
    Take out whole blocks, directions of the residual stream, feed-forward channels, groups of attention heads or experts of a
    mixture. What is left loads as any checkpoint of its architecture does; the steps behind it work on the smaller model.

    Args:
        depth (`float`, *optional*, defaults to 0.0): the share of the decoder blocks that goes.
        hidden (`float`, *optional*, defaults to 0.0): the share of the residual stream that goes, the same for all blocks:
            turned so that what its readers look at comes first. An output head that shares the embeddings' weight gets
            its own.
        ffn (`float`, *optional*, defaults to 0.0): the share of the feed-forward channels that goes, in every block.
        heads (`float`, *optional*, defaults to 0.0): the share of the attention heads that goes, in every block; queries
            go with the keys and values that they share.
        experts (`float`, *optional*, defaults to 0.0): the share of the experts that goes, in every block of a mixture: those
            that add least to what comes out of it, gate times output (REAP, arXiv 2510.13999). Routers choose among the others.
        target_parameters (`int` or `float`, *optional*): parameters of the result, at most, embeddings included, or below 1
            the share of them that stays: the given shares become proportions of what is taken, and are scaled until it fits. Beside other
            dimensions `hidden` goes as it is given, and they are scaled.
        target_size (`int` or `str`, *optional*): the same in bytes of `model*.safetensors`; `3.5GB` is understood.
        target_latency (`float`, *optional*): the same in the time that a token takes, as a share of what it takes in the
            whole model: 0.7 for seven tenths of it. It is timed here, on a block of every shape that is tried.
        rounds (`int`, *optional*, defaults to 1): in how many rounds it goes; each is told anew what the model that the
            last one left is like, and rounds its own sizes. Beside other dimensions `hidden` goes first, in one round.
        multiple (`int`, *optional*, defaults to 64): the width that is left is a multiple of this, or of the
            largest power of two in both.
        criterion (`str`, *optional*, defaults to `"kl"`): which blocks go: `"kl"` (one after the other, each time the one
            without which the predictions change least) or `"influence"` (those that turn their input least, ShortGPT,
            arXiv 2403.03853).
        contiguous (`bool`, *optional*, defaults to `False`): take out neighbouring blocks only.
        rows (`int`, *optional*, defaults to 8): calibration rows on which blocks are chosen.
        refit (`bool`, *optional*, defaults to `True`): let what reads the channels make up for those that go.
        shift (`float`, *optional*, defaults to 1.0): how much it may also make up for what was lost before it, as in
            [`GPTQ`].
        curvature (`bool`, *optional*, defaults to `True`): weigh errors by what each output is worth to the predictions;
            takes one backward pass through the model.
        damping (`float`, *optional*, defaults to 0.01): added to the diagonal of the Gram matrix, as a share of its mean.
    """

    name: ClassVar[str] = "prune"
    needs_inputs: ClassVar[bool] = True

    depth: float = 0.0
    hidden: float = 0.0
    ffn: float = 0.0
    heads: float = 0.0
    experts: float = 0.0
    target_parameters: int | float | None = None
    target_size: int | str | None = None
    target_latency: float | None = None
    rounds: int = 1
    multiple: int = 64
    criterion: Literal["kl", "influence"] = "kl"
    contiguous: bool = False
    rows: int = 8
    refit: bool = True
    shift: float = 1.0
    curvature: bool = True
    damping: float = 0.01

    def __post_init__(self):
        if isinstance(self.target_size, str):
            object.__setattr__(self, "target_size", parse_size(self.target_size))
        super().__post_init__()
        for key in DIMENSIONS:
            if not 0 <= getattr(self, key) < 1:
                raise InvalidValueError(f"prune.{key} is {getattr(self, key)}; it must be at least 0 and below 1.")
        if not any(getattr(self, key) for key in DIMENSIONS):
            raise InvalidValueError(f"prune takes nothing out; set one of {', '.join(DIMENSIONS)}, such as ffn=0.25.")
        for key in ("shift", "damping"):
            if not 0 <= getattr(self, key) <= 1:
                raise InvalidValueError(f"prune.{key} is {getattr(self, key)}; it must lie between 0 and 1.")
        for key in ("rounds", "multiple", "rows"):
            if getattr(self, key) < 1:
                raise InvalidValueError(f"prune.{key} is {getattr(self, key)}; it must be at least 1.")
        given = [key for key in TARGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise InvalidValueError(f"prune has {' and '.join(given)}; give one of them.")
        if self.target_latency is not None and not 0 < self.target_latency < 1:
            raise InvalidValueError(
                f"prune.target_latency is {self.target_latency}; it is a share of the whole model's and must lie between 0 "
                "and 1."
            )
        for key in given:
            least = 0 if key == "target_parameters" else 1
            if key != "target_latency" and (getattr(self, key) < least or not getattr(self, key)):
                raise InvalidValueError(
                    f"prune.{key} is {getattr(self, key)}; it must be {'above 0' if least == 0 else 'at least 1'}."
                )
        if given and self.rounds > 1:
            raise InvalidValueError(
                f"prune.{given[0]} is met in one round; leave prune.rounds out, or give shares alone."
            )
        if self.target_latency is not None and self.hidden and self._others:
            raise InvalidValueError(
                "prune.target_latency scales hidden by itself, or depth, ffn and heads together; leave hidden out, or take "
                "it first in a run of its own."
            )
        if self.overrides or self.ignore or self.targets != Recipe.targets:
            raise InvalidValueError("prune takes no targets, ignore or overrides: all blocks keep the same shapes.")

    @property
    def target(self) -> tuple[str, int | float | None]:
        """Which size is asked for, and how large it may be."""
        key = next((key for key in TARGETS if getattr(self, key) is not None), TARGETS[0])
        return key, getattr(self, key)

    @property
    def is_whole(self) -> bool:
        """Whether it is done in one go: one round, and the residual stream by itself."""
        return self.rounds == 1 and not (self.hidden and self._others)

    @property
    def _others(self) -> list[str]:
        """What goes beside the residual stream."""
        return [key for key in DIMENSIONS if key != "hidden" and getattr(self, key)]

    @property
    def in_two(self) -> "tuple[Prune, Prune]":
        """
        All rounds but the last, and the last one, whose shares are of what is left then; of one round, the residual
        stream and everything else. Beside others the residual stream goes before them, and in one round.
        """
        if self.rounds == 1:
            return replace(self, **dict.fromkeys(self._others, 0.0), **dict.fromkeys(TARGETS)), replace(
                self, hidden=0.0
            )
        before = {key: getattr(self, key) * (self.rounds - 1) / self.rounds for key in DIMENSIONS}
        if self._others:
            before["hidden"] = self.hidden
        last = {key: 1 - (1 - getattr(self, key)) / (1 - before[key]) for key in DIMENSIONS}
        return replace(self, rounds=self.rounds - 1, **before), replace(self, rounds=1, **last)

    def check_place(self, before, after):
        """It comes first."""
        if before:
            raise InvalidValueError(
                f"prune changes the model that all other steps see: put it before {before[0].name}."
            )
        if after and after[0].name == "tune" and not (self.ffn or self.heads or (self.hidden and self.refit)):
            raise InvalidValueError(
                "tune moves what prune leaves of a block, and here it leaves blocks as they are or unfitted; name ffn, heads "
                "or hidden with refit, or leave tune out."
            )
        library = next((step for step in after if hasattr(step, "quantization_config")), None)
        if library is not None:
            raise InvalidValueError(
                f"{library.name} reads a model from a folder: prune first, then run it on the result."
            )
