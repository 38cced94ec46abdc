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
"""What the tests share: tiny models made from configurations, and the trained tiny Llama compressed once."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    DeepseekV3Config,
    DistilBertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    LlavaConfig,
    MarianConfig,
    MBartConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    UMT5Config,
    WhisperConfig,
)

from hfcompress.models.architecture import auto_class
from hfcompress.models.tiny import tiny_folder
from hfcompress.progress import Silent


DRAWN = {
    "hub",
    "evaluation",
    "budgeting",
    "consumers",
    "test_measuring",
    "test_main_road",
    "test_bad_input",
    "test_ecosystem",
}


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    """Drawing takes longer than all else that is done to a tiny model: where no test looks at pictures, none are drawn."""
    if not DRAWN & {*request.path.parts, request.path.stem}:
        monkeypatch.setattr("hfcompress.hub.description.draw", lambda *_: {})


VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = {"sliding_window": 8, "head_dim": 16}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**_COMMON, sliding_window=8),
    "qwen3-mixed": lambda: Qwen3Config(
        **_COMMON,
        **_MIXED,
        use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_COMMON, **_MIXED, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3": lambda: Phi3Config(**_COMMON),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    ),
    "qwen2": lambda: Qwen2Config(**_COMMON),
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(**_COMMON, **_EXPERTS, num_experts=8, head_dim=16, mlp_only_layers=[1]),
    "qwen2-moe": lambda: Qwen2MoeConfig(**_COMMON, **_EXPERTS, num_experts=8, shared_expert_intermediate_size=32),
    "deepseek-v3": lambda: DeepseekV3Config(
        **{**_COMMON, "num_key_value_heads": 4},
        **_EXPERTS,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "olmoe": lambda: OlmoeConfig(**{**_COMMON, "intermediate_size": 32}, num_experts=8, num_experts_per_tok=2),
}

# those that transformers finds in a checkpoint together alone
TOGETHER = {
    "gpt-oss": lambda: GptOssConfig(
        **{**_COMMON, "intermediate_size": 32},
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "granite-moe": lambda: GraniteMoeConfig(
        **{**_COMMON, "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2
    ),
    "aria-text": lambda: AriaTextConfig(**{**_COMMON, "intermediate_size": 32}, moe_num_experts=4, moe_topk=2),
}


IMAGE = VOCABULARY - 1
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL = {
    "gemma3, with images": lambda: Gemma3Config(
        text_config={**_TEXT, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE - 1,
        eoi_token_index=IMAGE - 2,
    ),
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**_TEXT),
        vision_config=CLIPVisionConfig(**_VISION),
        image_token_index=IMAGE,
        pad_token_id=0,
    ),
    "qwen2.5-vl": lambda: Qwen2_5_VLConfig(
        text_config={
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 28,
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        vision_start_token_id=IMAGE - 2,
        vision_end_token_id=IMAGE - 3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ENCODERS = {
    "bert": lambda: BertConfig(**_SIZES),
    "roberta": lambda: RobertaConfig(**_SIZES),
    "modernbert": lambda: ModernBertConfig(
        **_SIZES,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=16,
    ),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=64,
        hidden_dim=128,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
    ),
}


_READS_AND_WRITES = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_T5_GEMMA = {**_COMMON, "head_dim": 16, "num_hidden_layers": 2, "sliding_window": 8}
WITH_DECODERS = {
    "t5": lambda: T5Config(**_T5),
    "t5-untied": lambda: T5Config(
        **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, initializer_factor=0.5
    ),
    "umt5": lambda: UMT5Config(**_T5),
    "t5gemma": lambda: T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**_T5_GEMMA), decoder=T5GemmaModuleConfig(**_T5_GEMMA), vocab_size=VOCABULARY
    ),
    "bart": lambda: BartConfig(**_READS_AND_WRITES),
    "mbart": lambda: MBartConfig(**_READS_AND_WRITES),
    "marian": lambda: MarianConfig(**_READS_AND_WRITES),
}
HEARING = {
    "whisper": lambda: WhisperConfig(
        **{name: value for name, value in _READS_AND_WRITES.items() if name != "max_position_embeddings"},
        num_mel_bins=20,
        max_source_positions=50,
        max_target_positions=64,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
}


def make_any_model(config, kind=None):
    """[`make_model`] by the class that hfcompress takes for a configuration, or another."""
    torch.manual_seed(0)
    if kind is None and config.model_type in {made().model_type for made in ENCODERS.values()}:
        kind = AutoModelForMaskedLM
    model = (kind or auto_class(config)).from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def make_model(config, dtype=torch.float32):
    """A model with random weights that are not near zero, and biases that are not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).to(dtype)  # rotary buffers stay float32
    return model


def sound(rows: int, seed: int = 0, bins: int = 20, frames: int = 100) -> np.ndarray:
    """Noise in the shape that the model that hears takes: float32 `(rows, bins, frames)`."""
    return np.random.default_rng(seed).standard_normal((rows, bins, frames)).astype(np.float32)


def token_ids(rows: int, seq_len: int, seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Random ids `(rows, seq_len)`."""
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, seq_len))


def with_outliers(folder: Path, factor: float = 24.0):
    """
    The same function as the model in `folder`, with weights as large models have them: in a few channels the norms'
    gains are small and the columns that read them large.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    channels = [5, 40, 77, 100]
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [getattr(layer.self_attn, f"{x}_proj") for x in "qkv"]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[channels] /= factor
                for linear in readers:
                    linear.weight[:, channels] *= factor
    return model


@pytest.fixture(params=CONFIGS)
def any_model(request):
    """Each supported architecture in turn."""
    return make_model(CONFIGS[request.param]())


@pytest.fixture(params=MIXTURES)
def any_mixture(request):
    """Each kind of mixture of experts in turn."""
    return make_model(MIXTURES[request.param]())


@pytest.fixture
def llama():
    """A tiny random Llama."""
    return make_model(CONFIGS["llama"]())


@pytest.fixture
def saved_llama(llama, tmp_path) -> Path:
    """The tiny random Llama as a folder."""
    folder = tmp_path / "llama"
    llama.save_pretrained(folder)
    return folder


class StopAfter(Silent):
    """Interrupts a run when so many units are done, as Ctrl-C would."""

    def __init__(self, units: int):
        self.left = units

    def step(self, description: str, amount: int = 1) -> None:
        self.left -= amount
        if self.left == 0 and amount:
            raise KeyboardInterrupt


def digest(folder: Path) -> str:
    """Of a result's weights, to the byte."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def run_in(monkeypatch):
    """Let the block pass be run in a way of one's own choice: `run_in(suspended=False, spilled=True)`."""
    from hfcompress.passes.footprint import Course

    def choose(suspended: bool, spilled: bool = False, rows: int = 128):
        monkeypatch.setattr("hfcompress.compression.choose_course", lambda *_: Course(rows, suspended, spilled))

    return choose


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained tiny Llama's folder."""
    return tiny_folder()


@pytest.fixture(scope="session")
def tiny_w4(tmp_path_factory):
    """The trained tiny Llama compressed by the shipped recipe, measured: the main job."""
    import hfcompress as hfc

    output = tmp_path_factory.mktemp("session") / "w4"
    return hfc.compress(None, "gptq-w4a16", output)


def in_fresh_process(code: str, *arguments: str, forbid: str | None = None) -> dict:
    """Run code that prints a JSON line last; with `forbid`, a module that it must not import."""
    guard = f"import sys; sys.modules[{forbid!r}] = None\n" if forbid else ""
    done = subprocess.run(
        [sys.executable, "-c", guard + code, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
