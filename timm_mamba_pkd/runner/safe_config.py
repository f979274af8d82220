"""``--safe-config``: a config is judged before anything that it names is imported, called or written."""

import enum
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torchvision
import yaml
from torch.utils.data import Sampler
from torchdistill.common import yaml_util
from torchdistill.datasets.sample_loader import JpegCompressionLoader
from torchdistill.datasets.util import split_dataset
from torchvision import transforms
from torchvision.transforms import v2

from timm_mamba_pkd.datasets import Digits
from timm_mamba_pkd.distillation import RULES, progressive
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.schema import Problem
from timm_mamba_pkd.runner.source import Source

PACKAGES = ("torch", "torchvision", "timm", "torchdistill", "timm_mamba_pkd")
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
MODEL_ARGUMENTS = (
    "model_name", "students", "combination", "small_stem", "channels", "reductions",  # of ours
    "num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate", "pretrained",
    "checkpoint_path",  # of timm's, which read a checkpoint as tensors only
    "weights", "progress", "depth", "k", "dropout_p", "memory_efficient",  # of torchvision's and torchdistill's
)  # fmt: skip
PLAIN = (str, int, float, bool, type(None))
PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
)


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
    reader = _Reader()
    try:
        config = reader.construct_document(source.tree())
    except Exception as error:  # whatever PyYAML raises on a value that does not fit its tag
        source.refuse(reader.problems)
        raise ConfigError(f"config {source.path} is refused by --safe-config: {_one_line(error)}") from error
    if not isinstance(config, dict):
        source.refuse([*reader.problems, (1, "the config must be written out under --safe-config, not made by a tag")])
    problems = list(reader.problems)
    for call in reader.calls:
        problems += _judge_call(call, folders)
    for section in reader.sections:
        problems += _judge_names(section, folders)
    problems += _judge_sections(config)
    source.refuse(problems)


