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
"""The commands: parse, call, print. Results go to stdout, progress and messages to stderr."""

import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from hfcompress.errors import (
    HfcompressError,
    InterruptedPushError,
    InvalidValueError,
    LostProcessError,
    RefusedError,
)
from hfcompress.sizes import parse_size


OK, FAILED, USER_ERROR, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = {
    RefusedError: REFUSED,
    InterruptedPushError: INTERRUPTED,
    LostProcessError: INTERRUPTED,
}  # of an error that is told in a sentence

app = typer.Typer(
    help="Make Hugging Face models smaller: run a recipe, get a checkpoint that loads with plain from_pretrained, "
    "with what it cost measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str | None,
    typer.Option("--model", help="A folder or a Hub id (id@revision).", show_default="the bundled tiny model"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32.", show_default="float32 on a CPU, the checkpoint's on a GPU"),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run modelling code that the repo carries.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Rows of data.", show_default="the recipe's")]
Measure = Annotated[
    str | None,
    typer.Option(
        help="What to measure: quality, tasks, speed, memory, energy, robustness, stability, explain, with commas "
        "between; or all.",
        show_default="the recipe's, or quality",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="lm-eval tasks, with commas between: names, paths of YAML files, or the bundled continuation and continuation_generated."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents per task.", show_default="all")]
TeacherCache = Annotated[
    Path | None,
    typer.Option(help="Keep the original's log-probabilities in this folder, to be computed once for any candidates."),
]
Private = Annotated[bool, typer.Option("--private", help="Create the repo private.")]
SeqLen = Annotated[int | None, typer.Option(min=2, help="Tokens per row.", show_default="the recipe's")]


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe, a YAML file, or a folder or Hub id of what hfcompress made.")
    ],
    model: Model = None,
    output: Annotated[Path | None, typer.Option(help="The folder to make.", show_default="./MODELNAME-RECIPE")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="bundled, a data set on the Hub (id[:config[:split[:column]]]), a .txt, .jsonl or .parquet, an .npy of "
            "token ids, or for a model that hears a folder of .wav files.",
            show_default="the recipe's",
        ),
    ] = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Annotated[int | None, typer.Option(help="Which rows are taken.", show_default="the recipe's")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Such as 8GB: the most memory that this process may have while it compresses; see plan.",
            show_default="half of what is free for halted forwards",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: gptq.bits=3, calibration.seed=1, format=dense.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time of the compression went.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    eval_: Annotated[bool, typer.Option("--eval/--no-eval", help="Measure the result.")] = True,
    eval_data: Annotated[
        str | None,
        typer.Option(help="What to measure on, in the terms of --calibration.", show_default="the recipe's"),
    ] = None,
    measure: Measure = None,
    tasks: Tasks = None,
    limit: Limit = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="RECIPE is a checkpoint: say whether every tensor came out the same.")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Push the result to this repo (user/name).")] = None,
    private: Private = False,
    trust_remote_code: RemoteCode = False,
    json_file: JsonFile = None,
) -> int:
    """Compress a model by a recipe, write it to a folder, and measure what was lost."""
    from hfcompress import console
    from hfcompress.compression import compress
    from hfcompress.models.manifest import EXPORTS, read_manifest
    from hfcompress.recipes import load_job, with_changes

    job = with_changes(load_job(recipe), set_ or [])
    _check_json(json_file)
    if verify and job.origin is None:
        raise InvalidValueError(f"--verify needs a checkpoint to compare with, and {recipe} is a recipe alone.")
    if verify and read_manifest(job.origin).get(EXPORTS):
        raise InvalidValueError(
            f"{recipe} was exported to another format since it was compressed, so its recipe gives other tensors; "
            "leave out --verify."
        )
    if push_to_hub is not None:
        from hfcompress.hub.push import check_repo_id, require_login

        check_repo_id(push_to_hub)
        require_login(push_to_hub)
    with console.progress("compressing") as progress:
        result = compress(
            model,
            job,
            output,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            memory_limit=None if memory_limit is None else parse_size(memory_limit),
            profile=profile,
            resume=resume,
            overwrite=overwrite,
            evaluate=eval_,
            eval_data=eval_data,
            measure=_listed(measure),
            tasks=_listed(tasks),
            limit=limit,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not result.manifest:
        return OK  # a process that does not write
    _write_json(json_file, {"output": str(result.output_dir), "manifest": result.manifest, "report": result.report})
    console.show_run(result)
    verified = OK if not verify else _verify(recipe, result.output_dir)
    if result.refusals:
        for refusal in result.refusals:
            console.error(f"The gate refuses this result: {refusal}.")
        return REFUSED
    if verified == OK and push_to_hub is not None:
        _push(result.output_dir, push_to_hub, private=private, trust_remote_code=trust_remote_code)
    return verified


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="As for run.")],
    model: Model = None,
    calibration: Annotated[
        str | None, typer.Option(help="As for run.", show_default="the recipe's, or bundled")
    ] = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Annotated[int | None, typer.Option(help="Which rows are taken.", show_default="the recipe's")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Such as 8GB: how the run would stay below it.", show_default="none")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a key, as for run.")] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Solve one block, to tell the time.")] = True,
    trust_remote_code: RemoteCode = False,
    json_file: JsonFile = None,
) -> int:
    """Forecast what a run will take: bytes, memory by phase, and time; writes nothing."""
    from hfcompress import console
    from hfcompress.planning import plan as make_plan
    from hfcompress.recipes import load_job, with_changes

    job = with_changes(load_job(recipe), set_ or [])
    _check_json(json_file)
    with console.progress("planning") as progress:
        found = make_plan(
            model,
            job,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            memory_limit=None if memory_limit is None else parse_size(memory_limit),
            probe=probe,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _write_json(json_file, found.to_dict())
    console.show_plan(found)
    return OK


def _verify(recipe: str, again: Path) -> int:
    from hfcompress import console
    from hfcompress.models.locate import locate
    from hfcompress.reproduction import verify

    found = verify(again, locate(recipe)[0])
    console.show_verification(found)
    return OK if found.identical else REFUSED


def _push(folder: Path, repo_id: str, **options: Any) -> None:
    from hfcompress import console
    from hfcompress.publishing import push

    try:
        with console.progress("pushing") as progress:
            pushed = push(folder, repo_id, progress=progress, **options)
    except KeyboardInterrupt as error:
        raise InterruptedPushError(
            f"Interrupted; {folder} is complete, and `hfcompress push {folder} {repo_id}` goes on."
        ) from error
    console.show_push(pushed)


@app.command(name="eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="A folder or a Hub id (id@revision).")],
    baseline: Annotated[
        str | None,
        typer.Option(help="What it was made from.", show_default="the base its manifest names"),
    ] = None,
    data: Annotated[str, typer.Option(help="What to measure on, in the terms of run --calibration.")] = "bundled",
    samples: Samples = None,
    seq_len: SeqLen = None,
    device: Device = "auto",
    dtype: Dtype = None,
    measure: Measure = None,
    tasks: Tasks = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    teacher_cache: TeacherCache = None,
    save: Annotated[
        bool, typer.Option("--save", help="Put the results into the folder, and draw its plots, page and card anew.")
    ] = False,
    trust_remote_code: RemoteCode = False,
    json_file: JsonFile = None,
) -> int:
    """Measure a checkpoint against the one that it was made from."""
    from hfcompress import console
    from hfcompress.measuring import evaluate

    _check_json(json_file)
    with console.progress("evaluating") as progress:
        report = evaluate(
            model,
            baseline,
            data,
            samples=samples,
            seq_len=seq_len,
            measurements=_listed(measure),
            tasks=_listed(tasks) or (),
            limit=limit,
            seed=seed,
            device=device,
            dtype=dtype,
            teacher_cache=teacher_cache,
            save=save,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _write_json(json_file, report)
    console.show_report(report)
    return OK


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of candidates for one original.")],
    baseline: Annotated[
        str | None,
        typer.Option(help="What they were made from.", show_default="the base that the first one's manifest names"),
    ] = None,
    data: Annotated[str, typer.Option(help="What to measure on, in the terms of run --calibration.")] = "bundled",
    samples: Samples = None,
    seq_len: SeqLen = None,
    device: Device = "auto",
    dtype: Dtype = None,
    teacher_cache: TeacherCache = None,
    plot: Annotated[Path, typer.Option(help="The picture to draw.")] = Path("comparison.png"),
    trust_remote_code: RemoteCode = False,
    json_file: JsonFile = None,
) -> int:
    """Compare several results: the table and the plot of size against divergence."""
    from hfcompress import console
    from hfcompress.evaluation import plots
    from hfcompress.measuring import compare as compare_models

    _check_json(json_file)
    _check_json(plot, "--plot")
    with console.progress("comparing") as progress:
        rows = compare_models(
            models,
            baseline,
            data,
            samples=samples,
            seq_len=seq_len,
            device=device,
            dtype=dtype,
            teacher_cache=teacher_cache,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        plots.pareto(rows, plot)
    _write_json(json_file, {"candidates": rows})
    console.show_comparison(rows, plot)
    return OK


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A folder or a Hub id (id@revision) of a compressed checkpoint.")],
    format_: Annotated[
        str, typer.Option("--format", help="gptq, gptq_v2, awq, compressed-tensors, int-quantized, gguf, dense.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The folder to make; for gguf one with the file in it, or the file itself if it ends in .gguf.",
            show_default="./MODELNAME-FORMAT",
        ),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Allow values to change, and measure how much is lost (not of gguf).")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of dense weights: bfloat16, float16 or float32.", show_default="the checkpoint's"),
    ] = None,
    eval_: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Measure the divergence of a lossy export from its source.")
    ] = True,
    eval_data: Annotated[str, typer.Option(help="What to measure on, in the terms of run --calibration.")] = "bundled",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    trust_remote_code: RemoteCode = False,
    json_file: JsonFile = None,
) -> int:
    """Write a compressed checkpoint in another format."""
    from hfcompress import console
    from hfcompress.exporting import export as export_model

    _check_json(json_file)
    with console.progress("exporting") as progress:
        exported = export_model(
            model,
            format_,
            output,
            lossy=lossy,
            dtype=dtype,
            evaluate=eval_,
            data=eval_data,
            overwrite=overwrite,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _write_json(json_file, {"output": str(exported.output_dir), **exported.made})
    console.show_export(exported)
    return OK


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What hfcompress run made.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: user/name.")],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="A branch.", show_default="main")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Check a result (it reloads, its gate lets it pass) and push it to the Hub with its card."""
    _push(folder, repo_id, private=private, revision=revision, message=message, trust_remote_code=trust_remote_code)
    return OK


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A folder or a Hub id (id@revision).")],
    prompt: Annotated[
        str, typer.Argument(help="What it is to go on with, or to answer where it has a chat template.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, where the temperature is above 0.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Leave the chat template out.")] = False,
    device: Device = "auto",
    dtype: Dtype = None,
    trust_remote_code: RemoteCode = False,
) -> int:
    """Let a checkpoint talk, so that one sees that it still can."""
    from hfcompress import console
    from hfcompress.generating import generate as generate_text

    found = generate_text(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        plain=plain,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        say=console.say_at_once,
    )
    console.show_generated(found.tokens, found.seconds)
    return OK


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A folder or a Hub id (id@revision).")],
    trust_remote_code: RemoteCode = False,
    json_file: JsonFile = None,
) -> int:
    """Show what is in a checkpoint: a row per linear."""
    from hfcompress import console
    from hfcompress.evaluation.inspection import inspect_checkpoint
    from hfcompress.formats.dense_view import dense_view
    from hfcompress.models.checkpoint import Checkpoint

    _check_json(json_file)
    found = inspect_checkpoint(Checkpoint.open(model, None, trust_remote_code, dense_view))
    _write_json(json_file, found)
    console.show_inspection(found)
    return OK


