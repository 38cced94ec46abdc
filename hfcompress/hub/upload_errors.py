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
"""Asking the Hub: again where it fails for a moment, one sentence where it fails for good.

`huggingface_hub` itself repeats what uploads bytes, but neither the creation of a repo or a branch nor the commit;
[`ask`] repeats those. What is raised here carries no chain of causes: those hold request headers and signed addresses.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from hfcompress.errors import HfcompressError


Answer = TypeVar("Answer")
CLIENT_ERRORS = (HTTPError, OSError, ValueError, KeyError, RuntimeError)  # what calls of huggingface_hub raise
CONFLICTS = (409, 412)
SHORT_LIVED = ("TimeoutException", "NetworkError", "RemoteProtocolError")  # of httpx, or of httpx2 in newer clients
UNSENDABLE = ("LocalProtocolError", "UnicodeEncodeError")  # a header that holds a character it may not
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")  # how hf_xet words a refusal
SECRETS = (
    (re.compile(r"\b(?:hf|api_org)_\w{8,}"), "***"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), "***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+\S+"), r"\1 ***"),
    (re.compile(r"(://)[^/\s@]+@"), r"\1"),  # a password in an address
    (re.compile(r"(://[^\s?]+)\?\S+"), r"\1"),  # a signed address
)
SERVER_WORDS = 200  # characters of the server's own message that are passed on
RESUME = "push it again with `hfcompress push`; what was uploaded is not sent again"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


class HubError(HfcompressError, OSError):
    """The Hub refused, could not be reached, or did not keep what it was sent."""


class HubConflictError(HubError):
    """Someone else changed the repo in the meantime."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """
    How often to ask, and how long to wait in between.

    Args:
        tries (`int`, *optional*, defaults to 5): how often a request is sent in all.
        first (`float`, *optional*, defaults to 1): seconds before the second try; doubled each time.
        longest (`float`, *optional*, defaults to 300): no wait is longer, whatever the Hub asks for (its limits are
            counted in windows of five minutes).
    """

    tries: int = 5
    first: float = 1.0
    longest: float = 300.0

    def wait(self, error: Exception, attempt: int) -> float:
        """Seconds before the next try: what the Hub asks for, or a doubling pause."""
        asked = _asked_wait(error)
        return min(self.longest, self.first * 2**attempt if asked is None else asked)


ONCE = Patience(tries=1)  # for uploads, which huggingface_hub repeats itself


def ask(
    call: Callable[[], Answer],
    target: str,
    patience: Patience,
    note: Callable[[str], None],
    recover: Callable[[], Answer | None] = lambda: None,
) -> Answer:
    """
    Args:
        call (`Callable`): a request to the Hub.
        target (`str`): the repo, for the sentence.
        patience (`Patience`): how often and how long.
        note (`Callable[[str], None]`): told about every wait.
        recover (`Callable`, *optional*): asked after a failure, before another try: the answer if the request was
            carried out after all, else `None`.

    Returns:
        The answer of `call`.

    Raises:
        HubConflictError: someone else changed the repo.
        HubError: anything else that `huggingface_hub` reports.
    """
    for attempt in range(patience.tries):
        try:
            return call()
        except CLIENT_ERRORS as caught:
            error = caught
        passing = is_passing(error)
        if passing or _status(error) in CONFLICTS:
            answer = recover()
            if answer is not None:
                return answer
        if not passing:
            break
        if attempt + 1 < patience.tries:
            seconds = patience.wait(error, attempt)
            note(f"{_what(error)}; asking again in {seconds:.0f} s.")
            time.sleep(seconds)
    raise explain(error, target)  # outside of the handler: no context


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed in a moment."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return _is_a(error, SHORT_LIVED) or isinstance(error, json.JSONDecodeError)


def explain(error: Exception, target: str) -> HubError:
    """What went wrong, and what to do, without anything secret."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # an upload's thread wraps what it met
    status = _status(error)
    if status in CONFLICTS:
        return HubConflictError(
            f"Someone else changed {target} during the push: look at what is there, then {RESUME}."
        )
    return HubError(_sentence(error, status, target))


def scrub(text: str) -> str:
    """One line, without tokens, passwords and signed addresses."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _sentence(error: Exception, status: int | None, target: str) -> str:
    namespace, endpoint = target.split("/")[0], scrub(constants.ENDPOINT)
    said = _server_message(error)
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it and run the same command again."
        case LocalTokenNotFoundError():
            return f"There is no token for the Hub: {LOG_IN} to {target}."
        case GatedRepoError():
            return f"{target} is gated: accept its terms at {endpoint}/{target}, then run the same command again."
        case DisabledRepoError():
            return f"The Hub has disabled {target}: push to another name."
        case RevisionNotFoundError():
            return f"{target} has no such revision: push to main first, and to a branch after that{said}."
        case json.JSONDecodeError() | KeyError():
            return f"{endpoint} does not answer as a Hub does: check the network and HF_ENDPOINT, then {RESUME}."
    if _is_a(error, UNSENDABLE):
        return f"The token holds a character that cannot be sent: {LOG_IN} to {target}."
    match status:
        case 401:
            return f"The Hub does not accept the token, or there is none: {LOG_IN} to {target}."
        case 403:
            return f"This token may not write to {namespace}: use one that may, or push to a name of your own{said}."
        case 404:
            return f"There is no {target} that this token may see: check the name and that {namespace} exists{said}."
        case 429:
            return f"The Hub has had too many requests from you: wait a few minutes, then {RESUME}{said}."
        case int() if status >= 500 or status == 408:
            return f"The Hub fails ({status}): later, {RESUME}."
        case int():
            return f"The Hub refused the push to {target} ({status}): put right what it names, then {RESUME}{said}."
    if _is_a(error, ("XetAuthenticationError",)):
        return f"The Hub's storage refused this token: {LOG_IN} to {target}."
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return (
            f"{endpoint} cannot be reached, or the connection broke{_detail(error)}: check the network, then {RESUME}."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read ({error.strerror}); put that right, then {RESUME}."
    return f"The push to {target} failed{_detail(error)}: put right what it names, then {RESUME}."


def _what(error: Exception) -> str:
    status = _status(error)
    return "The Hub cannot be reached" if status is None else f"The Hub answered {status}"


def _status(error: Exception) -> int | None:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    xet = XET_STATUS.search(str(error)) if isinstance(error, ConnectionError) else None
    return int(xet[1]) if xet else None


def _asked_wait(error: Exception) -> float | None:
    if not isinstance(error, HfHubHTTPError):
        return None
    limit = parse_ratelimit_headers(error.response.headers)
    if limit is not None and limit.remaining == 0 and _status(error) == 429:
        return limit.reset_in_seconds
    seconds = error.response.headers.get("Retry-After", "")
    return int(seconds) if seconds.isdigit() else None


def _server_message(error: Exception) -> str:
    message = scrub(getattr(error, "server_message", None) or "").rstrip(".")[:SERVER_WORDS]
    return f" (the Hub says: {message})" if message else ""


def _detail(error: Exception) -> str:
    words = scrub(str(error)).rstrip(".")[:SERVER_WORDS]
    return f" ({words})" if words else ""


def _is_a(error: Exception, names: tuple[str, ...]) -> bool:
    """By name, since the classes come from httpx or httpx2, whichever the client is built on, or from hf_xet."""
    return any(kind.__name__ in names for kind in type(error).__mro__)
