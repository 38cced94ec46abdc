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
"""Models that see: the part for text goes through everything, the rest stays bit for bit, and images still say the same."""

import numpy as np
import pytest
import torch
from conftest import IMAGE, MULTIMODAL, VOCABULARY, in_fresh_process, make_any_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
)

import hfcompress as hfc
from hfcompress.errors import UnsupportedModelError
from hfcompress.models.checkpoint import Checkpoint


GPTQ = hfc.GPTQ(bits=4, group_size=32)
IDS = token_ids(8, 48, vocabulary=VOCABULARY - 8)
UNSEEN = token_ids(4, 32, seed=7, vocabulary=VOCABULARY - 8)


@pytest.fixture(params=MULTIMODAL)
def saved(request, tmp_path):
    model = make_any_model(MULTIMODAL[request.param](), AutoModelForImageTextToText)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def seen(folder) -> dict[str, torch.Tensor]:
    """What a model is given that is shown an image."""
    config = Checkpoint.open(folder).config
    generator = torch.Generator().manual_seed(3)
    kind = config.model_type
    patches = 4 if kind != "qwen2_5_vl" else 1
    ids = torch.as_tensor(UNSEEN[:1].copy())
    ids[0, 5 : 5 + patches] = IMAGE
    if kind == "qwen2_5_vl":
        pixels = torch.randn(4, 3 * 2 * 14 * 14, generator=generator)
        kinds = (ids == IMAGE).int()
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "mm_token_type_ids": kinds,
        }
    found = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}
    return {**found, "token_type_ids": (ids == IMAGE).long()} if kind == "gemma3" else found


@torch.no_grad()
def shown(model, folder) -> torch.Tensor:
    return model(**seen(folder)).logits


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_text_tower_is_compressed_and_the_rest_is_as_it_was(saved, tmp_path):
    job = hfc.Job(steps=(GPTQ,), format="compressed-tensors")
    result = hfc.compress(saved, job, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    assert 0 < result.report["kl_mean"] < 0.05
    names = {row["name"] for row in result.manifest["linears"]}
    assert len(names) == 21
    assert all("language_model" in name for name in names)
    before, after = load_file(saved / "model.safetensors"), load_file(tmp_path / "made/model.safetensors")
    others = [name for name in before if "visual" in name or "vision" in name or "projector" in name]
    assert len(others) > 10
    for name in others:
        assert torch.equal(before[name], after[name]), name
    card = (tmp_path / "made/README.md").read_text()
    assert "what takes in images is as it was" in card
    assert "model = AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card
    hfc.export(tmp_path / "made", "dense", tmp_path / "dense")
    made, dense, original = (load(tmp_path / "made"), load(tmp_path / "dense"), load(saved))
    ids = torch.as_tensor(UNSEEN)
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        logits, wanted = dense(input_ids=ids).logits, original(input_ids=ids).logits
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    assert float(kl.sum(-1)[:, :-1].mean()) == pytest.approx(result.report["kl_mean"], rel=0.02)
    torch.testing.assert_close(shown(made, saved), shown(dense, saved), rtol=1e-4, atol=1e-4)
    image = torch.nn.functional.cosine_similarity(shown(made, saved), shown(original, saved), dim=-1)
    assert image.mean() > 0.97
    blind = seen(saved)
    blind["pixel_values"] = -blind["pixel_values"]
    with torch.no_grad():
        assert not torch.allclose(made(**blind).logits, shown(made, saved))  # it does see


def test_it_loads_packed_and_in_a_format_of_our_own(saved, tmp_path):
    hfc.compress(saved, hfc.Entropy(bits=3), tmp_path / "made", calibration=IDS, evaluate=False)
    hfc.export(tmp_path / "made", "dense", tmp_path / "dense")
    wanted = shown(load(tmp_path / "dense"), saved)
    for packed in (False, True):
        model = hfc.load(tmp_path / "made", packed=packed, device="cpu")
        torch.testing.assert_close(shown(model, saved), wanted, rtol=1e-4, atol=1e-4)
    code = (
        "import json, sys, torch; import hfcompress.integrations.transformers\n"
        "from transformers import AutoModelForImageTextToText\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "print(json.dumps(model(input_ids=ids).logits[:, -1].flatten().tolist()))"
    )
    told = in_fresh_process(code, str(tmp_path / "made"), str(UNSEEN[:1].tolist()))
    with torch.no_grad():
        mine = load(tmp_path / "dense")(input_ids=torch.as_tensor(UNSEEN[:1])).logits[:, -1].flatten()
    np.testing.assert_allclose(told, mine.numpy(), rtol=1e-3, atol=1e-3)


def test_a_rotation_that_images_would_not_know_of_is_left_out(saved, tmp_path):
    steps = hfc.Rotate(when="always") >> hfc.RTN(bits=8, group_size=-1)
    result = hfc.compress(saved, steps, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    assert not result.manifest["rotation"]["hidden"]
    reason = result.manifest["rotation"]["reasons"]["hidden"]
    assert "what the model makes of images" in reason or "a norm comes between" in reason
    difference = (shown(load(tmp_path / "made"), saved) - shown(load(saved), saved)).abs().max()
    assert difference < 0.2 * shown(load(saved), saved).std()
    with pytest.raises(UnsupportedModelError, match=r"images|a norm comes between"):
        hfc.compress(saved, hfc.Prune(hidden=0.5, multiple=8), tmp_path / "narrow", calibration=IDS, evaluate=False)


def test_fewer_blocks_and_channels_still_see(saved, tmp_path):
    result = hfc.compress(
        saved, hfc.Prune(ffn=0.25, depth=1 / 3, multiple=8), tmp_path / "made", calibration=IDS, eval_data=UNSEEN
    )
    assert result.report["kl_mean"] < 2
    model = load(tmp_path / "made")
    assert model.config.get_text_config().num_hidden_layers == 2
    assert shown(model, saved).isfinite().all()


def test_names_that_are_the_modules_do_too(saved, tmp_path):
    """`save_pretrained` writes the names of the first checkpoints; others were written with those of today's modules."""
    model = load(saved)
    wanted = shown(model, saved)
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else ()
    stored = set(load_file(saved / "model.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    assert stored != set(tensors)
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    assert torch.equal(shown(load(saved), saved), wanted)
    result = hfc.compress(saved, GPTQ, tmp_path / "made", calibration=IDS, eval_data=UNSEEN)
    hfc.export(tmp_path / "made", "dense", tmp_path / "dense")
    made, dense = (shown(load(tmp_path / name), saved) for name in ("made", "dense"))
    torch.testing.assert_close(made, dense, rtol=1e-4, atol=1e-4)
    assert 0 < result.report["kl_mean"] < 0.05
