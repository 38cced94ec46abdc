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
"""Figures of a model taken in a process of its own: no memory, allocator or cache is shared with the other model.

How it works: the two models take turns (baseline, compressed, baseline, compressed, ...), so that a machine that grows
slower or busier slows both. Each turn is a new Python process that runs `probe.py` on one checkpoint.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.calibration.tokens import DEFAULT_CONTEXT, Tokens
from hfcompress.errors import HfcompressError
from hfcompress.evaluation.comparison import Comparison, whole_model
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.runtime.integer_linear import DTYPE as KERNEL_DTYPE
from hfcompress.runtime.loading import load_checkpoint, runs_packed


USER_ERROR = 2  # the child's exit code when its last line already says what to do
DECOMPRESSED = 1.02  # growth of a model's tensors past which its weights were unpacked


@dataclass(frozen=True, kw_only=True)
class Request:
    """
    Args:
        measurement (`str`): `"speed"`, `"memory"` or `"energy"`.
        folder (`str`): the checkpoint.
        trust_remote_code (`bool`): run modelling code that it carries.
        device (`str`): where.
        dtype (`str`): torch's name of it.
        threads (`int`): that torch computes with on a CPU.
        prompts (`list[list[int]]`): token ids `(rows, prompt_length)`.
        new_tokens (`int`): generated for every prompt.
        batches (`list[int]`, *optional*): how many of the prompts go together, one setting after another.
        seconds (`float`, *optional*): the time to repeat over.
        repeats (`int`, *optional*): the least number of repeats.
        idle_seconds (`float`, *optional*): how long idle power is taken.
        packed (`bool`, *optional*): load it with [`hfcompress.load`], and compute on the packed weights.
    """

    measurement: str
    folder: str
    trust_remote_code: bool
    device: str
    dtype: str
    threads: int
    prompts: list[list[int]]
    new_tokens: int
    batches: list[int] = dataclasses.field(default_factory=lambda: [1])
    seconds: float = 0.0
    repeats: int = 1
    idle_seconds: float = 0.0
    packed: bool = False

    def batch(self, size: int) -> Tensor:
        """The first `size` prompts: int64 `(size, prompt_length)` on the device."""
        return torch.tensor(self.prompts[:size], device=self.device)

    def model(self) -> contextlib.AbstractContextManager[PreTrainedModel]:
        """The model, loaded."""
        checkpoint = Checkpoint.open(self.folder, trust_remote_code=self.trust_remote_code)
        device, dtype = torch.device(self.device), getattr(torch, self.dtype)
        if self.packed:
            return contextlib.nullcontext(load_checkpoint(checkpoint, device, dtype))
        return whole_model(checkpoint, device, dtype, packed=True)


@dataclass(frozen=True)
class Way:
    """
    Args:
        key (`str`): `"baseline"`, `"compressed"` or `"packed"`.
        checkpoint (`Checkpoint`): what is loaded.
        dtype (`torch.dtype`): of the arithmetic.
        packed (`bool`): see [`Request`].
    """

    key: str
    checkpoint: Checkpoint
    dtype: torch.dtype
    packed: bool = False


def both(comparison: Comparison) -> list[Way]:
    """The two models as transformers loads them."""
    return [Way(key, checkpoint, comparison.loaded_dtype) for key, checkpoint in comparison.models]


def ways(comparison: Comparison) -> list[Way]:
    """[`both`] and, if there are kernels for its weights, the compressed one packed."""
    found = both(comparison)
    if runs_packed(comparison.candidate, comparison.device):
        found.append(Way("packed", comparison.candidate, KERNEL_DTYPE, packed=True))
    return found


def in_turns(
    comparison: Comparison,
    rounds: int,
    environment: Mapping[str, str] | None = None,
    turns: Sequence[Way] | None = None,
    **settings,
) -> dict[str, list[dict[str, Any]]]:
    """
    Args:
        comparison (`Comparison`): the two models; its progress takes a step for every process.
        rounds (`int`): how often both have their turn.
        turns (`Sequence[Way]`, *optional*): what takes turns; the two models if not given.
        environment (`Mapping[str, str]`, *optional*): variables that the processes get besides this one's.
        settings: of the `Request`.

    Returns:
        `dict`: under the key of each way, the readings of every round.

    Raises:
        HfcompressError: a process failed.
    """
    turns = both(comparison) if turns is None else turns
    readings: dict[str, list[dict[str, Any]]] = {way.key: [] for way in turns}
    with contextlib.ExitStack() as stack:
        folders = {key: stack.enter_context(folder_of(checkpoint)) for key, checkpoint in comparison.models}
        for turn in range(rounds):
            for way in turns:
                request = Request(
                    folder=str(folders["compressed" if way.packed else way.key]),
                    trust_remote_code=way.checkpoint.trust_remote_code,
                    device=str(comparison.device),
                    dtype=str(way.dtype).removeprefix("torch."),
                    threads=torch.get_num_threads(),
                    packed=way.packed,
                    **settings,
                )
                readings[way.key].append(run(request, way.checkpoint.name, environment))
                comparison.progress.step(f"{request.measurement}: {way.key} model, round {turn + 1} of {rounds}")
    return readings


def run(request: Request, name: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """
    The readings of one fresh process.

    Args:
        request (`Request`): what it is to do.
        name (`str`): of the model, for messages.
        environment (`Mapping[str, str]`, *optional*): variables that it gets besides this process's.

    Raises:
        HfcompressError: it failed; the message holds the last line of its stderr.
    """
    said = json.dumps(dataclasses.asdict(request))
    done = run_module("hfcompress.evaluation.probe", said=said, environment=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    logging.getLogger("hfcompress").debug(done.stderr)
    failed = f"The {request.measurement} of {name} could not be measured"
    if done.returncode < 0:
        raise HfcompressError(
            f"{failed}: its process was ended by {signal.Signals(-done.returncode).name}, as when memory runs out; "
            f"free some memory, or leave {request.measurement} out of --measure."
        )
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason was given").strip()
    if done.returncode == USER_ERROR:
        raise HfcompressError(f"{failed}: {last}")
    raise HfcompressError(
        f"{failed}: {last.rstrip('.')}; see that the model loads and generates with plain transformers, "
        f"or leave {request.measurement} out of --measure."
    )


def run_module(
    module: str, *arguments: str, said: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """
    `python -m module` in a fresh process that imports what this one would: nothing from the working folder, unless
    this one does.

    Args:
        module (`str`): its name.
        arguments (`str`): on its command line.
        said (`str`, *optional*): on its stdin.
        environment (`Mapping[str, str]`, *optional*): variables that it gets besides this process's.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        input=said,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


