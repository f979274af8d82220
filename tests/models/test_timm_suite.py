"""timm's own tests, from the source distribution of the installed version; timm_suite.py says which, and why."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
FILES = [f"tests/test_{name}.py" for name in ("models", "model_input", "prune", "utils", "optim")]


@pytest.fixture
def suite(pytestconfig, tmp_path) -> Path:
    """A folder with timm's ``tests`` and ``pyproject.toml``, downloaded once and kept in pytest's cache."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("timm") / timm.__version__
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", "-d", str(tmp_path)]
        result = subprocess.run([*command, f"timm=={timm.__version__}"], capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(f"pip cannot get timm's source distribution: {result.stderr.strip().splitlines()[-1]}")
        (archive,) = tmp_path.glob("timm-*.tar.gz")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar if m.name.split("/")[1] in ("tests", "pyproject.toml")]  # and not timm itself
            tar.extractall(tmp_path, wanted, filter="data")
        (tmp_path / archive.name.removesuffix(".tar.gz")).rename(folder)
    return folder


def test_timms_tests_pass_on_our_models(suite, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "timm_suite",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--tb=short",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER)]), "OMP_NUM_THREADS": "1"}
    environment.pop("GITHUB_ACTIONS", None)  # timm then leaves tests out
    result = subprocess.run(
        [*command, "--rootdir", str(suite), "--junitxml", str(tmp_path / "results.xml"), *FILES],
        cwd=suite,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    (counts,) = ElementTree.parse(tmp_path / "results.xml").iter("testsuite")
    assert int(counts.attrib["tests"]) > 250
    assert counts.attrib["skipped"] == "0"
