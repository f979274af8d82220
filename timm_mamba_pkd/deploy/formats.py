"""Files for other runtimes: ONNX, PT2 of ``torch.export``, and ExecuTorch. The batch is dynamic, the image size is not.

The model is one made in timm's exportable mode, in eval mode, so that the files hold no operator of this package.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

EXECUTORCH_BATCH = 15  # the largest batch of a .pte file, whose memory is planned for it

Run = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """A kind of file.

    suffix: of its name.
    packages: what has to be importable.
    install: what ``pip install`` gets for that.
    write(model, images, path): write ``model``, traced on at least two images (B, C, H, W), float32.
    open(path): a function of images (B, C, H, W) that returns logits (B, num_classes), computed by the file's runtime.
    """

    suffix: str
    packages: tuple[str, ...]
    install: str
    write: Callable[[nn.Module, Tensor, Path], None]
    open: Callable[[Path], Run]

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    write_onnx(model, (images,), ["input0"], ["output0"], path)  # timm's names


def write_onnx(
    model: nn.Module,
    inputs: tuple[Tensor | list[Tensor], ...],
    input_names: list[str],
    output_names: list[str],
    path: Path,
) -> None:
    """Write ``model``, traced on ``inputs`` of at least two images, as an ONNX file; the batch is dynamic in all."""
    import onnx

    batch = {0: "batch"}
    with _quiet():
        program = torch.onnx.export(
            model,
            inputs,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=tuple(batch if isinstance(given, Tensor) else [batch] * len(given) for given in inputs),
            dynamo=True,
            verbose=False,
            optimize=False,
        )
        assert program is not None
        _optimize(program.model)
    proto = program.model_proto
    _forget_origin(proto)
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)


def _optimize(model: Any) -> None:
    """What the exporter's optimizer does to the students, without a rule that takes quadratic time: slices to Split.

    Common subexpressions go first: both directions of a scan share weights, which are else folded once for each.
    """
    from onnxscript import ir, optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    passes: Any = import_module("onnx_ir.passes.common")
    same = passes.CommonSubexpressionEliminationPass()
    same(model)
    optimizer.fold_constants(model)
    rewriter.rewrite(
        model,
        [
            rules.fuse_batchnorm_into_conv_rule,
            rules.transpose_transpose_rule,
            rules.collapse_slice_rule,
            rules.remove_optional_bias_from_conv_rule,
            rules.squeeze_reshape_1d_rule,
            rules.mul_by_1_rule,
            rules.div_by_1_rule,
            *rules.add_0_rule.commute(),
            rules.materialize_reshape_shape_rule,
        ],
    )
    optimizer.fold_constants(model)
    lift = passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    ir.passes.Sequential(passes.RemoveUnusedNodesPass(), lift, passes.DeduplicateInitializersPass(), same)(model)


def _forget_origin(proto: Any) -> None:
    """Remove stack traces, which name this machine's files and outweigh the weights, and inferred shapes."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    del graph.value_info[:]


def open_onnx_session(path: Path, alone: bool = True) -> Any:
    """An ONNX file in ONNX Runtime on the CPU, on as many threads as PyTorch uses.

    A session's threads go on spinning for a while after a run, which is in the way of others unless it is ``alone``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if alone else "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _open_onnx(path: Path) -> Run:
    session = open_onnx_session(path)
    return lambda images: torch.from_numpy(session.run(None, {"input0": images.numpy()})[0])


def quantize_onnx(source: Path, path: Path) -> None:
    """Write the ONNX file ``source`` with 8-bit weights of its linear layers and pointwise convolutions.

    ONNX Runtime's dynamic quantization, per channel, unsigned with a zero point: what enters these layers is rounded to
    8 bits as it comes. All else stays float32: the state space's A, D and step bias, its scan, other convolutions,
    normalisations, biases.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    with _quiet():
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_exclude=[node.name for node in convolutions if shapes[node.input[1]][2:] != (1, 1)],
            per_channel=True,
            weight_type=QuantType.QUInt8,  # of convolutions, older versions of the CPU's runtime take no others
        )


def _write_pt2(model: nn.Module, images: Tensor, path: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names this machine's files
    torch.export.save(program, path)


def _open_pt2(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_executorch(model: nn.Module, images: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=EXECUTORCH_BATCH + 1)
    with _quiet():
        exir: Any = import_module("executorch.exir")
        shapes: Any = import_module("executorch.exir.passes.sym_shape_eval_pass")
        xnnpack: Any = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")

        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        # Its check of the graph would fix the batch size to that of the example.
        check, partitioner = exir.EdgeCompileConfig(_check_ir_validity=False), [xnnpack.XnnpackPartitioner()]
        edge = exir.to_edge_transform_and_lower(program, partitioner=partitioner, compile_config=check)
        plan = exir.ExecutorchBackendConfig(sym_shape_eval_pass=shapes.ConstraintBasedSymShapeEvalPass())
        path.write_bytes(edge.to_executorch(plan).buffer)


def _open_executorch(path: Path) -> Run:
    program = import_module("executorch.runtime").Runtime.get().load_program(path)
    method = program.load_method("forward")
    return lambda images: method.execute([images])[0].clone()


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell at length what does not concern the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), "'timm_mamba_pkd[onnx]'", _write_onnx, _open_onnx),
    "pt2": Format(".pt2", (), "", _write_pt2, _open_pt2),
    "executorch": Format(".pte", ("executorch",), "executorch", _write_executorch, _open_executorch),
}
