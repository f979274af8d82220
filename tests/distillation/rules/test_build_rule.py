"""Rules by name and by import path."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from timm_mamba_pkd.distillation.rules import RULES, BDistil, Residual, Rule, build_rule, contract

THIRD_PARTY = """
from torch.nn import functional as F
from timm_mamba_pkd.distillation import Batch, Rule

class Mse(Rule):
    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = weight

    def loss(self, batch):
        return self.weight * F.mse_loss(batch.student, batch.teacher)

class NoRule:
    pass

def function():
    return Mse()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Make an importable module of a source text."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> None:
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "form", [lambda name: name, lambda name: {"key": name}, lambda name: {"key": name, "kwargs": None}]
)
def test_ours_by_name(name, form):
    assert type(build_rule(form(name))) is RULES[name]


def test_parameters_reach_the_rule():
    rule = build_rule({"key": "bdistil", "kwargs": {"slack": 0.3, "max_retries": 4}})
    assert isinstance(rule, BDistil) and (rule.slack, rule.max_retries, rule.step_size) == (0.3, 4, 0.05)


def test_ours_by_import_path():
    assert isinstance(build_rule("timm_mamba_pkd.distillation.rules.residual.Residual"), Residual)


@pytest.mark.parametrize("module", ["their_rules", "their_package.deep.rules"])
def test_theirs_by_import_path(install, module):
    install(module, THIRD_PARTY)
    rule = build_rule({"key": f"{module}.Mse", "kwargs": {"weight": 0.5}})
    assert isinstance(rule, Rule) and rule.weight == 0.5
    for check in contract.CHECKS:
        check(f"{module}.Mse")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "residul",
            "unknown rule 'residul'; known: assistant, bdistil, independent, residual, or the import path of a",
        ),
        (
            "their_rules.Msee",
            "rule their_rules.Msee cannot be imported: AttributeError: module 'their_rules' has no attribute 'Msee'",
        ),
        (
            "no_such_package.Mse",
            "rule no_such_package.Mse cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("their_rules.NoRule", "rule their_rules.NoRule is no subclass of timm_mamba_pkd.distillation.Rule"),
        ("their_rules.function", "rule their_rules.function is no subclass of timm_mamba_pkd.distillation.Rule"),
        ("their_rules.F", "rule their_rules.F is no subclass of timm_mamba_pkd.distillation.Rule"),
        ({"key": "their_rules.Mse", "kwargs": {"wait": 1}}, "rule their_rules.Mse: .*'wait'"),
        ({"key": "residual", "kwargs": {"stepp": 0}}, "rule residual: .*'stepp'"),
        ({"key": "independent", "kwargs": {"step": 0}}, "rule independent: "),
        ({"key": "residual", "kwargs": {"step": 2}}, "residual: step must be from 0 to 1, got 2"),
        ({"key": "residual", "kwarg": {"step": 0}}, "rule must be a name or"),
        ({"kwargs": {}}, "rule must be a name or"),
        (["residual"], "rule must be a name or"),
        (None, "rule must be a name or"),
    ],
    ids=str,
)
def test_errors(install, config, message):
    install("their_rules", THIRD_PARTY)
    with pytest.raises(ValueError, match=message) as error:
        build_rule(config)
    assert "\n" not in str(error.value)
