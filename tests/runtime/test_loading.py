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

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from torch import nn

import hfcompress as hfc
from hfcompress.errors import HfcompressError
from hfcompress.evaluation.comparison import whole_model
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.runtime.stored_linear import StoredLinear


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


def compress(recipe, output, name: str = "llama"):
    model = make_model(CONFIGS[name](), torch.float32)
    return hfc.compress(model, recipe, output, calibration=token_ids(8, 32), evaluate=False).output_dir


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def linears(model, kind) -> int:
    return sum(type(module) is kind for module in model.modules())


def memory(model) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", RECIPES)
def test_packed_or_not_it_is_the_model_that_transformers_loads(name, tmp_path):
    folder = compress(RECIPES[name], tmp_path / "made")
    dense, packed = hfc.load(folder, device="cpu"), hfc.load(folder, packed=True, device="cpu")
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
    packed = hfc.load(folder, packed=True, device="cpu")
    assert any(m.bias is not None for m in packed.modules() if isinstance(m, StoredLinear))
    assert torch.equal(logits(packed), logits(hfc.load(folder, device="cpu")))


@pytest.mark.parametrize(
    "recipe", [hfc.Share(blocks=0.5, rank=4), hfc.RTN(bits=8, group_size=-1, activations="dynamic")]
)
def test_what_leans_on_others_or_rounds_its_inputs_is_unpacked(recipe, tmp_path):
    folder = compress(recipe, tmp_path / "made")
    packed = hfc.load(folder, packed=True, device="cpu")
    assert linears(packed, nn.Linear) > 1 or linears(packed, StoredLinear) == 0
    assert torch.equal(logits(packed), logits(hfc.load(folder, device="cpu")))


def test_a_dense_model_loads_too(tmp_path):
    model = make_model(CONFIGS["llama"](), torch.float32)
    model.save_pretrained(tmp_path / "dense")
    for packed in (False, True):
        assert torch.equal(logits(hfc.load(tmp_path / "dense", packed=packed, device="cpu")), logits(model))


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(HfcompressError, match="nothing"):
        hfc.load(tmp_path / "nothing", device="cpu")
