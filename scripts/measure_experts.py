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
What weighing the inputs of experts by their gates, and mixing in tokens that were not sent to them, is worth.

    python scripts/train_tiny_llama.py --experts 16 --steps 600 --output MIXTURE
    python scripts/measure_experts.py --model MIXTURE [--rows 4 16 128] [--bits 4 3] [--output FILE.json]

GPTQ in groups of 64 on a mixture, with so many calibration rows, in five ways: as the library does it; with every token that is
sent to an expert counted alike; without the tokens that are only shown to it; without both, which is what is sent alone; and
only with what is shown to it, as where all experts are calibrated on all tokens. KL in nats per token on held-out rows.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Generator
from pathlib import Path

import numpy as np

import hfcompress as hfc
from hfcompress.passes import statistics


GROUP = 64
OURS, FLAT, BARE, SENT, ALL = "gates, mixed", "mixed alone", "gates alone", "neither", "all tokens alike"
WAYS = {  # the power of the gates, and what the shown tokens weigh
    OURS: (statistics.GATE_POWER, statistics.SHOWN_WEIGHT),
    FLAT: (0.0, statistics.SHOWN_WEIGHT),
    BARE: (statistics.GATE_POWER, 1e-9),
    SENT: (0.0, 1e-9),
    ALL: (0.0, 1e9),
}


@contextlib.contextmanager
def counted(power: float, shown: float) -> Generator[None]:
    """Within, experts' inputs are counted so."""
    before = statistics.GATE_POWER, statistics.SHOWN_WEIGHT
    statistics.GATE_POWER, statistics.SHOWN_WEIGHT = power, shown
    try:
        yield
    finally:
        statistics.GATE_POWER, statistics.SHOWN_WEIGHT = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 128])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--evaluation-rows", type=int, default=48)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    calibration, evaluation = (np.load(args.model / f"{name}.npy") for name in ("calibration", "evaluation"))
    found = []
    for bits in args.bits:
        for rows in args.rows:
            row = {"bits": bits, "rows": rows, "kl": {}}
            for way, counts in WAYS.items():
                with tempfile.TemporaryDirectory() as folder, counted(*counts):
                    result = hfc.compress(
                        str(args.model),
                        hfc.GPTQ(bits=bits, group_size=GROUP),
                        Path(folder) / "out",
                        calibration=calibration[:rows].astype("int64"),
                        eval_data=evaluation[: args.evaluation_rows].astype("int64"),
                    )
                row["kl"][way] = result.report["kl_mean"]
                row["experts"] = result.manifest["experts"]
            found.append(row)
            told = ", ".join(f"{way} {kl:.5f} ({kl / row['kl'][OURS]:.2f})" for way, kl in row["kl"].items())
            print(
                f"{bits} bits, {rows} rows, {row['experts']['fewest']} to {row['experts']['most']} tokens: {told}",
                flush=True,
            )
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
