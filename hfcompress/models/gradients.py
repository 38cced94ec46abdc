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
"""How much the model's predictions hang on every linear's output, by one streamed backward pass.

How it works: a label is drawn from the model's own prediction at every position, so that the squared gradient of the
log-likelihood is, in expectation, the Fisher information: half of it is the curvature of KL(model || changed model)
at no change. The blocks are gone through once forwards, keeping what each receives, and once backwards, each run again
with gradients from its kept input. One block is in memory at a time, and no weight has a gradient.
"""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.models.batch import Batch
from hfcompress.models.roles import find_linears
from hfcompress.models.streaming import Stream, StreamedModel


LOGIT_BYTES = 1 << 26  # of one batch's logits in float32
STORED_BYTES = 1 << 30  # of what waits for the way back


class SquaredGradients:
    """
    Sums over the rows that have been added; those of several processes may be summed up.

    Args:
        model (`StreamedModel`): the model.
        linears (`Mapping[str, int]`): name -> out_features of the linears that matter; the output head may be one.
        seed (`int`): of the labels; row `i` draws its own by `seed` and `i`.

    Attributes:
        sums (`dict[str, Tensor]`): name -> float32 `(out_features,)`: the squared derivatives of the summed
            log-likelihood of the labels by every output of the linear, summed over all tokens.
        positions (`int`): labels that were drawn.
    """

    def __init__(self, model: StreamedModel, linears: Mapping[str, int], seed: int = 0):
        self.model, self.seed = model, seed
        self.sums = {name: torch.zeros(width, device=model.device) for name, width in linears.items()}
        self.positions = 0

    def add(self, batch: Batch, first: int = 0) -> None:
        """
        Add rows, as many at a time as [`STORED_BYTES`] allows.

        Args:
            batch (`Batch`): the rows.
            first (`int`, *optional*, defaults to 0): the number of its first row, by which labels are drawn.
        """
        config = self.model.skeleton.config.get_text_config()
        seq_len = batch.length
        stored = seq_len * config.hidden_size * self.model.dtype.itemsize * (len(self.model) + 1)
        together = max(1, STORED_BYTES // stored)
        at_once = max(1, min(together, LOGIT_BYTES // (4 * config.vocab_size * seq_len)))
        for part in batch.split(together):
            self._add(part.split(at_once), first)
            first += len(part.input_ids)

    def _add(self, batches: list[Batch], first: int) -> None:
        streams = self.model.embed(batches)
        received = []
        with torch.no_grad():
            for index in range(len(self.model)):
                received.append(streams)
                with self.model.block(index) as block:
                    streams = [s.advanced(self.model.call(block, index, s)) for s in streams]
        gradients = self._from_the_head(streams, first)
        for index in reversed(range(len(self.model))):
            with self.model.block(index) as block:
                block.requires_grad_(False)
                own = find_linears(block, self.model.block_names[index])
                with self._watched({n: m for n, m in own.items() if n in self.sums}):
                    for number, stream in enumerate(received.pop()):
                        self._left(index, self.model.part(index, stream, gradients[number]))
                        hidden = stream.hidden.detach().requires_grad_()
                        with torch.enable_grad():
                            output = self.model.call(block, index, stream.advanced(hidden))
                        (gradients[number],) = torch.autograd.grad(output, hidden, gradients[number])

    def _from_the_head(self, streams: list[Stream], first: int) -> list[Tensor]:
        """The derivatives by what comes out of the last block, of labels that are drawn here."""
        gradients = []
        with self.model.outside(head=True) as model:
            model.requires_grad_(False)
            head = model.get_output_embeddings()
            names = {name: module for name, module in model.named_modules() if module is head and name in self.sums}
            with self._watched(names):
                for stream in streams:
                    hidden = stream.hidden.detach().requires_grad_()
                    logits = self.model.logits(model, stream.advanced(hidden), gradients=True)
                    of = self._of_labels if head is not None else self._of_states
                    gradients.append(of(logits, hidden, stream.batch, first))
                    first += len(hidden)
        return gradients

    def _of_labels(self, logits: Tensor, hidden: Tensor, batch: Batch, first: int) -> Tensor:
        with torch.enable_grad():
            log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
            likelihood, mask = log_probs.new_zeros(()), batch.mask_of(logits)
            for row, own in enumerate(log_probs):
                kept = slice(None) if mask is None else mask[row, 1:].to(own.device)
                own = own[kept]
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + row)
                labels = torch.multinomial(own.detach().exp().cpu(), 1, generator=generator).to(own.device)
                likelihood = likelihood + own.gather(1, labels).sum()
                self.positions += len(own)
        return torch.autograd.grad(likelihood, hidden)[0]

    def _of_states(self, states: Tensor, hidden: Tensor, batch: Batch, first: int) -> Tensor:
        """Of a model without a head, for which half of the squared error of its states counts: drawn from the normal distribution."""
        drawn = torch.zeros(states.shape)
        for row in range(len(states)):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + row)
            drawn[row] = torch.randn(states.shape[1:], generator=generator)
            kept = torch.ones(states.shape[1], dtype=torch.bool) if batch.mask is None else batch.mask[row]
            drawn[row, ~kept] = 0.0
            self.positions += int(kept.sum())
        return torch.autograd.grad(states, hidden, drawn.to(states))[0]

    @contextlib.contextmanager
    def _watched(self, linears: Mapping[str, nn.Module]) -> Generator[None]:
        """Add up the squares of the gradients that arrive at the outputs of the linears."""

        def hook_for(name: str):
            def arrived(gradient: Tensor) -> None:
                self._arrived(name, gradient.reshape(-1, gradient.shape[-1]).float())

            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                if output.requires_grad:
                    output.register_hook(arrived)

            return hook

        handles = [module.register_forward_hook(hook_for(name)) for name, module in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _arrived(self, name: str, gradients: Tensor) -> None:
        """The gradients `(tokens, out_features)` that came to a linear's output."""
        self.sums[name] += gradients.square().sum(0)

    def _left(self, index: int, gradients: Tensor) -> None:
        """The gradients `(rows, seq_len, hidden_size)` that came to the output of block `index`."""


class GradientCovariances(SquaredGradients):
    """
    The same with the products of gradients by different outputs, for outputs in one block of rows.

    Args:
        model (`StreamedModel`): the model.
        linears (`Mapping[str, int]`): name -> out_features of the linears that matter.
        seed (`int`): of the labels.
        block (`int`): outputs of a block.

    Attributes:
        blocks (`dict[str, list[Tensor]]`): name -> `G^T G` along the diagonal, float32 `(block, block)` each, the last
            maybe smaller; `G` has the derivatives at a token in each row.
        outputs (`list[Tensor]`): the same for the output of each decoder block, whole: `(hidden_size, hidden_size)`.
    """

    def __init__(self, model: StreamedModel, linears: Mapping[str, int], seed: int = 0, block: int = 512):
        super().__init__(model, linears, seed)
        self.blocks = {
            name: [
                torch.zeros(size, size, device=model.device)
                for size in (min(block, width - start) for start in range(0, width, block))
            ]
            for name, width in linears.items()
        }
        hidden = model.skeleton.config.get_text_config().hidden_size
        self.outputs = [torch.zeros(hidden, hidden, device=model.device) for _ in model.block_names]

    def _left(self, index: int, gradients: Tensor) -> None:
        flat = gradients.flatten(0, -2).float()
        self.outputs[index].addmm_(flat.T, flat)

    def _arrived(self, name: str, gradients: Tensor) -> None:
        parts = gradients.split(len(self.blocks[name][0]), 1)
        for covariance, part in zip(self.blocks[name], parts, strict=True):
            covariance.addmm_(part.T, part)
