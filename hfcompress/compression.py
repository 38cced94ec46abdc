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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hfcompress.budgeting.settle import plan_of, settle
from hfcompress.calibration.tokens import Tokens, load_tokens
from hfcompress.errors import HfcompressError, InvalidValueError, LostProcessError, OutputError
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.logits import as_read, open_streamed
from hfcompress.evaluation.measure import check, tasks_of, units
from hfcompress.evaluation.measure import measure as measure_all
from hfcompress.evaluation.report import Report
from hfcompress.evaluation.side_by_side import side_by_side
from hfcompress.formats.layout import Layout
from hfcompress.formats.writer import CheckpointWriter
from hfcompress.formats.zeros import check_zeros
from hfcompress.hub.description import PAGE, describe
from hfcompress.models.architecture import auto_class, goes_on, ties_embeddings
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.experts import ExpertLinear
from hfcompress.models.manifest import MANIFEST, read_manifest
from hfcompress.models.shallow import merged
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.tiny import tiny_folder
from hfcompress.passes.block_pass import BlockPass
from hfcompress.passes.cache_vectors import learn_vectors
from hfcompress.passes.footprint import Course, choose_course, rows_at_once
from hfcompress.passes.journal import DISTILL, LORA, QAT, Journal
from hfcompress.passes.memory import give_back_large_tensors_at_once
from hfcompress.passes.plan import Plan
from hfcompress.passes.prune_pass import together
from hfcompress.passes.spill import Spill
from hfcompress.passes.trial import trial_on
from hfcompress.phases import Phases
from hfcompress.preparing import (
    Prepared,
    asked_job,
    calibration_share,
    prepare,
    quantization_config,
    training_pass,
)
from hfcompress.progress import Progress, Silent
from hfcompress.provenance import described_base, described_calibration, fingerprint, has_student, versions
from hfcompress.recipes import Job, Recipe, Steps
from hfcompress.runtime.vector_cache import FILE


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
    model: "str | Path | PreTrainedModel | Checkpoint | None",
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
    profile: bool = False,
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
        model (`str`, `Path`, `PreTrainedModel`, `Checkpoint` or `None`): a folder, a Hub id (`id` or `id@revision`), a
            model in memory, or any of these opened before; `None` for the bundled tiny model.
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
        memory_limit (`int`, *optional*): bytes that the block pass stays below, in all that this process has in memory:
            forwards are then run again instead of halted, hidden states lie on disk, and fewer rows go through a block
            together, as far as need be.
        profile (`bool`, *optional*): put into the manifest where the time of the block pass went.
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
    if memory_limit is not None:
        give_back_large_tensors_at_once()
    job = asked_job(recipe, calibration, samples, seq_len, seed, eval_data, measure, tasks, limit)
    if not evaluate and (job.evaluation.gate or measure or tasks):
        asked = "The recipe has a gate" if job.evaluation.gate else "Measurements are asked for"
        raise InvalidValueError(f"{asked}, which needs the evaluation; leave out --no-eval, or leave out that.")
    *earlier, last = job.stages
    stage = None
    if earlier:

        def stage(checkpoint: Checkpoint, output: Path) -> Checkpoint:
            return _earlier_stage(
                earlier[0],
                checkpoint,
                CheckpointWriter(output),
                resume,
                overwrite,
                tokenizer=tokenizer,
                calibration=calibration,
                samples=samples,
                seq_len=seq_len,
                device=device,
                dtype=dtype,
                memory_limit=memory_limit,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )

    ready = prepare(
        last,
        model,
        output_dir,
        tokenizer=tokenizer,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        device=device,
        dtype=dtype,
        memory_limit=memory_limit,
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=progress,
        stage=stage,
        evaluate=evaluate,
    )
    checkpoint, streamed, layout, processes = ready.checkpoint, ready.streamed, ready.layout, ready.processes
    rotation, output, tokens = ready.rotation, ready.output, ready.tokens
    evaluation_tokens = None
    if evaluate:
        evaluation_tokens = _evaluation_tokens(job, checkpoint, eval_data, progress)
        if processes.writes:  # who measures
            where = processes.device, torch.float32
            evaluation_tokens = as_read(evaluation_tokens, checkpoint, *where, 0, progress, memory_limit is None)
    names, comparison = job.evaluation.measurements, None
    if evaluation_tokens is not None:
        comparison = Comparison(
            candidate=checkpoint,
            baseline=checkpoint.packed or checkpoint,
            tokens=evaluation_tokens,
            device=processes.device,
            seed=job.calibration.seed,
            tasks=tasks_of(names, job.evaluation.tasks),
            limit=job.evaluation.limit,
            lean=memory_limit is not None,
            progress=progress,
        )
        check(comparison, names)
    phases.end("prepare")

    course = None
    writer = CheckpointWriter(output)
    writer.experts = streamed.experts if layout is None else layout.storage(streamed.experts)
    base = described_base(checkpoint)
    journal = Journal(writer.partial / "journal.json", fingerprint(job, base, tokens, streamed, rotation))
    try:
        if processes.writes:
            writer.claim()
        if overwrite and processes.writes and not earlier:
            writer.discard()
        if resume:
            journal.resume()
        if ready.pruning is None and ready.library is None and ready.distilling is None:
            course = _course(ready, journal, memory_limit)  # refused here where nothing can keep the limit
        if processes.writes:
            writer.open()
        processes.wait()
        passes = 1 if ready.training is None else 2
        passes += 2 if ready.choices is not None and journal.budget is None else 0
        if last.cache_bits:
            passes += 1 if comparison is None else 3  # learned, and measured with it
        progress.start(passes * len(streamed) + (units(comparison, names) if comparison else 0))
        if ready.choices is not None:
            _settle_budget(ready, job, writer, journal, progress, memory_limit)
            phases.end("budget")
        if ready.library is not None:
            results, ready.quantization_config = ready.library.run(writer, journal, processes, progress)
        elif ready.distilling is not None:
            results = ready.distilling.run(writer, journal, progress)
        else:
            results = _run_pass(ready, writer, journal, progress, memory_limit, course)
        phases.end("compress")
        processes.go_separate_ways()  # what loads models below must not wait for the others
        if not processes.writes:
            return Result(output, {})
        changes = {} if rotation is None else rotation.config_changes
        smaller = ready.pruning or ready.distilling
        changes = changes if smaller is None else smaller.config_changes
        _write_companions(writer, ready.source, layout, changes, ready.quantization_config)
        beside = {} if layout is None else layout.write_beside(writer.result, output.name)
        made = Checkpoint.open(writer.result, trust_remote_code=trust_remote_code)
        made.name = output.name
        if ready.pruning is None:
            _check_zeros(made, ready, results)
        else:
            ready.pruning.verify(made, journal)
        vectors = {} if last.cache_bits is None else _learn_cache(ready, last, writer, made, progress)
        manifest = {**_manifest(ready, job, base, journal, results, made), **beside, **vectors}
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
        if profile and ready.profile is not None:
            manifest["profile"] = ready.profile.described(processes.device)
        writer.write_json(MANIFEST, manifest)
        progress.step("drawing", amount=0)
        describe(writer.result, output.name)
        writer.finish()
    except HfcompressError as error:
        if processes.writes and not (resume or writer.merged or isinstance(error, (OutputError, LostProcessError))):
            writer.discard()  # what would put the error right changes the run
        elif processes.writes and writer.merged and not isinstance(error, (OutputError, LostProcessError)):
            raise type(error)(f"{error} The weights are done: put that right, and go on with --resume.") from error
        raise
    finally:
        writer.release()
    return Result(output, manifest, report, job.evaluation.refusals(report) if report else [])


