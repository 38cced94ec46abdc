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
"""One progress bar for a whole run, or none: what long work calls, and what the command line draws."""

from typing import Protocol


class Progress(Protocol):
    """Told about work as it is done; the unit is a block's share of the whole."""

    def start(self, total: int) -> None:
        """There will be `total` units in all."""

    def step(self, description: str, amount: int = 1) -> None:
        """`amount` more units are done; `description` says what comes now."""

    def note(self, message: str) -> None:
        """A line for the person who watches."""


class Silent:
    """Draws nothing and keeps the notes in the log."""

    def start(self, total: int) -> None:
        """Nothing."""

    def step(self, description: str, amount: int = 1) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Log it."""
        import logging

        logging.getLogger("hfcompress").warning(message)
