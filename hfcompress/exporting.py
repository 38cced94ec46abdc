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
`export()`: a compressed checkpoint in another format, one block in memory at a time.

How it works: every packed linear is read as codes, scales and zero points, and packed again. What a reader of the new
format will compute with is compared with what a reader of the old one does: where all values are the same, the export
is exact, and what was measured of the weights holds for it. Where they are not (scales that float16 cannot hold, values
rounded to a dense dtype), it is refused, or with `lossy` made and its loss measured. GGUF is one file, which has a
writer of its own ([`hfcompress.formats.gguf.write_gguf`]).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.calibration.tokens import load_tokens
from hfcompress.errors import HfcompressError, InvalidValueError, OutputError, UnsupportedModelError
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.embedding import turned
from hfcompress.evaluation.logits import as_read, open_streamed
from hfcompress.evaluation.quality import diverge
from hfcompress.evaluation.report import Report
from hfcompress.formats import get_format
from hfcompress.formats.dense import Dense
from hfcompress.formats.gguf import GGUF, write_called_after_type, write_gguf
from hfcompress.formats.layout import Layout
from hfcompress.formats.reading import has_codes
from hfcompress.formats.sparse24 import Sparse24
from hfcompress.formats.stored import PackedTensor
from hfcompress.formats.writer import CheckpointWriter, check_output, write_text
from hfcompress.hub.description import describe
from hfcompress.models.adapter import ADAPTER, adapter_of, has_adapter, rebased
from hfcompress.models.adapter import CONFIG as ADAPTER_CONFIG
from hfcompress.models.architecture import is_headless, must_be_unpacked
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.devices import find_device, find_dtype
from hfcompress.models.experts import ExpertLinear, find_routers
from hfcompress.models.manifest import EXPORTS, MANIFEST, read_manifest
from hfcompress.models.roles import LinearShape, find_linears, linear_shape
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.tiny import tiny_folder
from hfcompress.progress import Progress, Silent
from hfcompress.runtime.vector_cache import FILE, has_books
from hfcompress.solvers.grid import Grid, QuantizedWeight
from hfcompress.solvers.pattern import Pattern


PACKED_RUN = ("speed", "memory", "energy", "score")  # in a report: what is of the old format, or is made from it


@dataclass
class Exported:
    """
    Attributes:
        output_dir (`Path`): the checkpoint in its new format; the file, if it is one.
        made (`dict`): what `hfcompress.json` says of it under `exports`: `format`, `source_format`, `source_sha256`,
            `lossless`, `relative_weight_error`, `linears_changed`, and where it was measured `kl_mean` to the source
            in nats, with `kl_data` and `kl_tokens`, or of an encoder without a head `cosine_mean`. Of a GGUF file, instead of a `relative_weight_error`, what
            [`hfcompress.formats.gguf.write_gguf`] returns, under `gguf`.
    """

    output_dir: Path
    made: dict[str, Any]


@dataclass
class _Loss:
    """What the values of the linears lost, summed as they go by."""

    difference: float = 0.0
    whole: float = 0.0
    changed: int = 0
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, exact: Tensor, values: Tensor) -> bool:
        """Whether the values of this linear are the same."""
        same = torch.equal(exact, values)
        self.changed += not same
        self.difference += (exact - values).double().square().sum().item()
        self.whole += exact.double().square().sum().item()
        return same

    @property
    def relative(self) -> float:
        return (self.difference / self.whole) ** 0.5 if self.whole else 0.0


