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
"""What a fresh process runs for a figure of one model: `python -m hfcompress.evaluation.probe`.

It reads one `Request` as JSON from stdin, loads that model alone by plain `from_pretrained`, and prints one JSON line
of readings. An error ends as one line, the last on stderr.
"""

import contextlib
import copy
import dataclasses
import gc
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hfcompress.errors import HfcompressError
from hfcompress.evaluation.fresh_process import USER_ERROR, Request
from hfcompress.evaluation.memory import open_gauge
from hfcompress.evaluation.meters import Meter, open_meter
from hfcompress.models.architecture import auto_class
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.tiny import tiny_folder
from hfcompress.runtime.integer_linear import warm_up
from hfcompress.runtime.semi_structured import use_sparse_kernels


PAGE = 4096


@dataclass(frozen=True)
class Generation:
    """
    Args:
        tokens (`Tensor`): int64 `(rows, new_tokens)`.
        prefill_seconds (`float`): until the first new token of all rows was there.
        step_seconds (`list[float]`): of each of the other `new_tokens - 1` steps.
    """

    tokens: Tensor
    prefill_seconds: float
    step_seconds: list[float]


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Generation:
    """
    Greedy decoding with the key-value cache, each step timed; an end token does not end it.

    Args:
        model (`PreTrainedModel`): decodes.
        prompts (`Tensor`): int64 `(rows, prompt_length)`.
        new_tokens (`int`): tokens that are generated for each row.
    """
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    tokens, seconds, cache, inputs = [], [], None, prompts
    for _ in range(new_tokens):
        _wait_for(prompts.device)
        started = time.perf_counter()
        output = model(inputs, past_key_values=cache, use_cache=True, **last_only)
        inputs = output.logits[:, -1:].argmax(-1)
        _wait_for(prompts.device)
        seconds.append(time.perf_counter() - started)
        cache = output.past_key_values
        tokens.append(inputs)
    return Generation(torch.cat(tokens, dim=1), seconds[0], seconds[1:])


def tensor_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def architecture(checkpoint: Checkpoint, **options) -> PreTrainedModel:
    """The dense model that the configuration describes, without memory; `options` are `from_config`'s."""
    config = copy.deepcopy(checkpoint.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=checkpoint.trust_remote_code, **options).eval()


def speed(request: Request) -> dict[str, Any]:
    """Seconds of prefill and of every decoding step, per batch size and repeat; one repeat before them is not kept."""
    with request.model() as model:
        at_rest = tensor_bytes(model)
        return {"batches": _timed(request, model), **_described(model, at_rest), "zeros": _with_zeros(request, model)}


def _timed(request: Request, model: PreTrainedModel) -> dict[str, list[dict[str, Any]]]:
    batches = {}
    for size in request.batches:
        prompts = request.batch(size)
        generate(model, prompts, request.new_tokens)
        runs = _repeat(
            lambda prompts=prompts: generate(model, prompts, request.new_tokens),
            request.seconds / len(request.batches),
            request.repeats,
        )
        batches[str(size)] = [
            {"prefill_seconds": run.prefill_seconds, "step_seconds": run.step_seconds} for run in runs
        ]
    return batches


def _with_zeros(request: Request, model: PreTrainedModel) -> dict[str, Any] | None:
    """The same once more, on the kernels that torch has for 2:4 weights; or why there is nothing to gain by them."""
    length = len(request.prompts[0])
    run = use_sparse_kernels(model, max(request.batches) * length)
    if not run.linears:
        return None
    told = {"linears": run.linears, "used": run.used, "reason": run.reason}
    return {**told, "batches": _timed(request, model)} if run.used else told


