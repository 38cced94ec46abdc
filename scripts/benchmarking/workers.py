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
What runs in a process of its own, started as `benchmark.py NAME ARGUMENTS`; each gives its answers one by one.

Nothing heavy is imported on top, here or in what imports this: the peers' environments run these too, and a process
counts the memory of the one that started it in its own peak.
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarking.processes import without_folders


LEAST = "least"  # the lowest limit on memory that can be kept
AFTER_PLANNING = 1.03  # what a process that has planned has in memory, over what it had
MEASURED_AT_ONCE = 4096  # tokens
MEASURED_TOGETHER = 4  # models beside the dense one
GEMM_SIZE, GEMM_REPEATS = 2048, 5


def compress(told: str) -> Iterator[dict[str, Any]]:
    """
    hfcompress, run as its peers are: JSON with `model`, `calibration`, `memory_limit`, `device`, and `jobs`, pairs of
    steps (or the name of a shipped recipe) and output folder. For each job `{"seconds", "peak_mib", "imports_mib",
    "bytes", "bits", "decoded", "floor"}`, `{"skipped": why}` or `{"error": what}`; on a GPU `peak_mib` is of its memory.
    """
    import hfcompress
    import hfcompress.compression
    import hfcompress.kernels.nearest  # and numba with it
    from hfcompress.phases import peak_rss_bytes
    from hfcompress.recipes import job_from_dict

    common = json.loads(told)
    device, imports = common["device"], peak_rss_bytes() >> 20
    for recipe, output in common["jobs"]:
        lacking = None if isinstance(recipe, str) else missing(recipe)
        if lacking is not None:
            yield {"skipped": lacking}
            continue
        try:
            job = recipe if isinstance(recipe, str) else job_from_dict({"recipe": recipe})
            limit = common["memory_limit"]
            if limit == LEAST:
                told = hfcompress.plan(
                    common["model"], job, calibration=common["calibration"], device=device, probe=False
                )
                limit = round(told.least_memory * AFTER_PLANNING)
            result = hfcompress.compress(
                common["model"],
                job,
                output,
                calibration=common["calibration"],
                device=device,
                memory_limit=limit,
                overwrite=True,
                evaluate=False,
                profile=True,
            )
        except (ValueError, RuntimeError, OSError) as error:  # the other jobs go on; the row says what happened
            message = " ".join(str(error).split())
            yield {"error": without_folders(f"{type(error).__name__}: {message}")}
            continue
        phases = result.manifest["phases"].values()
        on_gpu = max(phase.get("peak_cuda_bytes", 0) for phase in phases)
        yield {
            "seconds": round(sum(phase["seconds"] for phase in phases), 3),
            "peak_mib": on_gpu >> 20 if device != "cpu" else peak_rss_bytes() >> 20,
            "imports_mib": 0 if device != "cpu" else imports,
            "bytes": weight_bytes(Path(output)),
            "bits": bits_of_linears(result.manifest),
            "decoded": decoded_speed(Path(output)),
            "floor": floor_seconds(result.manifest),
        }


def floor_seconds(manifest: dict[str, Any]) -> float | None:
    """What the forwards' linears, the sums of inputs and the solving take at the machine's rate, once each."""
    profile = manifest.get("profile")
    if profile is None:
        return None
    return round(sum(part["floor_seconds"] for part in profile["parts"].values()), 3)


def bits_of_linears(manifest: dict[str, Any]) -> float | None:
    """Eight times the bytes of all that is stored of the linears, over their weights."""
    rows = [row for row in manifest["linears"] if "shape" in row and "bytes" in row]
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return round(8 * sum(row["bytes"] for row in rows) / weights, 4) if weights else None


def decoded_speed(folder: Path) -> float | None:
    """MB of bf16 that a second of one core decodes, the best of three goes; `None` where nothing is coded."""
    import numba

    from hfcompress.formats.native.coded import CodedTensor
    from hfcompress.formats.reading import decoded
    from hfcompress.models.checkpoint import Checkpoint

    made = Checkpoint.open(folder)
    if (made.quantization_config or {}).get("quant_method") != "hfcompress":
        return None
    found = decoded(made.tensors, made.quantization_config).values()
    parts = [(tensor.tensors(), tensor) for tensor in found if isinstance(tensor, CodedTensor)]
    if not parts:
        return None
    threads, best = numba.get_num_threads(), float("inf")
    numba.set_num_threads(1)
    for _ in range(3):
        began = time.perf_counter()
        for stored, tensor in parts:
            tensor.layout.unpack(stored, tensor.grid)
        best = min(best, time.perf_counter() - began)
    numba.set_num_threads(threads)
    return round(2e-6 * sum(tensor.shape[0] * tensor.shape[1] for _, tensor in parts) / best, 1)


def weight_bytes(folder: Path) -> int:
    """On disk; of a GGUF file where there is one, since the tensors beside it hold the same."""
    files = list(folder.glob("*.gguf")) or list(folder.glob("model*.safetensors"))
    return sum(file.stat().st_size for file in files)


