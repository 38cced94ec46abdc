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
"""Models with an encoder and a decoder: both are compressed, and measured on what the model itself says."""

import json
import wave

import numpy as np
import pytest
import torch
from conftest import (
    HEARING,
    VOCABULARY,
    WITH_DECODERS,
    StopAfter,
    digest,
    in_fresh_process,
    make_any_model,
    sound,
    token_ids,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    MoonshineConfig,
    PegasusXConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    UMT5EncoderModel,
    WhisperFeatureExtractor,
)

import hfcompress as hfc
from hfcompress.calibration.own_output import answered, continued
from hfcompress.calibration.speech import load_speech
from hfcompress.calibration.tokens import Tokens
from hfcompress.errors import CalibrationError, CheckpointError, InvalidValueError, UnsupportedModelError
from hfcompress.formats import get_format
from hfcompress.generating import generate
from hfcompress.hub.reload import check_reload
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.encoder_decoder import block_count, encoded, require_states
from hfcompress.models.gradients import SquaredGradients
from hfcompress.models.streaming import StreamedModel
from hfcompress.passes.foresight import foresee
from hfcompress.passes.plan import make_plan
from hfcompress.passes.processes import Processes


FOUR = {"bits": 4, "group_size": 32}
GPTQ = hfc.GPTQ(**FOUR)
IDS, UNSEEN = token_ids(12, 40, vocabulary=VOCABULARY), token_ids(6, 40, seed=7, vocabulary=VOCABULARY)
TEXT = " ".join(f"word{number % 90}" for number in range(3, 4000, 7))


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"word{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def saved(name: str, folder):
    make_any_model(WITH_DECODERS[name]()).save_pretrained(folder)
    return folder


@pytest.fixture(params=WITH_DECODERS)
def model(request):
    return make_any_model(WITH_DECODERS[request.param]())


@pytest.fixture
def t5(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "base")
    return saved("t5", tmp_path / "base")


@torch.no_grad()
def logits(source, ids, mask=None) -> torch.Tensor:
    model = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32).eval()
    return model(**Batch(torch.as_tensor(ids), mask).inputs(model.config)).logits


# the walk


def padded(rows: int = 3, length: int = 23) -> Batch:
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1, encoded(length) - 4 : encoded(length)] = False
    mask[1:, -3:] = False
    return Batch(torch.as_tensor(token_ids(rows, length, vocabulary=VOCABULARY)), mask)


def test_block_by_block_it_says_what_it_says_whole(model):
    streamed, batch = StreamedModel(Checkpoint.open(model)), padded()
    with torch.no_grad():
        wanted = model(**batch.inputs(model.config)).logits
    [stream] = streamed.forward_blocks(streamed.embed([batch]))
    with streamed.outside(head=True) as outside:
        found = streamed.logits(outside, stream)
    assert len(streamed) == block_count(model.config)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_gradients_go_back_through_both(name):
    model = make_any_model(WITH_DECODERS[name]())
    streamed, batch = StreamedModel(Checkpoint.open(model)), padded()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    found = SquaredGradients(streamed, {n: model.get_submodule(n).out_features for n in names})
    found.add(batch)
    outputs = {}

    def keep(name: str):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    for n in names:
        model.get_submodule(n).register_forward_hook(keep(n))
    log_probs = model(**batch.inputs(model.config)).logits[:, :-1].log_softmax(-1)
    kept, likelihood = batch.mask[:, encoded(23) + 1 :], 0.0
    for row, own in enumerate(log_probs):
        generator = torch.Generator().manual_seed(row)
        labels = torch.multinomial(own[kept[row]].detach().exp(), 1, generator=generator)
        likelihood = likelihood + own[kept[row]].gather(1, labels).sum()
    likelihood.backward()
    assert found.positions == int(kept.sum())
    for n in names:
        wanted = outputs[n].grad.double().square().flatten(0, -2).sum(0)
        torch.testing.assert_close(found.sums[n].double(), wanted, rtol=1e-3, atol=1e-6)


