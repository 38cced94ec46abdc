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
"""Benchmark hfcompress against its peers: the same model, the same calibration tokens, every result measured alike.

    python scripts/benchmark.py quality [--model DIR] [--calibration FILE.npy] [--evaluation FILE.npy]
        [--settings w4g128,w3g128,w4channel] [--rows N] [--output FILE.json]
        [--peer-scripts DIR] [--llmcompressor PYTHON] [--gptqmodel PYTHON] [--autoround PYTHON]
    python scripts/benchmark.py speed [the same options] [--repeats 3]

`quality` compresses once per method and setting, and measures every result with plain transformers: KL divergence
from the original, perplexity, top-1 agreement. `speed` takes the methods in turn, `--repeats` times, so that a busy
moment of the machine hits all of them; hfcompress runs twice, with halted forwards and with recomputed ones.

A peer takes part if the Python of its environment is given; `--peer-scripts` is the folder with
`llmcompressor_run.py`, `gptqmodel_run.py` and `autoround_run.py`. Such a script gets the model, the token file and the
output folder, bits and group size (-1: a scale per row), and ends with a JSON line `{"seconds": ..., "peak_mib": ...}`.
Every run is a fresh process, on the CPU, in a temporary folder. Without `--model` it is the bundled tiny model; the
tokens are by default `calibration.npy` and `evaluation.npy` in the model's folder.

Seconds of hfcompress are those of reading, compressing and writing; of a peer, what its script counts.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


# Nothing heavy is imported up here: the peers' environments run this file too, and a process counts the memory of the
# one that started it in its own peak.

THIS_FILE = Path(__file__).absolute()
RESULTS = THIS_FILE.parent / "benchmark_results"
OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
PLAIN_WIDTH = 150  # where there is no terminal
MEASURED_AT_ONCE = 4096  # tokens
GEMM_SIZE, GEMM_REPEATS = 2048, 5
HFCOMPRESS, RECOMPUTED = "hfcompress GPTQ", "hfcompress GPTQ, recomputed"
PEERS = {"llmcompressor": "llmcompressor", "gptqmodel": "gptqmodel", "autoround": "auto-round"}  # option -> package


class UsageError(Exception):
    """Something the caller can put right, in one sentence."""


class RunError(Exception):
    """A process failed; the message is the last line of what it said."""


@dataclass(frozen=True)
class Method:
    """
    Args:
        label (`str`): what the table calls it.
        peer (`str` or `None`): whose interpreter runs it: a key of `PEERS`, or `None` for our own.
        before (`tuple[str, ...]`): arguments before the common ones.
        after (`tuple[str, ...]`): arguments after the common ones.
        per_row (`bool`): it can do one scale per row.
        own_reader (`bool`): only its own interpreter can load what it writes.
    """

    label: str
    peer: str | None = None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    per_row: bool = True
    own_reader: bool = False


GPTQ_METHOD = Method(HFCOMPRESS, before=("worker", "gptq"))
RECOMPUTED_METHOD = Method(RECOMPUTED, before=("worker", "gptq"), after=("1",))  # a memory limit of one byte
RTN_METHOD = Method("hfcompress RTN", before=("worker", "rtn"))
PEER_GPTQ = (
    Method("llm-compressor GPTQ", "llmcompressor", before=("gptq",)),
    Method("GPTQModel GPTQ", "gptqmodel", per_row=False, own_reader=True),
    Method("AutoRound", "autoround"),
)
PEER_RTN = (Method("llm-compressor RTN", "llmcompressor", before=("rtn",)),)


@dataclass(frozen=True)
class Setting:
    """A grid: `w4g128`, or `w4channel` for one scale per row."""

    name: str
    bits: int
    group_size: int

    @classmethod
    def parse(cls, name: str) -> "Setting":
        """
        Raises:
            UsageError: it is no setting.
        """
        found = re.fullmatch(r"w(\d+)(?:g(\d+)|channel)", name)
        if found is None:
            raise UsageError(f"'{name}' is no setting; write w4g128, or w4channel for one scale per row.")
        return cls(name, int(found[1]), int(found[2] or -1))


@dataclass
class Row:
    """What one method did in one setting; `None` where there is nothing to tell."""

    method: str
    setting: str
    kl: float | None = None
    ratio: float | None = None  # of the KL to that of HFCOMPRESS
    perplexity: float | None = None
    dense_perplexity: float | None = None
    top1: float | None = None
    seconds: float | None = None
    peak_rss_mib: int | None = None
    error: str | None = None

    def summary(self) -> str:
        """For the progress line."""
        if self.kl is None:
            return self.error or ""
        return f"KL {self.kl:.5f}, {self.seconds:.1f} s"


@dataclass
class SpeedRow:
    """The times of one method in one setting."""

    method: str
    setting: str
    runs: list[float] = field(default_factory=list)  # seconds, in order
    seconds: float | None = None  # the median
    fastest: float | None = None
    slowest: float | None = None
    ratio: float | None = None  # median of HFCOMPRESS over median of this
    ratio_recomputed: float | None = None  # the same with RECOMPUTED
    peak_rss_mib: int | None = None  # the largest of the runs
    error: str | None = None

    def add(self, seconds: float, peak_rss_mib: int) -> None:
        """One more run."""
        self.runs.append(seconds)
        self.seconds = statistics.median(self.runs)
        self.fastest, self.slowest = min(self.runs), max(self.runs)
        self.peak_rss_mib = max(self.peak_rss_mib or 0, peak_rss_mib)

    def summary(self) -> str:
        """For the progress line."""
        return self.error or f"{self.runs[-1]:.1f} s"


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    model: Path
    calibration: Path
    evaluation: Path
    settings: tuple[Setting, ...]
    interpreters: dict[str, Path]
    scripts: Path | None
    work: Path

    def methods(self, candidates: Sequence[Method]) -> list[Method]:
        """Those whose interpreter is given."""
        return [method for method in candidates if method.peer is None or method.peer in self.interpreters]

    def compress(self, method: Method, setting: Setting, output: Path) -> tuple[float, int]:
        """
        Seconds and peak MiB of one run.

        Raises:
            RunError: it failed.
        """
        own = method.peer is None
        python = Path(sys.executable) if own else self.interpreters[method.peer]
        script = THIS_FILE if own else self.scripts / f"{method.peer}_run.py"
        grid = (str(setting.bits), str(setting.group_size))
        paths = (str(self.model), str(self.calibration), str(output))
        told = run([python, script, *method.before, *paths, *grid, *method.after], self.work, own)
        try:
            return float(told["seconds"]), int(told["peak_mib"])
        except KeyError as error:
            raise RunError(f"its JSON line has no {error}") from error

    def measure(self, method: Method, output: Path) -> dict[str, float]:
        """
        The quality of a folder that `method` wrote.

        Raises:
            RunError: it cannot be loaded.
        """
        own = not method.own_reader
        python = sys.executable if own else self.interpreters[method.peer]
        return run([python, THIS_FILE, "measure", output, self.model, self.evaluation], self.work, own)


def run(command: Sequence[Any], work: Path, own: bool) -> dict[str, Any]:
    """
    A fresh process; what its last JSON line says.

    Args:
        command (`Sequence`): interpreter, script, arguments.
        work (`Path`): where it runs and puts its temporary files.
        own (`bool`): it is our own interpreter, which keeps its `PYTHONPATH`.

    Raises:
        RunError: it failed.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2", "TMPDIR": str(work)}
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    if not own:
        environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=work,
            env=environment,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise RunError(f"cannot be started: {error.strerror}") from error
    if done.returncode < 0:
        raise RunError(f"killed by signal {-done.returncode}")
    if done.returncode:
        raise RunError(last_error(done.stderr) or f"exit code {done.returncode}")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    raise RunError("it printed no JSON line")


