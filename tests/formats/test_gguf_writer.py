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
"""The GGUF file: read by gguf's own reader and by transformers, it holds the values of the folder it was made from."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from conftest import _COMMON, _MIXED, CONFIGS, in_fresh_process, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

import hfcompress as hfc
from hfcompress.cli import OK, USER_ERROR, _guarded, app
from hfcompress.errors import (
    CheckpointError,
    InvalidValueError,
    MissingExtraError,
    OutputError,
    UnsupportedModelError,
)
from hfcompress.formats.compressed_tensors import decoded
from hfcompress.formats.gguf import write_gguf
from hfcompress.formats.gguf.writer import main_type
from hfcompress.hub.push import carried_files
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.recipes import Job


COMPARE = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
folder = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
file = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=sys.argv[2], dtype=torch.float32).eval()
ids = torch.from_numpy(np.load(sys.argv[3])[:8].astype("int64"))
with torch.no_grad():
    a, b = folder(ids).logits, file(ids).logits
print(json.dumps({"largest": a.abs().max().item(), "difference": (a - b).abs().max().item()}))
"""


def compressed(model, output, **settings):
    """The folder of a model (`None` for the tiny Llama) rounded to nearest, not measured."""
    layout = settings.pop("format", "compressed-tensors")
    hfc.compress(model, Job(steps=(hfc.RTN(**settings),), format=layout), output, evaluate=False)
    return output


def values(folder):
    """name -> what stands in the folder, in float32."""
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.quantization_config
    stored = checkpoint.tensors if config is None else decoded(checkpoint.tensors, config)
    return {name: tensor.read().float() for name, tensor in stored.items()}