def test_padding_of_either_part_counts_for_nothing(tmp_path):
    """What stands where the masks are false changes no weight."""
    model, made = make_any_model(WITH_DECODERS["bart"]()), []
    mask = np.ones_like(IDS, dtype=bool)
    own = encoded(IDS.shape[1])
    mask[::2, own - 6 : own] = False
    for number in (3, 9):
        ids = np.where(mask, IDS, number)
        streamed = StreamedModel(Checkpoint.open(model))
        said = continued(Tokens(ids, "", mask), streamed.checkpoint)
        recipe = hfc.Job(steps=(GPTQ,), format="dense")
        data = {"input_ids": said.input_ids, "attention_mask": said.mask}
        hfc.compress(model, recipe, tmp_path / str(number), calibration=data, memory_limit=1 << 40, evaluate=False)
        made.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


# what it is calibrated and measured on


def test_what_the_decoder_reads_is_what_the_model_says(t5):
    model = StreamedModel(Checkpoint.open(t5))
    ids = token_ids(5, 40, vocabulary=VOCABULARY)
    found, again, other = (answered(Tokens(ids, "text"), model, seed) for seed in (3, 3, 4))
    own = encoded(40)
    assert np.array_equal(found.input_ids[:, : own - 1], ids[:, : own - 1])
    assert (found.input_ids[:, own - 1] == 1).all()  # as the tokenizer ends a text
    assert (found.input_ids[:, own] == 0).all()  # and the model begins to speak
    assert found.sha256 == again.sha256 != other.sha256
    assert (found.source, found.own_output) == ("text", True)
    for row, kept in zip(found.input_ids[:, own:], found.mask[:, own:], strict=True):
        said = row[kept]
        assert kept[: len(said)].all()
        assert 1 not in said[:-1]  # nothing behind the end
        assert len(said) == len(row) or said[-1] == 1


def test_what_it_says_is_drawn_from_its_distribution(tmp_path):
    config = T5Config(
        vocab_size=8, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=7
    )
    model = make_any_model(config)
    rows = np.tile(np.arange(1, 7)[None], (4000, 1))
    said = answered(Tokens(rows, ""), StreamedModel(Checkpoint.open(model))).input_ids
    inputs = Batch(torch.as_tensor(rows[:1])).inputs(model.config)
    inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    inputs.pop("decoder_attention_mask")
    with torch.no_grad():
        wanted = model(**inputs).logits[0, 0].softmax(-1)
    shares = np.bincount(said[:, encoded(6) + 1], minlength=8) / len(said)
    assert np.abs(shares - wanted.numpy()).max() < 0.03


