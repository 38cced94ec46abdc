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
"""What other libraries say while they are imported or run, and no user of hfcompress can do anything about."""

import logging


# torchao names every kernel that it cannot load (transformers imports it wherever it is installed), torch deprecates what
# torchao does, and bitsandbytes says at every int8 linear that it casts the input
NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")


def quiet_libraries() -> None:
    """Their errors alone are shown from now on; for commands, since a library should not touch another's logs."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
