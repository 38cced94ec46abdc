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
"""A quarter of the blocks use the weights of others, with small differences trained on the predictions of the original.

    python recipes/shared_layers.py --model MODEL --output DIR
    torchrun --nproc_per_node 2 recipes/shared_layers.py --model MODEL --output DIR

The options are those of `hfcompress run`.
"""

from hfcompress.cli import run_recipe


if __name__ == "__main__":
    run_recipe("shared-layers")
