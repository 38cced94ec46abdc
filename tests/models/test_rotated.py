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
"""A rotated checkpoint is the same function: its logits are the original's, on plain transformers; else it is left alone."""

import copy

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from hfcompress.models import rotation
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.rotated_tensor import RotatedTensor, unrounded
from hfcompress.models.rotation import rotated
from hfcompress.solvers.rotation import Rotation


IDS = torch.from_numpy(token_ids(2, 24, seed=5))
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 96,  # 12 times 8: no power of two
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FOLDED = {
    **{name: CONFIGS[name] for name in ("llama", "mistral", "mistral-sliding", "qwen3-mixed", "phi3", "qwen2")},
    "llama-tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama-multi-query": lambda: LlamaConfig(**{**_SIZES, "num_key_value_heads": 1}),
    "llama-own-head": lambda: LlamaConfig(**{**_SIZES, "num_key_value_heads": 6}, head_dim=20),
    "qwen3-tied": lambda: Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True),
}


def plain(checkpoint: Checkpoint):
    """The checkpoint as plain transformers runs it, in float64."""
    model = AutoModelForCausalLM.from_config(checkpoint.config).double().eval()
    state = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    assert not unexpected
    assert set(missing) <= (set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set())
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To what RMS norms, which transformers computes in float32 whatever the weights are, leave of float64."""
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)])
def test_the_logits_are_the_originals(name, parts):
    model = make_model(FOLDED[name](), torch.float64)
    before = copy.deepcopy(model.state_dict())
    expected = logits(model)
    found = rotated(Checkpoint.open(model), *parts)
    assert (found.hidden, found.heads > 0) == parts
    assert found.reasons == {}
    require_same(logits(plain(found.checkpoint)), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FOLDED)
def test_every_linear_of_a_block_is_turned(name):
    """No reader, writer or head is left out: else outliers would stay where they were."""
    model = make_model(FOLDED[name]())
    found = rotated(Checkpoint.open(model))
    assert found.heads == len(model.model.layers)
    before = model.state_dict()
    for key, tensor in found.checkpoint.tensors.items():
        if "norm" in key:  # those of the stream lose their gain, those of queries and keys do not
            inner = "q_norm" in key or "k_norm" in key
            assert torch.equal(tensor.read(), before[key] if inner else torch.ones_like(before[key]))
        elif key.endswith("weight"):
            assert not torch.allclose(tensor.read(), before[key], atol=1e-2), key


def test_outliers_of_the_stream_are_spread():
    model = make_model(CONFIGS["llama"](), torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:, 7] *= 50
    found = rotated(Checkpoint.open(model)).checkpoint.tensors
    for index in range(3):
        key = f"model.layers.{index}.self_attn.q_proj.weight"
        before, after = (w.square().sum(0) for w in (model.state_dict()[key], found[key].read()))
        assert before.max() > 50 * before.mean()
        assert after.max() < 3 * after.mean()


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed"])
def test_the_values_rows_and_the_outputs_columns_are_those_of_a_plain_product(name):
    """R2 against the textbook: each key-value head's rows times R, each query head's columns times R."""
    model = make_model(CONFIGS[name](), torch.float64)
    found = rotated(Checkpoint.open(model), hidden=False, seed=3).checkpoint.tensors
    r = rotation.random_rotation(16, 4).matrix()
    for index, layer in enumerate(model.model.layers):
        stem = f"model.layers.{index}.self_attn"
        values = layer.self_attn.v_proj.weight.reshape(2, 16, 64)
        expected = torch.einsum("hdi,de->hei", values, r).reshape(32, 64)
        torch.testing.assert_close(found[f"{stem}.v_proj.weight"].read(), expected, rtol=0, atol=1e-12)
        expected = (layer.self_attn.o_proj.weight.reshape(64, 4, 16) @ r).reshape(64, 64)
        torch.testing.assert_close(found[f"{stem}.o_proj.weight"].read(), expected, rtol=0, atol=1e-12)
        assert torch.equal(found[f"{stem}.q_proj.weight"].read(), layer.self_attn.q_proj.weight)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma3", "what a block adds to its residual stream is no linear's output"),
        ("gpt2", "transformer.h.0.ln_1 is no RMS norm"),
        ("opt", "model.decoder.layers.0.self_attn_layer_norm is no RMS norm"),
    ],
)
def test_a_stream_that_cannot_be_rotated_is_left_alone_with_the_reason_and_the_heads_are_rotated(name, said):
    model = make_model(CONFIGS[name](), torch.float64)
    found = rotated(Checkpoint.open(model))
    assert not found.hidden
    assert found.heads == 3
    assert said in found.reasons["hidden"]
    assert found.config_changes == {}
    require_same(logits(plain(found.checkpoint)), logits(model))
    assert rotated(Checkpoint.open(model), heads=False).checkpoint is None


def test_tied_embeddings_part_where_the_last_norm_has_gains():
    model = make_model(FOLDED["llama-tied"]())
    found = rotated(Checkpoint.open(model))
    assert found.config_changes == {"tie_word_embeddings": False}
    assert found.checkpoint.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True
    assert found.added_bytes == 128 * 96 * 4
    head = found.checkpoint.tensors["lm_head.weight"].read()
    assert not torch.allclose(head, found.checkpoint.tensors["model.embed_tokens.weight"].read(), atol=1e-2)


def test_tied_embeddings_stay_tied_where_the_last_norm_has_one_gain_for_all():
    model = make_model(FOLDED["llama-tied"](), torch.float64)
    model.model.norm.weight.data.fill_(1.25)
    found = rotated(Checkpoint.open(model))
    assert found.hidden
    assert found.config_changes == {}
    assert found.added_bytes == 0
    assert "lm_head.weight" not in found.checkpoint.tensors
    require_same(logits(plain(found.checkpoint)), logits(model))


def test_heads_only_change_no_configuration():
    found = rotated(Checkpoint.open(make_model(FOLDED["llama-tied"]())), hidden=False)
    assert found.config_changes == {}
    assert found.added_bytes == 0


def test_a_fold_that_changes_the_logits_is_not_kept(monkeypatch):
    """As it would be if the roles had been read wrongly: here the rotation is none."""

    def crooked(size, seed):
        return Rotation(torch.ones(size).double(), (torch.eye(size).double() * 1.01,))

    monkeypatch.setattr(rotation, "random_rotation", crooked)
    found = rotated(Checkpoint.open(make_model(CONFIGS["llama"]())))
    assert found.checkpoint is None
    assert set(found.reasons) == {"hidden", "heads"}
    assert all("the rotated model's logits would differ by 0.0" in reason for reason in found.reasons.values())


def test_a_wrong_width_of_the_heads_is_noticed(monkeypatch):
    """One token cannot tell two heads of 20 from one of 40, many tokens can; what is right is still done."""
    model = make_model(FOLDED["llama-own-head"](), torch.float64)
    monkeypatch.setattr(rotation, "_head_dim", lambda config: 40)
    found = rotated(Checkpoint.open(model))
    assert found.hidden
    assert found.heads == 0
    assert "logits would differ" in found.reasons["heads"]
    require_same(logits(plain(found.checkpoint)), logits(model))


def test_the_same_seed_is_the_same_checkpoint_and_another_is_another():
    checkpoint = Checkpoint.open(make_model(CONFIGS["llama"]()))
    one, again, other = (rotated(checkpoint, seed=seed).checkpoint.tensors for seed in (0, 0, 1))
    assert all(torch.equal(one[key].read(), again[key].read()) for key in one)
    assert not torch.equal(one["model.embed_tokens.weight"].read(), other["model.embed_tokens.weight"].read())


def test_tensors_are_written_in_their_own_dtype_and_solved_without_rounding():
    checkpoint = rotated(Checkpoint.open(make_model(CONFIGS["llama"](), torch.bfloat16))).checkpoint
    solved = "model.layers.0.mlp.up_proj.weight"
    view = unrounded(checkpoint.tensors, {solved})
    assert all(tensor.dtype == torch.bfloat16 for tensor in view.values())
    assert all(view[key].read().dtype == torch.bfloat16 for key in view if key != solved)
    exact = view[solved][...]
    assert exact.dtype == torch.float32
    assert torch.equal(exact.bfloat16(), checkpoint.tensors[solved][...])
    assert not torch.equal(exact.bfloat16().float(), exact)


def test_a_tensor_is_rotated_in_pieces(monkeypatch):
    from hfcompress.models import rotated_tensor

    checkpoint = rotated(Checkpoint.open(make_model(CONFIGS["llama"]()))).checkpoint
    whole = {key: tensor.read() for key, tensor in checkpoint.tensors.items()}
    monkeypatch.setattr(rotated_tensor, "PIECE", 200)
    for key, tensor in checkpoint.tensors.items():
        if isinstance(tensor, RotatedTensor):
            torch.testing.assert_close(tensor.read(), whole[key], rtol=0, atol=1e-6)
