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
"""A Hub on loopback: enough of its HTTP for a real `huggingface_hub` client, with faults on demand.

How it works: [`Repo`] is git without files: commits are maps from paths to [`Blob`]s, branches are names of commits, and
large blobs lie apart under their sha256, as in Git LFS. [`FakeHub`] is a threaded server over them; the routes are its
methods under `@route`. Each request is written to `requests`, and the first [`Fault`] that fits it strikes.

    with FakeHub() as hub:
        hub.faults.append(Fault("POST", "/commit/", status=503))
        subprocess.run([sys.executable, "-c", "..."], env=hub.environment(tmp_path))
        hub.count("POST", "/commit/")

One process is enough for the server; clients are subprocesses, since `huggingface_hub` reads its environment on import.
"""

import base64
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_FAKEwriteTokenThatMustNeverLeak0123"
READ_TOKEN = "hf_FAKEreadTokenThatMustNeverLeak4567"
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"
LARGE = ("*.safetensors", "*.png")  # what the attributes above name
CUT_BYTES = 10_000  # how much of a body is read before the connection is cut


@dataclasses.dataclass
class Fault:
    """
    Args:
        method (`str`): the request's method.
        path (`str`): a regular expression that is searched for in the request's path.
        status (`int`, *optional*): answer with this status.
        cut (`bool`, *optional*): close the connection in the middle of the request's body.
        lie (`bool`, *optional*): store altered bytes (uploads and commits), or tell altered hashes (trees).
        times (`int`, *optional*, defaults to 1): how many requests are struck.
        after (`bool`, *optional*): first do what is asked, then answer so, or cut.
        headers (`dict`, *optional*): of the answer, such as `Retry-After` or `X-Error-Code`.
        message (`str`, *optional*): of the answer.
        skip (`int`, *optional*): let this many requests pass first.
        meanwhile (`Callable`, *optional*): called before the request is handled, for what others do at that time.
    """

    method: str
    path: str
    status: int | None = None
    cut: bool = False
    lie: bool = False
    times: int = 1
    after: bool = False
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    message: str = "injected"
    skip: int = 0
    meanwhile: Callable[[], object] | None = None


