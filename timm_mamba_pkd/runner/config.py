"""From a YAML file to checked data sets and models: every error a user can make is said before compute is spent."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchdistill.common.main_util import import_dependencies
from torchdistill.datasets.util import build_data_loader

from timm_mamba_pkd.datasets import num_classes as declared_classes
from timm_mamba_pkd.distillation import build_model, unknown_name
from timm_mamba_pkd.runner.errors import ConfigError, Keys, explain, first_line
from timm_mamba_pkd.runner.safe_config import Folders, require_safe
from timm_mamba_pkd.runner.schema import check_schema, set_cache_dir
from timm_mamba_pkd.runner.source import Source
from timm_mamba_pkd.runner.streams import first_samples, open_stream
from timm_mamba_pkd.runner.unreadable import Readable, UnreadableError


@dataclass
class Job:
    """What a torchdistill image-classification config stands for, built and checked.

    ``input_size`` is (channels, height, width) of a test image, ``topk`` the accuracies to measure, top-1 first,
    ``warnings`` what in the config is dubious.
    """

    source: Source
    warnings: list[str]
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
    def student_role(self) -> str:
        """Where the student stands under ``models``."""
        return "student_model" if "student_model" in self.config["models"] else "model"

    @property
    def student_config(self) -> dict[str, Any]:
        return self.config["models"][self.student_role]


def prepare(
    config_path: str | Path, device: torch.device, cache_dir: str | None = None, safe: Folders | None = None
) -> Job:
    """Read and check a config, then build its data sets and models and try them on one sample of each data set.

    Args:
        config_path: of the YAML file.
        device: for the models.
        cache_dir: where cached logits go, in place of the config's ``cache_dir``.
        safe: refuse what `require_safe` refuses, with these folders to write to.

    Raises:
        ConfigError: the file is no config (see `Source.read` and `check_schema`); something it calls fails (data not
            found ...); a data set is empty or not declared; unknown models, weights of another model, models that
            cannot take the images; teacher and student with different class counts; top-k with k above that count.
    """
    source = Source.read(config_path)
    if cache_dir is not None and not set_cache_dir(source.root, cache_dir) and safe is None:
        raise ConfigError(source.say("--cache-dir is for a progressive schedule, and train is none", None))
    if safe is not None:
        require_safe(source, safe)
    warnings = check_schema(source)
    config = source.load()
    with source.locating():
        return _prepare(source, warnings, config, device)


def _prepare(source: Source, warnings: list[str], config: dict[str, Any], device: torch.device) -> Job:
    load_dependencies(config)
    for section in ("datasets", "models", "train", "test"):
        if not isinstance(config[section], dict):
            raise ConfigError(f"{section} must be a section, got {config[section]!r}", at=(section,))
    models = config["models"]
    student_role = "student_model" if "student_model" in models else "model"
    if models.get(student_role) is None:
        raise ConfigError("names no model: expected models.student_model or models.model", at=("models",))
    datasets = _datasets(config)
    config["datasets"] = {**config["datasets"], **datasets}
    teacher = None if models.get("teacher_model") is None else build(models, "teacher_model")
    student = build(models, student_role)

    samples = {dataset_id: sample_of(dataset, dataset_id) for dataset_id, dataset in datasets.items()}
    images = [image for image, _ in samples.values()]
    num_classes = num_outputs(student, models, student_role, images)
    if teacher is not None:
        outputs = num_outputs(teacher, models, "teacher_model", images)
        if outputs != num_classes:
            raise ConfigError(
                f"teacher has {outputs} classes, student has {num_classes}: set both num_classes to the data set's",
                at=("models", student_role, "kwargs", "num_classes"),
            )
    classes = max(1 + label for _, label in samples.values())
    classes = max(classes, *(declared_classes(dataset) or 0 for dataset in datasets.values()))
    if classes > num_classes:
        raise ConfigError(
            f"the data has at least {classes} classes, the models have {num_classes}: set num_classes",
            at=("models", student_role, "kwargs", "num_classes"),
        )
    topk = _topk(config, num_classes)
    if teacher is not None and not _has_weights(config):
        line = source.line(("models", "teacher_model"))
        warnings.append(source.say("the teacher has no weights (src_ckpt, pretrained): its logits are random", line))

    test_config = config["test"]["test_data_loader"]
    try:
        test_loader = build_data_loader(datasets[test_config["dataset_id"]], test_config, False)
    except Exception as error:
        raise ConfigError(f"test.test_data_loader: {explain(error)}", at=("test", "test_data_loader")) from error
    student.to(device)
    if teacher is not None:
        teacher.to(device)
    size: Any = tuple(samples[test_config["dataset_id"]][0].shape)
    return Job(source, warnings, config, teacher, student, test_loader, size, num_classes, topk)


def model_name(entry: dict[str, Any]) -> str:
    """The name in timm, or else the key, of a model's entry in a config."""
    return str((entry.get("kwargs") or {}).get("model_name", entry["key"]))


