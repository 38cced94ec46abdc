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
From the command line to the Hub and back: what was pushed is loaded, measured and made again by other processes from
empty caches; what fails a check never leaves the machine.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from fake_hub import TOKEN, Blob, FakeHub, Fault, Repo
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hfcompress as hfc
from hfcompress.cli import OK, REFUSED, USER_ERROR
from hfcompress.errors import RefusedError
from hfcompress.models.checkpoint import Checkpoint


LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/w4", dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[1]))).logits
print(json.dumps(logits[0, -1].tolist()))
"""


class Shell:
    """Commands in processes of their own, each with an empty cache unless told otherwise."""

    def __init__(self, hub: FakeHub, scratch: Path):
        self.hub, self.scratch, self.said = hub, scratch, ""

    def __call__(
        self, *arguments: object, code: str | None = None, expect: int = OK, token: str | None = TOKEN
    ) -> str:
        home = self.scratch / f"home{len(list(self.scratch.iterdir()))}"
        home.mkdir()
        command = ["-m", "hfcompress.cli"] if code is None else ["-c", code]
        environment = self.hub.environment(home, token) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command, *map(str, arguments)],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        self.said += done.stdout + done.stderr
        assert done.returncode == expect, (done.stdout + done.stderr)[-3000:]
        assert "Traceback" not in done.stderr
        if expect != OK:
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) >= 1, done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as server:
        yield server


@pytest.fixture
def shell(hub, tmp_path):
    hub.reset()
    (tmp_path / "homes").mkdir()
    shell = Shell(hub, tmp_path / "homes")
    yield shell
    assert TOKEN not in shell.said
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size < 10_000_000]
    assert not [p for p in files if TOKEN.encode() in p.read_bytes()]
    for repo in hub.repos.values():
        for commit in repo.commits.values():
            assert not [path for path, blob in commit.files.items() if TOKEN.encode() in blob.content]


@pytest.fixture
def folder(tiny_w4, tmp_path) -> Path:
    shutil.copytree(tiny_w4.output_dir, tmp_path / "w4")
    return tmp_path / "w4"


@torch.no_grad()
def test_pushed_then_loaded_and_measured_from_an_empty_cache(shell, hub, folder, tiny_w4, tmp_path):
    said = shell("push", folder, "user/w4", "--message", "first")
    assert f"pushed to {hub.url}/user/w4 (commit " in said
    repo = hub.repos["user/w4"]
    assert repo.history() == ["initial commit", "first"]
    files = repo.files()
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"README.md", "config.json", "eval_results.json", "hfcompress.json", "report.html"} <= set(files)
    assert {path for path in files if path.startswith("plots/")} == {
        f"plots/{p.name}" for p in (folder / "plots").iterdir()
    }
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("user/w4")' in card.text
    assert "hfcompress run user/w4 --output again --verify" in card.text
    assert "reloaded in a fresh process (whole, by plain transformers)" in card.text
    assert "at 32 positions" in card.text

    ids = token_ids(1, 16, vocabulary=1024)
    there = json.loads(shell(json.dumps(ids.tolist()), code=LOAD).splitlines()[0])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    here = model(input_ids=torch.from_numpy(ids)).logits[0, -1]
    assert torch.equal(torch.tensor(there), here)

    shell("eval", "user/w4", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kl_mean"] == pytest.approx(tiny_w4.report["kl_mean"], rel=1e-5)
    assert report["size_bytes"] == tiny_w4.report["size_bytes"]


def test_run_pushes_and_the_repo_is_a_recipe(shell, hub, tmp_path):
    """From a base on the Hub, with its licence; then made again from the repo's name alone."""
    base = make_model(CONFIGS["llama"](), torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    card = b"---\nlicense: cc-by-nc-nd-4.0\n---\n# Base\n"
    large = {"model.safetensors"}
    files = {p.name: Blob(p.read_bytes(), p.name in large) for p in (tmp_path / "base").iterdir()}
    hub.repos["user/base"] = Repo(False, gated="manual")
    hub.repos["user/base"].large.update({b.sha256: b.content for b in files.values() if b.large})
    commit = hub.repos["user/base"].add("main", files | {"README.md": Blob(card, False)}, "base")

    import numpy as np

    np.save(tmp_path / "ids.npy", token_ids(8, 32))
    np.save(tmp_path / "eval.npy", token_ids(4, 32, seed=1))
    said = shell(
        *("run", "gptq-w4a16", "--model", "user/base", "--set", "gptq.group_size=32", "--output", tmp_path / "out"),
        *("--calibration", tmp_path / "ids.npy", "--eval-data", tmp_path / "eval.npy"),
        *("--push-to-hub", "user/made", "--private"),
    )
    assert "user/base is under cc-by-nc-nd-4.0, which allows no derivatives: check whether you may share" in said
    assert "user/base is gated: check whether its terms let you share" in said
    assert hub.repos["user/made"].private
    data = ModelCard(hub.repos["user/made"].files()["README.md"].decode()).data.to_dict()
    assert data["base_model"] == "user/base"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "cc-by-nc-nd-4.0"
    manifest = json.loads(hub.repos["user/made"].files()["hfcompress.json"])
    assert manifest["base"]["revision"] == commit
    assert manifest["calibration"]["data"] == "ids.npy"  # where it lies is nobody's business
    for path, content in hub.repos["user/made"].files().items():
        assert str(tmp_path).encode() not in content, path

    calibration = ("--calibration", tmp_path / "ids.npy")
    said = shell("run", "user/made", "--verify", "--no-eval", *calibration, "--output", tmp_path / "again")
    assert "identical: all " in said
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "out"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shell("run", "user/nothing", "--output", tmp_path / "none", expect=USER_ERROR)


ROAD = """
recipe:
  - prune: {depth: 0.3, criterion: influence, rows: 2}
  - distill: {steps: 4, batch_size: 2, held_out: 2, learning_rate: 1.0e-3, signal: top_k, teacher_cache: CACHE}
  - gptq: {bits: 4, group_size: 32, damping: 0.03, shift: 1.0, curvature: true, refine: 1}
evaluation: {gate: {top1_agreement: 0.0}}
"""


def test_the_whole_road_in_one_command(shell, hub, tmp_path):
    """Blocks out, distilled, four bits, measured, gated, reloaded and pushed; and then it loads from the Hub."""
    import numpy as np

    make_model(CONFIGS["llama"](), torch.bfloat16).save_pretrained(tmp_path / "base")
    np.save(tmp_path / "ids.npy", token_ids(8, 32))
    (tmp_path / "road.yaml").write_text(ROAD.replace("CACHE", str(tmp_path / "teachers")))
    shell(
        *("run", tmp_path / "road.yaml", "--model", tmp_path / "base", "--output", tmp_path / "out"),
        *("--calibration", tmp_path / "ids.npy", "--eval-data", tmp_path / "ids.npy", "--push-to-hub", "user/w4"),
    )
    files = hub.repos["user/w4"].files()
    for path, content in files.items():
        assert str(tmp_path).encode() not in content, path
    manifest = json.loads(files["hfcompress.json"])
    assert [name for step in manifest["recipe"]["recipe"] for name in step] == ["prune", "distill", "gptq"]
    assert manifest["pruning"]["blocks"] == {"before": 3, "after": 2}
    assert manifest["training"]["step"] == "distill"
    assert json.loads(files["eval_results.json"])["kl_mean"] > 0
    said = json.loads(shell(json.dumps(token_ids(1, 16).tolist()), code=LOAD).splitlines()[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(torch.tensor(said), model(torch.from_numpy(token_ids(1, 16))).logits[0, -1])


def test_a_gate_keeps_a_bad_result_here(shell, hub, folder, tmp_path):
    said = shell(
        *("run", "w4a16-fast", "--set", "rtn.bits=2", "--set", "evaluation.gate={kl_mean: 0.1, top1_agreement: 0.9}"),
        *("--output", tmp_path / "bad", "--push-to-hub", "user/bad"),
        expect=REFUSED,
    )
    assert "The gate refuses this result: kl_mean is " in said
    assert "the gate asks for at most 0.1" in said
    assert "user/bad" not in hub.repos
    said = shell("push", tmp_path / "bad", "user/bad", expect=REFUSED)
    assert f"The gate refuses to push {tmp_path / 'bad'}: kl_mean is " in said
    assert "top1_agreement is " in said
    assert "user/bad" not in hub.repos
    assert (tmp_path / "bad" / "model.safetensors").is_file()


def test_what_does_not_say_what_was_solved_stays_here(shell, hub, folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj.weight_scale"))
    tensors[name] = -tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = shell("push", folder, "user/w4", expect=REFUSED)
    assert "are not what hfcompress wrote there; compress the model again" in said
    manifest, report = (json.loads((folder / name).read_text()) for name in ("hfcompress.json", "eval_results.json"))
    manifest["sha256"] = report["how"]["candidate_sha256"] = Checkpoint.open(folder).sha256
    (folder / "hfcompress.json").write_text(json.dumps(manifest))
    (folder / "eval_results.json").write_text(json.dumps(report))
    said = shell("push", folder, "user/w4", expect=REFUSED)
    assert "does not say what the solved model said" in said
    assert "user/w4" not in hub.repos


def test_a_report_of_other_weights_stays_here(folder):
    report = json.loads((folder / "eval_results.json").read_text())
    report["how"]["candidate_sha256"] = "0" * 64
    (folder / "eval_results.json").write_text(json.dumps(report))
    with pytest.raises(RefusedError, match=r"is of other weights; measure again with `hfcompress eval .* --save`\.$"):
        hfc.push(folder, "user/w4")


def test_what_is_no_result_is_no_push(tiny, tmp_path):
    for folder, wrong in ((tiny, "it has no hfcompress.json"), (tmp_path / "none", "there is no such folder")):
        with pytest.raises(hfc.HfcompressError, match=f"cannot be pushed: {wrong}; give a folder that"):
            hfc.push(folder, "user/w4")


def test_a_repo_that_cannot_be_is_told_before_the_work(shell, tmp_path):
    for command in (("push", tmp_path), ("run", "w4a16-fast", "--output", tmp_path / "out", "--push-to-hub")):
        said = shell(*command, "not a repo", expect=USER_ERROR)
        assert "is no name of a repo; write user/name" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["no token", "busy", "refused", "broken"])
def test_a_hub_that_fails(shell, hub, folder, fault):
    """One sentence and no repo that loads, or a retry that succeeds."""
    if fault == "busy":
        hub.faults.append(Fault("POST", "/commit/", status=503))
        shell("push", folder, "user/w4")
        assert hub.repos["user/w4"].history().count("initial commit") == 1
        assert len(hub.repos["user/w4"].history()) == 2
        return
    if fault == "no token":
        said = shell(
            *("run", "w4a16-fast", "--output", folder.parent / "out", "--push-to-hub", "user/w4"),
            expect=USER_ERROR,
            token=None,
        )
        assert "HF_TOKEN" in said
        assert not (folder.parent / "out").exists()  # told before the work
    else:
        hub.faults.append(Fault("POST", "/api/repos/create", status={"refused": 403, "broken": 404}[fault]))
    said = shell("push", folder, "user/w4", expect=USER_ERROR, token=None if fault == "no token" else TOKEN)
    assert said.count("error: ") == 1
    assert "user/w4" not in hub.repos
    assert "HF_TOKEN" in said if fault == "no token" else "token" in said or "user/w4" in said


def test_from_python(shell, hub, folder):
    code = (
        "import sys, hfcompress as hfc\n"
        "from hfcompress.compression import Result\n"
        "print(Result(__import__('pathlib').Path(sys.argv[1]), {}).push_to_hub('user/w4', revision='try').url)"
    )
    assert f"{hub.url}/user/w4/tree/try" in shell(folder, code=code)
    assert "model.safetensors" in hub.repos["user/w4"].files("try")
    assert "model.safetensors" not in hub.repos["user/w4"].files()
