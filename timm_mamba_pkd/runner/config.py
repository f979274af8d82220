"""From a YAML file to checked data sets and models: every error a user can make is said before compute is spent."""

import re
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies
from torchdistill.datasets.util import build_data_loader

from timm_mamba_pkd.distillation import build_model, unknown_name


class ConfigError(ValueError):
    """A config, or what it names, cannot be used; the message is one line for the user."""


@dataclass
class Job:
    """What a torchdistill image-classification config stands for, built and checked.

    ``input_size`` is (channels, height, width) of a sample, ``topk`` the accuracies to measure, top-1 first.
    """

    config: dict[str, Any]
    teacher: nn.Module | None
    student: nn.Module
    test_loader: DataLoader
    input_size: tuple[int, int, int]
    num_classes: int
    topk: tuple[int, ...]

    @property
    def datasets(self) -> dict[str, Any]:
        return self.config["datasets"]

    @property
    def destination(self) -> Path | None:
        """``dst_ckpt`` of the config: where the trained model goes."""
        destination = self.student_config.get("dst_ckpt")
        return Path(destination).expanduser() if destination else None

    @property
    def student_config(self) -> dict[str, Any]:
        models = self.config["models"]
        return models["student_model"] if "student_model" in models else models["model"]


def load_config(path: str | Path) -> dict[str, Any]:
    """Parse a torchdistill YAML file and import its ``dependencies``.

    Raises:
        ConfigError: the file is missing, unreadable or not YAML, has numbers that YAML takes for text, something it
            calls fails (data set not found ...), or a section that every run needs is absent.
    """
    path = Path(path).expanduser()
    try:
        _reject_numbers_read_as_text(path.read_text())
        config = yaml_util.load_yaml_file(str(path))
        import_dependencies(config.get("dependencies") if isinstance(config, dict) else None)
    except OSError as error:
        if error.filename is not None and Path(error.filename) == path:
            raise ConfigError(f"config {path} cannot be read: {error.strerror or error}") from error
        raise ConfigError(f"config {path}: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ConfigError(f"config {path}: {first_line(error)}") from error
    except Exception as error:
        raise ConfigError(f"config {path}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"config {path} must be a mapping with datasets, models, train and test")
    for section in ("datasets", "models", "train", "test"):
        if not isinstance(config.get(section), dict):
            raise ConfigError(f"config {path} has no section '{section}'")
    models = config["models"]
    if not isinstance(models.get("student_model", models.get("model")), dict):
        raise ConfigError(f"config {path} names no model: expected models.student_model or models.model")
    for name in ("teacher_model", "student_model", "model"):
        if name in models and "key" not in (models[name] or {}):
            raise ConfigError(f"config {path}: models.{name} has no 'key'")
    return config


def prepare(config_path: str | Path, device: torch.device) -> Job:
    """Build the data sets and models of a config and try them on one sample of each data set.

    Raises:
        ConfigError: see `load_config`; also a data set that is empty or not declared, unknown models, weights of
            another model, models that cannot take the images, teacher and student with different class counts,
            and top-k accuracies with k above the class count.
    """
    config = load_config(config_path)
    datasets = dict(_dataset(config, loader, where) for where, loader in _loaders(config))
    models = config["models"]
    student_config = models["student_model"] if "student_model" in models else models["model"]
    teacher = _build(models["teacher_model"]) if "teacher_model" in models else None
    student = _build(student_config)

    samples = {dataset_id: _sample(dataset, dataset_id) for dataset_id, dataset in datasets.items()}
    images = [image for image, _ in samples.values()]
    num_classes = _num_outputs(student, student_config["key"], images)
    if teacher is not None:
        outputs = _num_outputs(teacher, models["teacher_model"]["key"], images)
        if outputs != num_classes:
            raise ConfigError(
                f"teacher has {outputs} classes, student has {num_classes}: set both num_classes to the data set's"
            )
    classes = max(1 + label for _, label in samples.values())
    classes = max(classes, *(_num_labels(dataset) for dataset in datasets.values()))
    if classes > num_classes:
        raise ConfigError(f"the data has at least {classes} classes, the models have {num_classes}: set num_classes")
    topk = _topk(config, num_classes)

    test_config = config["test"]["test_data_loader"]
    try:
        test_loader = build_data_loader(datasets[test_config["dataset_id"]], test_config, False)
    except Exception as error:
        raise ConfigError(f"test.test_data_loader: {type(error).__name__}: {first_line(error)}") from error
    student.to(device)
    if teacher is not None:
        teacher.to(device)
    size: Any = tuple(images[0].shape)
    return Job(config, teacher, student, test_loader, size, num_classes, topk)


def stages(train_config: dict[str, Any]) -> list[dict[str, Any]]:
    """The stage configs of a ``train`` section in order; a section without stages is one stage."""
    if "stage1" not in train_config:
        return [train_config]
    count = sum(key.startswith("stage") for key in train_config)
    return [train_config.get(f"stage{n}", {}) for n in range(1, 1 + count)]


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _reject_numbers_read_as_text(text: str) -> None:
    """``lr: 1e-4`` is text in YAML 1.1, which wants a dot and a sign."""
    for event in yaml.parse(text):
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            is_number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+", event.value, re.IGNORECASE)
            if is_number and isinstance(yaml.safe_load(event.value), str):
                raise ValueError(
                    f"line {event.start_mark.line + 1}: YAML takes {event.value} for text; write the number with a dot "
                    "and a signed exponent, as in 1.0e-4"
                )


def _loaders(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, stage in enumerate(stages(config["train"]), start=1):
        where = f"train.stage{number}"
        if not isinstance(stage, dict) or not isinstance(stage.get("num_epochs"), int) or stage["num_epochs"] < 1:
            raise ConfigError(f"{where} must be a section with num_epochs of at least 1")
        for name in ("train_data_loader", "val_data_loader"):
            if name in stage:
                yield f"{where}.{name}", stage[name]
            elif number == 1:
                raise ConfigError(f"train has no {name}")
    if "test_data_loader" not in config["test"]:
        raise ConfigError("test has no test_data_loader")
    yield "test.test_data_loader", config["test"]["test_data_loader"]


def _dataset(config: dict[str, Any], loader: dict[str, Any], where: str) -> tuple[str, Any]:
    """The id and the data set that a loader's config names."""
    dataset_id = str(loader.get("dataset_id") if isinstance(loader, dict) else None)
    if dataset_id not in config["datasets"]:
        raise ConfigError(f"{where}: {unknown_name('dataset_id', dataset_id, config['datasets'])}")
    dataset = config["datasets"][dataset_id]
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise ConfigError(f"data set '{dataset_id}' ({where}) is empty")
    return dataset_id, dataset


def _build(model_config: dict[str, Any]) -> nn.Module:
    try:
        return build_model(model_config)
    except ValueError as error:
        raise ConfigError(first_line(error)) from error
    except Exception as error:
        raise ConfigError(f"model {model_config['key']}: {type(error).__name__}: {first_line(error)}") from error


def _sample(dataset: Any, dataset_id: str) -> tuple[torch.Tensor, int]:
    try:
        image, label = dataset[0][:2]
        label = int(label)
    except Exception as error:
        raise ConfigError(f"data set '{dataset_id}': the first sample cannot be read: {first_line(error)}") from error
    if not isinstance(image, torch.Tensor) or image.ndim != 3:
        raise ConfigError(
            f"data set '{dataset_id}': samples must be tensors of shape (C, H, W): end the transforms with ToTensor"
        )
    return image, label


def _num_outputs(model: nn.Module, name: str, images: Iterable[torch.Tensor]) -> int:
    """Number of outputs of ``model``, found by a forward pass of each image."""
    outputs = 0
    was_training = model.training
    model.eval()
    for image in images:
        try:
            with torch.inference_mode():
                outputs = model(image[None]).shape[-1]
        except Exception as error:
            shape = "x".join(map(str, image.shape))
            raise ConfigError(f"model {name} cannot take images of {shape}: {first_line(error)}") from error
    model.train(was_training)
    return outputs


def _num_labels(dataset: Any) -> int:
    """Number of classes a data set declares (torchvision's ``classes``), seen through Subset; 0 if it does not."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return len(getattr(dataset, "classes", ()))


def _topk(config: dict[str, Any], num_classes: int) -> tuple[int, ...]:
    topk = config["test"].get("topk") or ([1, 5] if num_classes >= 5 else [1])
    if not isinstance(topk, list) or not all(isinstance(k, int) and k > 0 for k in topk):
        raise ConfigError(f"test.topk must be a list of positive integers, got {topk!r}")
    if max(topk) > num_classes:
        raise ConfigError(f"test.topk asks for top-{max(topk)}, but there are {num_classes} classes: set topk: [1]")
    return tuple(sorted({1, *topk}))