def require_known_labels(targets: torch.Tensor, num_classes: int) -> None:
    """Raise a ConfigError if one of the labels (B,) is none of the models' classes; shares of classes pass."""
    if not targets.is_floating_point() and targets.max() >= num_classes:
        raise ConfigError(f"the data has label {targets.max()}, the models have {num_classes} classes: set num_classes")


def stages(train_config: dict[str, Any]) -> list[dict[str, Any]]:
    """The stage configs of a ``train`` section in order; a section without stages is one stage."""
    if "stage1" not in train_config:
        return [train_config]
    count = sum(key.startswith("stage") for key in train_config)
    return [train_config.get(f"stage{n}", {}) for n in range(1, 1 + count)]


def stage_weights(train_config: dict[str, Any]) -> Iterator[tuple[Keys, Path]]:
    """The files that the stages of a ``train`` section load as ``src_ckpt``, and the keys that lead there."""
    for number, stage in enumerate(stages(train_config), start=1):
        for role in ("teacher", "student", "model"):
            if path := local_file((stage.get(role) or {}).get("src_ckpt")):
                yield ("train", f"stage{number}", role, "src_ckpt"), path


def local_file(name: Any) -> Path | None:
    """The path that ``src_ckpt`` names; None for a URL, and where there is none."""
    return None if not name or str(name).startswith(("http://", "https://")) else Path(name).expanduser()


def load_dependencies(config: dict[str, Any]) -> None:
    """Import what the config names under ``dependencies``."""
    try:
        import_dependencies(config.get("dependencies"))
    except (Exception, SystemExit) as error:
        raise ConfigError(explain(error), at=("dependencies",)) from error


def _has_weights(config: dict[str, Any]) -> bool:
    """Whether the config says where the teacher's weights come from, or trains the teacher."""
    teacher = config["models"]["teacher_model"]
    sections = [stage.get("teacher") or {} for stage in stages(config["train"])]
    kwargs = teacher.get("kwargs") or {}
    return any(
        [
            teacher.get("src_ckpt"),
            any(kwargs.get(name) for name in ("pretrained", "weights", "checkpoint_path")),
            any(section.get("src_ckpt") or section.get("requires_grad") for section in sections),
        ]
    )


def _loaders(config: dict[str, Any]) -> Iterator[tuple[Keys, dict[str, Any]]]:
    for number, stage in enumerate(stages(config["train"]), start=1):
        at = ("train", f"stage{number}")
        if not isinstance(stage, dict) or not isinstance(stage.get("num_epochs"), int) or stage["num_epochs"] < 1:
            raise ConfigError(f"{'.'.join(at)} must be a section with num_epochs of at least 1", at=at)
        for name in ("train_data_loader", "val_data_loader"):
            if name in stage:
                yield (*at, name), stage[name]
            elif number == 1:
                raise ConfigError(f"train has no {name}", at=at)
    yield ("test", "test_data_loader"), config["test"]["test_data_loader"]


