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
"""A whole job: the steps, the format, the data. Read from YAML, from a shipped name, or from a finished folder."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hfcompress.errors import CheckpointError, InvalidValueError, nearest
from hfcompress.evaluation.measure import QUALITY, TASKS, chosen
from hfcompress.evaluation.report import PARTS
from hfcompress.models.manifest import MANIFEST, read_manifest
from hfcompress.recipes.awq import AWQ
from hfcompress.recipes.base import Recipe, Steps
from hfcompress.recipes.bitsandbytes import BitsAndBytes
from hfcompress.recipes.budget import Budget, find_budget
from hfcompress.recipes.codebook import Codebook
from hfcompress.recipes.coded import Coded
from hfcompress.recipes.distill import Distill
from hfcompress.recipes.entropy import Entropy
from hfcompress.recipes.gptq import GPTQ
from hfcompress.recipes.kv_cache import KVCache
from hfcompress.recipes.library_step import LibraryStep
from hfcompress.recipes.lora import LoRA
from hfcompress.recipes.lossless import Lossless
from hfcompress.recipes.lowrank import LowRank
from hfcompress.recipes.prune import Prune
from hfcompress.recipes.qat import QAT
from hfcompress.recipes.rotate import Rotate, rotation_of
from hfcompress.recipes.rtn import RTN
from hfcompress.recipes.share import Share
from hfcompress.recipes.smooth import Smooth
from hfcompress.recipes.sparsify import Sparsify
from hfcompress.recipes.torchao import TorchAo
from hfcompress.recipes.tune import Tune
from hfcompress.recipes.validation import check_fields, check_keys
from hfcompress.recipes.vq import VQ


EVERY_STEP = (
    Prune,
    Distill,
    RTN,
    AWQ,
    Smooth,
    Sparsify,
    GPTQ,
    Entropy,
    Codebook,
    VQ,
    LowRank,
    Share,
    Lossless,
    Tune,
    Rotate,
    Budget,
    KVCache,
    QAT,
    LoRA,
    BitsAndBytes,
    TorchAo,
)
STEPS: dict[str, type[Recipe]] = {step.name: step for step in EVERY_STEP}
DEFAULT_FORMAT = "compressed-tensors"
OWN_FORMAT = "hfcompress"
RECOVERY = "recovery"  # the mean over the tasks
LOWER_BOUNDS = ("top1_agreement", RECOVERY)
GATED = (
    "perplexity",
    "kl_mean",
    "kl_median",
    "kl_p99",
    "kl_max",
    "rms_probability_change",
    "size_bytes",
    *LOWER_BOUNDS,
)


def _check_sizes(settings: Any, where: str) -> None:
    for key, least in (("samples", 1), ("seq_len", 2), ("seed", 0)):
        if getattr(settings, key, least) < least:
            raise InvalidValueError(f"{where}.{key} is {getattr(settings, key)}; it must be at least {least}.")


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """
    Args:
        data (`str`, *optional*, defaults to `"bundled"`): where the text, the token ids or the recordings come from.
        samples (`int`, *optional*, defaults to 128): rows.
        seq_len (`int`, *optional*, defaults to 2048): tokens per row, capped at the model's context; of an encoder-decoder 256
            where this is left at its default.
        seed (`int`, *optional*, defaults to 0): which rows are taken.
    """

    data: str = "bundled"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self):
        check_fields(self, "calibration")
        _check_sizes(self, "calibration")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """
    Args:
        data (`str`, *optional*, defaults to `"bundled"`): what the result is measured on.
        samples (`int`, *optional*, defaults to 128): rows.
        seq_len (`int`, *optional*, defaults to 2048): likewise.
        measure (`tuple[str, ...]`, *optional*, defaults to `("quality",)`): what is measured, or `"all"`.
        tasks (`tuple[str, ...]`, *optional*): lm-eval's tasks by name, or paths of task files; naming some asks for
            the measurement `tasks`.
        limit (`int`, *optional*): documents per task; all of them if not given.
        gate (`Mapping[str, float]`, *optional*): bounds on keys of the results; upper ones, but lower for
            `top1_agreement` and `recovery`, the mean over the tasks.
        score (`Mapping[str, float]`, *optional*): weights of the composite score's parts.
    """

    data: str = "bundled"
    samples: int = 128
    seq_len: int = 2048
    measure: tuple[str, ...] = (QUALITY,)
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    gate: Mapping[str, float] = field(default_factory=dict)
    score: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        check_fields(self, "evaluation")
        _check_sizes(self, "evaluation")
        if self.limit is not None and self.limit < 1:
            raise InvalidValueError(f"evaluation.limit is {self.limit}; it must be at least 1.")
        chosen(self.measure)
        check_keys(self.gate, list(GATED), "evaluation.gate")
        check_keys(self.score, list(PARTS), "evaluation.score")
        for where, values in (("gate", self.gate), ("score", self.score)):
            for key, value in values.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise InvalidValueError(f"evaluation.{where}.{key} is {value!r}; it must be a finite number.")
        if any(weight < 0 for weight in self.score.values()):
            raise InvalidValueError("The weights of evaluation.score must not be negative.")

    @property
    def measurements(self) -> tuple[str, ...]:
        """What is measured: what is asked for, what the gate needs, and quality always, which the card rests on."""
        needed = [TASKS] if self.tasks or RECOVERY in self.gate else []
        return tuple(dict.fromkeys((QUALITY, *self.measure, *needed)))

    def refusals(self, report: Mapping[str, Any]) -> list[str]:
        """A sentence for every bound that the report does not keep."""
        refused = []
        for key, bound in self.gate.items():
            value = report.get(key)
            if value is None:
                refused.append(f"{key} was not measured, and the gate asks for {bound:g}")
                continue
            kept = value >= bound if key in LOWER_BOUNDS else value <= bound
            if not kept:  # a NaN keeps no bound
                side = "at least" if key in LOWER_BOUNDS else "at most"
                refused.append(
                    f"{key} is {value:.6g}, off by {abs(value - bound):.3g}: the gate asks for {side} {bound:g}"
                )
        return refused


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    Args:
        steps (`tuple[Recipe, ...]`): what is done, in order.
        format (`str`, *optional*, defaults to `"compressed-tensors"`): how it is written.
        calibration (`CalibrationSettings`, *optional*): what it is calibrated on.
        evaluation (`EvaluationSettings`, *optional*): what it is measured on, and the gate.
        name (`str`, *optional*): what the recipe is called.
        description (`str`, *optional*): a line for the list of recipes.
        origin (`Path`, *optional*): the checkpoint that it was taken from.
        dropped_tasks (`tuple[str, ...]`, *optional*): task files that this checkpoint named.
    """

    steps: tuple[Recipe, ...]
    format: str = DEFAULT_FORMAT
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    name: str = "recipe"
    description: str = ""
    origin: Path | None = field(default=None, compare=False)
    dropped_tasks: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self):
        for index, step in enumerate(self.steps):
            step.check_place(self.steps[:index], self.steps[index + 1 :])
        rotation = rotation_of(self.steps)  # its place among the steps is checked
        if find_budget(self.steps) and rotation is not None and rotation.when == "better":
            raise InvalidValueError(
                "rotate decides by a trial of the steps behind it, whose bits a budget has not settled yet; set "
                "rotate.when to always, or leave one of the two out."
            )
        if self.library is not None:
            if self.format not in (DEFAULT_FORMAT, self.library.name):
                raise InvalidValueError(f"{self.library.name} writes its own format; leave out format={self.format}.")
            object.__setattr__(self, "format", self.library.name)
        if self.format == DEFAULT_FORMAT and any(isinstance(step, Coded) for step in self.steps):
            object.__setattr__(self, "format", OWN_FORMAT)  # the one that has a place for it

    @property
    def rotation(self) -> Rotate | None:
        """The step that rotates the model before the others, if there is one."""
        return rotation_of(self.steps)

    @property
    def pruning(self) -> Any:
        """The step that makes the model smaller before all others, if there is one."""
        return next((step for step in self.steps if isinstance(step, Prune)), None)

    @property
    def stages(self) -> "tuple[Job, ...]":
        """What is run one after the other, each on the checkpoint that the one before has left."""
        places = [number for number, step in enumerate(self.steps) if isinstance(step, Distill)]
        if places and len(self.steps) > 1:  # it stands alone, between what makes the student and what goes on with it
            cut = places[-1] if places[-1] == len(self.steps) - 1 else places[-1] + 1
            names = "-".join(step.name for step in self.steps[:cut])
            earlier = Job(steps=self.steps[:cut], calibration=self.calibration, name=names)
            return earlier, dataclasses.replace(self, steps=self.steps[cut:])
        first = next(iter(self.steps), None)
        if isinstance(first, Sparsify) and first.before:
            [before] = first.before
            earlier = Job(steps=(before,), calibration=self.calibration, name=before.name)
            return earlier, dataclasses.replace(self, steps=(dataclasses.replace(first, schedule=()), *self.steps[1:]))
        if self.pruning is None:
            return (self,)
        own, rest = self.steps[:1], self.steps[1:]
        if rest and isinstance(rest[0], Tune):  # what it moves is what prune has left
            own, rest = self.steps[:2], self.steps[2:]
        if not rest:
            if self.pruning.is_whole:
                return (self,)
            own, rest = ((step, *own[1:]) for step in self.pruning.in_two)
        earlier = Job(steps=own, calibration=self.calibration, name=self.pruning.name)
        return earlier, dataclasses.replace(self, steps=rest)

    @property
    def cache_bits(self) -> int | None:
        """Bits of a channel of the key-value cache, where it is kept in vectors."""
        return next((step.vector_bits for step in self.steps if isinstance(step, KVCache)), None)

    @property
    def tuning(self) -> Tune | None:
        """The step that tunes whole blocks, if there is one."""
        return next((step for step in self.steps if isinstance(step, Tune)), None)

    @property
    def training(self) -> Any:
        """The step that trains the whole model after the block pass, if there is one."""
        return next((step for step in self.steps if isinstance(step, (QAT, LoRA))), None)

    @property
    def distilling(self) -> Any:
        """The step that trains what the stage before has left, if this stage is one."""
        return next((step for step in self.steps if isinstance(step, Distill)), None)

    @property
    def library(self) -> Any:
        """The step that another library does whole, if it is one."""
        return next((step for step in self.steps if isinstance(step, LibraryStep)), None)

    @classmethod
    def of(cls, recipe: "Job | Recipe | Steps") -> "Job":
        """The job that a recipe stands for when it comes with nothing else."""
        if isinstance(recipe, Job):
            return recipe
        steps = recipe.steps if isinstance(recipe, Steps) else (recipe,)
        return cls(steps=steps, name="-".join(step.name for step in steps))

    def to_dict(self) -> dict[str, Any]:
        """The YAML document as plain values; [`job_from_dict`] reads it back."""
        return {
            "recipe": [{step.name: step.to_dict()} for step in self.steps],
            "format": self.format,
            "calibration": dataclasses.asdict(self.calibration),
            "evaluation": _plain(self.evaluation),
        }