def last_error(said: str) -> str:
    """The last line that names an exception, else the last line; without the folders of its paths."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)(:|$)", line)]
    line = (named or lines or [""])[-1]
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "", line)


def run_quality(bench: Bench) -> list[Row]:
    """A row for every method and setting."""
    methods = bench.methods((GPTQ_METHOD, *PEER_GPTQ, RTN_METHOD, *PEER_RTN))
    rows = []
    for setting, method, progress in progressing(bench, methods):
        row = Row(method.label, setting.name)
        if method.per_row or setting.group_size > 0:
            fill(row, bench, method, setting)
        else:
            row.error = "n/a: it refuses one scale per row"
        progress(row.summary())
        rows.append(row)
    reference = {row.setting: row.kl for row in rows if row.method == HFCOMPRESS}
    for row in rows:
        row.ratio = over(row.kl, reference[row.setting])
    return rows


def fill(row: Row, bench: Bench, method: Method, setting: Setting) -> None:
    """Compress and measure."""
    output = bench.work / "output"
    try:
        row.seconds, row.peak_rss_mib = bench.compress(method, setting, output)
        found = bench.measure(method, output)
        row.kl, row.top1 = found["kl"], found["top1"]
        row.perplexity, row.dense_perplexity = found["perplexity"], found["dense_perplexity"]
    except RunError as error:
        row.error = str(error)
    clear(bench.work)


def run_speed(bench: Bench, repeats: int) -> list[SpeedRow]:
    """A row for every method and setting; the methods take turns."""
    methods = bench.methods((GPTQ_METHOD, RECOMPUTED_METHOD, *PEER_GPTQ))
    rows = {(s, m): SpeedRow(m.label, s.name) for s in bench.settings for m in methods}
    for setting, method, progress in progressing(bench, methods, repeats):
        row = rows[setting, method]
        if not method.per_row and setting.group_size < 0:
            row.error = "n/a: it refuses one scale per row"
        if row.error is None:
            try:
                row.add(*bench.compress(method, setting, bench.work / "output"))
            except RunError as error:
                row.error = str(error)
            clear(bench.work)
        progress(row.summary())
    for (setting, _), row in rows.items():
        row.ratio = over(rows[setting, GPTQ_METHOD].seconds, row.seconds)
        row.ratio_recomputed = over(rows[setting, RECOMPUTED_METHOD].seconds, row.seconds)
    return list(rows.values())


def progressing(
    bench: Bench, methods: Sequence[Method], repeats: int = 1
) -> Iterator[tuple[Setting, Method, Callable[[str], None]]]:
    """Every run to be made, with what ends its line on stderr."""
    total = len(bench.settings) * repeats * len(methods)
    runs = ((setting, method) for setting in bench.settings for _ in range(repeats) for method in methods)
    for number, (setting, method) in enumerate(runs, 1):
        print(f"[{number}/{total}] {setting.name} {method.label}: ", end="", file=sys.stderr, flush=True)
        yield setting, method, lambda summary: print(summary, file=sys.stderr, flush=True)


def clear(work: Path) -> None:
    """Remove what a run left."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)