@app.command()
def recipes() -> int:
    """List the recipes that can be run."""
    from hfcompress import console
    from hfcompress.recipes import shipped_recipes

    console.show_recipes(shipped_recipes())
    return OK


def main() -> None:
    """The console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_recipe(recipe: str) -> None:
    """What a script in `recipes/` does: `hfcompress run RECIPE` with the script's own arguments."""
    sys.exit(run_command(["run", recipe, *sys.argv[1:]]))


def run_command(arguments: list[str]) -> int:
    """Do what the console script does with these arguments, and return its exit code."""
    return _guarded(app, arguments)


def _guarded(command: typer.Typer, arguments: list[str]) -> int:
    """Run a command; every error becomes a sentence and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # large pages for torch's tensors on a CPU: fewer of them to clear
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars beside the one that is ours; read on import
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from hfcompress import console
    from hfcompress.quiet import quiet_libraries

    quiet_libraries()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends is Ctrl-C too
    try:
        code = command(arguments, standalone_mode=False) or OK
    except HfcompressError as error:
        console.error(str(error))
        return EXIT_CODES.get(type(error), USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.Exit as stopped:
        code = stopped.exit_code
    except Exception as error:  # noqa: BLE001 (the last resort: a log instead of a traceback)
        complaint = getattr(error, "format_message", None)  # typer's own complaints about options have it
        if callable(complaint):
            console.error(f"{complaint()} See hfcompress --help.")
            return USER_ERROR
        log = Path(tempfile.gettempdir()) / f"hfcompress-{os.getpid()}.log"
        log.write_text(traceback.format_exc())
        console.error(f"Something went wrong that should not ({type(error).__name__}: {error}); the log is {log}.")
        return FAILED
    if code == INTERRUPTED:
        resumable = arguments[:1] == ["run"]
        how = "; --resume (in place of --overwrite) goes on from the last finished block" if resumable else ""
        console.error(f"Interrupted{how}.")
    return code


def _listed(text: str | None) -> list[str] | None:
    """The words of an option with commas between."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _check_json(path: Path | None, option: str = "--json") -> None:
    """Before the work: a file that cannot be written is told at once."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InvalidValueError(f"{option} {path} cannot be written: it is a folder, or its folder does not exist.")


def _write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        from hfcompress.formats.writer import disk_errors, json_text

        with disk_errors(path):
            path.write_text(json_text(value))


if __name__ == "__main__":
    main()
