from timm_mamba_pkd import cli
from timm_mamba_pkd.ops import BACKENDS, native


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
