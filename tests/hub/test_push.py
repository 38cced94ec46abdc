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
"""The push, by a real `huggingface_hub` client over HTTP against a Hub of our own, with every fault that it can meet.

Most pushes run in one client process that lives as long as this module, since `huggingface_hub` reads its environment
on import and this process is offline. After each of them the model is downloaded into an empty cache: what loads must be
the folder byte for byte, or nothing, or what was there before.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
from fake_hub import READ_TOKEN, TOKEN, FakeHub, Fault, Repo

from hfcompress.errors import CheckpointError, HfcompressError, InvalidValueError
from hfcompress.hub.push import carried_files, push
from hfcompress.hub.upload_errors import HubError, explain, scrub


ID = "user/model"
MESSAGE = f"Model compressed by hfcompress {version('hfcompress')}"
CARD = "---\nlicense: mit\n---\n# A card\n"
ROUTES = {
    "create": ("POST", "/api/repos/create"),
    "info": ("GET", f"/api/models/{ID}$"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/_lfs/"),
    "card": ("POST", "/validate-yaml"),
    "commit": ("POST", "/commit/main"),
    "tree": ("GET", "/tree/"),
}
EVER = 1_000_000

# The waits are noted and cut short: those of huggingface_hub cannot be set.
CLIENT = """
import hashlib, json, os, sys, tempfile, time, traceback
from pathlib import Path

waits = []
def short_sleep(seconds, sleep=time.sleep):
    waits.append(seconds)
    sleep(min(seconds, 0.001))
time.sleep = short_sleep

from huggingface_hub import snapshot_download
from safetensors import safe_open
from hfcompress.errors import HfcompressError
from hfcompress.hub.push import push

def load(repo_id, revision):
    with tempfile.TemporaryDirectory() as cache:
        needed = ["config.json", "model*"]
        folder = Path(snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=needed))
        index = folder / "model.safetensors.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        if not (folder / "config.json").exists() or not all((folder / name).exists() for name in names):
            return None
        for name in names:
            with safe_open(folder / name, "np") as weights:
                assert weights.keys()
        kept = ["config.json", *sorted(names)]
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in kept}

for line in sys.stdin:
    job = json.loads(line)
    os.environ.update(job.pop("env"))
    waits.clear()
    answer = {}
    try:
        if "load" in job:
            answer["loaded"] = load(*job["load"])
        else:
            readme = job.pop("readme", None)
            contents = readme and {"README.md": readme.encode()}
            pushed = push(Path(job.pop("folder")), **job, contents=contents)
            answer = vars(pushed)
    except HfcompressError as error:
        answer = {"error": str(error), "kind": type(error).__name__, "traceback": traceback.format_exc()}
    print(json.dumps(answer | {"waits": waits}), flush=True)
