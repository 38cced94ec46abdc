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
A teacher behind an OpenAI-style completions endpoint (vLLM, llama.cpp's server and others): rows go there as token ids, are
echoed, and what comes back are the most probable tokens of each position.

Tokens come back as text, or as `token_id:5` from servers that can say so. A text that several tokens have is not heard; its
mass belongs to the rest, as that of every token beyond those that are told.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hfcompress.distillation.divergences import FLOOR
from hfcompress.distillation.signals import LEAST
from hfcompress.errors import CheckpointError, InvalidValueError
from hfcompress.models.batch import Batch
from hfcompress.models.vocabulary import tokenizer_hash


KEY = "OPENAI_API_KEY"
AT_ONCE = 4  # requests
TRIES, FIRST_WAIT, TIMEOUT = 5, 1.0, 300.0  # seconds
AGAIN = (408, 409, 429, 500, 502, 503, 504)
BY_ID = "token_id:"
NOBODY = 2**31 - 1  # an id that no vocabulary has
WORDS = 200  # of the server's own


class Endpoint:
    """
    Args:
        url (`str`): of the API, such as `http://localhost:8000/v1`.
        model (`str`): what the server calls the teacher.
        tokenizer: of the student, which has to be the teacher's; `None` where the server tells tokens by their ids.
        size (`int`): tokens that are asked for at each position.
        wait (`float`, *optional*): seconds before a request that failed for a moment is sent again; doubled each time.
    """

    def __init__(self, url: str, model: str, tokenizer: Any, size: int, wait: float = FIRST_WAIT):
        self.url, self.model, self.size, self.wait = url.rstrip("/"), model, size, wait
        self.ids, self.tokenizer = {} if tokenizer is None else _by_text(tokenizer), tokenizer_hash(tokenizer)
        self.opener = urllib.request.build_opener(_NoRedirects)

    @property
    def described(self) -> dict[str, Any]:
        """What its answers depend on, as far as it is known here."""
        return {"teacher": f"{self.model} at {self.url}", "tokenizer": self.tokenizer}

    def say(self, batches: list[Batch]) -> Iterator[dict[str, Tensor]]:
        """
        Of each batch what it says: `ids` and `log_probs` `(rows, seq_len, size)`, and `rest` `(rows, seq_len)`.

        Raises:
            InvalidValueError: it is not there, or refuses.
            CheckpointError: what it answers is not what is asked for, or it has another tokenizer.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for batch in batches:
                masks = torch.ones_like(batch.input_ids) if batch.mask is None else batch.mask
                rows = list(pool.map(self._row, batch.input_ids, masks.bool()))
                yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, row: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Of a row `(seq_len,)`; padding, where the mask is false, is not sent."""
        ids, places = row[mask].tolist(), mask.nonzero()[:, 0].tolist()
        answer = self._ask(
            {
                "model": self.model,
                "prompt": ids,
                "echo": True,
                "logprobs": self.size,
                "max_tokens": 1,
                "temperature": 0,
                "return_tokens_as_token_ids": True,
            }
        )
        try:
            said = answer["choices"][0]["logprobs"]
            tokens, tops = said["tokens"], said["top_logprobs"]
        except (LookupError, TypeError) as error:
            raise CheckpointError(
                f"{self.url} told no log-probabilities of the prompt; take a server that knows echo and logprobs for completions."
            ) from error
        self._require_same(ids, tokens)
        found = {
            "ids": torch.full((len(row), self.size), NOBODY, dtype=torch.int32),
            "log_probs": torch.full((len(row), self.size), FLOOR),
            "rest": torch.zeros(len(row)),
        }
        for number, place in enumerate(places):
            top = tops[number + 1] if number + 1 < len(tops) else None
            kept = self._known(top or {})
            if kept:
                found["ids"][place, : len(kept)] = torch.tensor([i for i, _ in kept], dtype=torch.int32)
                found["log_probs"][place, : len(kept)] = torch.tensor([p for _, p in kept])
            mass = found["log_probs"][place, : len(kept)].double().exp().sum()
            found["rest"][place] = (1 - mass).clamp(min=LEAST).log()
        return found

    def _known(self, top: Mapping[str, float]) -> list[tuple[int, float]]:
        """The tokens of a position whose ids are known, the most probable first."""
        pairs = [(self._id(text), value) for text, value in top.items()]
        known = {i: value for i, value in pairs if i is not None}
        return sorted(known.items(), key=lambda pair: -pair[1])[: self.size]

    def _id(self, text: str) -> int | None:
        return int(text.removeprefix(BY_ID)) if text.startswith(BY_ID) else self.ids.get(text)

    def _require_same(self, ids: list[int], tokens: list[str]) -> None:
        wrong = next(
            (i for i, (a, b) in enumerate(zip(ids, tokens, strict=False)) if self._id(b) not in (None, a)), None
        )
        if len(tokens) < len(ids) or wrong is not None:
            what = f"{len(tokens)} tokens" if wrong is None else f"{tokens[wrong]!r} for the id {ids[wrong]}"
            raise CheckpointError(
                f"{self.model} at {self.url} has another tokenizer: it answered {what} of a row of {len(ids)}; take a teacher "
                "with the student's tokenizer."
            )

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/completions", json.dumps(body).encode(), headers)
        for tried in range(1, TRIES + 1):
            try:
                with self.opener.open(request, timeout=TIMEOUT) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code not in AGAIN or tried == TRIES:
                    raise InvalidValueError(self._refused(error)) from None
            except (OSError, ValueError) as error:
                if tried == TRIES:
                    raise InvalidValueError(
                        f"{self.url} cannot be reached ({getattr(error, 'reason', error)}); check distill.teacher.url."
                    ) from None
            time.sleep(self.wait * 2 ** (tried - 1))
        raise AssertionError("unreachable")

    def _refused(self, error: urllib.error.HTTPError) -> str:
        words = " ".join(error.read().decode("utf-8", "replace").split())[:WORDS]
        if error.code in (401, 403):
            return f"{self.url} wants a key; set {KEY} to one that it accepts."
        return (
            f"{self.url} refused with {error.code} ({words}); check distill.teacher.model and distill.signal_size "
            f"({self.size}): many servers tell only a few log-probabilities."
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key is for the address that was given, and no other."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _by_text(tokenizer: Any) -> dict[str, int]:
    """Texts that mean one token alone -> its id, in the spellings that servers have."""
    found: dict[str, set[int]] = defaultdict(set)
    for token, number in tokenizer.get_vocab().items():
        for text in (token, tokenizer.decode([number]), token.replace("▁", " ").replace("Ġ", " ")):
            found[text].add(number)
    return {text: next(iter(numbers)) for text, numbers in found.items() if len(numbers) == 1}
