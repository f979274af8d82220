"""A small progressive schedule in torchdistill's own box."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler, SequentialSampler
from torchdistill.core.distillation import get_distillation_box

from timm_mamba_pkd import MambaPKDEnsemble, progressive

STUDENTS = ["mamba_pkd_s1", "mamba_pkd_s1", "mamba_pkd_s2"]
CLASSES = 3


class Digits(Dataset):
    """Images of 3 classes that a transform shifts by a random number."""

    classes = ("0", "1", "2")

    def __init__(self, count: int = 16, noise: float = 0.1) -> None:
        self.noise = noise
        self.images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.targets = [i % CLASSES for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + self.noise * torch.rand(()), self.targets[index]


def teacher_and_students(students: Any = tuple(STUDENTS), **kwargs: Any) -> tuple[nn.Module, MambaPKDEnsemble]:
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", in_chans=1, num_classes=CLASSES)  # has BatchNorm
    nn.init.normal_(teacher.get_parameter("fc.weight"), std=0.2)
    return teacher, MambaPKDEnsemble(students, num_classes=CLASSES, in_chans=1, img_size=8, **kwargs)


def schedule(**changes: Any) -> dict[str, Any]:
    def loader(sampler: Any) -> dict[str, Any]:
        return {"dataset_id": "digits", "sampler": {"class_or_func": sampler}, "kwargs": {"batch_size": 8}}

    labels = {"input": {"is_from_teacher": False, "module_path": ".", "io": "output"}, "target": {"uses_label": True}}
    ce = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": labels},
        "weight": 0.5,
    }
    defaults = {
        "students": STUDENTS,
        "num_epochs": 2,
        "train_data_loader": loader(RandomSampler),
        "val_data_loader": loader(SequentialSampler),
        "optimizer": {"key": "mamba_pkd_adamw", "kwargs": {"lr": 0.01}},
        "scheduler": {"key": "StepLR", "kwargs": {"step_size": 1, "gamma": 0.5}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": ce}}},
    }
    return progressive(**(defaults | changes))


def box_of(teacher: nn.Module, ensemble: nn.Module, train: dict[str, Any], data: Any = None) -> Any:
    data = {"digits": data or Digits()}
    return get_distillation_box(teacher, ensemble, data, train, torch.device("cpu"), None, False, 1)


def train_one_epoch(box: Any, epoch: int) -> list[float]:
    """As torchdistill's example script does it, up to the validation; gives the losses."""
    box.pre_epoch_process(epoch=epoch)
    losses = []
    for images, targets, supp_dict in box.train_data_loader:
        loss = box.forward_process(images, targets, supp_dict)
        losses.append(loss.item())
        box.post_forward_process(loss=loss)
    return losses


def epochs(box: Any) -> Iterator[int]:
    """Train epoch by epoch as ``mamba-pkd train`` does, and give control before each post-epoch process.

    The sampler draws the same order in epoch e of every run.
    """
    epoch = 0
    while epoch < box.num_epochs:
        torch.manual_seed(epoch)
        train_one_epoch(box, epoch)
        yield epoch
        box.post_epoch_process(metrics=0.0)
        epoch += 1
    box.clean_modules()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def count_calls(module: nn.Module) -> list[int]:
    """A list that gets the batch size of every call of ``module``."""
    calls: list[int] = []
    module.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    return calls


@pytest.fixture
def tiny() -> SimpleNamespace:
    """The functions of this file."""
    functions: list[Callable[..., Any]] = [
        teacher_and_students, schedule, box_of, train_one_epoch, epochs, snapshot, same, count_calls,
    ]  # fmt: skip
    return SimpleNamespace(
        Digits=Digits, STUDENTS=STUDENTS, CLASSES=CLASSES, **{each.__name__: each for each in functions}
    )