assert "torch" not in sys.modules
"""


class Client:
    """A process that pushes and loads on request."""

    def __init__(self, hub: FakeHub, home: Path):
        self.log = home / "stderr.txt"
        self.said: list[str] = []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with open(self.log, "w") as log:
            command, env = [sys.executable, "-c", CLIENT], hub.environment(home)
            self.process = subprocess.Popen(command, env=env, stderr=log, **pipes)

    def ask(self, **job) -> dict:
        """One job; its token is `TOKEN` unless `env` says otherwise."""
        job["env"] = {"HF_TOKEN": TOKEN, **job.get("env", {})}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.said.append(self.process.stdout.readline())
        assert self.said[-1], self.log.read_text()[-3000:]
        return json.loads(self.said[-1])

    def push(self, folder: Path, repo_id: str = ID, **options) -> dict:
        """What was pushed, which must have succeeded."""
        answer = self.ask(folder=str(folder), repo_id=repo_id, **options)
        assert "error" not in answer, answer
        return answer

    def refused(self, folder: Path, repo_id: str = ID, **options) -> dict:
        """The error, which must be one sentence of ours that hides its causes."""
        answer = self.ask(folder=str(folder), repo_id=repo_id, **options)
        assert "error" in answer, answer
        assert answer["error"].endswith(".")
        assert "\n" not in answer["error"]
        assert answer["traceback"].count("Traceback") == 1, answer["traceback"]
        assert TOKEN not in answer["traceback"]
        return answer

    def load(self, repo_id: str = ID, revision: str | None = None) -> dict | None:
        """The hashes of configuration and weights as an empty cache gets them; `None` if it is no model."""
        return self.ask(load=[repo_id, revision])["loaded"]


@pytest.fixture(scope="module")
def hub_server():
    with FakeHub() as server:
        yield server


@pytest.fixture
def hub(hub_server):
    hub_server.reset()
    return hub_server


@pytest.fixture(scope="module")
def client(hub_server, tmp_path_factory):
    made = Client(hub_server, tmp_path_factory.mktemp("client"))
    yield made
    made.process.stdin.close()
    assert made.process.wait(timeout=60) == 0, made.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory) -> Path:
    """The tiny Llama in three shards or more, with all that a result may carry and much that it must not."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("results") / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="1500KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE-PSF.txt"):
        shutil.copy(tiny / name, folder)
    _write(folder, {"hfcompress.json": "{}", "eval_results.json": "{}", "README.md": CARD, "report.html": "<p>"})
    _write(folder, {"plots/kl.png": "png", ".eval_results/mmlu.yaml": "[]", "chat_template.jinja": "{{ x }}"})
    _write(folder, {".journal": "no", "tokenizer.json.tmp": "no", ".git/config": "no", "notes.txt": "no"})
    _write(folder, {"model.safetensors.partial": "no", "plots/.kl.png.tmp": "no", "modeling.py": "no"})
    return folder


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory) -> Path:
    """The tiny Llama in one file with another final norm: another model."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("results") / "single"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    tensors = load_file(tiny / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 0.5}, folder / "model.safetensors")
    return _write(folder, {"hfcompress.json": "{}", "README.md": CARD})


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    """What [`Client.load`] must find."""
    names = ["config.json", *sorted(p.name for p in folder.glob("model*.safetensors"))]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def _content(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in carried_files(folder).items()}


def _own(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


# what arrives


def test_a_push_is_one_commit_of_the_whole_folder(hub, sharded, tmp_path):
    code = (
        "import json, sys; from hfcompress.hub.push import push; "
        "print(json.dumps(vars(push(sys.argv[1], sys.argv[2])))); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(sharded), ID]
    done = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pushed = json.loads(done.stdout)
    repo = hub.repos[ID]
    assert pushed == {"repo_id": ID, "url": f"{hub.url}/{ID}", "commit": repo.branches["main"]}
    assert repo.history() == ["initial commit", MESSAGE]
    assert not repo.private
    arrived = _own(repo.files())
    shards = {p.name for p in sharded.glob("model-*.safetensors")}
    assert len(shards) >= 3
    assert arrived.keys() == {
        *shards, "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "LICENSE-PSF.txt", "hfcompress.json", "eval_results.json",
        "README.md", "report.html", "plots/kl.png", ".eval_results/mmlu.yaml",
    }  # fmt: skip
    assert all((sharded / name).read_bytes() == content for name, content in arrived.items())
    changing = [path for method, path in hub.requests if method in ("PUT", "POST")]
    assert changing[-1].endswith("/commit/main")  # after every upload
    assert hub.count("PUT", "/_lfs/") == len(shards) + 1


def test_another_process_loads_what_was_pushed_and_computes_the_same(hub, client, sharded, single, tmp_path):
    client.push(sharded)
    client.push(single, revision="w4/try", message="another try")
    client.push(single, "user/hidden", private=True)
    hub.faults.append(Fault("PUT", "/_lfs/", lie=True))
    client.refused(single, "user/lied")
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(48).reshape(2, 24) * 7 % 512

def logits(name, **options):
    return AutoModelForCausalLM.from_pretrained(name, **options)(tokens).logits

try:
    logits("user/lied")
    loads = True
except (OSError, ValueError):  # no config.json
    loads = False
sharded, single = logits(sys.argv[1]), logits(sys.argv[2])
print(json.dumps([
    torch.equal(logits("user/model"), sharded),
    torch.equal(logits("user/model", revision="w4/try"), single),
    torch.equal(logits("user/hidden"), single),
    torch.equal(sharded, single),
    loads,
]))
"""
    env = hub.environment(tmp_path, OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")
    command = [sys.executable, "-c", code, str(sharded), str(single)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [True, True, True, False, False]
    assert hub.repos[ID].history("w4/try")[-1] == "another try"


def test_a_branch_starts_from_main_and_leaves_it_alone(hub, client, sharded, single):
    client.push(sharded)
    main = hub.repos[ID].branches["main"]
    first = client.push(single, revision="w4")
    assert first["url"] == f"{hub.url}/{ID}/tree/w4"
    repo = hub.repos[ID]
    assert repo.branches == {"main": main, "w4": first["commit"]}
    assert _own(repo.files("w4")) == _content(single) | {"LICENSE-PSF.txt": _content(sharded)["LICENSE-PSF.txt"]}
    second = client.push(sharded, revision="w4", message="back again")
    assert repo.history("w4")[-1] == "back again"
    assert repo.commits[second["commit"]].parent == first["commit"]
    assert hub.count("POST", "/branch/") == 1
    assert client.load(revision="w4") == client.load() == _hashes(sharded)


def test_a_push_replaces_the_model_that_was_there(hub, client, sharded, single):
    client.push(sharded)
    hub.repos[ID].edit("notes.md", b"a person's notes")
    client.push(single)
    assert "An earlier model left these in user/model, the commit removes them: " in client.log.read_text()
    repo = hub.repos[ID]
    kept = {"notes.md": b"a person's notes", "LICENSE-PSF.txt": _content(sharded)["LICENSE-PSF.txt"]}
    assert _own(repo.files()) == _content(single) | kept
    assert len(repo.history()) == 4
    assert client.load() == _hashes(single)
    client.push(sharded)
    assert client.load() == _hashes(sharded)
    assert "model.safetensors" not in repo.files()
    assert len(repo.history()) == 5


def test_pushing_the_same_again_changes_nothing(hub, client, single):
    first = client.push(single)
    assert client.push(single)["commit"] == first["commit"]
    assert hub.count("PUT", "/_lfs/") == hub.count("POST", "/commit/") == 1


def test_a_card_can_be_given(hub, client, single):
    client.push(single, readme="# Another card\n")
    assert hub.repos[ID].files()["README.md"] == b"# Another card\n"
    assert (single / "README.md").read_text() == CARD


def test_a_repo_without_a_commit_and_a_gitignore_do_not_matter(hub, client, single):
    hub.repos[ID] = Repo(private=False, empty=True)
    client.push(single)
    assert client.load() == _hashes(single)
    hub.repos["user/ignoring"] = Repo(private=False)
    hub.repos["user/ignoring"].edit(".gitignore", b"*.safetensors\n")
    client.push(single, "user/ignoring")
    assert client.load("user/ignoring") == _hashes(single)


def test_code_goes_along_when_the_configuration_names_it(single, tmp_path):
    folder = shutil.copytree(single, tmp_path / "code")
    _write(folder, {"modeling_own.py": "x = 1"})
    assert "modeling_own.py" not in carried_files(folder)
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "modeling_own.Own"}}
    _write(folder, {"config.json": json.dumps(config)})
    assert "modeling_own.py" in carried_files(folder)