def read(path):
    """name -> (type, values) by gguf's own reader."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, torch.tensor(gguf.dequantize(t.data, t.tensor_type))) for t in tensors}


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def halves_again(value, heads):
    """llama.cpp's order of a projection's rows back to transformers', row by row."""
    back = torch.empty_like(value)
    width = len(value) // heads
    for head in range(heads):
        for i in range(width // 2):
            back[head * width + i] = value[head * width + 2 * i]
            back[head * width + width // 2 + i] = value[head * width + 2 * i + 1]
    return back


def assert_the_same_values(folder, path, permuted=True):
    """Every tensor of the file, put back in transformers' order, is the folder's."""
    config = Checkpoint.open(folder).config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored, found = values(folder), read(path)
    for source, value in stored.items():
        _, there = found.pop(names.get_name(source, try_suffixes=(".weight", ".bias")))
        if permuted and "q_proj" in source:
            there = halves_again(there, config.num_attention_heads)
        if permuted and "k_proj" in source:
            there = halves_again(there, config.num_key_value_heads)
        assert torch.equal(there, value), source
    assert not found


@pytest.fixture(scope="module")
def tiny_q4(tmp_path_factory):
    """The tiny Llama by the shipped recipe: the folder, and the manifest."""
    output = tmp_path_factory.mktemp("gguf") / "q4"
    result = hfc.compress(None, "gguf-q4_0", output, samples=32, evaluate=False)
    return output, result.manifest


def test_the_recipe_writes_the_file_beside_with_the_same_values(tiny_q4):
    folder, manifest = tiny_q4
    written = manifest["gguf"]
    path = folder / "model-q4_0.gguf"
    assert written["file"] == path.name
    assert written["bytes"] == path.stat().st_size
    assert written["exact"]
    assert written["inexact"] == written["notes"] == []
    assert written["types"] == {"embeddings": {"BF16": 1}, "linears": {"Q4_0": 28}, "vectors": {"F32": 9}}
    assert json.loads((folder / "hfcompress.json").read_text())["gguf"] == written
    assert not list(folder.glob("*.tmp"))
    assert_the_same_values(folder, path)


def test_the_folder_is_an_ordinary_checkpoint(tiny_q4):
    config = json.loads((tiny_q4[0] / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_transformers_computes_the_same_from_either(tiny_q4, tiny):
    compared = in_fresh_process(COMPARE, str(tiny_q4[0]), "model-q4_0.gguf", str(tiny / "evaluation.npy"))
    assert compared["largest"] > 1
    assert compared["difference"] == 0


def test_transformers_reads_the_same_tokenizer(tiny_q4):
    folder, _ = tiny_q4
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="model-q4_0.gguf")
    for text in ("def f(x):\n    return x + 1  # it's 2024", "é日本 \t\n\n x", "   spaces   12345 ?!"):
        assert theirs(text, add_special_tokens=False).input_ids == ours(text, add_special_tokens=False).input_ids


def test_hyperparameters_and_names(tiny_q4):
    folder, _ = tiny_q4
    found = fields(folder / "model-q4_0.gguf")
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == folder.name
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert found["llama.attention.head_count_kv"] == 2
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert len(found["tokenizer.ggml.tokens"]) == 1024


def test_a_push_carries_it_and_the_card_names_it(tiny_q4):
    folder, _ = tiny_q4
    assert "model-q4_0.gguf" in carried_files(folder)
    card = (folder / "README.md").read_text()
    assert "llama-cli -m model-q4_0.gguf" in card
    assert "and holds the same values" in card
    assert "- gguf\n" in card


def test_the_terminal_names_the_file(tmp_path, capsys):
    arguments = ["run", "w4a16-fast", "--set", "format=gguf", "--no-eval", "--output", str(tmp_path / "q4")]
    assert _guarded(app, [*arguments, "--set", "rtn.bits=3"]) == OK
    shown = capsys.readouterr().out
    assert "beside: model-q4_0.gguf, " in shown
    assert "the same values (embeddings BF16; vectors F32; linears Q4_0)" in shown
    assert "note: codes of 3 bits take the room" in shown


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 4, "group_size": 128}, "Q4_0"),
        ({"bits": 8, "group_size": 64, "format": "int-quantized"}, "Q8_0"),
        ({"bits": 2, "group_size": 32}, "Q4_0"),
        ({"bits": 8, "group_size": -1}, "Q8_0"),
    ],
)
def test_any_finished_folder_with_such_a_grid_is_exact(tmp_path, settings, kind):
    folder = compressed(None, tmp_path / "folder", **settings)
    written = write_gguf(folder, tmp_path / "deep" / "file.gguf", name="a name")
    assert written["exact"]
    assert main_type(written["types"]) == kind
    assert fields(tmp_path / "deep" / "file.gguf")["general.name"] == "a name"
    assert_the_same_values(folder, tmp_path / "deep" / "file.gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_models_of_other_dtypes(tmp_path, kind, dtype):
    make_model(CONFIGS[kind](), dtype).save_pretrained(tmp_path / "base")
    folder = compressed(tmp_path / "base", tmp_path / "folder", bits=4, group_size=32, format="gguf")
    assert_the_same_values(folder, folder / "model-q4_0.gguf")
    assert read(folder / "model-q4_0.gguf")["token_embd.weight"][0] == ("F32" if dtype == torch.float32 else "F16")
    ids = torch.arange(64 * 2).view(2, 64)
    by_folder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    by_file = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-q4_0.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(by_folder(ids).logits, by_file(ids).logits)


def test_biases_change_places_with_their_rows(tmp_path):
    config = CONFIGS["llama"]()
    config.attention_bias = config.mlp_bias = True
    make_model(config, torch.bfloat16).save_pretrained(tmp_path / "base")
    folder = compressed(tmp_path / "base", tmp_path / "folder", bits=4, group_size=32)
    written = write_gguf(folder, tmp_path / "file.gguf")
    assert written["types"]["vectors"]["F32"] == 7 + 3 * 7
    assert_the_same_values(folder, tmp_path / "file.gguf")


def test_plain_weights_stay_what_they_are(tmp_path, tiny):
    written = write_gguf(tiny, tmp_path / "file.gguf")
    assert written["exact"]
    assert main_type(written["types"]) == "BF16"
    assert "plain weights" in written["notes"][0]
    assert_the_same_values(tiny, tmp_path / "file.gguf")


def test_float16_is_taken_where_it_changes_nothing(tmp_path):
    model = make_model(CONFIGS["llama"](), torch.bfloat16)
    weight = model.model.embed_tokens.weight
    weight.data = weight.data.sign() * weight.data.abs().clamp(min=2.0**-14)
    model.save_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "base", tmp_path / "file.gguf")
    assert read(tmp_path / "file.gguf")["token_embd.weight"][0] == "F16"
    assert_the_same_values(tmp_path / "base", tmp_path / "file.gguf")


