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
"""pack-quantized and int-quantized, as compressed-tensors itself reads and writes them."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from hfcompress.errors import InvalidValueError, UnsupportedModelError
from hfcompress.formats import NAMES, get_format
from hfcompress.formats.compressed_tensors import IntQuantized, PackQuantized, decoded
from hfcompress.formats.dense import Dense
from hfcompress.models.checkpoint import StoredTensor
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


STEM = "model.layers.0.mlp.down_proj"
LAYOUTS = [PackQuantized(), IntQuantized()]

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
every_grid = pytest.mark.parametrize(
    "grid",
    [Grid(b, g, s) for b in (2, 3, 4, 8) for g in (-1, 32) for s in (True, False)],
    ids=lambda g: f"{g.bits}bit-{'channel' if g.group_size == -1 else 'group'}-{'sym' if g.symmetric else 'asym'}",
)


def make_weight(grid, dtype=torch.float32, rows=13, columns=96, seed=0):
    """Random codes, scales of both signs, zero points; 13 rows so that zero points do not fill their words."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // grid.columns(columns)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (rows, columns), generator=generator).to(torch.int8)
    scales = torch.randn(rows, groups, generator=generator)
    scales = (scales.sign() * (scales.abs() + 0.05)).to(dtype)
    zeros = torch.randint(grid.q_min, grid.q_max + 1, (rows, groups), generator=generator).to(torch.int8)
    if grid.symmetric:
        return QuantizedWeight(codes, scales, None, grid)
    return QuantizedWeight(codes, scales.abs(), zeros, grid)


def read_config(config):
    return QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "dequantize"})


def scheme_of(layout, grid):
    [scheme] = read_config(layout.quantization_config({STEM: grid}, [])).config_groups.values()
    return scheme


# one linear


@every_layout
@every_grid
def test_the_consumer_reads_what_was_solved(layout, grid):
    weight = make_weight(grid)
    consumer = BaseCompressor.get_value_from_registry(layout.name)
    read = consumer.decompress(layout.pack(weight), scheme_of(layout, grid))["weight"]
    assert read.dtype == torch.float32
    assert torch.equal(read, weight.dequantize())


@every_layout
@every_grid
def test_the_consumer_writes_the_same_tensors(layout, grid):
    weight = make_weight(grid)
    state = {"weight": weight.dequantize(), "weight_scale": weight.scales}
    if weight.zero_points is not None:
        state["weight_zero_point"] = weight.zero_points
    consumer = BaseCompressor.get_value_from_registry(layout.name)
    theirs = consumer.compress(state, scheme_of(layout, grid))
    ours = layout.pack(weight)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@every_layout
@every_grid
def test_names_and_dtypes(layout, grid):
    tensors = layout.pack(make_weight(grid, torch.bfloat16))
    assert ("weight_zero_point" in tensors) == (not grid.symmetric)
    assert tensors["weight_scale"].dtype == torch.bfloat16
    assert tensors["weight_scale"].shape == (13, 1 if grid.group_size == -1 else 3)
    if layout.name == "pack-quantized":
        assert tensors["weight_packed"].dtype == torch.int32
        assert tensors["weight_packed"].shape == (13, 96 * grid.bits // 32)
        assert tensors["weight_shape"].tolist() == [13, 96]
        assert tensors["weight_shape"].dtype == torch.int64
    else:
        assert tensors["weight"].dtype == torch.int8
        assert tensors["weight"].shape == (13, 96)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@every_layout
@every_grid
def test_unpack_is_the_inverse_of_pack(layout, grid):
    weight = make_weight(grid, torch.float16)
    read = layout.unpack(layout.pack(weight), grid)
    assert read.grid == grid
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.scales, weight.scales)
    assert (read.zero_points is None) if grid.symmetric else torch.equal(read.zero_points, weight.zero_points)