def over(numerator: float | None, denominator: float | None) -> float | None:
    """A ratio, if there is one."""
    return numerator / denominator if numerator is not None and denominator else None


def show(columns: dict[str, Callable[[Any], str]], rows: Sequence[Row | SpeedRow], title: str) -> None:
    """The table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    failed = any(row.error for row in rows)
    for column in (*columns, *(["error"] if failed else [])):
        left = column in ("method", "setting", "error")
        table.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=column in columns)
    for index, row in enumerate(rows):
        cells = [*(cell(row) for cell in columns.values()), *([row.error or ""] if failed else [])]
        last = index + 1 == len(rows) or rows[index + 1].setting != row.setting
        table.add_row(*map(Text, cells), end_section=last)
    terminal = sys.stdout.isatty()
    Console(no_color=not terminal, highlight=False, width=None if terminal else PLAIN_WIDTH).print(table)


def number(value: float | None, form: str) -> str:
    """A cell."""
    return "-" if value is None else format(value, form)


QUALITY_COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.method,
    "setting": lambda row: row.setting,
    "KL": lambda row: number(row.kl, ".5f"),
    "ratio to hfcompress": lambda row: number(row.ratio, ".2f"),
    "perplexity": lambda row: number(row.perplexity, ".3f"),
    "top-1": lambda row: number(row.top1, ".3f"),
    "seconds": lambda row: number(row.seconds, ".1f"),
    "peak RSS MiB": lambda row: number(row.peak_rss_mib, ""),
}
SPEED_COLUMNS: dict[str, Callable[[SpeedRow], str]] = {
    "method": lambda row: row.method,
    "setting": lambda row: row.setting,
    "median s": lambda row: number(row.seconds, ".1f"),
    "min-max s": lambda row: "-" if not row.runs else f"{row.fastest:.1f}-{row.slowest:.1f}",
    "hfcompress / it": lambda row: number(row.ratio, ".2f"),
    "recomputed / it": lambda row: number(row.ratio_recomputed, ".2f"),
    "peak RSS MiB": lambda row: number(row.peak_rss_mib, ""),
}


def worker(
    recipe: str, model: str, calibration: str, output: str, bits: str, group_size: str, memory_limit: str | None = None
) -> dict[str, float]:
    """hfcompress, run as its peers are."""
    import hfcompress

    step = {"gptq": hfcompress.GPTQ, "rtn": hfcompress.RTN}[recipe](bits=int(bits), group_size=int(group_size))
    result = hfcompress.compress(
        model,
        step,
        output,
        calibration=calibration,
        device="cpu",
        memory_limit=None if memory_limit is None else int(memory_limit),
        overwrite=True,
        evaluate=False,
    )
    phases = result.manifest["phases"]
    seconds = sum(phases[name]["seconds"] for name in ("prepare", "compress", "write"))
    return {"seconds": round(seconds, 3), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def measure(candidate: str, dense: str, tokens: str) -> dict[str, float]:
    """Both folders loaded by plain transformers; KL(dense || candidate) in nats over every predicted position."""
    import math

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(np.load(tokens).astype(np.int64))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (candidate, dense)
    )
    nll = dense_nll = kl = 0.0
    agree = count = 0
    with torch.no_grad():
        for batch in ids.split(max(1, MEASURED_AT_ONCE // ids.shape[1])):
            targets = batch[:, 1:, None]
            p, q = (m(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1) for m in (theirs, ours))
            dense_nll -= p.gather(-1, targets).double().sum().item()
            nll -= q.gather(-1, targets).double().sum().item()
            kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += targets.numel()
    perplexities = {"perplexity": math.exp(nll / count), "dense_perplexity": math.exp(dense_nll / count)}
    return {**perplexities, "kl": kl / count, "top1": agree / count, "tokens": count}


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    import torch

    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE) for _ in range(2))
    seconds = []
    for _ in range(GEMM_REPEATS + 1):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "fp32_gemm_gflops": round(2 * GEMM_SIZE**3 / min(seconds[1:]) / 1e9, 1),
        "system": platform.system(),
    }


def cpu_model() -> str:
    """The name that the CPU gives itself."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str | None]:
    """Of the packages in this interpreter's environment."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


WORKERS: dict[str, Callable[..., dict]] = {f.__name__: f for f in (worker, measure, machine, versions)}


def peer_versions(bench: Bench) -> dict[str, dict]:
    """As the peers' interpreters tell them."""
    found = {}
    for peer, python in bench.interpreters.items():
        try:
            found[peer] = run([python, THIS_FILE, "versions", PEERS[peer], "torch", "transformers"], bench.work, False)
        except RunError as error:
            found[peer] = {"error": str(error)}
    return found


