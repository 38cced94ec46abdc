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
Run by the Python of the environment that has gptqmodel and optimum, where hfcompress is not installed: load folders, say
what they say.

stdin: a JSON list of `{"folder", "loader": "transformers" | "gptqmodel", "output", "input_ids"}`. Written for each: a
safetensors file with the `logits` and, under their names, the weights `(out_features, in_features)` that the linears of
the blocks compute with, or a JSON file with the error. The backends are the plain torch kernels: others are compiled first.
"""

import json
import os
import sys


os.environ |= {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig


def by_transformers(folder: str) -> torch.nn.Module:
    """`from_pretrained`, told which kernel to take."""
    with open(f"{folder}/config.json") as file:
        written = json.load(file)["quantization_config"]
    kernel = (
        AwqConfig(backend="torch_awq") if written["quant_method"] == "awq" else GPTQConfig(4, backend="gptq_torch")
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu", quantization_config=kernel
    )


def by_gptqmodel(folder: str) -> torch.nn.Module:
    """GPTQModel's own loader."""
    with open(f"{folder}/config.json") as file:
        awq = json.load(file)["quantization_config"]["quant_method"] == "awq"
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    return GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=backend).model


@torch.no_grad()
def said(model: torch.nn.Module, input_ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """The logits, and what each quantized linear makes of the unit vectors."""
    model.eval()
    found = {"logits": model(input_ids=torch.tensor(input_ids)).logits.float()}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            unit = torch.eye(module.in_features, dtype=torch.float16)
            found[name] = module(unit).T.contiguous()
    return found


for job in json.load(sys.stdin):
    loaders = {"transformers": by_transformers, "gptqmodel": by_gptqmodel}
    try:
        save_file(said(loaders[job["loader"]](job["folder"]), job["input_ids"]), job["output"])
    except Exception as error:  # noqa: BLE001 (the test that reads the answer shows it)
        with open(job["output"], "w") as file:
            json.dump({"error": f"{type(error).__name__}: {error}"}, file)
