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
"""Benchmark hfcompress step by step and against its peers: the same model and tokens, every result measured alike.

    python scripts/benchmark.py quality [--model DIR] [--calibration FILE.npy] [--evaluation FILE.npy]
        [--text CALIBRATION.txt EVALUATION.txt] [--seq-len N] [--settings w4g128,w4channel,w3g128,w2g64,w2g32]
        [--rows N] [--seeds N] [--without awq,tune] [--output FILE.json]
        [--peer-scripts DIR] [--llmcompressor PYTHON] [--gptqmodel PYTHON] [--autoround PYTHON]
    python scripts/benchmark.py speed [the same options, but --repeats 3 instead of --seeds and --without]
        [--shape wide|deep|8b in place of --model] [--blocks N] [--methods "hfcompress GPTQ,llm"] [--device cuda]

`quality` climbs a ladder in every setting: rounding to nearest, then one step more on each rung, then each further
step alone on top of all that (`benchmarking/ladder.py`). Every result is measured with plain transformers: KL
divergence from the original, perplexity, top-1 agreement. A step that the installed hfcompress does not have is
skipped, and the table says so; `--without` leaves out the rungs of steps that take long. With `--seeds N` every method
runs N times, on calibration rows that no other seed has, and what is drawn in a step is drawn anew; means and standard
deviations are printed, and the change from one rung to the next is taken seed by seed. All seeds are evaluated on the
same rows.

`speed` takes the methods in turn, `--repeats` times, so that a busy moment of the machine hits all of them; hfcompress
runs GPTQ as it comes, under the least limit on memory, with the target shift, and with all the steps of the ladder's,
and AWQ, each beside the peers' of its kind. The table tells the peak of memory and what of it importing takes; the file
also the seconds that the operations take at the machine's rate. A shape is a Llama with random weights. For a GPU:

    python scripts/benchmark.py speed --shape 8b --device cuda --settings w4g128 --peer-scripts DIR --llmcompressor PYTHON

and, to see that it runs, on a CPU: `speed --shape 8b --blocks 1 --rows 2 --settings w4g128 --methods "hfcompress GPTQ"`.

`rate` tells what a bit buys: what all that is stored of the linears takes per weight, against the divergence, for fixed
grids, entropy-coded ones, codebooks, vectors, zeros, low rank, shared blocks and, where they take part, peers, each beside the
fixed grids at the same bits; what loading takes; and draws it.

`--text` takes two UTF-8 files, which the model's own tokenizer makes into rows. Without `--model` it is the bundled
tiny model; the tokens are by default `calibration.npy` and `evaluation.npy` in the model's folder.

A peer takes part if the Python of its environment is given; `--peer-scripts` is the folder with
`llmcompressor_run.py`, `gptqmodel_run.py` and `autoround_run.py`. Such a script gets the model, the token file and the
output folder, bits and group size (-1: a scale per row), and ends with a JSON line `{"seconds": ..., "peak_mib": ...}`.
Runs are processes of their own, on the CPU unless `--device` says otherwise, in a temporary folder; those of one ladder
and seed share one, so trust the seconds of `speed`. Seconds of hfcompress are those of reading, compressing and
writing; of a peer, what its script counts. The file of results grows setting by setting, so that of an interrupted
benchmark the settings that are done remain.
"""

import sys

from benchmarking.main import main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
