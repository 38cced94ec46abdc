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
"""Sound as a model hears it: recordings, or what the model's feature extractor has made of them."""

import contextlib
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoFeatureExtractor

from hfcompress.calibration.sources import read_array
from hfcompress.calibration.tokens import BUNDLED, GIVEN, Tokens
from hfcompress.errors import CalibrationError
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.encoder_decoder import sound_shape


LENGTH = 128  # tokens that a model says of what it hears at once
FEATURES = "input_features"
PLACES = "give a folder of .wav files, one such file, or an .npy of the model's input features"
INTEGERS = {2: np.int16, 4: np.int32}  # bytes of a sample


def load_speech(data: Any, checkpoint: Checkpoint, samples: int, seq_len: int | None) -> Tokens:
    """
    Args:
        data: a folder with `.wav` files, one such file, or an `.npy` of features; or in Python features `(rows, mel bins, frames)`
            or a mapping with `input_features`.
        checkpoint (`Checkpoint`): the model, with its feature extractor.
        samples (`int`): rows at most; each is as much as the model hears at once.
        seq_len (`int`, *optional*): tokens that it says to each.

    Returns:
        `Tokens`: what is heard; of what is said only the room for it.

    Raises:
        CalibrationError: it cannot be read, or is not what the model hears.
    """
    config = checkpoint.config
    source = str(data) if isinstance(data, (str, Path)) else GIVEN
    if isinstance(data, str) and data == BUNDLED:
        raise no_sound(checkpoint)
    if not isinstance(data, (str, Path)):
        sound = np.asarray(data[FEATURES] if isinstance(data, Mapping) else data)
    elif source.endswith(".npy"):
        sound = read_array(Path(source).expanduser())
    else:
        sound = _recorded(Path(source).expanduser(), checkpoint, samples)
    shape = sound_shape(config)
    if sound.ndim != 3 or sound.shape[1:] != shape or not np.issubdtype(sound.dtype, np.floating):
        raise CalibrationError(
            f"{source} holds {sound.dtype} {sound.shape}, and {checkpoint.name} hears floats (rows, {shape[0]}, {shape[1]}); {PLACES}."
        )
    if not len(sound):
        raise CalibrationError(f"{source} is empty; {PLACES}.")
    room = min(seq_len or LENGTH, getattr(config, "max_target_positions", None) or LENGTH)
    sound = sound[:samples].astype(np.float32)
    return Tokens(np.zeros((len(sound), room), dtype=np.int64), source, sound=sound)


def no_sound(checkpoint: Checkpoint) -> CalibrationError:
    """The error of a model that is to hear what is bundled."""
    return CalibrationError(
        f"{checkpoint.name} hears sound, of which none comes with hfcompress; with --calibration, and --eval-data for the "
        f"measuring, {PLACES}."
    )


def _recorded(place: Path, checkpoint: Checkpoint, samples: int) -> np.ndarray:
    """Features of recordings, each cut into pieces as long as what is heard at once: float32 `(rows, mel bins, frames)`."""
    files = sorted(place.glob("*.wav")) if place.is_dir() else [place] if place.suffix == ".wav" else []
    if not files or not files[0].is_file():
        raise CalibrationError(f"There are no recordings at {place}; {PLACES}.")
    extractor = _extractor(checkpoint)
    rows = []
    for file in files:
        for piece in _pieces(file, extractor.sampling_rate, extractor.n_samples):
            rows.append(extractor(piece, sampling_rate=extractor.sampling_rate, return_tensors="np")[FEATURES][0])
            if len(rows) == samples:
                return np.stack(rows)
    if not rows:
        raise CalibrationError(f"{files[0]} is empty.")
    return np.stack(rows)


def _extractor(checkpoint: Checkpoint) -> Any:
    with contextlib.suppress(OSError, ValueError):
        if checkpoint.folder is not None:
            return AutoFeatureExtractor.from_pretrained(checkpoint.folder)
    raise CalibrationError(
        f"{checkpoint.name} has no feature extractor (preprocessor_config.json), so it cannot be given recordings; put the "
        "original's beside it, or give an .npy of its input features."
    )


def _pieces(file: Path, rate: int, length: int) -> Iterator[np.ndarray]:
    """The samples of a recording, from -1 to 1, its channels' mean, in pieces of at most `length`."""
    try:
        with wave.open(str(file)) as recording:
            found, width, channels = recording.getframerate(), recording.getsampwidth(), recording.getnchannels()
            data = recording.readframes(recording.getnframes())
    except (wave.Error, EOFError) as error:
        raise CalibrationError(
            f"{file} is no recording in plain PCM ({error}); convert it: ffmpeg -i IN -ar {rate} OUT.wav."
        ) from error
    if found != rate or width not in INTEGERS:
        raise CalibrationError(
            f"{file} has {found} samples a second of {8 * width} bits, and the model hears {rate} of 16; convert it: "
            f"ffmpeg -i {file.name} -ar {rate} -c:a pcm_s16le OUT.wav."
        )
    kind = INTEGERS[width]
    samples = np.frombuffer(data, dtype=kind).reshape(-1, channels).mean(1) / -float(np.iinfo(kind).min)
    for start in range(0, len(samples), length):
        yield samples[start : start + length].astype(np.float32)
