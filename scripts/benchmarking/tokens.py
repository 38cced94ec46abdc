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
"""The token files of a benchmark: what is given, cut and drawn into what the runs read."""

import sys
from pathlib import Path
from typing import Any

from benchmarking.errors import RunError, UsageError
from benchmarking.processes import DOOR, answer


ROWS = 128  # of a text, for calibration in each seed and for evaluation


def load(path: Path):
    """
    Token ids `(rows, seq_len)`.

    Raises:
        UsageError: there are none.
    """
    import numpy as np

    if not path.is_file():
        raise UsageError(f"There is no file {path}; give --calibration and --evaluation, or --text.")
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"{path} is no array of token ids.") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise UsageError(f"{path} must hold integers (rows, seq_len), not {array.dtype} {array.shape}.")
    return array


def cut(path: Path, rows: int | None, folder: Path) -> Path:
    """The token file, or the first `rows` rows of it in one of the same name in a new folder."""
    import numpy as np

    array = load(path)
    if rows is None:
        return path
    folder.mkdir()
    np.save(folder / path.name, array[:rows])
    return folder / path.name


def draw(path: Path, rows: int | None, seeds: int, folder: Path) -> tuple[Path, ...]:
    """
    A calibration file for each seed. One seed takes the rows in their order. More take rows that no other seed has, in
    an order drawn once: what differs between such results is the luck of the calibration data, and nothing of it is
    hidden by rows in common. Rows are never drawn twice, since steps that hold rows out would then know them.

    Args:
        path (`Path`): the token file.
        rows (`int` or `None`): rows for each seed; as many as there are for all if `None`.
        seeds (`int`): how many.
        folder (`Path`): a new folder for the files.

    Raises:
        UsageError: there are fewer rows than asked for.
    """
    import numpy as np

    if seeds == 1:
        return (cut(path, rows, folder),)
    array = load(path)
    each = rows or len(array) // seeds
    if not each or each * seeds > len(array):
        raise UsageError(
            f"{path.name} has {len(array)} rows, too few for {seeds} seeds of {each or 1} rows of their own; lower "
            "--seeds or --rows."
        )
    order = np.random.default_rng(0).permutation(len(array))
    files = []
    for seed in range(seeds):
        file = folder / f"seed-{seed}" / path.name
        file.parent.mkdir(parents=True)
        np.save(file, array[np.sort(order[seed * each : (seed + 1) * each])])
        files.append(file)
    return tuple(files)


def tokenize(model: Path, text: Path, rows: int, seq_len: int, folder: Path) -> Path:
    """
    A UTF-8 text as rows of token ids by the model's own tokenizer.

    Args:
        model (`Path`): the model's folder.
        text (`Path`): the file.
        rows (`int`): how many, at most.
        seq_len (`int`): tokens in each; the model's context if that is shorter.
        folder (`Path`): a new folder for the token file.

    Raises:
        UsageError: there is no such text, or it gives not one row.
    """
    if not text.is_file() or text.suffix != ".txt":
        raise UsageError(f"There is no text {text}; --text wants two .txt files, for calibration and for evaluation.")
    folder.mkdir()
    output = folder / f"{text.stem}.npy"
    try:
        told = answer((sys.executable, DOOR, "tokenize", model, text, rows, seq_len, output), folder, own=True)
    except RunError as error:
        raise UsageError(f"{text.name} could not be tokenized: {error}.") from error
    if "error" in told:
        raise UsageError(told["error"])
    return output


def described(files: tuple[Path, ...]) -> dict[str, Any]:
    """Token files of one shape by their name and shape."""
    rows, seq_len = load(files[0]).shape
    return {"name": files[0].name, "rows": rows, "seq_len": seq_len, "files": len(files)}
