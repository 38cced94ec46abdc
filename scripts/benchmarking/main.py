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
"""The commands and their options."""

import argparse
import datetime
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarking import distillation, quality, rate, recipes, sparsity, speed
from benchmarking.bench import PEERS, Bench, Setting
from benchmarking.errors import RunError, UsageError
from benchmarking.ladder import ADDED
from benchmarking.processes import DOOR, answer
from benchmarking.shapes import SHAPES, make_shape
from benchmarking.table import number, show
from benchmarking.tokens import ROWS, cut, described, draw, tokenize
from benchmarking.workers import WORKERS, versions


RESULTS = DOOR.parent / "benchmark_results"
SETTINGS = "w4g128,w4channel,w3g128,w2g64,w2g32"
OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled tiny model")
    common.add_argument("--calibration", type=Path, metavar="FILE.npy", help="default: DIR/calibration.npy")
    common.add_argument("--evaluation", type=Path, metavar="FILE.npy", help="default: DIR/evaluation.npy")
    common.add_argument(
        "--text", type=Path, nargs=2, metavar=("CALIBRATION.txt", "EVALUATION.txt"), help="texts instead of tokens"
    )
    common.add_argument(
        "--seq-len", type=positive, default=512, help="tokens in a row of --text; default: %(default)s"
    )
    common.add_argument(
        "--rows", type=positive, metavar="N", help="only so many rows, of each seed and to evaluate on"
    )
    common.add_argument("--output", type=Path, metavar="FILE.json", help="default: benchmark_results/COMMAND.json")
    against = argparse.ArgumentParser(add_help=False)
    against.add_argument("--settings", default=SETTINGS, help="default: %(default)s")
    against.add_argument("--peer-scripts", type=Path, metavar="DIR", help="the folder with the peers' run scripts")
    for peer, package in PEERS.items():
        against.add_argument(f"--{peer}", type=Path, metavar="PYTHON", help=f"an interpreter that has {package}")
    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument("--seeds", type=positive, default=1, help="draws of calibration rows; default: %(default)s")
    top = argparse.ArgumentParser(description="Benchmark hfcompress, step by step and against its peers.")
    commands = top.add_subparsers(dest="command", required=True)
    lost = commands.add_parser(
        "quality", parents=[common, against, drawn], help="what is lost, with every step added one at a time"
    )
    lost.add_argument("--without", default="", metavar="STEP,...", help=f"leave out rungs: of {', '.join(ADDED)}")
    shipped = commands.add_parser("recipes", parents=[common, drawn], help="what every shipped recipe loses and saves")
    shipped.add_argument("--names", metavar="RECIPE,...", help="default: all that are shipped")
    commands.add_parser("sparsity", parents=[common, against, drawn], help="what zeros and smaller shapes lose")
    bought = commands.add_parser(
        "rate", parents=[common, against, drawn], help="what a bit buys: all ways to store weights"
    )
    bought.add_argument("--kinds", metavar="KIND,...", help="default: all; fixed grids are always among them")
    commands.add_parser("distillation", parents=[common, drawn], help="what students learn, and what is won back")
    took = commands.add_parser("speed", parents=[common, against], help="how long it takes")
    took.add_argument("--repeats", type=positive, default=3, help="default: %(default)s")
    took.add_argument("--shape", choices=SHAPES, help="a model of this shape with random weights in place of --model")
    took.add_argument("--blocks", type=positive, help="only so many blocks of the shape")
    took.add_argument("--methods", metavar="METHOD,...", help="default: all; a part of their names is enough")
    took.add_argument("--device", default="cpu", help="where hfcompress compresses; default: %(default)s")
    return top


