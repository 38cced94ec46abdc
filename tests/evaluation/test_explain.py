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
"""Each number of `explain` against plain transformers: whole models, blocks really swapped, float64 statistics."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, Lfm2Config, LlamaConfig, MambaConfig

import hfcompress as hfc
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, UnsupportedModelError
from hfcompress.evaluation import explain
from hfcompress.evaluation.attention_maps import AttentionDistance, attention_maps
from hfcompress.evaluation.comparison import Comparison
from hfcompress.models.checkpoint import Checkpoint


BLOCK_LISTS = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}
ARCHITECTURES = ["llama", "qwen3-mixed", "gemma3", "gpt2", "opt"]
ERRORS = ("relative_error", "relative_error_alone", "attention_distance", "kl_swapped_in", "kl_swapped_in_stderr")


def blocks_of(model) -> nn.ModuleList:
    return model.get_submodule(BLOCK_LISTS.get(model.config.model_type, "model.layers"))


def perturbed(model, block: int | None = None):
    """A copy with other weights: everywhere, or in one block."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    for parameter in (other if block is None else blocks_of(other)[block]).parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return other


def swapped_in(model, candidate, block: int):
    """The model with one block of the candidate."""
    other = copy.deepcopy(model)
    blocks_of(other)[block] = blocks_of(candidate)[block]
    return other


def padded_tokens() -> Tokens:
    """Rows padded on the left, on the right, and not at all."""
    mask = np.ones((4, 24), dtype=bool)
    mask[1, :5] = mask[2, 17:] = False
    return Tokens(token_ids(4, 24), "test", mask)


def compare(baseline, candidate, tokens: Tokens | None = None, **options) -> Comparison:
    tokens = tokens or Tokens(token_ids(4, 24), "test")
    return Comparison(
        baseline=Checkpoint.open(baseline), candidate=Checkpoint.open(candidate), tokens=tokens, **options
    )


def measured(*args, **options) -> dict:
    return explain.measure(compare(*args, **options))


def assert_alike(found: dict, expected: dict, relative: float) -> None:
    for ours, theirs in zip(found["blocks"], expected["blocks"], strict=True):
        assert [ours[key] for key in ERRORS] == pytest.approx([theirs[key] for key in ERRORS], rel=relative)
    np.testing.assert_allclose(found["attention"], expected["attention"], rtol=relative)


