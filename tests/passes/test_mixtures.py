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
"""A mixture of experts through the whole pass: statistics, coverage, formats, laws, and experts that go."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    CONFIGS,
    MIXTURES,
    TOGETHER,
    VOCABULARY,
    StopAfter,
    digest,
    in_fresh_process,
    make_model,
    token_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma4TextConfig

import hfcompress as hfc
from hfcompress.errors import CheckpointError, HfcompressError, InvalidValueError, UnsupportedModelError
from hfcompress.evaluation.logits import open_streamed
from hfcompress.models import fewer_experts
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.experts import ExpertLinear, Routed, find_experts, find_routers
from hfcompress.models.folds import TOLERANCE, error_of, find_folds
from hfcompress.models.roles import shared_inputs
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.experts import experts_to_keep
from hfcompress.passes.processes import Processes
from hfcompress.passes.sensitivity import Unit, _experts_together
from hfcompress.passes.statistics import SHOWN_WEIGHT, Statistics
from hfcompress.progress import Silent


CPU = torch.device("cpu")
WIDTH, ROWS, LENGTH = 12, 4, 16
CALIBRATION = token_ids(12, 32)
W4 = hfc.GPTQ(bits=4, group_size=32)


def sent(generator, share: float = 0.4, width: int = WIDTH) -> Routed:
    """What an expert is given of a batch: a share of the tokens, and every fourth."""
    total = ROWS * LENGTH
    tokens = (torch.rand(total, generator=generator) < share).nonzero()[:, 0]
    shown = torch.arange(0, total, 4)
    hidden = torch.randn(total, width, generator=generator)
    gates = torch.cat((torch.rand(len(tokens), generator=generator) + 0.1, torch.zeros(len(shown))))
    tokens = torch.cat((tokens, shown))
    return Routed(hidden[tokens], tokens, gates, total)


# what is summed


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.05, 0.5]), padded=st.booleans())
def test_the_gram_of_an_expert_is_weighed_by_its_gates_and_mixed_with_what_it_is_shown(seed, share, padded):
    generator = torch.Generator().manual_seed(seed)
    batches = [sent(generator, share) for _ in range(3)]
    masks = [torch.rand(ROWS, LENGTH, generator=generator) > 0.2 if padded else None for _ in batches]
    statistics = Statistics(WIDTH, CPU)
    for batch, mask in zip(batches, masks, strict=True):
        statistics.add(batch, mask)
    statistics.complete(Processes(CPU), "an expert")
    weighed, shown = torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64)
    mass = count = tokens = 0.0
    for batch, mask in zip(batches, masks, strict=True):
        for x, token, gate in zip(batch.inputs.double(), batch.tokens, batch.gates.double(), strict=True):
            if mask is not None and not mask.flatten()[token]:
                continue
            if gate:
                weighed, mass, tokens = weighed + gate**2 * torch.outer(x, x), mass + gate**2, tokens + 1
            else:
                shown, count = shown + torch.outer(x, x), count + 1
    k = SHOWN_WEIGHT * WIDTH
    own = weighed / mass if mass else weighed
    wanted = (tokens * own + k * shown / count) / (tokens + k)
    torch.testing.assert_close(statistics.gram.double(), wanted, rtol=1e-5, atol=1e-6)
    assert statistics.tokens == tokens


def test_a_correction_rests_on_the_tokens_that_both_models_send_to_the_expert():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = sent(generator), sent(generator)
    statistics = Statistics(WIDTH, CPU, cross=True)
    statistics.add(mine, None, theirs, torch.tensor([False, False, True, True]))
    statistics.complete(Processes(CPU), "an expert")
    cross, mass, tokens = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0.0, 0
    held, held_mass = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0.0
    dense = {t.item(): x for t, x, g in zip(theirs.tokens, theirs.inputs.double(), theirs.gates, strict=True) if g}
    for x, token, gate in zip(mine.inputs.double(), mine.tokens, mine.gates.double(), strict=True):
        if gate:
            own = gate**2 * torch.outer(dense.get(token.item(), x) - x, x)
            cross, mass, tokens = cross + own, mass + gate**2, tokens + 1
            if token >= 2 * LENGTH:
                held, held_mass = held + own, held_mass + gate**2
    k = SHOWN_WEIGHT * WIDTH
    torch.testing.assert_close(statistics.cross.double(), cross / mass * tokens / (tokens + k), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(statistics.held_out.cross.double(), held / held_mass, rtol=1e-4, atol=1e-6)


# the whole pass

LOGITS = """
import json, sys, numpy as np, torch
if sys.argv[4]:
    __import__(sys.argv[4])