def export(
    model: str | Path,
    format: str,
    output_dir: str | Path | None = None,
    *,
    lossy: bool = False,
    dtype: str | None = None,
    evaluate: bool = True,
    data: Any = None,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """
    Write a compressed checkpoint in another format.

    Args:
        model (`str` or `Path`): a folder or a Hub id whose format hfcompress reads, whoever made it; for GGUF, plain
            weights too.
        format (`str`): of [`hfcompress.formats.FORMATS`].
        output_dir (`str` or `Path`, *optional*): defaults to `./MODELNAME-FORMAT`. For GGUF a name that ends in `.gguf`
            is that of the file; otherwise it is a folder with the file in it.
        lossy (`bool`, *optional*, defaults to `False`): allow values to change; the loss is measured (not that of GGUF).
        dtype (`str`, *optional*): of the weights of a dense export; the model's if not given.
        evaluate (`bool`, *optional*, defaults to `True`): measure the KL divergence of a lossy export to its source.
        data (*optional*): what that is measured on; defaults to `"bundled"`.
        overwrite (`bool`, *optional*): replace what is at `output_dir`.
        device (`str`, *optional*, defaults to `"auto"`): where it is measured.
        trust_remote_code (`bool`, *optional*): run modelling code that the repo carries.
        progress (`Progress`, *optional*): is told how far it is.

    Raises:
        HfcompressError: something the user can put right, in one sentence.
    """
    progress = progress or Silent()
    layout = get_format(format)
    checkpoint = Checkpoint.open(model, trust_remote_code=trust_remote_code)
    short = Path(checkpoint.name.partition("@")[0]).name
    output = Path(output_dir or f"{short}-{layout.name}").expanduser().absolute()
    if isinstance(layout, GGUF):
        return _export_gguf(_in_dtype(layout, dtype, checkpoint), checkpoint, output, short, lossy, overwrite)
    plain = checkpoint.quantization_config is None
    if checkpoint.folder is None or (plain and not isinstance(layout, Sparse24)):
        raise InvalidValueError(
            f"{checkpoint.name} holds plain weights, which have no codes to export; compress it with `hfcompress run`, "
            f"for instance with --set format={layout.name}."
        )
    if checkpoint.quantization_config is not None and not has_codes(checkpoint.quantization_config):
        raise UnsupportedModelError(
            f"{checkpoint.name} is quantized by {checkpoint.quantization_config.get('quant_method')}, whose codes no other "
            "format takes over; compress the original model again."
        )
    layout = _in_dtype(layout, dtype, checkpoint)
    check_output(output, resume=False, overwrite=overwrite, source=checkpoint.folder)
    streamed = open_streamed(checkpoint, "cpu", torch.float32)
    if plain:
        streamed = streamed.reading(_sparse_weights(streamed))
    packed = _packed_linears(streamed, layout)
    if not packed and not isinstance(layout, Dense):
        raise InvalidValueError(
            f"{checkpoint.name} holds the values of the original, which have no codes to export; give --format dense."
        )
    grids = {name: tensor.grid for name, tensor in packed.items()}
    check = layout.check_together if streamed.experts.together else layout.check_experts
    check({n: grids.get(n) for n, m in streamed.skeleton.named_modules() if isinstance(m, ExpertLinear)})
    config = layout.quantization_config(grids, _untouched(streamed, packed), _rounded_cache(checkpoint))
    embeddings = [name for name in packed if isinstance(streamed.skeleton.get_submodule(name), nn.Embedding)]
    if must_be_unpacked(streamed.skeleton, [n for n, grid in grids.items() if layout.of(grid).hides_weight(grid)]):
        config = layout.config_unpacked(config, grids)
    config = layout.config_with_embeddings(config, grids, embeddings)
    writer = CheckpointWriter(output)
    writer.experts = layout.storage(streamed.experts)
    if overwrite:
        writer.discard()
    writer.open()
    progress.start(len(streamed) + 1)
    try:
        loss = _write_tensors(streamed, packed, layout, writer, lossy, progress)
        _write_companions(writer, checkpoint, layout, config)
        made = Checkpoint.open(writer.result, trust_remote_code=trust_remote_code)
        said: dict[str, Any] = {
            "format": layout.name,
            "source_format": _format_of(checkpoint),
            "source_sha256": checkpoint.sha256,
            "lossless": not loss.changed,
            "relative_weight_error": loss.relative,
            "linears_changed": loss.changed,
        }
        if loss.changed and evaluate:
            said |= _divergence(made, checkpoint, data, device, progress)
        _carry_over(writer, checkpoint, made, said, loss)
        writer.finish()
    except HfcompressError:
        writer.discard()
        raise
    return Exported(output, said)


def _export_gguf(
    layout: Layout, checkpoint: Checkpoint, output: Path, name: str, lossy: bool, overwrite: bool
) -> Exported:
    """One file: `output` where its name says so, otherwise one in the folder `output`."""
    assert checkpoint.folder is not None
    if output.suffix == f".{layout.name}":
        if output.is_dir() or (output.exists() and not overwrite):
            what = "is a folder;" if output.is_dir() else "exists already; give --overwrite to replace it, or"
            raise OutputError(f"{output} {what} choose another --output.")
        written = write_gguf(checkpoint.folder, output, lossy=lossy, name=name)
    else:
        check_output(output, resume=False, overwrite=overwrite, source=checkpoint.folder)
        writer = CheckpointWriter(output)
        writer.discard()
        writer.open()
        try:
            written = write_called_after_type(checkpoint.folder, writer.result, lossy=lossy, name=name)
            writer.finish()
        except HfcompressError:
            writer.discard()
            raise
    said = {
        "format": layout.name,
        "source_format": _format_of(checkpoint),
        "source_sha256": checkpoint.sha256,
        "lossless": written["exact"],
        "linears_changed": len(written["inexact"]),
        "gguf": written,
    }
    return Exported(output, said)


def _rounded_cache(checkpoint: Checkpoint) -> str | None:
    """The type of the codes of a checkpoint's key-value cache, if it is rounded."""
    scheme = (checkpoint.quantization_config or {}).get("kv_cache_scheme")
    return None if scheme is None else scheme["type"]


def _in_dtype(layout: Layout, dtype: str | None, checkpoint: Checkpoint) -> Layout:
    """The layout; a dense one in the dtype that was asked for, or in the model's."""
    if isinstance(layout, Dense):
        stored = checkpoint.config.dtype
        default = stored if isinstance(stored, torch.dtype) else torch.float32
        return Dense(default if dtype is None else find_dtype(dtype, torch.device("cpu"), checkpoint))
    if dtype is not None:
        raise InvalidValueError(f"--dtype is for --format dense alone; {layout.name} has codes and scales of its own.")
    return layout


def _packed_linears(streamed: StreamedModel, layout: Layout) -> dict[str, PackedTensor]:
    """Module name -> packed weight, each checked against the new layout."""
    packed = {}
    for name, module in streamed.skeleton.named_modules():
        tensor = streamed.tensors.get(streamed.sources.get(f"{name}.weight", ""))
        if isinstance(module, (nn.Linear, nn.Embedding)) and isinstance(tensor, PackedTensor):
            rows, columns = tensor.shape
            layout.check_coded(name, tensor.grid)
            layout.check(LinearShape(name, columns, rows, False), tensor.grid)
            if isinstance(module, nn.Embedding):
                layout.check_embeddings(name, tensor.grid)
            packed[name] = tensor
    known = {id(tensor) for tensor in packed.values()}
    for key, tensor in streamed.tensors.items():
        if isinstance(tensor, PackedTensor) and id(tensor) not in known:
            raise UnsupportedModelError(f"{key} is packed and is no linear of this model, so it cannot be exported.")
    return packed


class _PlainWeight(PackedTensor):
    """A weight that no format has packed."""

    @property
    def dtype(self) -> torch.dtype:
        return self.parts["weight"].dtype

    def quantized(self) -> QuantizedWeight:
        values = self.parts["weight"].read()
        return QuantizedWeight(values, torch.ones(len(values), 1, dtype=values.dtype), None, self.grid)


def _sparse_weights(streamed: StreamedModel) -> dict[str, PackedTensor]:
    """
    The plain weights in the blocks that are 2:4, by their names on disk.

    Raises:
        InvalidValueError: there are none.
    """
    pattern, found = Pattern.parse("2:4"), {}
    for name in streamed.block_names:
        for linear, module in find_linears(streamed.skeleton.get_submodule(name), name).items():
            stored = streamed.tensors.get(streamed.sources.get(f"{linear}.weight", ""))
            shape = linear_shape(linear, module)
            if stored is None or shape.transposed or not pattern.fits(shape.out_features, shape.in_features):
                continue
            if pattern.holds(stored.read()):
                grid = Grid(8 * stored.dtype.itemsize, type="plain")
                found[streamed.sources[f"{linear}.weight"]] = _PlainWeight(
                    {"weight": stored}, grid, Dense(), tuple(stored.shape)
                )
    if not found:
        raise InvalidValueError(
            f"{streamed.checkpoint.name} holds no weight that is 2:4 sparse; make such a checkpoint with `hfcompress run "
            "sparse24`."
        )
    return found


def _untouched(streamed: StreamedModel, packed: dict[str, PackedTensor]) -> list[str]:
    routers = find_routers(streamed.skeleton)
    stems = [streamed.sources[f"{name}.weight"].removesuffix(".weight") for name in routers]
    linears = [n for n, m in streamed.skeleton.named_modules() if isinstance(m, nn.Linear)]
    return [name for name in dict.fromkeys([*linears, *routers, *stems]) if name not in packed]


def _write_tensors(
    streamed: StreamedModel,
    packed: dict[str, PackedTensor],
    layout: Layout,
    writer: CheckpointWriter,
    lossy: bool,
    progress: Progress,
) -> _Loss:
    names = {id(tensor): name for name, tensor in packed.items()}
    loss = _Loss()

    def converted(keys: list[str]) -> dict[str, Tensor]:
        tensors = {}
        for key in keys:
            stored = streamed.tensors[key]
            if not isinstance(stored, PackedTensor):
                tensors[key] = stored.read()
                continue
            name = names[id(stored)]
            local = _repacked(name, stored, layout, loss, lossy)
            loss.bytes[name] = sum(tensor.nbytes for tensor in local.values())
            tensors |= {f"{key.removesuffix('.weight')}.{part}": tensor for part, tensor in local.items()}
        return tensors

    for index in range(len(streamed)):
        writer.write_part(f"block-{index:05d}", converted(streamed.keys_of_block(index)))
        progress.step(f"block {index + 1} of {len(streamed)}")
    for number, key in enumerate(streamed.outside_keys):
        writer.write_part(f"outside-{number:05d}", converted([key]))
    progress.step("writing")
    writer.merge()
    return loss


def _repacked(name: str, stored: PackedTensor, layout: Layout, loss: _Loss, lossy: bool) -> dict[str, Tensor]:
    """The tensors of one linear in the new layout."""
    weight = stored.quantized()
    layout.check_values(name, weight)
    exact, values = weight.dequantize(), layout.values(weight)
    if not torch.isfinite(values).all():
        raise InvalidValueError(
            f"{layout.name} cannot hold {name}: its scales are too large for float16; choose another --format."
        )
    if not loss.add(name, exact, values) and not lossy:
        off = ((exact - values).norm() / exact.norm()).item()
        exactly = "--dtype float32 keeps them" if isinstance(layout, Dense) else "choose another --format"
        raise InvalidValueError(
            f"{layout.name} would round the values of {name} (relative error {off:.2g}); {exactly}, "
            "or give --lossy to have the loss measured."
        )
    return layout.pack(weight)


def _write_companions(writer: CheckpointWriter, checkpoint: Checkpoint, layout: Layout, config: dict | None) -> None:
    """config.json, and what belongs beside the weights."""
    assert checkpoint.folder is not None
    described = json.loads((checkpoint.folder / "config.json").read_text())
    described.pop("quantization_config", None)
    if isinstance(layout, Dense):
        described["dtype"] = str(layout.dtype).removeprefix("torch.")
    beside = [path.relative_to(checkpoint.folder) for path in sorted(checkpoint.folder.glob(f"{ADAPTER}/adapter_*"))]
    beside += [Path(FILE)] if has_books(checkpoint) else []
    for name in (*checkpoint.companions(), *beside):
        writer.copy(checkpoint.folder / name, name)
    if has_adapter(checkpoint):
        told = (adapter_of(checkpoint) / ADAPTER_CONFIG).read_text(encoding="utf-8")
        write_text(writer.result / ADAPTER / ADAPTER_CONFIG, rebased(told, str(writer.output)))
    if config is not None:
        described["quantization_config"] = config
        for name, value in layout.files(config).items():
            writer.write_json(name, value)
    writer.write_json("config.json", described)


def _format_of(checkpoint: Checkpoint) -> str:
    config = checkpoint.quantization_config or {}
    variants = (config.get("checkpoint_format"), config.get("format"), config.get("quant_method"))
    return next((str(variant) for variant in variants if variant), Dense.name)


def _divergence(made: Checkpoint, source: Checkpoint, data: Any, device: str, progress: Progress) -> dict[str, Any]:
    """KL(source || export) in nats, or the cosine where there is no head: what the export alone has lost."""
    where = find_device(device)
    tokens = load_tokens("bundled" if data is None else data, source, split="evaluation", tiny_folder=tiny_folder())
    tokens = as_read(tokens, source, where, torch.float32, 0, progress)
    comparison = Comparison(candidate=made, baseline=source, tokens=tokens, device=where, progress=progress)
    if is_headless(made.config):
        return {
            "cosine_mean": turned(comparison, tokens, "measuring the loss")["cosine_mean"],
            "kl_data": tokens.source,
        }
    found = diverge(comparison, tokens, "measuring the loss").results()
    return {"kl_mean": found["kl_mean"], "kl_data": tokens.source, "kl_tokens": found["tokens"]}


def _carry_over(
    writer: CheckpointWriter, source: Checkpoint, made: Checkpoint, said: dict[str, Any], loss: _Loss
) -> None:
    """The manifest, and with it the card; the report too where the values are the same ones that it is of."""
    manifest = read_manifest(source.folder)
    if not manifest:
        return
    manifest.pop("gguf", None)  # the file beside the old format is not taken along
    manifest |= {EXPORTS: [*manifest.get(EXPORTS, []), said], "sha256": made.sha256}
    manifest["linears"] = [
        {**row, "bytes": loss.bytes.get(row["name"], row.get("bytes"))} for row in manifest["linears"]
    ]
    writer.write_json(MANIFEST, manifest)
    report = Report.load(source.folder)
    if report is not None and said["lossless"]:
        for key in PACKED_RUN:
            report.pop(key, None)
        report["size_bytes"] = made.size_bytes
        report.get("how", {}).update(candidate_sha256=made.sha256, measured_sha256=source.sha256)
        report.save(writer.result)
    describe(writer.result, writer.output.name)
