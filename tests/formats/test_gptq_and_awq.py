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
"""GPTQ in both versions and AWQ: bytes against slow packers written from the formats' definitions, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.formats import get_format
from hfcompress.formats.reading import decoded, is_read, missing_packages
from hfcompress.models.checkpoint import StoredTensor
from hfcompress.models.names import block_list
from hfcompress.models.roles import LinearShape
from hfcompress.solvers.grid import Grid, QuantizedWeight


STEM = "model.layers.0.mlp.down_proj"
LAYOUTS = ("gptq", "gptq_v2", "awq")
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def make_weight(grid, rows=64, columns=96, seed=0, dtype=torch.float16):
    """Random codes, scales of both signs, every zero point there is."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // grid.columns(columns)
    codes = torch.randint(grid.q_min, grid.q_max + 1, (rows, columns), generator=generator).to(torch.int8)
    scales = torch.randn(rows, groups, generator=generator).to(dtype)
    zeros = torch.randint(grid.q_min, grid.q_max + 1, (rows, groups), generator=generator).to(torch.int8)
    zeros[0] = grid.q_min
    return QuantizedWeight(codes, scales, None if grid.symmetric else zeros, grid)


def grids(bits=(2, 3, 4, 8)):
    return st.builds(Grid, st.sampled_from(bits), st.sampled_from([-1, 32]), st.booleans())


# slow readers, one bit and one word at a time


def bits_of(words):
    """The bits of int32 words, least significant first."""
    return [(int(word) & 0xFFFFFFFF) >> bit & 1 for word in words for bit in range(32)]


def slow_fields(words, bits):
    """Unsigned fields of `bits` bits, packed densely."""
    stream = bits_of(words)
    return [sum(stream[i + k] << k for k in range(bits)) for i in range(0, len(stream), bits)]


def slow_gptq(tensors, bits, offset):
    """AutoGPTQ: column `n` of `qweight` holds output `n`; row `g` of `qzeros` holds group `g`'s zero points less `offset`."""
    codes = torch.tensor([slow_fields(column, bits) for column in tensors["qweight"].T.tolist()], dtype=torch.float64)
    zeros = (
        torch.tensor([slow_fields(row, bits) for row in tensors["qzeros"].tolist()], dtype=torch.float64).T + offset
    )
    index = tensors["g_idx"].long()
    return (codes - zeros[:, index]) * tensors["scales"].double().T[:, index]


