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
The experts of a mixture as what they are on disk, one linear for each projection of each expert.

transformers keeps all experts of a block in two parameters of three dimensions, and mostly merges them while loading. Here
the merging is left out: on the model without weights, those parameters give way to one `nn.Linear` for each matrix, called as
the checkpoint calls it, or where it holds them together ([`hfcompress.models.fused_experts`]) `gate_proj`, `up_proj` and
`down_proj`. Which names go to which parameter, transformers' own conversions say; routing, gates and activation stay the
architecture's own, and the products are put in by transformers' interface for implementations of experts. So everything that
knows linears knows experts, and whoever watches one is told which tokens were sent to it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import UnsupportedModelError
from hfcompress.models.fused_experts import ExpertStorage, Fused


IMPLEMENTATION = "hfcompress_apart"
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# a watched expert is also shown every so manieth token, sent there or not; of a short row more of them
APART, FEWEST = 16, 64
LARGE = 8  # a matrix of no linear is one of experts if it has more than this part of a block's parameters


@dataclass(frozen=True)
class Routed:
    """
    What a linear of an expert is given.

    Args:
        inputs (`Tensor`): `(count, in_features)`.
        tokens (`Tensor`): int64 `(count,)`: which of the tokens of the batch, rows behind one another, they belong to.
        gates (`Tensor`): float `(count,)`: what the expert's output is multiplied by; zero where the token was not sent to it
            and is only shown, as those at the end are.
        total (`int`): tokens of the batch.
    """

    inputs: Tensor
    tokens: Tensor
    gates: Tensor
    total: int

    def __len__(self) -> int:
        return len(self.tokens)

    def kept(self, mask: Tensor | None) -> "Routed":
        """Without padding, which `mask`, bool `(rows, seq_len)`, is false on."""
        return self if mask is None else self._where(mask.reshape(-1).to(self.tokens.device)[self.tokens])

    @property
    def sent(self) -> "Routed":
        """The tokens that were sent to the expert."""
        return self._where(self.gates != 0)

    @property
    def beside(self) -> Tensor:
        """The inputs of the others."""
        return self.inputs[self.gates == 0]

    def of(self, other: "Routed") -> tuple[Tensor, Tensor]:
        """
        Its inputs for the tokens that `other` holds, and bool which of them it has; what stands at the others is
        arbitrary. Both hold tokens in ascending order.
        """
        if not len(self):
            return torch.zeros_like(other.inputs), torch.zeros_like(other.tokens, dtype=torch.bool)
        place = torch.searchsorted(self.tokens, other.tokens).clamp_(max=len(self) - 1)
        return self.inputs[place], self.tokens[place] == other.tokens

    def _where(self, chosen: Tensor) -> "Routed":
        return Routed(self.inputs[chosen], self.tokens[chosen], self.gates[chosen], self.total)


class ExpertLinear(nn.Linear):
    """A linear of an expert, which is told what it is given besides its input; see [`Routed`]."""

    def forward(
        self, input: Tensor, tokens: Tensor | None = None, gates: Tensor | None = None, total: int = 0
    ) -> Tensor:
        return super().forward(input)


class Expert(nn.Module):
    """
    The linears of one expert.

    Args:
        shapes (`dict[str, tuple[int, int]]`): local name -> `(out_features, in_features)`.
        bias (`bool`): whether they have one.
        dtype (`torch.dtype`): of the weights, which are on the device `meta`.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], bias: bool, dtype: torch.dtype):
        super().__init__()
        for name, (rows, columns) in shapes.items():
            self.add_module(name, ExpertLinear(columns, rows, bias=bias, device="meta", dtype=dtype))

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at what its linears are given."""
        return any(linear._forward_pre_hooks for linear in self.children())


@dataclass(frozen=True)
class Projections:
    """
    The local names of an expert's linears.

    Args:
        first (`tuple[str, ...]`): what is read by `act(gate) * up`: gate and up; or up alone.
        down (`str`): what comes behind.
        together (`bool`): whether transformers finds those of all experts of a block in one tensor alone.
    """

    first: tuple[str, ...]
    down: str
    together: bool


def take_apart(model: PreTrainedModel, mapping: Sequence[Any]) -> ExpertStorage:
    """
    Give every expert linears of its own, in place.

    Args:
        model (`PreTrainedModel`): the model, without weights.
        mapping (`list`): how names on disk become parameters, for this model.

    Returns:
        `ExpertStorage`: how a checkpoint may hold them together.

    Raises:
        UnsupportedModelError: the experts are stored or computed in a way that is not known.
    """
    modules = holders_of_experts(model)
    storage = expert_storage(model, mapping)
    projections = {name: _projections(model, name, module, mapping) for name, module in modules.items()}
    for name, module in modules.items():
        own = {f.parts: f.part_shape for f in storage.held if f.holder == name and len(f.part_shape) == 2}
        shapes = {part.removesuffix(".weight"): shape for parts, shape in own.items() for part in parts}
        dtype = next(module.parameters()).dtype
        experts = [Expert(shapes, module.has_bias, dtype) for _ in range(module.num_experts)]
        for parameter in [n for n, _ in module.named_parameters(recurse=False)]:
            delattr(module, parameter)
        for index, expert in enumerate(experts):
            module.add_module(str(index), expert)
        vars(module)["projections"] = projections[name]
        vars(module)["row_length"] = 0
    if modules:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_apart)
        model.set_experts_implementation(IMPLEMENTATION)
    return storage