def named_dataset(config: dict[str, Any], loader: dict[str, Any], at: Keys) -> tuple[str, Any]:
    """The id and the data set that a loader's config names."""
    dataset_id = str(loader.get("dataset_id") if isinstance(loader, dict) else None)
    where, at = ".".join(at), (*at, "dataset_id")
    if dataset_id not in config["datasets"]:
        raise ConfigError(f"{where}: {unknown_name('dataset_id', dataset_id, config['datasets'])}", at=at)
    dataset = config["datasets"][dataset_id]
    if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise ConfigError(f"data set '{dataset_id}' ({where}) is empty", at=("datasets", dataset_id))
    return dataset_id, dataset


def _datasets(config: dict[str, Any]) -> dict[str, Any]:
    """The data sets that loaders name, by id, made to tell what cannot be read in them."""
    loaders = [(at, loader, *named_dataset(config, loader, at)) for at, loader in _loaders(config)]
    evaluated = {dataset_id for at, _, dataset_id, _ in loaders if at[-1] != "train_data_loader"}
    datasets: dict[str, Any] = {}
    for at, loader, dataset_id, dataset in loaders:
        training = dataset_id not in evaluated
        if isinstance(dataset, IterableDataset):
            datasets[dataset_id] = open_stream(dataset, dataset_id, loader, at, training)
            continue
        if "sampler" not in loader:
            raise ConfigError(f"{'.'.join(at)} has no 'sampler'", at=at)
        if at[-1] != "train_data_loader" and loader["kwargs"].get("drop_last"):
            message = f"{'.'.join(at)}: drop_last would leave samples out of the evaluation: remove it"
            raise ConfigError(message, at=(*at, "kwargs", "drop_last"))
        if isinstance(dataset, Sized) and dataset_id not in datasets:
            datasets[dataset_id] = Readable(dataset, dataset_id, training)
    return {dataset_id: datasets.get(dataset_id, dataset) for _, _, dataset_id, dataset in loaders}


def build(models: dict[str, Any], role: str) -> nn.Module:
    """The model of a role, with its weights."""
    try:
        return build_model(models[role])
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, TypeError) else error
        raise ConfigError(f"models.{role}: {explain(cause)}", at=("models", role)) from error


def sample_of(dataset: Any, dataset_id: str) -> tuple[torch.Tensor, int]:
    """The first image (C, H, W) of a data set, and its label."""
    try:
        image, label = first_samples(dataset, 1)[0][:2]
        label = int(label)
    except UnreadableError as error:
        raise ConfigError(str(error), at=("datasets", dataset_id)) from error
    except Exception as error:
        raise ConfigError(
            f"data set '{dataset_id}': the first sample cannot be read: {first_line(error)}",
            at=("datasets", dataset_id),
        ) from error
    if not isinstance(image, torch.Tensor) or image.ndim != 3:
        raise ConfigError(
            f"data set '{dataset_id}': samples must be tensors of shape (C, H, W): end the transforms with ToTensor",
            at=("datasets", dataset_id),
        )
    return image, label


def num_outputs(model: nn.Module, models: dict[str, Any], role: str, images: Iterable[torch.Tensor]) -> int:
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
            name = models[role]["key"]
            raise ConfigError(
                f"model {name} cannot take images of {shape}: {first_line(error)}", at=("models", role)
            ) from error
    model.train(was_training)
    return outputs


def _topk(config: dict[str, Any], num_classes: int) -> tuple[int, ...]:
    at = ("test", "topk")
    topk = config["test"].get("topk") or ([1, 5] if num_classes >= 5 else [1])
    if not isinstance(topk, list) or not all(isinstance(k, int) and k > 0 for k in topk):
        raise ConfigError(f"test.topk must be a list of positive integers, got {topk!r}", at=at)
    if max(topk) > num_classes:
        raise ConfigError(
            f"test.topk asks for top-{max(topk)}, but there are {num_classes} classes: set topk: [1]", at=at
        )
    return tuple(sorted({1, *topk}))
