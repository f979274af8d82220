"""What is in the files; that they compute the same is tested with the command, in tests/runner/test_export.py."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from timm_mamba_pkd.deploy import FORMATS, quantize_onnx

ROOT = Path(__file__).resolve().parents[2]


def make(**kwargs) -> Any:
    torch.manual_seed(0)
    return timm.create_model("mamba_pkd_s1", in_chans=1, img_size=9, num_classes=4, **kwargs).eval()


def test_onnx_and_int8(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make(exportable=True)
    paths = [tmp_path / name for name in ("float.onnx", "int8.onnx")]
    FORMATS["onnx"].write(model, torch.randn(2, 1, 9, 9), paths[0])
    quantize_onnx(*paths)
    whole, small = (onnx.load(path) for path in paths)
    assert {node.domain for node in whole.graph.node} == {""}
    for path in paths:
        assert str(ROOT).encode() not in path.read_bytes() and str(torch.__path__[0]).encode() not in path.read_bytes()
    (image,) = whole.graph.input
    assert image.name == "input0"
    assert [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim] == ["batch", 1, 9, 9]

    def count(graph: Any, dtype: int) -> int:
        """Elements of the weights, which have two or more dimensions."""
        sizes = (torch.Size(w.dims).numel() for w in graph.initializer if w.data_type == dtype and len(w.dims) > 1)
        return sum(sizes)

    layers = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) or getattr(module, "kernel_size", 0) == (1, 1)
    ]
    quantized = sum(layer.weight.numel() for layer in layers)
    assert count(small.graph, onnx.TensorProto.UINT8) == quantized > 0.8 * count(whole.graph, onnx.TensorProto.FLOAT)
    assert count(small.graph, onnx.TensorProto.FLOAT) == count(whole.graph, onnx.TensorProto.FLOAT) - quantized

    x = torch.randn(3, 1, 9, 9)
    with torch.no_grad():
        true = model(x)
    torch.testing.assert_close(FORMATS["onnx"].open(paths[0])(x), true, rtol=1e-4, atol=1e-5)
    difference = (FORMATS["onnx"].open(paths[1])(x) - true).abs().max()
    assert 0 < difference < 0.1 * true.abs().max()


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_the_largest_student(kind, tmp_path):
    if missing := FORMATS[kind].missing():
        pytest.skip(f"there is no {missing[0]}")
    torch.manual_seed(0)
    model: Any = timm.create_model("mamba_pkd_s7", in_chans=1, img_size=8, num_classes=4, exportable=True).eval()
    path = tmp_path / f"model{FORMATS[kind].suffix}"
    FORMATS[kind].write(model, torch.randn(2, 1, 8, 8), path)
    run = FORMATS[kind].open(path)
    for count in (1, 7):
        x = torch.randn(count, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_pt2_names_no_file_of_this_machine(tmp_path):
    path = tmp_path / "model.pt2"
    model = make(exportable=True)
    FORMATS["pt2"].write(model, torch.randn(2, 1, 9, 9), path)
    assert str(ROOT).encode() not in path.read_bytes()
    x = torch.randn(3, 1, 9, 9)
    torch.testing.assert_close(FORMATS["pt2"].open(path)(x), model(x))


def test_executorch(tmp_path):
    pytest.importorskip("executorch")
    path = tmp_path / "model.pte"
    model = make(exportable=True)
    FORMATS["executorch"].write(model, torch.randn(2, 1, 9, 9), path)
    run = FORMATS["executorch"].open(path)
    for count in (1, 7, 15):
        x = torch.randn(count, 1, 9, 9)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