def report(bench: Bench, options: argparse.Namespace, rows: Sequence[Row | SpeedRow]) -> dict[str, Any]:
    """The JSON: what was measured, on what, by what."""
    told = {name: plain(value) for name, value in vars(options).items() if name not in ("command", "output")}
    return {
        "command": options.command,
        "options": told,
        "data": {
            "model": bench.model.name,
            "calibration": described(bench.calibration),
            "evaluation": described(bench.evaluation),
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": run([sys.executable, THIS_FILE, "machine"], bench.work, True),
        "versions": versions("hfcompress", "torch", "transformers"),
        "peers": peer_versions(bench),
        "rows": [asdict(row) for row in rows],
    }


def plain(value: Any) -> Any:
    """An option without the machine's folders."""
    return value.name if isinstance(value, Path) else value


def described(tokens: Path) -> dict[str, Any]:
    """A token file by its name and shape."""
    rows, seq_len = load(tokens).shape
    return {"name": tokens.name, "rows": rows, "seq_len": seq_len}


def load(path: Path):
    """
    Token ids `(rows, seq_len)`.

    Raises:
        UsageError: there are none.
    """
    import numpy as np

    if not path.is_file():
        raise UsageError(f"There is no file {path}; give --calibration and --evaluation.")
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"{path} is no array of token ids.") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise UsageError(f"{path} must hold integers (rows, seq_len), not {array.dtype} {array.shape}.")
    return array


