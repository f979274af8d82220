"""Everything of PyTorch that has to work with whole students, at MNIST's shape, compared with eager execution."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_exportable
from timm.models import create_feature_extractor
from torch import Tensor, nn

from timm_mamba_pkd.layers import Mamba
from timm_mamba_pkd.models import STUDENTS
from timm_mamba_pkd.ops import BACKENDS, native

TWO_STUDENTS = pytest.mark.parametrize("name", ["mamba_pkd_s1", "mamba_pkd_s3"])
EVERY_BACKEND = ["exportable", *BACKENDS, *(f"native: {name}" for name in native.INSTRUCTION_SETS)]
DYNAMIC_BATCH = ({0: torch.export.Dim("batch")},)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning",
    "ignore:The TorchScript type system:UserWarning",
    "ignore::torch.jit.TracerWarning",
)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


def make(name: str, **kwargs) -> Any:
    return timm.create_model(name, in_chans=1, img_size=28, num_classes=10, **kwargs)


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 28, 28)


def train(function: Callable, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The logits of a training step, and the gradients that it leaves in the model."""
    logits = function(x)
    nn.functional.cross_entropy(logits.float(), torch.arange(len(x))).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_close(actual: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    """Equal to 1e-4 of the largest true value; what comes before a normalisation has gradients of zero."""
    assert actual.keys() == true.keys()
    for name, tensor in true.items():
        assert (actual[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max() + 1e-7, name


# Each gives a function of images, and the module that holds its parameters.
def compiled(model: nn.Module) -> tuple[Callable, nn.Module]:
    return torch.compile(model, fullgraph=True, backend="aot_eager"), model


def exported(model: nn.Module) -> tuple[Callable, nn.Module]:
    module = torch.export.export(model, (images(2),), dynamic_shapes=DYNAMIC_BATCH).module()
    return module, module


def scripted(model: nn.Module) -> tuple[Callable, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(model), model


def traced(model: nn.Module) -> tuple[Callable, nn.Module]:
    graph = create_feature_extractor(model, {"head.fc": "logits"})
    return lambda x: graph(x)["logits"], graph


def traced_then_scripted(model: nn.Module) -> tuple[Callable, nn.Module]:
    graph = create_feature_extractor(model, {"head.fc": "logits"})
    script = scripted(graph)[0]
    return lambda x: script(x)["logits"], graph


TRANSFORMS = pytest.mark.parametrize("transform", [compiled, exported, scripted, traced, traced_then_scripted])
EXPORTABLE = pytest.mark.parametrize("exportable", [False, True])


@TWO_STUDENTS
@EXPORTABLE
@TRANSFORMS
def test_training_step(name, exportable, transform):
    model = make(name, exportable=exportable)
    x = images(4)
    function, transformed = transform(copy.deepcopy(model))
    assert_close(train(function, transformed, x), train(model, model, x))


@EXPORTABLE
@TRANSFORMS
def test_inference(exportable, transform):
    model = make("mamba_pkd_s1", exportable=exportable, drop_path_rate=0.1).eval()
    function, _ = transform(model)
    with torch.inference_mode():
        for count in (1, 7):
            x = images(count)
            torch.testing.assert_close(function(x), model(x))


@pytest.mark.parametrize("transform", [compiled, scripted, traced, traced_then_scripted])
def test_small_images_are_refused(transform):
    function, _ = transform(make("mamba_pkd_s1").eval())
    with pytest.raises((AssertionError, torch.jit.Error), match="images must be at least 8 pixels high"):
        function(torch.zeros(1, 1, 7, 8))


@TWO_STUDENTS
@EXPORTABLE
def test_autocast(name, exportable):
    model = make(name, exportable=exportable)
    x = images(10)
    true = train(model, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    model.zero_grad()
    half = train(lambda x: logits, model, x)
    assert {gradient.dtype for key, gradient in half.items() if key != "logits"} == {torch.float32}
    both = [torch.cat([tensor.flatten() for tensor in results.values()]) for results in (half, true)]
    assert nn.functional.cosine_similarity(*both, dim=0) > 0.98


@pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
@pytest.mark.parametrize("name", STUDENTS)
def test_backends_agree(name, backend):
    model = make(name).eval()
    mixers = [module for module in model.modules() if isinstance(module, Mamba)]
    x, logits = images(2), {}
    for serving in ("reference", backend):
        for mixer in mixers:
            mixer.backend = serving
        with torch.no_grad():
            logits[serving] = model(x)
    torch.testing.assert_close(logits[backend], logits["reference"], rtol=0, atol=1e-4)


def test_distributed_training_step(tmp_path, monkeypatch):
    """The gradients after DistributedDataParallel are the mean of those that the processes' shares give alone."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # which the processes inherit
    from distributed import train_in_a_process

    names = ["mamba_pkd_s1", "mamba_pkd_s3"]
    shares = [images(4), images(4)]
    for name in names:
        torch.save((make(name), shares), tmp_path / f"{name}.pt")
    torch.multiprocessing.spawn(train_in_a_process, (tmp_path, names), nprocs=2)
    for name in names:
        model, _ = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        alone = [train(copied, copied, x) for x in shares for copied in [copy.deepcopy(model)]]
        for rank, own in enumerate(alone):
            mean = {key: (first + second) / 2 for key, first, second in ((k, alone[0][k], alone[1][k]) for k in own)}
            together = torch.load(tmp_path / f"{name}.{rank}.pt")
            assert_close(together, {**mean, "logits": own["logits"]})


def namespaces_of(model: nn.Module) -> set[str]:
    """Of the operators in the exported graph."""
    graph = torch.export.export(model, (images(2),)).graph
    return {str(node.target).split(".")[0] for node in graph.nodes if node.op == "call_function"}


def test_timms_exportable_mode():
    assert "timm_mamba_pkd" in namespaces_of(make("mamba_pkd_s1").eval())
    with set_exportable(True):
        inside = make("mamba_pkd_s1").eval()
    ensemble = make("mamba_pkd_ensemble", students=["mamba_pkd_s1", "mamba_pkd_s2"], exportable=True).eval()
    for model in (inside, *ensemble.students, make("mamba_pkd_s1", exportable=True).eval()):
        assert "timm_mamba_pkd" not in namespaces_of(model)
    assert "timm_mamba_pkd" in namespaces_of(make("mamba_pkd_s1").eval())


@EXPORTABLE
def test_strict_export(exportable):
    model = make("mamba_pkd_s1", exportable=exportable).eval()
    program = torch.export.export(model, (images(2),), dynamic_shapes=DYNAMIC_BATCH, strict=True)
    for count in (1, 7):
        x = images(count)
        torch.testing.assert_close(program.module()(x), model(x))


@EXPORTABLE
def test_jit_trace(exportable):
    model = make("mamba_pkd_s1", exportable=exportable).eval()
    trace: Any = torch.jit.trace(model, images(2))
    for count in (1, 7):
        x = images(count)
        torch.testing.assert_close(trace(x), model(x))


@pytest.mark.parametrize(("combination", "connected"), [("mean", False), ("per_class", True)])
def test_ensemble_export(combination, connected):
    """As a whole, with some students active, and after k students."""
    students = ["mamba_pkd_s1", "mamba_pkd_s1", "mamba_pkd_s2"]
    ensemble = make("mamba_pkd_ensemble", students=students, combination=combination).eval()
    if ensemble.weights is not None:
        ensemble.weights.uniform_()
    if connected:
        ensemble.connect(1, 1)
        nn.init.normal_(ensemble.reuse["1"].projections[0].weight)
    ensemble.set_active([0, 2])
    for model in (ensemble, ensemble.first(2)):
        program = torch.export.export(model, (images(2),), dynamic_shapes=DYNAMIC_BATCH)
        for count in (1, 7):
            x = images(count)
            torch.testing.assert_close(program.module()(x), model(x))


@TWO_STUDENTS
def test_onnx(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make(name, exportable=True).eval()
    path = tmp_path / "student.onnx"
    program = torch.onnx.export(model, (images(2),), dynamo=True, dynamic_shapes=DYNAMIC_BATCH, verbose=False)
    assert program is not None
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    for count in (1, 7):
        x = images(count)
        (logits,) = session.run(None, {image.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-4, atol=1e-5)
