"""From a YAML file to checked data sets and models: every error a user can make is said before compute is spent."""

import logging
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset
from torchdistill.common import yaml_util
from torchdistill.common.main_util import import_dependencies

from timm_mamba_pkd.distillation import build_model, unknown_name

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A config, or what it names, cannot be used; the message is one line for the user."""


@dataclass
class Job:
    """What a torchdistill image-classification config stands for, built and checked.

    ``input_size`` is (channels, height, width) of a sample, ``topk`` the accuracies to measure.
    """

    config: dict[str, Any]
    teacher: nn.Module | None
    student: nn.Module
    input_size: tuple[int, int, int]
    num_classes: int
    topk: tuple[int, ...]

    @property
    def datasets(self) -> dict[str, Any]:
        return self.config["datasets"]

    @property
    def student_config(self) -> dict[str, Any]:
        models = self.config["models"]
        return models["student_model"] if "student_model" in models else models["model"]


def load_config(path: str | Path) -> dict[str, Any]:
    """Parse a torchdistill YAML file and import its ``dependencies``.

    Raises:
        ConfigError: the file is missing, unreadable or not YAML, something it calls fails (data set not found ...),
            or a section that every run needs is absent.
    """
    path = Path(path).expanduser()
    try:
        config = yaml_util.load_yaml_file(str(path))
        import_dependencies(config.get("dependencies") if isinstance(config, dict) else None)
    except OSError as error:
        if Path(error.filename or path) == path:
            raise ConfigError(f"config {path} cannot be read: {error.strerror or error}") from error
        raise ConfigError(f"config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise ConfigError(f"config {path}: {type(error).__name__}: {_first_line(error)}") from error
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
    """Build the data sets and models of a config and try them on one sample.

    Raises:
        ConfigError: see `load_config`; also a data set that is empty or not declared, unknown models, weights of
            another model, models that cannot take the images, teacher and student with different class counts,
            and top-k accuracies with k above the class count.
    """
    config = load_config(config_path)
    datasets = {where: _dataset(config, loader, where) for where, loader in _loaders(config)}
    models = config["models"]
    student_config = models["student_model"] if "student_model" in models else models["model"]
    try:
        teacher = build_model(models["teacher_model"]) if "teacher_model" in models else None
        student = build_model(student_config)
    except ValueError as error:
        raise ConfigError(_first_line(error)) from error

    image, label = _sample(datasets)
    outputs = {"student": _outputs(student, student_config["key"], image)}
    if teacher is not None:
        outputs["teacher"] = _outputs(teacher, models["teacher_model"]["key"], image)
        if outputs["teacher"] != outputs["student"]:
            raise ConfigError(
                f"teacher has {outputs['teacher']} classes, student has {outputs['student']}: set both num_classes "
                "to the data set's"
            )
    num_classes = outputs["student"]
    classes = max(int(label) + 1, *(_num_labels(dataset) for dataset in datasets.values()))
    if classes > num_classes:
        raise ConfigError(f"the data has at least {classes} classes, the models have {num_classes}: set num_classes")
    topk = tuple(config["test"].get("topk") or ((1, 5) if num_classes >= 5 else (1,)))
    if max(topk) > num_classes:
        raise ConfigError(f"test.topk asks for top-{max(topk)}, but there are {num_classes} classes: set topk: [1]")
    student.to(device)
    if teacher is not None:
        teacher.to(device)
    return Job(config, teacher, student, tuple(image.shape), num_classes, topk)  # pyright: ignore[reportArgumentType]


def stages(train_config: dict[str, Any]) -> list[dict[str, Any]]:
    """The stage configs of a ``train`` section in order; a section without stages is one stage."""
    if "stage1" not in train_config:
        return [train_config]
    return [train_config[f"stage{n}"] for n in range(1, 1 + sum(key.startswith("stage") for key in train_config))]


def _loaders(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, stage in enumerate(stages(config["train"]), start=1):
        for name in ("train_data_loader", "val_data_loader"):
            if name in stage:
                yield f"train.stage{number}.{name}", stage[name]
            elif number == 1:
                raise ConfigError(f"train has no {name}")
    if "test_data_loader" not in config["test"]:
        raise ConfigError("test has no test_data_loader")
    yield "test.test_data_loader", config["test"]["test_data_loader"]


def _dataset(config: dict[str, Any], loader: dict[str, Any], where: str) -> Any:
    dataset_id = str(loader.get("dataset_id"))
    if dataset_id not in config["datasets"]:
        raise ConfigError(f"{where}: {unknown_name('dataset_id', dataset_id, config['datasets'])}")
    dataset = config["datasets"][dataset_id]
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise ConfigError(f"data set '{dataset_id}' ({where}) is empty")
    return dataset


def _sample(datasets: dict[str, Dataset]) -> tuple[torch.Tensor, Any]:
    where, dataset = next(iter(datasets.items()))
    try:
        image, label = dataset[0][:2]
    except Exception as error:
        raise ConfigError(f"{where}: the first sample cannot be read: {_first_line(error)}") from error
    if not isinstance(image, torch.Tensor) or image.ndim != 3:
        raise ConfigError(f"{where}: samples must be tensors of shape (C, H, W): end the transforms with ToTensor")
    return image, label


def _outputs(model: nn.Module, name: str, image: torch.Tensor) -> int:
    """Number of outputs of ``model``, found by one forward pass."""
    was_training = model.training
    try:
        with torch.inference_mode():
            logits = model.eval()(image[None])
    except Exception as error:
        shape = "x".join(map(str, image.shape))
        raise ConfigError(f"model {name} cannot take images of {shape}: {_first_line(error)}") from error
    finally:
        model.train(was_training)
    return logits.shape[-1]


def _num_labels(dataset: Any) -> int:
    """Number of classes a data set declares (torchvision's ``classes``), seen through Subset; 0 if it does not."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return len(getattr(dataset, "classes", ()))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