@pytest.mark.parametrize("layout", [*LAYOUTS, Dense()], ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [Grid(3), Grid(4, 32), Grid(4, 32, False), Grid(8, -1, False)])
def test_restored_values_are_the_values_that_the_run_went_on_with(layout, grid, dtype):
    weight = make_weight(grid, dtype)
    stored = {f"{STEM}.{name}": tensor for name, tensor in layout.pack(weight).items()}
    stored["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
    stored["model.norm.weight"] = torch.ones(4)
    values = layout.values(weight)
    restored = layout.restore(stored, STEM, grid, transposed=False)
    assert values.dtype == restored.dtype == torch.float32
    assert torch.equal(restored, values)
    exact = weight.dequantize()
    assert torch.equal(values, exact.to(dtype).float() if layout.name == "dense" else exact)


@every_layout
def test_parts_of_a_stacked_weight_pack_as_they_do_alone(layout):
    weight = make_weight(Grid(3, 32, False))
    part = weight.rows(4, 11)
    alone = QuantizedWeight(*(t.clone() for t in (part.codes, part.scales, part.zero_points)), part.grid)
    for name, tensor in layout.pack(part).items():
        assert torch.equal(tensor, layout.pack(alone)[name])


def test_dense_holds_the_values_in_the_dtype_of_the_scales_and_any_orientation():
    weight = make_weight(Grid(4, 32), torch.bfloat16)
    [(name, tensor)] = Dense().pack(weight).items()
    assert name == "weight"
    assert tensor.dtype == torch.bfloat16
    restored = Dense().restore({f"{STEM}.weight": tensor.T.contiguous()}, STEM, weight.grid, transposed=True)
    assert torch.equal(restored, weight.dequantize().bfloat16().float())
    assert Dense().quantization_config({STEM: weight.grid}, []) is None
    Dense().check(LinearShape(STEM, 96, 13, True), weight.grid)


@every_layout
def test_a_transposed_weight_is_refused_in_a_sentence(layout):
    layout.check(LinearShape(STEM, 96, 13, False), Grid(4))
    with pytest.raises(InvalidValueError, match="Conv1D") as refused:
        layout.check(LinearShape("transformer.h.0.attn.c_attn", 96, 13, True), Grid(4))
    sentence = str(refused.value)
    assert layout.name in sentence
    assert "transformer.h.0.attn.c_attn" in sentence
    assert "--set format=dense" in sentence
    assert "ignore" in sentence


def test_formats_by_name():
    assert get_format("compressed-tensors").name == "pack-quantized"
    assert get_format("pack-quantized").name == "pack-quantized"
    assert get_format("int-quantized").name == "int-quantized"
    assert get_format("dense").name == "dense"
    assert all(get_format(name).name == name for name in NAMES if name != "compressed-tensors")
    with pytest.raises(InvalidValueError, match=r"no format 'int-quantised'.*Did you mean 'int-quantized'"):
        get_format("int-quantised")


# quantization_config


@every_layout
@every_grid
def test_config_of_one_grid_validates_and_says_what_the_grid_is(layout, grid):
    config = layout.quantization_config({STEM: grid, "model.layers.0.mlp.up_proj": grid}, ["lm_head"])
    read = read_config(config)
    assert read.quant_method == config["quant_method"] == "compressed-tensors"
    assert read.format == config["format"] == layout.name
    assert read.quantization_status == "compressed"
    assert read.ignore == ["lm_head"]
    [scheme] = read.config_groups.values()
    assert scheme.targets == ["Linear"]
    assert scheme.input_activations is None
    assert scheme.output_activations is None
    args = scheme.weights
    assert (args.num_bits, args.type, args.symmetric, args.dynamic) == (grid.bits, "int", grid.symmetric, False)
    assert args.strategy == ("channel" if grid.group_size == -1 else "group")
    assert args.group_size == (None if grid.group_size == -1 else 32)
    packed_zeros = layout.name == "pack-quantized" and not grid.symmetric
    assert config.get("dequantize", False) == packed_zeros


@every_layout
def test_mixed_grids_are_groups_that_name_their_linears(layout):
    grids = {
        "model.layers.0.self_attn.q_proj": Grid(4, 32),
        "model.layers.0.mlp.down_proj": Grid(8, -1),
        "model.layers.1.self_attn.q_proj": Grid(4, 32),
    }
    read = read_config(layout.quantization_config(grids, ["lm_head"]))
    groups = {tuple(scheme.targets): scheme.weights for scheme in read.config_groups.values()}
    four = groups["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    eight = groups[("model.layers.0.mlp.down_proj",)]
    assert len(groups) == 2
    assert (four.num_bits, four.group_size, four.strategy) == (4, 32, "group")
    assert (eight.num_bits, eight.group_size, eight.strategy) == (8, None, "channel")


def test_mixed_grids_with_a_zero_point_are_refused_where_transformers_would_misread_them():
    for other in (Grid(4, 32), Grid(8, 32, False)):
        grids = {"model.layers.0.a": Grid(4, 32, False), "model.layers.0.b": other}
        with pytest.raises(InvalidValueError, match=r"asymmetric.*--set format=int-quantized"):
            PackQuantized().quantization_config(grids, [])
        config = IntQuantized().quantization_config(grids, [])
        assert len(read_config(config).config_groups) == 2
        assert "dequantize" not in config


# reading


class Stored:
    """The least of a stored tensor: it is read when asked for, and counts how often."""

    def __init__(self, value):
        self.value, self.reads = value, 0
        self.dtype, self.shape, self.nbytes = value.dtype, tuple(value.shape), value.nbytes

    def read(self):
        self.reads += 1
        return self.value


def stored_checkpoint(layout, weights):
    tensors = {"model.norm.weight": torch.arange(4.0), "model.layers.0.mlp.down_proj.bias": torch.ones(3)}
    for stem, weight in weights.items():
        tensors |= {f"{stem}.{name}": tensor for name, tensor in layout.pack(weight).items()}
    config = layout.quantization_config({stem: weight.grid for stem, weight in weights.items()}, [])
    return {name: Stored(tensor) for name, tensor in tensors.items()}, config


@every_layout
@every_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoded_checkpoint_reads_as_dense(layout, grid, dtype):
    weights = {STEM: make_weight(grid, dtype), "model.layers.1.mlp.down_proj": make_weight(grid, dtype, seed=1)}
    tensors, config = stored_checkpoint(layout, weights)
    names = set(tensors)
    view = decoded(tensors, config)
    assert set(tensors) == names
    assert set(view) == {
        "model.norm.weight",
        f"{STEM}.bias",
        f"{STEM}.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert view["model.norm.weight"] is tensors["model.norm.weight"]
    for stem, weight in weights.items():
        dense = view[f"{stem}.weight"]
        assert tuple(dense.shape) == (13, 96)
        assert dense.dtype == dtype
        assert dense.nbytes == sum(t.nbytes for t in layout.pack(weight).values())
        values = dense.read()
        assert values.dtype == torch.float32
        assert torch.equal(values, weight.dequantize())
        assert torch.equal(dense[...], weight.dequantize())
        assert torch.equal(dense[2:5], weight.dequantize()[2:5])


def test_packed_weights_are_not_read_until_they_are_asked_for():
    tensors, config = stored_checkpoint(PackQuantized(), {STEM: make_weight(Grid(4, 32))})
    view = decoded(tensors, config)
    assert tensors[f"{STEM}.weight_packed"].reads == 0
    assert tensors[f"{STEM}.weight_scale"].reads == 0
    view[f"{STEM}.weight"].read()
    assert tensors[f"{STEM}.weight_packed"].reads == 1


@every_layout
def test_a_decoded_checkpoint_of_mixed_grids_reads_every_linear_by_its_own(layout):
    grids = [Grid(4, 32), Grid(8, -1), Grid(3, 32)]
    weights = {f"model.layers.{i}.mlp.up_proj": make_weight(grid, seed=i) for i, grid in enumerate(grids)}
    tensors, config = stored_checkpoint(layout, weights)
    view = decoded(tensors, config)
    for stem, weight in weights.items():
        assert torch.equal(view[f"{stem}.weight"].read(), weight.dequantize())


def test_stored_tensors_of_a_checkpoint_can_be_decoded():
    weight = make_weight(Grid(4, 32), torch.bfloat16)
    tensors = {
        f"{STEM}.{name}": StoredTensor(f"{STEM}.{name}", tensor.dtype, tuple(tensor.shape), value=tensor)
        for name, tensor in PackQuantized().pack(weight).items()
    }
    view = decoded(tensors, PackQuantized().quantization_config({STEM: weight.grid}, []))
    assert torch.equal(view[f"{STEM}.weight"].read(), weight.dequantize())


def test_a_pattern_in_the_targets_is_understood():
    weights = {
        "model.layers.0.mlp.up_proj": make_weight(Grid(4, 32)),
        "model.layers.0.mlp.down_proj": make_weight(Grid(8, -1), seed=1),
    }
    tensors, config = stored_checkpoint(PackQuantized(), weights)
    config["config_groups"]["group_0"]["targets"] = ["re:.*up_proj$"]
    config["config_groups"]["group_1"]["targets"] = ["re:.*down_proj$"]
    view = decoded(tensors, config)
    for stem, weight in weights.items():
        assert torch.equal(view[f"{stem}.weight"].read(), weight.dequantize())


def test_a_name_in_a_later_group_counts_before_linear_in_an_earlier_one():
    """compressed-tensors' own order (`match_targets`): exact name, pattern, class."""
    weights = {
        "model.layers.0.mlp.up_proj": make_weight(Grid(4, 32)),
        "model.layers.0.mlp.down_proj": make_weight(Grid(8, -1), seed=1),
    }
    tensors, config = stored_checkpoint(PackQuantized(), weights)
    config["config_groups"]["group_0"]["targets"] = ["Linear"]
    view = decoded(tensors, config)
    for stem, weight in weights.items():
        assert torch.equal(view[f"{stem}.weight"].read(), weight.dequantize())


def test_another_layout_is_refused_by_name():
    tensors, config = stored_checkpoint(IntQuantized(), {STEM: make_weight(Grid(8))})
    with pytest.raises(UnsupportedModelError, match=r"'float-quantized'.*pack-quantized, int-quantized"):
        decoded(tensors, {**config, "format": "float-quantized"})
