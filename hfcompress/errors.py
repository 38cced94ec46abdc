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
"""The errors that a user can cause, each one sentence that says what to do. The CLI ends with exit code 2 on them."""

import difflib
from collections.abc import Iterable


class HfcompressError(Exception):
    """Something that the user can put right; the message is one sentence that says how."""


class InvalidValueError(HfcompressError, ValueError):
    """A value that cannot be: an unknown key, a wrong type, a size that does not divide."""


class UnsupportedModelError(HfcompressError, ValueError):
    """A model that hfcompress cannot treat correctly, refused before any work starts."""


class CheckpointError(HfcompressError, ValueError):
    """A checkpoint that is missing, incomplete, damaged, or holds NaN or infinity."""


class CalibrationError(HfcompressError, ValueError):
    """Calibration or evaluation data that cannot be used."""


class OutputError(HfcompressError, OSError):
    """An output folder that exists, is not writable, or a disk that is full."""


class MissingExtraError(HfcompressError, ImportError):
    """An optional package that the request needs."""


class LostProcessError(HfcompressError):
    """Another process of the same run has ended before this one; the run can be resumed."""


class InterruptedPushError(HfcompressError):
    """The user stopped a push; the result is complete."""


class RefusedError(HfcompressError):
    """A gate or a check does not let a result pass."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `choices`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, [str(c) for c in choices], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
