"""Bad folders, devices and flags: one line on stderr, exit code 2, and nothing is overwritten."""

from pathlib import Path

import pytest
import torch


def error_of(capsys) -> str:
    """The one line that the command left on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mamba-pkd: error: ")
    return line.removeprefix("mamba-pkd: error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(plain, run, capsys):
    assert run(plain, "--device", "cuda")[0] == 2
    assert error_of(capsys).startswith("device cuda cannot be used: ")


def test_bad_devices(plain, run, capsys):
    for device in ("gpu", "cuda:99"):
        assert run(plain, "--device", device)[0] == 2
        assert error_of(capsys).startswith(f"device {device} cannot be used: ")


def test_folders_that_cannot_be_written(plain, run, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert run(plain, output="file/run")[0] == 2
    assert error_of(capsys) == f"folder {tmp_path}/file/run cannot be written: Not a directory"
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "file" / "model.pt")
    code, folder = run(plain)
    assert code == 2 and not folder.exists()
    assert error_of(capsys).startswith(f"folder {tmp_path}/file cannot be written: ")


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_shown_again(plain, run, capsys, tmp_path):
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "ckpt" / "model.pt")
    _, folder = run(plain)
    table = capsys.readouterr().out.splitlines()[:2]
    before = files(folder), files(tmp_path / "ckpt")
    assert len(before[0]) >= 5 and len(before[1]) == 1
    assert run(plain)[0] == 0
    shown = f"The run in {folder} is finished; --fresh starts anew."
    assert capsys.readouterr().out.splitlines()[:4] == [shown, "", *table]
    assert before == (files(folder), files(tmp_path / "ckpt"))


def test_a_run_never_overwrites(plain, run, write, capsys, tmp_path):
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "ckpt" / "model.pt")
    _, folder = run(plain)
    capsys.readouterr()
    before = files(folder), files(tmp_path / "ckpt")
    advice = "go on with the same, choose another --output, or start anew with --fresh"
    config = write(plain).read_text()

    assert run(plain, "--seed", "7")[0] == 2
    assert error_of(capsys) == f"the run in {folder} began with --seed 42, not with --seed 7: {advice}"
    for flags, now in (["--amp"], "with --amp"), (["--amp-dtype", "float16"], "with --amp-dtype float16"):
        assert run(plain, *flags)[0] == 2
        assert error_of(capsys) == f"the run in {folder} began without {flags[0]}, not {now}: {advice}"
    write(plain).write_text(config.replace("0.01", "0.02", 1))
    assert run(tmp_path / "config.yaml")[0] == 2
    line = 1 + config[: config.index("0.01")].count("\n")
    assert (
        error_of(capsys)
        == f"{tmp_path}/config.yaml differs in line {line} from {folder}/config.yaml, as the run began: {advice}"
    )
    assert run(tmp_path / "gone.yaml")[0] == 2
    assert error_of(capsys) == f"config {tmp_path}/gone.yaml cannot be read: No such file or directory"
    code, other = run(plain, output="other")
    assert code == 2 and not other.exists()
    assert error_of(capsys).startswith(f"dst_ckpt {tmp_path}/ckpt/model.pt exists already: move it away")
    assert before == (files(folder), files(tmp_path / "ckpt"))
    (folder / "config.yaml").unlink()
    assert run(plain)[0] == 2
    assert error_of(capsys) == f"{folder} holds a run that cannot be resumed: choose another --output, or --fresh"


@pytest.mark.parametrize("content", [b"", b"datasets: [", b"\xff\xfe\x00", bytes(100), None])
def test_a_damaged_config_of_the_run(content, plain, run, capsys):
    """Empty, cut, not text, zeroed by a crash of the machine, a folder."""
    _, folder = run(plain)
    capsys.readouterr()
    config = folder / "config.yaml"
    config.unlink()
    config.mkdir() if content is None else config.write_bytes(content)
    before = files(folder)
    assert run(plain)[0] == 2
    advice = "put it back, choose another --output, or start anew with --fresh"
    assert error_of(capsys) == f"{config} is damaged: {advice}"
    assert before == files(folder)


def test_fresh_moves_the_run_before_away(plain, run, tmp_path):
    plain["models"]["model"]["dst_ckpt"] = str(tmp_path / "ckpt" / "model.pt")
    code, folder = run(plain, "--fresh")
    assert code == 0 and not (folder / "old-1").exists()
    (folder / "mine.txt").write_text("mine")
    before = {path.relative_to(folder): content for path, content in files(folder).items()}
    for number in (1, 2):
        assert run(plain, "--fresh", "--seed", str(number))[0] == 0
        assert (folder / f"old-{number}" / "model.pt").exists()
    assert (folder / "mine.txt").read_text() == "mine"
    moved = files(folder / "old-1")
    for path, content in before.items():
        assert path.name in ("mine.txt", ".lock") or moved[folder / "old-1" / path] == content


def test_fresh_with_the_runs_own_config(plain, run, tmp_path):
    """It is read before it is moved away."""
    _, folder = run(plain)
    content = (folder / "config.yaml").read_bytes()
    for number in (1, 2):
        assert run(folder / "config.yaml", "--fresh")[0] == 0
        assert (folder / f"old-{number}" / "config.yaml").read_bytes() == content
        assert (folder / "config.yaml").read_bytes() == content
    assert run(folder / "config.yaml")[0] == 0


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "expanded.yaml"])
def test_files_of_the_users_by_such_names(name, plain, run, write, capsys, tmp_path):
    """They are not taken for a run that was killed as it began; --fresh moves them away."""
    (tmp_path / "mine").mkdir()
    mine = tmp_path / "mine" / name
    mine.write_bytes(write(plain).read_bytes())
    before = mine.read_bytes()
    assert run(plain, output="mine")[0] == 2
    assert error_of(capsys) == f"{mine.parent} holds a run that cannot be resumed: choose another --output, or --fresh"
    assert files(mine.parent) == {mine: before, mine.parent / ".lock": b""}
    assert run(plain, "--fresh", output="mine")[0] == 0
    assert (mine.parent / "old-1" / name).read_bytes() == before


def test_a_damaged_table_of_a_finished_run(plain, run, capsys):
    _, folder = run(plain)
    for content in (b"", b"garbage\n", b"\xff\x00"):
        (folder / "results.csv").write_bytes(content)
        capsys.readouterr()
        assert run(plain)[0] == 2
        error = error_of(capsys)
        assert error.startswith(f"{folder}/results.csv, line 1: ")
        assert error.endswith("; without that file the same command measures the run again")
    (folder / "results.csv").unlink()
    assert run(plain)[0] == 0 and (folder / "results.csv").exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_run_log_that_is_a_directory(command, plain, run, capsys, tmp_path):
    code, folder = run(plain, "--run_log", str(tmp_path), command=command)
    assert code == 2 and not folder.exists()
    assert error_of(capsys) == f"--run_log {tmp_path} is a directory: name a file"


@pytest.mark.parametrize("flag", ["--run_log=log.txt", "-log_config", "-student_only"])
def test_flags_that_check_would_not_look_at(flag, plain, run, capsys):
    with pytest.raises(SystemExit):
        run(plain, flag, command="check")
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_an_output_that_is_a_file(plain, run, capsys, tmp_path):
    output = tmp_path / "mine.txt"
    output.write_text("mine")
    assert run(plain, output="mine.txt")[0] == 2
    assert error_of(capsys) == f"--output {output} is a file: name a folder"
    assert output.read_text() == "mine"
