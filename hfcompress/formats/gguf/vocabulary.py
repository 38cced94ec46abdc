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
A tokenizer as GGUF holds it: tokens with types, merges or scores, the special ids, and which of llama.cpp's
pre-tokenizers cuts a text into words.

tokenizer.json says how a text is cut; llama.cpp has its ways built in, under names. They are matched by what is in the
file. Two kinds are known: byte-level BPE (llama.cpp's `gpt2`), and BPE over text whose spaces have become `▁`, with
byte tokens for what is not in the vocabulary (`llama`, after SentencePiece).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError, UnsupportedModelError


TOKENIZER_FILE = "tokenizer.json"
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
LEAST_SCORE = -1e9  # of a token that no merge makes

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_THREE_DIGITS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _ENDS
_ONE_DIGIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _ENDS
# (how words are cut, whether a word that is a token skips the merges) -> llama.cpp's name (llama-vocab.cpp)
PRE_TOKENIZERS = {
    (("bytes",), False): "gpt-2",
    (("digits", "bytes"), False): "smollm",
    ((_THREE_DIGITS,), True): "llama-bpe",
    ((_THREE_DIGITS,), False): "dbrx",
    ((_ONE_DIGIT,), False): "qwen2",
    ((_CASED % ("", "", ""),), True): "tekken",
    ((_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}"),), False): "gpt-4o",
}


@dataclass
class Vocabulary:
    """
    Args:
        model (`str`): `tokenizer.ggml.model`: `"gpt2"`, `"llama"` or `"none"`.
        tokens (`list[str]`): as many as the embeddings have rows.
        types (`list[int]`): `gguf.TokenType` of each.
        pre (`str` or `None`): `tokenizer.ggml.pre`.
        merges (`list[str]` or `None`): pairs with a space between, the first merged first.
        scores (`list[float]` or `None`): the greatest is merged first.
        flags (`dict[str, bool]`): `add_bos_token` and the like.
        special (`dict[str, int]`): ids by GGUF's names.
        chat_template (`str` or `None`): Jinja.
        notes (`list[str]`): what a user should know.
    """

    model: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    """
    Args:
        folder (`Path`): of the checkpoint.
        tokenizer: transformers' tokenizer of it, or `None` where it has none.
        size (`int`): rows of the embeddings.

    Raises:
        CheckpointError: tokenizer.json is damaged.
        UnsupportedModelError: a kind of tokenizer that is not written to GGUF, or more tokens than embeddings.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        if tokenizer is not None:
            raise UnsupportedModelError(
                f"{folder} has a tokenizer without {TOKENIZER_FILE}, which GGUF's is made from; load it with "
                "transformers and save it again with save_pretrained."
            )
        return Vocabulary("none", notes=["there is no tokenizer: the file takes token ids only"])
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        model = document["model"]
        kind = model.get("type")
        if kind != "BPE":
            raise UnsupportedModelError(f"A {kind} tokenizer is not written to GGUF yet; a BPE one is.")
        vocabulary = _byte_level(document) if _is_byte_level(document) else _spaced(document)
        _add_tokens(vocabulary, document, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise CheckpointError(f"{path} is damaged; download or copy that file again.") from error
    if tokenizer is not None:
        _add_special(vocabulary, tokenizer)
    return vocabulary


def _parts(section: dict | None, name: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, a sequence or not."""
    if section is None:
        return []
    return section[name] if section["type"] == "Sequence" else [section]


def _is_byte_level(document: dict) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(document.get("pre_tokenizer"), "pretokenizers"))


def _byte_level(document: dict) -> Vocabulary:
    model = document["model"]
    steps = _parts(document["pre_tokenizer"], "pretokenizers")
    known = PRE_TOKENIZERS.get((tuple(map(_cut, steps))[: _cuts(steps)], bool(model.get("ignore_merges"))))
    notes = []
    if known is None:
        notes.append(
            "llama.cpp has no pre-tokenizer like this tokenizer's, so its default cuts words otherwise in places: feed "
            "it token ids where that matters"
        )
    normalizers = [part["type"] for part in _parts(document.get("normalizer"), "normalizers")]
    if normalizers:
        notes.append(f"llama.cpp does not normalize texts for this tokenizer ({', '.join(normalizers)}): do it before")
    if any(part["type"] == "ByteLevel" and part.get("add_prefix_space") for part in steps):
        notes.append("llama.cpp puts no space before the first word, as this tokenizer does: put it there yourself")
    return Vocabulary("gpt2", pre=known or "default", merges=_merges(model), notes=notes)


def _cuts(steps: list[dict]) -> int:
    """How many of the steps cut: a ByteLevel without its own regex behind others only maps bytes to letters."""
    last = steps[-1]
    return len(steps) - (last["type"] == "ByteLevel" and not last.get("use_regex", True))


def _cut(step: dict) -> str:
    if step["type"] == "ByteLevel" and step.get("use_regex", True):
        return "bytes"
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    isolated = step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    return step["pattern"].get("Regex", "?") if isolated else "?"


def _merges(model: dict) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _spaced(document: dict) -> Vocabulary:
    """Spaces become `▁`, and merges run over whole texts: llama.cpp merges the pair that makes the best token."""
    model = document["model"]
    normalizers = _parts(document.get("normalizer"), "normalizers")
    steps = _parts(document.get("pre_tokenizer"), "pretokenizers")
    replaces = any(
        part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE
        for part in normalizers
    )
    metaspace = next((step for step in steps if step["type"] == "Metaspace"), None)
    if not model.get("byte_fallback") or not (replaces or metaspace):
        raise UnsupportedModelError(
            f"This BPE tokenizer is neither byte-level nor of spaces as {SPACE} with byte_fallback; llama.cpp has no such."
        )
    prefix = any(part["type"] == "Prepend" and part["prepend"] == SPACE for part in normalizers)
    if metaspace is not None:
        prefix = metaspace.get("prepend_scheme", "always") != "never"
    notes = []
    strange = [part["type"] for part in normalizers if part["type"] not in ("Replace", "Prepend")]
    if strange:
        notes.append(f"llama.cpp does not normalize texts for this tokenizer ({', '.join(strange)}): do it before")
    scores = [LEAST_SCORE] * (max(model["vocab"].values()) + 1)
    for rank, merge in enumerate(_merges(model)):
        token = model["vocab"].get(merge.replace(" ", "", 1))
        if token is not None and scores[token] == LEAST_SCORE:
            scores[token] = -float(rank)
    flags = {"add_space_prefix": prefix}
    return Vocabulary("llama", pre="default", scores=scores, flags=flags, notes=notes)


def _add_tokens(vocabulary: Vocabulary, document: dict, size: int) -> None:
    model, added = document["model"], document.get("added_tokens", [])
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {entry["id"]: entry["content"] for entry in added}
    if max(texts) >= size:
        raise UnsupportedModelError(
            f"The tokenizer has a token {max(texts)}, and the embeddings have {size} rows; GGUF needs a row for each."
        )
    types = {entry["id"]: CONTROL if entry.get("special") else USER_DEFINED for entry in added}
    if vocabulary.model == "llama":
        types |= {number: BYTE for number, text in texts.items() if _is_byte(text)}
        if model.get("unk_token") is not None:
            types[model["vocab"][model["unk_token"]]] = UNKNOWN
    vocabulary.tokens = [texts.get(number, f"[PAD{number}]") for number in range(size)]
    vocabulary.types = [types.get(number, NORMAL) if number in texts else UNUSED for number in range(size)]
    if vocabulary.scores is not None:
        vocabulary.scores += [LEAST_SCORE] * (size - len(vocabulary.scores))


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _add_special(vocabulary: Vocabulary, tokenizer: Any) -> None:
    for name, attribute in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{attribute}_token_id", None)
        if number is not None and number < len(vocabulary.tokens):
            vocabulary.special[f"{name}_token_id"] = number
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a", add_special_tokens=True).input_ids
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    bos, eos = ([number] for number in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    vocabulary.flags["add_bos_token"] = whole[:before] == bos
    vocabulary.flags["add_eos_token"] = whole[before + len(plain) :] == eos
    if isinstance(tokenizer.chat_template, str):
        vocabulary.chat_template = tokenizer.chat_template