class _Section(dict[Any, Any]):
    """A mapping; ``lines`` says where its keys stand."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lines: dict[Any, int] = {}


@dataclass(eq=False)
class _Built:
    """What a tag stands for that gets or calls something; it is never executed here.

    ``value`` is the object that its key resolves to, or None where it resolves to none.
    """

    tag: str
    line: int
    name: str = ""
    value: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.tag} {self.name}".strip()


class _Reader(yaml.SafeLoader):
    """Builds what torchdistill's loader would, but a `_Built` for everything that it would get or call.

    Attributes:
        problems: tags and keys that are refused.
        calls, sections: every call and every mapping of the text, also those that an alias or a merge hides.
    """

    def __init__(self) -> None:
        super().__init__("")
        self.problems: list[Problem] = []
        self.calls: list[_Built] = []
        self.sections: list[_Section] = []

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in PLAIN_TAGS and node.tag not in TAGS:
            allowed = ", ".join(TAGS)
            self.problems.append((_line(node), f"{_tag(node)} is refused by --safe-config, which allows {allowed}"))
            return None
        return super().construct_object(node, deep)  # pyright: ignore[reportArgumentType]

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        section = _Section(super().construct_mapping(node, deep))
        for key, _ in node.value:
            name = self.construct_object(key)
            if not isinstance(name, PLAIN):
                self.problems.append((_line(key), "a key is refused by --safe-config: keys must be plain text"))
            section.lines[name] = _line(key)
        self.sections.append(section)
        return section

    def text(self, node: Any, parts: Sequence[Any]) -> list[str]:
        """Parts of a text, as torchdistill joins them."""
        if not all(isinstance(part, PLAIN) for part in parts):
            self.problems.append((_line(node), f"{node.tag} is refused by --safe-config: it joins plain texts only"))
            return []
        return [str(part) for part in parts]


def _read_mapping(reader: _Reader, node: Any) -> Iterator[Any]:
    section = _Section()
    yield section
    found = reader.construct_mapping(node)
    section.update(found)
    section.lines = found.lines


def _read_text(reader: _Reader, node: Any) -> str:
    """What torchdistill makes of a tag that is about text alone."""
    if isinstance(node, yaml.SequenceNode) and not reader.text(node, reader.construct_sequence(node, deep=True)):
        return ""
    functions = {
        "!join": yaml_util.yaml_join,
        "!pathjoin": yaml_util.yaml_pathjoin,
        "!expanduser": yaml_util.yaml_expanduser,
        "!abspath": yaml_util.yaml_abspath,
    }
    return functions[node.tag](reader, node)


def _read_import(reader: _Reader, node: Any) -> _Built:
    entry = reader.construct_mapping(node, deep=True)
    built = _Built(node.tag, _line(node))
    reader.calls.append(built)
    names = ("key", "package", "init") if node.tag == "!import_call" else ("key", "package")
    key, package, init = (entry.get(name) for name in ("key", "package", "init"))
    init = {} if init is None else init
    plain = isinstance(key, str) and isinstance(package, (str, type(None)))
    if not plain or any(name not in names and not str(name).startswith("_") for name in entry):
        reader.problems.append((built.line, f"{node.tag} is refused by --safe-config: it takes {', '.join(names)}"))
        return built
    built.name = key if package is None else f"{package}.{key}"
    built.value = _resolve(built.name) if package is None else _resolve(key, package)
    args, kwargs = (init.get("args", []), init.get("kwargs", {})) if isinstance(init, dict) else (None, None)
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        message = f"{built} is refused by --safe-config: init must be args, a list, and kwargs, a mapping"
        reader.problems.append((built.line, message))
    elif built.tag == "!import_call" and _is_one_of(built.value, CALLED):
        try:
            bound = inspect.signature(built.value).bind(*args, **kwargs).arguments
        except TypeError:  # the call itself will raise it, and say what is wrong
            bound = kwargs
        built.arguments = {**bound, **(bound.get("kwargs") or {})}
    return built


def _read_getattr(reader: _Reader, node: Any) -> Any:
    parts = reader.construct_sequence(node, deep=True)
    if len(parts) == 2 and isinstance(parts[1], str) and isinstance(parts[0], _Built):
        owner, name = parts
        if owner.tag == "!import_get" and _is_enumeration(owner.value) and name in owner.value.__members__:
            return _Built(node.tag, _line(node), name, owner.value[name])
    message = "is refused by --safe-config, which allows members of torchvision's enumerations: [!import_get {...}, NAME]"
    reader.problems.append((_line(node), f"!getattr {message}"))
    return None


def _read_item(reader: _Reader, node: Any) -> Any:
    entry = reader.construct_mapping(node, deep=True)
    data, index = entry.get("data"), entry.get("index_or_key")
    if isinstance(data, _Built) and data.value is split_dataset and isinstance(index, int):
        return _Built(node.tag, _line(node), data.name)
    if isinstance(data, (list, dict)) and isinstance(index, PLAIN):
        return data[index]
    message = "is refused by --safe-config, which allows items of split_dataset, of lists and of mappings"
    reader.problems.append((_line(node), f"!access_by_index_or_key {message}"))
    return None


TAGS: dict[str, Callable[[_Reader, Any], Any]] = {
    "!import_call": _read_import,
    "!import_get": _read_import,
    "!getattr": _read_getattr,
    "!access_by_index_or_key": _read_item,
    "!join": _read_text,
    "!pathjoin": _read_text,
    "!expanduser": _read_text,
    "!abspath": _read_text,
}
for _name, _constructor in TAGS.items():
    _Reader.add_constructor(_name, _constructor)
_Reader.add_constructor("tag:yaml.org,2002:map", _read_mapping)


def _resolve(key: str, package: str | None = None) -> Any:
    """What torchdistill's import_get gives, found in the loaded modules of `PACKAGES` alone; None if it is not there.

    ``vars`` runs no code of a module, and nothing is imported.
    """
    if package is None:
        package, _, key = key.rpartition(".")
    module = sys.modules.get(package) if package.partition(".")[0] in PACKAGES else None
    return None if module is None else vars(module).get(key)


def _judge_call(call: _Built, folders: Folders | None) -> Iterator[Problem]:
    if call.tag == "!import_get":
        if not _is_gettable(call.value):
            yield (
                call.line,
                f"{call} is refused by --safe-config, which gets only samplers of torch.utils.data, enumerations of "
                "torchvision and torch's dtypes: leave it out, or trust the config as a script",
            )
        return
    if not _is_one_of(call.value, CALLED):
        yield (
            call.line,
            f"{call} is refused by --safe-config, which calls only {CALLED_IN_WORDS}: leave it out, or trust the "
            "config as a script",
        )
        return
    arguments = call.arguments
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


def _judge_reader(call: _Built, arguments: dict[str, Any]) -> Iterator[Problem]:
    """timm's readers of wds/, hfds/ and tfds/ run pipes and loading scripts, that of tar files writes beside them."""
    if arguments.get("name") not in READER_NAMES:
        names = ", ".join(map(repr, READER_NAMES))
        yield call.line, f"{call} is refused by --safe-config, which allows the names {names}"
    for name in arguments:
        if name not in (*READER_ARGUMENTS, "kwargs"):
            yield call.line, f"{call} is refused by --safe-config with {name}: it takes {', '.join(READER_ARGUMENTS)}"
    for name in ("root", "split"):
        if str(arguments.get(name)).endswith(".tar"):
            yield call.line, f"{call} is refused by --safe-config with a tar file: unpack it and name the folder"


