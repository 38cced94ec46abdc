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
"""What will be done to which model on what data, settled before any work starts."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.budgeting.choices import Choices
from hfcompress.calibration.speech import no_sound
from hfcompress.calibration.tokens import BUNDLED, GIVEN, Tokens, load_tokens
from hfcompress.errors import InvalidValueError, OutputError, UnsupportedModelError
from hfcompress.evaluation.logits import as_read
from hfcompress.formats import get_format
from hfcompress.formats.dense_view import dense_view
from hfcompress.formats.writer import CheckpointWriter, check_output
from hfcompress.models.architecture import goes_on, is_headless
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.devices import find_device, find_dtype
from hfcompress.models.encoder_decoder import hears, reads_and_writes
from hfcompress.models.manifest import base_of, read_manifest
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.students import MadeStudent, make_student
from hfcompress.models.tiny import TINY_NAME, tiny_folder
from hfcompress.passes.cache_vectors import check_cache
from hfcompress.passes.library_pass import LibraryPass
from hfcompress.passes.narrow_pass import NarrowPass
from hfcompress.passes.plan import Plan, make_plan
from hfcompress.passes.processes import Processes
from hfcompress.passes.profile import Profile
from hfcompress.passes.prune_pass import PrunePass
from hfcompress.passes.rotate import RotationChoice
from hfcompress.passes.smaller import kept_sizes
from hfcompress.progress import Progress
from hfcompress.recipes import Job, load_job
from hfcompress.recipes.budget import Budget, find_budget
from hfcompress.recipes.distill import NO_STUDENT, Distill
from hfcompress.recipes.job import RECOVERY
from hfcompress.recipes.kv_cache import KVCache
from hfcompress.recipes.lora import LoRA
from hfcompress.recipes.prune import Prune
from hfcompress.recipes.qat import QAT
from hfcompress.recipes.rotate import Rotate
from hfcompress.recipes.share import Share


if TYPE_CHECKING:
    from hfcompress.passes.distill_pass import DistillPass
    from hfcompress.passes.lora_pass import LoraPass
    from hfcompress.passes.qat_pass import QatPass


@dataclass
class Prepared:
    """
    Args:
        checkpoint (`Checkpoint`): the model as it was given.
        source (`Checkpoint`): what the steps start from: that model, or what an earlier stage has made of it.
        streamed (`StreamedModel`): the model that the pass walks; rotated if that was chosen.
        output (`Path`): the folder to make.
        processes (`Processes`): who takes part.
        layout (`Layout` or `None`): the format; `None` where another library has its own.
        plan (`Plan`): what is done to which linear; a draft where a budget is still to be settled.
        tokens (`Tokens` or `None`): the calibration data.
        rotation (`RotationChoice` or `None`): whether the model was rotated, and why.
        choices (`Choices` or `None`): what a budget may choose.
        training (`QatPass`, `LoraPass` or `None`): what follows the block pass on the whole model.
        library (`LibraryPass` or `None`): the library that does it all.
        quantization_config (`dict` or `None`): what config.json will say.
        pruning (`PrunePass`, `NarrowPass` or `None`): what makes the model smaller.
        distilling (`DistillPass` or `None`): what trains the student that the stage before has left.
        profile (`Profile` or `None`): where the time of the block pass went, once it has been run.
    """

    checkpoint: Checkpoint
    source: Checkpoint
    streamed: StreamedModel
    output: Path
    processes: Processes
    layout: Any
    plan: Plan
    tokens: Tokens | None
    rotation: RotationChoice | None
    choices: Choices | None
    training: "QatPass | LoraPass | None"
    library: LibraryPass | None
    quantization_config: dict[str, Any] | None
    pruning: PrunePass | NarrowPass | None
    distilling: "DistillPass | None"
    profile: Profile | None = None


def prepare(
    job: Job,
    model: Any,
    output_dir: str | Path | None,
    *,
    tokenizer: Any,
    calibration: Any,
    samples: int | None,
    seq_len: int | None,
    device: str,
    dtype: str | None,
    memory_limit: int | None,
    resume: bool,
    overwrite: bool,
    trust_remote_code: bool,
    progress: Progress,
    stage: Callable[[Checkpoint, Path], Checkpoint] | None = None,
    speak: bool = True,
    evaluate: bool = False,
) -> Prepared:
    """
    See [`hfcompress.compression.compress`] for the arguments; `stage` makes of the model and the output's path what the
    steps start from, without `speak` the decoder of an encoder-decoder reads any tokens, for a forecast, and `evaluate` asks
    whether there will be something to measure the result on.

    Raises:
        HfcompressError: something the user can put right, in one sentence.
    """
    _heed_dropped_tasks(job, progress)
    layout: Any = None if job.library is not None else get_format(job.format)
    original = read_manifest(job.origin)
    again = bool(original) and model is None
    if again:
        model = base_of(job.origin)
        dtype = dtype or original.get("dtype")
        samples, seq_len = _as_calibrated(original, job, calibration)
    checkpoint = _open(model, tokenizer, trust_remote_code)
    _check_encoder(checkpoint, job)
    if evaluate and hears(checkpoint.config) and job.evaluation.data == BUNDLED:
        raise no_sound(checkpoint)
    output = Path(output_dir or f"{_short_name(checkpoint)}-{job.name}").expanduser().absolute()
    check_output(output, resume, overwrite, checkpoint.folder)
    if job.origin is not None and output.resolve() == job.origin.resolve():
        raise OutputError(f"{output} is the checkpoint whose recipe is run again; choose another --output.")
    processes = Processes(find_device(device))
    source = checkpoint
    arithmetic = find_dtype(dtype, processes.device, checkpoint)
    made = None
    if job.distilling is not None and stage is None:
        source, made = _student(job.distilling, checkpoint, processes, arithmetic)
    if stage is not None:
        if processes.count > 1:
            raise InvalidValueError(
                "A recipe of several stages works in one process; start one, or run the stages one after the other: prune by "
                "itself first, or the first part of a schedule."
            )
        source = stage(checkpoint, output)
    streamed = StreamedModel(source, processes.device, arithmetic)
    pruning = None
    if job.pruning is not None:
        sizes = None
        if job.pruning.target_latency is not None:
            if processes.count > 1:
                raise InvalidValueError(
                    "prune.target_latency is timed in one process; start one, or give another target."
                )
            sizes = kept_sizes(CheckpointWriter(output)) if resume else None
        if job.pruning.hidden:
            pruning = NarrowPass(streamed, job.pruning, job.tuning, sizes)
        else:
            pruning = PrunePass(streamed, job.pruning, job.tuning, sizes, checkpoint.parameters)
    library = None if job.library is None else LibraryPass(streamed, job.library)
    rotation = RotationChoice(streamed, job.rotation, progress) if job.rotation is not None else None
    model_to_plan = streamed if rotation is None else rotation.model
    choices = Choices(model_to_plan, job.steps, layout) if find_budget(job.steps) else None
    if library is not None:
        plan = library.plan
    elif pruning is not None:
        plan = pruning.plan
    elif job.distilling is not None:
        plan = Plan([], None)
    else:
        plan = make_plan(model_to_plan, job.steps, layout) if choices is None else choices.draft
    tokens, trained = None, job.training is not None or pruning is not None or job.distilling is not None
    if plan.needs_inputs or trained or job.cache_bits or (rotation is not None and rotation.needs_trial):
        where, whole = (processes.device, arithmetic), memory_limit is None
        tokens = _calibration_tokens(
            job, checkpoint, plan, calibration, samples, seq_len, progress, where, whole, speak
        )
    if job.cache_bits and tokens is not None:
        check_cache(streamed, tokens.batch(slice(None)), job.cache_bits, memory_limit)
    if rotation is not None:
        streamed, settled = rotation.settle(job.steps, layout, tokens, processes, suspended=memory_limit is None)
        if choices is not None:  # a rotation that was not possible
            choices = Choices(streamed, job.steps, layout)
        plan = settled if choices is None else choices.draft
    if plan.tuning is not None and processes.count > 1:
        raise InvalidValueError("tune works in one process; start one, or leave tune out of the recipe.")
    training = None
    if job.training is not None and tokens is not None:
        training = training_pass(streamed, plan, layout, job.training, tokens)
        training.check(processes, memory_limit)
    distilling = None
    if job.distilling is not None and tokens is not None:
        teacher = StreamedModel(checkpoint, processes.device, streamed.dtype)
        from hfcompress.passes.distill_pass import DistillPass  # transformers' Trainer takes its time

        distilling = DistillPass(teacher, streamed, job.distilling, tokens, made)
        distilling.check(processes, memory_limit)
        plan = distilling.plan
    config = None if library is not None else quantization_config(plan, layout)
    if config is not None:
        streamed.will_round_activations(config)
    if again and tokens is not None and tokens.sha256 != original["calibration"]["sha256"]:
        progress.note("the calibration data is not what the original was calibrated on, so neither will the result be")
    return Prepared(
        *(checkpoint, source, streamed, output, processes, layout, plan, tokens, rotation, choices, training, library),
        *(config, pruning, distilling),
    )


def _check_encoder(checkpoint: Checkpoint, job: Job) -> None:
    """An encoder is refused steps that learn or judge by the next token; with a decoder, those that change its shape as well."""
    refused: tuple[type, ...] = () if goes_on(checkpoint.config) else (Distill, KVCache, LoRA, QAT)
    refused += (Budget, Prune, Rotate) if is_headless(checkpoint.config) else ()
    if reads_and_writes(checkpoint.config):
        refused += (Prune, Rotate, Share)
    for step in job.steps:
        if isinstance(step, refused) and reads_and_writes(checkpoint.config):
            raise UnsupportedModelError(
                f"{checkpoint.name} has an encoder beside its decoder, and {step.name} is for models without one; leave it out."
            )
    for step in job.steps:
        if isinstance(step, refused):
            what = (
                "that have a head for tokens"
                if isinstance(step, (Budget, Prune, Rotate))
                else "that go on with a text"
            )
            raise UnsupportedModelError(
                f"{checkpoint.name} is an encoder, and {step.name} is for models {what}; leave it out."
            )


def calibration_share(ready: Prepared) -> Batch | None:
    """The calibration rows that this process takes, if there are any."""
    if ready.tokens is None:
        return None
    share = ready.processes.share(len(ready.tokens.input_ids))
    return ready.tokens.batch(share) if share.stop > share.start else None


def training_pass(streamed: StreamedModel, plan: Plan, layout, step: Any, tokens: Tokens) -> "QatPass | LoraPass":
    """What follows the block pass on the whole model."""
    from hfcompress.passes.lora_pass import LoraPass  # transformers' Trainer takes its time
    from hfcompress.passes.qat_pass import QatPass

    kind = LoraPass if isinstance(step, LoRA) else QatPass
    return kind(streamed, plan, layout, step, tokens)


def _student(
    step: Distill, checkpoint: Checkpoint, processes: Processes, dtype: Any
) -> tuple[Checkpoint, MadeStudent | None]:
    """The student that a step asks for, and how it was made of the model if it was."""
    if step.student is None:
        raise InvalidValueError(NO_STUDENT)
    if isinstance(step.student, str):
        return _open(step.student, None, checkpoint.trust_remote_code), None
    teacher = StreamedModel(checkpoint, processes.device, dtype)
    made = make_student(teacher, step.student, step.init == "random", step.seed)
    return made.checkpoint, made


def _open(model: Any, tokenizer: Any, trust_remote_code: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(tiny_folder() if model is None else model, tokenizer, trust_remote_code, dense_view)
    if checkpoint.folder == tiny_folder():
        checkpoint.name = TINY_NAME
    return dense_view(checkpoint)


def _short_name(checkpoint: Checkpoint) -> str:
    """What the default output is called after."""
    if checkpoint.folder is not None and checkpoint.revision is None and checkpoint.name != TINY_NAME:
        return checkpoint.folder.name
    return Path(checkpoint.name.partition("@")[0]).name


def asked_job(recipe, calibration, samples, seq_len, seed, eval_data, measure, tasks, limit) -> Job:
    """The recipe, with what is asked for besides in its place."""
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


def _calibration_tokens(
    job, checkpoint, plan: Plan, calibration, samples, seq_len, progress, where: tuple[Any, Any], whole, speak
) -> Tokens:
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
    if speak:
        tokens = as_read(tokens, checkpoint, *where, settings.seed, progress, whole)
    if plan.needs_inputs and tokens.count < (widest := plan.widest).shape.in_features:
        progress.note(
            f"only {tokens.count} calibration tokens for the {widest.shape.in_features} inputs of {widest.name}: its Gram "
            "matrix is singular, and the result may be no better than rounding to nearest; give more --samples"
        )
    return tokens


def quantization_config(plan: Plan, layout) -> dict[str, Any] | None:
    """What config.json will say of a plan's linears."""
    grids = {name: task.grid for name, task in plan.tasks.items() if layout.of(task.grid) is layout}
    plain = [name for name in plan.tasks if name not in grids]
    if not grids and not layout.codes_beside:
        if plan.kv_cache is not None:
            raise InvalidValueError("kv_cache needs a step beside it that rounds weights, such as rtn or gptq.")
        return None
    left = dict.fromkeys([*plan.untouched, *plain, *plan.routers])
    config = layout.quantization_config(grids, list(left), plan.kv_cache)
    if plan.unpacked:
        config = layout.config_unpacked(config, grids)
    return layout.config_with_embeddings(config, grids, [] if plan.embeddings is None else [plan.embeddings.name])