def _plain(settings: Any) -> dict[str, Any]:
    """A section as YAML and JSON values."""
    values = dataclasses.asdict(settings)
    plain = {tuple: list, Mapping: dict}
    return {k: next((to(v) for kind, to in plain.items() if isinstance(v, kind)), v) for k, v in values.items()}


def job_from_dict(document: Any, name: str = "recipe") -> Job:
    """
    Args:
        document: what the YAML held.
        name (`str`, *optional*): what the recipe is called in messages.

    Raises:
        InvalidValueError: an unknown step or key (the nearest is named), or a wrong type.
    """
    if not isinstance(document, Mapping) or "recipe" not in document:
        raise InvalidValueError(f"{name} is not a recipe: it needs a key 'recipe' with a list of steps.")
    check_keys(document, ["recipe", "format", "calibration", "evaluation", "description"], name)
    listed = document["recipe"]
    listed = [listed] if isinstance(listed, (str, Mapping)) else listed
    if not isinstance(listed, list) or not listed:
        raise InvalidValueError(f"{name}: 'recipe' must be a list of steps such as `- gptq: {{bits: 4}}`.")
    steps = tuple(step for entry in listed for step in _steps(entry, name))
    if not steps:
        raise InvalidValueError(f"{name}: 'recipe' must be a list of steps such as `- gptq: {{bits: 4}}`.")
    values: dict[str, Any] = {"name": name, "description": str(document.get("description", ""))}
    if document.get("format") is not None:
        values["format"] = str(document["format"])
    for key, kind in (("calibration", CalibrationSettings), ("evaluation", EvaluationSettings)):
        section = document.get(key) or {}
        if not isinstance(section, Mapping):
            raise InvalidValueError(f"{name}: '{key}' must be a mapping of keys to values.")
        check_keys(section, [f.name for f in dataclasses.fields(kind)], key)
        values[key] = kind(**section)
    return Job(steps=steps, **values)


