"""From a config to its trained model alone, also where its data can no longer be read."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import set_exportable
from timm.models import get_model_input_config
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchdistill.datasets.util import build_data_loader

from timm_mamba_pkd.datasets import transform_of
from timm_mamba_pkd.models import WeightsError, load_weights
from timm_mamba_pkd.runner.config import build, load_dependencies, model_name, named_dataset, num_outputs, sample_of
from timm_mamba_pkd.runner.errors import ConfigError, explain
from timm_mamba_pkd.runner.safe_config import Folders, require_safe
from timm_mamba_pkd.runner.schema import check_schema
from timm_mamba_pkd.runner.source import Source, child, pairs
from timm_mamba_pkd.runner.streams import open_stream


@dataclass
class Trained:
    """What a config says of its trained model, without its teacher, its training and any weights.

    Attributes:
        path: of the config.
        model: the student, or the only model, in eval mode.
        exportable: a function that makes the same in timm's exportable mode.
        name: of the model.
        input_size: (channels, height, width) of a test image or, where these cannot be read, of the model.
        num_classes: the model's.
        dataset_ids: of the config.
        datasets: by id; none where one of them cannot be read.
        test_loader: None where the data cannot be read.
        transform: of the test images that cannot be read, where the config has it.
        missing: why the data cannot be read, or an empty string.
    """

    path: Path
    model: nn.Module
    exportable: Callable[[], nn.Module]
    name: str
    input_size: tuple[int, int, int]
    num_classes: int
    dataset_ids: list[str]
    datasets: dict[str, Any] = field(default_factory=dict)
    test_loader: DataLoader | None = None
    transform: Any = None
    missing: str = ""

    @property
    def test_transform(self) -> Any:
        """Of the test images, if the config or their data set tells it."""
        return self.transform if self.test_loader is None else transform_of(self.test_loader.dataset)


def load_trained(model: nn.Module, path: Path) -> None:
    """`load_weights`, with a ConfigError."""
    try:
        load_weights(model, path)
    except WeightsError as error:
        raise ConfigError(str(error)) from error


def prepare_trained(config_path: str | Path, safe: Folders | None = None) -> Trained:
    """Read a config, and build its model and, where they can be read, its data sets.

    Args:
        config_path: of the YAML file.
        safe: as in `prepare`.

    Raises:
        ConfigError: the file is no config, it names no model that can be built, the model cannot take the images, or
            there are no images and the model is made for none in particular.
    """
    source = Source.read(config_path)
    if safe is not None:
        require_safe(source, safe)
    check_schema(source)
    missing = ""
    try:
        config = source.load(leave_out=("train",))
    except ConfigError as error:
        config, missing = source.load(leave_out=("train", "datasets")), str(error)
    with source.locating():
        load_dependencies(config)
        return _prepare_trained(source, config, missing)


def _prepare_trained(source: Source, config: dict[str, Any], missing: str) -> Trained:
    models = config["models"]
    role = "student_model" if models.get("student_model") else "model"
    if not models.get(role):
        raise ConfigError("names no model: expected models.student_model or models.model", at=("models",))
    kwargs = models[role].get("kwargs") or {}
    bare = {name: value for name, value in kwargs.items() if name not in ("pretrained", "checkpoint_path")}
    models = {role: {**models[role], "kwargs": bare, "src_ckpt": None}}
    model: Any = build(models, role).eval()
    loader, at = config["test"]["test_data_loader"], ("test", "test_data_loader")
    dataset, images, test_loader = None, [], None
    try:
        if not missing:
            dataset_id, dataset = named_dataset(config, loader, at)
            if isinstance(dataset, IterableDataset):
                dataset = open_stream(dataset, dataset_id, loader, at, training=False)
            images = [sample_of(dataset, dataset_id)[0]]
            test_loader = build_data_loader(dataset, loader, False)
    except Exception as error:  # whatever a data set raises
        missing, images, test_loader = explain(error), [], None
    if not images:
        if not hasattr(model, "pretrained_cfg"):
            raise ConfigError(f"the data cannot be read, and the model has no image size of its own: {missing}")
        images = [torch.zeros(get_model_input_config(model)["input_size"])]
    transform = None
    if missing:
        with suppress(ConfigError):
            transform = source.load(at=("datasets", str(loader["dataset_id"]), "init", "kwargs", "transform"))

    def exportable() -> nn.Module:
        with set_exportable(True):
            twin = build(models, role)
        return twin.eval()

    size: Any = tuple(images[0].shape)
    return Trained(
        path=source.path,
        model=model,
        exportable=exportable,
        name=model_name(models[role]),
        input_size=size,
        num_classes=num_outputs(model, models, role, images),
        dataset_ids=[key.value for key, _ in pairs(child(source.root, "datasets"))],
        datasets={} if missing else config["datasets"],
        test_loader=test_loader,
        transform=transform,
        missing=missing,
    )
