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
The model card: what was done, what it cost, how to load it, how to get it again.

Everything in it comes from the folder's manifest and report, so it can be written again at any time. The text lies in
`templates/card.md.jinja`; this module gathers what it needs.
"""

from collections import Counter
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfcompress.calibration.tokens import BUNDLED, GIVEN
from hfcompress.evaluation.limits import ENCODER, SEES, STATES, limits
from hfcompress.evaluation.numbers import embedding_rows, number, percent, plus_minus, size
from hfcompress.formats import get_format
from hfcompress.formats.writer import disk_errors, write_text
from hfcompress.hub.base_card import forbids_derivatives
from hfcompress.hub.published import is_local, published
from hfcompress.hub.reload import Reload
from hfcompress.models.manifest import ANY_BITS, EXPORTS, HUB, distinct_bits, format_of, is_plain
from hfcompress.models.manifest import BUNDLED as BUNDLED_BASE
from hfcompress.solvers.pattern import UNSTRUCTURED


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

METHODS = {
    "distill": "distilled from the original",
    "gptq": "GPTQ",
    "lora": "corrected by a low-rank product",
    "prune": "refitted to what is left",
    "qat": "quantization-aware training",
    "rtn": "round to nearest",
    "sparsify": "weights set to zero",
}
PRUNED = {
    "blocks": "blocks",
    "hidden": "coordinates of the residual stream",
    "ffn": "feed-forward channels in each block",
    "heads": "heads in each block",
    "experts": "experts in each block",
}
HEARD = {
    "live": "the original's predictions",
    "top_k": "the original's most probable tokens",
    "sampled": "tokens drawn from the original",
}
SPEECH = "AutoModelForSpeechSeq2Seq"
BOTH = "AutoModelForSeq2SeqLM", SPEECH  # an encoder and a decoder
TASKS = {
    ENCODER: "fill-mask",
    **dict.fromkeys(STATES, "feature-extraction"),
    SEES: "image-text-to-text",
    **dict(zip(BOTH, ("text2text-generation", "automatic-speech-recognition"), strict=True)),
}  # by the class that loads; otherwise text
LIBRARIES = ("bitsandbytes", "torchao")  # that write their own format
INPUTS = {
    "dynamic": ", inputs rounded to 8 bits by a scale per token",
    "static": ", inputs rounded to 8 bits by one stored scale",
}
PICTURES = (
    *("size_kl", "budget", "layer_errors", "kl_histogram"),
    *("bits_by_layer", "robustness", "explain_blocks", "stability"),
)
SERVED = ("compressed-tensors", "pack-quantized", "gguf", "gptq", "awq")
METRICS = {
    "perplexity": "perplexity",
    "kl_mean": "KL divergence to the base model, mean (nats per token)",
    "kl_p99": "KL divergence to the base model, 99th percentile (nats per token)",
    "top1_agreement": "most likely token the same as the base model's",
}
# lm-eval task -> (data set, its task) of the benchmarks that the Hub has registered; others stay in the card's table
REGISTERED = {
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro"),
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "gpqa_diamond"),
}


def write_card(
    folder: Path,
    manifest: dict[str, Any],
    report: dict[str, Any],
    name: str,
    repo_id: str | None = None,
    pictures: dict[str, str] | None = None,
    reload: Reload | None = None,
) -> None:
    """Write `README.md`, and `.eval_results` for registered benchmarks, into a checkpoint's folder."""
    manifest, report = published(manifest, report)
    write_text(folder / "README.md", str(make_card(manifest, report, name, repo_id, pictures, reload)))
    for file, text in benchmark_files(manifest, report).items():
        with disk_errors(folder):
            (folder / ".eval_results").mkdir(exist_ok=True)
        write_text(folder / ".eval_results" / file, text)


