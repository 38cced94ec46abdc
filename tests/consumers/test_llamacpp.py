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
llama.cpp, in an environment of its own, on the GGUF files: the logits of transformers on the same folder, and the same
tokens. `make test-consumers` builds it; a run without it skips.

llama.cpp rounds the activations of a linear to 8 bits in blocks of 32 where its weights are of 4 or 8 bits, and to
float16 or bfloat16 where they are of that; only plain float32 weights are computed as transformers does.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import _COMMON, _MIXED, CONFIGS, make_model, token_ids
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import hfcompress as hfc
from hfcompress.calibration.reference_text import reference_text
from hfcompress.formats.gguf import write_gguf
from hfcompress.recipes import Job


PYTHON = Path(os.environ.get("HFCOMPRESS_CONSUMERS", ".consumers")).absolute() / "llamacpp" / "bin" / "python"
pytestmark = [
    pytest.mark.consumers,
    pytest.mark.skipif(not PYTHON.exists(), reason="no llama.cpp; `make test-consumers` builds it"),
]

READ = """
import json, sys, numpy as np
from llama_cpp import Llama
file, ids, logits, texts = sys.argv[1], np.load(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
threads = {"n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": 0}
model = Llama(file, n_ctx=ids.shape[1], logits_all=True, verbose=False, **threads)
rows = []
for row in ids.tolist():
    model.reset()
    model.eval(row)
    rows.append(model.scores[: len(row)].copy())
np.save(logits, np.stack(rows))
print(json.dumps([model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]))
"""
TEXTS = (
    "def f(x):\n    return x + 1  # it's 2024",
    "é日本語 \t\n\n x ½ 🙂",
    "   spaces   12345 ?! don't WE'LL",
    "a\r\n\r\nb  \n c",
    "",
)
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {**_COMMON, "max_position_embeddings": 128}
SCALED = {"original_max_position_embeddings": 32}
FACTORS = {"long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 5.0], "short_factor": [1.1] * 6}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **FACTORS, **SCALED}
MODELS = {
    "llama": CONFIGS["llama"],
    "llama-biases": lambda: LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-head-32": lambda: LlamaConfig(**_COMMON, head_dim=32),
    "llama-3-rope": lambda: LlamaConfig(**LONG, rope_parameters={**LLAMA_3, **SCALED}),
    "llama-linear-rope": lambda: LlamaConfig(**LONG, rope_parameters=LINEAR),
    "mistral": CONFIGS["mistral"],
    "qwen2": CONFIGS["qwen2"],
    "qwen2-yarn": lambda: Qwen2Config(**LONG, rope_parameters={**YARN, **SCALED}),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=32),
    "gemma3": lambda: Gemma3TextConfig(**{**_COMMON, "num_hidden_layers": 7}, **_MIXED, query_pre_attn_scalar=16),
    "gemma3-pattern": lambda: Gemma3TextConfig(
        **_COMMON,
        **_MIXED,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": CONFIGS["phi3"],
    "phi3-longrope": lambda: Phi3Config(**LONG, **SCALED, rope_parameters=LONGROPE),
}


def read(file, ids, folder, texts=()):
    """llama.cpp's logits `(rows, seq_len, vocabulary)`, and its tokens of texts."""
    np.save(folder / "ids.npy", ids)
    arguments = [str(file), str(folder / "ids.npy"), str(folder / "logits.npy"), json.dumps(texts)]
    done = subprocess.run([str(PYTHON), "-c", READ, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.from_numpy(np.load(folder / "logits.npy")), json.loads(done.stdout.splitlines()[-1])


def compare(folder, file, ids, scratch):
    """KL(transformers || llama.cpp) in nats: mean and largest over the positions; and how often the best is the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model(torch.from_numpy(ids.astype("int64"))).logits
    theirs, _ = read(file, ids, scratch)
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return divergence.mean().item(), divergence.max().item(), same.item()


@pytest.fixture(scope="module")
def tiny_q4(tmp_path_factory):
    output = tmp_path_factory.mktemp("gguf") / "q4"
    hfc.compress(None, "gguf-q4_0", output, samples=32, evaluate=False)
    return output


def test_the_shipped_recipe_gives_transformers_logits(tiny_q4, tiny, tmp_path):
    ids = np.load(tiny / "evaluation.npy")[:8]
    mean, largest, same = compare(tiny_q4, tiny_q4 / "model-q4_0.gguf", ids, tmp_path)
    assert mean < 3e-4  # compressing cost about 3e-3
    assert largest < 1e-2
    assert same > 0.97


def test_eight_bits(tiny, tmp_path):
    hfc.compress(None, Job(steps=(hfc.RTN(bits=8, group_size=128),), format="gguf"), tmp_path / "q8", evaluate=False)
    ids = np.load(tiny / "evaluation.npy")[:4]
    mean, _, same = compare(tmp_path / "q8", tmp_path / "q8" / "model-q8_0.gguf", ids, tmp_path)
    assert mean < 3e-4
    assert same > 0.97


@pytest.mark.parametrize("kind", MODELS)
def test_architectures(kind, tmp_path):
    """Plain float32 weights: no rounding hides a wrong graph. Then 4 bits, in which only the activations are rounded."""
    config = MODELS[kind]()
    make_model(config).save_pretrained(tmp_path / "base")
    ids = token_ids(2, config.max_position_embeddings)
    write_gguf(tmp_path / "base", tmp_path / "plain.gguf")
    mean, largest, same = compare(tmp_path / "base", tmp_path / "plain.gguf", ids, tmp_path)
    assert mean < 5e-7
    assert largest < 5e-6
    assert same > 0.98
    job = Job(steps=(hfc.RTN(bits=4, group_size=32),), format="gguf")
    hfc.compress(tmp_path / "base", job, tmp_path / "q4", evaluate=False)
    mean, _, same = compare(tmp_path / "q4", tmp_path / "q4" / "model-q4_0.gguf", ids, tmp_path)
    assert mean < 3e-4
    assert same > 0.93


@pytest.mark.parametrize("kind", ["mistral-sliding", "qwen3-mixed"])
def test_a_context_that_is_cut_to_the_window_is_right_up_to_it(kind, tmp_path):
    make_model(CONFIGS[kind]()).save_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "base", tmp_path / "plain.gguf")
    mean, _, _ = compare(tmp_path / "base", tmp_path / "plain.gguf", token_ids(3, 8), tmp_path)
    assert mean < 5e-7


def test_asymmetric_weights_with_rounded_offsets(tiny, tmp_path):
    steps = (hfc.RTN(bits=4, group_size=32, symmetric=False),)
    hfc.compress(None, Job(steps=steps), tmp_path / "folder", evaluate=False)
    write_gguf(tmp_path / "folder", tmp_path / "file.gguf", lossy=True)
    ids = np.load(tiny / "evaluation.npy")[:2]
    mean, _, same = compare(tmp_path / "folder", tmp_path / "file.gguf", ids, tmp_path)
    assert mean < 3e-4
    assert same > 0.97


# tokens


def assert_the_same_tokens(folder, tmp_path, vocabulary, texts=TEXTS):
    config = LlamaConfig(**{**_COMMON, "vocab_size": vocabulary, "num_hidden_layers": 1})
    make_model(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = write_gguf(folder, tmp_path / "file.gguf")
    _, tokens = read(tmp_path / "file.gguf", token_ids(1, 2), tmp_path, texts)
    for text, found in zip(texts, tokens, strict=True):
        assert found == tokenizer(text).input_ids, text
    return written


def test_tokens_of_the_shipped_model(tiny_q4, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_q4)
    texts = (*TEXTS, "<|end|>def<|end|>")
    _, tokens = read(tiny_q4 / "model-q4_0.gguf", token_ids(1, 4), tmp_path, texts)
    for text, found in zip(texts, tokens, strict=True):
        assert found == tokenizer(text).input_ids, text


PATTERNS = {
    "llama-bpe": r"\p{N}{1,3}",
    "qwen2": r"\p{N}",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_tokens_of_other_byte_level_tokenizers(name, tiny, tmp_path):
    written = json.loads((tiny / "tokenizer.json").read_text())
    words = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{PATTERNS[name]}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    written["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    written["model"]["ignore_merges"] = name == "llama-bpe"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (folder / "tokenizer_config.json").write_text((tiny / "tokenizer_config.json").read_text())
    assert assert_the_same_tokens(folder, tmp_path, 1024)["notes"][:-1] == []


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_of_a_spaced_tokenizer(prefix, tmp_path):
    """As Llama 2's and Gemma's: spaces as ▁, bytes for what is unknown, a first token that is added."""
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    trained = Tokenizer(model)
    steps = [normalizers.Replace(" ", "▁")]
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = "\n".join(reference_text("evaluation"))[:40000]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, max_token_length=12, show_progress=False)
    trained.train_from_iterator(text.splitlines(), trainer)
    document = json.loads(trained.to_str())
    document["added_tokens"] = [entry for entry in document["added_tokens"] if entry["id"] < 3]
    trained = Tokenizer.from_str(json.dumps(document))
    trained.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trained.add_special_tokens([AddedToken("</s>", special=True)])
    trained.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=trained, **names).save_pretrained(tmp_path / "folder")
    texts = [*TEXTS, *(text[start : start + 200] for start in range(0, 20000, 2000))]
    written = assert_the_same_tokens(tmp_path / "folder", tmp_path, trained.get_vocab_size(), texts)
    assert len(written["notes"]) == 1  # only that the weights are plain
