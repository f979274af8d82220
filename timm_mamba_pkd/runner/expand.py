"""``mamba-pkd expand``: a progressive schedule as the plain torchdistill YAML that it stands for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from timm_mamba_pkd.distillation import progressive
from timm_mamba_pkd.runner.errors import ConfigError, explain
from timm_mamba_pkd.runner.safe_config import require_safe
from timm_mamba_pkd.runner.schema import check_schema, schedule_arguments
from timm_mamba_pkd.runner.source import Source

PACKAGE = {"name": "timm_mamba_pkd"}


@dataclass(eq=False)
class Tagged:
    """What stands under a tag such as ``!import_call``: carried over, never executed."""

    tag: str
    content: Any


def expand(config_path: str | Path, safe: bool = False) -> str:
    """The YAML text of a config with ``train`` written out, stage by stage. Nothing is executed but a rule's import.

    Raises:
        ConfigError: the file is no config, its schedule has bad arguments, or its ``train`` is no progressive schedule;
            with ``safe``, also whatever `require_safe` refuses.
    """
    source = Source.read(config_path)
    if safe:
        require_safe(source, None)
    check_schema(source)
    arguments = schedule_arguments(source.root)
    if arguments is None:
        line = source.line(("train",))
        raise ConfigError(source.say("train is no timm_mamba_pkd.progressive schedule: nothing to expand", line))
    config = yaml.load(source.text, Loader=_Loader)
    with source.locating():
        config["train"] = _call(config["train"].content["init"]["kwargs"])
    names = config.pop("dependencies", None) or []
    names = names if isinstance(names, list) else [names]
    config = {"dependencies": names if PACKAGE in names else [PACKAGE, *names], **config}
    header = f"# {source.path}, expanded by mamba-pkd: what timm_mamba_pkd.progressive stands for.\n"
    return header + yaml.dump(config, Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None)


def _call(arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return progressive(**arguments)
    except Exception as error:
        raise ConfigError(explain(error), at=("train",)) from error


class _Loader(yaml.FullLoader):
    """Every tag gives a `Tagged`, also those that torchdistill registers with `yaml.FullLoader` itself."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.FullLoader.yaml_constructors.items()
        if not str(tag).startswith("!")
    }


class _Dumper(yaml.Dumper):
    """Writes a `Tagged` as it was."""


def _construct(loader: _Loader, suffix: str, node: yaml.Node) -> Tagged:
    if isinstance(node, yaml.MappingNode):
        content: Any = loader.construct_mapping(node, deep=True)
    elif isinstance(node, yaml.SequenceNode):
        content = loader.construct_sequence(node, deep=True)
    else:
        content = loader.construct_scalar(node)  # pyright: ignore[reportArgumentType]
    return Tagged(f"!{suffix}", content)


def _represent(dumper: _Dumper, data: Tagged) -> yaml.Node:
    if isinstance(data.content, dict):
        return dumper.represent_mapping(data.tag, data.content)
    if isinstance(data.content, list):
        return dumper.represent_sequence(data.tag, data.content)
    return dumper.represent_scalar(data.tag, data.content)


_Loader.add_multi_constructor("!", _construct)
_Dumper.add_representer(Tagged, _represent)