def missing(recipe: Sequence[dict[str, dict[str, Any]]]) -> str | None:
    """What a recipe asks for that this version of hfcompress does not have."""
    import dataclasses

    from hfcompress.recipes.job import STEPS

    for name, settings in ((name, settings) for step in recipe for name, settings in step.items()):
        if name not in STEPS:
            return f"skipped: this version has no step {name}"
        unknown = set(settings) - {field.name for field in dataclasses.fields(STEPS[name])}
        if unknown:
            return f"skipped: this version has no {name}.{min(unknown)}"
    return None


def measure(dense: str, tokens: str, *candidates: str) -> Iterator[dict[str, float]]:
    """All folders loaded by plain transformers; KL(dense || candidate) in nats over every predicted position."""
    import numpy as np
    import torch

    ids = torch.from_numpy(np.load(tokens).astype(np.int64))
    for start in range(0, len(candidates), MEASURED_TOGETHER):
        yield from _measure_together(dense, candidates[start : start + MEASURED_TOGETHER], ids)


def _measure_together(dense: str, candidates: Sequence[str], ids) -> Iterator[dict[str, float]]:
    import math

    import torch
    from transformers import AutoModelForCausalLM

    if any('"quant_method": "hfcompress' in (Path(folder) / "config.json").read_text() for folder in candidates):
        import hfcompress.integrations.transformers  # noqa: F401 (it teaches transformers the format)

    reference, *models = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (dense, *candidates)
    )
    found = [{"nll": 0.0, "kl": 0.0, "agree": 0} for _ in models]
    dense_nll, count = 0.0, 0

    def log_probabilities(model, batch):
        return model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)

    with torch.no_grad():
        for batch in ids.split(max(1, MEASURED_AT_ONCE // ids.shape[1])):
            targets = batch[:, 1:, None]
            p = log_probabilities(reference, batch)
            dense_nll -= p.gather(-1, targets).double().sum().item()
            count += targets.numel()
            for model, sums in zip(models, found, strict=True):
                q = log_probabilities(model, batch)
                sums["nll"] -= q.gather(-1, targets).double().sum().item()
                sums["kl"] += (p.exp() * (p - q)).sum(-1).double().sum().item()
                sums["agree"] += int((p.argmax(-1) == q.argmax(-1)).sum())
    for sums in found:
        perplexities = {
            "perplexity": math.exp(sums["nll"] / count),
            "dense_perplexity": math.exp(dense_nll / count),
        }
        yield {**perplexities, "kl": sums["kl"] / count, "top1": sums["agree"] / count, "tokens": count}


def load(folder: str) -> Iterator[dict[str, Any]]:
    """Seconds that transformers takes to load a folder, and MiB that this takes at most, above what was there before."""
    from transformers import AutoModelForCausalLM

    from hfcompress.phases import peak_rss_bytes

    if '"quant_method": "hfcompress' in (Path(folder) / "config.json").read_text():
        import hfcompress.integrations.transformers  # noqa: F401 (it teaches transformers the format)
    before, began = peak_rss_bytes(), time.perf_counter()
    AutoModelForCausalLM.from_pretrained(folder)
    yield {"seconds": round(time.perf_counter() - began, 3), "mib": (peak_rss_bytes() - before) >> 20}


def linears(model: str) -> Iterator[dict[str, Any]]:
    """How many weights the linears of the blocks have."""
    import torch

    from hfcompress.models.checkpoint import Checkpoint
    from hfcompress.models.roles import find_linears
    from hfcompress.models.streaming import StreamedModel

    streamed = StreamedModel(Checkpoint.open(model), torch.device("cpu"), torch.float32)
    blocks = [find_linears(streamed.skeleton.get_submodule(name), name) for name in streamed.block_names]
    yield {"weights": sum(module.weight.numel() for block in blocks for module in block.values())}


def tokenize(model: str, text: str, rows: str, seq_len: str, output: str) -> Iterator[dict[str, Any]]:
    """A text as rows of token ids by the model's own tokenizer, written to a `.npy`; or `{"error": what}`."""
    import numpy as np

    from hfcompress.calibration.tokens import load_tokens
    from hfcompress.errors import HfcompressError
    from hfcompress.models.checkpoint import Checkpoint

    try:
        tokens = load_tokens(text, Checkpoint.open(model), samples=int(rows), seq_len=int(seq_len))
    except HfcompressError as error:
        yield {"error": str(error)}
        return
    np.save(output, tokens.input_ids.astype(np.int32))
    yield {"rows": len(tokens.input_ids)}


def machine() -> Iterator[dict[str, Any]]:
    """What the times were taken on."""
    import torch

    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE) for _ in range(2))
    seconds = []
    for _ in range(GEMM_REPEATS + 1):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    yield {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "fp32_gemm_gflops": round(2 * GEMM_SIZE**3 / min(seconds[1:]) / 1e9, 1),
        "system": platform.system(),
    }


def cpu_model() -> str:
    """The name that the CPU gives itself."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def versions(*packages: str) -> Iterator[dict[str, str | None]]:
    """Of the packages in this interpreter's environment."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    yield found


WORKERS: dict[str, Callable[..., Iterator[dict]]] = {
    f.__name__: f for f in (compress, measure, load, linears, tokenize, machine, versions)
}
