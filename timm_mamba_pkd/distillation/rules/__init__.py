"""Progressive rules, by the name that YAML uses."""

import importlib
from typing import Any

from timm_mamba_pkd.distillation.bridges import unknown_name
from timm_mamba_pkd.distillation.rules.assistant import Assistant
from timm_mamba_pkd.distillation.rules.bdistil import BDistil
from timm_mamba_pkd.distillation.rules.independent import Independent
from timm_mamba_pkd.distillation.rules.residual import Residual
from timm_mamba_pkd.distillation.rules.rule import Batch, Rule, RuleLoss, Verdict

RULES: dict[str, type[Rule]] = {
    "independent": Independent,
    "residual": Residual,
    "bdistil": BDistil,
    "assistant": Assistant,
}

__all__ = [
    "RULES",
    "Assistant",
    "BDistil",
    "Batch",
    "Independent",
    "Residual",
    "Rule",
    "RuleLoss",
    "Verdict",
    "build_rule",
]


def build_rule(config: str | dict[str, Any]) -> Rule:
    """The rule that YAML names: one of ours, or the import path of a class; alone or as ``{key: ..., kwargs: {...}}``.

    Raises:
        ValueError: no such rule, or parameters that it does not have or that are out of range.
    """
    config = {"key": config} if isinstance(config, str) else config
    if not isinstance(config, dict) or not {"key"} <= set(config) <= {"key", "kwargs"}:
        raise ValueError(f"progressive: rule must be a name or {{key: name, kwargs: {{...}}}}, got {config!r}")
    name, kwargs = str(config["key"]), config.get("kwargs") or {}
    cls = RULES[name] if name in RULES else _import_rule(name)
    try:
        rule = cls(**kwargs)
    except TypeError as error:
        raise ValueError(f"rule {name}: {error}") from error
    if "_buffers" not in vars(rule):
        raise ValueError(f"rule {name}: its __init__ must call super().__init__()")
    return rule


def _import_rule(name: str) -> type[Rule]:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            f"{unknown_name('rule', name, RULES)}, or the import path of a class: my_package.my_rule.MyRule"
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise ValueError(f"rule {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Rule)):
        raise ValueError(f"rule {name} is no subclass of timm_mamba_pkd.distillation.Rule")
    return cls
