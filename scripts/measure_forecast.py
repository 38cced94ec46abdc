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
Law 9, measured: what `hfcompress plan` says against what `hfcompress run` then takes, each in a process of its own.

    python scripts/measure_forecast.py --output scripts/benchmark_results/forecast.json

Models with random weights are made for it, so it says nothing of quality. The table has, for every model, recipe and
limit, the forecast peak of memory over the measured one, the forecast size over the written one, and the forecast time
over the time taken.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table


MODELS = {
    "llama-512x6": (
        "LlamaConfig",
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8},
    ),
    "qwen3-768x4": (
        "Qwen3Config",
        {
            "hidden_size": 768,
            "intermediate_size": 2304,
            "num_hidden_layers": 4,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-640x4": (
        "Gemma3TextConfig",
        {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 128,
        },
    ),
    "opt-512x4": (
        "OPTConfig",
        {
            "hidden_size": 512,
            "ffn_dim": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "word_embed_proj_dim": 512,
        },
    ),
}
RECIPES = ("rtn-w8a16", "gptq-w4a16", "w4a16", "sparse24-fast", "w8a8-int8")
VOCABULARY, ROWS, LENGTH = 8192, 24, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in options.models:
            model = make(name, work / name)
            for recipe in options.recipes:
                free = compared(model, recipe, None, work)
                rows.append({"model": name, "recipe": recipe, **free})
                if free["way"] != "no data":  # between what it takes and the least
                    limit = (free["least_bytes"] + free["forecast_bytes"]) // 2
                    rows.append({"model": name, "recipe": recipe, **compared(model, recipe, limit, work)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if options.output is not None:
        options.output.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")
    show(rows)


def make(name: str, folder: Path) -> Path:
    """A model with random weights and token ids beside it."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, max_position_embeddings=2 * LENGTH, **settings)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH))
    np.save(folder / "calib.npy", ids.astype(np.int32))
    return folder


def compared(model: Path, recipe: str, limit: int | None, work: Path) -> dict:
    """One forecast and one run."""
    common = [recipe, "--model", str(model), "--calibration", str(model / "calib.npy")]
    common += [] if limit is None else ["--memory-limit", str(limit)]
    told = work / "plan.json"
    hfcompress("plan", *common, "--json", str(told))
    forecast = json.loads(told.read_text())
    output = work / "output"
    hfcompress("run", *common, "--no-eval", "--overwrite", "--output", str(output))
    phases = json.loads((output / "hfcompress.json").read_text())["phases"]
    peak = max(phase["peak_rss_bytes"] for phase in phases.values())
    seconds = phases["compress"]["seconds"]
    size = sum(file.stat().st_size for file in output.glob("model*.safetensors"))
    course = forecast["course"]
    way = "halted" if course["suspended"] else "run again, on disk" if course["spilled"] else "run again"
    return {
        "way": way if forecast["tokens"] else "no data",
        "rows_at_once": course["rows"],
        "limit_bytes": limit,
        "least_bytes": forecast["least_memory"],
        "forecast_bytes": forecast["peak_memory"],
        "measured_bytes": peak,
        "memory_ratio": forecast["peak_memory"] / peak,
        "size_ratio": forecast["output_bytes"] / size,
        "forecast_seconds": round(forecast["seconds"], 2),
        "measured_seconds": seconds,
        "seconds_ratio": forecast["seconds"] / seconds,
        "limit_kept": None if limit is None else peak <= limit,
    }


def hfcompress(*arguments: str) -> None:
    """
    Run a command in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    code = "import sys; from hfcompress.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"hfcompress {' '.join(arguments)}: {done.stderr[-2000:]}")


def show(rows: list[dict]) -> None:
    """The table."""
    columns = ("model", "recipe", "way", "limit", "forecast", "measured", "memory", "size", "time")
    table = Table(*columns, title="forecast over measured")
    for row in rows:
        limit = "-" if row["limit_bytes"] is None else f"{row['limit_bytes'] / 1e6:.0f} MB"
        table.add_row(
            *(row["model"], row["recipe"], f"{row['way']} ({row['rows_at_once']} rows)", limit),
            *(f"{row[key] / 1e6:.0f} MB" for key in ("forecast_bytes", "measured_bytes")),
            *(f"{row[key]:.3f}" for key in ("memory_ratio", "size_ratio")),
            f"{row['seconds_ratio']:.2f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
