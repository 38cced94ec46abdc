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
"""`evaluate()` and `compare()`: what a checkpoint lost against its base, and which of several lost least for its size."""

import contextlib
import tempfile
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfcompress.calibration.tokens import load_tokens
from hfcompress.errors import InvalidValueError, UnsupportedModelError
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.logits import as_read
from hfcompress.evaluation.measure import QUALITY, TASKS, check, chosen, measure, tasks_of, units
from hfcompress.evaluation.plots import pareto_front
from hfcompress.evaluation.report import Report
from hfcompress.formats.dense_view import dense_view
from hfcompress.hub.description import describe
from hfcompress.models.architecture import is_headless
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.devices import find_device, find_dtype
from hfcompress.models.manifest import base_of, read_manifest
from hfcompress.models.tiny import tiny_folder
from hfcompress.progress import Progress, Silent
from hfcompress.recipes import job_from_dict


COLUMNS = (
    "size_bytes",
    "baseline_size_bytes",
    "kl_mean",
    "kl_mean_stderr",
    "perplexity",
    "baseline_perplexity",
    "top1_agreement",
)


def evaluate(
    model: "str | Path | PreTrainedModel",
    baseline: "str | Path | PreTrainedModel | None" = None,
    data: Any = None,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    measurements: Iterable[str] | None = None,
    tasks: Iterable[str] = (),
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    teacher_cache: str | Path | None = None,
    save: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """
    Measure a checkpoint against the one that it was made from.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): what is measured.
        baseline (*optional*): defaults to the base that the model's manifest names, else the bundled tiny model.
        data (*optional*): a source as in a recipe, or token ids; defaults to `"bundled"`.
        samples (`int`, *optional*): rows.
        seq_len (`int`, *optional*): tokens per row.
        measurements (`Iterable[str]`, *optional*, defaults to `("quality",)`): of
            [`hfcompress.evaluation.measure.MEASUREMENTS`], or `"all"`.
        tasks (`Iterable[str]`, *optional*): lm-eval tasks, by name or by the path of a YAML file; asks for the
            measurement `tasks`.
        limit (`int`, *optional*): documents per task.
        seed (`int`, *optional*, defaults to 0): of everything that is drawn.
        device (`str`, *optional*): where.
        dtype (`str`, *optional*, defaults to `"float32"`): of the arithmetic.
        teacher_cache (`str` or `Path`, *optional*): a folder in which the baseline's log-probabilities are kept, so
            that they are computed once for any number of candidates.
        save (`bool`, *optional*): put what was measured into the folder's `eval_results.json`, and draw its plots, its
            report and its card anew.
        trust_remote_code (`bool`, *optional*): run modelling code that the repo carries.
        progress (`Progress`, *optional*): is told how far it is.

    Returns:
        [`Report`]: the contents of `eval_results.json`.

    Raises:
        HfcompressError: something the user can put right, in one sentence.
    """
    progress = progress or Silent()
    tasks = tuple(tasks)
    names = [measurements] if isinstance(measurements, str) else list(measurements or [QUALITY])
    if tasks and TASKS not in chosen(names):
        names.append(TASKS)
    candidate = Checkpoint.open(model, trust_remote_code=trust_remote_code)
    saved = _require_savable(candidate) if save else None
    if saved is not None and "perplexity" not in saved and QUALITY not in chosen(names):
        names.append(QUALITY)  # what the card and the gate rest on
    original = _original(baseline or base_of(candidate.folder), trust_remote_code)
    comparison = _comparison(candidate, original, data, samples, seq_len, device, dtype, progress)
    comparison = replace(
        comparison,
        seed=seed,
        tasks=tasks_of(names, tasks),
        limit=limit,
        teacher_cache=None if teacher_cache is None else Path(teacher_cache),
    )
    if saved is not None:
        _require_same(comparison, saved)
    check(comparison, names)
    progress.start(units(comparison, names))
    report = measure(comparison, names)
    if saved is None or candidate.folder is None:
        return report
    report = saved.updated(report)
    report["score"] = report.composite_score(job_from_dict(comparison.manifest["recipe"]).evaluation.score)
    report.save(candidate.folder)
    describe(candidate.folder, candidate.folder.name)
    return report


def compare(
    models: Sequence[str | Path],
    baseline: "str | Path | None" = None,
    data: Any = None,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    teacher_cache: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """
    Several candidates against one baseline: size and divergence of each, and which are on the Pareto front. What a
    folder's own report already says of the same baseline and the same text is taken from there.

    Args:
        models (`Sequence[str]`): folders or Hub ids.
        baseline (*optional*): defaults to the base that the first one's manifest names.
        teacher_cache (`str` or `Path`, *optional*): as in [`evaluate`]; the baseline is evaluated once in any case.

    Returns:
        `list[dict]`: for every candidate `name`, `size_bytes`, `baseline_size_bytes`, `kl_mean`, `kl_mean_stderr`,
        `perplexity`, `baseline_perplexity`, `top1_agreement`, `on_front` and `measured` (now, or read from its
        report), in order of size.
    """
    progress = progress or Silent()
    candidates = [Checkpoint.open(model, trust_remote_code=trust_remote_code) for model in models]
    original = _original(baseline or base_of(candidates[0].folder), trust_remote_code)
    common = _comparison(candidates[0], original, data, samples, seq_len, device, dtype, progress)
    for candidate in candidates:
        if is_headless(candidate.config):
            raise UnsupportedModelError(
                f"{candidate.name} is an encoder without a head, so that it has no divergence to compare; use hfcompress eval."
            )
    known = [_known(candidate, common) for candidate in candidates]
    progress.start(sum(units(common, [QUALITY]) for report in known if report is None))
    rows: list[dict[str, Any]] = []
    with _cache(teacher_cache) as cache:
        for candidate, report in zip(candidates, known, strict=True):
            measured = report is None
            if report is None:
                report = measure(replace(common, candidate=candidate, teacher_cache=cache), [QUALITY])
            name = candidate.folder.name if candidate.folder and not candidate.revision else candidate.name
            rows.append({"name": name, **{key: report[key] for key in COLUMNS}, "measured": measured})
    front = set(pareto_front([(row["size_bytes"], row["kl_mean"]) for row in rows]))
    for index, row in enumerate(rows):
        row["on_front"] = index in front
    return sorted(rows, key=lambda row: row["size_bytes"])


def _require_savable(candidate: Checkpoint) -> Report:
    """The report that a folder has so far, which may be empty."""
    if not read_manifest(candidate.folder):
        raise InvalidValueError(f"{candidate.name} was not made by hfcompress, so nothing can be saved in it.")
    if candidate.revision is not None:
        raise InvalidValueError(
            f"{candidate.name} is a copy in the Hub's cache, which must stay as it is; "
            f"download it into a folder first: hf download {candidate.name.partition('@')[0]} --local-dir FOLDER."
        )
    return Report.load(candidate.folder) or Report()


def _require_same(comparison: Comparison, saved: Report) -> None:
    """What goes into a folder's report is of its own base, and of the text that is in the report already."""
    if comparison.baseline_sha256 != comparison.manifest["base"]["sha256"]:
        raise InvalidValueError(
            f"{comparison.baseline.name} is not what {comparison.candidate.name} was made from, "
            "so what is measured against it cannot be saved there; leave out --save."
        )
    before = saved.get("how", {})
    if before.get("data_sha256", comparison.tokens.sha256) != comparison.tokens.sha256:
        raise InvalidValueError(
            f"The report in {comparison.candidate.name} is of other text ({before['data']}, {before['rows']} rows of "
            f"{before['seq_len']}); measure on that, or leave out --save."
        )


def _known(candidate: Checkpoint, common: Comparison) -> Report | None:
    """The candidate's own report, if it says the same as a measurement now would."""
    report = Report.load(candidate.folder)
    if report is None:
        return None
    now = {
        "data_sha256": common.tokens.sha256,
        "baseline_sha256": common.baseline_sha256,
        "dtype": str(common.dtype).removeprefix("torch."),
        "device": common.device.type,
        "candidate_sha256": candidate.sha256,
    }
    same = all(report.get("how", {}).get(key) == value for key, value in now.items())
    return report if same and all(key in report for key in COLUMNS) else None


@contextlib.contextmanager
def _cache(folder: str | Path | None) -> Generator[Path]:
    """The folder that was given, or one that is gone afterwards."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="hfcompress-teacher-") as temporary:
        yield Path(temporary)


def _original(model: Any, trust_remote_code: bool) -> Checkpoint:
    return Checkpoint.open(model, trust_remote_code=trust_remote_code, unpack=dense_view)


def _comparison(candidate, original, data, samples, seq_len, device, dtype, progress) -> Comparison:
    where = find_device(device)
    tokens = load_tokens(
        data if data is not None else "bundled",
        original,
        split="evaluation",
        samples=samples,
        seq_len=seq_len,
        tiny_folder=tiny_folder(),
    )
    if tokens.note:
        progress.note(tokens.note)
    arithmetic = find_dtype(dtype or "float32", where, original)
    tokens = as_read(tokens, original, where, arithmetic, 0, progress)
    return Comparison(
        candidate=candidate,
        baseline=original,
        tokens=tokens,
        device=where,
        dtype=arithmetic,
        progress=progress,
    )
