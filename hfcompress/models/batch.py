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
"""Rows that go through a model together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hfcompress.models.encoder_decoder import FRAMES, encoded, hears, reads_and_writes, sound_shape


NOISE = 0  # its seed


@dataclass
class Batch:
    """
    Rows that go through the model together.

    Args:
        input_ids (`Tensor`): int64 `(rows, seq_len)`; where there are an encoder and a decoder, what both read, or what the
            decoder reads if the encoder hears.
        mask (`Tensor` or `None`): bool `(rows, seq_len)`, false on padding; `None` where there is none.
        sound (`Tensor` or `None`): float `(rows, mel bins, frames)`: what an encoder hears.
        heard (`int`, *optional*, defaults to 0): how many positions the encoder makes of that.
    """

    input_ids: Tensor
    mask: Tensor | None = None
    sound: Tensor | None = None
    heard: int = 0

    @property
    def read(self) -> int:
        """How many positions are an encoder's that a decoder reads, in a model with both."""
        return self.heard or encoded(self.input_ids.shape[1])

    @property
    def length(self) -> int:
        """How many positions a row has in all."""
        return self.heard + self.input_ids.shape[1]

    def rows(self, which: Any) -> "Batch":
        """Some of the rows, by a slice or their numbers."""
        others = {name: part[which] for name in ("mask", "sound") if (part := getattr(self, name)) is not None}
        return replace(self, input_ids=self.input_ids[which], **others)

    def split(self, rows: int) -> "list[Batch]":
        """Pieces of at most `rows` rows."""
        return [self.rows(slice(start, start + rows)) for start in range(0, len(self.input_ids), rows)]

    @staticmethod
    def joined(batches: "Sequence[Batch]") -> "Batch":
        """The rows of all of them; there is at least one, and where one has a mask, those without have none masked."""
        masks = None
        if any(batch.mask is not None for batch in batches):
            masks = torch.cat(
                [torch.ones_like(b.input_ids, dtype=torch.bool) if b.mask is None else b.mask for b in batches]
            )
        sound = [batch.sound for batch in batches if batch.sound is not None]
        ids = torch.cat([batch.input_ids for batch in batches])
        return Batch(ids, masks, torch.cat(sound) if sound else None, batches[0].heard)

    def mask_of(self, made: Any) -> Tensor | None:
        """
        The mask of what was made of the rows, or of the encoder's or decoder's part of them, `(rows, positions, ...)`; of anything
        that is no tensor that of the rows.
        """
        if self.mask is None or not isinstance(made, Tensor) or made.dim() < 3:
            return self.mask
        positions = made.shape[1]
        if self.heard:
            heard = torch.ones(len(self.mask), self.heard, dtype=torch.bool)
            whole = {self.heard: None, self.length: torch.cat([heard.to(self.mask.device), self.mask], 1)}
            return whole.get(positions, self.mask)
        parts = {self.read: slice(self.read), self.length - self.read: slice(self.read, None)}
        return self.mask if positions == self.length else self.mask[:, parts.get(positions, slice(None))]

    def inputs(
        self,
        config: PretrainedConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """
        What a model is called with; one with an encoder always with masks, which some would otherwise make of the ids, and only
        where they keep no cache.

        Args:
            config (`PretrainedConfig`): the model's.
            device (`torch.device` or `str`, *optional*): where it is.
            dtype (`torch.dtype`, *optional*): in which it hears.
        """
        ids = self.input_ids.to(device)
        mask = None if self.mask is None else self.mask.to(device).long()
        if not reads_and_writes(config):
            return {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        if self.sound is not None:
            return {"input_features": self.sound.to(device, dtype)} | {
                f"decoder_{name}": rows for name, rows in both.items()
            }
        read = {name: rows[:, : self.read] for name, rows in both.items()}
        return read | {f"decoder_{name}": rows[:, self.read :] for name, rows in both.items()}


def made_up(config: PretrainedConfig, ids: Tensor) -> Batch:
    """
    A batch to look at how a model behaves: rows of ids, and where its encoder hears always the same noise.

    Args:
        config (`PretrainedConfig`): the model's.
        ids (`Tensor`): int64 `(rows, seq_len)`.
    """
    if not hears(config):
        return Batch(ids)
    bins, frames = sound_shape(config)
    noise = torch.randn(1, bins, frames, generator=torch.Generator().manual_seed(NOISE))
    return Batch(ids, None, noise.expand(len(ids), -1, -1), frames // FRAMES)