def _judge_names(section: _Section, folders: Folders | None) -> Iterator[Problem]:
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


def _judge_sections(config: dict[str, Any]) -> Iterator[Problem]:
    """The sections whose strings reach importers."""
    lines = getattr(config, "lines", {})
    names = config.get("dependencies") or []
    for name in names if isinstance(names, list) else [names]:
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
    if isinstance(train, _Built) and train.value is not progressive:
        yield lines["train"], "train must be a section or timm_mamba_pkd.progressive under --safe-config"
    models = config.get("models")
    if "models" in config and not isinstance(models, dict):
        yield lines["models"], "models must be written out under --safe-config, not made by a tag"
    for name, model in models.items() if isinstance(models, dict) else ():
        if not str(name).startswith("_"):
            yield from _judge_model(f"models.{name}", model, models.lines.get(name, lines["models"]))


def _judge_model(where: str, model: Any, line: int) -> Iterator[Problem]:
    if model is None:
        return
    if not isinstance(model, _Section):
        yield line, f"{where} must be written out under --safe-config, not made by a tag"
        return
    key, kwargs = model.get("key"), model.get("kwargs") or {}
    builders = torchvision.models.list_models(torchvision.models)
    if not isinstance(key, str) or (key in vars(torchvision.models) and key not in builders):
        shown = f" {key}" if isinstance(key, str) else ""
        yield model.lines.get("key", line), f"{where}.key{shown} is refused by --safe-config: it is no model's name"
    if model.get("quantized"):
        yield model.lines["quantized"], f"{where}.quantized is refused by --safe-config: remove it"
    if not isinstance(kwargs, _Section):
        kwargs_line = model.lines.get("kwargs", line)
        if kwargs:
            yield kwargs_line, f"{where}.kwargs must be written out under --safe-config, not made by a tag"
        return
    for name, value in kwargs.items():
        at = kwargs.lines.get(name, line)
        if name not in MODEL_ARGUMENTS:
            yield at, f"{where}.kwargs.{name} is refused by --safe-config, which allows {', '.join(MODEL_ARGUMENTS)}"
        elif not all(_is_plain(part) for part in (value if isinstance(value, list) else [value])):
            yield at, f"{where}.kwargs.{name} is refused by --safe-config: it must be a number, a text or a list of them"
        elif name in ("model_name", "students"):
            for student in value if isinstance(value, list) else [value]:
                if isinstance(student, str) and not timm.is_model(student):
                    yield at, f"{where}.kwargs.{name} {student} is refused by --safe-config: it is no model of timm"
        elif name == "checkpoint_path" and value is not None and (not isinstance(value, str) or "://" in value):
            yield at, f"{where}.kwargs.{name} {value} is refused by --safe-config: name a file"


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, _Built) and isinstance(value.value, enum.Enum))


def _is_gettable(value: Any) -> bool:
    sampler = inspect.isclass(value) and issubclass(value, Sampler) and vars(torch.utils.data).get(value.__name__)
    return sampler is value or _is_enumeration(value) or isinstance(value, torch.dtype)


def _is_enumeration(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, enum.Enum) and value.__module__.startswith("torchvision.")


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value is other for other in allowed)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _tag(node: yaml.Node) -> str:
    return f"tag {node.tag.replace('tag:yaml.org,2002:', '!!')}"


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return f"{text} (line {mark.line + 1})" if mark is not None else text
