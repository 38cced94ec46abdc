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
"""Train the tiny Llama that hfcompress ships, from text that every Python carries.

    python scripts/train_tiny_llama.py [--output hfcompress/models/tiny_llama] [--steps 1800] [--experts 16]

The text is the standard library's own sources (docstrings included) and its language reference; a fifth of the
reference's topics is held out and becomes `evaluation.npy`. Seeded; under 30 minutes on two cores. The folder holds
a bf16 checkpoint, a byte-level BPE tokenizer, the two token arrays and `training.json` with what was measured. With
`--experts` it is a mixture (Qwen3-MoE), of which every token is sent to two; it is not shipped, and `measure_experts.py`
asks for it.
"""

import argparse
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from hfcompress.calibration.reference_text import reference_text


SEQ_LEN = 256
BATCH = 16
PEAK_LR = 3e-3
WARMUP = 100
CALIBRATION_ROWS = 128
EVALUATION_ROWS = 96
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "head_dim": 32,
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.001,
}


def library_sources() -> list[str]:
    """The standard library's modules, tests and bundled tools left out, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}
    files = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    return [p.read_text(encoding="utf-8", errors="ignore") for p in files]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", model_max_length=SEQ_LEN
    )


def pack(tokenizer, texts: list[str]) -> np.ndarray:
    """Texts joined by the end token and cut into full rows: (n, SEQ_LEN) uint16."""
    ids = [i for encoding in tokenizer(texts)["input_ids"] for i in (*encoding, tokenizer.eos_token_id)]
    rows = len(ids) // SEQ_LEN
    return np.array(ids[: rows * SEQ_LEN], dtype=np.uint16).reshape(rows, SEQ_LEN)


@torch.no_grad()
def perplexity(model, rows: np.ndarray) -> float:
    model.eval()
    total = sum(
        model(input_ids=b, labels=b).loss.item() * len(b) for b in torch.from_numpy(rows.astype("int64")).split(16)
    )
    return math.exp(total / len(rows))


def unigram_perplexity(train: np.ndarray, rows: np.ndarray) -> float:
    counts = np.bincount(train.ravel(), minlength=CONFIG["vocab_size"]) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[rows[:, 1:].ravel()].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parents[1] / "hfcompress" / "models" / "tiny_llama"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, help="of every block; needs an --output of its own")
    args = parser.parse_args()
    if args.experts and args.output == default:
        parser.error("--experts makes another model than the one that is shipped; give --output")
    torch.manual_seed(args.seed)
    generator = np.random.default_rng(args.seed)

    reference = reference_text("calibration")
    sources = library_sources()
    tokenizer = train_tokenizer(reference + sources)
    calibration = pack(tokenizer, reference)
    evaluation = pack(tokenizer, reference_text("evaluation"))
    evaluation = evaluation[generator.permutation(len(evaluation))[:EVALUATION_ROWS]]
    train = np.concatenate([pack(tokenizer, sources), calibration, calibration])
    print(f"{train.size:,} training tokens, {evaluation.size:,} held out", flush=True)

    config = LlamaConfig(**CONFIG)
    if args.experts:
        config = Qwen3MoeConfig(**CONFIG, **EXPERTS, num_experts=args.experts)
    model = AutoModelForCausalLM.from_config(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, max(0.0, (args.steps - i) / (args.steps - WARMUP)))
    )
    order = np.concatenate(
        [generator.permutation(len(train)) for _ in range(math.ceil(args.steps * BATCH / len(train)))]
    )
    start = time.time()
    for step in range(args.steps):
        rows = train[order[step * BATCH : (step + 1) * BATCH]].astype("int64")
        batch = torch.from_numpy(rows)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)

    if args.experts:
        model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    np.save(args.output / "calibration.npy", calibration[generator.permutation(len(calibration))[:CALIBRATION_ROWS]])
    np.save(args.output / "evaluation.npy", evaluation)
    record = {
        "parameters": model.num_parameters(),
        "training_tokens": args.steps * BATCH * SEQ_LEN,
        "perplexity": round(perplexity(model.float(), evaluation), 3),
        "unigram_perplexity": round(unigram_perplexity(train, evaluation), 1),
        "steps": args.steps,
        "seed": args.seed,
        "minutes": round((time.time() - start) / 60, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
