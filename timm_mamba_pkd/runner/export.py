"""``mamba-pkd export``: files for other runtimes and folders for the hub, each compared with eager PyTorch."""

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torchvision import transforms

from timm_mamba_pkd.deploy import FORMATS, quantize_onnx, sections_of_tag, write_hub_folder
from timm_mamba_pkd.files import rename_to_new
from timm_mamba_pkd.report import median_time
from timm_mamba_pkd.runner.card import sections_of_run
from timm_mamba_pkd.runner.device import threads
from timm_mamba_pkd.runner.errors import ConfigError, first_line
from timm_mamba_pkd.runner.evaluate import evaluate
from timm_mamba_pkd.runner.export_cascade import export_cascade
from timm_mamba_pkd.runner.export_subject import (
    TOLERANCE,
    Run,
    Subject,
    comparison_images,
    differences,
    find_subject,
)
from timm_mamba_pkd.runner.named import brings_weights
from timm_mamba_pkd.runner.run_folder import RunFolder, new_folder
from timm_mamba_pkd.runner.space import size

logger = logging.getLogger(__name__)

SUFFIXES = {**{kind: FORMATS[kind].suffix for kind in FORMATS}, "cascade": "_cascade", "hf": ""}  # two are folders


def run_export(args: argparse.Namespace) -> None:
    """``mamba-pkd export``: what is wrong with the command is said before the first file is made."""
    kinds = list(dict.fromkeys(args.format))
    _require_packages(kinds, args.int8)
    subject = find_subject(args)
    if args.int8 and subject.config is None:
        raise ConfigError("--int8 measures the accuracy on labelled data: name a config that has them by --config")
    if args.int8 and subject.config is not None and subject.config.missing:
        raise ConfigError(f"--int8 measures the accuracy on labelled data: {subject.config.missing}")
    for kind in ("cascade", "hf"):
        if kind in kinds and not hasattr(subject.whole, "pretrained_cfg"):
            raise ConfigError(f"--format {kind} takes models of timm, and {subject.name} is none")
    own_weights = args.checkpoint is None and brings_weights(args.model)
    card = _card(subject, own_weights) if "hf" in kinds else {}
    run = subject.run or RunFolder(Path("runs") / subject.name)
    folder = Path(args.output).expanduser() if args.output else run.path / "export"
    paths = {kind: folder / (subject.name + SUFFIXES[kind]) for kind in kinds}
    int8 = folder / f"{subject.name}.int8.onnx"
    for path in [*paths.values(), *([int8] if args.int8 else [])]:
        if path.exists():
            raise ConfigError(f"{path} exists already: choose another --output, or move it away")
    if subject.config is not None and subject.config.missing:
        logger.warning(
            "The data cannot be read (%s): what is written is compared on random images only. Their size, %s, and the "
            "%d classes are those of the model %s of %s",
            subject.config.missing, "x".join(map(str, subject.input_size)), subject.config.num_classes,
            subject.config.name, subject.config.path,
        )  # fmt: skip

    if "hf" in kinds and args.checkpoint is not None and subject.config is None:
        logger.warning(
            "config.json holds the default mean and std of %s: --config gives those of the run that the weights are of",
            args.model,
        )

    with new_folder(folder):
        images = comparison_images(subject)
        with torch.inference_mode():
            eager_time = median_time(lambda: subject.eager(images["random"][:1]), repeats=200)
        print(f"{subject.name}: {eager_time:.3g} ms an image in eager PyTorch, {threads(torch.get_num_threads())}")
        for kind, path in paths.items():
            with _whole(path) as partial:
                if kind == "hf":
                    found = _export_to_hub(subject, partial, images, card)
                elif kind == "cascade":
                    found = export_cascade(subject, partial, images)
                else:
                    found = _export(subject, kind, partial, images, eager_time)
                _print(partial, path, found)
            if kind == "onnx" and args.int8:
                with _whole(int8) as partial:
                    _print(partial, int8, _export_int8(subject, path, partial, images, eager_time))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder, which is then moved to ``path``; where the context fails nothing is left.

    What another process has put there meanwhile stays: an OSError then names it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        partial = Path(temporary) / path.name
        yield partial
        if partial.is_dir():
            os.replace(partial, path)  # none that holds anything
        else:
            rename_to_new(partial, path)