def memory(request: Request) -> dict[str, Any]:
    """What the process takes for the model at rest, after its first forward, and at most while it generates."""
    gauge = open_gauge(torch.device(request.device))
    _load_libraries(request)
    gc.collect()
    before = gauge.now()
    with request.model() as model:
        _page_in(model)
        at_rest, tensors = gauge.now() - before, tensor_bytes(model)
        prompts = request.batch(1)
        generate(model, prompts[:, :1], 1)
        gc.collect()
        after_forward = gauge.now() - before
        peak = gauge.peak_of(lambda: generate(model, prompts, request.new_tokens)) - before
        return {
            "at_rest_bytes": at_rest,
            "after_forward_bytes": after_forward,
            "peak_bytes": peak,
            "gauge": gauge.text,
            **_described(model, tensors),
        }


def energy(request: Request) -> dict[str, Any]:
    """Joules, seconds and generated tokens of every repeat, and the power while nothing is done."""
    meter = open_meter(torch.device(request.device))
    with request.model() as model:
        at_rest = tensor_bytes(model)
        prompts = request.batch(1)
        generate(model, prompts, request.new_tokens)
        idle_watts = idle_power(meter, request.idle_seconds)
        repeats = []
        for _ in range(request.repeats):
            joules, started = meter.joules(), time.perf_counter()
            runs = _repeat(
                lambda: generate(model, prompts, request.new_tokens), request.seconds / request.repeats, least=1
            )
            seconds = time.perf_counter() - started
            tokens = sum(run.tokens.numel() for run in runs)
            repeats.append({"joules": meter.joules() - joules, "seconds": seconds, "tokens": tokens})
        return {
            "repeats": repeats,
            "idle_watts": idle_watts,
            "source": meter.source,
            "text": meter.text,
            "counts_idle": meter.counts_idle,
            **_described(model, at_rest),
        }


def idle_power(meter: Meter, seconds: float) -> float:
    """Watts while this process sleeps; zero for a meter that counts this process's work alone."""
    if not meter.counts_idle:
        return 0.0
    joules, started = meter.joules(), time.perf_counter()
    time.sleep(seconds)
    return (meter.joules() - joules) / (time.perf_counter() - started)


PROBES: dict[str, Callable[[Request], dict[str, Any]]] = {"speed": speed, "memory": memory, "energy": energy}


def _repeat(work: Callable[[], Generation], seconds: float, least: int) -> list[Generation]:
    """Results of as many calls as `seconds` hold, `least` of them at any rate."""
    results, until = [], time.perf_counter() + seconds
    while len(results) < least or time.perf_counter() < until:
        results.append(work())
    return results


def _described(model: PreTrainedModel, tensor_bytes_at_rest: int) -> dict[str, Any]:
    """What the parent says of how a model ran."""
    return {
        "tensor_bytes": tensor_bytes_at_rest,
        "tensor_bytes_after_forward": tensor_bytes(model),
        "attention": getattr(model.config.get_text_config(), "_attn_implementation", None),
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _load_libraries(request: Request) -> None:
    """
    Import and start all that the model will need, so that none of it is counted as the model's: the bundled tiny
    model is loaded and run, and the model's own classes are imported by building it without memory.
    """
    checkpoint = Checkpoint.open(request.folder, trust_remote_code=request.trust_remote_code)
    tiny = dataclasses.replace(request, folder=str(tiny_folder()), trust_remote_code=False)
    with tiny.model() as model:
        generate(model, torch.zeros((1, 8), dtype=torch.int64, device=request.device), 2)
    if checkpoint.quantization_config is not None:
        import compressed_tensors  # noqa: F401
    if request.packed:
        warm_up()
    architecture(checkpoint)


def _page_in(model: PreTrainedModel) -> None:
    """Read a byte of every page: weights that a loader maps from their file take no memory before they are used."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].max()


def main() -> int:
    """The exit code: 0, 1 after an error, `USER_ERROR` after one whose message says what to do."""
    request = Request(**json.load(sys.stdin))
    torch.set_num_threads(request.threads)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the readings alone
            readings = PROBES[request.measurement](request)
    except HfcompressError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except Exception as error:  # noqa: BLE001 (whatever it is, the parent gets one line of it)
        traceback.print_exc()
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        print(f"{type(error).__name__}: {reason}", file=sys.stderr)
        return 1
    print(json.dumps(readings, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
