"""``--torchcompile``: compiled models train as eager ones do, hooked modules and resumed runs included."""

import json
import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def hooked(progressive) -> dict[str, Any]:
    """One student, logits by hooks of both sides; the last batch of an epoch is smaller."""
    kwargs = progressive["train"]["init"]["kwargs"]
    kwargs["train_data_loader"]["kwargs"]["batch_size"] = 10
    kwargs["students"] = progressive["models"]["student_model"]["kwargs"]["students"] = ["mamba_pkd_s1"]
    kwargs["teacher"] = {"forward_hook": {"output": ["fc"]}}
    kwargs["student"] = {"forward_hook": {"output": ["head", "stages.1"]}}
    sides = {
        "input": {"is_from_teacher": False, "module_path": "head", "io": "output"},
        "target": {"is_from_teacher": True, "module_path": "fc", "io": "output"},
    }
    kwargs["criterion"]["kwargs"]["sub_terms"]["hooked"] = {
        "criterion": {"key": "MSELoss", "kwargs": {}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": sides},
        "weight": 1.0,
    }
    return progressive


def test_it_trains_as_eager_models_do(hooked, run, caplog):
    flags = ("--channels-last", "--model-ema", "--model-ema-decay", "0.5")
    caplog.set_level(logging.INFO)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    code, eager = run(hooked, *flags, output="eager")
    assert code == 0 and not torch._dynamo.utils.counters["frames"]
    code, folder = run(hooked, *flags, "--torchcompile", "eager")
    assert code == 0 and torch._dynamo.utils.counters["frames"]["ok"] >= 5
    assert not torch._dynamo.utils.counters["graph_break"]
    assert "Compiling with eager\n" in (folder / "log.txt").read_text()
    one, two = ([json.loads(line)["loss"] for line in (f / "metrics.jsonl").open()] for f in (eager, folder))
    assert one == pytest.approx(two, rel=1e-4)
    one, two = (load_file(f / "weights" / "ensemble.safetensors") for f in (eager, folder))
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-2, atol=1e-3)


def test_an_unknown_backend(plain, run, errors):
    code, folder = run(plain, "--torchcompile", "inductr")
    assert code == 2 and not folder.exists()
    (line,) = errors()
    start, _, names = line.partition("it has ")
    assert start == "--torchcompile inductr: torch.compile has no such backend; "
    assert {"aot_eager", "cudagraphs", "eager", "inductor"} <= set(names.split(", ")) and "TESTING" not in names


def test_a_compiler_that_fails(plain, run, errors):
    @torch._dynamo.register_backend(name="failing")
    def failing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        raise RuntimeError("no compiler here")

    assert run(plain, "--torchcompile", "failing")[0] == 2
    message = "--torchcompile failing fails (no compiler here): leave it out, or name another backend"
    assert errors()[-1] == message


def test_what_is_not_compiled_is_said(progressive, run, caplog, monkeypatch):
    progressive["train"]["init"]["kwargs"]["rule"] = {"key": "bdistil", "kwargs": {"max_retries": 0}}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, backend: None)
    caplog.set_level(logging.INFO)
    assert run(progressive, "--torchcompile")[0] == 0
    assert "Compiling with inductor; not compiled: students that reuse features of others" in caplog.messages
