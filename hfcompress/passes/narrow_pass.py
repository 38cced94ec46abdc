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
A narrower residual stream as a run of its own.

How it works. The dense model is walked once for the directions in which its stream varies and its readers look. The
stream is cut to the foremost of them ([`hfcompress.models.slicing`]), which gives a checkpoint of its own whose tensors
are still read from the whole one. That goes through the block pass beside the whole model: every linear that reads the
stream gets the weights that bring its outputs closest to those that the whole model's linear has for the same tokens.
"""

import bisect
import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hfcompress.errors import InvalidValueError, UnsupportedModelError
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.residual import Norm
from hfcompress.models.roles import Linear, find_linears, get_weight, linear_shape, watch_inputs
from hfcompress.models.slicing import Slicer
from hfcompress.models.streaming import StreamedModel, build_skeleton
from hfcompress.passes.journal import Journal
from hfcompress.passes.latency import latency
from hfcompress.passes.plan import LinearTask, Plan, untied_head
from hfcompress.passes.processes import Processes
from hfcompress.passes.smaller import bytes_with, keep_sizes, multiple_of, require_same, size_asked
from hfcompress.passes.statistics import flat_tokens
from hfcompress.progress import Progress
from hfcompress.solvers.grid import Grid


HEAD = 0.1  # how much what the output head reads counts beside what the blocks read; none costs 3 % of KL
SMALL = 0.1  # of the stream's mean variance: what a direction must exceed; three times as much costs 1 %, none 3 %
BASIS = "basis"  # of what is kept beside the parts for a run that goes on


@dataclass(frozen=True)
class Reader:
    """
    What is done to a linear that reads the narrower stream; see `passes.plan.Sparsifier`.

    Args:
        key (`str`): its weight's name on disk.
        stored: that weight in the whole model.
        transposed (`bool`): whether it is stored `(in_features, out_features)`.
        damping (`float`): of the Gram matrix.
    """

    name: ClassVar[str] = "prune"
    pattern: ClassVar[str] = "columns"
    structure: ClassVar[None] = None
    reads_inputs: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True
    needs_dense_stream: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = False

    key: str
    stored: Any
    transposed: bool
    damping: float

    def sparsify(self, weight, statistics, linears, curvature=None):
        """
        `W' = W E[x y^T] E[y y^T]^-1` for the dense inputs `x` and the narrower ones `y`; the damping draws it towards the
        sliced weight.
        """
        dense = weight
        if self.stored is not None:
            dense = self.stored.read().to(weight)
            dense = dense.T if self.transposed else dense
        factor = statistics.factor(self.damping, False, linears)
        wanted = dense @ statistics.joint
        missing = (wanted - weight @ statistics.gram).double()
        root = torch.linalg.cholesky(factor.damped(statistics.gram).double())
        found = weight + torch.cholesky_solve(missing.T, root).T.to(weight)
        whole = (dense @ statistics.dense_gram).mul_(dense).sum()
        lost = whole - 2 * (wanted * found).sum() + (found @ statistics.gram).mul_(found).sum()
        error = (lost.clamp(min=0) / whole).sqrt().item() if whole > 0 else 0.0
        details = {"relative_output_error": error, "relative_weight_error": None}
        return found, torch.ones_like(weight, dtype=torch.bool), details


class NarrowPass:
    """
    Args:
        model (`StreamedModel`): the whole model.
        settings ([`hfcompress.recipes.Prune`]): the step; it takes out nothing else.
        tuning ([`hfcompress.recipes.Tune`], *optional*): what comes after every block.
        sizes (`tuple`, *optional*): the coordinates that stay, where an earlier run has settled them.

    Raises:
        InvalidValueError: nothing would go, or a target is out of reach.
        UnsupportedModelError: the architecture has no place for such a model.
    """

    def __init__(self, model: StreamedModel, settings: Any, tuning: Any = None, sizes: tuple[Any, ...] | None = None):
        self.whole, self.settings, self.tuning = model, settings, tuning
        self.slicer = Slicer(StreamedModel(model.checkpoint, model.device, torch.float32))
        self.size = sizes[0] if sizes else self._size()
        self.slicer.check(self.size)
        self._take(torch.eye(self.slicer.look.width, dtype=torch.float64))

    @property
    def dense_model(self) -> StreamedModel:
        """Whose stream the block pass compares with."""
        return self.whole

    def settle(
        self,
        batches: Sequence[Batch],
        writer: CheckpointWriter,
        journal: Journal,
        processes: Processes,
        progress: Progress,
    ) -> None:
        """Find the directions that stay, or take over what an earlier run has found."""
        if self.settings.target_latency is not None and processes.writes:
            keep_sizes(writer, [self.size])
        if writer.holds_stage(BASIS):
            basis = writer.read_stage(BASIS)[BASIS]
        else:
            processes.wait()  # all have looked for it
            basis = self._basis(batches, processes, progress)
            if processes.writes:
                writer.write_stage(BASIS, {BASIS: basis})
        self._take(basis)

    def cut(self, writer: CheckpointWriter, journal: Journal) -> None:
        """Nothing: what the pass has written is as narrow as it will be."""

    def verify(self, made: Checkpoint, journal: Journal) -> None:
        """
        Raises:
            UnsupportedModelError: the model that was written says something else than the one that was solved.
        """
        require_same(StreamedModel(made, self.whole.device, self.whole.dtype), journal)

    @property
    def config_changes(self) -> dict[str, Any]:
        """What config.json must say."""
        return self.slicer.changes(self.size)

    @property
    def manifest(self) -> dict[str, Any]:
        """What `hfcompress.json` says of it."""
        width = self.slicer.look.width
        timed = {}
        if self.settings.target_latency is not None:
            timed["latency"] = {"before": 1.0, "after": self._share(self.size)}
        return {
            "hidden": {"before": width, "after": self.size},
            **timed,
            "kept_blocks": list(range(len(self.whole))),
            "parameters": {"before": self._parameters(width), "after": self._parameters(self.size)},
        }

    # which directions

    @torch.no_grad()
    def _basis(self, batches: Sequence[Batch], processes: Processes, progress: Progress) -> Tensor:
        """
        An orthogonal matrix whose first columns span what is kept. With `G` the second moments of the stream as the norms
        scale it, and `M = R R` what the readers together make of an error, all that they see is told best from `U^T R x`
        for the foremost eigenvectors `U` of `R G R`. Of all weights that tell so much the smallest are taken, `R U` drawn
        to the directions in which the stream varies, so that the norms still see its length.
        """
        progress.step("directions of the residual stream", amount=0)
        look, model = self.slicer.look, self.whole
        width = look.width
        moments = torch.zeros(width, width, dtype=torch.float64, device=model.device)
        heeded = torch.zeros_like(moments)
        streams = model.embed(list(batches)) if batches else []

        def add(name: str, stream_input: Tensor, mask: Tensor | None) -> None:
            x = flat_tokens(stream_input, mask)
            x = x * x.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            moments.add_((x.T @ x).double())

        def heed(norm: Norm, module: Linear, share: float = 1.0) -> None:
            gain = norm.offset + norm.slope * model.tensors[model.sources[norm.parameter]].read().double()
            weight = get_weight(module).double() * gain.to(model.device)
            heeded.add_(weight.T @ weight, alpha=share)

        for index, name in enumerate(model.block_names):
            with model.block(index) as block:
                for reader, module in find_linears(block, name).items():
                    if reader in look.residual.readers:
                        heed(look.residual.readers[reader], module)
                norms = {n.parameter.rpartition(".")[0] for n in look.residual.norms}
                watched = {n: m for n, m in block.named_modules(prefix=name) if n in norms}
                advanced = []
                for stream in streams:
                    with watch_inputs(watched, functools.partial(add, mask=stream.batch.mask)):
                        advanced.append(stream.advanced(model.call(block, index, stream)))
                streams = advanced
        for stream in streams:
            add("", stream.hidden, stream.batch.mask)
        with model.outside(head=True) as whole:
            head: Any = whole.get_output_embeddings()
            heed(look.final[look.head], head, HEAD)
        moments = processes.sum(moments).cpu()
        levels, vectors = torch.linalg.eigh(heeded.cpu())
        root = (vectors * levels.clamp(min=0).sqrt()) @ vectors.T
        _, foremost = torch.linalg.eigh(root @ moments @ root)
        drawn = moments + SMALL * moments.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        basis, _ = torch.linalg.qr(torch.linalg.solve(drawn, moments @ root @ foremost.flip(1)))
        return basis

    # what follows from them

    def _take(self, basis: Tensor) -> None:
        self.basis = basis[:, : self.size]
        self.model = StreamedModel(self.slicer.narrow(self.size, basis), self.whole.device, self.whole.dtype)
        self.plan = self._plan()

    def _plan(self) -> Plan:
        """The readers as tasks of a block pass."""
        look, blocks = self.slicer.look, []
        for name in self.model.block_names:
            linears = find_linears(self.model.skeleton.get_submodule(name), name)
            blocks.append({n: self._task(n, m, n in look.residual.readers) for n, m in linears.items()})
        head = untied_head(self.model)
        if not self.settings.refit:
            blocks, head = [{} for _ in blocks], None
        task = None
        if head is not None:
            task = self._task(head, self.model.skeleton.get_output_embeddings(), True)
        names = {name for tasks in blocks for name in tasks} | {head}
        every = [n for n, m in self.model.skeleton.named_modules() if isinstance(m, nn.Linear)]
        return Plan(
            blocks=blocks,
            head=task,
            untouched=[name for name in every if name not in names],
            needs_inputs=self.settings.refit,
            needs_dense_stream=self.settings.refit,
            tuning=self.tuning,
            caches=[{} for _ in blocks],
        )

    def _task(self, name: str, module: Any, reads: bool) -> LinearTask:
        shape = linear_shape(name, module)
        key = self.model.sources[f"{name}.weight"]
        # a head that shared its weight had none of its own
        stored = self.whole.tensors.get(key) or self.whole.tensors[self._embeddings_key]
        reader = Reader(key, stored if reads else None, shape.transposed, self.settings.damping)
        return LinearTask(
            shape=shape,
            settings=reader,
            grid=Grid(8 * stored.dtype.itemsize, type="plain"),
            stem=key.removesuffix(".weight"),
            scale_dtype=stored.dtype,
            sparsity=reader,
        )

    @property
    def _embeddings_key(self) -> str:
        table = self.whole.skeleton.get_input_embeddings()
        name = next(name for name, module in self.whole.skeleton.named_modules() if module is table)
        return self.whole.sources[f"{name}.weight"]

    # how much

    def _size(self) -> int:
        """Coordinates that stay."""
        settings, width = self.settings, self.slicer.look.width
        multiple = multiple_of(width, settings.multiple)
        size = max(multiple, round(width * (1 - settings.hidden) / multiple) * multiple)
        key, most = size_asked(settings, self._parameters(width))
        if most is not None:
            measures = {
                "target_parameters": self._parameters,
                "target_size": self._bytes,
                "target_latency": self._share,
            }
            measure = measures[key]
            sizes = [n for n in range(multiple, width, multiple) if self._possible(n)]
            fitting = bisect.bisect_right(sizes, most, key=measure)
            if not fitting:
                least = min(sizes, default=width)
                raise InvalidValueError(
                    f"prune.{key} is {most:,}, and a residual stream of {least} still makes it {measure(least):,}; name more of depth, ffn, heads instead of hidden."
                )
            return sizes[fitting - 1]
        if size >= width:
            raise InvalidValueError(
                f"prune.hidden is {settings.hidden:g}, and of a residual stream of {width} only multiples of {multiple} "
                "are taken out; raise prune.hidden, or lower prune.multiple."
            )
        if self._parameters(size) >= self._parameters(width):
            raise InvalidValueError(
                f"With prune.hidden={settings.hidden:g} the output head gets a weight of its own beside the embeddings', "
                f"and the model would have {self._parameters(size):,} parameters instead of {self._parameters(width):,}; "
                "raise it, or take depth, ffn or heads instead."
            )
        return size

    def _possible(self, size: int) -> bool:
        """Whether transformers takes such a width; some ask for a multiple of the heads."""
        try:
            self.slicer.config(size)
        except UnsupportedModelError:
            return False
        return True

    @functools.cache  # noqa: B019 (the pass lives as long as the run)
    def _parameters(self, size: int) -> int:
        """Parameters of a model of that width, as transformers builds it, tied ones once."""
        checkpoint = copy.copy(self.whole.checkpoint)
        if size < self.slicer.look.width:
            checkpoint.config = self.slicer.config(size)
        built = build_skeleton(checkpoint, self.whole.dtype)
        built.tie_weights()
        return sum(parameter.numel() for parameter in built.parameters())

    @functools.cache  # noqa: B019 (the pass lives as long as the run)
    def _seconds(self, size: int) -> float:
        """The time of a token in a model of that width."""
        config = None if size == self.slicer.look.width else self.slicer.config(size)
        return latency(self.whole, config).of(len(self.whole))

    def _share(self, size: int) -> float:
        """The same as a share of that in the whole model."""
        return round(self._seconds(size) / self._seconds(self.slicer.look.width), 3)

    def _bytes(self, size: int) -> int:
        return bytes_with(self.whole, self._parameters(self.slicer.look.width), self._parameters(size))