from transformers import AutoModelForCausalLM, Gemma4TextConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.from_numpy(np.load(sys.argv[2]))).logits
np.save(sys.argv[3], logits.numpy())
print("{}")
"""


@torch.no_grad()
def both_logits(folder, tmp_path, plugin: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Of plain transformers in a fresh process, and of our own reader."""
    ids = token_ids(2, 24, seed=3)
    np.save(tmp_path / "ids.npy", ids)
    arguments = [str(folder), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy"), plugin]
    in_fresh_process(LOGITS, *arguments, forbid=None if plugin else "hfcompress")
    streamed = open_streamed(Checkpoint.open(folder), "cpu", torch.float32)
    [stream] = streamed.forward_blocks(streamed.embed([Batch(torch.from_numpy(ids))]))
    with streamed.outside(head=True) as outside:
        return torch.from_numpy(np.load(tmp_path / "logits.npy")), streamed.logits(outside, stream)


PLUGIN = "hfcompress.integrations.transformers"
JOBS = {
    "w4": (hfc.Job(steps=(W4,)), ""),
    "dense": (hfc.Job(steps=(hfc.GPTQ(bits=3, group_size=32, shift=1.0, curvature=True),), format="dense"), ""),
    "attention-8": (
        hfc.Job(
            steps=(
                hfc.RTN(bits=8, group_size=32, targets=("re:.*self_attn.*",)),
                hfc.GPTQ(bits=4, group_size=32, targets=("re:.*[.]experts[.].*",)),
            )
        ),
        "",
    ),
    "sparse24": (hfc.Job(steps=(hfc.Sparsify("2:4"),), format="sparse24"), PLUGIN),
    "sparse24-w4": (hfc.Job(steps=(hfc.Sparsify("2:4"), W4), format="sparse24"), PLUGIN),
    "entropy": (hfc.Job(steps=(hfc.Entropy(bits=3.0),), format="hfcompress"), PLUGIN),
    "codebook": (hfc.Job(steps=(hfc.Codebook(bits=3),), format="hfcompress"), PLUGIN),
    "vectors": (hfc.Job(steps=(hfc.VQ(bits=2.0),), format="hfcompress"), PLUGIN),
    "products": (hfc.Job(steps=(hfc.LowRank(ratio=0.8),), format="hfcompress"), PLUGIN),
    "leaning": (hfc.Job(steps=(hfc.Share(blocks=0.4, rank=8),), format="hfcompress"), PLUGIN),
    "some experts": (
        hfc.Job(steps=(hfc.Entropy(bits=3.0, ignore=("re:.*experts[.]1[.].*",)),), format="hfcompress"),
        PLUGIN,
    ),
}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("kind", JOBS)
def test_what_is_saved_of_a_mixture_is_what_was_solved(tmp_path, name, kind):
    model = make_model(MIXTURES[name](), torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    job, plugin = JOBS[kind]
    result = hfc.compress(str(tmp_path / "model"), job, tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    theirs, ours = both_logits(tmp_path / "out", tmp_path, plugin)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2 if kind in ("w4", "attention-8") else 1e-4)
    with torch.no_grad():
        dense = model.float()(input_ids=torch.from_numpy(token_ids(2, 24, seed=3))).logits
    assert (
        1e-4
        < (theirs - dense).abs().mean()
        < (0.6 if "sparse" in kind or kind == "leaning" else 0.4) * dense.abs().mean()
    )
    dense_blocks = 1 if kind == "attention-8" and name == "qwen3-moe" else 0  # without experts, which nobody asked for
    coverage = result.manifest["coverage"]
    if kind != "some experts":
        assert coverage["compressed"] == coverage["linears"] - 1 - 3 * dense_blocks
    assert all(
        row["sparsity"] < (0.95 if kind in ("entropy", "some experts") else 0.7) for row in result.manifest["linears"]
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_calibrated_experts_beat_rounded_ones(tmp_path, name):
    model = make_model(MIXTURES[name](), torch.bfloat16)
    losses = {}
    for label, step in {"rtn": hfc.RTN(bits=3, group_size=32), "gptq": hfc.GPTQ(bits=3, group_size=32)}.items():
        result = hfc.compress(
            model, step, tmp_path / label, calibration=token_ids(48, 32), eval_data=token_ids(8, 32, seed=9)
        )
        losses[label] = result.report["kl_mean"]
    assert losses["gptq"] < 0.8 * losses["rtn"], losses


@pytest.mark.parametrize("step", [W4, hfc.Sparsify("2:4")], ids=["gptq", "sparsify"])
def test_an_expert_that_no_token_is_sent_to_is_solved_and_counted(tmp_path, step):
    model = make_model(MIXTURES["deepseek-v3"](), torch.bfloat16)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[0] = -10.0
    model.save_pretrained(tmp_path / "model")
    result = hfc.compress(
        str(tmp_path / "model"),
        hfc.Job(steps=(step,), format="dense"),
        tmp_path / "out",
        calibration=CALIBRATION,
        evaluate=False,
    )
    experts = result.manifest["experts"]
    assert (experts["count"], experts["unseen"], experts["fewest"]) == (16, 2, 0)
    rows = {row["name"]: row for row in result.manifest["linears"]}
    stored, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "model"))
    for index in (1, 2):
        for number, local in ((n, local) for n in range(8) for local in ("gate_proj", "up_proj", "down_proj")):
            row = rows[f"model.layers.{index}.mlp.experts.{number}.{local}"]
            assert (row["tokens"] == 0) == (number == 0)
            assert ("no calibration token was sent" in (row["fallback"] or "")) == (number == 0)
            key = f"{row['name']}.weight"
            near = torch.nn.functional.cosine_similarity(*(t[key].float().flatten() for t in (stored, whole)), dim=0)
            assert near > 0.8  # neither zero nor noise
    assert result.manifest["fallbacks"] == 6


def test_routers_stay_as_they_are_and_are_named_to_readers(tmp_path):
    model = make_model(MIXTURES["qwen2-moe"](), torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    result = hfc.compress(str(tmp_path / "model"), W4, tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    stored, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "model"))
    routers = [key for key in whole if key.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))]
    assert len(routers) == 6
    assert all(torch.equal(stored[key], whole[key]) for key in routers)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {key.removesuffix(".weight") for key in routers} < set(ignored)
    assert set(result.manifest["skipped"]) == {key.removesuffix(".weight") for key in routers if "shared" in key}