def make_card(
    manifest: dict[str, Any],
    report: dict[str, Any],
    name: str,
    repo_id: str | None = None,
    pictures: dict[str, str] | None = None,
    reload: Reload | None = None,
) -> "ModelCard":
    """
    Args:
        manifest (`dict`): what `hfcompress.json` holds.
        report (`dict`): what `eval_results.json` holds; empty where nothing was measured.
        name (`str`): the model's name.
        repo_id (`str`, *optional*): where it will lie on the Hub; the snippets then name it.
        pictures (`dict[str, str]`, *optional*): name -> caption of those in `plots/`.
        reload (`Reload`, *optional*): what the check before the push has found.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = manifest["base"]
    carried = base.get("card", {})
    base_model = base["model"].partition("@")[0] if base.get("kind") == HUB else None
    data = ModelCardData(
        base_model=base_model,
        language=carried.get("language"),
        library_name="transformers",
        license=carried.get("license"),
        license_name=carried.get("license_name"),
        license_link=carried.get("license_link"),
        model_name=name,
        pipeline_tag=carried.get("pipeline_tag", TASKS.get(manifest.get("loaded_by"), "text-generation")),
        tags=_tags(manifest),
        eval_results=_eval_results(manifest, report) or None,
    )
    if base_model:
        data["base_model_relation"] = "finetune" if is_plain(manifest) else "quantized"
    pictures = pictures or {}
    template = resources.files("hfcompress.hub") / "templates" / "card.md.jinja"
    return ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        name=name,
        source=repo_id or name,
        base=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else base["model"],
        revision=base["revision"],
        manifest=manifest,
        report=report,
        rows=_quality_rows(report),
        tasks=_task_rows(report),
        cost=_cost_rows(report),
        groups=_groups(manifest),
        limits=limits(manifest, report),
        pictures={key: pictures[key] for key in PICTURES if key in pictures},
        calibration=_calibration(manifest),
        again=_again(manifest),
        data=_data_name(report.get("how", {}).get("data", "")),
        recipe=yaml.safe_dump(manifest["recipe"], sort_keys=False).strip(),
        layout=format_of(manifest),
        loader=manifest.get("loaded_by", "AutoModelForCausalLM"),
        states=manifest.get("loaded_by") in STATES,
        encoder=manifest.get("loaded_by") == ENCODER,
        speech=manifest.get("loaded_by") == SPEECH,
        cached=bool(manifest.get("cache_vectors")),
        packages=_packages(manifest),
        plugin=_plugin(manifest),
        exports=manifest.get(EXPORTS, []),
        what=_what(manifest),
        trained=_trained(manifest),
        adapter=(training := manifest.get("training") or {}).get("step") == "lora" and not training["merged"],
        dequantize="CompressedTensorsConfig"
        if format_of(manifest) == "compressed-tensors" and not is_plain(manifest)
        else None,
        rest_is_original=training.get("step") != "distill" and "hidden" not in manifest.get("pruning", {}),
        pruned=_taken_out(manifest),
        reload=reload,
        no_derivatives=forbids_derivatives(carried.get("license")),
        served=_served(manifest),
        number=number,
        percent=percent,
        plus_minus=plus_minus,
        size=size,
    )


def benchmark_files(manifest: dict[str, Any], report: dict[str, Any]) -> dict[str, str]:
    """File name -> YAML for `.eval_results`: whole runs of registered benchmarks only."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    tasks = report.get("tasks", {})
    for task, score in tasks.get("scores", {}).items():
        if task in REGISTERED and tasks["how"].get("limit") is None:
            dataset, task_id = REGISTERED[task]
            entry = EvalResultEntry(
                dataset_id=dataset,
                task_id=task_id,
                value=round(100 * score["compressed"], 2),
                date=manifest["finished"][:10],
                notes=f"{_weights(manifest)}, lm-eval {tasks['how'].get('lm_eval', '')}".strip(),
            )
            files[f"{task}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def _data_name(source: str) -> str:
    return "text bundled with hfcompress" if source == BUNDLED else source


def _again(manifest: dict[str, Any]) -> str:
    """The options that a reader elsewhere has to give: what the recipe took from the machine that it was run on."""
    base, calibration = manifest["base"], manifest["calibration"]
    options = ""
    if base.get("kind") not in (HUB, BUNDLED_BASE):
        options += f" --model {Path(base['model']).name}"
    if calibration is not None and (is_local(calibration["data"]) or calibration["data"] == GIVEN):
        options += f" --calibration {calibration['data'].replace(' ', '-')}"
    return options


def _bits(manifest: dict[str, Any]) -> str:
    return "/".join(f"{bits:g}" for bits in distinct_bits(manifest["linears"]))


def _trained(manifest: dict[str, Any]) -> str | None:
    """How a student was distilled or a correction trained, if one was."""
    training = manifest.get("training") or {}
    if training.get("step") not in ("distill", "lora"):
        return None
    heard = HEARD[training.get("signal", "live")]
    if "teacher" in training:
        heard = f"the most probable tokens of {training['teacher']}"
    start, best = (number(training[key], 3) for key in ("held_out_kl_start", "held_out_kl"))
    learned = "every weight"
    if training["step"] == "lora":
        start = number(training["held_out_kl_without"], 3)
        learned = f"{number(training['parameters'])} numbers of corrections of rank {training['rank']}"
        learned += ", merged into the weights," if training["merged"] else ", in the folder adapter,"
    return (
        f"{learned} trained on {heard}, {number(training['steps'])} steps on {number(training['rows'])} rows: on "
        f"{number(training['held_out_rows'])} rows beside them the KL went from {start} to {best} (step "
        f"{training['best_step']})"
    )


def _student(manifest: dict[str, Any]) -> str:
    """`as small-model has learned it`; empty where the student is what other steps have left."""
    if "student" in manifest:
        return f"as {manifest['student']['model']} has learned it"
    settings = next((step["distill"] for step in manifest["recipe"]["recipe"] if "distill" in step), {})
    made = settings.get("student")
    if made is None:
        return ""
    if "every" in made:
        return f"as one of {made['every']} of its blocks have learned it"
    sizes = " and ".join(f"{key} {value}" for key, value in made.items())
    return f"as a model of its architecture with {sizes} has learned it"


def _what(manifest: dict[str, Any]) -> str:
    """`cut to 3 of its 4 blocks, with 28 of its 29 linears in 4-bit weights`."""
    cut = _left(manifest)
    said = [f"cut to {' and '.join(cut)}"] if cut else []
    if student := _student(manifest):
        said.append(student)
    if not (said and is_plain(manifest)):
        coverage = manifest["coverage"]
        embeddings = " and its embeddings" if manifest.get("embeddings") else ""
        said.append(
            f"with {coverage['compressed']} of its {coverage['linears']} linears{embeddings} in {_weights(manifest)}"
        )
    if (manifest.get("training") or {}).get("step") == "distill" and not student:
        said.append("trained on its predictions")
    return ", ".join(said)


def _left(manifest: dict[str, Any]) -> list[str]:
    """What is left of each dimension that was pruned."""
    pruning = manifest.get("pruning", {})
    return [
        f"{pruning[key]['after']} of its {pruning[key]['before']} {noun}"
        for key, noun in PRUNED.items()
        if key in pruning
    ]


def _taken_out(manifest: dict[str, Any]) -> list[str]:
    pruning = manifest.get("pruning")
    if not pruning:
        return []
    taken = [
        f"{pruning[key]['before'] - pruning[key]['after']} of {pruning[key]['before']} {noun}"
        for key, noun in PRUNED.items()
        if key in pruning
    ]
    sizes = pruning["parameters"]
    said = [f"{', '.join(taken)}; {number(sizes['after'])} of {number(sizes['before'])} parameters are left"]
    if "latency" in pruning:
        said.append(
            f"a block of such shapes was timed while it was made: a token takes {pruning['latency']['after']:.0%} of the "
            "original's time"
        )
    return said


def _weights(manifest: dict[str, Any]) -> str:
    """`4-bit weights`, `2:4-sparse weights`, `2:4-sparse 4-bit weights`."""
    patterns = "/".join(sorted({row["pattern"] for row in manifest["linears"] if row.get("pattern")}))
    sparse = patterns and f"{patterns} " if patterns == UNSTRUCTURED else patterns and f"{patterns}-"
    words = [f"{sparse}sparse"] if patterns else []
    words += [] if is_plain(manifest) else [f"{_bits(manifest)}-bit"]
    return " ".join([*words, "weights"])


def _tags(manifest: dict[str, Any]) -> list[str]:
    methods = sorted({method for row in manifest["linears"] for method in row["method"].split("+")})
    rows = [row for row in manifest["linears"] if row.get("type") != "plain"]
    bits = distinct_bits(rows)
    ways = [
        (8 if rounded else 16, [row for row in rows if _rounds_inputs(row) is rounded]) for rounded in (True, False)
    ]
    kinds = sorted({f"w{b:g}a{inputs}" for inputs, own in ways for b in distinct_bits(own)})
    fp8 = ["fp8"] if any(row.get("type") == "float" for row in rows) else []
    # GPTQ and the libraries are a method and a format: one tag
    layout = format_of(manifest)
    family = layout if layout in LIBRARIES else get_format(layout).quant_method
    named = [] if family is None or family in methods else [family]
    named += ["gguf"] if "gguf" in manifest else []
    sparse = sorted({row["pattern"] for row in manifest["linears"] if row.get("pattern")})
    return [
        "hfcompress",
        *methods,
        *(["sparse", *sparse] if sparse else []),
        *named,
        *[f"{b:g}-bit" for b in bits],
        *kinds,
        *fp8,
    ]


def _packages(manifest: dict[str, Any]) -> tuple[str, ...]:
    """What a reader has to install beside transformers."""
    layout = format_of(manifest)
    return (layout,) if layout in LIBRARIES else get_format(layout).packages


def _plugin(manifest: dict[str, Any]) -> str | None:
    """The module that teaches the format to transformers, where that is needed."""
    layout = format_of(manifest)
    return None if layout in LIBRARIES else get_format(layout).plugin


def _rounds_inputs(row: dict[str, Any]) -> bool:
    return row.get("activations", "none") != "none"


def _groups(manifest: dict[str, Any]) -> list[str]:
    """`28 linears: GPTQ, 4 bits, groups of 128, symmetric`."""
    keys = ("method", "pattern", "bits", "group_size", "symmetric", "type", "activations")
    named = [{**row, "embeddings": row["name"] == manifest.get("embeddings")} for row in manifest["linears"]]
    named = [row | ({"bits": None} if row.get("type") in ANY_BITS else {}) for row in named]
    kinds = Counter(tuple(row.get(key) for key in ("embeddings", *keys)) for row in named)
    groups = []
    for (embeddings, method, pattern, bits, group, symmetric, kind, inputs), count in kinds.most_common():
        whose = "embeddings" if embeddings else f"{count} linears"
        methods = " and ".join(METHODS.get(part, part) for part in str(method).split("+"))
        told = f"{bits or 0:g} bits{' (E4M3)' if kind == 'float' else ''}"
        if kind in ANY_BITS:
            told = _bits_of_any([row for row in manifest["linears"] if row.get("type") == kind])
        scales = ["one scale per row" if group == -1 else f"groups of {group}"]
        scales += ["symmetric" if symmetric else "with zero points"]
        scales = {
            "plain": [],
            "coded": ["a step for each row and column"],
            "codebook": ["levels of each row"],
            "vector": [f"vectors of {group}"],
            "factors": ["products of two factors"],
        }.get(str(kind), scales)
        details = [*([f"pattern {pattern}"] if pattern else []), told, *scales]
        groups.append(f"{whose}: {', '.join([methods, *details])}{INPUTS.get(inputs, '')}")
    if vectors := manifest.get("cache_vectors"):
        groups.append(
            f"keys and values: {vectors['bits']} bits in vectors of {8 // vectors['bits']}, in a `VectorCache`"
        )
    if cache := manifest.get("kv_cache"):
        codes = "E4M3" if cache == "float" else "integers"
        groups.append(f"keys and values: 8 bits ({codes}), one scale each per attention")
    return groups


def _bits_of_any(rows: list[dict[str, Any]]) -> str:
    """`1 to 3.7 bits, 2.2 on average`."""
    least, most = (f"{edge(row['bits'] for row in rows):.3g}" for edge in (min, max))
    [mean] = distinct_bits(rows)
    return f"{mean:g} bits" if least == most else f"{least} to {most} bits, {mean:g} on average"


def _calibration(manifest: dict[str, Any]) -> str | None:
    found = manifest["calibration"]
    if found is None:
        return None
    return (
        f"{found['samples']} rows of {found['seq_len']} tokens from {_data_name(found['data'])}"
        f"{' and what the model itself says to it' if found.get('own_output') else ''}, seed {found['seed']}, "
        f"sha256 `{found['sha256'][:16]}`"
    )


def _served(manifest: dict[str, Any]) -> bool:
    """
    Whether vLLM documents that it reads this: without an encoder, packed, 8 bits or plain, without zero points, of caches E4M3 alone,
    and the embeddings as they were.
    """
    if manifest.get("loaded_by") in BOTH:
        return False
    if manifest.get("kv_cache") == "int" or (manifest.get("embeddings") and format_of(manifest) != "dense"):
        return False
    layout = format_of(manifest)
    symmetric = all(row["symmetric"] for row in manifest["linears"])
    return layout == "dense" or (layout in SERVED and symmetric and _bits(manifest) in ("4", "8", "4/8"))


def _eval_results(manifest: dict[str, Any], report: dict[str, Any]) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    results, kind = [], TASKS.get(manifest.get("loaded_by"), "text-generation")
    if "perplexity" in report:
        where = [(report, _data_name(report["how"]["data"]))]
        if "out_of_domain" in report:
            where.append((report["out_of_domain"], report["out_of_domain"]["data"]))
        for found, data in where:
            for metric, label in METRICS.items():
                results.append(
                    EvalResult(
                        task_type=kind,
                        dataset_type=data,
                        dataset_name=data,
                        metric_type=metric,
                        metric_name=label,
                        metric_value=found[metric],
                    )
                )
    for task, score in report.get("tasks", {}).get("scores", {}).items():
        task = Path(task).stem
        results.append(
            EvalResult(
                task_type=kind,
                dataset_type=task,
                dataset_name=task,
                metric_type=score["metric"],
                metric_value=score["compressed"],
            )
        )
    return results


def _quality_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What is compared, the original's, this model's, and the recovery or the difference."""
    rows = []
    if "perplexity" not in report:
        texts = (report, ""), (report.get("out_of_domain"), ", other domain")
        return [
            (f"{label}{where}", "", value, "")
            for found, where in texts
            for label, value in embedding_rows(found or {})
        ]
    helped = report.get("with_adapter")
    label = "" if helped is None else f", with the adapter of {size(helped['adapter_bytes'])}"
    coded = report.get("with_cache")
    cached = (
        "" if coded is None else f", cache of {coded['bytes']:,} instead of {coded['dense_bytes']:,} bytes a token"
    )
    others = (helped, label), (coded, cached), (report.get("out_of_domain"), ", other domain")
    for found, where in ((report, ""), *others):
        if not found:
            continue
        difference = found.get("log_perplexity_difference")
        rows.append(
            (
                f"perplexity{where}",
                number(found["baseline_perplexity"], 5),
                number(found["perplexity"], 5),
                f"{plus_minus(difference, found.get('log_perplexity_difference_stderr'))} nats per token",
            )
        )
        divergence = plus_minus(found["kl_mean"], found.get("kl_mean_stderr"))
        tail = f"median {number(found['kl_median'], 3)}, 99 % below {number(found['kl_p99'], 3)}"
        rows.append((f"KL to the original{where}", "0", f"{divergence} nats", tail))
        agreement = percent(found["top1_agreement"], 4, found.get("top1_agreement_stderr"))
        rows.append((f"same most likely token{where}", "100 %", agreement, ""))
    return rows


def _task_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for task, score in report.get("tasks", {}).get("scores", {}).items():
        recovery = score.get("recovery")
        rows.append(
            (
                f"{Path(task).stem} ({score['metric']})",
                plus_minus(score["baseline"], score.get("baseline_stderr")),
                plus_minus(score["compressed"], score.get("compressed_stderr")),
                "" if recovery is None else percent(recovery, 4),
            )
        )
    mean = report.get("tasks", {}).get("recovery")
    if mean is not None and len(rows) > 1:
        rows.append(("**average recovery**", "", "", f"**{percent(mean, 4)}**"))
    return rows


def _cost_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    if "size_bytes" in report:
        rows.append(_ratio_row("weights on disk", report["baseline_size_bytes"], report["size_bytes"], size))
    speed, memory, energy = (report.get(key) for key in ("speed", "memory", "energy"))
    if speed:
        for batch in speed["baseline"]["batches"]:
            theirs = speed["baseline"]["batches"][batch]
            for key, label in (("decode", "decoding"), ("prefill", "reading a prompt")):
                value = f"{key}_tokens_per_second"
                for ours, how in _loaded(speed):
                    named = f"tokens/s {label}, batch {batch}{how}"
                    rows.append(_ratio_row(named, theirs[value], ours["batches"][batch][value], number))
    if memory:
        for key, label in (("at_rest_bytes", "memory at rest"), ("peak_bytes", "peak memory while generating")):
            rows += [
                _ratio_row(f"{label}{how}", memory["baseline"][key], ours[key], size) for ours, how in _loaded(memory)
            ]
    if energy:
        estimated = " (estimate)" if energy["how"]["source"] == "estimate" else ""
        key = "joules_per_token"
        rows.append(
            _ratio_row(f"joules per token{estimated}", energy["baseline"][key], energy["compressed"][key], number)
        )
    return rows


def _loaded(found: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """What was measured of the compressed model, and how it was loaded if not by transformers."""
    sides = {"compressed": "", "packed": ", by `hfcompress.load`"}
    return [(found[side], how) for side, how in sides.items() if side in found]


def _ratio_row(label: str, theirs: float, ours: float, shown) -> tuple[str, str, str, str]:
    return (label, shown(theirs), shown(ours), f"{number(ours / theirs, 3)} times" if theirs else "")
