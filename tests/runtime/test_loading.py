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
"""`hfc.load`: the same logits however a checkpoint is loaded, and no more memory than it takes on disk where it stays packed."""

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from conftest import CONFIGS, MIXTURES, TOGETHER, in_fresh_process, make_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.errors import HfcompressError, InvalidValueError
from hfcompress.evaluation.comparison import whole_model
from hfcompress.formats import get_format
from hfcompress.formats.reading import decoded
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.runtime.integer_linear import (
    Int4Linear,
    Int8Linear,
    RoundingInt8Linear,
    multiplies_exactly,
    tile_of_kernel,
)
from hfcompress.runtime.stored_linear import StoredLinear
from hfcompress.solvers.grid import Grid, QuantizedWeight


CPU = torch.device("cpu")
IDS = torch.arange(1, 25)[None]
RECIPES = {
    "vectors": hfc.VQ(bits=2, rounds=1),
    "levels": hfc.Codebook(bits=3, rounds=1),
    "levels of groups": hfc.Codebook(bits=2, group_size=16, rounds=1),
    "coded": hfc.Entropy(bits=3.0),
    "factors": hfc.LowRank(ratio=0.4, allocation="uniform"),
    "grid": hfc.RTN(bits=4, group_size=32),
}


def compress(recipe, output, name: str = "llama", dtype: torch.dtype = torch.float32):
    model = make_model(CONFIGS[name](), dtype)
    return hfc.compress(model, recipe, output, calibration=token_ids(8, 32), evaluate=False).output_dir


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def linears(model, kind) -> int:
    return sum(type(module) is kind for module in model.modules())


def load(folder, packed):
    """In float32, for which torch has no kernels."""
    return hfc.load(folder, packed=packed, device="cpu", dtype="float32")


def memory(model) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", RECIPES)
def test_packed_or_not_it_is_the_model_that_transformers_loads(name, tmp_path):
    folder = compress(RECIPES[name], tmp_path / "made")
    dense, packed = load(folder, False), load(folder, True)
    assert torch.equal(logits(packed), logits(dense))
    with whole_model(Checkpoint.open(folder), CPU, torch.float32) as loaded:
        torch.testing.assert_close(logits(dense), logits(loaded), rtol=0, atol=1e-5)
    stored, left = linears(packed, StoredLinear), linears(packed, nn.Linear)
    assert stored > 0
    assert (stored, left) == (linears(dense, nn.Linear) - left, 1)  # the head
    saved = sum(4 * m.in_features * m.out_features for m in dense.modules() if isinstance(m, nn.Linear))
    saved -= 4 * dense.lm_head.weight.numel()
    held = sum(m.get_buffer(n).nbytes for m in packed.modules() if isinstance(m, StoredLinear) for n in m._buffers)
    assert memory(packed) == memory(dense) - saved + held
    assert held < 0.45 * saved
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(packed.generate(IDS, **options), dense.generate(IDS, **options))


def test_biases_are_kept(tmp_path):
    folder = compress(RECIPES["vectors"], tmp_path / "made", "opt")
    packed = load(folder, True)
    assert any(m.bias is not None for m in packed.modules() if isinstance(m, StoredLinear))
    assert torch.equal(logits(packed), logits(load(folder, False)))


@pytest.mark.parametrize(
    "recipe", [hfc.Share(blocks=0.5, rank=4), hfc.RTN(bits=8, group_size=-1, activations="static")]
)
def test_what_leans_on_others_or_rounds_its_inputs_is_unpacked(recipe, tmp_path):
    folder = compress(recipe, tmp_path / "made")
    packed = load(folder, True)
    assert linears(packed, nn.Linear) > 1 or linears(packed, StoredLinear) == 0
    assert torch.equal(logits(packed), logits(load(folder, False)))


def test_a_dense_model_loads_too(tmp_path):
    model = make_model(CONFIGS["llama"](), torch.float32)
    model.save_pretrained(tmp_path / "dense")
    for packed in (False, True, None):
        assert torch.equal(logits(load(tmp_path / "dense", packed)), logits(model))


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(HfcompressError, match="nothing"):
        hfc.load(tmp_path / "nothing", device="cpu")


SAVED = {
    "int4": (hfc.RTN(bits=4, group_size=32), Int4Linear),
    "int4 with zero points": (hfc.RTN(bits=4, group_size=32, symmetric=False), Int4Linear),
    "int3": (hfc.RTN(bits=3, group_size=-1), Int4Linear),
    "int8": (hfc.RTN(bits=8, group_size=-1), Int8Linear),
    "gptq": (hfc.Job(steps=(hfc.RTN(bits=4, group_size=32),), format="gptq"), Int4Linear),
    "vectors": (hfc.VQ(bits=2, rounds=1), StoredLinear),
}