class HubAnswer(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file at a commit; `large` ones are Git LFS objects."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself keeps."""
        if not self.large:
            return self.content
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def oid(self) -> str:
        """As `git hash-object` computes it."""
        return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclasses.dataclass
class Commit:
    """One state of a repo."""

    parent: str | None
    files: dict[str, Blob]
    message: str


class Repo:
    """Commits, branches and large blobs; a new one has a first commit, unless `empty`."""

    def __init__(self, private: bool, empty: bool = False, gated: str | bool = False):
        self.private, self.gated = private, gated
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.large: dict[str, bytes] = {}
        if not empty:
            self.add("main", {".gitattributes": Blob(GIT_ATTRIBUTES, False)}, "initial commit")

    def add(self, branch: str, files: dict[str, Blob], message: str) -> str:
        """A commit on top of `branch`; its name."""
        parent = self.branches.get(branch)
        name = hashlib.sha1(f"{parent}{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits[name] = Commit(parent, files, message)
        self.branches[branch] = name
        return name

    def at(self, revision: str) -> tuple[str, Commit]:
        """The name of a commit, and the commit, for a branch or a (short) name of a commit."""
        found = self.branches.get(revision)
        found = found or next((c for c in self.commits if len(revision) >= 7 and c.startswith(revision)), None)
        if found is None:
            raise HubAnswer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, self.commits[found]

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """The content of every file at the end of `branch`."""
        return {path: blob.content for path, blob in self.at(branch)[1].files.items()}

    def history(self, branch: str = "main") -> list[str]:
        """The messages from the first commit to the last."""
        messages, at = [], self.branches.get(branch)
        while at is not None:
            messages.append(self.commits[at].message)
            at = self.commits[at].parent
        return messages[::-1]

    def edit(self, path: str, content: bytes, branch: str = "main") -> str:
        """What another person does: one small file changed, in a commit of its own."""
        files = self.at(branch)[1].files if branch in self.branches else {}
        return self.add(branch, {**files, path: Blob(content, False)}, f"edit {path}")


ROUTES = []
REPO = r"(?P<repo>[^/]+/[^/]+)"


def route(method: str, pattern: str):
    """Register a method of [`FakeHub`]: it is given the request and what the pattern names."""

    def register(function):
        ROUTES.append((method, re.compile(pattern + "$"), function.__name__))
        return function

    return register


class FakeHub:
    """
    Attributes:
        repos (`dict[str, Repo]`): by `user/name`.
        tokens (`dict[str, tuple[str, bool]]`): each token's user, and whether it may write.
        faults (`list[Fault]`): what is still to strike.
        requests (`list[tuple[str, str]]`): method and path of every request so far.
        authorized (`list[str]`): the paths of those that carried a token.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.tokens = {TOKEN: ("user", True), READ_TOKEN: ("user", False)}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.authorized: list[str] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        """An empty Hub without faults."""
        self.repos.clear()
        self.faults.clear()
        self.requests.clear()
        self.authorized.clear()

    def environment(self, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        """The environment of a client process with `home` as its cache."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.endswith("_OFFLINE")}
        hub = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return (
            kept
            | hub
            | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
            | ({} if token is None else {"HF_TOKEN": token})
            | more
        )

    def count(self, method: str, path: str) -> int:
        """How many requests there were whose path holds this regular expression."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def strike(self, method: str, path: str) -> Fault | None:
        """The fault for this request, with its count lowered."""
        for fault in self.faults:
            if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    # who may do what

    def writer(self, request, repo_id: str) -> None:
        """The token must exist, may write, and the namespace must be its user's."""
        user, may_write = self.tokens.get(request.token, (None, False))
        if user is None:
            raise HubAnswer(401, "Invalid username or password.")
        namespace = repo_id.split("/")[0]
        if not may_write or namespace != user:
            raise HubAnswer(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')

    def repo(self, request, repo_id: str) -> Repo:
        """The repo, if it is there and this token may read it."""
        found = self.repos.get(repo_id)
        readable = found and (not found.private or self.tokens.get(request.token, ("",))[0] == repo_id.split("/")[0])
        if not readable:
            raise HubAnswer(404 if request.token in self.tokens else 401, "Repository not found", "RepoNotFound")
        return found

    # the routes

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        if request.token not in self.tokens:
            raise HubAnswer(401, "Invalid username or password.")
        return {"type": "user", "name": self.tokens[request.token][0], "orgs": [], "auth": {"type": "access_token"}}

    @route("POST", "/api/repos/create")
    def create(self, request):
        asked = request.json()
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.writer(request, repo_id)
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise HubAnswer(409, "You already created this model repo", url=url)
        self.repos[repo_id] = Repo(asked.get("visibility") == "private")
        return {"url": url, "name": repo_id}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        content = request.json()["content"]
        try:
            front = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
            valid = front is None or isinstance(yaml.safe_load(front[1]), dict)
        except yaml.YAMLError:
            valid = False
        if not valid:
            raise HubAnswer(400, "", errors=[{"message": '"license" must be a string'}], warnings=[])
        return {"errors": [], "warnings": []}

    @route("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
    def info(self, request, repo, revision=None):
        found = self.repo(request, repo)
        about = {
            "_id": repo,
            "id": repo,
            "modelId": repo,
            "private": found.private,
            "gated": found.gated,
            "tags": [],
            "siblings": [],
        }
        if not found.commits and revision is None:
            return about
        name, commit = found.at(revision or "main")
        return about | {"sha": name, "siblings": [{"rfilename": path} for path in commit.files]}

    @route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<under>.+))?")
    def tree(self, request, repo, revision, under=None):
        files = self.repo(request, repo).at(revision)[1].files
        if under is not None:
            files = {path: blob for path, blob in files.items() if path.startswith(f"{under}/")}
            if not files:
                raise HubAnswer(404, f"{under} does not exist", "EntryNotFound")
        rows = []
        for path, blob in files.items():
            row = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.large:
                row["lfs"] = {"oid": blob.sha256, "size": row["size"], "pointerSize": len(blob.pointer)}
            if request.lie:
                row["oid"] = "0" * 40
                row |= {"lfs": row["lfs"] | {"oid": "0" * 64}} if blob.large else {}
            rows.append(row)
        return rows

    @route("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
    def branch(self, request, repo, branch):
        found = self.repo(request, repo)
        self.writer(request, repo)
        if branch in found.branches:
            raise HubAnswer(409, "Reference already exists")
        found.branches[branch] = found.at(request.json().get("startingPoint", "main"))[0]
        return {}

    @route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, request, repo, revision):
        found = self.repo(request, repo)
        self.writer(request, repo)
        files = found.at(revision)[1].files if found.commits else {}
        asked = request.json()
        ignored = asked.get("gitIgnore") or files.get(".gitignore", Blob(b"", False)).content.decode()
        rows = []
        for file in asked["files"]:
            path = file["path"]
            row = {
                "path": path,
                "uploadMode": "lfs" if any(fnmatch.fnmatch(path, p) for p in LARGE) else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(path, line) for line in ignored.split()),
            }
            rows.append(row | ({"oid": files[path].etag} if path in files else {}))
        return {"files": rows}

    @route("POST", f"/{REPO}.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo):
        found = self.repo(request, repo)
        self.writer(request, repo)
        objects = []
        for asked in request.json()["objects"]:
            upload = {"href": f"{self.url}/_lfs/{repo}/{asked['oid']}"}
            known = asked["oid"] in found.large
            objects.append(asked if known else asked | {"actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    @route("PUT", f"/_lfs/{REPO}/(?P<oid>[0-9a-f]+)")
    def lfs_put(self, request, repo, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubAnswer(400, "The bytes do not have this sha256")
        self.repos[repo].large[oid] = request.altered(request.body)
        return {}

    @route("POST", f"/api/models/{REPO}/commit/(?P<branch>[^/]+)")
    def commit(self, request, repo, branch):
        found = self.repo(request, repo)
        self.writer(request, repo)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if "parentCommit" in header and header["parentCommit"] != found.branches.get(branch):
            raise HubAnswer(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.at(branch)[1].files) if found.commits else {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(request.altered(base64.b64decode(value["content"])), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in found.large:
                    raise HubAnswer(400, "LFS object does not exist")
                files[value["path"]] = Blob(found.large[value["oid"]], True)
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise HubAnswer(404, "A file with this name doesn't exist", "EntryNotFound")
        name = found.add(branch, files, header["summary"])
        return {"success": True, "commitOid": name, "commitUrl": f"{self.url}/{repo}/commit/{name}"}

    @route("HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    @route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request, repo, revision, path):
        name, commit = self.repo(request, repo).at(revision)
        request.answer_headers["X-Repo-Commit"] = name
        if path not in commit.files:
            raise HubAnswer(404, f"{path} does not exist", "EntryNotFound")
        blob = commit.files[path]
        request.answer_headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.large:
            request.answer_headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return blob.content


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, lets faults strike, and asks [`FakeHub`] for the answers."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits for the client's delayed acknowledgement
    wbufsize = -1

    def log_message(self, *_):
        """Silence."""

    def do_GET(self):
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self):
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        authorization = self.headers.get("Authorization", "")
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        self.answer_headers: dict[str, str] = {}
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            if self.token:
                self.hub.authorized.append(path)
            fault = self.hub.strike(self.command, path)
        self.lie = fault is not None and fault.lie
        if fault and fault.meanwhile:
            fault.meanwhile()
        if fault and fault.cut and not fault.after:
            self.rfile.read(min(CUT_BYTES, int(self.headers.get("Content-Length", 0)) // 2))
            self.hang_up()
            return
        self.body = self.read_body()
        if fault and fault.status and not fault.after:
            self.refuse(HubAnswer(fault.status, fault.message), fault.headers)
            return
        try:
            with self.hub.lock:
                answer = self.ask(path)
        except HubAnswer as refusal:
            self.refuse(refusal)
            return
        if fault and fault.after and fault.cut:
            self.hang_up()
        elif fault and fault.after and fault.status:
            self.refuse(HubAnswer(fault.status, fault.message), fault.headers)
        else:
            self.send(answer)

    def ask(self, path: str):
        """What the Hub says to this request."""
        for method, pattern, name in ROUTES:
            if method == self.command and (found := pattern.match(path)):
                named = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                return getattr(self.hub, name)(self, **named)
        raise HubAnswer(404, f"there is no route {self.command} {path}")

    def json(self) -> dict:
        """The request's body."""
        return json.loads(self.body)

    def altered(self, content: bytes) -> bytes:
        """The bytes themselves, or with one of them changed if this request is lied to."""
        return content[:-1] + bytes([content[-1] ^ 1]) if self.lie and content else content

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, answer, status: int = 200) -> None:
        """Bytes as they are (or the range that is asked for), anything else as JSON."""
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and isinstance(answer, bytes) and status == 200:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            self.answer_headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.send_response(status)
        self.answer_headers.setdefault("Content-Type", "application/json")
        for key, value in {**self.answer_headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, refusal: HubAnswer, headers: dict[str, str] | None = None) -> None:
        self.answer_headers |= {"X-Error-Message": refusal.message} if refusal.message else {}
        self.answer_headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
        self.answer_headers |= headers or {}
        self.send({"error": refusal.message} | refusal.body, refusal.status)

    def hang_up(self) -> None:
        """Reset the connection, so that the client sees it at once."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