def test_experts_of_mixtral_keep_the_names_that_it_has_on_disk(tmp_path):
    model = make_model(MIXTURES["mixtral"](), torch.bfloat16)
    hfc.compress(model, W4, tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed" in stored
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"} < set(ignored)


@pytest.mark.parametrize("suspended", [True, False])
def test_a_mixture_stopped_and_resumed_is_the_same(tmp_path, run_in, suspended):
    run_in(suspended)
    make_model(MIXTURES["mixtral"](), torch.bfloat16).save_pretrained(tmp_path / "model")
    recipe = hfc.GPTQ(bits=3, group_size=32, shift=1.0, curvature=True)
    arguments = {"calibration": CALIBRATION, "evaluate": False}
    hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "whole", **arguments)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "out", progress=StopAfter(2), **arguments)
    hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "out", resume=True, **arguments)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_halted_and_repeated_forwards_solve_experts_alike(tmp_path, run_in):
    model = make_model(MIXTURES["qwen3-moe"](), torch.bfloat16)
    for suspended in (True, False):
        run_in(suspended)
        hfc.compress(model, W4, tmp_path / str(suspended), calibration=CALIBRATION, evaluate=False)
    assert digest(tmp_path / "True") == digest(tmp_path / "False")


@pytest.mark.parametrize(
    "step",
    [
        hfc.AWQ(grid=3, rows=3) >> W4,
        W4 >> hfc.Tune(iterations=4),
        hfc.GPTQ(bits=3, group_size=32) >> hfc.QAT(epochs=1, held_out=4),
        hfc.Sparsify("unstructured", ratios="owl"),
        hfc.Budget(target_bits=5.0, choices=("4g32", "8g32")) >> hfc.GPTQ(),
    ],
    ids=["awq", "tune", "qat", "owl", "budget"],
)
def test_other_steps_take_experts_as_any_linear(tmp_path, step):
    model = make_model(MIXTURES["mixtral"](), torch.bfloat16)
    arguments = {"calibration": token_ids(16, 32), "eval_data": token_ids(4, 32, seed=9)}
    result = hfc.compress(model, step, tmp_path / "out", **arguments)
    assert result.report["kl_mean"] < 0.05
    assert result.manifest["coverage"]["compressed"] >= 48