def _steps(entry: Any, where: str) -> list[Recipe]:
    entry = {entry: {}} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping):
        raise InvalidValueError(f"{where}: a step must be a mapping such as `gptq: {{bits: 4}}`, not {entry!r}.")
    steps = []
    for name, settings in entry.items():
        if name not in STEPS:
            known = ", ".join(STEPS)
            raise InvalidValueError(f"There is no step '{name}'; there are {known}.{nearest(str(name), STEPS)}")
        settings = settings or {}
        if not isinstance(settings, Mapping):
            raise InvalidValueError(f"{name} must be a mapping of keys to values, not {settings!r}.")
        check_keys(settings, [f.name for f in dataclasses.fields(STEPS[name])], name)
        steps.append(STEPS[name](**settings))
    return steps


def shipped_recipes() -> dict[str, str]:
    """Name -> description of every recipe that comes with the package."""
    return {job.name: job.description for job in map(_shipped, _shipped_names())}


def _shipped_names() -> list[str]:
    folder = resources.files("hfcompress.recipes") / "library"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def _shipped(name: str) -> Job:
    text = (resources.files("hfcompress.recipes") / "library" / f"{name}.yaml").read_text(encoding="utf-8")
    return job_from_dict(yaml.safe_load(text), name)


def load_job(recipe: str) -> Job:
    """
    Args:
        recipe (`str`): the name of a shipped recipe, a YAML file, or a folder or a Hub id of what hfcompress made.

    Raises:
        InvalidValueError: there is no such recipe, or it cannot be read.
    """
    names = _shipped_names()
    if recipe in names:
        return _shipped(recipe)
    folder = made_folder(recipe)
    if folder is not None:
        return job_of(folder)
    path = Path(recipe).expanduser()
    if os.path.isfile(path):
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InvalidValueError(f"{recipe} is not valid YAML: {reason}") from error
        return job_from_dict(document, path.stem)
    raise InvalidValueError(
        f"There is no recipe '{recipe}': no shipped recipe, no file and no folder is called so."
        f"{nearest(recipe, names) or ' `hfcompress recipes` lists the shipped ones.'}"
    )