def test_gemma3_norms_are_stored_as_what_is_multiplied_by(tmp_path):
    config = Gemma3TextConfig(**_COMMON, **_MIXED, query_pre_attn_scalar=16)
    make_model(config).save_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "base", tmp_path / "file.gguf")
    stored, found = values(tmp_path / "base"), read(tmp_path / "file.gguf")
    for source, name in (
        ("model.norm", "output_norm"),
        ("model.layers.1.self_attn.q_norm", "blk.1.attn_q_norm"),
        ("model.layers.2.post_feedforward_layernorm", "blk.2.post_ffw_norm"),
    ):
        assert torch.equal(found[f"{name}.weight"][1], 1.0 + stored[f"{source}.weight"])
    assert torch.equal(found["blk.0.attn_q.weight"][1], stored["model.layers.0.self_attn.q_proj.weight"])


def test_embeddings_of_8_bits_are_rounded_and_said_to_be(tmp_path, tiny_q4):
    folder, _ = tiny_q4
    written = write_gguf(folder, tmp_path / "file.gguf", embeddings="q8_0")
    assert not written["exact"]
    assert written["inexact"] == ["model.embed_tokens.weight"]
    assert "1 tensors are rounded, model.embed_tokens.weight the first" in written["notes"][0]
    kind, found = read(tmp_path / "file.gguf")["token_embd.weight"]
    stored = values(folder)["model.embed_tokens.weight"]
    step = stored.view(1024, -1, 32).abs().amax(-1, keepdim=True) / 127
    assert kind == "Q8_0"
    assert ((found - stored).view(1024, -1, 32).abs() <= 0.54 * step).all()  # the step is rounded to float16, too


# what the blocks do not hold


def test_asymmetric_codes_are_kept_and_their_offsets_rounded_if_asked(tmp_path):
    folder = compressed(None, tmp_path / "folder", bits=4, group_size=32, symmetric=False)
    with pytest.raises(
        UnsupportedModelError, match=r"Q4_1 holds float16.*offsets of .* are with other digits.* lossy"
    ):
        write_gguf(folder, tmp_path / "file.gguf")
    assert not list(tmp_path.glob("file*"))
    written = write_gguf(folder, tmp_path / "file.gguf", lossy=True)
    assert not written["exact"]
    assert main_type(written["types"]) == "Q4_1"
    stored = values(folder)["model.layers.0.mlp.down_proj.weight"]
    kind, found = read(tmp_path / "file.gguf")["blk.0.ffn_down.weight"]
    assert kind == "Q4_1"
    assert 0 < ((found - stored).norm() / stored.norm()).item() < 5e-4


def test_asymmetric_codes_with_offsets_that_fit_are_exact(tmp_path):
    """A weight whose scales are powers of two: every offset is a float16."""
    model = make_model(CONFIGS["llama"](), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            codes = torch.randint(0, 16, module.weight.shape, generator=generator)
            codes[:, ::32], codes[:, 1::32] = 0, 15  # so that the search finds the step that it was made with
            module.weight.data = ((codes - 5) * 2.0**-6).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    folder = compressed(tmp_path / "base", tmp_path / "folder", bits=4, group_size=32, symmetric=False)
    written = write_gguf(folder, tmp_path / "file.gguf")
    assert written["exact"]
    assert main_type(written["types"]) == "Q4_1"
    assert_the_same_values(folder, tmp_path / "file.gguf")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 8, "group_size": 32, "symmetric": False}, r"no asymmetric type of 8 bits.*symmetric=true"),
        ({"bits": 4, "group_size": -1}, r"hold 32 weights of a row, and .* has a scale for each 80.*group_size of 32"),
    ],
)
def test_a_grid_without_a_type_is_refused_or_rounded_if_asked(tmp_path, settings, says):
    config = CONFIGS["llama"]()
    config.intermediate_size = 80
    make_model(config).save_pretrained(tmp_path / "base")
    if settings["group_size"] == 32:
        settings = {**settings, "ignore": ("re:.*down_proj",)}
    folder = compressed(tmp_path / "base", tmp_path / "folder", **settings)
    with pytest.raises(UnsupportedModelError, match=says):
        write_gguf(folder, tmp_path / "file.gguf")
    written = write_gguf(folder, tmp_path / "file.gguf", lossy=True)
    assert not written["exact"]
    found, stored = read(tmp_path / "file.gguf"), values(folder)
    for source, name in (("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")):
        there, value = found[f"blk.0.{name}.weight"][1], stored[f"model.layers.0.{source}.weight"]
        assert ((there - value).norm() / value.norm()).item() < 0.01