def _require_packages(kinds: list[str], int8: bool) -> None:
    for kind in kinds:
        if kind == "hf":
            continue
        written = FORMATS["onnx" if kind == "cascade" else kind]
        if missing := written.missing():
            raise ConfigError(f"--format {kind} needs {', '.join(missing)}: pip install {written.install}")
        for package in written.packages:
            try:
                import_module(package)
            except Exception as error:  # whatever a package that does not fit the others, or the system, raises
                raise ConfigError(
                    f"--format {kind} needs {package}, whose import fails ({first_line(error)}): install it anew with "
                    f"pip install --force-reinstall {package}"
                ) from error
    if int8 and "onnx" not in kinds:
        raise ConfigError("--int8 is for ONNX: add onnx to --format")


def _export(subject: Subject, kind: str, path: Path, images: dict[str, Tensor], eager_time: float) -> str:
    try:
        FORMATS[kind].write(subject.exportable, images["random"][:2], path)
        run = FORMATS[kind].open(path)
    except Exception as error:  # whatever an exporter, or a runtime, raises on a model that it does not support
        raise ConfigError(f"{subject.name} cannot be exported as {kind}: {first_line(error)}") from error
    return f"{differences(subject, run, images, TOLERANCE)}  {_time(run, images, eager_time)}"


def _export_int8(subject: Subject, source: Path, path: Path, images: dict[str, Tensor], eager_time: float) -> str:
    assert subject.config is not None and subject.config.test_loader is not None
    quantize_onnx(source, path)
    run = FORMATS["onnx"].open(path)
    found = differences(subject, run, images, tolerance=float("inf"))
    loader, cpu = subject.config.test_loader, torch.device("cpu")
    before = evaluate(subject.eager, loader, cpu, (1,), title="test float32")[0]
    after = evaluate(_Runtime(run), loader, cpu, (1,), title="test int8")[0]
    return f"{found}  {_time(run, images, eager_time)}  top-1 {after:.2f} instead of {before:.2f} %"


class _Runtime(nn.Module):
    """A file's runtime as a module."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _export_to_hub(subject: Subject, path: Path, images: dict[str, Tensor], card: dict[str, str]) -> str:
    whole = subject.whole if subject.k is None else subject.first_students()
    write_hub_folder(whole, path, subject.input_size, _normalisation(subject), card)
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return differences(subject, loaded, images, TOLERANCE)


def _time(run: Run, images: dict[str, Tensor], eager_time: float) -> str:
    with torch.inference_mode():
        own = median_time(lambda: run(images["random"][:1]), repeats=200)
    return f"{own:.3g} ms an image, {eager_time / own:.1f} times as fast as eager"


def _print(partial: Path, path: Path, found: str) -> None:
    files = partial.iterdir() if partial.is_dir() else [partial]
    print(f"{path}  {size(sum(file.stat().st_size for file in files))}  {found}", flush=True)


def _normalisation(subject: Subject) -> dict[str, tuple[float, ...]]:
    """``mean`` and ``std`` of the test images' transforms, if they are torchvision's; none where there is no config."""
    config = subject.config
    transform = None if config is None else config.test_transform
    if transform is None:
        if config is not None and config.missing:
            logger.warning("The config has no transforms of its test images: config.json holds timm's mean and std")
        return {}
    for step in getattr(transform, "transforms", [transform]):
        if isinstance(step, transforms.Normalize):
            return {"mean": tuple(map(float, step.mean)), "std": tuple(map(float, step.std))}
    channels = subject.input_size[0]
    return {"mean": (0.0,) * channels, "std": (1.0,) * channels}


def _card(subject: Subject, own_weights: bool) -> dict[str, str]:
    """The model card's sections on the run: what its early exit was measured to do, results, data and recipe."""
    config = subject.config
    if subject.run is None or config is None:
        return sections_of_tag(subject.whole) if own_weights else {}
    measured = subject.run.calibration / "calibration.md"
    early_exit = {}
    if getattr(subject.whole, "policy", None) is not None and measured.is_file() and subject.is_whole:
        early_exit["Early exit"] = measured.read_text(encoding="utf-8").strip()
    return {**early_exit, **sections_of_run(subject.run, config)}