def made_folder(recipe: str) -> Path | None:
    """
    The folder of the checkpoint that a recipe is taken from, of a Hub id one with the manifest alone; `None` for a
    recipe by name or from a YAML file.
    """
    path = Path(recipe).expanduser()
    if os.path.isdir(path):  # a name too long for a path is none, and no error
        return path
    if "/" in recipe:
        from hfcompress.models.locate import is_hub_id, locate

        if not is_hub_id(recipe):
            return None
        return locate(recipe, wanted=[MANIFEST])[0]
    return None


def job_of(folder: Path) -> Job:
    """
    The recipe that a folder was made by. Task files that it names are left out: such a file may run code, so only the
    user names one.

    Raises:
        InvalidValueError: hfcompress did not make it.
        CheckpointError: its manifest is damaged.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise InvalidValueError(f"{folder} was not made by hfcompress: it has no {MANIFEST}.")
    try:
        job = job_from_dict(manifest["recipe"], folder.name)
        named = job.evaluation.tasks
        dropped = tuple(task for task in named if Path(task).suffix or len(Path(task).parts) > 1)
        evaluation = dataclasses.replace(job.evaluation, tasks=tuple(task for task in named if task not in dropped))
        return dataclasses.replace(job, evaluation=evaluation, origin=folder, dropped_tasks=dropped)
    except InvalidValueError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged; download or copy that file again.") from error


def with_changes(job: Job, changes: list[str]) -> Job:
    """
    A job with single keys changed.

    Args:
        job (`Job`): the job.
        changes (`list[str]`): `step.key=value`, `calibration.key=value`, `evaluation.key=value` or `format=name`;
            the values are YAML.

    Raises:
        InvalidValueError: no such step or key, or a wrong value.
    """
    document = job.to_dict()
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals:
            raise InvalidValueError(f"--set {change} is not understood; write --set step.key=value.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidValueError(f"--set {change}: the value is not valid YAML.") from error
        if path == "format":
            document["format"] = value
            continue
        section, _, key = path.partition(".")
        sections = {name: step[name] for step in document["recipe"] for name in step}
        sections |= {"calibration": document["calibration"], "evaluation": document["evaluation"]}
        if sum(step.name == section for step in job.steps) > 1:
            raise InvalidValueError(
                f"--set {change}: {job.name} has several steps '{section}'; change the recipe file."
            )
        if section in sections and not key:
            raise InvalidValueError(f"--set {change} names no key of {section}; write --set {section}.key=value.")
        if section not in sections:
            known = [*sections, "format"]
            hint = nearest(section, known) or f" There are {', '.join(known)}."
            raise InvalidValueError(f"--set {change}: {job.name} has no step '{section}'.{hint}")
        *inner, last = key.split(".")
        target = sections[section]
        for part in inner:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise InvalidValueError(f"--set {change}: {section}.{part} is no mapping.")
        target[last] = value
    changed = job_from_dict(document, job.name)
    kept = {key: getattr(job, key) for key in ("description", "origin", "dropped_tasks")}
    return dataclasses.replace(changed, **kept)
