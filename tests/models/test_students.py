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
"""Students made of a teacher load plainly, and begin as the parts of it that they are said to be."""

import copy

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel
from hfcompress.models.students import make_student
from hfcompress.models.vocabulary import shared_vocabulary


def teacher_of(name: str = "llama", **changes) -> StreamedModel:
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return StreamedModel(Checkpoint.open(make_model(config)))


@torch.no_grad()
def whole(checkpoint: Checkpoint):
    """The model as plain transformers has it."""
    model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=torch.float32)
    loaded = StreamedModel(checkpoint)
    with loaded.loaded() as other:
        model.load_state_dict(other.state_dict())
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", "qwen3-mixed"])
def test_every_other_block_is_the_teacher_without_the_others(name):
    teacher = teacher_of(name)
    made = make_student(teacher, {"every": 2}, random=False, seed=0)
    kept = list(range(0, len(teacher), 2))
    assert list(made.blocks) == kept
    ids = torch.from_numpy(token_ids(2, 8))
    theirs = copy.deepcopy(teacher.checkpoint.model)
    blocks = theirs.get_submodule(teacher.block_names[0].rpartition(".")[0])
    if (kinds := getattr(theirs.config, "layer_types", None)) is not None:
        theirs.config.layer_types = [kinds[index] for index in kept]
    for index in reversed([i for i in range(len(blocks)) if i not in kept]):
        del blocks[index]
    with torch.no_grad():
        assert torch.allclose(whole(made.checkpoint)(ids).logits, theirs(ids, use_cache=False).logits, atol=1e-5)


def test_a_sliced_student_begins_as_the_leading_parts_of_spread_blocks():
    teacher = teacher_of(num_hidden_layers=5)
    made = make_student(teacher, {"num_hidden_layers": 3, "intermediate_size": 40}, random=False, seed=0)
    assert made.blocks == (0, 2, 4)
    student, theirs = whole(made.checkpoint), teacher.checkpoint.model
    for index, block in enumerate(made.blocks):
        ours, other = student.model.layers[index], theirs.model.layers[block]
        assert torch.equal(ours.mlp.down_proj.weight, other.mlp.down_proj.weight[:, :40])
        assert torch.equal(ours.mlp.gate_proj.weight, other.mlp.gate_proj.weight[:40])
        assert torch.equal(ours.self_attn.q_proj.weight, other.self_attn.q_proj.weight)
    assert torch.equal(student.lm_head.weight, theirs.lm_head.weight)
    assert made.changes == {"num_hidden_layers": 3, "intermediate_size": 40}


def test_a_random_student_depends_on_the_seed_alone():
    teacher, before = teacher_of(), torch.get_rng_state()
    first, again, other = (
        make_student(teacher, {"hidden_size": 32}, random=True, seed=seed).checkpoint for seed in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.tensors[name].read(), again.tensors[name].read())
    assert not torch.equal(first.tensors[name].read(), other.tensors[name].read())
    assert first.tensors[name].shape == (96, 32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("description", "random", "said"),
    [
        ({"every": 1}, False, "'every' stands alone, and is a whole number from 2 to"),
        ({"every": 2, "hidden_size": 32}, False, "'every' stands alone"),
        ({"hiden_size": 32}, False, "has no 'hiden_size'. Did you mean 'hidden_size'?"),
        ({"num_hidden_layers": 0}, False, "num_hidden_layers is 0; it must be a whole number from 1."),
        ({"num_hidden_layers": "x"}, True, "num_hidden_layers is 'x'; it must be a whole number from 1."),
        ({"vocab_size": 100}, True, "vocab_size stays, since a student speaks its teacher's tokens."),
        ({"hidden_act": "foo"}, True, "transformers refuses such a model ("),
        ({"num_attention_heads": 3}, True, "transformers refuses such a model ("),
        (
            {"intermediate_size": 4096},
            False,
            "a part of the original cannot be larger than it is (model.layers.0.mlp.",
        ),
        ({"num_hidden_layers": 50}, False, "cannot be larger than it is (50 blocks of"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(description, random, said):
    with pytest.raises(InvalidValueError) as error:
        make_student(teacher_of(), description, random, seed=0)
    assert str(error.value).startswith("distill.student: ")
    assert said in str(error.value)


def with_tokenizer(vocabulary: int, words: dict[str, int] | None) -> Checkpoint:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = CONFIGS["llama"]()
    config.vocab_size = vocabulary
    tokenizer = None
    if words is not None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")))
    return Checkpoint.open(make_model(config), tokenizer)


def test_vocabularies_of_one_tokenizer_share_what_both_hold():
    words = {"a": 0, "b": 1}
    assert shared_vocabulary(with_tokenizer(48, words), with_tokenizer(64, dict(words))) == 48
    assert shared_vocabulary(with_tokenizer(64, None), with_tokenizer(64, words)) == 64


def test_vocabularies_that_mean_different_things_are_refused():
    with pytest.raises(
        CheckpointError, match=r"have different tokenizers: '.' is 1 in one of them alone, and 2 entries"
    ):
        shared_vocabulary(with_tokenizer(64, {"a": 0, "b": 1}), with_tokenizer(64, {"a": 0, "c": 1}))
    with pytest.raises(
        CheckpointError, match="without a tokenizer for both nothing says that their ids mean the same"
    ):
        shared_vocabulary(with_tokenizer(48, None), with_tokenizer(64, {"a": 0}))
