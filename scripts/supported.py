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
What works with what: every architecture that the tests know, built tiny, through every kind of step and format, made, loaded again
by plain transformers (by hfcompress where transformers would need a further package), and compared.

    python scripts/supported.py            writes the table into README.md
    python scripts/supported.py --print    only shows it
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from conftest import (  # noqa: E402
    CONFIGS,
    ENCODERS,
    HEARING,
    MIXTURES,
    MULTIMODAL,
    TOGETHER,
    VOCABULARY,
    WITH_DECODERS,
    make_any_model,
    sound,
    token_ids,
)

import hfcompress as hfc  # noqa: E402
from hfcompress.errors import InvalidValueError, UnsupportedModelError  # noqa: E402
from hfcompress.evaluation.comparison import whole_model  # noqa: E402
from hfcompress.evaluation.logits import open_streamed  # noqa: E402
from hfcompress.models.architecture import answers  # noqa: E402
from hfcompress.models.batch import made_up  # noqa: E402
from hfcompress.models.checkpoint import Checkpoint  # noqa: E402


def gemma3():
    """As the released ones scale their attention, which llama.cpp takes for granted."""
    config = CONFIGS["gemma3"]()
    config.query_pre_attn_scalar = config.head_dim
    return config


ARCHITECTURES = {
    **CONFIGS,
    "gemma3": gemma3,
    **MIXTURES,
    **TOGETHER,
    **MULTIMODAL,
    **ENCODERS,
    **WITH_DECODERS,
    **HEARING,
}
FOUR = {"bits": 4, "group_size": 32}
COLUMNS = {  # what the table says -> steps and format
    "4 bits": (hfc.GPTQ(**FOUR), "compressed-tensors"),
    "with zero points": (hfc.GPTQ(**FOUR, symmetric=False), "compressed-tensors"),
    "8-bit inputs": (hfc.RTN(bits=8, group_size=-1, activations="dynamic"), "compressed-tensors"),
    "`awq`, `gptq` format": (hfc.AWQ() >> hfc.RTN(**FOUR), "gptq"),
    "`awq` format": (hfc.RTN(**FOUR, symmetric=False), "awq"),
    "`gguf`": (hfc.RTN(**FOUR), "gguf"),
    "2:4": (hfc.Sparsify() >> hfc.RTN(**FOUR), "sparse24"),
    "`entropy`": (hfc.Entropy(bits=3), "hfcompress"),
    "`vq`": (hfc.VQ(bits=2, rounds=1), "hfcompress"),
    "`lowrank`": (hfc.LowRank(ratio=0.8), "hfcompress"),
    "`prune.ffn`": (hfc.Prune(ffn=0.5, multiple=8), "compressed-tensors"),
    "plain weights": (hfc.GPTQ(**FOUR), "dense"),
}
YES, NO = "✓", "no"
BEGIN, END = "<!-- made by scripts/supported.py -->\n", "<!-- end -->\n"
ALIKE = 0.5  # least cosine to the original's answers, on random weights at two bits or half zero
IDS, UNSEEN = token_ids(8, 32, vocabulary=VOCABULARY - 8), torch.as_tensor(token_ids(2, 24, 7, VOCABULARY - 8))


def outcome(architecture: str, column: str, folder: Path) -> str:
    """
    Make it, load it and compare it.

    Raises:
        AssertionError: what was made does not load as what was solved.
    """
    recipe, name = COLUMNS[column]
    model = make_any_model(ARCHITECTURES[architecture]())
    job = hfc.Job(steps=hfc.Job.of(recipe).steps, format=name)
    try:
        hfc.compress(model, job, folder, calibration=sound(8) if architecture in HEARING else IDS, evaluate=False)
    except (InvalidValueError, UnsupportedModelError) as refused:
        if "The weights are done" in str(refused):
            raise AssertionError(f"{architecture}, {column}: it was refused too late") from refused
        return NO
    made = Checkpoint.open(folder)
    streamed = open_streamed(made, "cpu", torch.float32)
    with torch.no_grad():
        [stream] = streamed.forward_blocks(streamed.embed([made_up(made.config, UNSEEN)]))
        with streamed.outside(head=True) as outside:
            solved = streamed.logits(outside, stream)
        with whole_model(made, torch.device("cpu"), torch.float32) as loaded:
            found = answers(loaded(**made_up(loaded.config, UNSEEN).inputs(loaded.config)))
        wanted = answers(model(**made_up(model.config, UNSEEN).inputs(model.config)))
    torch.testing.assert_close(found, solved, rtol=1e-3, atol=1e-3)
    alike = torch.nn.functional.cosine_similarity(found, wanted, dim=-1).mean()
    assert alike > ALIKE, f"{architecture}, {column}: {alike:.3f}"
    assert name != "gguf" or list(folder.glob("*.gguf"))
    return YES


def row(architecture: str, folder: Path) -> list[str]:
    """Of every column."""
    return [outcome(architecture, column, folder / str(number)) for number, column in enumerate(COLUMNS)]


def line(cells: list[str]) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--print", action="store_true", help="leave README.md as it is")
    options = parser.parse_args()
    table = line(["", *COLUMNS]) + line(["---"] * (1 + len(COLUMNS)))
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            table += line([architecture, *row(architecture, Path(folder))])
        print(table.splitlines()[-1], flush=True)
    if options.print:
        return
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
