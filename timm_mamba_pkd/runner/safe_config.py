"""``--safe-config``: a config is judged before anything that it names is imported, called or written."""

import enum
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torchvision
from torch.utils.data import Sampler
from torchdistill.datasets.sample_loader import JpegCompressionLoader
from torchdistill.datasets.util import split_dataset
from torchvision import transforms
from torchvision.transforms import v2

from timm_mamba_pkd.datasets import Digits
from timm_mamba_pkd.distillation import RULES, progressive
from timm_mamba_pkd.runner.errors import LONGEST, ConfigError
from timm_mamba_pkd.runner.schema import Problem
from timm_mamba_pkd.runner.source import Source
from timm_mamba_pkd.runner.tags import PACKAGES, PLAIN, Built, Section, TagReader, is_enumeration

DATASETS = tuple(
    getattr(torchvision.datasets, name)
    for name in ("FakeData", "ImageFolder", "MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100")
)
TRANSFORMS = tuple(
    value
    for module in (transforms, v2)
    for value in vars(module).values()
    if inspect.isclass(value)
    and value.__module__.startswith("torchvision.transforms.")
    and not issubclass(value, (enum.Enum, transforms.Lambda, v2.Lambda))
)
CALLED = (
    *DATASETS, *TRANSFORMS, Digits, JpegCompressionLoader, split_dataset, progressive,
    timm.data.create_dataset, timm.data.create_transform,
)  # fmt: skip
CALLED_IN_WORDS = (
    f"torchvision's transforms, the data sets {', '.join(cls.__name__ for cls in (*DATASETS, Digits))}, split_dataset, "
    "JpegCompressionLoader, timm's create_dataset and create_transform, and progressive"
)
READER_NAMES = ("", *(f"torch/{name}" for name in ("image_folder", "mnist", "fashion_mnist", "kmnist")))
READER_NAMES = (*READER_NAMES, "torch/cifar10", "torch/cifar100")
READER_ARGUMENTS = (
    "name", "root", "split", "search_split", "is_training", "download", "input_img_mode", "transform",
    "target_transform",
)  # fmt: skip
NO_FOLDER = re.compile(r"\.tar\b|\[", re.IGNORECASE)  # timm looks for the part of a split before its bracket
MODEL_ARGUMENTS = (
    "model_name", "students", "combination", "small_stem", "channels", "reductions",  # of ours
    "num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate", "pretrained",
    "checkpoint_path",  # of timm's, which read a checkpoint as tensors only
    "weights", "progress", "depth", "k", "dropout_p", "memory_efficient",  # of torchvision's and torchdistill's
)  # fmt: skip


@dataclass(frozen=True)
class Folders:
    """Where a run may write: its output folder, and the folder that ``--cache-dir`` names."""

    output: Path
    cache: Path | None = None

    def outside(self, text: Any) -> bool:
        """Whether a path, its symbolic links followed, is outside, or none; ``~`` is read in both ways."""
        try:
            roots = [folder.expanduser().resolve() for folder in (self.output, self.cache) if folder is not None]
            readings = [path.resolve() for path in (Path(text), Path(text).expanduser())]
        except (TypeError, ValueError, OSError, RuntimeError):
            return True
        return not all(any(path.is_relative_to(root) for root in roots) for path in readings)

    def __str__(self) -> str:
        return f"--output {self.output}" + ("" if self.cache is None else f" and --cache-dir {self.cache}")


def require_safe(source: Source, folders: Folders | None) -> None:
    """Refuse a config that could run code of its own choice, or write where the command line does not say so.

    The rule: a tag may get only samplers of torch.utils.data, enumerations of torchvision with their members, and
    torch's dtypes, and call only the objects in `CALLED`, found among the modules that are loaded already; strings
    that torchdistill or this package would import, download, unpickle or write to are held to the lists here; all
    else is refused. Nothing of the config is imported, called or written to decide that.

    Args:
        source: the config.
        folders: where it may write; None if nothing of it will be run.

    Raises:
        ConfigError: with a line for everything that is refused.
    """
    reader = TagReader()
    try:
        config = reader.construct_document(source.tree())
    except Exception as error:  # whatever PyYAML raises on a value that does not fit its tag
        source.refuse([(line, _printable(message)) for line, message in reader.problems])
        raise ConfigError(
            f"config {source.path} is refused by --safe-config: {_printable(_one_line(error))}"
        ) from error
    if not isinstance(config, Section):
        source.refuse([*reader.problems, (1, "the config must be written out under --safe-config, not made by a tag")])
    problems = list(reader.problems)
    for call in reader.calls:
        problems += _judge_call(call, folders)
    for section in reader.sections:
        problems += _judge_names(section, folders)
    problems += _judge_sections(config)
    source.refuse([(line, _printable(message)) for line, message in problems])


