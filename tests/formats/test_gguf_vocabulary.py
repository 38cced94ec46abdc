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
"""The tokenizer in a GGUF file: how words are cut is matched by what tokenizer.json says, and the rest is carried over."""

import json

import pytest
from transformers import AutoTokenizer

from hfcompress.errors import CheckpointError, UnsupportedModelError
from hfcompress.formats.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary


# as they stand in the tokenizer.json of Llama 3, Qwen 2, Mistral Nemo and gpt-4o's kin
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_4O = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ONLY_BYTES = {**BYTES, "use_regex": False}


def split(pattern, behavior="Isolated"):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def document(pre_tokenizer, normalizer=None, added=(), **model):
    merged = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **model}
    return {"model": merged, "pre_tokenizer": pre_tokenizer, "normalizer": normalizer, "added_tokens": list(added)}


def read(tmp_path, tokenizer_json, size=8, tokenizer=None):
    (tmp_path / "tokenizer.json").write_text(
        tokenizer_json if isinstance(tokenizer_json, str) else json.dumps(tokenizer_json)
    )
    return read_vocabulary(tmp_path, tokenizer, size)


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (BYTES, False, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTES), False, "smollm"),
        (sequence(split(LLAMA_3), ONLY_BYTES), True, "llama-bpe"),
        (sequence(split(LLAMA_3), ONLY_BYTES), False, "dbrx"),
        (sequence(split(QWEN_2), ONLY_BYTES), False, "qwen2"),
        (sequence(split(TEKKEN), ONLY_BYTES), True, "tekken"),
        (sequence(split(GPT_4O), ONLY_BYTES), False, "gpt-4o"),
    ],
)
def test_pre_tokenizers_are_matched_by_what_they_do(tmp_path, pre_tokenizer, ignore_merges, name):
    found = read(tmp_path, document(pre_tokenizer, ignore_merges=ignore_merges))
    assert (found.model, found.pre, found.notes, found.merges) == ("gpt2", name, [], ["a b"])


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        sequence(split(QWEN_2 + "|x"), ONLY_BYTES),
        sequence(split(QWEN_2, "Removed"), ONLY_BYTES),
        sequence({"type": "Digits", "individual_digits": False}, BYTES),
        ONLY_BYTES,
    ],
)
def test_one_that_llama_cpp_has_not_is_said_so(tmp_path, pre_tokenizer):
    found = read(tmp_path, document(pre_tokenizer))
    assert found.pre == "default"
    assert len(found.notes) == 1
    assert "no pre-tokenizer like this" in found.notes[0]


def test_what_llama_cpp_leaves_out_is_said(tmp_path):
    found = read(tmp_path, document({**BYTES, "add_prefix_space": True}, normalizer={"type": "NFC"}))
    assert found.pre == "gpt-2"
    assert any("(NFC)" in note for note in found.notes)
    assert any("no space before the first word" in note for note in found.notes)


def test_tokens_their_types_and_rows_without_a_token(tmp_path):
    added = [
        {"id": 3, "content": "<|end|>", "special": True},
        {"id": 5, "content": "<tool>", "special": False},
    ]
    found = read(tmp_path, document(BYTES, added=added))
    assert found.tokens == ["a", "b", "ab", "<|end|>", "[PAD4]", "<tool>", "[PAD6]", "[PAD7]"]
    assert found.types == [NORMAL, NORMAL, NORMAL, CONTROL, UNUSED, USER_DEFINED, UNUSED, UNUSED]


SPACED = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "unk_token": "<unk>",
    "byte_fallback": True,
    "vocab": {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "ab": 4, "▁": 5, "▁ab": 6, "▁a": 7},
    "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"], ["▁", "ab"]],
}


def test_spaced_bpe_has_scores_in_the_order_of_its_merges(tmp_path):
    found = read(tmp_path, document(None, **SPACED), size=9)
    assert (found.model, found.pre, found.merges) == ("llama", "default", None)
    assert found.types == [UNKNOWN, BYTE, *[NORMAL] * 6, UNUSED]
    assert found.flags == {"add_space_prefix": True}
    assert found.scores[7] > found.scores[4] > found.scores[6] > found.scores[2] == found.scores[8]
    assert found.scores[7] == 0


@pytest.mark.parametrize(("scheme", "prefix"), [("first", True), ("always", True), ("never", False)])
def test_a_metaspace_says_whether_a_space_is_put_before(tmp_path, scheme, prefix):
    settings = {**SPACED, "normalizer": None}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    assert read(tmp_path, document(metaspace, **settings)).flags == {"add_space_prefix": prefix}


def test_special_ids_flags_and_chat_template(tmp_path, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ messages[0].content }}"
    found = read_vocabulary(tiny, tokenizer, 1024)
    assert found.special == {"bos_token_id": 0, "eos_token_id": 0}
    assert found.flags == {"add_bos_token": False, "add_eos_token": False}
    assert found.chat_template == "{{ messages[0].content }}"
    assert (found.pre, found.notes, len(found.tokens)) == ("gpt-2", [], 1024)


def test_a_first_token_that_the_tokenizer_adds_is_added(tmp_path, tiny):
    written = json.loads((tiny / "tokenizer.json").read_text())
    end = written["added_tokens"][0]["content"]
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": end, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end: {"id": end, "ids": [0], "tokens": [end]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    (tmp_path / "tokenizer_config.json").write_text((tiny / "tokenizer_config.json").read_text())
    found = read_vocabulary(tmp_path, AutoTokenizer.from_pretrained(tmp_path), 1024)
    assert found.flags == {"add_bos_token": True, "add_eos_token": False}


def test_without_a_tokenizer_the_file_takes_ids(tmp_path):
    found = read_vocabulary(tmp_path, None, 8)
    assert found.model == "none"
    assert "token ids only" in found.notes[0]


@pytest.mark.parametrize(
    ("tokenizer_json", "error", "says"),
    [
        ("{", CheckpointError, "is damaged"),
        ("[]", CheckpointError, "is damaged"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": BYTES}, CheckpointError, "is damaged"),
        ({"model": {"type": "Unigram"}}, UnsupportedModelError, "A Unigram tokenizer is not written"),
        (document(None), UnsupportedModelError, "neither byte-level nor"),
        (
            document(BYTES, added=[{"id": 8, "content": "x"}]),
            UnsupportedModelError,
            "token 8, and the embeddings have 8",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tokenizer_json, error, says):
    with pytest.raises(error, match=says):
        read(tmp_path, tokenizer_json)


def test_a_tokenizer_of_another_form_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"without tokenizer\.json"):
        read_vocabulary(tmp_path, object(), 8)
