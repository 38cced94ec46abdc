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
How fast a student is taught, and in how much memory: the trainer of this library beside TRL's GKD and a plain Trainer without
a teacher, on the same student, teacher, rows and steps, each in a process of its own.

    python scripts/measure_distillation_speed.py --trl TRL_PYTHON [--vocabulary 32768] [--rounds 3]

`TRL_PYTHON` is the interpreter of an environment with `pip install trl`. The sides take turns; the first step of each is not
timed. Peaks are of the process's memory above what it holds once the models are there.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time


SIDES = ("hfcompress", "trl", "plain")
LABELS = {"hfcompress": "hfcompress, forward KL", "trl": "TRL GKD, forward KL", "plain": "Trainer, text alone"}
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 768}
LAYERS = {"student": 4, "teacher": 6}


def train(side: str, vocabulary: int, seq_len: int, batch: int, steps: int) -> dict[str, float]:
    """Tokens a second, and peak bytes above the start."""
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    student, teacher = (
        LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocabulary, num_hidden_layers=layers))
        for layers in LAYERS.values()
    )
    ids = torch.randint(vocabulary, (batch * steps, seq_len))
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    def collate(rows):
        stacked = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
        return {"input_ids": stacked, "attention_mask": torch.ones_like(stacked), "labels": stacked.clone()}

    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": batch, "use_cpu": True}
        settings |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        settings |= {"remove_unused_columns": False, "bf16": False, "gradient_checkpointing": False}
        if side == "trl":
            from datasets import Dataset
            from tokenizers import Tokenizer, models
            from transformers import PreTrainedTokenizerFast
            from trl.experimental.gkd import GKDConfig, GKDTrainer

            words = Tokenizer(models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0"))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")
            trainer = GKDTrainer(
                student,
                teacher,
                args=GKDConfig(**settings, lmbda=0.0, beta=0.0),
                data_collator=collate,
                train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
                processing_class=tokenizer,
            )
        else:
            rows = [{"input_ids": row} for row in ids]
            if side == "hfcompress":
                import hfcompress as hfc

                args = hfc.DistillationConfig(**settings)
                trainer = hfc.DistillationTrainer(student, teacher, args=args, train_dataset=rows)
            else:
                trainer = Trainer(student, TrainingArguments(**settings), train_dataset=rows, data_collator=collate)
        trainer.add_callback(Clock())
        before = psutil.Process().memory_info().rss
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": batch * seq_len * (steps - 1) / (ends[-1] - ends[0]), "bytes": peak - before}


def main() -> None:
    """A line for every side."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--trl", metavar="PYTHON", help="left out: TRL takes no part")
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.vocabulary, options.seq_len, options.batch, options.steps
    if options.side:
        print(json.dumps(train(options.side, *sizes)))
        return
    sides = [side for side in SIDES if side != "trl" or options.trl]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    given = [
        f"--{name}={value}" for name, value in zip(("vocabulary", "seq-len", "batch", "steps"), sizes, strict=True)
    ]
    for _ in range(options.rounds):
        for side in sides:
            python = options.trl if side == "trl" else sys.executable
            done = subprocess.run(
                [python, __file__, *given, "--side", side], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"vocabulary {options.vocabulary}, rows of {options.seq_len} tokens, {options.batch} at a time, float32")
    print(f"{'':<24} {'tokens/s':>9} {'times':>6} {'peak MB':>8} {'times':>6}   (medians of {options.rounds})")
    middle = {
        side: {key: statistics.median(each[key] for each in runs) for key in runs[0]} for side, runs in found.items()
    }
    own = middle["hfcompress"]
    for side in sides:
        speed, size = middle[side]["tokens_per_second"], middle[side]["bytes"]
        print(
            f"{LABELS[side]:<24} {speed:>9.0f} {speed / own['tokens_per_second']:>6.2f} {size / 1e6:>8.0f} "
            f"{size / own['bytes']:>6.2f}"
        )


if __name__ == "__main__":
    main()