# who sees it


def test_private_is_private(hub, client, single):
    client.push(single, private=True)
    assert hub.repos[ID].private
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{hub.url}/{ID}/resolve/main/config.json")
    client.push(single)  # and stays so where it is not asked for
    assert hub.repos[ID].private


def test_a_public_repo_is_not_pushed_to_as_if_it_were_private(hub, client, single):
    hub.repos[ID] = Repo(private=False)
    refused = client.refused(single, private=True)
    assert refused["kind"] == "InvalidValueError"
    assert "public" in refused["error"]
    assert "--private" in refused["error"]
    assert hub.count("PUT", "") == hub.count("POST", "/preupload/") == hub.count("POST", "/commit/") == 0


# faults that pass


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("what", [{"status": 503}, {"status": 429}, {"cut": True}], ids=str)
def test_a_fault_that_passes_is_waited_for(hub, client, sharded, route, what):
    headers = {"Retry-After": "7"} if what == {"status": 429} else {}
    hub.faults.append(Fault(*ROUTES[route], **what, headers=headers))
    pushed = client.push(sharded)
    assert hub.faults[0].times == 0
    assert len(pushed["waits"]) == 1
    assert pushed["waits"][0] in ((7, 8) if headers else (1,))  # huggingface_hub adds a second of its own
    assert len(hub.repos[ID].history()) == 2
    assert _own(hub.repos[ID].files()) == _content(sharded)
    assert client.load() == _hashes(sharded)