@torch.no_grad()
def put_together(model: PreTrainedModel, storage: ExpertStorage) -> None:
    """
    Give the experts of a model that [`take_apart`] has changed, and that has its weights now, back to transformers, in place.

    Args:
        model (`PreTrainedModel`): the model.
        storage (`ExpertStorage`): what [`take_apart`] has returned.
    """
    modules = find_experts(model)
    for name, module in modules.items():
        for fused in (each for each in storage.held if each.holder == name):
            parts = [[model.get_parameter(n) for n in fused.names(index)] for index in range(fused.shape[0])]
            whole = nn.Parameter(fused.whole(parts), requires_grad=False)
            module.register_parameter(fused.name.removeprefix(f"{name}."), whole)
        for index in range(module.num_experts):
            delattr(module, str(index))
        del vars(module)["projections"], vars(module)["row_length"]
    if modules:
        model.set_experts_implementation(model.get_correct_experts_implementation(None))


def expert_storage(model: PreTrainedModel, mapping: Sequence[Any]) -> ExpertStorage:
    """
    How the parameters of a model hold its experts, and a checkpoint may.

    Args:
        model (`PreTrainedModel`): the model, not taken apart.
        mapping (`list`): how names on disk become parameters, for this model.

    Raises:
        UnsupportedModelError: the experts are stored or computed in a way that is not known.
    """
    held, together = [], False
    for name, module in holders_of_experts(model).items():
        projections = _projections(model, name, module, mapping)
        together = together or projections.together
        for local, parameter in module.named_parameters(recurse=False):
            linears = (projections.down,) if local.startswith("down_proj") else projections.first
            kind = "bias" if local.endswith("_bias") else "weight"
            full = f"{name}.{local}"
            [key] = revert_weight_conversion(model, {full: parameter}) if projections.together else [full]
            held.append(
                Fused(
                    full,
                    key,
                    tuple(parameter.shape),
                    tuple(f"{linear}.{kind}" for linear in linears),
                    module.is_transposed and kind == "weight",
                    not module.is_concatenated and len(linears) > 1,
                )
            )
    return ExpertStorage(held, together)


