"""Accuracies against counting by hand, and the rows of results."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_mamba_pkd import MambaPKDEnsemble
from timm_mamba_pkd.models import count_macs
from timm_mamba_pkd.report import count_params
from timm_mamba_pkd.runner.config import prepare
from timm_mamba_pkd.runner.evaluate import count_correct, evaluate, evaluate_ensemble
from timm_mamba_pkd.runner.results import measure

CPU = torch.device("cpu")


class Lookup(nn.Module):
    """An 'image' (1, 1, 1) is an index into a table of logits. In training mode it is wrong."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        logits = self.table[x[:, 0, 0, 0].long()]
        return -logits if self.training else logits


def loader_of(targets: list[int], batch_size: int) -> DataLoader:
    images = torch.arange(len(targets), dtype=torch.float32)[:, None, None, None]
    return DataLoader(TensorDataset(images, torch.tensor(targets)), batch_size)


LOGITS = torch.tensor([[3.0, 2, 1], [1, 3, 2], [1, 2, 3], [3, 2, 1], [2, 1, 3]])
TARGETS = [0, 2, 0, 1, 2]  # ranks of the target: 1, 2, 3, 2, 1


def test_count_correct_by_hand():
    found = count_correct(LOGITS, torch.tensor(TARGETS), (1, 2, 3))
    assert found.tolist() == [2, 4, 5]
    both = count_correct(torch.stack([LOGITS, -LOGITS]), torch.tensor(TARGETS), (1, 2))
    assert both.tolist() == [[2, 4], [1, 3]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])  # 5 samples: mostly with a smaller last batch
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_counts_samples_not_batches(batch_size, training):
    model = Lookup(LOGITS).train(training)
    assert evaluate(model, loader_of(TARGETS, batch_size), CPU, (1, 2, 3)) == pytest.approx([40, 80, 100])
    assert model.training is training


def table_ensemble(training: bool) -> tuple[MambaPKDEnsemble, Tensor]:
    tables = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    ensemble = MambaPKDEnsemble(["mamba_pkd_s1"] * 3, num_classes=4, in_chans=1, img_size=8)
    ensemble.students = nn.ModuleList(Lookup(table) for table in tables)
    return ensemble.train(training), tables


@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_every_student_and_every_partial_ensemble(active, training):
    ensemble, tables = table_ensemble(training)
    ensemble.set_active(active)
    targets = [0, 1, 2, 3, 0, 1, 2]
    alone, together = evaluate_ensemble(ensemble, loader_of(targets, 3), CPU)

    def percent(logits: Tensor) -> float:
        return 100 * sum(row.argmax().item() == target for row, target in zip(logits, targets, strict=True)) / 7

    assert alone == pytest.approx([percent(tables[k]) for k in range(active)])
    assert together == pytest.approx([percent(tables[: k + 1].mean(0)) for k in range(active)])
    assert len(set(alone + together)) > 1 or active == 1
    assert [module.training for module in (ensemble, *ensemble.students)] == [training] * 4
    assert int(ensemble.num_active) == active


def test_rows(progressive, write, monkeypatch):
    monkeypatch.setattr("timm_mamba_pkd.runner.results.measure_latency", lambda *args: 1.0)
    progressive["models"]["student_model"]["kwargs"]["students"].append("mamba_pkd_s1")
    job = prepare(write(progressive), CPU)
    assert isinstance(job.student, MambaPKDEnsemble) and job.teacher is not None
    job.student.set_active(2)  # as after two stages
    before = {name: tensor.clone() for name, tensor in job.student.state_dict().items()}
    rows = measure(job, CPU)
    assert [(row.model, row.role, row.k) for row in rows] == [
        ("test_resnet", "teacher", None),
        ("mamba_pkd_s1", "student", 1),
        ("mamba_pkd_s2", "student", 2),
        ("ensemble_1", "ensemble", 1),
        ("ensemble_2", "ensemble", 2),
    ]
    teacher, s1, s2, e1, e2 = rows
    size = (1, 8, 8)
    assert job.input_size == size
    macs = [count_macs(student, size) for student in job.student.students[:2]]
    params = [count_params(student) for student in job.student.students[:2]]
    assert [row.gmacs * 1e9 for row in rows] == pytest.approx(
        [count_macs(job.teacher, size), *macs, macs[0], sum(macs)]
    )
    assert [row.param_count * 1e6 for row in rows] == pytest.approx(
        [count_params(job.teacher), *params, params[0], sum(params)]
    )
    assert teacher.macs_pct == 100
    assert [r.macs_pct for r in (s1, s2, e1, e2)] == pytest.approx(
        [100 * r.gmacs / teacher.gmacs for r in (s1, s2, e1, e2)]
    )
    assert s1.top1 == e1.top1
    for row, model in ((teacher, job.teacher), (s1, job.student.students[0]), (e2, job.student)):
        model.eval()
        with torch.no_grad():
            right = sum(int(model(images).argmax(-1).eq(labels).sum()) for images, labels in job.test_loader)
        assert row.top1 == pytest.approx(100 * right / 21)
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.student.state_dict().items())

    assert [row.role for row in measure(job, CPU, student_only=True)] == ["student"] * 2 + ["ensemble"] * 2


def test_costs_are_those_of_a_test_image(plain, build, write, monkeypatch):
    """Training images may be smaller."""
    monkeypatch.setattr("timm_mamba_pkd.runner.results.measure_latency", lambda *args: 1.0)
    plain["datasets"]["fake/test"] = build.fake_images(8, offset=200, side=12)
    job = prepare(write(plain), CPU)
    (row,) = measure(job, CPU)
    assert row.gmacs == count_macs(job.student, (1, 12, 12)) / 1e9