def test_the_starting_of_a_branch_is_repeated_too(hub, client, single):
    hub.faults.append(Fault("POST", "/branch/", status=503))
    hub.faults.append(Fault("POST", "/branch/", cut=True, after=True))
    client.push(single, revision="w4")
    assert client.load(revision="w4") == _hashes(single)
    assert len(hub.repos[ID].history("w4")) == 2


def test_waits_double_and_no_wait_that_is_asked_for_is_endless(hub, client, single):
    hub.faults.append(Fault(*ROUTES["commit"], status=502, times=4))
    assert client.push(single)["waits"] == [1, 2, 4, 8]
    hub.reset()
    hub.faults.append(Fault(*ROUTES["commit"], status=429, headers={"Retry-After": "86400"}))
    hub.faults.append(Fault(*ROUTES["commit"], status=429, headers={"RateLimit": '"api";r=0;t=55'}))
    assert client.push(single)["waits"] == [300, 55]


def test_patience_can_be_set(hub, single, tmp_path):
    hub.faults.append(Fault(*ROUTES["create"], status=503, times=EVER))
    code = (
        "import sys; from hfcompress.hub.push import HubError, Patience, push\n"
        "try: push(sys.argv[1], 'user/model', patience=Patience(tries=3, first=0.01))\n"
        "except HubError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(single)]
    done = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("The Hub fails (503)")
    assert hub.count(*ROUTES["create"]) == 3
    assert "asking again in 0 s" in done.stderr


@pytest.mark.parametrize("how", [{"cut": True}, {"status": 500}, {"status": 504}], ids=str)
def test_a_commit_that_was_made_without_an_answer_is_not_made_twice(hub, client, sharded, how):
    hub.faults.append(Fault(*ROUTES["commit"], **how, after=True))
    pushed = client.push(sharded)
    assert hub.count(*ROUTES["commit"]) == 1
    assert hub.repos[ID].history() == ["initial commit", MESSAGE]
    assert pushed["commit"] == hub.repos[ID].branches["main"]
    assert client.load() == _hashes(sharded)


@pytest.mark.parametrize("status", [None, 409], ids=["moved", "409"])
def test_who_commits_meanwhile_keeps_what_they_did(hub, client, single, status):
    hub.repos[ID] = Repo(private=False)
    theirs = Fault(*ROUTES["commit"], status=status, meanwhile=lambda: hub.repos[ID].edit("theirs.md", b"theirs"))
    hub.faults.append(theirs)
    client.push(single)
    assert _own(hub.repos[ID].files()) == _content(single) | {"theirs.md": b"theirs"}
    assert len(hub.repos[ID].history()) == 3
    assert hub.count("PUT", "/_lfs/") == 1  # the storage has it


def test_who_commits_the_same_file_meanwhile_is_replaced_whole(hub, client, single):
    """Their config.json came after we saw that ours is there already."""
    client.push(single)
    changed = shutil.copytree(single, single.parent / "changed", dirs_exist_ok=True)
    _write(changed, {"hfcompress.json": '{"a": 1}'})
    hub.faults.append(Fault(*ROUTES["commit"], meanwhile=lambda: hub.repos[ID].edit("config.json", b"{}")))
    client.push(changed)
    assert _own(hub.repos[ID].files()) == _content(changed)


# faults that stay


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("what", [{"status": 500}, {"status": 429}, {"cut": True}], ids=str)
def test_a_fault_that_stays_is_one_sentence_and_the_push_can_be_resumed(hub, client, sharded, route, what):
    hub.faults.append(Fault(*ROUTES[route], **what, times=EVER, headers={"Retry-After": "1"}))
    refused = client.refused(sharded)
    assert refused["kind"] == "HubError"
    assert "push it again with `hfcompress push`; what was uploaded is not sent again" in refused["error"]
    said = {500: "The Hub fails (500)", 429: "too many requests", None: "cannot be reached, or the connection broke"}
    assert said[what.get("status")] in refused["error"]
    assert 4 <= len(refused["waits"]) <= 30  # bounded; several shards go up at once
    assert all(commit.message == "initial commit" for repo in hub.repos.values() for commit in repo.commits.values())
    uploads = hub.count("PUT", "/_lfs/")
    hub.faults.clear()
    if hub.repos:
        assert client.load() is None
    client.push(sharded)
    assert client.load() == _hashes(sharded)
    assert len(hub.repos[ID].history()) == 2
    if route in ("card", "commit"):
        assert hub.count("PUT", "/_lfs/") == uploads  # nothing is sent twice


def test_an_upload_cut_in_the_middle_is_resumed_where_it_broke(hub, client, sharded):
    shards = sorted(p for p in sharded.glob("model-*.safetensors"))
    last = hashlib.sha256(shards[-1].read_bytes()).hexdigest()
    hub.faults.append(Fault("PUT", last, cut=True, times=EVER))
    assert "connection broke" in client.refused(sharded)["error"]
    assert client.load() is None
    sent = {p: hub.count("PUT", hashlib.sha256(p.read_bytes()).hexdigest()) for p in shards}
    hub.faults.clear()
    client.push(sharded)
    again = {p: hub.count("PUT", hashlib.sha256(p.read_bytes()).hexdigest()) for p in shards}
    assert again == sent | {shards[-1]: sent[shards[-1]] + 1}
    assert client.load() == _hashes(sharded)


def test_a_model_that_is_there_survives_a_push_that_fails(hub, client, sharded, single):
    client.push(single)
    for route in ("upload", "commit"):
        hub.faults.append(Fault(*ROUTES[route], status=500, times=EVER))
        client.refused(sharded)
        hub.faults.clear()
        assert client.load() == _hashes(single)


def test_someone_who_never_stops_committing(hub, client, single):
    hub.repos[ID] = Repo(private=False)
    others = iter(range(EVER))
    edit = lambda: hub.repos[ID].edit("theirs.md", str(next(others)).encode())  # noqa: E731
    hub.faults.append(Fault(*ROUTES["commit"], times=EVER, meanwhile=edit))
    refused = client.refused(single)
    assert refused["kind"] == "HubConflictError"
    assert "Someone else changed user/model" in refused["error"]
    assert hub.count(*ROUTES["commit"]) == 2
    assert client.load() is None


# bytes that are not those that were sent


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        (Fault("PUT", "/_lfs/", lie=True, times=EVER), "model-00001"),
        (Fault(*ROUTES["commit"], lie=True), "model.safetensors.index.json"),
        (Fault(*ROUTES["tree"], lie=True, skip=1), "config.json, model-0000"),
    ],
    ids=["storage", "git", "listing"],
)
def test_a_model_that_did_not_arrive_as_sent_is_taken_back(hub, client, sharded, single, lie, named):
    earlier = client.push(single)["commit"]
    hub.faults.append(dataclasses.replace(lie))
    refused = client.refused(sharded)
    assert hub.faults[0].times < lie.times
    assert refused["kind"] == "HubError"
    assert refused["error"].startswith(f"The Hub did not keep {named}")
    assert refused["error"].endswith(f"before this push {ID} was at revision {earlier[:12]}.")
    assert {"config.json", "model.safetensors.index.json"}.isdisjoint(hub.repos[ID].files())
    assert hub.repos[ID].history()[-1] == "Withdraw a model that did not arrive whole"
    assert client.load() is None
    assert client.load(revision=earlier) == _hashes(single)