def run_apart(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """
    What an experts module returns, by the linears of its own.

    Args:
        module (`nn.Module`): the module, taken apart.
        hidden (`Tensor`): `(tokens, hidden_size)`.
        top_k_index (`Tensor`): int64 `(tokens, k)`: the experts that each token is sent to.
        top_k_weights (`Tensor`): `(tokens, k)`: what their outputs are multiplied by.

    Returns:
        `Tensor`: `(tokens, hidden_size)`.
    """
    total, projections = len(hidden), module.projections
    found = torch.zeros_like(hidden)
    length = vars(module).get("row_length") or total
    apart = min(APART, max(1, length // FEWEST))
    places = torch.arange(total, device=hidden.device) % length % apart  # by rows, however many go together
    needed = set(top_k_index.unique().tolist())
    for index in range(module.num_experts):
        expert = module.get_submodule(str(index))
        if index not in needed and not expert.is_watched:
            continue
        tokens, place = (top_k_index == index).nonzero(as_tuple=True)
        gates, sent = top_k_weights[tokens, place], len(tokens)
        if expert.is_watched:
            shown = (places == index % apart).nonzero()[:, 0]
            tokens, gates = torch.cat((tokens, shown)), torch.cat((gates, gates.new_zeros(len(shown))))
        x, told = hidden[tokens], (tokens, gates, total)
        first = [_run(expert.get_submodule(name), x, told) for name in projections.first]
        inner = torch.cat(first, -1) if module.is_concatenated else torch.stack(first, -1).flatten(-2)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outputs = _run(expert.get_submodule(projections.down), inner, told)[:sent] * gates[:sent, None]
        found.index_add_(0, tokens[:sent], outputs.to(found.dtype))
    return found


def _run(linear: nn.Module, inputs: Tensor, told: tuple[Tensor, Tensor, int]) -> Tensor:
    """What a linear of an expert returns; one that has taken the place of another is told nothing."""
    return linear(inputs, *told) if isinstance(linear, ExpertLinear) else linear(inputs)


def tell_row_length(block: nn.Module, length: int) -> None:
    """Let the experts of a block know how many tokens a row has: they are given all of a batch behind one another."""
    for module in find_experts(block).values():
        vars(module)["row_length"] = length


def are_apart(model: nn.Module) -> bool:
    """Whether a model has experts with linears of their own."""
    return bool(find_experts(model))


def merges_experts(conversion: Any) -> bool:
    """Whether a conversion of transformers puts the matrices of all experts into one parameter."""
    return isinstance(conversion, WeightConverter) and any(
        isinstance(operation, MergeModulelist) for operation in conversion.operations
    )


def find_experts(model: nn.Module) -> dict[str, Any]:
    """Name -> module, for every module in a model that holds experts, taken apart."""
    return {name: module for name, module in model.named_modules() if "projections" in vars(module)}


def find_routers(model: nn.Module) -> list[str]:
    """
    Names of what decides, beside experts, where a token goes and what of it: modules with a weight that has a row for every
    expert, or one row.
    """
    found = []
    for name, module in find_experts(model).items():
        holder, _, own = name.rpartition(".")
        for child, beside in model.get_submodule(holder).named_modules():
            weight = beside._parameters.get("weight")
            inside = child == own or child.startswith(f"{own}.")
            if weight is not None and not inside and weight.ndim == 2 and weight.shape[0] in (1, module.num_experts):
                found.append(f"{holder}.{child}")
    return found


def holders_of_experts(model: nn.Module) -> dict[str, Any]:
    """Name -> module, of a class that transformers' interface for implementations of experts has been put on."""
    modules = model.named_modules()
    return {n: m for n, m in modules if hasattr(m, "_is_expert_parallel") and hasattr(m, "has_gate")}


def _projections(model: PreTrainedModel, name: str, module: Any, mapping: Sequence[Any]) -> Projections:
    """
    The names of an expert's linears, told from how transformers merges them; names of our own where it does not.

    Raises:
        UnsupportedModelError: it converts them in another way, or they are computed in one.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    sources, known = {}, not module.has_post_expert_norm
    for parameter in (first, "down_proj"):
        for converter in (each for each in mapping if isinstance(each, WeightConverter)):
            target, *others = converter.target_patterns
            if others or not f"{name}.{parameter}".endswith(target.lstrip("\\.")):
                continue
            if merges_experts(converter):
                sources[parameter] = [_local(pattern) for pattern in converter.source_patterns]
                known = known and _is_plain(converter)
            else:
                known = known and [type(operation) for operation in converter.operations] == [Transpose]
    complete = len(sources) == 2 and all(all(names) for names in sources.values())
    plain = not (module.has_bias or module.is_transposed) and module.is_concatenated
    fits = complete and len(sources[first]) == 1 + bool(module.has_gate) and len(sources["down_proj"]) == 1
    if not known or (sources and not (plain and fits)):
        raise UnsupportedModelError(
            f"{type(model).__name__} stores the experts of a block ({name}.{first}) or computes them in a way of its own, which "
            "is not supported yet."
        )
    if sources:
        return Projections(tuple(sources[first]), sources["down_proj"][0], together=False)
    return Projections(("gate_proj", "up_proj") if module.has_gate else ("up_proj",), "down_proj", together=True)


def _is_plain(converter: WeightConverter) -> bool:
    """Whether matrices are only put behind one another: those of all experts, and then gate and up."""
    steps = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _local(pattern: str) -> str:
    """`w1`, of `.experts.*.w1.weight`; empty where it is none."""
    found = re.search(r"\.\*\.(\w+)\.weight\$?$", pattern.replace("\\.", "."))
    return found.group(1) if found else ""


def refuse_other_experts(model: PreTrainedModel, block_names: Sequence[str]) -> None:
    """
    Args:
        model (`PreTrainedModel`): the model, after [`take_apart`].
        block_names (`Sequence[str]`): its decoder blocks.

    Raises:
        UnsupportedModelError: there are experts, and they are not in modules of the kind that is known.
    """
    config = model.config.get_text_config()
    apart = are_apart(model)
    for key in EXPERT_KEYS:
        if not apart and isinstance(count := getattr(config, key, None), int) and count > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {count} experts per block ({key}) in a form of its own, which is not supported "
                "yet; mixtures such as Mixtral, Qwen3-MoE, OLMoE, DeepSeek, Granite and gpt-oss are."
            )
    for block_name in block_names:
        block = model.get_submodule(block_name)
        large = sum(parameter.numel() for parameter in block.parameters()) / LARGE
        known = {
            id(p) for m in block.modules() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding)) for p in m.parameters()
        }
        for name, parameter in block.named_parameters():
            stacked = parameter.ndim == 3 or (parameter.ndim == 2 and parameter.numel() > large)
            if stacked and id(parameter) not in known and "conv" not in name:
                raise UnsupportedModelError(
                    f"{type(model).__name__} keeps its experts in one parameter ({block_name}.{name}) in a form of its own, "
                    "which is not supported yet; mixtures such as Mixtral, Qwen3-MoE, OLMoE, DeepSeek, Granite and gpt-oss are."
                )
