"""The benchmarks find what they import: nothing else runs them."""

import runpy
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parents[1] / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    assert runpy.run_path(str(file))["__doc__"]