def test_a_model_is_taken_back_once_even_if_the_answer_is_lost(hub, client, single):
    hub.faults.append(Fault("PUT", "/_lfs/", lie=True))
    hub.faults.append(Fault(*ROUTES["commit"], cut=True, after=True, skip=1))
    assert "did not keep model.safetensors as sent, so config.json was taken back" in client.refused(single)["error"]
    assert hub.count(*ROUTES["commit"]) == 2
    assert len(hub.repos[ID].history()) == 3
    assert client.load() is None


def test_a_model_that_cannot_be_taken_back_is_named(hub, client, single):
    hub.faults.append(Fault("PUT", "/_lfs/", lie=True))
    hub.faults.append(Fault(*ROUTES["commit"], status=403, skip=1))
    refused = client.refused(single)
    assert f"{hub.url}/{ID} differs from what was sent (model.safetensors)" in refused["error"]
    assert "delete config.json there by hand" in refused["error"]


# who may not


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"env": {"HF_TOKEN": ""}}, ("no token", "hf auth login", "HF_TOKEN", "may write to user/model")),
        ({"env": {"HF_TOKEN": "hf_wrongwrongwrong"}}, ("does not accept the token", "hf auth login", "HF_TOKEN")),
        ({"env": {"HF_TOKEN": READ_TOKEN}}, ("may not write to user", "You don't have the rights")),
        ({"env": {"HF_TOKEN": f"{TOKEN}é"}}, ("holds a character that cannot be sent", "hf auth login")),
        ({"repo_id": "someone/model"}, ("may not write to someone", "You don't have the rights")),
    ],
    ids=["none", "wrong", "read only", "odd", "namespace"],
)
def test_a_token_that_does_not_do(hub, client, single, options, words):
    refused = client.refused(single, **options)
    assert refused["kind"] == "HubError"
    assert all(word in refused["error"] for word in words), refused["error"]
    assert refused["waits"] == []
    assert hub.repos == {}
    assert len(hub.requests) <= 2