def _earlier_stage(job: Job, checkpoint: Checkpoint, writer: CheckpointWriter, resume, overwrite, **options):
    """What a stage makes of the model, in a folder among the unfinished work; done already where a run is resumed."""
    folder = writer.partial / job.name
    if overwrite:
        writer.discard()
    if resume and folder.exists():
        manifest, base = read_manifest(folder), described_base(checkpoint)
        if manifest.get("recipe") != job.to_dict() or manifest["base"]["sha256"] != base["sha256"]:
            raise OutputError(
                f"The unfinished run in {writer.partial} differs in the recipe or the base model; give the same options, or "
                "start again with --overwrite."
            )
    else:
        compress(checkpoint, job, folder, resume=resume, evaluate=False, **options)
    return Checkpoint.open(folder, trust_remote_code=options["trust_remote_code"])


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


def _manifest(
    ready: Prepared, job: Job, base: dict[str, Any], journal: Journal, results: list[dict], made: Checkpoint
) -> dict[str, Any]:
    """What `hfcompress.json` says; phases come later."""
    return {
        "hfcompress": version("hfcompress"),
        "versions": versions(),
        "recipe": job.to_dict(),
        "base": base,
        "calibration": described_calibration(ready.tokens, job),
        "seed": job.calibration.seed,
        **({} if ready.rotation is None else {"rotation": ready.rotation.manifest}),
        **_pruned(ready),
        "linears": results,
        "kv_cache": ready.plan.kv_cache,
        "skipped": ready.plan.skipped,
        "folds": [pair for pairs in journal.folds.values() for pair in pairs],
        "coverage": _coverage(results, ready.plan, ties_embeddings(made.config)),
        **({} if ready.plan.embeddings is None else {"embeddings": ready.plan.embeddings.name}),
        **_experts(results, ready.streamed),
        "fallbacks": sum(1 for row in results if row["fallback"]),
        "training": _trained(ready, journal),
        **_student(ready, job),
        "witness": journal.witness,
        "sha256": made.sha256,
        **({} if journal.budget is None else {"budget": journal.budget}),
        **_other_parts(made),
        "device": str(ready.processes.device),
        "dtype": str(ready.streamed.dtype).removeprefix("torch."),
        "processes": ready.processes.count,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _other_parts(made: Checkpoint) -> dict[str, str]:
    """Of a model that does more than go on with a text, or something else, the class that it is loaded by."""
    text = made.config.get_text_config() is made.config and goes_on(made.config)
    return {} if text else {"loaded_by": auto_class(made.config).__name__}


def _learn_cache(ready: Prepared, job: Job, writer: CheckpointWriter, made: Checkpoint, progress: Progress) -> dict:
    """Put vectors for the cache beside the finished model; what the manifest says of them."""
    tokens, bits = ready.tokens, job.cache_bits
    assert tokens is not None
    assert bits is not None
    model = open_streamed(made, ready.processes.device, ready.streamed.dtype)
    stored = made.config.dtype if isinstance(made.config.dtype, torch.dtype) else torch.bfloat16
    vectors = learn_vectors(model, tokens.batch(slice(None)), bits, stored, job.calibration.seed, progress)
    writer.write_beside(FILE, vectors)
    return {"cache_vectors": {"bits": bits, "bytes": sum(tensor.nbytes for tensor in vectors.values())}}


def _check_zeros(made: Checkpoint, ready: Prepared, results: list[dict]) -> None:
    """Law 5: the patterns hold in what was written; what is reported of the zeros is what is there."""
    if ready.distilling is not None:
        check_zeros(made, ready.distilling.patterns)
        return
    sparse = {task.stem: task for task in ready.plan.tasks.values() if task.sparsity is not None}
    found = check_zeros(made, [(stem, t.sparsity.structure, t.shape.transposed) for stem, t in sparse.items()])
    shares = {sparse[stem].name: share for stem, share in found.items()}
    for row in results:
        row["sparsity"] = shares.get(row["name"], row["sparsity"])


def _trained(ready: Prepared, journal: Journal) -> dict[str, Any] | None:
    """How it was trained, now or in an earlier stage."""
    now = next((journal.stages[name] for name in (QAT, LORA, DISTILL) if name in journal.stages), None)
    return now or (None if ready.source is ready.checkpoint else read_manifest(ready.source.folder).get("training"))


def _student(ready: Prepared, job: Job) -> dict[str, Any]:
    """Which student was trained, now or in an earlier stage, if it was given."""
    if has_student(job):
        return {"student": described_base(ready.source)}
    before = None if ready.source is ready.checkpoint else read_manifest(ready.source.folder).get("student")
    return {} if before is None else {"student": before}


def _pruned(ready: Prepared) -> dict[str, Any]:
    """What was taken out, now or in an earlier stage."""
    now = None if ready.pruning is None else ready.pruning.manifest
    before = None if ready.source is ready.checkpoint else read_manifest(ready.source.folder).get("pruning")
    if now is not None and before is not None:
        return {"pruning": together(before, now)}
    return {} if now is None and before is None else {"pruning": now or before}


def _settle_budget(ready: Prepared, job: Job, writer, journal: Journal, progress: Progress, memory_limit) -> None:
    """Bits and group sizes, chosen now or by the run that this one goes on with, become the plan."""
    choices, tokens, processes = ready.choices, ready.tokens, ready.processes
    assert choices is not None
    assert tokens is not None

    def run(plan: Plan, seen: Tokens, unseen: Tokens) -> float:
        rows = (t.batch(slice(None)) for t in (seen, unseen))
        return trial_on(ready.streamed, plan, ready.layout, *rows, ready.checkpoint, processes, memory_limit is None)

    if journal.budget is None:
        settled = settle(
            choices,
            tokens,
            job.calibration.seed,
            processes,
            progress,
            rows_at_once(ready.plan, tokens.length),
            run,
        )
        journal.settle(settled, write=processes.writes)
    assert journal.budget is not None
    ready.plan = plan_of(choices, journal.budget)
    ready.quantization_config = quantization_config(ready.plan, ready.layout)
    if ready.training is not None:
        ready.training = training_pass(ready.streamed, ready.plan, ready.layout, job.training, tokens)


def _coverage(results: list[dict[str, Any]], plan: Plan, tied: bool) -> dict[str, int]:
    """How many linears are compressed, of how many; embeddings are one only where the head shares their weight."""
    embeddings = plan.embeddings is not None
    every = len(results) + len(plan.untouched) - embeddings
    return {"compressed": len(results) - (embeddings and not tied), "linears": every}


def _experts(results: list[dict[str, Any]], model: StreamedModel) -> dict[str, dict[str, int]]:
    """How many experts were solved on tokens that were sent to them, and how many those were."""
    sent, few = {}, set()
    modules = dict(model.skeleton.named_modules())
    for row in results:
        if isinstance(modules.get(row["name"]), ExpertLinear) and row["relative_output_error"] is not None:
            expert = row["name"].rpartition(".")[0]
            sent[expert] = row["tokens"]
            if row["tokens"] < row["shape"][1]:
                few.add(expert)
    counts = sorted(sent.values())
    if not counts:
        return {}
    told = {"fewest": counts[0], "median": counts[len(counts) // 2], "most": counts[-1]}
    return {"experts": {"count": len(counts), **told, "few": len(few), "unseen": counts.count(0)}}


def _course(ready: Prepared, journal: Journal, memory_limit: int | None, dense_model=None) -> Course:
    """How the block pass is run; with as many rows at a time as the run that this one goes on with."""
    where = ready.streamed, ready.plan, ready.layout, calibration_share(ready), ready.processes
    course = choose_course(*where, memory_limit, dense_model, journal.rows)
    journal.rows = course.rows
    return course


def _run_pass(
    ready: Prepared, writer, journal: Journal, progress: Progress, memory_limit, course: Course | None
) -> list[dict]:
    processes, batch, wider = ready.processes, calibration_share(ready), (None, None)
    if ready.pruning is not None:
        rows = choose_course(ready.streamed, ready.plan, ready.layout, batch, processes, None).rows
        ready.pruning.settle([] if batch is None else batch.split(rows), writer, journal, processes, progress)
        ready.streamed, ready.plan = ready.pruning.model, ready.pruning.plan
        wider = ready.pruning.dense_model, ready.pruning.basis
    if course is None:
        course = _course(ready, journal, memory_limit, wider[0])
    batches = [] if batch is None else batch.split(course.rows)
    spill = Spill(writer.partial) if course.spilled else None
    run = BlockPass(
        *(ready.streamed, ready.plan, ready.layout, writer, journal, processes, progress, course.suspended),
        *wider,
        spill,
    )
    ready.profile = run.profile
    if writer.merged:
        writer.require_whole()
    else:
        if not writer.merging:
            run.forget_lost_parts()
            if journal.witness is None:
                run.run(batches)
            if ready.training is not None:
                ready.training.run(writer, journal, progress)
            if ready.pruning is not None and processes.writes:
                ready.pruning.cut(writer, journal)
            processes.wait()  # before the first part is turned into a shard, all know that none was
        if processes.writes:
            progress.step("writing", amount=0)
            writer.merge()
    return [row for rows in journal.blocks.values() for row in rows]


def _write_companions(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    layout: Layout | None,
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
    config = merged(config, changes)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
        for name, value in ({} if layout is None else layout.files(quantization_config)).items():
            writer.write_json(name, value)
    writer.write_json("config.json", config)