def test_scales_out_of_float16s_digits_are_refused(tmp_path, saved_llama):
    folder = compressed(saved_llama, tmp_path / "folder", bits=4, group_size=32)  # scales of float32
    with pytest.raises(
        UnsupportedModelError, match=r"the scales of .* are with other digits; compress with format=gguf"
    ):
        write_gguf(folder, tmp_path / "file.gguf")


# mistakes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rtn.symmetric": "false"}, r"GGUF rounds the offsets of an asymmetric grid"),
        ({"rtn.group_size": "-1"}, r"is to have one per row; set group_size to 32, 64 or 128"),
    ],
)
def test_the_layout_refuses_what_would_not_be_the_same(tmp_path, capsys, changes, says):
    sets = [argument for change in changes.items() for argument in ("--set", "=".join(change))]
    arguments = ["run", "w4a16-fast", "--set", "format=gguf", *sets, "--no-eval", "--output", str(tmp_path / "out")]
    assert _guarded(app, arguments) == USER_ERROR
    assert says in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_an_architecture_is_refused_before_any_work(tmp_path):
    make_model(CONFIGS["opt"]()).save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match="this model is a opt"):
        compressed(tmp_path / "base", tmp_path / "out", bits=4, group_size=32, format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_refused_before_any_work(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece"}}))
    with pytest.raises(UnsupportedModelError, match="A WordPiece tokenizer is not written"):
        compressed(tmp_path / "base", tmp_path / "out", bits=4, group_size=32, format="gguf")


def test_a_tensor_without_a_name_is_refused(tmp_path, saved_llama):
    from safetensors.torch import load_file, save_file

    path = saved_llama / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.gate.weight": torch.ones(2, 2)}, path, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"llama has no tensor for model\.layers\.0\.gate\.weight"):
        write_gguf(saved_llama, tmp_path / "file.gguf")


def test_another_quantization_is_refused(tmp_path, saved_llama):
    config = json.loads((saved_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (saved_llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="is quantized by hqq"):
        write_gguf(saved_llama, tmp_path / "file.gguf")


def test_8_bit_embeddings_need_whole_blocks(tmp_path):
    config = CONFIGS["llama"]()
    config.hidden_size, config.head_dim = 80, 16
    make_model(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight is 80 wide; leave the embeddings at 16 bits"):
        write_gguf(tmp_path / "base", tmp_path / "file.gguf", embeddings="q8_0")


def test_embeddings_of_another_name(tmp_path, tiny):
    with pytest.raises(InvalidValueError, match=r"one of f16, q8_0\. Did you mean 'q8_0'"):
        write_gguf(tiny, tmp_path / "file.gguf", embeddings="q8")


def test_without_the_package_the_extra_is_named(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hfcompress\[gguf\]'"):
        write_gguf(tiny, tmp_path / "file.gguf")


def test_a_damaged_folder_leaves_the_file_that_was_there(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "base")
    path = tmp_path / "file.gguf"
    write_gguf(tmp_path / "base", path)
    before = path.read_bytes()
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        write_gguf(tmp_path / "base", path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob("file*")] == ["file.gguf"]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match=r"The disk of .* is full"):
        write_gguf(tiny, tmp_path / "file.gguf")
    assert not list(Path(tmp_path).iterdir())
