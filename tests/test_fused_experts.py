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
"""Mixtures whose experts lie together on disk: read one by one, solved as any others, written as transformers finds them."""

import json

import numpy as np
import pytest
import torch
from conftest import MIXTURES, TOGETHER, StopAfter, digest, in_fresh_process, make_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.evaluation.logits import open_streamed
from hfcompress.formats.mxfp4 import E2M1
from hfcompress.integrations.transformers import StoredExperts
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.experts import ExpertLinear
from hfcompress.models.fused_experts import Fused
from hfcompress.models.streaming import StreamedModel


CALIBRATION = token_ids(12, 32)
W4 = hfc.GPTQ(bits=4, group_size=32)
IDS = token_ids(2, 24, seed=3)
PLUGIN = "hfcompress.integrations.transformers"

LOGITS = """
import json, sys
import numpy as np
import torch
if sys.argv[4]:
    __import__(sys.argv[4])
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    np.save(sys.argv[3], model(input_ids=torch.from_numpy(np.load(sys.argv[2]))).logits.numpy())
print(json.dumps({}))
"""


def of_transformers(folder, tmp_path, plugin: str = "") -> torch.Tensor:
    """Logits of plain transformers in a fresh process."""
    np.save(tmp_path / "ids.npy", IDS)
    arguments = [str(folder), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy"), plugin]
    in_fresh_process(LOGITS, *arguments, forbid=None if plugin else "hfcompress")
    return torch.from_numpy(np.load(tmp_path / "logits.npy"))


def of_ours(folder) -> torch.Tensor:
    streamed = open_streamed(Checkpoint.open(folder), "cpu", torch.float32)
    [stream] = streamed.forward_blocks(streamed.embed([Batch(torch.from_numpy(IDS))]))
    with streamed.outside(head=True) as outside:
        return streamed.logits(outside, stream)


def saved(name, folder, dtype=torch.bfloat16):
    make_model(TOGETHER[name](), dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", TOGETHER)
def test_a_model_read_one_expert_at_a_time_says_what_it_said(name, tmp_path):
    model = make_model(TOGETHER[name]())
    model.save_pretrained(tmp_path / "model")
    streamed = StreamedModel(Checkpoint.open(tmp_path / "model"))
    assert streamed.experts.together
    linears = [n for n, m in streamed.skeleton.named_modules() if isinstance(m, ExpertLinear)]
    assert len(linears) == 3 * 4 * 3
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(IDS)).logits
    torch.testing.assert_close(of_ours(tmp_path / "model"), theirs, rtol=0, atol=1e-5)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    joined = streamed.experts.join(streamed.experts.split(stored))
    assert joined.keys() == stored.keys()
    assert all(torch.equal(joined[key], stored[key]) for key in stored)


JOBS = {
    "dense": (hfc.Job(steps=(hfc.GPTQ(bits=3, group_size=32, shift=1.0, curvature=True),), format="dense"), ""),
    "pruned": (hfc.Job(steps=(hfc.Prune(experts=0.5), hfc.Sparsify("2:4")), format="dense"), ""),
    "shallow": (hfc.Job(steps=(hfc.Prune(depth=0.34),)), ""),
    "entropy": (hfc.Job(steps=(hfc.Entropy(bits=3.0),), format="hfcompress"), PLUGIN),
    "codebook": (hfc.Job(steps=(hfc.Codebook(bits=3),), format="hfcompress"), PLUGIN),
    "vectors": (hfc.Job(steps=(hfc.VQ(bits=2.0),), format="hfcompress"), PLUGIN),
    "products": (hfc.Job(steps=(hfc.LowRank(ratio=0.5),), format="hfcompress"), PLUGIN),
    "leaning": (hfc.Job(steps=(hfc.Share(blocks=0.4, rank=8),), format="hfcompress"), PLUGIN),
    "attention-8": (hfc.Job(steps=(hfc.RTN(bits=8, group_size=32, ignore=("re:.*experts.*",)),)), ""),
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("kind", JOBS)
def test_what_is_saved_is_what_was_solved(name, kind, tmp_path):
    base = saved(name, tmp_path / "model")
    job, plugin = JOBS[kind]
    result = hfc.compress(base, job, tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    theirs, ours = of_transformers(tmp_path / "out", tmp_path, plugin), of_ours(tmp_path / "out")
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2 if kind == "attention-8" else 2e-4)
    dense = of_ours(base)
    most = {"pruned": 1.0, "shallow": 1.5, "products": 1.0, "leaning": 1.0}.get(kind, 0.5)
    assert 1e-4 < (theirs - dense).abs().mean() < most * dense.abs().mean()
    experts = [row for row in result.manifest["linears"] if ".experts." in row["name"]]
    assert len(experts) == {"attention-8": 0, "pruned": 18, "shallow": 0}.get(kind, 36)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    apart = [key for key in stored if ".experts.1." in key]
    assert bool(apart) == (job.format == "hfcompress")
    if not apart and kind != "pruned":
        before = load_file(tmp_path / "model" / "model.safetensors")
        assert {key for key in before if "experts" in key} >= {key for key in stored if "experts" in key}


def test_the_forecast_of_the_size_is_exact(tmp_path):
    base = saved("gpt-oss", tmp_path / "model")
    job = hfc.Job(steps=(W4,), format="dense")
    forecast = hfc.plan(base, job, calibration=CALIBRATION).output_bytes
    hfc.compress(base, job, tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    assert forecast == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_calibrated_experts_beat_rounded_ones(tmp_path):
    base, losses = saved("gpt-oss", tmp_path / "model"), {}
    for label, step in {"rtn": hfc.RTN(bits=3, group_size=32), "gptq": hfc.GPTQ(bits=3, group_size=32)}.items():
        job = hfc.Job(steps=(step,), format="dense")
        data = {"calibration": token_ids(48, 32), "eval_data": token_ids(8, 32, seed=9)}
        losses[label] = hfc.compress(base, job, tmp_path / label, **data).report["kl_mean"]
    assert losses["gptq"] < 0.8 * losses["rtn"], losses


@pytest.mark.parametrize("suspended", [True, False])
def test_a_run_stopped_and_resumed_is_the_same(tmp_path, run_in, suspended):
    run_in(suspended)
    base = saved("gpt-oss", tmp_path / "model")
    job = hfc.Job(steps=(hfc.GPTQ(bits=3, group_size=32),), format="dense")
    arguments = {"calibration": CALIBRATION, "evaluate": False}
    hfc.compress(base, job, tmp_path / "whole", **arguments)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(base, job, tmp_path / "out", progress=StopAfter(2), **arguments)
    hfc.compress(base, job, tmp_path / "out", resume=True, **arguments)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_training_puts_back_what_it_has_changed(tmp_path):
    base = saved("gpt-oss", tmp_path / "model")
    job = hfc.Job(steps=(hfc.Codebook(bits=2), hfc.QAT(epochs=1, held_out=4)), format="hfcompress")
    hfc.compress(base, job, tmp_path / "out", calibration=token_ids(16, 32), evaluate=False)
    theirs = of_transformers(tmp_path / "out", tmp_path, PLUGIN)
    torch.testing.assert_close(theirs, of_ours(tmp_path / "out"), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["entropy", "codebook"])
def test_codes_are_exported_as_plain_weights_that_transformers_finds(kind, tmp_path):
    hfc.compress(
        saved("gpt-oss", tmp_path / "model"), JOBS[kind][0], tmp_path / "out", calibration=CALIBRATION, evaluate=False
    )
    hfc.export(tmp_path / "out", "dense", tmp_path / "dense", dtype="float32", evaluate=False)
    theirs = of_transformers(tmp_path / "dense", tmp_path)
    torch.testing.assert_close(theirs, of_ours(tmp_path / "out"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt-oss", "mixtral"])
def test_what_loses_nothing_loses_nothing_of_experts(name, tmp_path):
    model = make_model({**TOGETHER, **MIXTURES}[name](), torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    hfc.compress(str(tmp_path / "model"), "lossless", tmp_path / "out", evaluate=False)
    theirs = of_transformers(tmp_path / "out", tmp_path, PLUGIN)
    assert torch.equal(theirs, of_transformers(tmp_path / "model", tmp_path))


def test_experts_of_two_parts_of_a_model_are_kept_apart(tmp_path):
    """And those that are called otherwise on disk are found by their numbers."""
    names = [f"{part}.layers.0.experts.{number}.up_proj.weight" for part, number in (("a", 0), ("a", 2), ("b", 1))]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    stored = StoredExperts()
    stored.read([str(tmp_path / "model.safetensors")])
    assert stored.experts_with("a.layers.0.experts", "up_proj", "weight") == [0, 2]
    assert stored.experts_with("b.layers.0.experts", "up_proj", "weight") == [1]
    assert stored.experts_with("model.layers.0.mlp.experts", "up_proj", "weight") == [0, 1, 2]
    assert stored.experts_with("model.layers.1.mlp.experts", "up_proj", "weight") == []


# what they are read from


def test_experts_held_together_may_be_written_apart_where_transformers_merges_them(tmp_path):
    model = make_model(MIXTURES["qwen3-moe"](), torch.bfloat16)
    model.save_pretrained(tmp_path / "apart")
    model.save_pretrained(tmp_path / "together")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "together" / "model.safetensors", metadata={"format": "pt"})
    for folder in ("apart", "together"):
        hfc.compress(str(tmp_path / folder), W4, tmp_path / f"{folder}-w4", calibration=CALIBRATION, evaluate=False)
    first, second = (load_file(tmp_path / f"{each}-w4" / "model.safetensors") for each in ("apart", "together"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    both=st.booleans(),
    transposed=st.booleans(),
    interleaved=st.booleans(),
    bias=st.booleans(),
)
def test_parts_and_the_whole_are_each_other(seed, sizes, both, transposed, interleaved, bias):
    experts, rows, columns = sizes
    parts = ("gate_proj.weight", "up_proj.weight") if both else ("down_proj.weight",)
    own = (rows * len(parts),) if bias else (rows * len(parts), columns)
    shape = (experts, *(own[::-1] if transposed and not bias else own))
    fused = Fused("mlp.experts.some", "mlp.experts.some", shape, parts, transposed and not bias, interleaved and both)
    held = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = [[fused.part(entry, number) for number in range(len(parts))] for entry in held]
    assert all(fused.is_part(part) for own in found for part in own)
    assert torch.equal(fused.whole(found), held)
    if both and not bias:  # by hand, one row after the other
        matrix = held[0].T if transposed else held[0]
        up = matrix[1::2] if interleaved else matrix[rows:]
        assert torch.equal(found[0][1], up)
    if not bias and len(set(shape[1:])) == 2:  # as others have stored it
        turned = [[fused.part(entry.T, number) for number in range(len(parts))] for entry in held]
        assert torch.equal(fused.whole(turned), held)


def as_mxfp4(folder):
    """The weights of gpt-oss as it is published; in place of the model's own."""
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = torch.randint(
            0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"{key}_scales"] = torch.randint(
            120, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path):
    base = saved("gpt-oss", tmp_path / "model")
    as_mxfp4(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        said = theirs(input_ids=torch.from_numpy(IDS)).logits
    torch.testing.assert_close(of_ours(base), said, rtol=0, atol=1e-4)
    streamed = open_streamed(Checkpoint.open(base), "cpu", torch.float32)
    part = streamed.tensors["model.layers.1.mlp.experts.2.up_proj.weight"].read()
    whole = theirs.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert torch.equal(part, whole[2].detach()[:, 1::2].T.float())
    assert set((part.abs() / 2.0 ** torch.floor(torch.log2(part.abs().clamp(min=1e-9)))).unique().tolist()) <= {
        1.0,
        1.5,
        0.0,
    }
    assert E2M1.max() == 6


def test_an_mxfp4_model_is_compressed_block_by_block(tmp_path):
    base = saved("gpt-oss", tmp_path / "model")
    as_mxfp4(tmp_path / "model")
    data = {"calibration": CALIBRATION, "eval_data": token_ids(4, 32, seed=9)}
    result = hfc.compress(base, hfc.Job(steps=(hfc.Entropy(bits=3.0),), format="hfcompress"), tmp_path / "out", **data)
    assert 0 < result.report["kl_mean"] < 0.1
    theirs = of_transformers(tmp_path / "out", tmp_path, PLUGIN)
    torch.testing.assert_close(theirs, of_ours(tmp_path / "out"), rtol=0, atol=2e-2)


DAMAGES = {
    "nan": (lambda t: t["model.layers.0.mlp.experts.gate_up_proj_scales"].fill_(255), "gate_up_proj_scales holds NaN"),
    "short": (
        lambda t: t.update({k: v[:, :8].contiguous() for k, v in t.items() if k.endswith("layers.0.mlp.experts.gate_up_proj_scales")}),
        r"gate_up_proj_scales is \(4, 8, 2\), and there are \(4, 64, 2\) blocks",
    ),
    "fewer": (
        lambda t: t.update({k: v[:3].contiguous() for k, v in t.items() if "layers.0.mlp.experts.gate_up_proj_" in k}),
        "holds 3 experts, and config.json says 4",
    ),
    "narrow": (
        lambda t: t.update({k: v[:, :32].contiguous() for k, v in t.items() if k.endswith(("0.mlp.experts.gate_up_proj_blocks", "0.mlp.experts.gate_up_proj_scales"))}),
        r"has \[64, 32\] for an expert, and \[64, 64\] are needed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_told(name, tmp_path):
    base = saved("gpt-oss", tmp_path / "model")
    as_mxfp4(tmp_path / "model")
    damage, message = DAMAGES[name]
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        hfc.compress(
            base, hfc.Job(steps=(W4,), format="dense"), tmp_path / "out", calibration=CALIBRATION, evaluate=False
        )
    assert not (tmp_path / "out").exists()


# what is refused


@pytest.mark.parametrize("layout", ["compressed-tensors", "sparse24", "gptq"])
def test_formats_whose_readers_would_not_find_experts_are_refused(layout, tmp_path):
    step = hfc.Sparsify("2:4") if layout == "sparse24" else hfc.RTN(group_size=32)
    with pytest.raises(
        InvalidValueError, match=r"only together with the others in one tensor, and .* has no place for that"
    ):
        hfc.compress(
            make_model(TOGETHER["gpt-oss"]()),
            hfc.Job(steps=(step,), format=layout),
            tmp_path / "out",
            calibration=CALIBRATION,
        )


def test_experts_that_are_computed_in_a_way_of_their_own_are_refused(monkeypatch):
    model = make_model(TOGETHER["granite-moe"]())
    checkpoint = Checkpoint.open(model)
    wrapped = type(model.model.layers[0].block_sparse_moe.experts)
    original = wrapped.__init__

    def with_norm(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.has_post_expert_norm = True

    monkeypatch.setattr(wrapped, "__init__", with_norm)
    with pytest.raises(UnsupportedModelError, match="computes them in a way of its own, which is not supported yet"):
        StreamedModel(checkpoint)
