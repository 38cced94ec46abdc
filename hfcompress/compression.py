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
"""compress(): the main road, from a model and a recipe to a measured folder."""

import dataclasses
import datetime
import json
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from hfcompress.budgeting.choices import Choices
from hfcompress.budgeting.settle import plan_of, settle
from hfcompress.calibration.overlap import sketch
from hfcompress.calibration.tokens import GIVEN, Tokens, load_tokens
from hfcompress.errors import HfcompressError, InvalidValueError, OutputError, UnsupportedModelError
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.measure import check, tasks_of, units
from hfcompress.evaluation.measure import measure as measure_all
from hfcompress.evaluation.report import Report
from hfcompress.evaluation.side_by_side import side_by_side
from hfcompress.formats import get_format
from hfcompress.formats.layout import Layout
from hfcompress.formats.writer import CheckpointWriter, check_output
from hfcompress.hub.base_card import base_card
from hfcompress.hub.description import PAGE, describe
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.devices import find_device, find_dtype
from hfcompress.models.locate import is_hub_id
from hfcompress.models.manifest import BUNDLED, FOLDER, HUB, MANIFEST, MEMORY, base_of, read_manifest
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.tiny import TINY_NAME, tiny_folder
from hfcompress.passes.block_pass import BlockPass
from hfcompress.passes.journal import Journal
from hfcompress.passes.plan import Plan, make_plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.rotate import RotationChoice
from hfcompress.passes.trial import trial_on
from hfcompress.progress import Progress, Silent
from hfcompress.recipes import Job, Recipe, Steps, load_job
from hfcompress.recipes.budget import find_budget
from hfcompress.recipes.job import RECOVERY


MICRO_BATCH_TOKENS = 4096
VERSIONS = ("hfcompress", "torch", "transformers", "accelerate", "compressed-tensors", "safetensors")


@dataclass
class Result:
    """
    Attributes:
        output_dir (`Path`): the compressed checkpoint.
        manifest (`dict`): what `hfcompress.json` holds.
        report (`Report` or `None`): what `eval_results.json` holds.
        refusals (`list[str]`): the bounds of the gate that were not kept.
    """

    output_dir: Path
    manifest: dict[str, Any]
    report: Report | None = None
    refusals: list[str] = field(default_factory=list)

    @property
    def page(self) -> Path:
        """The report as one page."""
        return self.output_dir / PAGE

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        trust_remote_code: bool = False,
    ):
        """
        Check the folder and push it; see [`hfcompress.publishing.push`].

        Raises:
            RefusedError: the gate or the reload check does not let it pass.
        """
        from hfcompress.publishing import push

        return push(
            self.output_dir,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            trust_remote_code=trust_remote_code,
        )


