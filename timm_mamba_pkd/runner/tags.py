"""A config as its tags describe it, with nothing of it imported or called."""

import enum
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from torchdistill.common import yaml_util
from torchdistill.datasets.util import split_dataset

from timm_mamba_pkd.runner.schema import Problem

PACKAGES = ("torch", "torchvision", "timm", "torchdistill", "timm_mamba_pkd")
PLAIN = (str, int, float, bool, type(None))
PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
)


class Section(dict[Any, Any]):
    """A mapping; ``lines`` says where its keys stand."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lines: dict[Any, int] = {}


@dataclass(eq=False)
class Built:
    """What a tag stands for that gets or calls something; it is never executed here.

    ``value`` is the object that its key resolves to, or None where it resolves to none.
    """

    tag: str
    line: int
    name: str = ""
    value: Any = None
    args: list[Any] = field(default_factory=list)
    kwargs: dict[Any, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.tag} {self.name}".strip()


class TagReader(yaml.SafeLoader):
    """Builds what torchdistill's loader would, but a `Built` for everything that it would get or call.

    Both are PyYAML's constructor on the same tree, so aliases, merges and joined texts come out alike.

    Attributes:
        problems: tags and keys that are refused.
        calls, sections: every call and every mapping of the text, also those that an alias or a merge hides.
    """

    def __init__(self) -> None:
        super().__init__("")
        self.problems: list[Problem] = []
        self.calls: list[Built] = []
        self.sections: list[Section] = []

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in PLAIN_TAGS and node.tag not in TAGS:
            allowed = ", ".join(TAGS)
            self.problems.append((line_of(node), f"{_tag(node)} is refused by --safe-config, which allows {allowed}"))
            return None
        return super().construct_object(node, deep)  # pyright: ignore[reportArgumentType]

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        section = Section(super().construct_mapping(node, deep))
        for key, _ in node.value:
            name = self.construct_object(key)
            if not isinstance(name, PLAIN):
                self.problems.append((line_of(key), "a key is refused by --safe-config: keys must be plain text"))
            section.lines[name] = line_of(key)
        self.sections.append(section)
        return section

    construct_python_str = yaml.SafeLoader.construct_scalar  # as torchdistill's tags call it

    def text(self, node: Any, parts: Sequence[Any]) -> list[str]:
        """Parts of a text, as torchdistill joins them."""
        if not all(isinstance(part, PLAIN) for part in parts):
            self.problems.append((line_of(node), f"{node.tag} is refused by --safe-config: it joins plain texts only"))
            return []
        return [str(part) for part in parts]


def _read_mapping(reader: TagReader, node: Any) -> Iterator[Any]:
    section = Section()
    yield section
    found = reader.construct_mapping(node)
    section.update(found)
    section.lines = found.lines


def _read_text(reader: TagReader, node: Any) -> str:
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


def _read_import(reader: TagReader, node: Any) -> Built:
    entry = reader.construct_mapping(node, deep=True)
    built = Built(node.tag, line_of(node))
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
    else:
        built.args, built.kwargs = args, kwargs
    return built


def _read_getattr(reader: TagReader, node: Any) -> Any:
    parts = reader.construct_sequence(node, deep=True)
    if len(parts) == 2 and isinstance(parts[1], str) and isinstance(parts[0], Built):
        owner, name = parts
        if owner.tag == "!import_get" and is_enumeration(owner.value) and name in owner.value.__members__:
            return Built(node.tag, line_of(node), name, owner.value[name])
    message = (
        "is refused by --safe-config, which allows members of torchvision's enumerations: [!import_get {...}, NAME]"
    )
    reader.problems.append((line_of(node), f"!getattr {message}"))
    return None


def _read_item(reader: TagReader, node: Any) -> Any:
    entry = reader.construct_mapping(node, deep=True)
    data: Any = entry.get("data")
    index: Any = entry.get("index_or_key")
    if isinstance(data, Built) and data.value is split_dataset and isinstance(index, int):
        return Built(node.tag, line_of(node), data.name)
    if isinstance(data, (list, dict)) and isinstance(index, PLAIN):
        return data[index]  # pyright: ignore[reportArgumentType, reportCallIssue]
    message = "is refused by --safe-config, which allows items of split_dataset, of lists and of mappings"
    reader.problems.append((line_of(node), f"!access_by_index_or_key {message}"))
    return None


TAGS: dict[str, Callable[[TagReader, Any], Any]] = {
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
    TagReader.add_constructor(_name, _constructor)
TagReader.add_constructor("tag:yaml.org,2002:map", _read_mapping)


def _resolve(key: str, package: str | None = None) -> Any:
    """What torchdistill's import_get gives, found in the loaded modules of `PACKAGES` alone; None if it is not there.

    ``vars`` runs no code of a module, and nothing is imported.
    """
    if package is None:
        package, _, key = key.rpartition(".")
    module = sys.modules.get(package) if package.partition(".")[0] in PACKAGES else None
    return None if module is None else vars(module).get(key)


def is_enumeration(value: Any) -> bool:
    """Whether an object is an enumeration of torchvision."""
    if not inspect.isclass(value) or not issubclass(value, enum.Enum):
        return False
    return value.__module__.startswith("torchvision.") and len(value) > 0


def line_of(node: yaml.Node) -> int:
    """The line, from 1."""
    return node.start_mark.line + 1


def _tag(node: yaml.Node) -> str:
    return f"tag {node.tag.replace('tag:yaml.org,2002:', '!!')}"
