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
The report as one HTML file that needs nothing else: tables, pictures, and what both models wrote.

How it works: a template of the package holds the page and its few lines of script and style; it writes its values by
filters, from here and from [`hfcompress.evaluation.numbers`]. Names and generated texts come from models and data sets and are not trusted: the
template escapes everything, and the page's content security policy names the hashes of its own script and style, so that
a browser runs no other and fetches nothing.
"""

import base64
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfcompress.evaluation.limits import limits
from hfcompress.evaluation.numbers import embedding_rows, number, percent, plus_minus, ratio, size, sort_key, span
from hfcompress.formats.writer import disk_errors
from hfcompress.models.manifest import distinct_bits


TEMPLATE = "report.html.jinja"
MEASUREMENTS = ("tasks", "speed", "memory", "energy", "robustness", "stability", "explain")
SHOWN = {  # what has a place of its own on the page
    *("perplexity", "baseline_perplexity", "log_perplexity_difference", "log_perplexity_difference_stderr"),
    *("cosine_mean", "cosine_stderr", "cosine_min", "embedding_cosine_mean", "embedding_cosine_min"),
    *("likeness_change", "likeness_spread", "rows"),
    *("kl_mean", "kl_mean_stderr", "kl_median", "kl_p99", "kl_max", "kl_histogram"),
    *("top1_agreement", "top1_agreement_stderr", "rms_probability_change", "tokens"),
    *(
        "size_bytes",
        "baseline_size_bytes",
        "out_of_domain",
        "with_adapter",
        "with_cache",
        "how",
        "score",
        "skipped",
        *MEASUREMENTS,
    ),
}


def write(
    path: Path,
    manifest: dict[str, Any],
    report: dict[str, Any],
    plots: dict[str, Path],
    generations: list[dict[str, Any]] | None = None,
) -> None:
    """
    Write the page; it is there whole or not at all. See [`render`] for the arguments.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    html = render(manifest, report, plots, generations)
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, path)


def render(
    manifest: dict[str, Any],
    report: dict[str, Any],
    plots: dict[str, Path],
    generations: list[dict[str, Any]] | None = None,
) -> str:
    """
    Args:
        manifest (`dict`): what `hfcompress.json` holds; may be empty.
        report (`dict`): what `eval_results.json` holds; any part of it may be missing.
        plots (`dict[str, Path]`): the PNG files of [`hfcompress.evaluation.plots.draw`] by name.
        generations (`list[dict]`, *optional*): `prompt`, `baseline` and `compressed` of each; defaults to those of the
            report's `stability`.

    Returns:
        `str`: the HTML.
    """
    if generations is None:
        generations = (report.get("stability") or {}).get("generations") or []
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            manifest=manifest,
            report=report,
            pictures={name: Picture(path) for name, path in plots.items()},
            generations=[Generation.of(found) for found in generations],
            limits=limits(manifest, report),
            embedding=embedding_rows(report),
            missing={name: (report.get("skipped") or {}).get(name) for name in MEASUREMENTS if not report.get(name)},
            rest={key: value for key, value in report.items() if key not in SHOWN},
            title=title(manifest, report),
            method=method(manifest),
        )
    )


@functools.cache
def _environment():
    """For a report of which any part may be missing: so is whatever is asked of it, and a null is as good as nothing."""
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    class Missing(ChainableUndefined):
        def __call__(self, *args, **kwargs):
            return self

    class Forgiving(Environment):
        def getattr(self, obj, attribute):
            found = super().getattr(obj, attribute)
            return self.undefined(name=attribute) if found is None else found

        def getitem(self, obj, argument):
            found = super().getitem(obj, argument)
            return self.undefined(name=str(argument)) if found is None else found

    environment = Forgiving(
        loader=PackageLoader("hfcompress.evaluation"),
        autoescape=True,
        undefined=Missing,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "size": size,
        "percent": percent,
        "plus_minus": plus_minus,
        "ratio": ratio,
        "span": span,
        "sort_key": sort_key,
        "brief": brief,
        "words": words,
        "called": called,
        "yaml": as_yaml,
        "csp_hash": csp_hash,
    }
    return environment


class Picture:
    """A PNG file as a `data:` URI, with its size in pixels and the sentence that it carries."""

    def __init__(self, path: Path):
        from PIL import Image

        with Image.open(path) as image:
            self.width, self.height = image.size
            self.caption = image.info.get("Description", path.stem.replace("_", " "))
        self.uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Generation:
    """What both models wrote after a prompt, and how many characters of it are alike from the beginning."""

    prompt: str
    baseline: str
    compressed: str
    alike: int

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Generation":
        """From a report's, which holds texts, or token ids where there was no tokenizer."""
        texts = [found.get(key) or "" for key in ("prompt", "baseline", "compressed")]
        prompt, *pair = (t if isinstance(t, str) else " ".join(map(str, t)) for t in texts)
        different = (i for i, (one, other) in enumerate(zip(*pair, strict=False)) if one != other)
        return cls(prompt, *pair, alike=next(different, min(map(len, pair))))


# words


def words(key: Any) -> str:
    """A key of a report as words."""
    return str(key).replace("_", " ")


def brief(value: Any, most: int = 8) -> str:
    """A setting on one line; of a long list, its length."""
    if isinstance(value, list) and len(value) > most:
        return f"{len(value):,} values"
    if value in ([], {}):
        return "none"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return number(value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return called(value)


def as_yaml(value: Any) -> str:
    """As it would be written in a recipe."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip()


def called(name: Any) -> str:
    """A name as others may see it: of a local path the last part."""
    return Path(str(name)).name if Path(str(name)).is_absolute() else str(name)


def title(manifest: dict[str, Any], report: dict[str, Any]) -> str:
    """The original's name."""
    return called((manifest.get("base") or {}).get("model") or (report.get("how") or {}).get("baseline") or "a model")


def method(manifest: dict[str, Any]) -> str:
    """What was done, in words: `gptq, 4 bits, groups of 128, 28 of 29 linears`."""
    rows = manifest.get("linears") or []
    if not rows:
        return ""

    def kinds(key: str) -> list:
        return sorted({row[key] for row in rows if row.get(key) is not None})

    groups = ["one scale a row" if group == -1 else f"groups of {group}" for group in kinds("group_size")]
    bits = " and ".join(f"{each:g}" for each in distinct_bits(rows))
    inputs = ["8-bit inputs"] if set(kinds("activations")) - {"none"} else []
    cache = ["8-bit keys and values"] if manifest.get("kv_cache") else []
    coverage = manifest.get("coverage") or {}
    linears, compressed = coverage.get("linears"), coverage.get("compressed", len(rows))
    covered = f"{compressed} of {linears} linears" if linears else f"{len(rows)} linears"
    covered += " and the embeddings" if manifest.get("embeddings") else ""
    patterns = [f"pattern {pattern}" for pattern in kinds("pattern")]
    return ", ".join(
        [*kinds("method"), *patterns, *([f"{bits} bits"] if bits else []), *groups, *inputs, *cache, covered]
    )


def csp_hash(text: str) -> str:
    """The source expression by which a content security policy allows this very text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()}'"
