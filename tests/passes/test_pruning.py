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

import copy
import json

import numpy as np
import pytest
import torch
from conftest import CONFIGS, in_fresh_process, make_model, token_ids
from transformers import AutoModelForCausalLM, GemmaConfig

import hfcompress as hfc
from hfcompress.errors import InvalidValueError, OutputError, UnsupportedModelError
from hfcompress.formats.writer import partial_path
from hfcompress.models.checkpoint import Checkpoint, StoredTensor
from hfcompress.models.slicing import Slicer
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.latency import Latency, latency
from hfcompress.passes.narrow_pass import Reader
from hfcompress.passes.processes import Processes
from hfcompress.passes.statistics import Statistics
from hfcompress.passes.width import Widths
from hfcompress.progress import Silent
from hfcompress.recipes import job_from_dict


NOT_NARROWED = ("gpt2", "opt", "gemma3")  # norms with a mean, or behind the writers

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, GemmaConfig
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        logits = model(ids).logits
        cached = model.generate(ids[:, :6], max_new_tokens=6, do_sample=False)
        again = ids[:, :6]
        for _ in range(6):
            again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    found[folder] = {"logits": logits.flatten().tolist(), "cached": cached.tolist(), "again": again.tolist(),
                     "parameters": sum(p.numel() for p in model.parameters())}
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_transformers_loads_and_generates_what_was_pruned(name, tmp_path):
    """In every dimension; and the run itself asks the written folder what it had asked the model in its old shapes."""
    model = make_model(CONFIGS[name]())
    model.save_pretrained(tmp_path / "base")
    options = {"calibration": token_ids(8, 32), "evaluate": False}
    results = {}
    for step in ({"ffn": 0.5, "multiple": 16}, {"heads": 0.5}, {"depth": 0.34}, {"hidden": 0.25, "multiple": 16}):
        folder = tmp_path / next(iter(step))
        if "hidden" in step and name in NOT_NARROWED:
            with pytest.raises(UnsupportedModelError, match=r"cannot be made narrower \(.*\); leave out prune.hidden"):
                hfc.compress(str(tmp_path / "base"), hfc.Prune(**step), folder, **options)
            assert not folder.exists()
        elif "heads" in step and name in ("gpt2", "opt"):  # their projections are as wide as the hidden size
            with pytest.raises(
                UnsupportedModelError, match=r"cannot be built with such widths.*leave that dimension out"
            ):
                hfc.compress(str(tmp_path / "base"), hfc.Prune(**step), folder, **options)
            assert not folder.exists()
        else:
            results[str(folder)] = hfc.compress(str(tmp_path / "base"), hfc.Prune(**step), folder, **options)
    every = in_fresh_process(PLAIN, *results, forbid="hfcompress")
    for folder, result in results.items():
        found = every[folder]
        assert found["cached"] == found["again"]  # the cache's layers are numbered anew
        sizes = result.manifest["pruning"]["parameters"]
        assert found["parameters"] == sizes["after"] < sizes["before"] == sum(p.numel() for p in model.parameters())
        assert torch.tensor(found["logits"]).isfinite().all()
        streamed = StreamedModel(Checkpoint.open(folder))
        with streamed.loaded() as whole, torch.no_grad():
            logits = whole(torch.arange(3, 27)[None]).logits
        assert torch.allclose(logits.flatten(), torch.tensor(found["logits"]), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3-mixed"])
def test_a_stream_that_uses_few_directions_loses_nothing_when_the_others_go(name, tmp_path):
    """All weights that write the stream write into a subspace; then the narrow model must give the dense one's logits."""
    model = make_model(CONFIGS[name]())
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    onto = (basis[:, : width // 2] @ basis[:, : width // 2].T).float()
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(table @ onto)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.copy_(onto @ layer.self_attn.o_proj.weight)
            layer.mlp.down_proj.weight.copy_(onto @ layer.mlp.down_proj.weight)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.uniform_(0.5, 2, generator=generator)
    model.save_pretrained(tmp_path / "base")
    ids = torch.as_tensor(token_ids(4, 32, 1)).long()
    with torch.no_grad():
        expected = model(ids).logits
    for refit in (True, False):
        folder = tmp_path / str(refit)
        hfc.compress(
            str(tmp_path / "base"),
            hfc.Prune(hidden=0.5, multiple=8, refit=refit),
            folder,
            calibration=token_ids(8, 32),
            evaluate=False,
        )
        narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert narrow.config.hidden_size == width // 2
        with torch.no_grad():
            found = narrow(ids).logits
        assert (found - expected).norm() < 2e-3 * (expected - expected.mean(-1, keepdim=True)).norm()


def test_the_readers_of_a_narrower_stream_are_solved_by_least_squares():
    """Against the slow way: the regression of the dense outputs on the narrow inputs, drawn to the slice by the damping."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(500, 12, generator=generator)
    narrow = dense @ torch.randn(12, 8, generator=generator) + 0.3 * torch.randn(500, 8, generator=generator)
    weight, sliced = torch.randn(5, 12, generator=generator), torch.randn(5, 8, generator=generator)
    statistics = Statistics(8, torch.device("cpu"), dense_features=12)
    for some, others in zip(narrow.split(100), dense.split(100), strict=True):
        statistics.add(some[None], None, others[None])
    statistics.complete(Processes(torch.device("cpu")), "it")
    reader = Reader("it", StoredTensor("it", weight.dtype, tuple(weight.shape), value=weight), False, damping=0.01)
    found, _, told = reader.sparsify(sliced, statistics, "it")
    x, y = dense.double(), narrow.double()
    ridge = 0.01 * (y.square().mean(0)).mean() * 500
    rows = torch.cat([y, ridge.sqrt() * torch.eye(8).double()])
    wanted = torch.cat([x @ weight.T.double(), ridge.sqrt() * sliced.T.double()])
    slow = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(found.double(), slow, atol=1e-4)
    error = (x @ weight.T.double() - y @ found.T.double()).norm() / (x @ weight.T.double()).norm()
    assert told["relative_output_error"] == pytest.approx(error.item(), rel=1e-3)


def test_the_readers_make_up_for_most_of_what_a_narrower_stream_loses(tmp_path):
    with_refit, without = (
        measured(hfc.Prune(hidden=0.25, multiple=16, refit=refit), tmp_path / str(refit)) for refit in (True, False)
    )
    assert with_refit < 0.7 * without
    manifest = json.loads((tmp_path / "True" / "hfcompress.json").read_text())
    assert manifest["pruning"]["hidden"]["after"] * 4 == manifest["pruning"]["hidden"]["before"] * 3
    assert all(0 < row["relative_output_error"] < 1 for row in manifest["linears"])


def test_a_narrower_stream_and_fewer_channels_are_two_runs_in_one(saved_llama, tmp_path):
    recipe = hfc.Prune(hidden=0.5, ffn=0.5, multiple=8) >> hfc.RTN(group_size=-1)
    result = hfc.compress(
        str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32), eval_data=token_ids(4, 32, 1)
    )
    pruning = result.manifest["pruning"]
    assert pruning["hidden"] == {"before": 64, "after": 32}
    assert pruning["ffn"] == {"before": 96, "after": 48}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (32, 48, 16)
    assert "coordinates of the residual stream" in (tmp_path / "out" / "README.md").read_text()


def test_in_rounds_the_stream_goes_first_and_at_once(saved_llama, tmp_path):
    recipe = hfc.Prune(hidden=0.5, ffn=0.5, depth=0.67, multiple=8, rounds=2)
    result = hfc.compress(str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False)
    pruning = result.manifest["pruning"]
    assert {key: pruning[key]["after"] for key in ("blocks", "hidden", "ffn")} == {
        "blocks": 1,
        "hidden": 32,
        "ffn": 48,
    }
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert narrow.get_input_embeddings().weight.shape[1] == 32
    assert pruning["parameters"]["after"] == sum(p.numel() for p in narrow.parameters())


def save_tied(folder, **changes):
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    for key, value in changes.items():
        setattr(config, key, value)
    make_model(config).save_pretrained(folder)
    return str(folder)


def test_a_head_that_shared_its_weight_gets_its_own(tmp_path):
    base = save_tied(tmp_path / "base")
    recipe = hfc.Prune(hidden=0.5, multiple=8)
    result = hfc.compress(base, recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert narrow.config.tie_word_embeddings is False
    assert not torch.equal(narrow.lm_head.weight, narrow.get_input_embeddings().weight)
    assert result.manifest["pruning"]["parameters"]["after"] == sum(p.numel() for p in narrow.parameters())


def test_a_target_passes_over_widths_that_transformers_refuses(saved_llama, tmp_path):
    """Four heads: 34 is in reach, and no multiple of them."""
    checkpoint = Checkpoint.open(str(saved_llama))
    outside = sum(t.nbytes // t.dtype.itemsize for t in checkpoint.tensors.values())
    recipe = hfc.Prune(hidden=0.1, multiple=2, target_parameters=int(outside * 35 / 64))
    result = hfc.compress(str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False)
    assert result.manifest["pruning"]["hidden"]["after"] == 32


def test_a_narrower_model_that_would_be_larger_is_told(tmp_path):
    base = save_tied(tmp_path / "base", vocab_size=20_000)
    with pytest.raises(InvalidValueError, match=r"weight of its own beside the embeddings', and the model would have"):
        hfc.compress(base, hfc.Prune(hidden=0.1, multiple=8), tmp_path / "out", calibration=token_ids(8, 32))
    assert not (tmp_path / "out").exists()


def test_what_depends_on_the_width_is_told(tmp_path):
    """Gemma multiplies its embeddings by the root of the width that the configuration names."""
    config = GemmaConfig(**{**CONFIGS["llama"]().to_dict(), "model_type": "gemma", "architectures": None})
    make_model(config).save_pretrained(tmp_path / "base")
    said = r"cannot be made narrower \(something in it depends on how wide the stream is\); leave out prune.hidden"
    with pytest.raises(UnsupportedModelError, match=said):
        hfc.compress(
            str(tmp_path / "base"),
            hfc.Prune(hidden=0.5, multiple=8),
            tmp_path / "out",
            calibration=token_ids(8, 32),
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32, "head_dim": 8}, r"would be \[.*\], and transformers makes it \[.*\]"),
        ({"hidden_size": 31}, r"hidden size \(31\) is not a multiple.*take another share, or leave out prune.hidden"),
    ],
)
def test_a_narrower_model_that_transformers_builds_otherwise_is_told(
    saved_llama, tmp_path, monkeypatch, changes, said
):
    monkeypatch.setattr(Slicer, "_width_changes", lambda self, size: changes)
    with pytest.raises(UnsupportedModelError, match=f"cannot be made narrower \\(.*{said}"):
        hfc.compress(
            str(saved_llama), hfc.Prune(hidden=0.5, multiple=8), tmp_path / "out", calibration=token_ids(8, 32)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hidden", [0.0, 0.25, 0.5])
def test_a_share_of_all_parameters_is_kept(hidden, tmp_path):
    """Of the whole model's, also where the stream has been made narrower before; and no more goes than must."""
    before = Checkpoint.open(make_model(CONFIGS["llama"]())).parameters
    recipe = hfc.Prune(hidden=hidden, ffn=0.5, target_parameters=0.7, multiple=8)
    result = hfc.compress(
        make_model(CONFIGS["llama"]()), recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False
    )
    told = result.manifest["pruning"]
    after = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert told["parameters"] == {"before": before, "after": after}
    if hidden < 0.5:
        assert 0.6 * before < after <= 0.7 * before
        assert told["ffn"]["after"] < told["ffn"]["before"]
    else:  # that alone is enough
        assert after < 0.6 * before
        assert "ffn" not in told


@pytest.mark.parametrize("key", ["target_parameters", "target_size"])
def test_a_narrower_stream_meets_a_target(saved_llama, tmp_path, key):
    checkpoint = Checkpoint.open(str(saved_llama))
    before = sum(p.numel() for p in StreamedModel(checkpoint).skeleton.parameters())
    most = int(0.7 * (before if key == "target_parameters" else checkpoint.size_bytes))
    recipe = hfc.Prune(hidden=0.1, multiple=8, **{key: most})
    result = hfc.compress(str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False)
    after = result.manifest["pruning"]["parameters"]["after"]
    after = after if key == "target_parameters" else Checkpoint.open(str(result.output_dir)).size_bytes
    assert 0.5 * most < after <= most


def test_a_cut_in_the_wrong_place_is_told(saved_llama, tmp_path, monkeypatch):
    cut = Widths.cut

    def wrong(self, index, tensors):
        found = cut(self, index, tensors)
        name = next(key for key in found if "up_proj" in key)
        return {**found, name: found[name].roll(1, 0)}

    monkeypatch.setattr(Widths, "cut", wrong)
    with pytest.raises(UnsupportedModelError, match="does not say what the pruned model said while it was solved"):
        hfc.compress(
            str(saved_llama),
            hfc.Prune(ffn=0.5, multiple=16),
            tmp_path / "out",
            calibration=token_ids(8, 32),
            evaluate=False,
        )
    assert not (tmp_path / "out").exists()


def measured(recipe, folder, rows=48) -> float:
    ids = np.load(hfc.models.tiny.tiny_folder() / "calibration.npy")[:rows]
    return hfc.compress(None, recipe, folder, calibration=torch.as_tensor(ids).long()).report["kl_mean"]


def test_the_refit_pays_on_the_trained_model(tmp_path):
    with_refit, without = (
        measured(hfc.Prune(ffn=0.25, multiple=16, refit=refit), tmp_path / str(refit)) for refit in (True, False)
    )
    assert with_refit < 0.7 * without


@pytest.mark.parametrize(("step", "less"), [({"ffn": 0.25}, 0.93), ({"hidden": 0.25}, 0.96)], ids=["ffn", "hidden"])
def test_what_is_left_of_a_block_moves_together(step, less, tmp_path):
    recipe = hfc.Prune(multiple=16, **step)
    fitted = measured(recipe, tmp_path / "fitted")
    assert (
        measured(recipe >> hfc.Tune(iterations=40, learning_rate=0.003, batch_tokens=512), tmp_path / "moved")
        < less * fitted
    )
    rows = json.loads((tmp_path / "moved" / "hfcompress.json").read_text())["linears"]
    assert any(row["tuned"]["held_out_error"] < row["tuned"]["held_out_error_before"] for row in rows)


def test_the_step_behind_it_is_a_part_of_its_stage():
    job = hfc.Job.of(hfc.Prune(ffn=0.5, rounds=2) >> hfc.Tune(iterations=3) >> hfc.GPTQ() >> hfc.Tune())
    earlier, last = job.stages
    assert [step.name for step in earlier.steps] == ["prune", "tune"]
    assert [step.name for step in last.steps] == ["gptq", "tune"]
    first, second = earlier.stages
    assert [step.name for step in first.steps] == [step.name for step in second.steps] == ["prune", "tune"]
    assert first.tuning.iterations == second.tuning.iterations == 3


def test_blocks_are_chosen_by_what_the_predictions_lose(tmp_path):
    greedy = measured(hfc.Prune(depth=0.25), tmp_path / "greedy")
    ids = np.load(hfc.models.tiny.tiny_folder() / "calibration.npy")[:8]
    manifest = json.loads((tmp_path / "greedy" / "hfcompress.json").read_text())
    kept = manifest["pruning"]["kept_blocks"]
    assert len(kept) == 3
    losses = {}
    for gone in range(4):
        stays = [index for index in range(4) if index != gone]
        losses[gone] = without(gone, torch.as_tensor(ids).long())
        if stays == kept:
            chosen = gone
    assert losses[chosen] == min(losses.values())
    influence = measured(hfc.Prune(depth=0.25, criterion="influence"), tmp_path / "influence")
    assert greedy <= influence * 1.001


def without(gone, ids) -> float:
    """KL of the tiny model and the same without a block, the obvious way."""

    model = AutoModelForCausalLM.from_pretrained(hfc.models.tiny.tiny_folder(), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        del model.model.layers[gone]
        found = model(ids, use_cache=False).logits.log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def test_what_transformers_refuses_to_build_is_told_in_its_words(tmp_path):
    config = CONFIGS["llama"]()
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 8
    make_model(config).save_pretrained(tmp_path / "base")
    said = r"hidden size \(\d+\) is not a multiple.*take another share, or leave"
    with pytest.raises(UnsupportedModelError, match=said):
        hfc.compress(str(tmp_path / "base"), hfc.Prune(heads=0.25), tmp_path / "out", calibration=token_ids(8, 32))


def test_neighbouring_blocks_go_together(saved_llama, tmp_path):
    result = hfc.compress(
        str(saved_llama),
        hfc.Prune(depth=0.67, contiguous=True),
        tmp_path / "out",
        calibration=token_ids(8, 32),
        evaluate=False,
    )
    assert result.manifest["pruning"]["kept_blocks"] in ([0], [2])


@pytest.mark.parametrize("dimensions", [{"ffn": 0.5}, {"ffn": 0.5, "heads": 0.5, "depth": 0.3}])
def test_a_target_in_parameters_is_met(saved_llama, tmp_path, dimensions):
    model = StreamedModel(Checkpoint.open(str(saved_llama)))
    most = int(0.85 * sum(p.numel() for p in model.skeleton.parameters()))
    recipe = hfc.Prune(target_parameters=most, multiple=8, **dimensions)
    result = hfc.compress(str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False)
    after = result.manifest["pruning"]["parameters"]["after"]
    assert 0.75 * most < after <= most


@pytest.mark.parametrize("dimensions", [{"ffn": 0.5, "depth": 0.5}, {"heads": 0.5, "ffn": 0.1}, {"hidden": 0.5}])
def test_a_target_in_time_is_met_and_kept_by_a_run_that_goes_on(saved_llama, tmp_path, dimensions, monkeypatch):
    timed = []

    def clock(model, config=None):  # by parameters, so that what is asked for can be told
        config = (config or model.checkpoint.config).get_text_config()
        timed.append(config)
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        return Latency(config.hidden_size * (config.intermediate_size + 16 * heads) / 1e4, config.hidden_size / 100)

    for module in ("prune_pass", "narrow_pass"):
        monkeypatch.setattr(f"hfcompress.passes.{module}.latency", clock)
    recipe = hfc.Prune(**dimensions, multiple=16, target_latency=0.8)
    options = {"calibration": token_ids(8, 32), "evaluate": False}
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(str(saved_llama), recipe, tmp_path / "out", progress=StopIn("block 2", 1), **options)
    assert timed
    timed.clear()
    result = hfc.compress(str(saved_llama), recipe, tmp_path / "out", resume=True, **options)
    share = result.manifest["pruning"]["latency"]["after"]
    assert share <= 0.8
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    before = clock(None, Checkpoint.open(str(saved_llama)).config).of(3)
    assert share == pytest.approx(clock(None, made).of(made.num_hidden_layers) / before, abs=1e-3)
    assert f"a token takes {share:.0%} of the original's time" in (tmp_path / "out" / "README.md").read_text()
    assert share > 0.45  # no more than was asked for, as far as such shapes go


def test_time_is_taken_on_a_model_of_the_shapes_that_are_asked_for(saved_llama):
    model = StreamedModel(Checkpoint.open(str(saved_llama)))
    config = copy.deepcopy(model.checkpoint.config)
    config.intermediate_size = 24 * 1024
    whole, wider = latency(model), latency(model, config)
    assert 0 < whole.block < wider.block  # 256 times the channels
    assert whole.of(3) == whole.outside + 3 * whole.block
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


def test_time_is_taken_in_one_process(saved_llama, tmp_path, monkeypatch):
    class Two(Processes):
        def __init__(self, device):
            super().__init__(device)
            self.count = 2

    monkeypatch.setattr("hfcompress.preparing.Processes", Two)
    with pytest.raises(InvalidValueError, match=r"prune\.target_latency is timed in one process; start one"):
        hfc.compress(str(saved_llama), hfc.Prune(ffn=0.5, target_latency=0.5), tmp_path / "out")


def test_a_target_passes_over_heads_that_transformers_refuses(tmp_path):
    config = CONFIGS["llama"]()
    config.update({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": 64})
    make_model(config).save_pretrained(tmp_path / "model")
    whole = Checkpoint.open(str(tmp_path / "model"))
    parameters = sum(tensor.nbytes for tensor in whole.tensors.values()) // 4
    recipe = hfc.Prune(heads=0.25, target_parameters=int(0.95 * parameters))  # six heads do not divide the width
    hfc.compress(str(tmp_path / "model"), recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 4


def test_a_target_in_bytes_is_met(saved_llama, tmp_path):
    most = int(0.85 * Checkpoint.open(str(saved_llama)).size_bytes)
    recipe = hfc.Prune(target_size=f"{most}B", multiple=8, ffn=0.5)
    result = hfc.compress(str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32), evaluate=False)
    assert 0.9 * most < Checkpoint.open(str(result.output_dir)).size_bytes <= most


def test_rounds_end_where_one_round_does(saved_llama, tmp_path):
    recipe = hfc.Prune(depth=0.67, ffn=0.5, multiple=8, rounds=2)
    result = hfc.compress(
        str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32), eval_data=token_ids(4, 32, 1)
    )
    assert not partial_path(tmp_path / "out").exists()
    pruning = result.manifest["pruning"]
    assert pruning["blocks"] == {"before": 3, "after": 1}
    assert pruning["ffn"] == {"before": 96, "after": 48}
    assert pruning["parameters"]["before"] == sum(
        p.numel() for p in StreamedModel(Checkpoint.open(str(saved_llama))).skeleton.parameters()
    )
    [kept] = pruning["kept_blocks"]
    assert kept in range(3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (1, 48)
    assert result.manifest["recipe"]["recipe"] == [{"prune": {"depth": 0.67, "ffn": 0.5, "rounds": 2, "multiple": 8}}]
    assert result.report["baseline_size_bytes"] == Checkpoint.open(str(saved_llama)).size_bytes
    assert "96" in (tmp_path / "out" / "README.md").read_text()


def test_rounds_go_on_where_they_were_stopped(saved_llama, tmp_path):
    class Stop(hfc.progress.Silent):
        rounds = 0

        def step(self, text, amount=1):
            self.rounds += text.startswith("block 1")
            if self.rounds > 1 and text.startswith("block 2"):
                raise KeyboardInterrupt

    recipe = hfc.Prune(ffn=0.5, multiple=8, rounds=2) >> hfc.RTN(group_size=-1)
    options = {"calibration": token_ids(8, 32), "evaluate": False}
    hfc.compress(str(saved_llama), recipe, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(str(saved_llama), recipe, tmp_path / "out", progress=Stop(), **options)
    hfc.compress(str(saved_llama), recipe, tmp_path / "out", resume=True, **options)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_steps_behind_it_work_on_the_smaller_model(saved_llama, tmp_path):
    recipe = hfc.Prune(ffn=0.5, multiple=16, depth=0.3) >> hfc.GPTQ(group_size=-1)
    result = hfc.compress(
        str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32), eval_data=token_ids(4, 32, 1)
    )
    assert not partial_path(tmp_path / "out").exists()
    manifest = result.manifest
    assert [step for entry in manifest["recipe"]["recipe"] for step in entry] == ["prune", "gptq"]
    assert manifest["base"]["model"] == str(saved_llama)
    assert manifest["pruning"]["ffn"] == {"before": 96, "after": 48}
    assert len(manifest["linears"]) == 14
    assert {row["method"] for row in manifest["linears"]} == {"gptq"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 48)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert result.report["kl_mean"] > 0
    assert result.report["baseline_size_bytes"] == Checkpoint.open(str(saved_llama)).size_bytes


class StopIn(Silent):
    """Ctrl-C where something is said for the nth time."""

    def __init__(self, words, number):
        self.words, self.left = words, number

    def step(self, text, amount=1):
        self.left -= text.startswith(self.words)
        if self.left == 0:
            raise KeyboardInterrupt


FFN, HIDDEN = {"ffn": 0.5, "depth": 0.3}, {"hidden": 0.5}
MOMENTS = [("choosing", 1), ("block 2", 2), ("writing", 1), ("drawing", 1), ("block 1", 3), ("writing", 2)]


@pytest.mark.parametrize(
    ("words", "number", "first", "tuned"),
    [*((*moment, each, False) for moment in MOMENTS for each in (FFN, HIDDEN)), ("block 2", 2, FFN, True)],
)
def test_what_was_interrupted_goes_on_to_the_same_bytes(saved_llama, tmp_path, words, number, first, tuned):
    """In the first stage, and in the second."""
    words = words if "depth" in first else words.replace("choosing", "directions")
    tune = (hfc.Tune(iterations=3, batch_tokens=64),) if tuned else ()
    recipe = hfc.Job(steps=(hfc.Prune(multiple=16, **first), *tune, hfc.RTN(group_size=-1)), name="interrupted")
    options = {"calibration": token_ids(8, 32), "evaluate": False}
    hfc.compress(str(saved_llama), recipe, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(str(saved_llama), recipe, tmp_path / "out", progress=StopIn(words, number), **options)
    with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
        hfc.compress(str(saved_llama), recipe, tmp_path / "out", **options)
    if words not in ("choosing", "directions"):  # nothing had been done
        other = hfc.Job(steps=(hfc.Prune(multiple=8, **first), *tune, hfc.RTN(group_size=-1)), name="interrupted")
        with pytest.raises(OutputError, match="differs in"):
            hfc.compress(str(saved_llama), other, tmp_path / "out", resume=True, **options)
    hfc.compress(str(saved_llama), recipe, tmp_path / "out", resume=True, **options)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "prune takes nothing out; set one of depth, hidden, ffn, heads, experts, such as ffn=0.25."),
        ({"ffn": 1.0}, "prune.ffn is 1.0; it must be at least 0 and below 1."),
        ({"depth": -0.1}, "prune.depth is -0.1; it must be at least 0 and below 1."),
        ({"ffn": 0.5, "shift": 2.0}, "prune.shift is 2.0; it must lie between 0 and 1."),
        ({"ffn": 0.5, "multiple": 0}, "prune.multiple is 0; it must be at least 1."),
        ({"ffn": 0.5, "target_parameters": 0}, "prune.target_parameters is 0; it must be above 0."),
        ({"ffn": 0.5, "rounds": 0}, "prune.rounds is 0; it must be at least 1."),
        (
            {"ffn": 0.5, "rounds": 2, "target_size": "1GB"},
            "prune.target_size is met in one round; leave prune.rounds out, or give shares alone.",
        ),
        (
            {"ffn": 0.5, "hidden": 0.5, "target_latency": 0.5},
            "prune.target_latency scales hidden by itself, or depth, ffn and heads together; leave hidden out",
        ),
        ({"ffn": 0.5, "target_size": 0}, "prune.target_size is 0; it must be at least 1."),
        ({"ffn": 0.5, "target_size": "some"}, "'some' is no size; write it like 8GB, 512MB or a number of bytes."),
        (
            {"ffn": 0.5, "target_size": "1GB", "target_parameters": 9},
            "prune has target_parameters and target_size; give one of them.",
        ),
        (
            {"ffn": 0.5, "target_latency": 1.5},
            "prune.target_latency is 1.5; it is a share of the whole model's and must",
        ),
        ({"ffn": 0.5, "ignore": ["q_proj"]}, "prune takes no targets, ignore or overrides"),
        ({"fnn": 0.5}, "prune has no key 'fnn'. Did you mean 'ffn'?"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence(settings, said):
    with pytest.raises(InvalidValueError) as error:
        job_from_dict({"recipe": [{"prune": settings}]})
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (hfc.GPTQ() >> hfc.Prune(ffn=0.5), "prune changes the model that all other steps see: put it before gptq."),
        (hfc.Prune(ffn=0.5) >> hfc.BitsAndBytes(), "bitsandbytes reads a model from a folder: prune first"),
        (
            hfc.Prune(depth=0.5) >> hfc.Tune(),
            "here it leaves blocks as they are or unfitted; name ffn, heads or hidden",
        ),
        (hfc.Prune(hidden=0.5, refit=False) >> hfc.Tune(), "here it leaves blocks as they are or unfitted"),
    ],
)
def test_where_it_cannot_stand_is_told(recipe, said):
    with pytest.raises(InvalidValueError) as error:
        hfc.Job.of(recipe)
    assert said in str(error.value)


def test_several_processes_are_told_what_they_cannot_do(saved_llama, tmp_path, monkeypatch):
    class Two(Processes):
        def __init__(self, device):
            super().__init__(device)
            self.count = 2

    monkeypatch.setattr("hfcompress.preparing.Processes", Two)
    recipe = hfc.Prune(ffn=0.5) >> hfc.RTN(group_size=-1)
    with pytest.raises(InvalidValueError, match="A recipe of several stages works in one process; start one"):
        hfc.compress(str(saved_llama), recipe, tmp_path / "out", calibration=token_ids(8, 32))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"ffn": 0.01}, "of 96 channels only multiples of 32 are taken out; raise prune.ffn, or lower prune.multiple"),
        (
            {"hidden": 0.01},
            "of a residual stream of 64 only multiples of 64 are taken out; raise prune.hidden, or lower",
        ),
        ({"hidden": 0.5, "multiple": 8, "target_parameters": 10}, "and a residual stream of 8 still makes it"),
        ({"heads": 0.1}, "there are 2 groups of heads; give at least 0.5"),
        ({"depth": 0.1}, "there are 3 blocks; give at least 0.33"),
        (
            {"ffn": 0.5, "target_size": 10},
            "prune.target_size is 10, and with all that can go of what is named .* stay",
        ),
        ({"ffn": 0.5, "target_parameters": 10}, "with all that can go of what is named .* stay; name more of depth"),
    ],
)
def test_too_little_to_take_is_told(saved_llama, tmp_path, step, said):
    with pytest.raises(InvalidValueError, match=said):
        hfc.compress(str(saved_llama), hfc.Prune(**step), tmp_path / "out", calibration=token_ids(8, 32))
    assert not (tmp_path / "out").exists()