def cut(path: Path, rows: int | None, folder: Path) -> Path:
    """The token file, or the first `rows` rows of it in one of the same name in a new folder."""
    import numpy as np

    array = load(path)
    if rows is None:
        return path
    folder.mkdir()
    np.save(folder / path.name, array[:rows])
    return folder / path.name


def prepare(options: argparse.Namespace, folder: Path) -> Bench:
    """
    What the runs need, in a temporary folder.

    Raises:
        UsageError: an option is missing, or names nothing.
    """
    settings = tuple(map(Setting.parse, options.settings.split(",")))
    interpreters = {peer: getattr(options, peer).absolute() for peer in PEERS if getattr(options, peer) is not None}
    scripts = check_peers(interpreters, options.peer_scripts)
    model = options.model.absolute() if options.model is not None else bundled_model()
    if not model.is_dir():
        raise UsageError(f"There is no folder {model}; --model must be one.")
    calibration = (options.calibration or model / "calibration.npy").absolute()
    evaluation = (options.evaluation or model / "evaluation.npy").absolute()
    work = folder / "work"
    work.mkdir()
    return Bench(
        model=model,
        calibration=cut(calibration, options.rows, folder / "calibration"),
        evaluation=cut(evaluation, options.rows, folder / "evaluation"),
        settings=settings,
        interpreters=interpreters,
        scripts=scripts,
        work=work,
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


def parser() -> argparse.ArgumentParser:
    """The two commands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled tiny model")
    common.add_argument("--calibration", type=Path, metavar="FILE.npy", help="default: DIR/calibration.npy")
    common.add_argument("--evaluation", type=Path, metavar="FILE.npy", help="default: DIR/evaluation.npy")
    common.add_argument("--settings", default="w4g128,w3g128,w4channel", help="default: %(default)s")
    common.add_argument("--rows", type=positive, metavar="N", help="only the first N rows of the token files")
    common.add_argument("--output", type=Path, metavar="FILE.json", help="default: benchmark_results/COMMAND.json")
    common.add_argument("--peer-scripts", type=Path, metavar="DIR", help="the folder with the peers' run scripts")
    for peer, package in PEERS.items():
        common.add_argument(f"--{peer}", type=Path, metavar="PYTHON", help=f"an interpreter that has {package}")
    top = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("quality", parents=[common], help="what is lost")
    speed = commands.add_parser("speed", parents=[common], help="how long it takes")
    speed.add_argument("--repeats", type=positive, default=3, help="default: %(default)s")
    return top


def positive(text: str) -> int:
    """A whole number from one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def benchmark(options: argparse.Namespace) -> int:
    """One command, in a temporary folder."""
    output = (options.output or RESULTS / f"{options.command}.json").absolute()
    with tempfile.TemporaryDirectory(prefix="hfcompress-benchmark-", ignore_cleanup_errors=True) as folder:
        bench = prepare(options, Path(folder))
        title = f"{bench.model.name}: "
        if options.command == "quality":
            rows = run_quality(bench)
            dense = next((row.dense_perplexity for row in rows if row.dense_perplexity is not None), None)
            show(QUALITY_COLUMNS, rows, f"{title}perplexity {number(dense, '.3f')} before compression")
        else:
            rows = run_speed(bench, options.repeats)
            show(SPEED_COLUMNS, rows, f"{title}{options.repeats} runs each, in turn")
        found = report(bench, options, rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2) + "\n")
    return FAILED if any(row.error for row in rows if row.method.startswith("hfcompress")) else OK


def main(arguments: list[str]) -> int:
    """A command, or one of the workers that the runs are made of."""
    if arguments and arguments[0] in WORKERS:
        print(json.dumps(WORKERS[arguments[0]](*arguments[1:])))
        return OK
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run and its folder go too
    try:
        return benchmark(parser().parse_args(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