def test_it_is_measured_on_what_the_original_says(t5, tmp_path):
    result = hfc.compress(t5, GPTQ, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    report, own = result.report, encoded(UNSEEN.shape[1])
    asked = answered(Tokens(UNSEEN, ""), StreamedModel(Checkpoint.open(t5)))
    ids, mask = torch.as_tensor(asked.input_ids), torch.as_tensor(asked.mask)
    ours, theirs = (logits(folder, ids, mask)[:, :-1].log_softmax(-1) for folder in (tmp_path / "made", t5))
    kept = mask[:, own + 1 :]
    divergences = (theirs.exp() * (theirs - ours)).sum(-1)[kept]
    assert report["kl_mean"] == pytest.approx(float(divergences.mean()), rel=0.02)
    assert 0 < report["kl_mean"] < 0.2
    told = ours[kept].gather(-1, ids[:, own + 1 :][kept][:, None])
    assert report["perplexity"] == pytest.approx(float(torch.exp(-told.mean())), rel=0.01)
    assert (report["tokens"], report["how"]["own_output"]) == (int(kept.sum()), True)
    assert report.get("generations") is None
    card = (tmp_path / "made/README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert "vllm" not in card
    assert "takes in images" not in card
    assert "All figures are of what the original itself says to what its encoder is given" in card
    again = hfc.evaluate(tmp_path / "made", t5, UNSEEN)
    assert again["kl_mean"] == pytest.approx(report["kl_mean"], rel=1e-5)
    assert check_reload(tmp_path / "made", result.manifest).positions


def test_solving_beats_rounding_to_nearest(t5, tmp_path):
    kl = {
        name: hfc.compress(
            t5, step, tmp_path / name, calibration=token_ids(48, 40, vocabulary=VOCABULARY), eval_data=UNSEEN
        ).report["kl_mean"]
        for name, step in (("gptq", hfc.GPTQ(bits=3, group_size=32)), ("rtn", hfc.RTN(bits=3, group_size=32)))
    }
    assert kl["gptq"] < kl["rtn"]


def test_below_a_memory_limit_the_decoder_reads_how_the_text_goes_on(t5, tmp_path):
    own = encoded(40)
    found = continued(Tokens(IDS, "text"), Checkpoint.open(t5))
    assert (found.input_ids[:, own - 1] == 1).all()
    assert (found.input_ids[:, own] == 0).all()
    assert np.array_equal(found.input_ids[:, own + 1 :], IDS[:, own:-1])
    result = hfc.compress(
        t5, GPTQ, tmp_path / "made", calibration=IDS, eval_data=UNSEEN, memory_limit=1 << 40, measure=["quality"]
    )
    assert result.report["how"]["own_output"] is False
    assert "own_output" not in result.manifest["calibration"]


def test_text_is_calibration_data_too(t5, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    result = hfc.compress(
        t5, GPTQ, tmp_path / "made", calibration=str(tmp_path / "text.txt"), samples=8, seq_len=32, evaluate=False
    )
    assert result.manifest["calibration"]["samples"] == 8
    assert result.manifest["calibration"]["own_output"] is True
    card = (tmp_path / "made/README.md").read_text()
    assert "calibrated on 8 rows of 32 tokens from text.txt and what the model itself says to it" in card
    assert str(tmp_path) not in card


def test_a_forecast_lets_it_say_nothing(t5, tmp_path, monkeypatch):
    monkeypatch.setattr("hfcompress.evaluation.logits.answered", None)
    said = hfc.plan(t5, GPTQ, calibration=IDS)
    monkeypatch.undo()
    hfc.compress(t5, GPTQ, tmp_path / "made", calibration=IDS, evaluate=False)
    assert said.output_bytes == pytest.approx(Checkpoint.open(tmp_path / "made").size_bytes, rel=1e-4)
    assert said.blocks == 5


# steps and formats


STEPS = {
    "awq": hfc.AWQ() >> hfc.RTN(**FOUR),
    "zeros": hfc.Sparsify(),
    "entropy": hfc.Entropy(bits=3),
    "vectors": hfc.VQ(bits=2, rounds=1),
    "products": hfc.LowRank(ratio=0.8),
    "lossless": hfc.Lossless(),
    "tuned": GPTQ >> hfc.Tune(iterations=4),
    "eight bits": hfc.RTN(bits=8, group_size=-1),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("base", ["bart", "t5"])
def test_every_kind_of_step_applies(base, name, tmp_path):
    saved(base, tmp_path / "base")
    result = hfc.compress(tmp_path / "base", STEPS[name], tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    assert -1e-6 < result.report["kl_mean"] < (1e-6 if name == "lossless" else 0.5)
    assert result.manifest["coverage"]["compressed"] >= block_count(Checkpoint.open(tmp_path / "base").config) * 6
    dense = tmp_path / "made"
    if name != "zeros":
        dense = hfc.export(tmp_path / "made", "dense", tmp_path / "dense", lossy=True, evaluate=False).output_dir
    packed = hfc.load(tmp_path / "made", device="cpu", packed=False).float()
    with torch.no_grad():
        found = packed(**Batch(torch.as_tensor(UNSEEN)).inputs(packed.config)).logits
    torch.testing.assert_close(found, logits(dense, UNSEEN), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("base", ["bart", "t5", "t5-untied", "marian"])
def test_plain_transformers_generates_from_it(base, tmp_path):
    """In a process that knows nothing of hfcompress; generating runs the encoder before the model's forward."""
    saved(base, tmp_path / "base")
    recipe = hfc.Job(steps=(GPTQ,), format="compressed-tensors")
    hfc.compress(tmp_path / "base", recipe, tmp_path / "made", calibration=IDS, evaluate=False)
    hfc.export(tmp_path / "made", "dense", tmp_path / "dense", lossy=True, evaluate=False)
    assert "encoder" in str(sorted(load_file(tmp_path / "made/model.safetensors")))
    said = in_fresh_process(f"""
import json, torch
from transformers import AutoModelForSeq2SeqLM
ids = torch.arange(6, 30)[None]
found = {{}}
for name in ("made", "dense"):
    model = AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path)!r} + "/" + name, dtype=torch.float32).eval()
    found[name] = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0].tolist()
print(json.dumps(found))
""")
    assert said["made"] == said["dense"]
    assert len(said["made"]) > 1


def test_packed_weights_run_as_they_are(tmp_path):
    saved("bart", tmp_path / "base")
    hfc.compress(tmp_path / "base", GPTQ, tmp_path / "made", calibration=IDS, evaluate=False)
    packed = hfc.load(tmp_path / "made", device="cpu")
    assert any(type(module).__name__ == "Int4Linear" for module in packed.model.encoder.modules())
    assert any(type(module).__name__ == "Int4Linear" for module in packed.model.decoder.modules())
    with torch.no_grad():
        found = packed(**Batch(torch.as_tensor(UNSEEN)).inputs(packed.config)).logits.float()
    wanted = logits(tmp_path / "made", UNSEEN)
    assert (found - wanted).abs().mean() < 0.05 * wanted.std()


def test_it_answers_a_prompt(t5, tmp_path):
    hfc.compress(t5, GPTQ, tmp_path / "made", calibration=IDS, evaluate=False)
    pieces = []
    found = generate(tmp_path / "made", "word5 word9 word30", max_new_tokens=7, dtype="float32", say=pieces.append)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    wanted = plain.generate(input_ids=torch.tensor([[5, 9, 30, 1]]), max_new_tokens=7, do_sample=False)
    assert found.text == make_tokenizer().decode(wanted[0, 1:], skip_special_tokens=True)
    assert "".join(pieces).strip() == found.text


def test_a_killed_run_goes_on(t5, tmp_path):
    options = {"calibration": IDS, "evaluate": False}
    hfc.compress(t5, GPTQ, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        hfc.compress(t5, GPTQ, tmp_path / "made", progress=StopAfter(4), **options)
    hfc.compress(t5, GPTQ, tmp_path / "made", resume=True, **options)
    assert digest(tmp_path / "made") == digest(tmp_path / "whole")


def test_a_head_of_its_own_stays_its_own(tmp_path):
    """T5's configuration says that the head is tied, also where the checkpoint holds another one."""
    saved("t5-untied", tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0).contiguous()
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    hfc.compress(tmp_path / "base", GPTQ, tmp_path / "made", calibration=IDS, evaluate=False)
    kept = load_file(tmp_path / "made/model.safetensors")
    assert torch.equal(kept["lm_head.weight"], tensors["lm_head.weight"])
    streamed = StreamedModel(Checkpoint.open(tmp_path / "base"))
    [stream] = streamed.forward_blocks(streamed.embed([Batch(torch.as_tensor(UNSEEN))]))
    with streamed.outside(head=True) as outside:
        torch.testing.assert_close(
            streamed.logits(outside, stream), logits(tmp_path / "base", UNSEEN), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", [T5EncoderModel, UMT5EncoderModel])
def test_an_encoder_by_itself_is_measured_by_what_it_returns(tmp_path, kind):
    """As text encoders made of T5 are: its configuration says that there is a decoder, and its checkpoint has none."""
    torch.manual_seed(0)
    model = kind(WITH_DECODERS["t5" if kind is T5EncoderModel else "umt5"]()).eval()
    model.save_pretrained(tmp_path / "base")
    result = hfc.compress(tmp_path / "base", GPTQ, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    plain = AutoModelForTextEncoding.from_pretrained(tmp_path / "made", dtype=torch.float32)
    with torch.no_grad():
        found, wanted = (each(input_ids=torch.as_tensor(UNSEEN)).last_hidden_state for each in (plain, model))
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1).mean()
    assert result.report["cosine_mean"] == pytest.approx(float(cosine), abs=1e-4)
    assert 0.9 < result.report["cosine_mean"] < 1
    assert check_reload(tmp_path / "made", result.manifest).positions
    card = (tmp_path / "made/README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "AutoModelForTextEncoding.from_pretrained" in card


# what is refused


@pytest.mark.parametrize(
    ("recipe", "layout", "reason"),
    [
        (hfc.RTN(**FOUR) >> hfc.KVCache(), "compressed-tensors", "kv_cache is for models without one; leave it out"),
        (hfc.Prune(ffn=0.5), "compressed-tensors", "prune is for models without one"),
        (hfc.Share(), "hfcompress", "share is for models without one"),
        (hfc.Rotate() >> hfc.RTN(**FOUR), "compressed-tensors", "rotate is for models without one"),
        (hfc.RTN(**FOUR) >> hfc.QAT(steps=1), "compressed-tensors", "qat is for models without one"),
        (
            hfc.Budget(target_bits=6, choices=("4g32", "8g32")) >> GPTQ,
            "compressed-tensors",
            "of this architecture transformers unpacks one alone; leave budget out",
        ),
        (hfc.RTN(**FOUR), "gptq", "gptq holds one list of blocks.*format=compressed-tensors"),
        (hfc.RTN(**FOUR), "awq", "awq holds one list of blocks"),
        (hfc.RTN(**FOUR), "gguf", "GGUF is written for"),
        (
            hfc.RTN(bits=8, group_size=-1, activations="dynamic"),
            "compressed-tensors",
            "rounds neither inputs nor the key-value cache; leave activations at none",
        ),
        (
            hfc.RTN(**FOUR, overrides={"fc1": {"bits": 8}}),
            "compressed-tensors",
            "only on the grid of one another.*format=int-quantized",
        ),
    ],
)
def test_what_it_cannot_be_is_refused_before_any_work(tmp_path, recipe, layout, reason):
    job = hfc.Job(steps=hfc.Job.of(recipe).steps, format=layout)
    with pytest.raises((InvalidValueError, UnsupportedModelError), match=reason):
        hfc.compress(make_any_model(WITH_DECODERS["bart"]()), job, tmp_path / "made", calibration=IDS)
    assert list(tmp_path.iterdir()) == []


def test_two_widths_are_refused(tmp_path):
    sizes = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 32,
    }
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**sizes, hidden_size=64),
        decoder=T5GemmaModuleConfig(**sizes, hidden_size=32, cross_attention_hidden_size=64),
        vocab_size=VOCABULARY,
    )
    with pytest.raises(UnsupportedModelError, match="Its encoder and decoder have states of 64 and 32"):
        hfc.compress(make_any_model(config), hfc.RTN(**FOUR), tmp_path / "made", evaluate=False)
    assert list(tmp_path.iterdir()) == []


def test_other_ways_from_the_encoder_to_the_decoder_are_refused(tmp_path):
    config = PegasusXConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    with pytest.raises(
        UnsupportedModelError, match="changes what its encoder's last block returns by more than modules"
    ):
        hfc.compress(make_any_model(config), hfc.RTN(**FOUR), tmp_path / "made", evaluate=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        UnsupportedModelError, match="hands its encoder's states to the decoder's blocks in another form"
    ):
        require_states([((torch.ones(1),), {})])


def test_where_there_is_no_encoder_it_is_told(monkeypatch):
    model = make_any_model(WITH_DECODERS["bart"]())
    bare = torch.nn.Linear(2, 2)
    monkeypatch.setattr(type(model), "get_encoder", lambda self: bare)
    with pytest.raises(UnsupportedModelError, match="No list of blocks was found in the Linear of BartFor"):
        StreamedModel(Checkpoint.open(model))
    monkeypatch.setattr(type(model), "get_encoder", lambda self: self)
    with pytest.raises(UnsupportedModelError, match="No encoder was found in BartForConditionalGeneration"):
        StreamedModel(Checkpoint.open(model))


def test_nothing_but_quality_is_measured(t5, tmp_path):
    hfc.compress(t5, GPTQ, tmp_path / "made", calibration=IDS, evaluate=False)
    with pytest.raises(UnsupportedModelError, match="has an encoder beside its decoder, of which nothing but quality"):
        hfc.evaluate(tmp_path / "made", t5, UNSEEN, measurements=["speed"])
    found = hfc.evaluate(tmp_path / "made", t5, UNSEEN, measurements=["all"])
    assert set(json.loads(json.dumps(found["skipped"]))) >= {"speed", "memory"}


@pytest.mark.filterwarnings("ignore")
def test_what_it_cannot_say_is_told(t5, tmp_path):
    options = {"calibration": IDS, "evaluate": False}
    with pytest.raises(
        CalibrationError, match=r"rows of token ids are 4 tokens long, of which .* would read 3; it needs room"
    ):
        hfc.compress(t5, GPTQ, tmp_path / "made", seq_len=4, **options)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((t5 / name).read_text())
        settings.pop("decoder_start_token_id", None)
        (t5 / name).write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match="does not say with which token its decoder begins"):
        hfc.compress(t5, GPTQ, tmp_path / "made", **options)
    model = make_any_model(WITH_DECODERS["bart"]())
    model.model.decoder.layers[2].fc2.weight.data *= 1e30
    model.model.decoder.layers[2].final_layer_norm.weight.data *= 1e20
    model.lm_head.weight.data *= 1e30
    with pytest.raises(CheckpointError, match="not finite in float32; give --dtype"):
        hfc.compress(model, GPTQ, tmp_path / "made", **options)
    assert not (tmp_path / "made").exists()


# models that hear


def recording(path, seconds: float, rate: int = 16000, width: int = 2, channels: int = 1) -> None:
    times = np.arange(int(rate * seconds)) / rate
    tone = np.sin(2 * np.pi * 300 * times * (1 + times)) + 0.1 * np.random.default_rng(0).standard_normal(len(times))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        kind = {1: np.uint8, 2: np.int16}[width]
        file.writeframes(np.repeat((tone * 8000).astype(kind), channels).tobytes())


@pytest.fixture
def whisper(tmp_path):
    make_any_model(HEARING["whisper"]()).save_pretrained(tmp_path / "base")
    WhisperFeatureExtractor(feature_size=20, sampling_rate=16000, chunk_length=1).save_pretrained(tmp_path / "base")
    (tmp_path / "recordings").mkdir()
    for number in range(4):
        recording(tmp_path / f"recordings/{number}.wav", 0.4 + 0.5 * number, channels=1 + number % 2)
    return tmp_path / "base"


def heard(rows: int = 3, length: int = 11) -> Batch:
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[1, 7:] = False
    return Batch(
        torch.as_tensor(token_ids(rows, length, vocabulary=VOCABULARY)), mask, torch.as_tensor(sound(rows)), 50
    )


def test_what_hears_says_block_by_block_what_it_says_whole():
    model, batch = make_any_model(HEARING["whisper"]()), heard()
    streamed = StreamedModel(Checkpoint.open(model))
    with torch.no_grad():
        wanted = model(**batch.inputs(model.config)).logits
    [stream] = streamed.forward_blocks(streamed.embed([batch]))
    with streamed.outside(head=True) as outside:
        torch.testing.assert_close(streamed.logits(outside, stream), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_every_linear_is_solved_on_what_reaches_it_in_the_model(name):
    """The encoder's on the encoder's tokens, the cross-attention's on the encoder's states, and padding on nothing."""
    model = make_any_model({**WITH_DECODERS, **HEARING}[name]())
    batch = heard() if name == "whisper" else padded()
    streamed = StreamedModel(Checkpoint.open(model))
    plan = make_plan(streamed, [GPTQ], get_format("dense"))
    found = foresee(
        streamed, plan.tasks, [batch], Processes(torch.device("cpu")), lambda task, weight, seen: seen.gram
    )
    assert set(found) == set(plan.tasks)
    inputs = {}
    for linear in found:
        model.get_submodule(linear).register_forward_pre_hook(lambda m, x, n=linear: inputs.__setitem__(n, x[0]))
    with torch.no_grad():
        model(**batch.inputs(model.config))
    for linear, gram in found.items():
        x = inputs[linear].double()
        kept = x[batch.mask_of(x)] if batch.mask_of(x) is not None else x.flatten(0, 1)
        torch.testing.assert_close(gram.double(), kept.T @ kept / len(kept), rtol=1e-4, atol=1e-5)
    of_cross = [inputs[n] for n in found if "encoder_attn.k" in n or "EncDecAttention.k" in n]
    assert of_cross
    assert all(x.shape[1] == batch.read for x in of_cross)


@pytest.mark.parametrize("layout", ["compressed-tensors", "hfcompress"])
def test_recordings_are_calibrated_and_measured_on(whisper, tmp_path, layout):
    recordings, step = str(tmp_path / "recordings"), GPTQ if layout == "compressed-tensors" else hfc.Entropy(bits=4)
    job = hfc.Job(steps=(step,), format=layout)
    result = hfc.compress(whisper, job, tmp_path / "made", calibration=recordings, eval_data=recordings)
    assert 0 < result.report["kl_mean"] < 0.05
    assert result.manifest["calibration"]["samples"] == 6  # a second each, of 0.4, 0.9, 1.4 and 1.9
    assert result.report["how"]["out_of_domain"] == "there is no sound of another domain"
    assert check_reload(tmp_path / "made", result.manifest).positions
    card = (tmp_path / "made/README.md").read_text()
    assert "pipeline_tag: automatic-speech-recognition" in card
    assert 'pipeline("automatic-speech-recognition"' in card
    assert "from recordings and what the model itself says to it" in card
    for file in ("README.md", "report.html"):
        assert str(tmp_path) not in (tmp_path / "made" / file).read_text()
    packed = hfc.load(tmp_path / "made", device="cpu")
    said = packed.generate(input_features=torch.as_tensor(sound(2)).to(packed.dtype), max_new_tokens=5)
    assert len(said) == 2


def test_it_hears_in_other_dtypes_too(whisper, tmp_path):
    result = hfc.compress(
        whisper, GPTQ, tmp_path / "made", calibration=sound(4), eval_data=sound(4, seed=1), dtype="bfloat16"
    )
    assert 0 < result.report["kl_mean"] < 0.05


def test_features_are_taken_as_they_are(whisper, tmp_path):
    np.save(tmp_path / "sound.npy", sound(4))
    results = [
        hfc.compress(whisper, GPTQ, tmp_path / str(number), calibration=data, evaluate=False).manifest
        for number, data in enumerate((str(tmp_path / "sound.npy"), sound(4), {"input_features": sound(4)}))
    ]
    assert len({result["calibration"]["sha256"] for result in results}) == 1
    assert len({result["sha256"] for result in results}) == 1


def test_samples_of_recordings_are_what_was_recorded(whisper, tmp_path):
    """The same features as the model's own extractor gives for the whole recording, cut where the model hears no more."""
    found = load_speech(str(tmp_path / "recordings/3.wav"), Checkpoint.open(whisper), 8, None)
    with wave.open(str(tmp_path / "recordings/3.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, 2)[:, 0] / 32768
    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    wanted = [
        extractor(part, sampling_rate=16000, return_tensors="np").input_features[0]
        for part in np.split(samples, [16000])
    ]
    np.testing.assert_allclose(found.sound, np.stack(wanted), atol=1e-5)


def not_heard(whisper, tmp_path):
    recording(tmp_path / "slow.wav", 0.5, rate=8000)
    recording(tmp_path / "coarse.wav", 0.5, width=1)
    recording(tmp_path / "none.wav", 0.0)
    (tmp_path / "broken.wav").write_bytes(b"no wave")
    np.save(tmp_path / "shape.npy", sound(2, bins=12))
    np.save(tmp_path / "whole.npy", np.zeros((2, 20, 100), dtype=np.int64))
    np.save(tmp_path / "empty.npy", sound(0))
    return {
        "bundled": "hears sound, of which none comes with hfcompress; with --calibration.*folder of .wav",
        str(tmp_path / "slow.wav"): "8000 samples a second of 16 bits.*ffmpeg -i slow.wav -ar 16000",
        str(tmp_path / "coarse.wav"): "16000 samples a second of 8 bits.*ffmpeg",
        str(tmp_path / "none.wav"): "none.wav is empty",
        str(tmp_path / "broken.wav"): "no recording in plain PCM.*ffmpeg",
        str(tmp_path / "missing"): "There are no recordings at .*missing; give a folder",
        str(tmp_path / "shape.npy"): r"\(2, 12, 100\), and .* hears floats \(rows, 20, 100\)",
        str(tmp_path / "whole.npy"): "holds int64",
        str(tmp_path / "empty.npy"): "empty.npy is empty",
    }


def test_what_is_no_sound_is_told(whisper, tmp_path):
    for data, reason in not_heard(whisper, tmp_path).items():
        with pytest.raises(CalibrationError, match=reason):
            hfc.compress(whisper, GPTQ, tmp_path / "made", calibration=data, evaluate=False)
    with pytest.raises(CalibrationError, match="--eval-data for the measuring"):
        hfc.compress(
            whisper, GPTQ, tmp_path / "made", calibration=str(tmp_path / "none.wav")
        )  # before that is looked at
    (whisper / "preprocessor_config.json").unlink()
    with pytest.raises(CalibrationError, match=r"no feature extractor \(preprocessor_config.json\)"):
        hfc.compress(whisper, GPTQ, tmp_path / "made", calibration=str(tmp_path / "recordings"), evaluate=False)
    with pytest.raises(InvalidValueError, match="said by the whole model, which a memory limit forbids"):
        hfc.compress(whisper, GPTQ, tmp_path / "made", calibration=sound(4), memory_limit=1 << 40, evaluate=False)
    with pytest.raises(InvalidValueError, match="hears sound and reads no prompt"):
        generate(whisper, "hello")
    assert not (tmp_path / "made").exists()


def test_other_ways_of_hearing_are_refused(tmp_path):
    config = MoonshineConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
    )
    with pytest.raises(UnsupportedModelError, match="moonshine hears sound in a form that is not supported yet"):
        hfc.compress(make_any_model(config), hfc.RTN(**FOUR), tmp_path / "made", evaluate=False)
    assert list(tmp_path.iterdir()) == []
