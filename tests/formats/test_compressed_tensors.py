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
"""The layouts, as compressed-tensors itself reads and writes them."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)

from hfcompress.errors import InvalidValueError, UnsupportedModelError
from hfcompress.formats import NAMES, get_format
from hfcompress.formats.compressed_tensors import (
    CompressedTensor,
    CompressedTensors,
    FloatQuantized,
    IntQuantized,
    PackQuantized,
    decoded,
)
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
    assert get_format("compressed-tensors").name == "compressed-tensors"
    assert get_format("pack-quantized").name == "pack-quantized"
    assert get_format("int-quantized").name == "int-quantized"
    assert get_format("float-quantized").name == "float-quantized"
    assert get_format("dense").name == "dense"
    assert all(get_format(name).name == name for name in NAMES)
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
    with pytest.raises(UnsupportedModelError, match=r"'naive-quantized'.*pack-quantized, int-quantized"):
        decoded(tensors, {**config, "format": "naive-quantized"})
    config["config_groups"]["group_0"]["format"] = "naive-quantized"
    with pytest.raises(UnsupportedModelError, match="'naive-quantized'"):
        decoded(tensors, config)


# codes


@every_layout
@every_grid
def test_codes_are_read_as_they_were_written(layout, grid):
    weight = make_weight(grid)
    stored = {k: StoredTensor(k, v.dtype, tuple(v.shape), value=v) for k, v in layout.pack(weight).items()}
    read = CompressedTensor(stored, grid, layout, (13, 96), scheme_of(layout, grid)).quantized()
    assert read.grid == grid
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.scales, weight.scales)
    assert (read.zero_points is None) == grid.symmetric
    assert grid.symmetric or torch.equal(read.zero_points, weight.zero_points)


def test_codes_on_another_grid_are_refused():
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=8, strategy="tensor"))
    with pytest.raises(UnsupportedModelError, match="its codes cannot be read"):
        CompressedTensor({}, Grid(8), IntQuantized(), (2, 2), scheme).quantized()


# eight bits of inputs and of floats

W8A8 = Grid(8, activations="dynamic")
FP8 = Grid(8, type="float", activations="dynamic")


def make_float_weight(dtype=torch.float32, seed=0, activations="dynamic"):
    generator = torch.Generator().manual_seed(seed)
    codes = (100 * torch.randn(13, 96, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = (torch.rand(13, 1, generator=generator) + 0.05).to(dtype)
    return QuantizedWeight(codes, scales, None, Grid(8, type="float", activations=activations))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_consumer_reads_and_writes_the_same_float_codes(dtype):
    weight, layout = make_float_weight(dtype), FloatQuantized()
    [scheme] = read_config(layout.quantization_config({STEM: weight.grid}, [])).config_groups.values()
    consumer = BaseCompressor.get_value_from_registry("float-quantized")
    ours = layout.pack(weight)
    exact = {**ours, "weight_scale": ours["weight_scale"].float()}
    assert torch.equal(consumer.decompress(exact, scheme)["weight"], weight.dequantize())
    theirs = consumer.compress({"weight": weight.dequantize(), "weight_scale": exact["weight_scale"]}, scheme)
    assert theirs.keys() == ours.keys()
    assert theirs["weight"].dtype == ours["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(theirs["weight"].float(), ours["weight"].float())
    assert torch.equal(layout.unpack(ours, weight.grid).dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("preset", "grid"),
    [
        ("W8A8", W8A8),
        ("FP8_DYNAMIC", FP8),
        ("FP8", Grid(8, type="float", activations="static")),
        ("W8A16", Grid(8, 128)),
        ("W4A16", Grid(4, 128)),
        ("W4A16_ASYM", Grid(4, 128, symmetric=False)),
    ],
)
def test_a_scheme_is_the_preset_that_engines_know(preset, grid):
    [ours] = read_config(CompressedTensors().quantization_config({STEM: grid}, [])).config_groups.values()
    theirs = preset_name_to_scheme(preset, ["Linear"])
    for part in ("weights", "input_activations", "output_activations"):
        expected = getattr(theirs, part)
        if expected is None:
            assert getattr(ours, part) is None
            continue
        # how a range was found is a note that no reader heeds; and a scale per row is finer than the preset's one
        found, expected = (
            {k: v for k, v in each.model_dump().items() if k != "observer"} for each in (getattr(ours, part), expected)
        )
        if (preset, part) == ("FP8", "weights"):
            assert expected.pop("strategy") == "tensor"
            assert found.pop("strategy") == "channel"
        assert found == expected


@pytest.mark.parametrize("grid", [W8A8, FP8, Grid(8, type="float"), Grid(8)])
def test_the_written_config_is_read_back_as_it_was_written(grid):
    config = CompressedTensors().quantization_config({STEM: grid}, ["lm_head"], "float")
    read = read_config(config).model_dump()
    for key, value in config.items():
        if key not in ("version", "config_groups", "kv_cache_scheme"):
            assert read[key] == value
    group = config["config_groups"]["group_0"]
    for part in ("weights", "input_activations"):
        assert group[part] is None or group[part].items() <= read["config_groups"]["group_0"][part].items()
    assert config["kv_cache_scheme"].items() <= read["kv_cache_scheme"].items()


@pytest.mark.parametrize(
    ("grid", "layout"),
    [
        (Grid(4, 32), "pack-quantized"),
        (Grid(8), "pack-quantized"),
        (W8A8, "int-quantized"),
        (Grid(8, activations="static"), "int-quantized"),
        (Grid(8, type="float"), "float-quantized"),
        (FP8, "float-quantized"),
    ],
)
def test_the_layout_follows_from_what_is_held(grid, layout):
    config = CompressedTensors().quantization_config({STEM: grid}, [])
    assert config["format"] == config["config_groups"]["group_0"]["format"] == layout
    weight = make_float_weight() if grid.type == "float" else make_weight(grid)
    ours = CompressedTensors().pack(weight)
    assert ("weight_packed" in ours) == (layout == "pack-quantized")
    stored = {f"{STEM}.{name}": tensor for name, tensor in ours.items()}
    assert torch.equal(CompressedTensors().restore(stored, STEM, grid, False), weight.dequantize())


def test_a_mixture_of_layouts_is_mixed_precision_and_reads_group_by_group():
    weights = {
        "model.layers.0.a": make_weight(Grid(4, 32)),
        "model.layers.0.b": make_weight(W8A8),
        "model.layers.0.c": make_float_weight(),
    }
    tensors, config = stored_checkpoint(CompressedTensors(), weights)
    assert config["format"] == "mixed-precision"
    view = decoded(tensors, config)
    for stem, weight in weights.items():
        assert torch.equal(view[f"{stem}.weight"].read(), weight.dequantize())


@pytest.mark.parametrize(
    ("layout", "grid", "said"),
    [
        (PackQuantized(), W8A8, "pack-quantized is not for int codes and rounded inputs.*writes int-quantized there"),
        (PackQuantized(), FP8, "pack-quantized is not for float codes and rounded inputs.*writes float-quantized"),
        (IntQuantized(), Grid(8, type="float"), "int-quantized is not for float codes, which.*float-quantized"),
        (FloatQuantized(), Grid(8), "float-quantized is not for int codes, which.*writes pack-quantized there"),
        (Dense(), W8A8, "dense has no place for how the inputs.*compressed-tensors.*activations to none"),
        (get_format("gptq"), W8A8, "gptq is not for int codes and rounded inputs, which.*compressed-tensors"),
        (get_format("awq"), Grid(8, type="float"), "awq is not for float codes, which.*compressed-tensors"),
        (get_format("gguf"), FP8, "gguf is not for float codes and rounded inputs.*writes float-quantized"),
        (CompressedTensors(), W8A8, None),
        (Dense(), Grid(8, type="float"), None),
    ],
)
def test_a_layout_refuses_what_it_cannot_hold(layout, grid, said):
    if said is None:
        layout.check(LinearShape(STEM, 96, 13, False), grid)
        return
    with pytest.raises(InvalidValueError, match=said) as refused:
        layout.check(LinearShape(STEM, 96, 13, False), grid)
    assert STEM in str(refused.value)


def test_a_conv1d_is_refused_by_the_layout_that_would_hold_it():
    with pytest.raises(InvalidValueError, match="int-quantized cannot hold c_attn: it is a Conv1D"):
        CompressedTensors().check(LinearShape("c_attn", 96, 13, True), W8A8)


def test_a_cache_is_refused_where_its_scheme_would_be_lost():
    with pytest.raises(InvalidValueError, match="gguf has no place for the scales of the step kv_cache"):
        get_format("gguf").quantization_config({STEM: Grid(4, 32)}, [], "float")
    with pytest.raises(InvalidValueError, match="dense has no place for the scales of the step kv_cache"):
        Dense().quantization_config({STEM: Grid(8)}, [], "float")
    for name in ("gptq", "gptq_v2", "awq"):
        with pytest.raises(InvalidValueError, match=f"{name} has no place for the scales of the step kv_cache"):
            get_format(name).quantization_config({STEM: Grid(4, 32)}, [], "float")
    asymmetric = {STEM: Grid(4, 32, symmetric=False)}
    with pytest.raises(InvalidValueError, match=r"asymmetric grid beside the step kv_cache.*format=int-quantized"):
        CompressedTensors().quantization_config(asymmetric, [], "float")
    assert IntQuantized().quantization_config(asymmetric, [], "float")["kv_cache_scheme"]["type"] == "float"


def test_an_asymmetric_packed_grid_is_refused_beside_another_layout():
    grids = {"model.layers.0.a": Grid(4, 32, symmetric=False), "model.layers.0.b": W8A8}
    with pytest.raises(InvalidValueError, match=r"asymmetric.*only when all linears share it"):
        CompressedTensors().quantization_config(grids, [])
