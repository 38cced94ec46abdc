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
"""Freed memory given back to the system, so that peak memory is what is in use and not what has been."""

import ctypes
import sys


M_MMAP_THRESHOLD, LARGE = -3, 1 << 20  # of malloc.h; bytes from which a tensor has pages of its own


def give_back_freed_memory() -> None:
    """
    Ask the C library to return the pages that it keeps after large tensors were freed; does nothing where it cannot.

    The tensors of a halted forward lie between freed ones of other sizes, and glibc keeps such holes otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def give_back_large_tensors_at_once() -> None:
    """
    Let the C library return the pages of every large tensor as soon as it is freed, for the rest of this process; does
    nothing where it cannot. It takes some time: pages that come anew are cleared anew.
    """
    settle = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if settle is not None:
        settle(M_MMAP_THRESHOLD, LARGE)
