"""The text of a config: its tree of YAML nodes, where everything stands, and what is wrong before it is even loaded."""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torchdistill.common import yaml_util

from timm_mamba_pkd.runner.errors import ConfigError, Keys, explain, first_line

SECTIONS = "datasets, models, train and test"
LONGEST_TEXT = 10_000_000  # characters of a config whose aliases are written out, as error messages may do
NUMBER_READ_AS_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)e[-+]?\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A config file as a tree of YAML nodes; nothing in it has been executed."""

    path: Path
    text: str
    root: yaml.MappingNode

    @classmethod
    def read(cls, path: str | Path) -> "Source":
        """Parse a config file.

        Raises:
            ConfigError: the file is missing, unreadable, no YAML or no mapping, its aliases multiply without measure,
                a key stands twice in a mapping, or a number is written so that YAML takes it for text.
        """
        path = Path(path).expanduser()
        try:
            text = path.read_bytes().decode()
            root: Any = yaml.compose(text, Loader=yaml.FullLoader)
        except OSError as error:
            raise ConfigError(f"config {path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"config {path} is not text in UTF-8") from error
        except yaml.YAMLError as error:
            raise ConfigError(_not_yaml(path, error)) from error
        except RecursionError as error:
            raise ConfigError(f"config {path} is nested too deeply to be a config") from error
        if not isinstance(root, yaml.MappingNode):
            found = "an empty file" if root is None else f"{article(root)}"
            raise ConfigError(f"config {path}, line 1: must be a mapping with {SECTIONS}, not {found}")
        if _length(root, {}) > LONGEST_TEXT:
            raise ConfigError(f"config {path} has more than {LONGEST_TEXT:,} characters with its aliases written out")
        source = cls(path, text, root)
        source.refuse([*_duplicate_keys(root), *_numbers_read_as_text(root, text)])
        return source

    def tree(self) -> yaml.MappingNode:
        """A copy of ``root`` to construct from, which changes a tree."""
        return copy.deepcopy(self.root)

    def refuse(self, problems: list[tuple[int, str]]) -> None:
        """Raise a ConfigError with every one of ``problems``, (line, message), if there are any."""
        if problems:
            raise ConfigError("\n".join(self.say(message, line) for line, message in sorted(set(problems))))

    def say(self, message: str, line: int | None) -> str:
        """``message``, led by the file and the line."""
        return f"config {self.path}{'' if line is None else f', line {line}'}: {message}"

    def load(self, leave_out: tuple[str, ...] = (), at: Keys = ()) -> Any:
        """Build what the config describes, as torchdistill does: its tags import and call what they name.

        Args:
            leave_out: sections that are not built.
            at: the keys of a part that is built alone; None comes of one that is not there.

        Raises:
            ConfigError: something that it calls fails; the line is that of the call.
        """
        yaml_util.load_yaml_file(os.devnull)  # registers torchdistill's tags
        try:
            with self.locating():
                node: Any = self.tree()
                node.value = [pair for pair in node.value if pair[0].value not in leave_out]
                for key in at:
                    node = child(node, key)
                return None if node is None else _LocatingLoader("").construct_document(node)
        except yaml.YAMLError as error:
            raise ConfigError(_not_yaml(self.path, error)) from error

    @contextmanager
    def locating(self) -> Iterator[None]:
        """ConfigErrors raised in this context name the file, and the line that they concern."""
        try:
            yield
        except ConfigError as error:
            if str(error).startswith(f"config {self.path}"):
                raise
            line = error.line or (self.line(error.at, str(error)) if error.at else None)
            raise ConfigError(self.say(str(error), line)) from error

    def line(self, keys: Keys, message: str = "") -> int | None:
        """The line of the last of ``keys`` that is there, or of something below it that ``message`` names.

        ``("train", "stage2", "optimizer")`` is also found where ``train`` has no stages, or is a call that makes them:
        then it is the call's argument.
        """
        node, line = self.root, None
        for key in keys:
            if node.tag == "!import_call":
                node = child(child(node, "init"), "kwargs") or node
            found = next((pair for pair in pairs(node) if pair[0].value == key), None)
            if found is not None:
                line, node = found[0].start_mark.line + 1, found[1]
            elif not re.fullmatch(r"stage\d+", key):
                break
        return line if line is None else line_named(node, message) or line


def pairs(node: yaml.Node | None, within: tuple[yaml.Node, ...] = ()) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Keys and values of a mapping, with those merged into it by ``<<``; of anything else none."""
    if not isinstance(node, yaml.MappingNode) or node in within:
        return []
    own = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    names = {key.value for key, _ in own}
    merged = []
    for key, value in own:
        if key.tag == "tag:yaml.org,2002:merge":
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                merged += [pair for pair in pairs(part, (*within, node)) if pair[0].value not in names]
                names |= {name.value for name, _ in merged}
    return [pair for pair in own if pair[0].tag != "tag:yaml.org,2002:merge"] + merged


