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
"""Law 7: the loss does not depend on accumulation, on chunks or on padding. And the trainer is silent."""

import contextlib

import pytest
import torch
from conftest import CONFIGS, make_model, token_ids

from hfcompress.distillation.objective import Objective
from hfcompress.distillation.taught_trainer import Schedule, Student, TaughtRows, TaughtTrainer, collate
from hfcompress.models.batch import Batch
from hfcompress.models.checkpoint import Checkpoint
from hfcompress.models.streaming import StreamedModel


CPU = torch.device("cpu")
ROWS, LENGTH = 8, 12


def taught(model: StreamedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> TaughtRows:
    """Rows and what the model itself makes of them."""
    [stream] = model.forward_blocks(model.embed([Batch(ids, mask)]))
    return TaughtRows(ids, mask, stream.hidden)


def ragged_mask() -> torch.Tensor:
    """Right padding of different lengths, so that micro-batches hold different numbers of tokens."""
    lengths = torch.tensor([12, 3, 7, 12, 2, 9, 5, 12])
    return torch.arange(LENGTH) < lengths[:, None]


@contextlib.contextmanager
def student_of(name: str = "llama"):
    """A student whose linears have been shaken, and its teacher's rows."""
    dense = make_model(CONFIGS[name]())
    model = StreamedModel(Checkpoint.open(dense))
    with model.loaded() as whole:
        whole.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for key, parameter in whole.named_parameters():
            if "mlp" in key and parameter.ndim == 2:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.requires_grad_()
        yield model, Student(model, whole)


def gradients_after_a_step(accumulation: int, chunk: int, folder, capfd) -> tuple[dict[str, torch.Tensor], float]:
    model = StreamedModel(Checkpoint.open(make_model(CONFIGS["llama"]())))
    ids = torch.from_numpy(token_ids(ROWS, LENGTH))
    rows = taught(model, ids, ragged_mask())
    with student_of() as (_, student):
        student.chunk = chunk
        trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in trained.items()}
        schedule = Schedule(steps=1, batch_size=ROWS, accumulation=accumulation, seed=0)
        arguments = schedule.arguments(folder, CPU)
        arguments.max_grad_norm = 0.0
        trainer = TaughtTrainer(
            model=student,
            args=arguments,
            train_dataset=rows,
            optimizers=(torch.optim.SGD(trained.values(), lr=1.0), None),
        )
        trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
        result = trainer.train()
        out, error = capfd.readouterr()
        assert out == ""
        assert "[transformers]" not in error
        return {n: before[n] - p.detach() for n, p in trained.items()}, result.training_loss


def test_a_step_is_the_same_however_it_is_divided(capfd, tmp_path):
    whole, loss = gradients_after_a_step(1, 512, tmp_path, capfd)
    assert loss > 0.01
    for accumulation, chunk in ((8, 512), (2, 5), (4, 1)):
        divided, other = gradients_after_a_step(accumulation, chunk, tmp_path, capfd)
        assert other == pytest.approx(loss, rel=1e-4)
        for name, gradient in whole.items():
            assert torch.allclose(divided[name], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "qwen3-mixed"])
def test_the_loss_is_what_the_whole_model_gives(name):
    teacher = make_model(CONFIGS[name]()).double()
    ids = torch.from_numpy(token_ids(3, LENGTH))
    mask = ragged_mask()[:3]
    with student_of(name) as (_, student):
        dense = StreamedModel(Checkpoint.open(make_model(CONFIGS[name]())))
        batch = collate([taught(dense, ids, mask)[index] for index in range(3)])
        found, _ = student.losses(batch, Objective(cross_entropy=0.25))
        changed = make_model(CONFIGS[name]()).double()
        changed.load_state_dict({k: v.double() for k, v in student.model.state_dict().items()}, strict=False)
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(input_ids=ids, attention_mask=mask.long()).logits, -1) for m in (teacher, changed)
            )
        expected = 0.0
        for row in range(3):
            for position in range(int(mask[row].sum()) - 1):
                kl = (p[row, position].exp() * (p[row, position] - q[row, position])).sum()
                expected += kl - 0.25 * q[row, position, ids[row, position + 1]]
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_padding_changes_neither_loss_nor_gradients():
    dense = StreamedModel(Checkpoint.open(make_model(CONFIGS["llama"]())))
    ids = torch.from_numpy(token_ids(2, 8))
    found = []
    for padded in (False, True):
        rows, mask = ids, None
        if padded:
            rows = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
            mask = (torch.arange(13) < 8).expand(2, -1)
        with student_of() as (_, student):
            taught_rows = taught(dense, rows, mask)
            loss, _ = student.losses(collate([taught_rows[0], taught_rows[1]]), Objective())
            loss.backward()
            found.append((loss.item(), [p.grad.clone() for p in student.parameters() if p.requires_grad]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_labels_are_tokens_with_a_predecessor():
    rows = TaughtRows(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[False, True, True, False]]), torch.zeros(1, 4, 2))
    assert collate([rows[0]])["labels"].tolist() == [[-100, -100, 7, -100]]
    assert collate([TaughtRows(rows.input_ids, None, rows.hidden)[0]])["labels"].tolist() == [[-100, 6, 7, 8]]
