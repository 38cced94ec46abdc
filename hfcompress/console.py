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
"""What a person sees: one progress bar, tables, one-sentence errors."""

import contextlib
import math
import sys
from collections.abc import Generator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hfcompress.evaluation.limits import by_reason, several
from hfcompress.evaluation.numbers import size
from hfcompress.models.manifest import MANIFEST
from hfcompress.tables import budget_tables, plus_or_minus, report_tables, table


PLAIN_WIDTH = 120  # where there is no terminal


def _console(stream) -> Console:
    terminal = stream.isatty()
    width = None if terminal else PLAIN_WIDTH
    return Console(file=stream, no_color=not terminal, highlight=False, markup=False, width=width)


class Bar:
    """The progress bar of a run; see [`hfcompress.progress.Progress`]."""

    def __init__(self, label: str):
        self.console = _console(sys.stderr)
        columns = ("{task.fields[label]}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(
            *columns,
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("reading", label=label, total=None)

    def start(self, total: int) -> None:
        """There will be `total` units in all."""
        self.bar.update(self.task, total=total)

    def step(self, description: str, amount: int = 1) -> None:
        """`amount` more units are done."""
        self.bar.update(self.task, advance=amount, description=description)

    def note(self, message: str) -> None:
        """A line above the bar."""
        self.console.print(f"note: {message}", soft_wrap=True)


@contextlib.contextmanager
def progress(label: str) -> Generator[Bar]:
    """One bar over a whole command."""
    bar = Bar(label)
    with bar.bar:
        yield bar


def error(message: str) -> None:
    """One sentence on stderr."""
    _console(sys.stderr).print(f"error: {message}", soft_wrap=True)


def show_run(result) -> None:
    """The result of `hfcompress run`."""
    out = _console(sys.stdout)
    manifest = result.manifest
    rows = manifest["linears"]
    seconds = sum(phase["seconds"] for phase in manifest["phases"].values())
    for shown in budget_tables(manifest["budget"]) if manifest.get("budget") else ():
        out.print(shown)
    if result.report is not None:
        show_report(result.report)
    measured = [row for row in rows if row["relative_output_error"] is not None]
    kind = "output" if measured else "weight"
    worst = max(measured or rows, key=lambda row: row[f"relative_{kind}_error"])
    value = worst[f"relative_{kind}_error"]
    coverage = manifest["coverage"]
    out.print(
        f"{coverage['compressed']} of {coverage['linears']} linears compressed, {manifest['fallbacks']} by a fallback, "
        f"in {seconds:.1f} s; largest relative {kind} error {value:.3f} ({worst['name']})",
        soft_wrap=True,
    )
    if experts := manifest.get("experts"):
        out.print(
            f"{experts['count']} experts, each solved on {experts['fewest']:,} to {experts['most']:,} tokens that were sent to it "
            f"(median {experts['median']:,}); to {experts['few']} came fewer than their linears have inputs, to "
            f"{experts['unseen']} none",
            soft_wrap=True,
        )
    if pairs := manifest.get("folds"):
        scaled = sum(pair["left_alone"] is None for pair in pairs)
        out.print(
            f"{scaled} of {len(pairs)} pairs of a producer and its readers scaled before rounding; {MANIFEST} names each",
            soft_wrap=True,
        )
    for names, reason in by_reason(manifest["skipped"]):
        out.print(f"left alone: {several(names).rstrip(',')}, {reason}", soft_wrap=True)
    if "profile" in manifest:
        _show_profile(out, manifest["profile"], manifest["phases"]["compress"]["seconds"])
    if "gguf" in manifest:
        _show_gguf(out, manifest["gguf"])
    out.print(f"written to {result.output_dir}", soft_wrap=True)
    out.print(f"report: {result.page}", soft_wrap=True)


def say_at_once(text: str) -> None:
    """A piece of what a model says, on stdout."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_generated(tokens: int, seconds: float) -> None:
    """What it took to say so many tokens, on stderr, so that stdout holds the text alone."""
    say_at_once("\n")
    said = "1 token" if tokens == 1 else f"{tokens} tokens"
    _console(sys.stderr).print(
        f"{said} in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.1f} a second", soft_wrap=True
    )


def _show_profile(out: Console, profile: dict[str, Any], seconds: float) -> None:
    shown = table("where the time went", "part", "seconds", "share", "GFLOP", "seconds at the machine's rate")
    parts = profile["parts"]
    for name, part in sorted(parts.items(), key=lambda item: -item[1]["seconds"]):
        counted = part["gflop"] > 0
        floor = [f"{part['gflop']:,.1f}", f"{part['floor_seconds']:.2f}"] if counted else ["", ""]
        shown.add_row(name, f"{part['seconds']:.2f}", f"{part['seconds'] / seconds:.0%}", *floor)
    rest = max(0.0, seconds - sum(part["seconds"] for part in parts.values()))
    shown.add_row("all else", f"{rest:.2f}", f"{rest / seconds:.0%}", "", "")
    out.print(shown)
    out.print(f"the machine's rate, of a large float32 product: {profile['gemm_gflops']:.0f} GFLOP/s", soft_wrap=True)


def show_plan(plan) -> None:
    """What `hfcompress plan` has found."""
    out = _console(sys.stdout)
    shown = table("forecast", "phase", "peak memory")
    for name, amount in plan.memory.items():
        shown.add_row(name, size(amount))
    out.print(shown)
    share = plan.output_bytes / plan.baseline_bytes
    out.print(f"weights: {size(plan.output_bytes)}, {share:.3f} of {size(plan.baseline_bytes)}", soft_wrap=True)
    course = plan.course
    forwards = "halted and gone on with" if course.suspended else "run again for every group of linears"
    where = "on disk" if course.spilled else "in memory"
    if plan.tokens:
        out.print(
            f"way: {plan.tokens} calibration tokens, {course.rows} rows at a time, forwards {forwards}, hidden states {where}",
            soft_wrap=True,
        )
    out.print(
        f"memory: {size(plan.peak_memory)} at the most; the least that would do is --memory-limit "
        f"{math.ceil(plan.least_memory / 1e7) / 100:.2f}GB",
        soft_wrap=True,
    )
    if plan.seconds is not None:
        out.print(
            f"time: about {_duration(plan.seconds)} for {plan.blocks} blocks, measuring not counted", soft_wrap=True
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _show_gguf(out: Console, written: dict[str, Any]) -> None:
    types = "; ".join(f"{kind} {', '.join(types)}" for kind, types in written["types"].items())
    exact = "the same values" if written["exact"] else f"{len(written['inexact'])} tensors rounded"
    out.print(f"beside: {written['file']}, {size(written['bytes'])}, {exact} ({types})", soft_wrap=True)
    for note in written["notes"]:
        out.print(f"note: {note}", soft_wrap=True)


def show_report(report: dict[str, Any]) -> None:
    """The tables of `hfcompress eval`."""
    out = _console(sys.stdout)
    for shown in report_tables(report):
        out.print(shown)
    if report.get("score"):
        parts = ", ".join(f"{name} {value:.3f}" for name, value in report["score"]["parts"].items())
        out.print(f"score {report['score']['value']:.4f} (the original is 1; {parts})", soft_wrap=True)


def show_comparison(rows: list[dict[str, Any]], plot: Any) -> None:
    """The table of `hfcompress compare`."""
    shown = table("size against divergence", "model", "size", "of the original", "KL (nats)", "perplexity", "front")
    for row in rows:
        divergence = f"{row['kl_mean']:.5f}{plus_or_minus(row['kl_mean_stderr'], 5)}"
        share = f"{row['size_bytes'] / row['baseline_size_bytes']:.1%}"
        front = "yes" if row["on_front"] else ""
        shown.add_row(row["name"], size(row["size_bytes"]), share, divergence, f"{row['perplexity']:.4f}", front)
    out = _console(sys.stdout)
    out.print(shown)
    out.print(f"original: {size(rows[0]['baseline_size_bytes'])}, perplexity {rows[0]['baseline_perplexity']:.4f}")
    out.print(f"plot: {plot}", soft_wrap=True)


def show_verification(found: Any) -> None:
    """What `hfcompress run --verify` has found."""
    out = _console(sys.stdout)
    if found.identical:
        out.print(f"identical: all {found.tensors} tensors are the original's, bit for bit")
    else:
        out.print(
            f"not identical: {len(found.differing)} of {found.tensors} tensors differ, first {found.differing[0]}",
            soft_wrap=True,
        )
    for difference in found.circumstances:
        out.print(f"different from the original: {difference}", soft_wrap=True)


def show_export(exported: Any) -> None:
    """The result of `hfcompress export`."""
    out = _console(sys.stdout)
    made = exported.made
    if made["lossless"]:
        lost = "the same values, bit for bit"
    else:
        lost = f"values of {made['linears_changed']} linears changed"
        if "relative_weight_error" in made:
            lost += f", relative weight error {made['relative_weight_error']:.3g}"
        if "cosine_mean" in made:
            lost += f", cosine to the source {made['cosine_mean']:.5f}"
        if "kl_mean" in made:
            lost += f", KL to the source {made['kl_mean']:.3g} nats per token"
    out.print(f"{made['source_format']} to {made['format']}: {lost}", soft_wrap=True)
    for note in made.get("gguf", {}).get("notes", []):
        out.print(note, soft_wrap=True)
    out.print(f"written to {exported.output_dir}", soft_wrap=True)


def show_push(pushed: Any) -> None:
    """Where a push has gone."""
    _console(sys.stdout).print(f"pushed to {pushed.url} (commit {pushed.commit})", soft_wrap=True)


def show_inspection(found: dict[str, Any]) -> None:
    """The table of `hfcompress inspect`."""
    table = Table(title=f"{found['model']}, {size(found['size_bytes'])}", title_justify="left")
    for column in ("linear", "method", "bits", "group", "sparsity", "bytes", "rel. error"):
        table.add_column(column, justify="left" if column in ("linear", "method") else "right", overflow="fold")
    for row in found["linears"]:
        sparsity = "" if row["sparsity"] is None else f"{row['sparsity']:.1%}"
        group = {None: "", -1: "row"}.get(row["group_size"], str(row["group_size"]))
        error_ = "" if row["relative_output_error"] is None else f"{row['relative_output_error']:.4f}"
        table.add_row(
            row["name"],
            row["method"],
            f"{row['bits']:g}" if row["bits"] else "",
            group,
            sparsity,
            f"{row['bytes']:,}",
            error_,
        )
    _console(sys.stdout).print(table)


def show_recipes(recipes: dict[str, str]) -> None:
    """The list of `hfcompress recipes`: a line each."""
    width = max(map(len, recipes))
    for name, description in recipes.items():
        print(f"{name:<{width}}  {description}")