with_kernels = pytest.mark.skipif(tile_of_kernel() is None, reason="torch has no such kernel on this CPU")


@with_kernels
@pytest.mark.parametrize("name", SAVED)
def test_what_stays_packed_is_saved_as_it_was_stored(name, tmp_path):
    recipe, kind = SAVED[name]
    folder = compress(recipe, tmp_path / "made", dtype=torch.bfloat16)
    packed = hfc.load(folder, packed=True if kind is StoredLinear else None, device="cpu")
    assert linears(packed, kind) == 21
    packed.save_pretrained(tmp_path / "again")
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "again"))
    packed_names = {
        key for key in before if not key.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight"))
    }
    assert packed_names <= set(after)
    assert all(torch.equal(before[key], after[key]) for key in packed_names)
    assert torch.equal(logits(load(tmp_path / "again", False)), logits(load(folder, False)))


def test_from_pretrained_reads_what_was_saved(tiny_w4, tmp_path):
    hfc.load(tiny_w4.output_dir, device="cpu").save_pretrained(tmp_path / "again")
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(1, 25)[None]
both = [AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(input_ids=ids).logits for folder in sys.argv[1:]]
print(json.dumps(torch.equal(*both)))
"""
    assert in_fresh_process(code, str(tiny_w4.output_dir), str(tmp_path / "again"))


def test_a_dense_load_is_saved_dense(tiny_w4, tmp_path):
    model = load(tiny_w4.output_dir, False)
    model.save_pretrained(tmp_path / "dense")
    assert Checkpoint.open(tmp_path / "dense").quantization_config is None
    assert torch.equal(logits(load(tmp_path / "dense", None)), logits(model))


@with_kernels
def test_kernels_are_used_of_themselves_and_cost_no_quality(tiny, tiny_w4):
    """A trained model: packed in bfloat16 it is as near to the float32 arithmetic as the dense weights in bfloat16 are."""
    packed = hfc.load(tiny_w4.output_dir, device="cpu")
    assert packed.dtype == torch.bfloat16
    exact, rounded = (
        load(tiny_w4.output_dir, False),
        hfc.load(tiny_w4.output_dir, packed=False, device="cpu", dtype="bfloat16"),
    )
    assert (linears(packed, Int4Linear), linears(packed, StoredLinear)) == (linears(exact, nn.Linear) - 1, 0)
    ids = torch.from_numpy(np.load(tiny / "evaluation.npy")[:8, :128]).long()

    @torch.no_grad()
    def divergence(model):
        wanted = exact(ids).logits.log_softmax(-1)
        parts = [
            model(ids).logits,
            torch.cat([model(ids[:, start : start + 2]).logits for start in range(0, 128, 2)], 1),
        ]
        alone = torch.cat([exact(ids[:, start : start + 2]).logits for start in range(0, 128, 2)], 1).log_softmax(-1)
        return [
            (w.exp() * (w - part.float().log_softmax(-1))).sum(-1).mean().item()
            for w, part in zip((wanted, alone), parts, strict=True)
        ]

    for ours, theirs in zip(divergence(packed), divergence(rounded), strict=True):
        assert ours < 1.5 * theirs
        assert ours < 1e-3
    prompt = {"input_ids": ids[:1, :40], "attention_mask": torch.ones(1, 40, dtype=torch.int64)}
    assert packed.generate(**prompt, max_new_tokens=8, do_sample=False).shape == (1, 48)
    held = sum(memory(m) for m in packed.modules() if isinstance(m, Int4Linear))
    dense = (
        sum(2 * m.weight.numel() for m in rounded.modules() if isinstance(m, nn.Linear))
        - rounded.lm_head.weight.nbytes
    )
    assert held < 0.36 * dense


@with_kernels
def test_a_part_that_is_packed_is_told_of_and_not_saved(tmp_path, caplog):
    steps = hfc.RTN(bits=4, group_size=32, targets=("Linear", "embed_tokens"))
    folder = compress(hfc.Job(steps=(steps,), format="compressed-tensors"), tmp_path / "made")
    model = hfc.load(folder, device="cpu")
    assert "1 of 22 packed weights were unpacked while they were loaded" in caplog.text
    with pytest.raises(
        InvalidValueError, match="packed, and others are not as the checkpoint holds them: nothing was saved"
    ):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()


def test_what_is_unpacked_for_every_forward_is_told_of(tmp_path, caplog):
    folder = compress(RECIPES["vectors"], tmp_path / "made")
    hfc.load(folder, device="cpu")
    assert not caplog.text
    hfc.load(folder, packed=True, device="cpu")
    assert "21 of 21 packed weights are unpacked each time they run: torch has no kernel for them here." in caplog.text


# experts


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_experts_stay_packed_and_are_saved_as_they_were_stored(name, tmp_path):
    model = make_model(MIXTURES[name](), torch.bfloat16)
    job = hfc.Job(steps=(hfc.GPTQ(bits=4, group_size=32),))
    folder = hfc.compress(model, job, tmp_path / "made", calibration=token_ids(8, 32), evaluate=False).output_dir
    dense, packed = load(folder, False), load(folder, True)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=1e-5)
    assert linears(packed, StoredLinear) == len(
        [key for key in load_file(folder / "model.safetensors") if key.endswith("packed")]
    )
    assert memory(packed) < 0.5 * memory(dense)
    fast = hfc.load(folder, device="cpu")
    experts = [m for n, m in fast.named_modules() if ".experts." in n and isinstance(m, Int4Linear)]
    assert len(experts) > 3 * 4
    near = torch.nn.functional.cosine_similarity(logits(fast).float(), logits(dense), dim=-1)
    assert near.median() > 0.999  # a router may send a token elsewhere in bfloat16
    fast.save_pretrained(tmp_path / "again")
    stored, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[key], again[key]) for key in stored)


@pytest.mark.parametrize("name", ["gpt-oss", "granite-moe"])
def test_experts_that_belong_together_are_put_together(name, tmp_path):
    model = make_model(TOGETHER[name](), torch.bfloat16)
    job = hfc.Job(steps=(hfc.Entropy(bits=3.0),), format="hfcompress")
    folder = hfc.compress(model, job, tmp_path / "made", calibration=token_ids(8, 32), evaluate=False).output_dir
    dense, packed = load(folder, False), load(folder, True)
    assert not any(".experts.0." in name for name, _ in dense.named_modules())
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=1e-5)
    with pytest.raises(InvalidValueError, match="nothing was saved"):
        packed.save_pretrained(tmp_path / "again")
    dense.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(dense), logits(type(dense).from_pretrained(tmp_path / "again", dtype=torch.float32)))


# rounded inputs


@pytest.mark.skipif(not multiplies_exactly(), reason="this CPU has no instructions for products of 8-bit integers")
def test_integers_are_multiplied_with_integers(tiny, tmp_path):
    step = hfc.RTN(bits=8, group_size=-1, activations="dynamic")
    folder = hfc.compress(None, step, tmp_path / "made", calibration=token_ids(8, 32), evaluate=False).output_dir
    packed, reference = hfc.load(folder, device="cpu"), load(folder, False)
    assert linears(packed, RoundingInt8Linear) == 7 * len(packed.model.layers)
    assert memory(packed) < 0.6 * memory(reference)
    streamed = StreamedModel(
        Checkpoint.open(folder),
        tensors=decoded(Checkpoint.open(folder).tensors, Checkpoint.open(folder).quantization_config),
    )
    [stream] = streamed.forward_blocks(streamed.embed([Batch(IDS)]))
    with streamed.outside(head=True) as outside:
        solved = streamed.logits(outside, stream)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    off, usual = ((logits(model).float() - solved).abs().mean() for model in (packed, theirs))
    assert off < 1.2 * usual  # what plain transformers is off in bfloat16
    packed.save_pretrained(tmp_path / "again")
    stored, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[key], again[key]) for key in stored)


@given(seed=st.integers(0, 10_000), rows=st.sampled_from([8, 24, 40]), tokens=st.integers(1, 40), zero=st.booleans())
@settings(deadline=None, max_examples=30)
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(seed, rows, tokens, zero):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, 32), generator=generator, dtype=torch.int8)
    weight = QuantizedWeight(
        codes, torch.rand(rows, 1, generator=generator) + 0.1, None, Grid(8, activations="dynamic")
    )
    inputs = torch.randn(tokens, 32, generator=generator) * 10 ** (4 * torch.rand(tokens, 1, generator=generator) - 2)
    if zero:
        inputs[0] = 0
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    three = inputs[None]  # of two dimensions compressed-tensors would take one scale for all
    scales, zeros = compute_dynamic_scales_and_zp(three, args, nn.Linear(32, rows))
    [rounded] = fake_quantize(three, scales, zeros, args)
    bias = nn.Parameter(torch.randn(rows, generator=generator))
    found = RoundingInt8Linear(weight, get_format("int-quantized"), bias)(inputs)
    given = (rounded / scales[0]).round().double() * scales[0].double()  # free of the products' own rounding
    exact = nn.functional.linear(given, codes.double() * weight.scales.double(), bias.double()).detach()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
