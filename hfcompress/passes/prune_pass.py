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
Structured pruning as a run of its own: first whole blocks, then experts, channels and heads of those that stay.

How it works. Which blocks stay is settled on the predictions of the whole model, which experts by what they add to the
stream. What is left is seen as a checkpoint of
its own, whose tensors are still read from the whole one, and goes through the block pass, where the readers of the
channels that go are solved as sparse weights ([`hfcompress.passes.width`]). The parts that the pass has written are cut
afterwards.
"""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError

from hfcompress.errors import InvalidValueError
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.experts import are_apart
from hfcompress.models.fewer_experts import expert_changes, expert_groups, experts_of, fewer_experts
from hfcompress.models.shallow import changed_config, depth_changes, merged, shallow
from hfcompress.models.streaming import StreamedModel, build_skeleton
from hfcompress.passes.depth import blocks_to_keep
from hfcompress.passes.experts import experts_to_keep
from hfcompress.passes.journal import Journal
from hfcompress.passes.latency import Latency, latency
from hfcompress.passes.plan import Plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.smaller import bytes_with, keep_sizes, multiple_of, require_same, size_asked
from hfcompress.passes.width import Widths, ffn_width, key_value_heads, width_changes
from hfcompress.progress import Progress


NAME, EXPERTS = "prune", "experts"
Sizes = tuple[int, int | None, int | None, int | None]  # blocks, feed-forward channels, groups of heads, experts
SIZES = ("blocks", "hidden", "ffn", "heads", "experts", "parameters")
SEARCH = 12  # bisections of how much is taken, where a size is asked for


class PrunePass:
    """
    Args:
        model (`StreamedModel`): the whole model.
        settings ([`hfcompress.recipes.Prune`]): the step.
        tuning ([`hfcompress.recipes.Tune`], *optional*): what comes after every block.
        sizes (`tuple`, *optional*): blocks, feed-forward channels, groups of heads and experts of a block that stay, where an
            earlier run has settled them.
        original (`int`, *optional*): parameters of the model of which a share shall stay; this one's if left out.

    Raises:
        InvalidValueError: nothing, or everything, would go.
        UnsupportedModelError: the architecture has no place for such a model.
    """

    def __init__(
        self,
        model: StreamedModel,
        settings: Any,
        tuning: Any = None,
        sizes: tuple[Any, ...] | None = None,
        original: int | None = None,
    ):
        self.whole, self.model, self.settings, self.tuning = model, model, settings, tuning
        self.original = original or self._parameters(len(model), None, None, None)
        self.blocks, self.ffn, self.groups, self.experts = sizes or self._sizes()
        self.expert_changes = {} if self.experts is None else expert_changes(model, self.experts)
        self.widths = Widths(model, settings, self.ffn, self.groups, tuning)
        self.kept = list(range(len(model)))
        self.depth_changes: dict[str, Any] = {}

    dense_model: ClassVar[None] = None  # the pass compares with the model that it walks
    basis: ClassVar[None] = None

    @property
    def plan(self) -> Plan:
        """What the block pass does."""
        return self.widths.plan

    @property
    def config_changes(self) -> dict[str, Any]:
        """What config.json must say."""
        return merged(merged(self.depth_changes, self.expert_changes), self.widths.config_changes)

    def settle(
        self,
        batches: Sequence[Batch],
        writer: CheckpointWriter,
        journal: Journal,
        processes: Processes,
        progress: Progress,
    ) -> None:
        """Choose the blocks that stay, or take over what an earlier run has chosen."""
        if self.settings.target_latency is not None and processes.writes:
            keep_sizes(writer, self._result)
        if self.blocks < len(self.whole):
            self._take_blocks(batches, journal, processes, progress)
        if self.experts is not None:
            self._take_experts(self.experts, batches, writer, processes, progress)

    def _take_blocks(
        self, batches: Sequence[Batch], journal: Journal, processes: Processes, progress: Progress
    ) -> None:
        if journal.kept_blocks is None:
            count = len(self.whole) - self.blocks
            kept = blocks_to_keep(self.whole, count, self.settings, batches, processes, progress)
            journal.keep_blocks(kept, write=processes.writes)
        assert journal.kept_blocks is not None
        self.kept = journal.kept_blocks
        checkpoint, self.depth_changes = shallow(self.whole, self.kept)
        self._see(checkpoint)

    def _take_experts(
        self,
        count: int,
        batches: Sequence[Batch],
        writer: CheckpointWriter,
        processes: Processes,
        progress: Progress,
    ) -> None:
        if writer.holds_stage(EXPERTS):
            kept = {name: places.tolist() for name, places in writer.read_stage(EXPERTS).items()}
        else:
            processes.wait()  # all have looked for it
            kept = experts_to_keep(self.model, count, batches, processes, progress)
            if processes.writes:
                writer.write_stage(EXPERTS, {name: torch.tensor(places) for name, places in kept.items()})
        self._see(fewer_experts(self.model, kept)[0])

    def _see(self, checkpoint: Checkpoint) -> None:
        """Go on with a smaller model."""
        self.model = StreamedModel(checkpoint, self.whole.device, self.whole.dtype)
        self.widths = Widths(self.model, self.settings, self.ffn, self.groups, self.tuning)

    def cut(self, writer: CheckpointWriter, journal: Journal) -> None:
        """Leave out of the written parts what goes; to do it twice is to do it once."""
        if NAME not in journal.stages:
            assert journal.witness is not None
            journal.commit_stage(NAME, {"step": NAME}, self._cut_rows(journal), journal.witness)
        for index, cuts in enumerate(self.widths.cuts):
            if cuts:
                part = f"block-{index:05d}"
                writer.write_part(part, self.widths.cut(index, writer.read_part(part)))

    def verify(self, made: Checkpoint, journal: Journal) -> None:
        """
        Ask the smaller model, as it was written, what the pruned one was asked while it still had its old shapes.

        Raises:
            UnsupportedModelError: it says something else.
        """
        require_same(StreamedModel(made, self.whole.device, self.whole.dtype), journal)

    @property
    def manifest(self) -> dict[str, Any]:
        """What `hfcompress.json` says of it."""
        text = self.whole.skeleton.config.get_text_config()
        sizes = {
            "blocks": (len(self.whole), self.blocks),
            "ffn": (ffn_width(text) if self.ffn else None, self.ffn),
            "heads": (text.num_attention_heads, self._heads(self.groups)) if self.groups else (None, None),
            "experts": (experts_of(self.whole), self.experts) if self.experts is not None else (None, None),
        }
        changed = {key: {"before": a, "after": b} for key, (a, b) in sizes.items() if b is not None and a != b}
        before, after = self._parameters(len(self.whole), None, None, None), self._parameters(*self._result)
        if self.settings.target_latency is not None:
            changed["latency"] = {"before": 1.0, "after": self._share(*self._result)}
        return {**changed, "kept_blocks": self.kept, "parameters": {"before": before, "after": after}}

    # how much

    @property
    def _result(self) -> Sizes:
        return self.blocks, self.ffn, self.groups, self.experts

    def _sizes(self) -> Sizes:
        """Blocks, feed-forward channels, groups of heads and experts that stay; `None` where none go."""
        settings = self.settings
        key, most = size_asked(settings, self.original)
        if most is None:
            return self._sizes_at(1.0)
        measures = {"target_parameters": self._parameters, "target_size": self._bytes, "target_latency": self._share}
        measure = measures[key]
        low, high = 0.0, 1 / max(settings.depth, settings.ffn, settings.heads, settings.experts)
        least = measure(*self._sizes_at(high, strict=False))
        if least > most:
            raise InvalidValueError(
                f"prune.{key} is {most:,}, and with all that can go of what is named {least:,} stay; name more of depth, "
                "ffn, heads, experts."
            )
        for _ in range(SEARCH):
            middle = (low + high) / 2
            fits = measure(*self._sizes_at(middle, strict=False)) <= most
            low, high = (low, middle) if fits else (middle, high)
        return self._sizes_at(high, strict=False)

    def _sizes_at(self, scale: float, strict: bool = True) -> Sizes:
        settings, text = self.settings, self.whole.skeleton.config.get_text_config()
        total = len(self.whole)
        blocks = max(1, total - round(total * min(settings.depth * scale, 1)))
        ffn = groups = None
        if settings.ffn:
            width = ffn_width(text)
            multiple = multiple_of(width, settings.multiple)
            ffn = max(multiple, round(width * (1 - min(settings.ffn * scale, 1)) / multiple) * multiple)
            if strict and ffn >= width:
                raise InvalidValueError(
                    f"prune.ffn is {settings.ffn:g}, and of {width} channels only multiples of {multiple} are taken out; "
                    "raise prune.ffn, or lower prune.multiple."
                )
            ffn = None if ffn >= width else ffn
        if settings.heads:
            every = key_value_heads(text)
            groups = max(1, every - round(every * min(settings.heads * scale, 1)))
            if strict and groups == every:
                raise InvalidValueError(
                    f"prune.heads is {settings.heads:g}, and there are {every} groups of heads; give at least {1 / every:.2g}."
                )
            if not strict:  # a target passes over what transformers refuses
                groups = max((fewer for fewer in range(1, groups + 1) if self._possible(fewer)), default=every)
            groups = None if groups == every else groups
        if strict and settings.depth and blocks == total:
            raise InvalidValueError(
                f"prune.depth is {settings.depth:g}, and there are {total} blocks; give at least {1 / total:.2g}."
            )
        return blocks, ffn, groups, self._experts_at(settings.experts * scale, strict) if settings.experts else None

    def _experts_at(self, share: float, strict: bool) -> int | None:
        """Experts of a block that stay where this share goes; `None` for all."""
        every, groups = experts_of(self.whole), expert_groups(self.whole)
        text = self.whole.skeleton.config.get_text_config()
        chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k", None) or 1
        # groups that a token is sent to, each by its best two
        reached = int(getattr(text, "topk_group", None) or groups)
        least = groups * max(math.ceil(chosen / reached), min(2, groups))
        count = max(least, groups * round(every * (1 - min(share, 1)) / groups))
        if strict and count >= every:
            raise InvalidValueError(
                f"prune.experts is {self.settings.experts:g}, and of {every} experts of a block, {chosen} of which every token "
                f"is sent to, multiples of {groups} can go; give at least {groups / every:.2g}, or leave it out."
            )
        if strict and every * (1 - share) < least - 0.5:
            raise InvalidValueError(
                f"prune.experts is {self.settings.experts:g}, and every token is sent to {chosen} of the {every} experts of a "
                f"block, so that at least {least} must stay; give at most {1 - least / every:.2g}."
            )
        return None if count >= every else count

    @functools.cache  # noqa: B019 (the pass lives as long as the run)
    def _possible(self, groups: int) -> bool:
        """Whether transformers takes so many groups of heads; some ask that the heads divide the width."""
        config = self.whole.checkpoint.config
        try:
            changed_config(config, width_changes(config, None, groups))
        except (ValueError, StrictDataclassError):
            return False
        return True

    def _heads(self, groups: int | None) -> int | None:
        text = self.whole.skeleton.config.get_text_config()
        return None if groups is None else text.num_attention_heads // key_value_heads(text) * groups

    def _parameters(self, blocks: int, ffn: int | None, groups: int | None, experts: int | None) -> int:
        """Parameters of a model of that size, tied ones once."""
        outside = sum(math.prod(self.whole.tensors[key].shape) for key in self.whole.outside_keys)
        return outside + round(blocks * self._block_parameters(ffn, groups, experts))

    def _bytes(self, *sizes: Any) -> int:
        """Bytes of its files at most."""
        return bytes_with(self.whole, self._parameters(len(self.whole), None, None, None), self._parameters(*sizes))

    def _share(self, blocks: int, ffn: int | None, groups: int | None, experts: int | None) -> float:
        """The time of a token in a model of that size, as a share of that in the whole one; experts take none."""
        whole = self._latency(None, None).of(len(self.whole))
        return round(self._latency(ffn, groups).of(blocks) / whole, 3)

    @functools.cache  # noqa: B019 (the pass lives as long as the run)
    def _latency(self, ffn: int | None, groups: int | None) -> Latency:
        config = self.whole.checkpoint.config
        return latency(self.whole, changed_config(config, width_changes(config, ffn, groups)))

    @functools.cache  # noqa: B019 (the pass lives as long as the run)
    def _block_parameters(self, ffn: int | None, groups: int | None, experts: int | None) -> float:
        """
        Parameters of one block, of a model of one block that transformers builds so wide; of a mixture, some of whose blocks
        may have no experts, the mean.
        """
        checkpoint = copy.copy(self.whole.checkpoint)
        counted = range(len(self.whole)) if are_apart(self.whole.skeleton) else range(1)
        changes = merged(depth_changes(checkpoint.config, counted), width_changes(checkpoint.config, ffn, groups))
        if experts is not None:
            changes = merged(changes, expert_changes(self.whole, experts))
        checkpoint.config = changed_config(checkpoint.config, changes)
        built = build_skeleton(checkpoint, self.whole.dtype)
        blocks = [built.get_submodule(self.whole.block_names[index]) for index in counted]
        return sum(parameter.numel() for block in blocks for parameter in block.parameters()) / len(blocks)

    def _cut_rows(self, journal: Journal) -> dict[str, list[dict[str, Any]]]:
        """What is reported of the linears, with the shapes and bytes that they then have."""

        def cut(row: dict[str, Any]) -> dict[str, Any]:
            share = row["kept"] / row["units"]
            shape = [row["shape"][0], round(row["shape"][1] * share)]
            return {**row, "shape": shape, "bytes": round(row["bytes"] * share), "sparsity": 0.0}

        return {name: [cut(row) for row in rows] for name, rows in journal.blocks.items()}


def together(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """[`PrunePass.manifest`] of two rounds, one after the other."""
    said = {**before, **after, "kept_blocks": [before["kept_blocks"][index] for index in after["kept_blocks"]]}
    for key in (key for key in SIZES if key in before and key in after):
        said[key] = {"before": before[key]["before"], "after": after[key]["after"]}
    return said
