"""The command line: flags, exit codes, and who gets to see a traceback."""

import argparse

import pytest

from timm_mamba_pkd import cli, runner

UPSTREAM = [
    "--device",
    "cpu",
    "--run_log",
    "x.txt",
    "--seed",
    "3",
    "-disable_cudnn_benchmark",
    "-student_only",
    "-log_config",
]


def parse(*words: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(words)


def test_flags_of_torchdistills_script():
    args = parse("train", "--config", "a.yaml", *UPSTREAM, "-test_only")
    assert (args.device, args.run_log, args.seed) == ("cpu", "x.txt", 3)
    assert args.disable_cudnn_benchmark and args.student_only and args.log_config and args.test_only
    assert not (args.amp or args.channels_last)
    assert parse("train", "--config", "a.yaml").seed == 42
    assert parse("evaluate", "--config", "a.yaml", *UPSTREAM, "--checkpoint", "w.pt").checkpoint == "w.pt"
    assert parse("check", "--config", "a.yaml", "--device", "cpu", "--seed", "3", "--amp", "--channels-last").amp


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["evaluate"],
        ["check"],
        ["expand"],
        ["report"],
        ["fly"],
        ["train", "--config", "a", "--seed", "x"],
        ["train", "--config", "a", "--seed", "-5"],
        ["train", "--config", "a", "--seed", str(2**32)],
        ["train", "--cfg", "a"],
        ["export"],
        ["export", "mamba_pkd_s1", "--format", "tflite"],
        ["export", "mamba_pkd_s1", "--num-classes", "0"],
        ["select", "run", "--max-macs", "x"],
        ["select", "run", "--seed", "-1"],
        ["benchmark"],
        ["benchmark", "mamba_pkd_s1", "--batch-size", "0"],
        ["benchmark", "mamba_pkd_s1", "--img-size", "x"],
    ],
)
def test_bad_command_lines(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: mamba-pkd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "action"),
    [
        (["check", "--config", "a"], "run_check"),
        (["expand", "--config", "a"], "run_expand"),
        (["doctor"], "run_doctor"),
        (["train", "--config", "a"], "run_train"),
        (["train", "--config", "a", "-test_only"], "run_evaluate"),
        (["evaluate", "--config", "a"], "run_evaluate"),
        (["report", "a"], "run_report"),
        (["export", "a"], "run_export"),
        (["benchmark", "a"], "run_benchmark"),
        (["select", "a"], "run_select"),
    ],
)
def test_actions_and_exit_codes(words, action, monkeypatch, capsys):
    raised: list[Exception | None] = [
        None,
        runner.ConfigError("bad config\nworse config"),
        FloatingPointError("bad loss"),
    ]

    def act(args: argparse.Namespace) -> None:
        error = raised.pop(0)
        if error is not None:
            raise error

    monkeypatch.setattr(runner, action, act)
    assert [cli.main(words) for _ in range(3)] == [0, 2, 2]
    assert capsys.readouterr().err == (
        "mamba-pkd: error: bad config\nmamba-pkd: error: worse config\nmamba-pkd: error: bad loss\n"
    )


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(args: argparse.Namespace) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(runner, "run_report", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "a"])


def test_report_of_nothing(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no finished run (no results.csv)" in capsys.readouterr().err
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "Not a table of results" in capsys.readouterr().err


def test_default_output_is_named_after_the_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "metrics.jsonl").touch()
    assert cli.main(["train", "--config", "configs/digits.yaml"]) == 2
    assert "runs/digits holds a run that cannot be resumed" in capsys.readouterr().err
