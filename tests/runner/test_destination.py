"""``dst_ckpt``: a run replaces what it wrote there itself, and nothing else."""

import signal
from pathlib import Path
from typing import Any

import pytest

from timm_mamba_pkd.runner import commands
from timm_mamba_pkd.runner import train as training


@pytest.fixture(params=["model.pt", "model.safetensors"])
def saving(request, plain, tmp_path) -> tuple[Any, Path]:
    """A config, and its dst_ckpt."""
    path = tmp_path / "ckpt" / request.param
    plain["models"]["model"]["dst_ckpt"] = str(path)
    return plain, path


def on_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, do: Any) -> None:
    """Have something done before a function."""
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        do()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


def test_a_file_that_appears_while_the_run_trains(saving, run, errors, monkeypatch):
    config, path = saving
    with monkeypatch.context() as patch:
        on_call(patch, training.Trainer, "_step", lambda: path.write_text("another's"))
        code, folder = run(config)
    assert code == 2
    assert errors() == [
        f"dst_ckpt {path} was written by another while this run trained, and is left as it is: move it away, and the "
        f"same command saves there what is in {folder}/weights"
    ]
    assert path.read_text() == "another's" and (folder / "weights" / "model.safetensors").exists()
    assert run(config)[0] == 2
    assert errors() == [f"dst_ckpt {path} is there and not of the run in {folder}: move it away"]
    path.unlink()
    assert run(config)[0] == 0 and path.stat().st_size > 10_000


def test_a_run_knows_its_own_file(saving, run, monkeypatch):
    """It stopped after it had written the file; what then stands there by the same name is another's."""
    config, path = saving
    with monkeypatch.context() as patch:
        on_call(patch, commands, "measure", lambda: signal.raise_signal(signal.SIGTERM))
        assert run(config)[0] == 143
    content = path.read_bytes()
    path.write_text("another's")
    assert run(config)[0] == 2 and path.read_text() == "another's"
    path.write_bytes(content)
    assert run(config)[0] == 0 and path.read_bytes() == content


def test_fresh_leaves_the_file_of_another_run(saving, run, errors):
    config, path = saving
    _, folder = run(config)
    content = path.read_bytes()
    code, other = run(config, "--fresh", output="other")
    assert code == 2 and not other.exists()
    assert errors() == [f"dst_ckpt {path} exists already: move it away, or test it with mamba-pkd evaluate"]
    assert path.read_bytes() == content
    assert run(config, "--fresh")[0] == 0
    assert (folder / "old-1" / path.name).read_bytes() == content


def test_the_folder_of_the_runs_weights(plain, run, errors, tmp_path):
    path = tmp_path / "run" / "weights" / "model.safetensors"
    plain["models"]["model"]["dst_ckpt"] = str(path)
    assert run(plain)[0] == 2
    assert errors() == [f"dst_ckpt {path} is among the weights that the run writes anyway: name another file"]


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("place", ["models.teacher_model", "train.stage1.teacher"])
def test_weights_that_the_run_reads(command, place, progressive, build, run, errors, tmp_path):
    path = tmp_path / "teacher.safetensors"
    build.weights(path, "test_resnet")
    content = path.read_bytes()
    kwargs = progressive["train"]["init"]["kwargs"]
    section = progressive["models"]["teacher_model"] if "models" in place else kwargs.setdefault("teacher", {})
    section["src_ckpt"] = str(path)
    progressive["models"]["student_model"]["dst_ckpt"] = f"{tmp_path}/./teacher.safetensors"
    code, folder = run(progressive, *(["--fresh"] if command == "train" else []), command=command)
    assert code == 2 and not folder.exists()
    (error,) = errors()
    assert error.endswith(f"dst_ckpt {path} is also {place}.src_ckpt, which it would overwrite: name another file")
    assert error.startswith("line ") and path.read_bytes() == content