def compress(
    model: "str | Path | PreTrainedModel | None",
    recipe: "str | Job | Recipe | Steps",
    output_dir: str | Path | None = None,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    memory_limit: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    evaluate: bool = True,
    eval_data: Any = None,
    measure: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    limit: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Result:
    """
    Compress a model, write it to a folder, and measure what was lost.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `None`): a folder, a Hub id (`id` or `id@revision`), or a model in
            memory; `None` for the bundled tiny model.
        recipe (`str`, `Job`, `Recipe` or `Steps`): a shipped recipe's name, a YAML file, or a recipe object.
        output_dir (`str` or `Path`, *optional*): defaults to `./MODELNAME-RECIPE`.
        tokenizer (*optional*): the tokenizer of a model in memory; saved beside the weights.
        calibration (*optional*): overrides the recipe's data: a source, token ids `(rows, seq_len)`, or a mapping
            with `input_ids` and `attention_mask`.
        samples (`int`, *optional*): overrides the recipe's number of rows.
        seq_len (`int`, *optional*): overrides the recipe's row length.
        seed (`int`, *optional*): overrides the recipe's seed.
        device (`str`, *optional*, defaults to `"auto"`): `"cpu"`, `"cuda"`, `"cuda:1"`; `"auto"` takes a GPU if
            there is one.
        dtype (`str`, *optional*): of the arithmetic; defaults to float32 on a CPU and to the checkpoint's on a GPU.
        memory_limit (`int`, *optional*): bytes; under a tight limit forwards are run again instead of halted.
        resume (`bool`, *optional*): go on with an unfinished run.
        overwrite (`bool`, *optional*): replace what is at `output_dir`.
        evaluate (`bool`, *optional*, defaults to `True`): measure the result, reloaded from its folder.
        eval_data (*optional*): overrides what it is measured on.
        measure (`Iterable[str]`, *optional*): overrides what is measured: of
            [`hfcompress.evaluation.measure.MEASUREMENTS`], or `"all"`; quality always is.
        tasks (`Iterable[str]`, *optional*): overrides the lm-eval tasks, by name or by the path of a YAML file.
        limit (`int`, *optional*): overrides the number of documents per task.
        trust_remote_code (`bool`, *optional*): run modelling code that the repo carries.
        progress (`Progress`, *optional*): is told how far it is.

    Raises:
        HfcompressError: something the user can put right, in one sentence.
    """
    progress = progress or Silent()
    phases = Phases()
    job = _job(recipe, calibration, samples, seq_len, seed, eval_data, measure, tasks, limit)
    if not evaluate and (job.evaluation.gate or measure or tasks):
        asked = "The recipe has a gate" if job.evaluation.gate else "Measurements are asked for"
        raise InvalidValueError(f"{asked}, which needs the evaluation; leave out --no-eval, or leave out that.")
    _heed_dropped_tasks(job, progress)
    layout = get_format(job.format)
    original = read_manifest(job.origin)
    again = bool(original) and model is None
    if again:
        model = base_of(job.origin)
        dtype = dtype or original.get("dtype")
        samples, seq_len = _as_calibrated(original, job, calibration)
    checkpoint = Checkpoint.open(tiny_folder() if model is None else model, tokenizer, trust_remote_code)
    if checkpoint.folder == tiny_folder():
        checkpoint.name = TINY_NAME
    if checkpoint.quantization_config is not None:
        raise UnsupportedModelError(
            f"{checkpoint.name} is already quantized ({checkpoint.quantization_config.get('quant_method')}); "
            "give the original model."
        )
    output = Path(output_dir or f"{_short_name(checkpoint)}-{job.name}").expanduser().absolute()
    check_output(output, resume, overwrite, checkpoint.folder)
    if job.origin is not None and output.resolve() == job.origin.resolve():
        raise OutputError(f"{output} is the checkpoint whose recipe is run again; choose another --output.")
    processes = Processes(find_device(device))
    streamed = StreamedModel(checkpoint, processes.device, find_dtype(dtype, processes.device, checkpoint))
    rotation = RotationChoice(streamed, job.rotation, progress) if job.rotation is not None else None
    source = streamed if rotation is None else rotation.model
    choices = Choices(source, job.steps, layout) if find_budget(job.steps) else None
    plan = make_plan(source, job.steps, layout) if choices is None else choices.draft
    tokens = None
    if plan.needs_inputs or (rotation is not None and rotation.needs_trial):
        tokens = _calibration_tokens(job, checkpoint, plan, calibration, samples, seq_len, progress)
    if rotation is not None:
        streamed, settled = rotation.settle(job.steps, layout, tokens, processes, suspended=memory_limit is None)
        if choices is not None:  # a rotation that was not possible
            choices = Choices(streamed, job.steps, layout)
        plan = settled if choices is None else choices.draft
    quantization_config = _quantization_config(plan, layout)
    if quantization_config is not None:
        streamed.will_round_activations(quantization_config)
    if again and tokens is not None and tokens.sha256 != original["calibration"]["sha256"]:
        progress.note("the calibration data is not what the original was calibrated on, so neither will the result be")
    evaluation_tokens = _evaluation_tokens(job, checkpoint, eval_data, progress) if evaluate else None
    names, comparison = job.evaluation.measurements, None
    if evaluation_tokens is not None:
        comparison = Comparison(
            candidate=checkpoint,
            baseline=checkpoint,
            tokens=evaluation_tokens,
            device=processes.device,
            seed=job.calibration.seed,
            tasks=tasks_of(names, job.evaluation.tasks),
            limit=job.evaluation.limit,
            progress=progress,
        )
        check(comparison, names)
    phases.end("prepare")

    writer = CheckpointWriter(output)
    base = _described_base(checkpoint)
    journal = Journal(writer.partial / "journal.json", _fingerprint(job, base, tokens, streamed, processes, rotation))
    if overwrite and processes.writes:
        writer.discard()
    if resume:
        journal.resume()
    if processes.writes:
        writer.open()
    processes.wait()
    settling = 2 * len(streamed) if choices is not None and journal.budget is None else 0
    progress.start(len(streamed) + settling + (units(comparison, names) if comparison else 0))
    try:
        if choices is not None and tokens is not None:
            settled = journal.budget
            if settled is None:

                def run(plan: Plan, seen: Tokens, unseen: Tokens) -> float:
                    rows = (t.batch(slice(None)) for t in (seen, unseen))
                    return trial_on(streamed, plan, layout, *rows, checkpoint, processes, memory_limit is None)

                settled = settle(
                    choices, tokens, job.calibration.seed, processes, progress, _rows_at_once(tokens), run
                )
                journal.settle(settled, write=processes.writes)
                phases.end("budget")
            plan = plan_of(choices, settled)
            quantization_config = _quantization_config(plan, layout)
        results = _run_pass(streamed, plan, layout, writer, journal, processes, progress, tokens, memory_limit)
        phases.end("compress")
        processes.part()  # what loads models below must not wait for the others
        if not processes.writes:
            return Result(output, {})
        changes = {} if rotation is None else rotation.config_changes
        _write_companions(writer, checkpoint, layout, changes, quantization_config)
        beside = layout.write_beside(writer.result, output.name)
        made = Checkpoint.open(writer.result, trust_remote_code=trust_remote_code)
        made.name = output.name
        manifest = {
            "hfcompress": version("hfcompress"),
            "versions": _versions(),
            "recipe": job.to_dict(),
            "base": base,
            "calibration": _described(tokens, job),
            "seed": job.calibration.seed,
            **({} if rotation is None else {"rotation": rotation.manifest}),
            "linears": results,
            "kv_cache": plan.kv_cache,
            "skipped": plan.skipped,
            "folds": [pair for pairs in journal.folds.values() for pair in pairs],
            "coverage": _coverage(results, plan, made.config.get_text_config().tie_word_embeddings),
            **({} if plan.embeddings is None else {"embeddings": plan.embeddings.name}),
            "fallbacks": sum(1 for row in results if row["fallback"]),
            "witness": journal.witness,
            **({} if journal.budget is None else {"budget": journal.budget}),
            "sha256": made.sha256,
            **beside,
            "device": str(processes.device),
            "dtype": str(streamed.dtype).removeprefix("torch."),
            "processes": processes.count,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        writer.write_json(MANIFEST, manifest)  # the measurements read it
        phases.end("write")
        report = None
        if comparison is not None:
            report = measure_all(dataclasses.replace(comparison, candidate=made), names)
            if "stability" not in report and memory_limit is None:
                report["generations"] = side_by_side(dataclasses.replace(comparison, candidate=made))
            report["score"] = report.composite_score(job.evaluation.score)
            report.save(writer.result)
            phases.end("evaluate")
        manifest["phases"] = phases.ended
        writer.write_json(MANIFEST, manifest)
        progress.step("drawing", amount=0)
        describe(writer.result, output.name)
        writer.finish()
    except HfcompressError as error:
        if processes.writes and not (resume or writer.merged or isinstance(error, OutputError)):
            writer.discard()  # what would put the error right changes the run
        elif processes.writes and writer.merged and not isinstance(error, OutputError):
            raise type(error)(f"{error} The weights are done: put that right, and go on with --resume.") from error
        raise
    return Result(output, manifest, report, job.evaluation.refusals(report) if report else [])


class Phases:
    """Seconds and peak memory, phase by phase."""

    def __init__(self):
        self.ended: dict[str, dict[str, float]] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        """The phase `name` ends now, and the next begins."""
        now = time.perf_counter()
        self.ended[name] = {"seconds": round(now - self._since, 3), "peak_rss_bytes": peak_rss_bytes()}
        if torch.cuda.is_available():
            self.ended[name]["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        self._since = now


def peak_rss_bytes() -> int:
    """The most memory that this process has had so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _short_name(checkpoint: Checkpoint) -> str:
    """What the default output is called after."""
    if checkpoint.folder is not None and checkpoint.revision is None and checkpoint.name != TINY_NAME:
        return checkpoint.folder.name
    return Path(checkpoint.name.partition("@")[0]).name


def _job(recipe, calibration, samples, seq_len, seed, eval_data, measure, tasks, limit) -> Job:
    job = load_job(recipe) if isinstance(recipe, str) else Job.of(recipe)
    calibrated = {"data": _source(calibration), "samples": samples, "seq_len": seq_len, "seed": seed}
    evaluated = {
        "data": _source(eval_data),
        "measure": None if measure is None else tuple(measure),
        "tasks": None if tasks is None else tuple(tasks),
        "limit": limit,
    }
    return dataclasses.replace(
        job, calibration=_changed(job.calibration, calibrated), evaluation=_changed(job.evaluation, evaluated)
    )


def _source(data: Any) -> str | None:
    """What a recipe says of the data that it was given."""
    if data is None:
        return None
    return str(data) if isinstance(data, (str, Path)) else GIVEN


def _changed(settings: Any, changes: dict[str, Any]) -> Any:
    return dataclasses.replace(settings, **{key: value for key, value in changes.items() if value is not None})


def _as_calibrated(original: dict[str, Any], job: Job, calibration: Any) -> tuple[int | None, int | None]:
    """The rows that a checkpoint was calibrated on, as far as nothing else is asked for."""
    described, settings = original["calibration"], job.calibration
    if described is None:
        return None, None
    if calibration is None and settings.data == GIVEN:
        raise InvalidValueError(
            "That checkpoint was calibrated on token ids that were given in Python; give them again with --calibration."
        )
    then = original["recipe"]["calibration"]
    given = {key: getattr(settings, key) for key in ("samples", "seq_len")}
    samples, seq_len = (described[key] if value == then[key] else value for key, value in given.items())
    return samples, seq_len


def _heed_dropped_tasks(job: Job, progress: Progress) -> None:
    if not job.dropped_tasks or job.evaluation.tasks:
        return
    said = f"the checkpoint's recipe names {', '.join(job.dropped_tasks)}, and a task file may hold code"
    if RECOVERY in job.evaluation.gate:
        raise InvalidValueError(f"The gate on recovery needs tasks: {said}; give it yourself with --tasks.")
    progress.note(f"{said}, so it is not run unless you give it with --tasks")


def _calibration_tokens(job, checkpoint, plan: Plan, calibration, samples, seq_len, progress) -> Tokens:
    settings = job.calibration
    tokens = load_tokens(
        settings.data if calibration is None or isinstance(calibration, (str, Path)) else calibration,
        checkpoint,
        samples=samples,
        seq_len=seq_len,
        seed=settings.seed,
        tiny_folder=tiny_folder(),
        default_samples=settings.samples,
        default_seq_len=settings.seq_len,
    )
    if tokens.note:
        progress.note(tokens.note)
    widest = plan.widest
    if plan.needs_inputs and tokens.count < widest.shape.in_features:
        progress.note(
            f"only {tokens.count} calibration tokens for the {widest.shape.in_features} inputs of {widest.name}: its Gram "
            "matrix is singular, and the result may be no better than rounding to nearest; give more --samples"
        )
    return tokens


def _evaluation_tokens(job, checkpoint, eval_data, progress) -> Tokens:
    settings = job.evaluation
    tokens = load_tokens(
        settings.data if eval_data is None or isinstance(eval_data, (str, Path)) else eval_data,
        checkpoint,
        split="evaluation",
        tiny_folder=tiny_folder(),
        default_samples=settings.samples,
        default_seq_len=settings.seq_len,
    )
    if tokens.note:
        progress.note(tokens.note)
    return tokens


def _quantization_config(plan: Plan, layout) -> dict[str, Any] | None:
    grids = {name: task.grid for name, task in plan.tasks.items()}
    config = layout.quantization_config(grids, plan.untouched, plan.kv_cache)
    return layout.config_with_embeddings(config, grids, [] if plan.embeddings is None else [plan.embeddings.name])


def _coverage(results: list[dict[str, Any]], plan: Plan, tied: bool) -> dict[str, int]:
    """How many linears are compressed, of how many; embeddings are one only where the head shares their weight."""
    embeddings = plan.embeddings is not None
    every = len(results) + len(plan.untouched) - embeddings
    return {"compressed": len(results) - (embeddings and not tied), "linears": every}


def _rows_at_once(tokens: Tokens) -> int:
    """Rows that go through a block together."""
    return max(1, MICRO_BATCH_TOKENS // tokens.input_ids.shape[1])


def _run_pass(streamed, plan, layout, writer, journal, processes, progress, tokens, memory_limit) -> list[dict]:
    batches = []
    if tokens is not None:
        share = processes.share(len(tokens.input_ids))
        if share.stop > share.start:
            batches = tokens.batch(share).split(_rows_at_once(tokens))
    suspended = _fits_suspended(
        streamed, plan, sum(b.input_ids.numel() for b in batches), memory_limit, processes.count
    )
    run = BlockPass(streamed, plan, layout, writer, journal, processes, progress, suspended)
    if not writer.merged:
        results = run.run(batches)
        if processes.writes:
            progress.step("writing", amount=0)
            writer.merge()
        return results
    return [row for rows in journal.blocks.values() for row in rows]


def _fits_suspended(
    streamed: StreamedModel, plan: Plan, tokens: int, memory_limit: int | None, processes: int
) -> bool:
    """
    Whether the halted forwards of all tokens fit: about six hidden-size tensors and the widest input per token (the
    stream, the residual, the normed input, queries, keys, values), twice that beside a dense stream.
    """
    if not plan.needs_inputs:
        return True
    config = streamed.skeleton.config.get_text_config()
    per_token = (6 * config.hidden_size + plan.widest.shape.in_features) * streamed.dtype.itemsize
    needed = tokens * per_token * (2 if plan.needs_dense_stream else 1)
    if memory_limit is not None and psutil.Process().memory_info().rss + needed > memory_limit:
        return False
    if streamed.device.type == "cuda":
        return needed <= torch.cuda.mem_get_info(streamed.device)[0] // 2
    return needed <= psutil.virtual_memory().available // 2 // processes


def _write_companions(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    layout: Layout,
    changes: Mapping[str, Any],
    quantization_config: dict | None,
) -> None:
    """config.json, with what changes in it, and what belongs beside the weights."""
    if checkpoint.folder is not None:
        config = json.loads((checkpoint.folder / "config.json").read_text())
        for name in checkpoint.companions():
            writer.copy(checkpoint.folder / name, name)
    else:
        config = checkpoint.config.to_dict()
        if checkpoint.generation_config is not None:
            checkpoint.generation_config.save_pretrained(writer.result)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(writer.result)
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
        for name, value in layout.files(quantization_config).items():
            writer.write_json(name, value)
    writer.write_json("config.json", config)


def _described_base(checkpoint: Checkpoint) -> dict[str, Any]:
    """The base in the manifest: where it came from, so that the same one can be found again."""
    name = checkpoint.name
    if checkpoint.folder is None:
        kind = HUB if is_hub_id(name) else MEMORY
    elif checkpoint.revision is not None:
        kind = HUB
    elif name == TINY_NAME:
        kind = BUNDLED
    else:
        kind, name = FOLDER, str(checkpoint.folder)
    described = {"model": name, "kind": kind, "revision": checkpoint.revision, "sha256": checkpoint.sha256}
    return {**described, "card": base_card(checkpoint.folder)}


def _described(tokens: Tokens | None, job: Job) -> dict[str, Any] | None:
    if tokens is None:
        return None
    rows, seq_len = tokens.input_ids.shape
    settings = {"seed": job.calibration.seed, "samples": rows, "seq_len": seq_len}
    described = {"data": tokens.source, "sha256": tokens.sha256, "tokens": tokens.count, **settings}
    return {**described, "sketch": sketch(tokens)}


def _fingerprint(job: Job, base: Mapping, tokens: Tokens | None, streamed, processes, rotation) -> dict[str, Any]:
    described = job.to_dict()
    return {
        "the base model": base["sha256"],
        "the recipe": {"recipe": described["recipe"], "format": described["format"]},
        "the calibration data": tokens.sha256 if tokens is not None else None,
        "the versions": _versions(),
        "the dtype": str(streamed.dtype),
        "the device": streamed.device.type,
        "the number of processes": processes.count,
        "the rotation": None if rotation is None else rotation.applied,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