def _judge_call(call: Built, folders: Folders | None) -> Iterator[Problem]:
    if call.tag == "!import_get":
        if not _is_gettable(call.value):
            yield (
                call.line,
                f"{call} is refused by --safe-config, which gets only samplers of torch.utils.data, enumerations of "
                "torchvision and torch's dtypes: leave it out, or trust the config as a script",
            )
        return
    if not is_one_of(call.value, CALLED):
        yield (
            call.line,
            f"{call} is refused by --safe-config, which calls only {CALLED_IN_WORDS}: leave it out, or trust the "
            "config as a script",
        )
        return
    arguments = _arguments(call)
    section = Section(arguments)
    section.lines = dict.fromkeys(arguments, call.line)
    yield from _judge_names(section, folders)
    if arguments.get("download") not in (None, False) and folders and folders.outside(arguments.get("root")):
        yield (
            call.line,
            f"{call} would download to {arguments.get('root')}, outside {folders}: set download: False, or "
            "name a folder above it by --cache-dir",
        )
    if call.value is timm.data.create_transform and arguments.get("tf_preprocessing"):
        yield call.line, f"{call} is refused by --safe-config with tf_preprocessing, which imports tensorflow: drop it"
    if call.value is timm.data.create_dataset:
        yield from _judge_reader(call, arguments)


def _arguments(call: Built) -> dict[Any, Any]:
    """The arguments of a call by name, also those given by position."""
    try:
        bound = inspect.signature(call.value).bind(*call.args, **call.kwargs).arguments
    except TypeError:  # so will the call itself be refused by Python
        bound = call.kwargs
    return {**bound, **(bound.get("kwargs") or {})}


def _judge_reader(call: Built, arguments: dict[str, Any]) -> Iterator[Problem]:
    """timm's readers of wds/, hfds/ and tfds/ run pipes and loading scripts, that of tar files writes beside them."""
    if arguments.get("name") not in READER_NAMES:
        names = ", ".join(map(repr, READER_NAMES))
        yield call.line, f"{call} is refused by --safe-config, which allows the names {names}"
    for name in arguments:
        if name not in (*READER_ARGUMENTS, "kwargs"):
            yield call.line, f"{call} is refused by --safe-config with {name}: it takes {', '.join(READER_ARGUMENTS)}"
    for name in ("root", "split"):
        path = arguments.get(name)
        if path is not None and (not isinstance(path, str) or NO_FOLDER.search(path)):
            yield (
                call.line,
                f"{call} is refused by --safe-config with {name} {path}, which may stand for a tar file: unpack it and "
                "name the folder",
            )


def _judge_names(section: Section, folders: Folders | None) -> Iterator[Problem]:
    """Keys whose values torchdistill or this package imports, downloads, unpickles or writes to, wherever they are."""
    for name, value in section.items():
        line = section.lines.get(name, 1)
        if value is None or not isinstance(name, str):
            continue
        if name == "repo_or_dir":
            yield line, "repo_or_dir is refused by --safe-config: torch.hub would run its code; remove it"
        elif name == "rule":
            rule = value.get("key", "independent") if isinstance(value, dict) else value
            if not isinstance(rule, str) or rule not in RULES:
                shown = rule if isinstance(rule, str) else "that a tag makes"
                yield line, f"rule {shown} is refused by --safe-config, which imports none: take {', '.join(RULES)}"
        elif name == "src_ckpt":
            if not isinstance(value, str) or "://" in value:
                yield line, f"src_ckpt {value} is refused by --safe-config: download it, and name the file"
        elif (name.endswith("_ckpt") or name == "cache_dir") and folders and folders.outside(value):
            yield (
                line,
                f"{name} {value} is outside {folders}: remove it, name a folder above it by "
                "--output or --cache-dir, or run without --safe-config",
            )