def positive(text: str) -> int:
    """A whole number from one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """
    What the runs need, in a temporary folder.

    Raises:
        UsageError: an option is missing, or names nothing.
    """
    settings = tuple(map(Setting.parse, getattr(options, "settings", SETTINGS).split(",")))
    given = {peer: getattr(options, peer, None) for peer in PEERS}
    interpreters = {peer: python.absolute() for peer, python in given.items() if python is not None}
    scripts = check_peers(interpreters, getattr(options, "peer_scripts", None))
    model = options.model.absolute() if options.model is not None else bundled_model()
    if getattr(options, "shape", None) is not None:
        if options.model is not None:
            raise UsageError("--shape makes a model; give it or --model.")
        model = make_shape(options.shape, folder / options.shape, model, options.blocks, options.rows)
    if not model.is_dir():
        raise UsageError(f"There is no folder {model}; --model must be one.")
    seeds = getattr(options, "seeds", 1)
    without = tuple(filter(None, getattr(options, "without", "").split(",")))
    unknown = [step for step in without if step not in ADDED]
    if unknown:
        raise UsageError(f"--without {unknown[0]}: the rungs that can be left out are those of {', '.join(ADDED)}.")
    if options.text is None:
        calibration = (options.calibration or model / "calibration.npy").absolute()
        evaluation = (options.evaluation or model / "evaluation.npy").absolute()
    else:
        if options.calibration or options.evaluation:
            raise UsageError("--text takes the place of --calibration and --evaluation; give one or the other.")
        rows = options.rows or ROWS
        first, second = (text.absolute() for text in options.text)
        calibration = tokenize(model, first, rows * seeds, options.seq_len, folder / "calibration-text")
        evaluation = tokenize(model, second, rows, options.seq_len, folder / "evaluation-text")
    work = folder / "work"
    work.mkdir()
    return Bench(
        model=model,
        calibration=draw(calibration, options.rows, seeds, folder / "calibration"),
        evaluation=cut(evaluation, options.rows, folder / "evaluation"),
        settings=settings,
        interpreters=interpreters,
        scripts=scripts,
        work=work,
        without=without,
        device=getattr(options, "device", "cpu"),
    )


def check_peers(interpreters: dict[str, Path], scripts: Path | None) -> Path | None:
    """The folder of their scripts, looked at."""
    for peer, python in interpreters.items():
        if not python.is_file():
            raise UsageError(f"There is no file {python}; --{peer} must be the Python of an environment.")
        if scripts is None:
            raise UsageError(f"--{peer} needs --peer-scripts: the folder with {peer}_run.py.")
        if not (scripts / f"{peer}_run.py").is_file():
            raise UsageError(f"There is no {peer}_run.py in {scripts}, which --{peer} needs.")
    return None if scripts is None else scripts.absolute()


def bundled_model() -> Path:
    """The tiny model that comes with hfcompress."""
    from hfcompress.models.tiny import tiny_folder

    return tiny_folder()


def shipped(names: str | None) -> tuple[str, ...]:
    """
    The recipes that are asked for.

    Raises:
        UsageError: there is none of a name.
    """
    from hfcompress.recipes.job import shipped_recipes

    known = shipped_recipes()
    asked = tuple(known) if names is None else tuple(names.split(","))
    for name in asked:
        if name not in known:
            raise UsageError(f"--names {name}: no such recipe is shipped; there are {', '.join(known)}.")
    return asked


def kinds(names: str | None) -> dict[str, dict[str, list[dict]]]:
    """
    The recipes of the kinds that are asked for, fixed grids among them.

    Raises:
        UsageError: there is none of a name.
    """
    known = rate.recipes()
    asked = tuple(known) if names is None else (rate.FIXED, *names.split(","))
    for name in asked:
        if name not in known:
            raise UsageError(f"--kinds {name}: there is no such kind; there are {', '.join(known)}.")
    return {name: methods for name, methods in known.items() if name in asked}


def benchmark(options: argparse.Namespace) -> int:
    """One command, in a temporary folder."""
    output = (options.output or RESULTS / f"{options.command}.json").absolute()
    with tempfile.TemporaryDirectory(prefix="hfcompress-benchmark-", ignore_cleanup_errors=True) as folder:
        bench = prepare(options, Path(folder))
        runs, columns = {
            "quality": lambda: (quality.run_quality(bench), quality.COLUMNS),
            "recipes": lambda: (recipes.run_recipes(bench, shipped(options.names)), recipes.COLUMNS),
            "sparsity": lambda: (sparsity.run_sparsity(bench), sparsity.COLUMNS),
            "rate": lambda: (rate.run_rate(bench, output.with_suffix(".png"), kinds(options.kinds)), rate.COLUMNS),
            "distillation": lambda: (distillation.run_distillation(bench), sparsity.COLUMNS),
            "speed": lambda: (speed.run_speed(bench, options.repeats, options.methods), speed.COLUMNS),
        }[options.command]()
        found, rows = described_run(bench, options), []
        for more in runs:  # a long benchmark that is interrupted keeps what is done
            rows += more
            found["rows"] = [asdict(row) for row in rows]
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(found, indent=2) + "\n")
    title = f"{options.repeats} runs each, in turn" if options.command == "speed" else before_compression(rows)
    show(columns, rows, f"{bench.model.name}: {title}")
    return FAILED if any(row.error for row in rows if row.ours) else OK


def before_compression(rows: list[quality.Row]) -> str:
    """The original's perplexity, in words."""
    dense = next((row.dense_perplexity for row in rows if row.dense_perplexity is not None), None)
    return f"perplexity {number(dense, '.3f')} before compression"


def described_run(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """What the JSON tells beside the rows: what was asked for, on what, by what."""
    told = {name: plain(value) for name, value in vars(options).items() if name not in ("command", "output")}
    return {
        "command": options.command,
        "options": told,
        "data": {
            "model": bench.model.name,
            "calibration": described(bench.calibration),
            "evaluation": described((bench.evaluation,)),
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": answer([sys.executable, DOOR, "machine"], bench.work, True),
        "versions": next(versions("hfcompress", "torch", "transformers")),
        "peers": peer_versions(bench),
    }


def plain(value: Any) -> Any:
    """An option without the machine's folders."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.name if isinstance(value, Path) else value


def peer_versions(bench: Bench) -> dict[str, dict]:
    """As the peers' interpreters tell them."""
    found = {}
    for peer, python in bench.interpreters.items():
        try:
            found[peer] = answer([python, DOOR, "versions", PEERS[peer], "torch", "transformers"], bench.work, False)
        except RunError as error:
            found[peer] = {"error": str(error)}
    return found


def main(arguments: list[str]) -> int:
    """A command, or one of the workers that the runs are made of."""
    if arguments and arguments[0] in WORKERS:
        for told in WORKERS[arguments[0]](*arguments[1:]):
            print(json.dumps(told), flush=True)
        return OK
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run and its folder go too
    try:
        return benchmark(parser().parse_args(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
