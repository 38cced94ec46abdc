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
"""The public trainer: the loss of the definition however a step is divided, checkpoints that load, evaluation by KL."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    Gemma2Config,
    GraniteConfig,
    Trainer,
)

import hfcompress as hfc
from hfcompress.distillation.on_policy import continued, prompts
from hfcompress.distillation.signals import Largest
from hfcompress.distillation.trainer import DistillationCollator, Head
from hfcompress.errors import InvalidValueError, UnsupportedModelError


ROOT = Path(__file__).parents[2]
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OTHERS = {
    "gemma2": lambda: Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0, pad_token_id=0
    ),
    "granite": lambda: GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=4.0, pad_token_id=0),
}


def pair(name: str = "llama"):
    """A student and its teacher, which differ."""
    config = (CONFIGS | OTHERS)[name]()
    for key in vars(config):
        if key.endswith(("dropout", "pdrop")):  # the trainer leaves it on, as transformers does
            setattr(config, key, 0.0)
    student, teacher = make_model(config), make_model(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return student, teacher


def rows(count: int = 8, ragged: bool = True) -> list[dict]:
    ids = token_ids(count, 12).tolist()
    return [{"input_ids": row[: 12 - (3 * number) % 10] if ragged else row} for number, row in enumerate(ids)]


def config(folder, **settings) -> hfc.DistillationConfig:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    return hfc.DistillationConfig(
        output_dir=str(folder), **{**quiet, "max_steps": 1, "per_device_train_batch_size": 8, **settings}
    )


def trained(folder, name="llama", data=None, **settings):
    """After one step of plain descent with rate 1: so the weights have moved by the gradient."""
    student, teacher = pair(name)
    before = {key: value.detach().clone() for key, value in student.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    trainer = hfc.DistillationTrainer(
        student,
        teacher,
        args=config(folder, max_grad_norm=0.0, **settings),
        train_dataset=data or rows(),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    loss = trainer.train().training_loss
    return {key: before[key] - value.detach() for key, value in student.named_parameters()}, loss


def defined(name: str, data, temperature: float = 1.0, cross_entropy: float = 0.0):
    """The mean over all predictions, in float64, row by row without padding; and its gradients."""
    student, teacher = (model.double() for model in pair(name))
    total, count = 0.0, 0
    for row in data:
        ids = torch.tensor(row["input_ids"])[None]
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            theirs = teacher(ids).logits[0, :-1]
        ours = student(ids).logits[0, :-1]
        p, q = ((logits / temperature).log_softmax(-1) for logits in (theirs, ours))
        total = total + temperature**2 * (p.exp() * (p - q)).sum()
        if cross_entropy:
            total = total + cross_entropy * torch.nn.functional.cross_entropy(ours, ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    loss = total / count
    loss.backward()
    return {key: value.grad for key, value in student.named_parameters()}, loss.item()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3", *OTHERS])
def test_loss_and_gradients_are_those_of_the_definition(name, tmp_path):
    wanted, loss = defined(name, rows(), temperature=2.0, cross_entropy=0.3)
    found, other = trained(tmp_path, name, temperature=2.0, cross_entropy=0.3)
    assert other == pytest.approx(loss, rel=1e-4)
    for key, gradient in wanted.items():
        gradient = torch.zeros_like(found[key]) if gradient is None else gradient.float()
        torch.testing.assert_close(
            found[key], gradient, rtol=2e-3, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_accumulation_changes_nothing(tmp_path):
    whole, loss = trained(tmp_path, features=0.5, balanced=True)
    parts, other = trained(
        tmp_path, features=0.5, balanced=True, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    assert other == pytest.approx(loss, rel=1e-4)
    for key, gradient in whole.items():
        torch.testing.assert_close(parts[key], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "off"),
    [({"gradient_checkpointing": True}, 1e-5), ({"bf16": True}, 0.03)],
    ids=["checkpointed", "bf16"],
)
def test_memory_is_saved_in_the_usual_ways(tmp_path, settings, off):
    whole, loss = trained(tmp_path)
    other, again = trained(tmp_path, **settings)
    assert again == pytest.approx(loss, rel=off)
    for key, gradient in whole.items():
        assert (other[key] - gradient).norm() <= off * gradient.norm() + 1e-6, key


def test_a_vocabulary_that_is_padded_otherwise_is_compared_where_both_have_one(tmp_path):
    student, teacher = pair()
    kl = []
    for by in (0, 8):
        student.resize_token_embeddings(128 + by, mean_resizing=False)
        trainer = hfc.DistillationTrainer(student, teacher, args=config(tmp_path), eval_dataset=rows())
        kl.append(trainer.evaluate()["eval_kl"])
    assert kl[0] == pytest.approx(kl[1], rel=1e-5)


def test_rows_that_are_packed_cost_what_padded_ones_do(tmp_path):
    data = [row for row in rows(4) if len(row["input_ids"]) > 1]
    student, teacher = pair()
    trainer = hfc.DistillationTrainer(student, teacher, args=config(tmp_path), train_dataset=data)
    padded = DistillationCollator()(data)
    ids = torch.cat([torch.tensor(row["input_ids"]) for row in data])[None]
    places = torch.cat([torch.arange(len(row["input_ids"])) for row in data])[None]
    packed = {"input_ids": ids, "position_ids": places, "labels": ids.masked_fill(places == 0, -100)}
    found = []
    for batch in (padded, packed):
        student.zero_grad()
        loss = trainer.compute_loss(student, batch)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in student.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


TWO = """
import sys, torch
sys.path.insert(0, {tests!r})
sys.path.insert(0, {here!r})
from pathlib import Path
import hfcompress as hfc
from accelerate import PartialState
from test_trainer import config, pair, rows, trained
from safetensors.torch import save_file
moved, loss = trained(Path({folder!r}), per_device_train_batch_size=4, features=0.5, balanced=True)
measured = hfc.DistillationTrainer(*pair(), args=config(Path({folder!r})), eval_dataset=rows(5)).evaluate()
moved["eval_kl"] = torch.tensor(measured["eval_kl"])
if PartialState().is_main_process:
    save_file({{key: value.contiguous() for key, value in moved.items()}}, {folder!r} + "/moved.safetensors")
