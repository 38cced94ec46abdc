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
"""Work that goes on beside the caller's: a block is written while the next one is read."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class Background:
    """
    One piece of work at a time, in a thread of its own; as a context, it ends with the last piece.

    What a piece raises is raised by the next [`Background.wait`] or [`Background.start`].
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)
        self._running: Future | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._pool.shutdown()  # after which it has ended, however the caller did
        if error is None:
            self.wait()

    def start(self, work: Callable[[], None]) -> None:
        """Begin with a piece once the one before has ended."""
        self.wait()
        self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Until it has ended."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