@pytest.mark.parametrize(
    ("route", "status", "code", "words"),
    [
        ("create", 401, None, "does not accept the token"),
        ("create", 402, None, "refused the push to user/model (402)"),
        ("create", 404, None, "no user/model that this token may see"),
        ("info", 403, "GatedRepo", "user/model is gated"),
        ("info", 404, "RepoNotFound", "no user/model that this token may see"),
        ("info", 404, "RevisionNotFound", "has no such revision"),
        ("preupload", 401, None, "does not accept the token"),
        ("preupload", 403, None, "may not write to user"),
        ("preupload", 404, "RepoNotFound", "no user/model that this token may see"),
        ("batch", 403, None, "may not write to user"),
        ("upload", 403, None, "may not write to user"),
        ("upload", 400, None, "refused the push to user/model (400)"),
        ("card", 400, None, "Invalid metadata in README.md"),
        ("commit", 400, None, "refused the push to user/model (400)"),
        ("commit", 401, None, "does not accept the token"),
        ("commit", 403, None, "may not write to user"),
        ("commit", 404, "RepoNotFound", "no user/model that this token may see"),
        ("commit", 413, None, "refused the push to user/model (413)"),
        ("tree", 403, None, "may not write to user"),
    ],
)
def test_a_refusal_is_one_sentence_at_once(hub, client, single, route, status, code, words):
    headers = {"X-Error-Code": code} if code else {}
    hub.faults.append(Fault(*ROUTES[route], status=status, times=EVER, headers=headers, message="out of space."))
    refused = client.refused(single)
    assert refused["kind"] == "HubError"
    assert words in refused["error"], refused["error"]
    assert "out of space" in refused["error"] or route == "card" or status == 401 or code == "GatedRepo"
    assert refused["waits"] == []
    hub.faults.clear()
    assert not hub.repos or client.load() is None


def test_a_disabled_repo(hub, client, single):
    hub.faults.append(Fault(*ROUTES["info"], status=403, message="Access to this resource is disabled."))
    assert "The Hub has disabled user/model" in client.refused(single)["error"]


def test_a_bad_card_is_refused_by_the_hub_before_the_commit(hub, client, single):
    refused = client.refused(single, readme="---\nlicense: [\n---\n")
    assert 'Invalid metadata in README.md. - "license" must be a string' in refused["error"]
    assert hub.count(*ROUTES["commit"]) == 0
    assert client.load() is None


def test_what_is_no_hub(hub, client, single):
    """A proxy's page instead of an answer."""
    hub.faults.append(Fault("POST", "/validate-yaml", status=204, times=EVER))
    assert "does not answer as a Hub does" in client.refused(single)["error"]


