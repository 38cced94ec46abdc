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
"""The places that text and token ids come from: local files, and data sets on the Hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hfcompress.errors import CalibrationError, MissingExtraError, nearest


COLUMNS = ("text", "messages")
LOCAL = (".txt", ".jsonl", ".parquet")


def read_array(path: Path) -> np.ndarray:
    """
    Token ids from an `.npy`.

    Raises:
        CalibrationError: it is not there or not an array.
    """
    if not path.is_file():
        raise CalibrationError(f"There is no file {path}; give an .npy of token ids shaped (rows, seq_len).")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CalibrationError(f"{path} is no array of token ids: it is empty, damaged, or holds objects.") from error


def read_texts(source: str, tokenizer) -> Iterator[str | list[int]]:
    """
    The documents of a source, one after the other: texts, and as token ids chats in the words of the model's template, which
    has its own beginnings and ends.

    Args:
        source (`str`): a local `.txt`, `.jsonl` or `.parquet`, or a data set on the Hub:
            `id[:config[:split[:column]]]`.
        tokenizer: renders `messages` with its chat template.

    Raises:
        CalibrationError: it is not there, empty, or has no column that can be read.
    """
    path = Path(source).expanduser()
    if path.suffix not in LOCAL:
        if path.exists():
            raise CalibrationError(f"{source} cannot be read; give .txt, .jsonl, .parquet or .npy.")
        yield from _hub(source, tokenizer)
        return
    if not path.is_file():
        raise CalibrationError(f"There is no file {source}.")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{source} is empty.")
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8", errors="replace")
    elif path.suffix == ".jsonl":
        yield from _documents(_json_lines(path), source, tokenizer)
    else:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise MissingExtraError(f"Reading {source} needs pyarrow: pip install 'hfcompress[parquet]'.") from error
        try:
            rows = pyarrow.parquet.ParquetFile(path).iter_batches()
            yield from _documents((row for batch in rows for row in batch.to_pylist()), source, tokenizer)
        except pyarrow.ArrowInvalid as error:
            raise CalibrationError(f"{source} is no parquet file: {error}") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise CalibrationError(f"Line {number} of {path} is no JSON: {error}") from error
                if not isinstance(row, dict):
                    raise CalibrationError(f'Line {number} of {path} is no JSON object such as {{"text": "..."}}.')
                yield row


def _hub(source: str, tokenizer) -> Iterator[str | list[int]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"Reading the data set {source} needs datasets: pip install 'hfcompress[datasets]'."
        ) from error
    name, config, split, column = (*source.split(":"), "", "", "")[:4]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _documents(rows, source, tokenizer, column)
    except (OSError, ValueError) as error:
        if isinstance(error, CalibrationError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise CalibrationError(
            f"The data set {source} is no file here and cannot be read from the Hub ({reason}); "
            "give id[:config[:split[:column]]], or a local file."
        ) from error


def _documents(rows: Any, source: str, tokenizer, column: str = "") -> Iterator[str | list[int]]:
    for row in rows:
        key = column or next((c for c in COLUMNS if c in row), None)
        if key is None or key not in row:
            hint = nearest(column, row) if column else ""
            raise CalibrationError(
                f"{source} has no column '{column or 'text'}'; it has {', '.join(map(str, row))}.{hint}"
            )
        value = row[key]
        if value:
            yield _rendered(value, source, tokenizer) if isinstance(value, list) else str(value)


def _rendered(messages: list, source: str, tokenizer) -> list[int]:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{source} holds messages, but the model's tokenizer has no chat template; give a data set with a text column."
        )
    return tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