# what is refused

REFUSED = {
    "some experts dense": (
        hfc.Job(steps=(hfc.RTN(group_size=32, ignore=("re:.*experts[.]1[.].*",)),)),
        "would stay dense",
    ),
    "two grids": (
        hfc.Job(steps=(hfc.RTN(bits=4, group_size=32, overrides={"w2": {"bits": 8}}),)),
        "those of this recipe are on 2 grids",
    ),
    "zero points": (hfc.Job(steps=(hfc.RTN(group_size=32, symmetric=False),)), "reads experts with zero points"),
    "rounded inputs": (hfc.Job(steps=(hfc.RTN(bits=8, group_size=-1, activations="dynamic"),)), "with rounded inputs"),
    "gptq": (hfc.Job(steps=(hfc.RTN(group_size=32),), format="gptq"), "gptq has no place for the experts"),
    "ffn": (hfc.Job(steps=(hfc.Prune(ffn=0.5),)), "name prune.experts"),
    "adapter": (hfc.Job(steps=(W4, hfc.LoRA())), "PEFT then knows by no name"),
    "nf4": (hfc.Job(steps=(hfc.BitsAndBytes(),)), "bitsandbytes then passes over"),
    "too many": (
        hfc.Job(steps=(hfc.Prune(experts=0.9),)),
        "sent to 2 of the 4 experts of a block, so that at least 2 must stay; give at most 0.5",
    ),
    "too few": (hfc.Job(steps=(hfc.Prune(experts=0.1),)), "give at least 0.25"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_done_to_a_mixture_is_said_before_any_work(tmp_path, kind):
    job, reason = REFUSED[kind]
    model = make_model(MIXTURES["mixtral"](), torch.bfloat16)
    with pytest.raises(HfcompressError, match=reason):
        hfc.compress(model, job, tmp_path / "out", calibration=token_ids(64, 32), evaluate=False)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_no_experts_to_prune(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"is no mixture of experts; leave prune\.experts out"):
        hfc.compress(make_model(CONFIGS["llama"]()), hfc.Prune(experts=0.5), tmp_path / "out", calibration=CALIBRATION)


def test_an_unknown_share_of_experts_is_refused():
    with pytest.raises(InvalidValueError, match=r"prune\.experts is 1\.5"):
        hfc.Prune(experts=1.5)


# experts that go


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_with_fewer_experts_is_an_ordinary_model(tmp_path, name):
    model = make_model(MIXTURES[name](), torch.bfloat16)
    whole = StreamedModel(Checkpoint.open(model))
    result = hfc.compress(model, hfc.Prune(experts=0.5), tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    theirs, ours = both_logits(tmp_path / "out", tmp_path)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before = 4 if name == "mixtral" else 8
    assert result.manifest["pruning"]["experts"] == {"before": before, "after": before // 2}
    assert loaded.num_parameters() == result.manifest["pruning"]["parameters"]["after"] < model.num_parameters()
    kept = experts_to_keep(whole, before // 2, [Batch(torch.from_numpy(CALIBRATION))], Processes(CPU), Silent())
    for holder, places in kept.items():
        was, now = model.get_submodule(holder), loaded.get_submodule(holder)
        assert torch.equal(now.gate_up_proj, was.gate_up_proj[places].float())
        gate = holder.replace("experts", "gate")
        assert torch.equal(loaded.get_submodule(gate).weight, model.get_submodule(gate).weight[places].float())


@torch.no_grad()
def test_the_experts_that_go_are_those_that_add_least(tmp_path):
    model = make_model(MIXTURES["mixtral"]())
    for index, layer in enumerate(model.model.layers):
        layer.mlp.experts.down_proj[index] *= 1e-3
        layer.mlp.experts.down_proj[3] *= 1e-2
    hfc.compress(model, hfc.Prune(experts=0.5), tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    kept = {f"model.layers.{index}.mlp.experts": [n for n in range(3) if n != index] for index in range(3)}
    found = experts_to_keep(
        StreamedModel(Checkpoint.open(model)), 2, [Batch(torch.from_numpy(CALIBRATION))], Processes(CPU), Silent()
    )
    assert found == kept


def test_experts_blocks_and_bits_go_together_and_a_run_goes_on(tmp_path):
    make_model(MIXTURES["deepseek-v3"](), torch.bfloat16).save_pretrained(tmp_path / "model")
    recipe = hfc.Prune(experts=0.5, depth=0.34) >> hfc.GPTQ(group_size=32)
    arguments = {"calibration": CALIBRATION, "evaluate": False}
    result = hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "whole", **arguments)
    assert result.manifest["pruning"]["experts"] == {"before": 8, "after": 4}
    assert result.manifest["pruning"]["blocks"] == {"before": 3, "after": 2}
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "out", progress=StopAfter(1), **arguments)
    hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "out", resume=True, **arguments)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


# what is said where a mixture is not as others are


def opened_mixtral() -> StreamedModel:
    return StreamedModel(Checkpoint.open(make_model(MIXTURES["mixtral"]())))


def test_blocks_with_different_numbers_of_experts_are_refused():
    model = opened_mixtral()
    model.skeleton.get_submodule("model.layers.0.mlp.experts").num_experts = 3
    with pytest.raises(UnsupportedModelError, match="has blocks with different numbers of experts"):
        fewer_experts.experts_of(model)


def test_a_configuration_that_does_not_say_how_many_experts_there_are_is_refused():
    model = opened_mixtral()
    for holder in find_experts(model.skeleton).values():
        holder.num_experts = 5
    with pytest.raises(UnsupportedModelError, match="does not say how many experts there are"):
        fewer_experts.expert_changes(model, 2)


def test_a_model_that_transformers_does_not_build_is_refused(monkeypatch):
    model, config = opened_mixtral(), MIXTURES["mixtral"]()
    monkeypatch.setattr(fewer_experts, "changed_config", lambda *_: config)
    with pytest.raises(UnsupportedModelError, match="has 4 experts whatever num_local_experts says"):
        fewer_experts.expert_changes(model, 2)

    def refuse(*_):
        raise ValueError("two are too few")

    monkeypatch.setattr(fewer_experts, "changed_config", refuse)
    with pytest.raises(UnsupportedModelError, match=r"cannot be built with 2 experts \(two are too few\)"):
        fewer_experts.expert_changes(model, 2)


def test_a_tensor_that_depends_on_the_number_of_experts_otherwise_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight depends on the number of experts in a way"):
        fewer_experts._fitting(opened_mixtral(), "model.norm.weight", {"model.norm.weight": torch.empty(2)}, None, 4)


def test_experts_of_which_something_is_missing_are_not_loaded(tmp_path):
    model = make_model(MIXTURES["mixtral"](), torch.bfloat16)
    job = hfc.Job(steps=(hfc.Entropy(bits=3.0),), format="hfcompress")
    hfc.compress(model, job, tmp_path / "out", calibration=CALIBRATION, evaluate=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    streamed = open_streamed(Checkpoint.open(tmp_path / "out"), "cpu", torch.float32)
    with pytest.raises(CheckpointError, match="'weight' is missing beside"):
        streamed.tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"].read()


def test_experts_that_have_no_choice_in_common_are_told():
    names = [f"model.layers.0.mlp.experts.0.{local}" for local in ("w1", "w2")]
    units = [
        Unit((name,), {choice: {name: torch.ones(2)}}) for name, choice in zip(names, ("4g32", "8g32"), strict=True)
    ]
    with pytest.raises(InvalidValueError, match="The experts share a choice, but have none in common"):
        _experts_together(units, opened_mixtral())


# factors


@pytest.mark.parametrize("name", [*MIXTURES, *TOGETHER])
def test_a_norm_takes_factors_to_all_that_it_feeds(name):
    streamed = StreamedModel(Checkpoint.open(make_model({**MIXTURES, **TOGETHER}[name]())))
    probe = streamed.embed([Batch(torch.from_numpy(token_ids(4, 8)))])[0]
    index = len(streamed) - 1
    for other in range(index):
        with streamed.block(other) as block:
            probe = probe.advanced(streamed.call(block, other, probe))
    with streamed.block(index) as block:
        groups = shared_inputs(streamed, block, index, probe)
        folds, alone = find_folds(streamed, block, index, probe, groups)
        [fold] = [fold for fold in folds if fold.joined]
        assert error_of(streamed, block, index, probe, fold) <= TOLERANCE
        experts = [n for n, m in streamed.skeleton.named_modules() if isinstance(m, ExpertLinear)]
        read = [
            n
            for n in experts
            if n.startswith(f"{streamed.block_names[index]}.") and not n.endswith((".w2", ".down_proj"))
        ]
        assert set(read) <= set(fold.consumers)
        assert not set(fold.consumers) & {n for group in alone for n in group}
        routers = [n for n in find_routers(streamed.skeleton) if n.startswith(f"{streamed.block_names[index]}.")]
        assert sorted(fold.routers) == sorted(routers)
        without = replace(fold, routers=())
        assert error_of(streamed, block, index, probe, without) > 100 * TOLERANCE


def test_a_router_that_reads_another_norm_is_left_alone(tmp_path):
    config = Gemma4TextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=16, pad_token_id=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=32, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    model = make_model(config, torch.bfloat16)
    job = hfc.Job(steps=(hfc.AWQ(grid=4), hfc.RTN(bits=3, group_size=32)), format="dense")
    manifest = hfc.compress(model, job, tmp_path / "out", calibration=CALIBRATION, evaluate=False).manifest
    told = [
        pair
        for pair in manifest["folds"]
        if any(".experts." in name and "gate_proj" in name for name in pair["consumers"])
    ]
    assert len(told) == 3
    assert all(len(pair["consumers"]) == 2 * 4 for pair in told)
    theirs, ours = both_logits(tmp_path / "out", tmp_path)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_factors_help_experts_and_their_router_keeps_up(tmp_path):
    model = make_model(MIXTURES["mixtral"](), torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[:4] *= 12.0  # channels that are large where experts read them
    model.save_pretrained(tmp_path / "model")
    losses = {}
    for label, step in {
        "rtn": hfc.RTN(bits=3, group_size=32),
        "awq": hfc.AWQ() >> hfc.RTN(bits=3, group_size=32),
    }.items():
        data = {"calibration": token_ids(32, 32), "eval_data": token_ids(8, 32, seed=9)}
        result = hfc.compress(str(tmp_path / "model"), step, tmp_path / label, **data)
        losses[label] = result.report["kl_mean"]
    moved = [pair for pair in result.manifest["folds"] if pair["producer"].endswith("post_attention_layernorm")]
    assert len(moved) == 3
    assert any(pair["gain"] > 0 for pair in moved)
    assert losses["awq"] < 0.9 * losses["rtn"], losses
    theirs, ours = both_logits(tmp_path / "awq", tmp_path)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2)
    stored, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("awq", "model"))
    assert not all(
        torch.equal(stored[key], whole[key]) for key in whole if key.endswith("block_sparse_moe.gate.weight")
    )
