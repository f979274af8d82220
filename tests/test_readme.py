"""What README.md shows works: its Python runs, its YAML loads, its commands and make targets exist."""

import re
import shlex
from pathlib import Path

from torchdistill.common.yaml_util import load_yaml_file

from timm_mamba_pkd.cli import build_parser
from timm_mamba_pkd.distillation.rules import contract

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (["mamba-pkd"], ["python", "-m", "timm_mamba_pkd"])


def blocks(language: str) -> list[tuple[int, str]]:
    """The fenced blocks of one language, each with the number of lines above its code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    fences = re.finditer(rf"^```{language}\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    return [(readme[: fence.start(1)].count("\n"), fence[1]) for fence in fences]


def command_lines() -> list[list[str]]:
    text = "\n".join(code for _, code in blocks("bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words]


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    found = blocks("python")
    assert found
    for lines_above, code in found:
        exec(compile("\n" * lines_above + code, str(ROOT / "README.md"), "exec"), namespace)


def test_the_rule_of_the_readme_is_a_rule(tmp_path, monkeypatch):
    (code,) = [code for _, code in blocks("python") if "MyRule" in code]
    (tmp_path / "readme_rule.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for check in contract.CHECKS:
        check("readme_rule.MyRule")


def test_yaml_blocks_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("yaml")
    assert found
    for lines_above, code in found:
        file = tmp_path / f"line_{lines_above}.yaml"
        file.write_text(code)
        assert isinstance(load_yaml_file(str(file)), dict)


def test_commands_parse():
    for words in command_lines():
        for command in COMMANDS:
            if words[: len(command)] == command:
                build_parser().parse_args(words[len(command) :])
        for word in words:
            if word.startswith("yaml_configs/"):
                assert (ROOT / word).is_file(), word


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for words in command_lines():
        if "make" in words:
            wanted = [word for word in words[words.index("make") + 1 :] if "=" not in word]
            assert set(wanted) <= set(targets), words
