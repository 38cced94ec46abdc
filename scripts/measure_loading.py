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
What packed weights gain on a CPU: the dense model in float32 and bfloat16, the compressed one as transformers and as
`hfcompress.load` load it and, if its Python is given, llama.cpp on a GGUF file, each in a process of its own, in turns.

    python scripts/make_large_checkpoint.py DENSE --gigabytes 2.2
    hfcompress run w4a16-fast --model DENSE --no-eval --output PACKED
    hfcompress run gguf-q4_0 --model DENSE --no-eval --output GGUF
    python scripts/measure_loading.py DENSE PACKED [--gguf FILE.gguf --llamacpp PYTHON] [--rounds 2] [--prompt 256]
        [--new 33] [--output FILE.json]

Told are bytes at rest and at most while generating, beyond what the libraries take, and tokens per second of decoding and of
reading the prompt, batch 1. The weights may be random: time and memory do not depend on what they are.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from hfcompress.evaluation.fresh_process import Request, run
from hfcompress.evaluation.memory import ALLOCATOR
from hfcompress.models.checkpoint import Checkpoint


LLAMACPP = """
import json, sys, time
import llama_cpp
file, ids, new, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def status(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
before = status("VmRSS")
model = llama_cpp.Llama(file, n_ctx=2 * len(ids) + new, n_threads=threads, n_threads_batch=threads, verbose=False, use_mmap=False)
rest = status("VmRSS") - before
taken = []
for _ in range(2):
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    prefill, steps = time.perf_counter() - start, []
    for _ in range(new - 1):
        start = time.perf_counter()
        model.eval([int(model.scores[model.n_tokens - 1].argmax()) if model.scores.any() else 1])
        steps.append(time.perf_counter() - start)
    taken.append({"prefill_seconds": prefill, "step_seconds": steps})
print(json.dumps({"runs": taken[1:], "at_rest_bytes": rest, "peak_bytes": status("VmHWM") - before}))
"""


def ours(folder: str, dtype: str, packed: bool, options, measurement: str) -> dict:
    """The readings of one process of hfcompress's own probe."""
    request = Request(
        measurement=measurement,
        folder=folder,
        trust_remote_code=False,
        device="cpu",
        dtype=dtype,
        threads=torch.get_num_threads(),
        prompts=[prompt(folder, options.prompt)],
        new_tokens=options.new,
        packed=packed,
    )
    return run(request, folder, ALLOCATOR if measurement == "memory" else None)


def prompt(folder: str, length: int) -> list[int]:
    """Token ids, at random."""
    vocabulary = Checkpoint.open(folder).config.get_text_config().vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, length).tolist()


def theirs(options) -> dict:
    """The readings of llama.cpp."""
    ids = json.dumps(prompt(options.dense, options.prompt))
    command = [options.llamacpp, "-c", LLAMACPP, options.gguf, ids, str(options.new), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("packed")
    parser.add_argument("--gguf")
    parser.add_argument("--llamacpp", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=33)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    ways = {
        "dense, float32": (options.dense, "float32", False),
        "dense, bfloat16": (options.dense, "bfloat16", False),
        "compressed, transformers": (options.packed, "bfloat16", False),
        "compressed, hfc.load": (options.packed, "bfloat16", True),
    }
    runs: dict[str, list[dict]] = {}
    found: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            runs.setdefault(name, []).extend(ours(*way, options, "speed")["batches"]["1"])
        if options.llamacpp:
            read = theirs(options)
            runs.setdefault("llama.cpp", []).extend(read["runs"])
            found["llama.cpp"] = {key: read[key] for key in ("at_rest_bytes", "peak_bytes")}
    for name, way in ways.items():
        read = ours(*way, options, "memory")
        found[name] = {key: read[key] for key in ("at_rest_bytes", "peak_bytes")}
    for name, taken in runs.items():
        decode = [len(each["step_seconds"]) / sum(each["step_seconds"]) for each in taken]
        prefill = [options.prompt / each["prefill_seconds"] for each in taken]
        found[name] |= {"decode": statistics.median(decode), "prefill": statistics.median(prefill)}
    print(f"{'':28}{'at rest':>10}{'peak':>10}{'decode':>12}{'prompt':>12}")
    for name in runs:
        figures = found[name]
        sizes = "".join(f"{figures[key] / 1e9:8.2f}GB" for key in ("at_rest_bytes", "peak_bytes"))
        print(f"{name:28}{sizes}{figures['decode']:9.1f}t/s{figures['prefill']:9.1f}t/s")
    if options.output:
        how = {key: value for key, value in vars(options).items() if key in ("rounds", "prompt", "new")}
        told = {"how": {**how, "threads": torch.get_num_threads(), "torch": torch.__version__}, "found": found}
        options.output.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