def _judge_sections(config: Section) -> Iterator[Problem]:
    """The sections whose strings reach importers."""
    lines = config.lines
    names = config.get("dependencies")
    names = [] if names is None else names if isinstance(names, list) else [names if isinstance(names, str) else None]
    for name in names:
        name = name.get("name") if isinstance(name, dict) and set(name) == {"name"} else name
        if not isinstance(name, str) or name not in PACKAGES:
            shown = f" {name}" if isinstance(name, str) else ""
            yield (
                lines["dependencies"],
                f"dependency{shown} is refused by --safe-config, which imports only {', '.join(PACKAGES)}",
            )
    if config.get("tracker") is not None:
        yield lines["tracker"], "tracker is refused by --safe-config: it sends data and writes files; remove it"
    for section in ("datasets", "test"):
        if section in config and not isinstance(config[section], dict):
            yield lines[section], f"{section} must be written out under --safe-config, not made by a tag"
    train = config.get("train")
    if isinstance(train, Built) and train.value is not progressive:
        yield lines["train"], "train must be a section or timm_mamba_pkd.progressive under --safe-config"
    models: Any = config.get("models")
    if "models" in config and not isinstance(models, Section):
        yield lines["models"], "models must be written out under --safe-config, not made by a tag"
    for name, model in models.items() if isinstance(models, Section) else ():
        if not str(name).startswith("_"):
            yield from _judge_model(f"models.{name}", model, models.lines.get(name, lines["models"]))


def _judge_model(where: str, model: Any, line: int) -> Iterator[Problem]:
    if model is None:
        return
    if not isinstance(model, Section):
        yield line, f"{where} must be written out under --safe-config, not made by a tag"
        return
    key, kwargs = model.get("key"), model.get("kwargs") or {}
    builders = torchvision.models.list_models(torchvision.models)
    if not isinstance(key, str) or (key in vars(torchvision.models) and key not in builders):
        shown = f" {key}" if isinstance(key, str) else ""
        yield model.lines.get("key", line), f"{where}.key{shown} is refused by --safe-config: it is no model's name"
    if model.get("quantized"):
        yield model.lines["quantized"], f"{where}.quantized is refused by --safe-config: remove it"
    if not isinstance(kwargs, Section):
        kwargs_line = model.lines.get("kwargs", line)
        if kwargs:
            yield kwargs_line, f"{where}.kwargs must be written out under --safe-config, not made by a tag"
        return
    for name, value in kwargs.items():
        at = kwargs.lines.get(name, line)
        if name not in MODEL_ARGUMENTS:
            yield at, f"{where}.kwargs.{name} is refused by --safe-config, which allows {', '.join(MODEL_ARGUMENTS)}"
        elif not all(_is_plain(part) for part in (value if isinstance(value, list) else [value])):
            yield (
                at,
                f"{where}.kwargs.{name} is refused by --safe-config: it must be a number, a text, or a list",
            )
        elif name in ("model_name", "students"):
            for student in value if isinstance(value, list) else [value]:
                if isinstance(student, str) and not (timm.is_model(student) and re.fullmatch(r"[\w.-]+", student)):
                    yield at, f"{where}.kwargs.{name} {student} is refused by --safe-config: it is no model of timm"
        elif name == "checkpoint_path" and value is not None and (not isinstance(value, str) or "://" in value):
            yield at, f"{where}.kwargs.{name} {value} is refused by --safe-config: name a file"


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, Built) and isinstance(value.value, enum.Enum))


def _is_gettable(value: Any) -> bool:
    if inspect.isclass(value) and issubclass(value, Sampler):
        return vars(torch.utils.data).get(value.__name__) is value
    return is_enumeration(value) or isinstance(value, torch.dtype)


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value is other for other in allowed)


def _printable(message: str) -> str:
    """A message of one line, whatever a config has written into it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message[:LONGEST])


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return f"{text} (line {mark.line + 1})" if mark is not None else text
