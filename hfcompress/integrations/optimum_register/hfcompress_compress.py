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
"""
`optimum-cli compress RECIPE`: what `hfcompress run RECIPE` does, with the same options.

It is installed into optimum's namespace `optimum.commands.register` (without an `__init__.py`), where `optimum-cli` looks for
commands; it imports hfcompress only when it is run.
"""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class CompressCommand(BaseOptimumCLICommand):
    """Compress a model by a recipe."""

    COMMAND = CommandInfo(name="compress", help="Compress a model by a recipe of hfcompress, and measure the result.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """What the command takes."""
        parser.add_argument("recipe", help="a shipped recipe (hfcompress recipes) or a YAML file")
        parser.add_argument(
            "options",
            nargs=argparse.REMAINDER,
            help="behind the recipe, those of hfcompress run: --model, --output, ...",
        )

    def run(self) -> None:
        """Run it, and end with its exit code."""
        from hfcompress.cli import run_command

        assert self.args is not None
        sys.exit(run_command(["run", self.args.recipe, *self.args.options]))


REGISTER_COMMANDS = [CompressCommand]