def test_offline(single, monkeypatch):
    """As this very process is."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so nothing can be pushed") as caught:
        push(single, ID)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("HTTP status client error (403 Forbidden), domain: http://hub"), "may not write to user"),
        (ConnectionError("HTTP status client error (401 Unauthorized), domain: http://hub"), "hf auth login"),
        (ConnectionError("error sending request for url (http://cas)"), "broke (error sending request for url"),
        (type("XetAuthenticationError", (PermissionError,), {})("no"), "The Hub's storage refused this token"),
        (PermissionError(13, "Permission denied", "m/a.json"), "m/a.json cannot be read (Permission denied)"),
        (RuntimeError("disk on fire."), "The push to user/model failed (disk on fire): put right what it names"),
    ],
)
def test_other_errors_of_the_client(error, words):
    """Those of hf_xet, which talks to a storage that the Hub above does not have, and those of the disk."""
    assert words in str(explain(error, ID))


def test_no_network(hub, single, tmp_path):
    code = (
        "import sys; from hfcompress.hub.push import HubError, Patience, push\n"
        "try: push(sys.argv[1], 'user/model', patience=Patience(tries=2, first=0.01))\n"
        "except HubError as error: print(error)"
    )
    env = hub.environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", code, str(single)], env=env, capture_output=True, text=True, check=True
    )
    assert (
        "http://127.0.0.1:9 cannot be reached, or the connection broke ([Errno 111] Connection refused)" in done.stdout
    )


# what never starts


@pytest.mark.parametrize(
    "repo_id", ["model", "a/b/c", "user/", "/model", "user/mo del", "user/a..b", "user/m.git", ""]
)
def test_an_id_that_cannot_be(single, repo_id):
    with pytest.raises(InvalidValueError, match=r"is no name of a repo; write user/name"):
        push(single, repo_id)


@pytest.mark.parametrize("revision", ["", "a b", "a..b", "-x", "/a", "a/", "x" * 3 + "~1", "0123456789" * 4])
def test_a_branch_that_cannot_be(single, revision):
    with pytest.raises(InvalidValueError, match="is no name of a branch"):
        push(single, ID, revision=revision)


def _remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_remove("config.json"), "There is no config.json in"),
        (_remove("hfcompress.json"), "There is no hfcompress.json in"),
        (_remove("model.safetensors.index.json"), "There is no model.safetensors in"),
        (_remove("model-00002-of-00003.safetensors"), "There is no model-00002-of-00003.safetensors in"),
        (shutil.rmtree, "There is no folder"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "belongs to no weights of this model"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json is damaged"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "tokenizer.model").symlink_to("/etc/hostname"), "a link that leads out of its folder"),
        (lambda f: (f / "tokenizer.model").symlink_to(f / "nowhere"), "a link that leads out of its folder"),
    ],
)
def test_a_folder_that_is_no_whole_result(sharded, tmp_path, spoil, words):
    folder = shutil.copytree(sharded, tmp_path / "spoilt")
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    spoil(folder)
    with pytest.raises(CheckpointError, match=words):
        push(folder, ID)


def test_a_link_within_the_folder_is_followed(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "linked")
    os.replace(folder / "tokenizer.json", folder / "kept.json")
    (folder / "tokenizer.json").symlink_to("kept.json")
    assert "tokenizer.json" in carried_files(folder)


# the token


def test_the_token_is_told_to_nobody_but_the_hub(hub, client, sharded):
    """What the server echoes is scrubbed too; storage addresses are signed and get no token."""
    hub.faults.append(Fault(*ROUTES["create"], status=400, message=f"bad header Authorization: Bearer {TOKEN}"))
    refused = client.refused(sharded)
    assert "bad header Authorization: Bearer ***" in refused["error"]
    client.push(sharded)
    assert not any(path.startswith("/_lfs/") for path in hub.authorized)
    assert any(path.endswith("/commit/main") for path in hub.authorized)
    told = [*client.said, client.log.read_text()]  # of every push in this module so far
    assert len(client.log.read_text()) > 1000
    assert not any(token in text for text in told for token in (TOKEN, READ_TOKEN))
    for commit in hub.repos[ID].commits.values():
        kept = [commit.message.encode(), *(blob.content for blob in commit.files.values())]
        assert not any(TOKEN.encode() in content for content in kept)
    assert not any(TOKEN.encode() in p.read_bytes() for p in sharded.rglob("*") if p.is_file())


def test_what_is_scrubbed():
    text = (
        "hf_abcdefghij\n https://me:pass@hub.co/a?X-Amz-Signature=1 basic QWxh eyJhbGci.eyJzdWIi.c2ln huggingface_hub"
    )
    assert scrub(text) == "*** https://hub.co/a basic *** *** huggingface_hub"
    assert issubclass(HubError, HfcompressError)