torch.distributed.destroy_process_group()  # gloo aborts some of those that only end
"""


SHARDED = """
import sys, torch
sys.path.insert(0, {tests!r})
sys.path.insert(0, {here!r})
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
import hfcompress as hfc
from test_trainer import config, pair, rows
plain = {{"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}}
parted = {{"fsdp": "full_shard", "fsdp_config": {{"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}}}
args = config({folder!r}, per_device_train_batch_size=2, gradient_accumulation_steps=2, **plain, **parted)
assert args.device.type == "cpu"
# accelerate takes FSDP for something of GPUs alone: all that it needs to be told is which kind of run this is
state = Accelerator(cpu=True).state
state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
state.fsdp_plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    cpu_ram_efficient_loading=False,
    state_dict_type="FULL_STATE_DICT",
)
student, teacher = pair()
before = {{key: value.detach().clone() for key, value in student.named_parameters()}}
trainer = hfc.DistillationTrainer(student, teacher, args=args, train_dataset=rows(), eval_dataset=rows(5))
assert trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2
trainer.train()
assert all(hasattr(value, "full_tensor") for value in trainer.model.parameters())
moved = {{key: (before[key] - value.detach().full_tensor()).contiguous() for key, value in trainer.model.named_parameters()}}
measured = trainer.evaluate()
trainer.save_model({folder!r} + "/student")
if state.is_main_process:
    save_file({{**moved, "eval_kl": torch.tensor(measured["eval_kl"])}}, {folder!r} + "/moved.safetensors")
torch.distributed.destroy_process_group()
"""


def in_two_processes(code: str, folder) -> dict[str, torch.Tensor]:
    """What a script writes into `moved.safetensors`."""
    places = {"tests": str(ROOT / "tests"), "here": str(ROOT / "tests" / "distillation"), "folder": str(folder)}
    (folder / "two.py").write_text(code.format(**places))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(folder / "two.py")], capture_output=True, text=True, timeout=240, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "moved.safetensors")


def test_a_student_in_parts_has_the_gradients_of_the_definition(tmp_path):
    """FSDP2 as accelerate prepares it, over gloo: every parameter in two halves, the output head's too."""
    found = in_two_processes(SHARDED, tmp_path)
    kl = found.pop("eval_kl").item()
    wanted, _ = defined("llama", rows())
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient.float(), rtol=1e-3, atol=1e-6)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    trainer = hfc.DistillationTrainer(student, pair()[1], args=config(tmp_path / "again"), eval_dataset=rows(5))
    assert kl == pytest.approx(trainer.evaluate()["eval_kl"], rel=1e-4)


def test_the_old_fsdp_is_refused(tmp_path, monkeypatch):
    """Its parameters are views of one flat tensor, which is gone where the head is called."""
    prepare = Trainer.create_accelerator_and_postprocess

    def of_old(self):
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", of_old)
    with pytest.raises(InvalidValueError, match=r"fsdp_version: 2"):
        hfc.DistillationTrainer(*pair(), args=config(tmp_path), train_dataset=rows())


def test_two_processes_do_what_one_does(tmp_path):
    """DDP over gloo: gradients are those of all rows, though the processes have different numbers of predictions."""
    two = in_two_processes(TWO, tmp_path)
    measured = hfc.DistillationTrainer(*pair(), args=config(tmp_path), eval_dataset=rows(5)).evaluate()
    assert two.pop("eval_kl").item() == pytest.approx(measured["eval_kl"], rel=1e-5)  # five rows do not divide by two
    one, _ = trained(tmp_path / "one", features=0.5, balanced=True)
    for key, value in two.items():
        torch.testing.assert_close(value, one[key], rtol=1e-3, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_it_is_measured_stopped_kept_and_taken_up_again(tmp_path):
    """By the held-out KL: the best checkpoint is what remains, an ordinary one; and an interrupted run goes on."""
    held_out = rows(5)
    settings = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 8,
        "learning_rate": 5e-3,
        "load_best_model_at_end": True,
        "per_device_eval_batch_size": 2,
    }

    def trainer(folder, **more):
        student, teacher = pair()
        return hfc.DistillationTrainer(
            student,
            teacher,
            args=config(folder, **{**settings, **more}),
            train_dataset=rows(),
            eval_dataset=held_out,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=8)],
        )

    first = trainer(tmp_path / "first")
    _, before = defined("llama", held_out)
    measured = first.evaluate()
    assert measured["eval_kl"] == pytest.approx(before, rel=1e-4)
    first.train()
    kls = [entry["eval_kl"] for entry in first.state.log_history if "eval_kl" in entry]
    assert len(kls) == 4
    assert min(kls) < 0.7 * before
    assert first.evaluate()["eval_kl"] == pytest.approx(min(kls), rel=1e-4)
    first.save_model(str(tmp_path / "out"))
    with torch.no_grad():
        ids = torch.from_numpy(token_ids(2, 8))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(plain(ids).logits, first.model(ids).logits)
    again = trainer(tmp_path / "first")
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert [e["eval_kl"] for e in again.state.log_history if "eval_kl" in e][-4:] == pytest.approx(kls, rel=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_a_teacher_may_be_quantized_and_placed_by_a_map(tmp_path):
    """bitsandbytes' LLM.int8() on a CPU: the loss is that of what the quantized teacher says."""
    student, teacher = pair()
    teacher.save_pretrained(tmp_path / "teacher")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
    )
    data = rows(4, ragged=False)
    ids = torch.tensor([row["input_ids"] for row in data])
    with torch.no_grad():
        p, dense, q = (model(ids).logits[:, :-1].log_softmax(-1) for model in (loaded, teacher, student))
    wanted, other = (((each.exp() * (each - q)).sum(-1)).mean().item() for each in (p, dense))
    trainer = hfc.DistillationTrainer(student, loaded, args=config(tmp_path), eval_dataset=data)
    found = trainer.evaluate()["eval_kl"]
    assert found == pytest.approx(wanted, rel=2e-5)
    assert abs(found - other) > 1e-4 * other


def test_an_adapter_may_have_its_own_base_as_teacher(tmp_path):
    """One model in memory: the loss is the divergence of the model with its adapter from the one without, and so learns."""
    from peft import LoraConfig, get_peft_model

    _, base = pair()
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    data = rows(4, ragged=False)
    ids = torch.tensor([row["input_ids"] for row in data])
    with torch.no_grad():
        q = student(ids).logits[:, :-1].log_softmax(-1)
        with student.disable_adapter():
            p = student(ids).logits[:, :-1].log_softmax(-1)
    settings = {"max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    trainer = hfc.DistillationTrainer(
        student, args=config(tmp_path, **settings), train_dataset=data, eval_dataset=data
    )
    before = trainer.evaluate()["eval_kl"]
    assert before == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    weights = {name: value.clone() for name, value in student.named_parameters() if "lora" not in name}
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.5 * before
    assert all(torch.equal(weights[name], value) for name, value in student.named_parameters() if name in weights)


def test_it_is_followed_where_one_looks(tmp_path, monkeypatch):
    """TensorBoard, through `report_to`: loss, learning rate and the held-out KL are in its file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    student, teacher = pair()
    settings = {"report_to": "tensorboard", "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = hfc.DistillationTrainer(
        student, teacher, args=config(tmp_path, **settings), train_dataset=rows(), eval_dataset=rows(4)
    )
    trainer.train()
    (file,) = (tmp_path / "logs").rglob("events.*")
    read = EventAccumulator(str(file)).Reload()
    assert {"train/loss", "train/learning_rate", "eval/kl", "eval/perplexity"} <= set(read.Tags()["scalars"])
    written = [event.value for event in read.Scalars("eval/kl")]
    logged = [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry]
    assert written == pytest.approx(logged, rel=1e-6)


def test_what_the_student_says_itself_is_what_counts(tmp_path):
    """Prompts as they were, labels on what was drawn alone, up to the end of the text; and the loss is of just that."""
    data = [{"input_ids": token_ids(1, 9)[0].tolist()} for _ in range(3)]
    data.append({"input_ids": data[0]["input_ids"], "labels": [-100] * 6 + data[0]["input_ids"][6:]})
    student, teacher = pair()
    student.generation_config.eos_token_id = list(range(0, 128, 8))
    settings = config(tmp_path, on_policy=1.0, max_new_tokens=7, per_device_train_batch_size=2)
    trainer = hfc.DistillationTrainer(student, teacher, args=settings, train_dataset=data)
    parts = [DistillationCollator()(data[:2]), DistillationCollator()(data[2:])]
    said, count = trainer.get_batch_samples(iter(parts), 2, torch.device("cpu"))
    ends, lengths, total = set(range(0, 128, 8)), set(), 0.0
    wanted = iter([4, 4, 4, 6])
    for batch in said:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            first = int((labels != -100).nonzero()[0])
            assert first == next(wanted)
            assert ids[:first].tolist() == data[0]["input_ids"][:first]
            drawn = labels[labels != -100].tolist()
            assert mask.tolist() == [1] * (first + len(drawn)) + [0] * (len(mask) - first - len(drawn))
            assert drawn == ids[first : first + len(drawn)].tolist()
            assert not ends & set(drawn[:-1])
            assert len(drawn) == 7 or drawn[-1] in ends
            lengths.add(len(drawn))
            with torch.no_grad():
                logits = [model.double()(ids[None, : first + len(drawn)]).logits[0] for model in (teacher, student)]
            p, q = (each[first - 1 : -1].log_softmax(-1) for each in logits)
            total += (p.exp() * (p - q)).sum().item()
    assert len(lengths) > 1
    assert int(count) == sum(int((batch["labels"] != -100).sum()) for batch in said)
    teacher.float(), student.float()
    loss = sum(trainer.compute_loss(student, batch, num_items_in_batch=count).item() for batch in said)
    assert loss == pytest.approx(total / int(count), rel=1e-4)


def test_on_its_own_texts_the_student_comes_closer(tmp_path):
    data = [{"input_ids": row} for row in token_ids(8, 4).tolist()]
    student, teacher = pair()
    settings = {"loss": "reverse_kl", "on_policy": 0.75, "max_new_tokens": 12, "learning_rate": 5e-3, "max_steps": 24}
    trainer = hfc.DistillationTrainer(
        student, teacher, args=config(tmp_path, **settings), train_dataset=data, eval_dataset=rows(5)
    )
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.7 * before


def test_rows_may_carry_what_a_cache_has_kept(tmp_path):
    student, teacher = pair()
    data = rows()
    with torch.no_grad():
        told = [
            Largest.of(teacher(torch.tensor(row["input_ids"])[None]).logits[0], 128, torch.Generator()) for row in data
        ]
    kept = [
        row | {f"teacher_{name}": value for name, value in each.items()} for row, each in zip(data, told, strict=True)
    ]
    trainer = hfc.DistillationTrainer(student, signal="top_k", args=config(tmp_path), train_dataset=kept)
    _, loss = defined("llama", data)
    assert trainer.train().training_loss == pytest.approx(loss, rel=1e-3)


def test_what_cannot_be_is_told(tmp_path):
    student, teacher = pair()
    with pytest.raises(InvalidValueError, match="Give a teacher, or the signal that the rows carry of one"):
        hfc.DistillationTrainer(student, args=config(tmp_path))
    with pytest.raises(InvalidValueError, match="signal is 'topk'; it must be one of top_k, sampled"):
        hfc.DistillationTrainer(student, signal="topk", args=config(tmp_path))
    with pytest.raises(InvalidValueError, match="holds no hidden states; give the teacher, or leave features out"):
        hfc.DistillationTrainer(student, signal="top_k", args=config(tmp_path, features=1.0))
    with pytest.raises(InvalidValueError, match=r"mix is 0\.3; it is for jsd"):
        config(tmp_path, mix=0.3)
    with pytest.raises(InvalidValueError, match="temperature is 0; it must be above 0"):
        config(tmp_path, temperature=0)
    with pytest.raises(InvalidValueError, match="knows nothing of what the student says; give the teacher"):
        hfc.DistillationTrainer(student, signal="top_k", args=config(tmp_path, on_policy=0.5))
    with pytest.raises(InvalidValueError, match="on_policy is 2; it is a share of the steps, from 0 to 1"):
        config(tmp_path, on_policy=2)
    packed = {"input_ids": torch.ones(1, 4), "labels": torch.ones(1, 4), "position_ids": torch.ones(1, 4)}
    with pytest.raises(InvalidValueError, match="on_policy needs rows of one text each"):
        prompts(packed)
    with pytest.raises(
        InvalidValueError, match="A prompt of on_policy has 300 tokens, and 64 is all that the student"
    ):
        continued(student, [torch.zeros(300, dtype=torch.long)], 1, 1.0)
    with pytest.raises(InvalidValueError, match="feature_blocks names a block that there is not; the student has 3"):
        hfc.DistillationTrainer(student, teacher, args=config(tmp_path, features=1.0, feature_blocks={"0": 9}))
    with pytest.raises(
        InvalidValueError, match="The judge of feature_loss='adversarial' learns in the recipe distill"
    ):
        hfc.DistillationTrainer(student, teacher, args=config(tmp_path, features=1.0, feature_loss="adversarial"))
    narrow = CONFIGS["llama"]()
    narrow.hidden_size = 32
    with pytest.raises(InvalidValueError, match="The hidden states are 32 and 64 wide; take feature_loss='relation'"):
        hfc.DistillationTrainer(make_model(narrow), teacher, args=config(tmp_path, features=1.0))


def test_a_model_without_an_output_head_is_refused():
    with pytest.raises(UnsupportedModelError, match="has no output head; give a causal language model"):
        Head(make_model(CONFIGS["llama"]()).model)


def test_logits_that_are_made_in_an_unknown_way_are_refused():
    model = make_model(CONFIGS["llama"]())
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits + 1))
    with pytest.raises(UnsupportedModelError, match="makes its logits in a way that is not known here"):
        Head(model)