@contextlib.contextmanager
def folder_of(checkpoint: Checkpoint) -> Generator[Path]:
    """Where the checkpoint lies; one in memory is saved for the while."""
    if checkpoint.folder is not None:
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory(prefix="hfcompress-") as name:
        folder = Path(name)
        tensors = {key: tensor.read().contiguous() for key, tensor in checkpoint.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        checkpoint.config.save_pretrained(folder)
        if checkpoint.generation_config is not None:
            checkpoint.generation_config.save_pretrained(folder)
        yield folder


def context(comparison: Comparison) -> int:
    """The tokens that both models take."""
    configs = [checkpoint.config.get_text_config() for _, checkpoint in comparison.models]
    return min(getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT for config in configs)


def prompts(tokens: Tokens, rows: int, length: int) -> list[list[int]]:
    """Consecutive pieces of the text, `(rows, length)`; it starts again where it is too short for them."""
    ids = tokens.input_ids if tokens.mask is None else tokens.input_ids[tokens.mask]
    return np.resize(ids, (rows, length)).tolist()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean of at least two repeats, and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def circumstances(comparison: Comparison, readings: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What every report says of how its figures were taken."""
    how: dict[str, Any] = {
        "process": "a fresh process for every model and round, which loads that model alone; the models take turns",
        "rounds": len(readings["baseline"]),
        "device": str(comparison.device),
        "device_name": _device_name(comparison.device),
        "dtype": str(comparison.loaded_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": {key: rounds[0]["attention"] for key, rounds in readings.items()},
        "seed": comparison.seed,
        "data": comparison.tokens.source,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    if "packed" in readings:
        how["packed"] = (
            f"the compressed model again, loaded by hfcompress.load in {str(KERNEL_DTYPE).removeprefix('torch.')}"
        )
    note = _decompression(comparison.candidate, readings)
    return {**how, "note": note} if note else how


def _decompression(candidate: Checkpoint, readings: Mapping[str, list[dict[str, Any]]]) -> str | None:
    """A sentence where the compressed weights were seen to be unpacked; by the bytes of the model's tensors."""
    if candidate.quantization_config is None:
        return None
    ours, theirs = (readings[key][0] for key in ("compressed", "baseline"))
    before, after = ours["tensor_bytes"], ours["tensor_bytes_after_forward"]
    if after > DECOMPRESSED * before:
        when = f"on its first forward ({before:,} bytes of tensors before it, {after:,} after)"
    elif DECOMPRESSED * after >= theirs["tensor_bytes_after_forward"]:
        when = f"while it loads ({after:,} bytes of tensors)"
    else:
        return None
    packed = "a runtime that computes on the packed weights was not measured"
    if "packed" in readings:
        packed = "what computes on the packed weights, hfcompress.load, stands beside it"
    return (
        f"transformers decompresses this checkpoint {when}, so it runs as a dense model: no gain in speed, in energy or "
        f"in memory while running is to be expected here; {packed}."
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
