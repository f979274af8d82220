import pytest

from timm_mamba_pkd import cli
from timm_mamba_pkd.ops import BACKENDS, VARIABLE, native


def test_every_backend_is_named(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("selective scan on cpu, the first that can is taken:") + 1
    assert [line.split(":")[0].strip() for line in lines[start : start + len(BACKENDS)]] == list(BACKENDS)
    assert "  parallel: can serve" in lines
    assert any(line.startswith("torch 2.") for line in lines)


def test_why_a_backend_cannot_serve(capsys, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: "the native library was not built")
    assert cli.main(["doctor"]) == 0
    assert "  native: the native library was not built\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("parallel", f"{VARIABLE} asks for parallel:"),
        ("fast", f"{VARIABLE} asks for fast, which does not exist: every scan will fail:"),
        ("", "the first that can is taken:"),
    ],
)
def test_the_variable_is_named(value, said, capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    assert cli.main(["doctor"]) == 0
    assert f"selective scan on cpu, {said}\n" in capsys.readouterr().out


def test_a_wrong_variable_stops_a_run_at_once(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    assert cli.main(["check", "--config", "missing.yaml"]) == 2
    assert capsys.readouterr().err.startswith(
        f"mamba-pkd: error: unknown backend 'fast' (by {VARIABLE}); choose one of ['auto', 'native'"
    )