def child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """The value of a mapping's key, if there is one."""
    return next((value for name, value in pairs(node) if name.value == key), None)


def walk(node: yaml.Node) -> Iterator[yaml.Node]:
    """A node and all nodes below it, each once."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        below = [] if isinstance(node, yaml.ScalarNode) else node.value
        waiting += reversed([part for item in below for part in (item if isinstance(item, tuple) else (item,))])


def _length(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters of a node and all below it, as often as aliases name them; ``known`` is by the nodes' ids."""
    if isinstance(node, yaml.ScalarNode):
        return len(node.value) + 1
    if id(node) not in known:
        known[id(node)] = 1  # an alias inside of what it names
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_length(part, known) for part in parts)
    return known[id(node)]


def line_named(node: yaml.Node, message: str) -> int | None:
    """The line of the first key or value below ``node`` that a message names, what it quotes first."""
    lines: dict[str, int] = {}
    for below in walk(node):
        if isinstance(below, yaml.ScalarNode) and re.search("[a-zA-Z]", below.value):
            lines.setdefault(below.value, below.start_mark.line + 1)
    words = [*re.findall(r"'([^']+)'", message), *message.split(), *re.findall(r"\w+", message)]
    return next((lines[word] for word in words if word in lines), None)


def article(node: yaml.Node) -> str:
    """What a node is, in words."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":null"):
            return "nothing"
        return repr(node.value) if node.tag.endswith(":str") else node.value
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


class _LocatingLoader(yaml.FullLoader):
    """torchdistill's loader; an error of a tag is a ConfigError with the line of what it was about."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # pyright: ignore[reportArgumentType]
        except (yaml.YAMLError, ConfigError):
            raise
        except (Exception, SystemExit) as error:
            if not node.tag.startswith("!"):
                raise
            message = explain(error)
            arguments = child(child(node, "init"), "kwargs") or node
            raise ConfigError(message, line=line_named(arguments, message) or node.start_mark.line + 1) from error


def _not_yaml(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"config {path} is not valid YAML: {first_line(error)}"
    problem, context = getattr(error, "problem", None), getattr(error, "context", None)
    if "'\\t'" in str(problem):
        return f"config {path}, line {mark.line + 1}: not valid YAML: a tab where YAML wants spaces"
    return f"config {path}, line {mark.line + 1}: not valid YAML: {problem}" + (f" ({context})" if context else "")


def _duplicate_keys(root: yaml.Node) -> Iterator[tuple[int, str]]:
    for node in walk(root):
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in first:
                yield line, f"duplicate key '{key.value}': it is already on line {first[name]}"
            first[name] = line


def _numbers_read_as_text(root: yaml.Node, text: str) -> Iterator[tuple[int, str]]:
    """``lr: 1e-4`` is text in YAML 1.1, which wants a dot and a sign."""
    for node in walk(root):
        if not isinstance(node, yaml.ScalarNode) or node.style is not None or not node.tag.endswith(":str"):
            continue
        written = text[node.start_mark.index : node.end_mark.index]
        if NUMBER_READ_AS_TEXT.fullmatch(node.value) and "!" not in written:
            yield (
                node.start_mark.line + 1,
                f"YAML takes {node.value} for text; write the number with a dot and a signed exponent, as in 1.0e-4",
            )