@torch.no_grad()
def run(model, tokens: Tokens):
    """Every block's output, every block's attention, and the logits, of a whole model under eager attention."""
    outputs: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks_of(model)
    ]
    mask = None if tokens.mask is None else torch.from_numpy(tokens.mask).long()
    found = model(torch.from_numpy(tokens.input_ids), attention_mask=mask, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return (
        [o.numpy().astype(np.float64) for o in outputs],
        [a.double().numpy() for a in found.attentions],
        found.logits,
    )


def reference(baseline, candidate, tokens: Tokens) -> tuple[list[dict], list[list[float]]]:
    """The slow way: one whole model for each block."""
    mask = np.ones_like(tokens.input_ids, dtype=bool) if tokens.mask is None else tokens.mask
    baseline, candidate = copy.deepcopy(baseline), copy.deepcopy(candidate)
    for model in (baseline, candidate):
        model.set_attn_implementation("eager")
    outputs, attention, logits = run(baseline, tokens)
    own_outputs, own_attention, _ = run(candidate, tokens)

    def relative(found, expected):
        return np.linalg.norm((found - expected)[mask]) / np.linalg.norm(expected[mask])

    blocks, heads = [], []
    for index in range(len(blocks_of(baseline))):
        alone, _, swapped = run(swapped_in(baseline, candidate, index), tokens)
        distance = 0.5 * np.abs(attention[index] - own_attention[index]).sum(-1)  # (rows, heads, queries)
        heads.append([distance[:, head][mask].mean() for head in range(distance.shape[1])])
        p, q = (torch.log_softmax(x[:, :-1].double(), -1).numpy() for x in (logits, swapped))
        kl = (np.exp(p) * (p - q)).sum(-1)
        kept = mask[:, 1:] & mask[:, :-1]
        mean = kl[kept].mean()
        residuals = np.array([(kl[row][kept[row]] - mean).sum() for row in range(len(kl))])
        count = len(residuals)
        blocks.append(
            {
                "relative_error": relative(own_outputs[index], outputs[index]),
                "relative_error_alone": relative(alone[index], outputs[index]),
                "attention_distance": np.mean(heads[-1]),
                "kl_swapped_in": mean,
                "kl_swapped_in_stderr": np.sqrt(count / (count - 1) * (residuals**2).sum()) / kept.sum(),
            }
        )
    return blocks, heads


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_number_is_that_of_whole_models(name, padded):
    baseline = make_model(CONFIGS[name]())
    candidate = perturbed(baseline)
    tokens = padded_tokens() if padded else Tokens(token_ids(4, 24), "test")
    found = measured(baseline, candidate, tokens)
    blocks, heads = reference(baseline, candidate, tokens)
    assert [b["block"] for b in found["blocks"]] == [0, 1, 2]
    for ours, theirs in zip(found["blocks"], blocks, strict=True):
        assert min(theirs.values()) > 1e-6  # there is something to be right about
        assert {k: ours[k] for k in ERRORS} == pytest.approx(theirs, rel=1e-4)
    np.testing.assert_allclose(found["attention"], heads, rtol=1e-4)
    assert found["how"]["tokens"] == tokens.count
    assert found["how"]["predicted_positions"] == (4 * 23 if not padded else 4 * 23 - 5 - 7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_changed_block_is_the_one_that_hurts(name):
    baseline = make_model(CONFIGS[name]())
    candidate = perturbed(baseline, block=1)
    found = measured(baseline, candidate)["blocks"]
    ids = torch.from_numpy(token_ids(4, 24))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits[:, :-1].double(), -1) for m in (baseline, candidate))
    whole = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found[1]["kl_swapped_in"] == pytest.approx(whole, rel=1e-4)
    assert whole > 1e-4
    assert found[0]["kl_swapped_in"] == found[2]["kl_swapped_in"] == 0
    assert found[0]["relative_error"] == found[0]["relative_error_alone"] == found[2]["relative_error_alone"] == 0
    assert found[1]["relative_error"] == found[1]["relative_error_alone"] > 1e-3
    assert found[2]["relative_error"] > 1e-3
    assert found[0]["attention_distance"] == 0 < min(found[1]["attention_distance"], found[2]["attention_distance"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_no_distance_from_itself(name):
    model = make_model(CONFIGS[name]())
    found = measured(model, model, padded_tokens())
    assert all(block[key] == 0 for block in found["blocks"] for key in ERRORS)
    assert not np.any(found["attention"])


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_what_stands_on_padding_is_of_no_consequence(name):
    baseline = make_model(CONFIGS[name]())
    candidate, tokens = perturbed(baseline), padded_tokens()
    other = np.where(tokens.mask, tokens.input_ids, (tokens.input_ids + 7) % 128)
    assert (other != tokens.input_ids).any()
    found, again = (measured(baseline, candidate, replace(tokens, input_ids=ids)) for ids in (tokens.input_ids, other))
    assert_alike(found, again, 1e-9)


def test_how_the_rows_are_batched_is_of_no_consequence(llama, monkeypatch):
    candidate, tokens = perturbed(llama), padded_tokens()
    found = measured(llama, candidate, tokens)
    monkeypatch.setattr(explain, "ATTENTION_BYTES", 0)  # so that each row goes alone
    assert len(explain._batches(compare(llama, candidate, tokens), tokens)) == 4
    assert_alike(found, measured(llama, candidate, tokens), 1e-5)


def test_long_rows_are_read_from_their_first_token(llama, monkeypatch):
    """Rotary positions are relative, so what remains of a left-padded row is what the row says without its padding."""
    candidate, ids = perturbed(llama), token_ids(4, 24)
    mask = np.ones((4, 24), dtype=bool)
    mask[0, :6] = mask[1, :8] = mask[2, :3] = False
    starts = [6, 8, 3, 0]
    cut = np.stack([row[start : start + 16] for row, start in zip(ids, starts, strict=True)])
    expected = measured(llama, candidate, Tokens(cut, "test"))
    monkeypatch.setattr(explain, "SEQ_LEN", 16)
    found = measured(llama, candidate, Tokens(ids, "test", mask))
    assert found["how"]["seq_len"] == 16
    assert found["blocks"] == expected["blocks"]


def test_rows_are_drawn_by_the_seed_within_the_budget(llama, monkeypatch):
    tokens = Tokens(token_ids(40, 12), "test")
    candidate = perturbed(llama)

    def rows(seed):
        return explain._rows(compare(llama, candidate, tokens, seed=seed)).input_ids

    assert len(rows(0)) == explain.ROWS
    assert np.array_equal(rows(0), rows(0))
    assert not np.array_equal(rows(0), rows(1))
    known = {row.tobytes() for row in tokens.input_ids}
    assert {row.tobytes() for row in rows(1)} <= known
    monkeypatch.setattr(
        explain, "HIDDEN_BYTES", 3 * (3 + 2) * 12 * 64 * 4
    )  # rows * streams * seq_len * hidden * float32
    found = measured(llama, candidate, tokens)
    assert (found["how"]["rows"], found["how"]["rows_available"]) == (3, 40)
    monkeypatch.setattr(explain, "HIDDEN_BYTES", 1)
    alone = measured(llama, candidate, tokens)
    assert alone["how"]["rows"] == 1
    assert [block["kl_swapped_in_stderr"] for block in alone["blocks"]] == [None] * 3


def test_steps_are_as_many_as_were_announced(llama, monkeypatch):
    class Counting:
        steps = 0

        def start(self, total): ...

        def note(self, message): ...

        def step(self, description, amount=1):
            self.steps += amount

    monkeypatch.setattr(explain, "ATTENTION_BYTES", 0)
    progress = Counting()
    comparison = compare(llama, perturbed(llama), progress=progress)
    assert explain.units(comparison) == 3 + 3 + 4
    explain.measure(comparison)
    assert progress.steps == 3 + 3 + 4


def test_a_small_divergence_is_not_lost_in_rounding():
    """Some 1e-9 nats, over more positions than are compared at once; in float32 the rounding would be larger."""
    torch.manual_seed(0)
    logits = 5 * torch.randn(300, 50)
    other = logits + 1e-4 * torch.randn(300, 50)
    p, q = (x.double().numpy() for x in (logits, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    np.testing.assert_allclose(explain._kl(logits, other), (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-13)


# the compressed model


def test_a_compressed_model_is_read_through_its_decompressor(tiny, tiny_w4):
    """Against transformers' own loading of the folder; and the linears are the manifest's."""
    tokens = Tokens(np.load(tiny / "evaluation.npy")[:3, :48].astype(np.int64), "tiny")
    found = measured(tiny, tiny_w4.output_dir, tokens)
    models = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (tiny, tiny_w4.output_dir))
    blocks, heads = reference(*models, tokens)
    for ours, theirs in zip(found["blocks"], blocks, strict=True):
        assert {k: ours[k] for k in ERRORS} == pytest.approx(theirs, rel=1e-4)
    np.testing.assert_allclose(found["attention"], heads, rtol=1e-4)
    manifest = json.loads((tiny_w4.output_dir / "hfcompress.json").read_text())
    expected = {row["name"]: row["relative_output_error"] for row in manifest["linears"]}
    rows = {f"model.layers.{r['block']}.{r['linear']}": r["relative_output_error"] for r in found["linears"]}
    assert rows == expected
    assert len(rows) == 4 * 7
    assert all(error > 0 for error in rows.values())
    assert found["how"]["missing"] == []
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_the_manifest_does_not_tell_is_said(llama, saved_llama):
    rows = [("model.layers.1.mlp.up_proj", None), ("model.layers.2.self_attn.q_proj", 0.25), ("lm_head", 0.5)]
    linears = [{"name": name, "relative_output_error": error} for name, error in rows]
    manifest = {"base": {"model": "x", "revision": None}, "recipe": {}, "calibration": {}, "linears": linears}
    (saved_llama / "hfcompress.json").write_text(json.dumps(manifest))
    found = measured(llama, saved_llama)
    assert found["linears"] == [
        {"block": 1, "linear": "mlp.up_proj", "relative_output_error": None},
        {"block": 2, "linear": "self_attn.q_proj", "relative_output_error": 0.25},
    ]
    assert found["how"]["missing"] == [
        "linears: lm_head outside the blocks",
        "linears: no output error where a linear was compressed without calibration data",
    ]


# attention that cannot be seen


_SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_blocks_without_attention_have_no_distance():
    config = Lfm2Config(
        **_SMALL,
        **_SPECIAL,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    baseline = make_model(config)
    found = measured(baseline, perturbed(baseline))
    assert [block["attention_distance"] is None for block in found["blocks"]] == [True, False, True]
    assert found["attention"][0] == found["attention"][2] == [None] * 4
    assert np.mean(found["attention"][1]) == pytest.approx(found["blocks"][1]["attention_distance"])
    assert found["how"]["missing"][0] == (
        "attention_distance: blocks 0, 2 of the two models return no attention maps of the same heads"
    )
    assert all(block["kl_swapped_in"] > 1e-6 for block in found["blocks"])


def test_a_model_without_attention_is_explained_without():
    baseline = make_model(MambaConfig(**_SMALL, **_SPECIAL, state_size=4))
    found = measured(baseline, perturbed(baseline))
    assert found["attention"] is None
    assert all(block["attention_distance"] is None and block["relative_error"] > 1e-6 for block in found["blocks"])


def test_heads_that_are_not_the_same_are_not_compared(llama):
    config = LlamaConfig(**{**llama.config.to_dict(), "num_attention_heads": 2, "head_dim": 32})
    found = measured(llama, make_model(config))
    assert found["attention"] is None
    assert all(block["kl_swapped_in"] > 1e-6 for block in found["blocks"])


def test_only_probabilities_count_as_attention_maps():
    """A position bias of the same shape, logits, and a wrapper that hands on an inner module's map."""
    scores = torch.randn(2, 3, 5, 5)
    weights = scores.softmax(-1)

    class Inner(nn.Module):
        def forward(self, x):
            return x, weights, scores

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    block = Wrapper()
    with attention_maps(block, 2, 5) as maps:
        block(torch.zeros(1))
    assert len(maps) == 1
    assert maps[0] is weights
    block(torch.zeros(1))
    assert len(maps) == 1  # the hooks are gone


def test_the_distance_is_zero_to_one():
    mask = torch.ones(1, 2, dtype=torch.bool)
    first, second = (torch.eye(2)[index].expand(1, 1, 2, 2) for index in (0, 1))
    both = torch.cat([first, (first + second) / 2], dim=1)
    distance = AttentionDistance()
    distance.add([both], [torch.cat([second, second], dim=1)], mask)
    assert distance.result() == [1.0, 0.5]


# errors


@pytest.mark.parametrize(
    "config",
    [{"quant_method": "hqq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}],  # the latter rounds inputs too
    ids=lambda config: config["quant_method"],
)
@pytest.mark.parametrize("which", ["candidate", "baseline"])
def test_another_quantizer_is_one_sentence(llama, which, config):
    checkpoints = {"candidate": Checkpoint.open(llama), "baseline": Checkpoint.open(llama)}
    checkpoints[which].config.quantization_config = config
    comparison = Comparison(**checkpoints, tokens=Tokens(token_ids(2, 8), "test"))
    with pytest.raises(
        UnsupportedModelError,
        match=rf"^LlamaForCausalLM is quantized by {config['quant_method']}, which cannot be read block by block; "
        r"leave explain out of --measure\.$",
    ):
        explain.measure(comparison)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": 2}, "has 2 decoder blocks and LlamaForCausalLM has 3 decoder blocks"),
        ({"hidden_size": 32}, "has a hidden size of 32 and LlamaForCausalLM has a hidden size of 64"),
        ({"vocab_size": 96}, "has a vocabulary of 96 and LlamaForCausalLM has a vocabulary of 128"),
    ],
)
def test_models_of_other_blocks_are_one_sentence(llama, changed, said):
    other = make_model(LlamaConfig(**{**llama.config.to_dict(), "head_dim": 16, **changed}))
    with pytest.raises(
        UnsupportedModelError, match=rf"^LlamaForCausalLM {said}, so their blocks cannot be compared; "
    ):
        measured(llama, other)


def test_rows_that_predict_nothing_are_one_sentence(llama):
    mask = np.zeros((2, 8), dtype=bool)
    mask[:, ::2] = True
    with pytest.raises(CalibrationError, match=r"^No row of test has two tokens that follow each other"):
        measured(llama, llama, Tokens(token_ids(2, 8), "test", mask))


# a rotated model


@pytest.fixture(scope="module")
def rotated_8_bit(tmp_path_factory):
    """A model whose residual stream is another one's, turned: block by block they have nothing in common."""
    folder = tmp_path_factory.mktemp("explain") / "rotated"
    recipe = hfc.Rotate(when="always", seed=3) >> hfc.GPTQ(bits=8, group_size=-1)
    hfc.compress(make_model(CONFIGS["llama"]()), recipe, folder, calibration=token_ids(8, 32), evaluate=False)
    return folder


def test_a_rotated_model_is_compared_with_its_original_rotated_alike(llama, rotated_8_bit):
    found = measured(llama, rotated_8_bit)
    for block in found["blocks"]:
        assert 0 < block["relative_error_alone"] < 0.02
        assert 0 < block["relative_error"] < 0.02
        assert 0 < block["kl_swapped_in"] < 1e-2


def test_an_original_that_cannot_be_rotated_alike_is_one_sentence(rotated_8_bit):
    with pytest.raises(UnsupportedModelError, match=r"is rotated and that of .* cannot be.*leave explain out"):
        measured(make_model(CONFIGS["gemma3"]()), rotated_8_bit)