def slow_awq(tensors):
    """AutoAWQ: the nibble at place `i` of a word is output `8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[i]`."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def matrix(words):
        out = torch.zeros(words.shape[0], words.shape[1] * 8, dtype=torch.float64)
        for row in range(words.shape[0]):
            for word in range(words.shape[1]):
                for place, output in enumerate(order):
                    out[row, 8 * word + output] = (int(words[row, word]) & 0xFFFFFFFF) >> (4 * place) & 15
        return out

    codes, zeros = matrix(tensors["qweight"]), matrix(tensors["qzeros"])
    columns = len(codes) // len(zeros)
    scales = tensors["scales"].double()
    return ((codes - zeros.repeat_interleave(columns, 0)) * scales.repeat_interleave(columns, 0)).T


@settings(max_examples=24, deadline=None)
@given(grids(), st.sampled_from(["gptq", "gptq_v2"]), st.integers(0, 9))
def test_gptq_holds_the_values(grid, name, seed):
    weight = make_weight(grid, seed=seed)
    tensors = get_format(name).pack(weight)
    assert torch.equal(slow_gptq(tensors, grid.bits, 1 if name == "gptq" else 0), weight.dequantize().double())
    if (
        name == "gptq"
    ):  # a reader that adds one to each field and one that adds it to the word agree: no field is all ones
        fields = [slow_fields(row, grid.bits) for row in tensors["qzeros"].tolist()]
        assert max(map(max, fields)) < 2**grid.bits - 1


@settings(max_examples=12, deadline=None)
@given(grids((4,)), st.integers(0, 9))
def test_awq_holds_the_values(grid, seed):
    weight = make_weight(grid, seed=seed)
    assert torch.equal(slow_awq(get_format("awq").pack(weight)), weight.dequantize().double())


@every_layout
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_unpack_gives_the_values_back_and_where_nothing_is_turned_round_the_codes(name, symmetric, group_size):
    layout, grid = get_format(name), Grid(4, group_size, symmetric)
    weight = make_weight(grid)
    tensors = layout.pack(weight)
    read = layout.unpack(tensors, grid)
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert torch.equal(layout.values(weight), weight.dequantize())
    assert torch.equal(
        layout.restore({f"{STEM}.{k}": v for k, v in tensors.items()}, STEM, grid, False), weight.dequantize()
    )
    turned = name == "gptq" and not symmetric
    kept = (weight.zero_points != grid.q_min).all(1) if turned else slice(None)
    assert torch.equal(read.codes[kept], weight.codes[kept])
    assert torch.equal(read.scales[kept], weight.scales[kept])
    if not symmetric:
        assert torch.equal(read.zero_points[kept], weight.zero_points[kept])


def test_symmetric_zero_points_are_the_words_that_everyone_writes():
    weight = make_weight(Grid(4, 32))
    words = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - 2**32, "awq": 0x88888888 - 2**32}
    for name, word in words.items():
        assert (get_format(name).pack(weight)["qzeros"] == word).all()


def test_bytes_of_small_examples():
    """Codes 0..15 and again, by hand: unsigned code `n` is signed `n - 8`."""
    codes = (torch.arange(32) % 16 - 8).to(torch.int8)
    along_inputs = QuantizedWeight(codes.repeat(32, 1), torch.ones(32, 1), None, Grid(4))
    packed = get_format("gptq").pack(along_inputs)
    assert packed["qweight"][:, 0].tolist() == [0x76543210, 0xFEDCBA98 - 2**32] * 2
    assert packed["g_idx"].tolist() == [0] * 32
    along_outputs = QuantizedWeight(codes[:, None].repeat(1, 32), torch.ones(32, 1), None, Grid(4))
    packed = get_format("awq").pack(along_outputs)
    assert packed["qweight"][0].tolist() == [0x75316420, 0xFDB9ECA8 - 2**32] * 2
    # three bits: v0..v9 fill 30 bits, v10 crosses into the next word
    threes = QuantizedWeight(torch.full((32, 32), 3, dtype=torch.int8), torch.ones(32, 1), None, Grid(3))
    assert get_format("gptq").pack(threes)["qweight"][:, 5].tolist() == [-1, -1, -1]


@every_layout
def test_names_shapes_and_dtypes(name):
    tensors = get_format(name).pack(make_weight(Grid(4, 32), dtype=torch.bfloat16))
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    expected = {"qzeros": (torch.int32, (3, 8)), "scales": (torch.float16, (3, 64))}
    if name == "awq":
        assert shapes == {**expected, "qweight": (torch.int32, (96, 8))}
    else:
        assert shapes == {**expected, "qweight": (torch.int32, (12, 64)), "g_idx": (torch.int32, (96,))}
        assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32 + [2] * 32
    assert all(tensor.is_contiguous() for tensor in tensors.values())


# what is refused


@every_layout
@pytest.mark.parametrize(
    ("shape", "bits", "said"),
    [
        (LinearShape(STEM, 64, 64, True), 4, "Conv1D"),
        (LinearShape(STEM, 80, 64, False), 4, "64 by 80: 80 is no multiple of 32"),
        (LinearShape(STEM, 64, 40, False), 4, "40 is no multiple of 32"),
        (LinearShape(STEM, 64, 64, False), 5, "bits, and .* is given 5"),
    ],
)
def test_a_linear_that_does_not_fit(name, shape, bits, said):
    with pytest.raises(InvalidValueError, match=said) as refused:
        get_format(name).check(shape, Grid(bits))
    assert name in str(refused.value)
    assert "--set format=" in str(refused.value)
    get_format(name).check(LinearShape(STEM, 64, 64, False), Grid(4))


@every_layout
@pytest.mark.parametrize(
    ("grids", "untouched", "said"),
    [
        ({"model.layers.0.a": Grid(4)}, ["model.layers.1.a", "lm_head"], "model.layers.1.a would stay dense"),
        ({"model.layers.0.a": Grid(4), "model.layers.0.b": Grid(4, 32)}, [], "model.layers.0.a and model.layers.0.b"),
        ({"model.layers.0.a": Grid(4), "lm_head": Grid(4)}, [], "cannot hold lm_head"),
    ],
)
def test_a_set_of_linears_that_transformers_would_misread(name, grids, untouched, said):
    with pytest.raises(InvalidValueError, match=said) as refused:
        get_format(name).quantization_config(grids, untouched)
    assert "--set format=compressed-tensors" in str(refused.value)


def test_the_config_says_what_the_grid_is():
    v1 = get_format("gptq").quantization_config({STEM: Grid(3, 64, False)}, ["lm_head"])
    assert (v1["bits"], v1["group_size"], v1["sym"], v1["desc_act"]) == (3, 64, False, False)
    assert (v1["checkpoint_format"], v1["block_name_to_quantize"]) == ("gptq", "model.layers")
    assert get_format("gptq_v2").quantization_config({STEM: Grid(3)}, [])["checkpoint_format"] == "gptq_v2"
    assert get_format("gptq").files(v1) == {"quantize_config.json": v1}
    awq = get_format("awq").quantization_config({STEM: Grid(4, 32)}, ["lm_head"])
    assert (awq["version"], awq["zero_point"], awq["modules_to_not_convert"]) == ("gemm", True, ["lm_head"])
    assert get_format("awq").files(awq) == {}


def test_the_list_that_a_block_is_in():
    assert block_list("model.layers.11.mlp.experts.3.up_proj") == "model.layers"
    assert block_list("lm_head") is None


# reading


def stored(tensors):
    return {
        f"{STEM}.{name}": StoredTensor(f"{STEM}.{name}", tensor.dtype, tuple(tensor.shape), value=tensor)
        for name, tensor in tensors.items()
    }


@every_layout
@pytest.mark.parametrize("grid", [Grid(4), Grid(4, 32), Grid(4, 32, False)])
def test_a_checkpoint_reads_as_dense(name, grid):
    layout, weight = get_format(name), make_weight(grid)
    tensors = stored(layout.pack(weight)) | {f"{STEM}.bias": StoredTensor("b", torch.float16, (64,))}
    config = layout.quantization_config({STEM: grid}, [])
    assert is_read(config)
    view = decoded(tensors, config)
    assert view.keys() == {f"{STEM}.weight", f"{STEM}.bias"}
    dense = view[f"{STEM}.weight"]
    assert (dense.shape, dense.dtype, dense.grid) == ((64, 96), torch.float16, grid)
    assert torch.equal(dense.read(), weight.dequantize())
    assert torch.equal(dense[3:5], weight.dequantize()[3:5])
    assert torch.equal(dense.quantized().dequantize(), weight.dequantize())
    assert dense.nbytes == sum(tensor.nbytes for tensor in layout.pack(weight).values())


def test_groups_in_any_order_read_as_what_they_stand_for_and_cannot_be_exported():
    grid = Grid(4, 32, False)
    tensors = get_format("gptq_v2").pack(make_weight(grid))
    tensors["g_idx"] = tensors["g_idx"][torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    config = get_format("gptq_v2").quantization_config({STEM: grid}, []) | {"desc_act": True}
    dense = decoded(stored(tensors), config)[f"{STEM}.weight"]
    assert torch.equal(dense.read().double(), slow_gptq(tensors, 4, 0))
    with pytest.raises(UnsupportedModelError, match="desc_act"):
        dense.quantized()


def test_a_linear_with_bits_of_its_own_is_known_by_its_shape():
    weight = make_weight(Grid(8, 32))
    config = get_format("gptq").quantization_config({STEM: Grid(4, 32)}, [])
    assert torch.equal(
        decoded(stored(get_format("gptq").pack(weight)), config)[f"{STEM}.weight"].read(), weight.dequantize()
    )


def test_layouts_that_are_not_read_are_named():
    for config, said in (
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "words of int16"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": "hqq"}, "quantized by hqq"),
    ):
        with pytest.raises(UnsupportedModelError, match=said):
            decoded({}, config)
    assert not is_read({"quant_method": "hqq"})


@every_layout
def test_a_checkpoint_that_lacks_a_tensor_is_told(name):
    tensors = stored(get_format(name).pack(make_weight(Grid(4, 32))))
    del tensors[f"{STEM}.qzeros"]
    with pytest.raises(CheckpointError, match="qzeros"):
        decoded(tensors, get_format(name).quantization_config({STEM: Grid(4, 32)}, []))


def test_what_transformers_would_need():
    assert missing_packages(None) == missing_packages({"quant_method": "hqq"}) == []
    assert missing_packages({"quant_method": "compressed-tensors"}) == []
