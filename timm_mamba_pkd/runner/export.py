"""``mamba-pkd export``: files for other runtimes and folders for the hub, each compared with eager PyTorch."""

import argparse
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import set_exportable
from timm.models import is_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from timm_mamba_pkd.datasets import Digits
from timm_mamba_pkd.deploy import FORMATS, OnnxCascade, first_students, quantize_onnx, write_cascade, write_hub_folder
from timm_mamba_pkd.distillation import unknown_name
from timm_mamba_pkd.models import (
    Agreement,
    Confidence,
    Depth,
    MambaPKDEnsemble,
    WeightsError,
    confidence,
    load_weights,
)
from timm_mamba_pkd.models.state_dict import not_finite
from timm_mamba_pkd.report import median_time
from timm_mamba_pkd.runner.device import find_device
from timm_mamba_pkd.runner.errors import ConfigError, first_line
from timm_mamba_pkd.runner.evaluate import evaluate
from timm_mamba_pkd.runner.named import create_named
from timm_mamba_pkd.runner.run_folder import RunFolder, new_folder
from timm_mamba_pkd.runner.safe_config import Folders
from timm_mamba_pkd.runner.space import size
from timm_mamba_pkd.runner.streams import first_samples, public_class
from timm_mamba_pkd.runner.trained import Trained, prepare_trained

logger = logging.getLogger(__name__)

BATCHES = (1, 7)
TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller; and of a confidence
SUFFIXES = {**{kind: FORMATS[kind].suffix for kind in FORMATS}, "cascade": "_cascade", "hf": ""}  # two are folders

Run = Callable[[Tensor], Tensor]


@dataclass
class Subject:
    """What is exported.

    Attributes:
        name: of the files.
        whole: the model as it was created; an ensemble with all its students.
        eager: the same, or the ensemble's first students; in eval mode.
        exportable: like ``eager``, with the same weights, made in timm's exportable mode.
        input_size: (C, H, W) of an image.
        config: the run's, or that of ``--config``.
        run: the folder of the run that the model is of.
    """

    name: str
    whole: Any
    eager: nn.Module
    exportable: nn.Module
    input_size: tuple[int, int, int]
    config: Trained | None
    run: RunFolder | None


def run_export(args: argparse.Namespace) -> None:
    """``mamba-pkd export``: what is wrong with the command is said before the first file is made."""
    kinds = list(dict.fromkeys(args.format))
    _require_packages(kinds, args.int8)
    subject = _find(args)
    if args.int8 and subject.config is None:
        raise ConfigError("--int8 measures the accuracy on labelled data: name a config that has them by --config")
    if args.int8 and subject.config is not None and subject.config.missing:
        raise ConfigError(f"--int8 measures the accuracy on labelled data: {subject.config.missing}")
    for kind in ("cascade", "hf"):
        if kind in kinds and not hasattr(subject.whole, "pretrained_cfg"):
            raise ConfigError(f"--format {kind} takes models of timm, and {subject.name} is none")
    card = _card(subject) if "hf" in kinds else {}
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

    with new_folder(folder):
        images = _images(subject)
        with torch.inference_mode():
            eager_time = median_time(lambda: subject.eager(images["random"][:1]), repeats=200)
        print(f"{subject.name}: {eager_time:.3g} ms an image in eager PyTorch, {torch.get_num_threads()} CPU threads")
        for kind, path in paths.items():
            if kind == "hf":
                _export_to_hub(subject, path, images, card)
            elif kind == "cascade":
                _export_cascade(subject, path, images)
            else:
                _export(subject, kind, path, images, eager_time)
            if kind == "onnx" and args.int8:
                _export_int8(subject, path, int8, images, eager_time)


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


def _find(args: argparse.Namespace) -> Subject:
    """The model that the command names, a folder or a name in timm, with the weights it names."""
    find_device("cpu")
    path = Path(args.model).expanduser()
    if ":" not in args.model and not is_model(args.model) and (path.is_dir() or "/" in args.model):
        return _find_in_run(args, RunFolder(path))
    if ":" in args.model and (args.num_classes is not None or args.in_chans is not None):
        raise ConfigError(f"--num-classes and --in-chans are those of {args.model}: leave them out")
    if ":" not in args.model and not is_model(args.model):
        unknown = unknown_name("model", args.model, timm.list_models())
        raise ConfigError(f"{args.model} is neither a model of timm nor the folder of a run: {unknown}")
    sizes = {"num_classes": args.num_classes, "in_chans": args.in_chans, "img_size": args.img_size}
    config = None
    if args.config is not None:
        _refuse_sizes(args, f"--config {args.config}")
        config = prepare_trained(args.config, _folders(args, RunFolder(Path("runs") / args.model)))
        channels, *size = config.input_size
        sizes = {"num_classes": config.num_classes, "in_chans": channels, "img_size": tuple(size)}
    whole, input_size = create_named(args.model, **sizes)
    exportable, _ = create_named(args.model, **sizes, exportable=True)
    if args.checkpoint is not None:
        _load(whole, Path(args.checkpoint))
    elif broken := not_finite(whole.state_dict()):
        raise ConfigError(f"the weights of {args.model} hold values that are not finite: {broken}")
    exportable.load_state_dict(whole.state_dict())
    name = Path(args.model.partition(":")[2] or args.model).name
    subject = _subject(args, name, whole, exportable, input_size, config, None)
    if args.checkpoint is None and ":" not in args.model:
        logger.warning("%s is exported with random weights: name trained ones by --checkpoint", args.model)
    return subject


def _find_in_run(args: argparse.Namespace, run: RunFolder) -> Subject:
    if not run.config.is_file():
        raise ConfigError(f"{args.model} is neither a model of timm nor the folder of a run (no config.yaml in it)")
    if args.config is not None:
        raise ConfigError(f"--config is that of the run in {args.model}: leave it out")
    _refuse_sizes(args, f"the run in {args.model}")
    config = prepare_trained(run.config, _folders(args, run))
    exportable = config.exportable()
    ensemble = isinstance(config.model, MambaPKDEnsemble)
    if args.checkpoint is None and not run.finished:
        logger.warning("The run in %s has not finished: these are its weights so far", run.path)
    _load(config.model, Path(args.checkpoint or run.weights("ensemble" if ensemble else "model")))
    exportable.load_state_dict(config.model.state_dict())
    return _subject(args, config.name, config.model, exportable, config.input_size, config, run)


def _folders(args: argparse.Namespace, run: RunFolder) -> Folders | None:
    return Folders(run.path if args.output is None else Path(args.output)) if args.safe_config else None


def _refuse_sizes(args: argparse.Namespace, source: str) -> None:
    for flag in ("num_classes", "in_chans", "img_size"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} is that of {source}: leave it out")


def _load(model: nn.Module, path: Path) -> None:
    try:
        load_weights(model, path)
    except WeightsError as error:
        raise ConfigError(str(error)) from error


def _subject(
    args: argparse.Namespace,
    name: str,
    whole: Any,
    exportable: Any,
    input_size: tuple[int, int, int],
    config: Trained | None,
    run: RunFolder | None,
) -> Subject:
    k = args.students
    if not isinstance(whole, MambaPKDEnsemble):
        if k is not None:
            raise ConfigError(f"--students is for ensembles, and {args.model} is none")
        if "cascade" in args.format:
            raise ConfigError(f"--format cascade is for ensembles, and {args.model} is none")
        return Subject(name, whole, whole, exportable, input_size, config, run)
    k = whole.num_active if k is None else k
    if not 1 <= k <= len(whole.students):
        raise ConfigError(f"--students must be from 1 to {len(whole.students)}, got {k}")
    if not set(range(k)) <= set(whole.active_positions):
        active = ", ".join(str(position + 1) for position in whole.active_positions)
        raise ConfigError(f"students 1 to {k} cannot be exported: only {active} of {args.model} are trained and active")
    name = f"{'ensemble' if run else name}_{k}"
    return Subject(name, whole, whole.first(k), exportable.first(k), input_size, config, run)


def _images(subject: Subject) -> dict[str, Tensor]:
    """The images to compare on, by what they are."""
    count, (channels, height, width) = max(BATCHES), subject.input_size
    images = {"random": torch.randn(count, *subject.input_size, generator=torch.Generator().manual_seed(0))}
    if subject.config is not None:
        if subject.config.test_loader is not None:
            real = [image for image, *_ in first_samples(subject.config.test_loader.dataset, count)]
            images["test images"] = torch.stack([real[i % len(real)] for i in range(count)])
    elif channels in (1, 3):
        try:
            digits = Digits("test", transforms.ToTensor())
        except ImportError:
            return images
        real = torch.stack([digits[i][0] for i in range(count)])
        images["digits"] = F.interpolate(real, (height, width)).expand(-1, channels, -1, -1).contiguous()
    return images


def _differences(subject: Subject, run: Run, images: dict[str, Tensor], tolerance: float) -> str:
    """The largest difference between the logits of ``run`` and those of eager PyTorch, in words.

    Raises:
        ConfigError: it is larger than ``tolerance`` times the largest logit, or than ``tolerance``.
    """
    found = []
    for kind, batch in images.items():
        with torch.no_grad():
            true = torch.cat([subject.eager(batch[:count]) for count in BATCHES])
            ours = torch.cat([run(batch[:count]) for count in BATCHES])
        difference, largest = float((ours - true).abs().max()), float(true.abs().max())
        if not difference <= tolerance * max(1.0, largest):
            raise ConfigError(f"{subject.name} differs from eager PyTorch by {difference:.1e} on {kind}: not written")
        found.append(f"{difference:.1e} ({kind})")
    return "largest difference " + ", ".join(found)


def _export(subject: Subject, kind: str, path: Path, images: dict[str, Tensor], eager_time: float) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        partial = Path(temporary) / path.name
        try:
            FORMATS[kind].write(subject.exportable, images["random"][:2], partial)
            run = FORMATS[kind].open(partial)
        except Exception as error:  # whatever an exporter, or a runtime, raises on a model that it does not support
            raise ConfigError(f"{subject.name} cannot be exported as {kind}: {first_line(error)}") from error
        found = _differences(subject, run, images, TOLERANCE)
        _print(partial, path, f"{found}  {_time(run, images, eager_time)}")
        os.replace(partial, path)


def _export_int8(subject: Subject, source: Path, path: Path, images: dict[str, Tensor], eager_time: float) -> None:
    assert subject.config is not None and subject.config.test_loader is not None
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        partial = Path(temporary) / path.name
        quantize_onnx(source, partial)
        run = FORMATS["onnx"].open(partial)
        found = _differences(subject, run, images, tolerance=float("inf"))
        loader, cpu = subject.config.test_loader, torch.device("cpu")
        before = evaluate(subject.eager, loader, cpu, (1,), title="test float32")[0]
        after = evaluate(_Runtime(run), loader, cpu, (1,), title="test int8")[0]
        accuracy = f"top-1 {after:.2f} instead of {before:.2f} %"
        _print(partial, path, f"{found}  {_time(run, images, eager_time)}  {accuracy}")
        os.replace(partial, path)


class _Runtime(nn.Module):
    """A file's runtime as a module."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _first_students(subject: Subject) -> MambaPKDEnsemble:
    k = int(subject.name.rpartition("_")[2])
    return first_students(subject.whole, k, subject.input_size[1:])


def _export_to_hub(subject: Subject, path: Path, images: dict[str, Tensor], card: dict[str, str]) -> None:
    whole = _first_students(subject) if isinstance(subject.whole, MambaPKDEnsemble) else subject.whole
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        partial = Path(temporary) / path.name
        write_hub_folder(whole, partial, subject.input_size, _normalisation(subject), card)
        loaded = timm.create_model(f"local-dir:{partial}", pretrained=True).eval()
        _print(partial, path, _differences(subject, loaded, images, TOLERANCE))
        os.replace(partial, path)


def _export_cascade(subject: Subject, path: Path, images: dict[str, Tensor]) -> None:
    ensemble = _first_students(subject)
    with set_exportable(True):
        exportable = _first_students(subject)
    policy, words = (ensemble.policy, "the fitted policy") if ensemble.policy else (Agreement(), "agreement")
    kind, batch = list(images.items())[-1]  # the real ones, if there are any
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        partial = Path(temporary) / path.name
        try:
            write_cascade(exportable, images["random"][:2], partial)
            cascade = OnnxCascade(partial)
        except Exception as error:  # whatever an exporter, or a runtime, raises on a model that it does not support
            raise ConfigError(f"{subject.name} cannot be exported as cascade: {first_line(error)}") from error
        found = _differences(
            subject, lambda x: cascade.predict(x, Depth(len(ensemble.students))).logits, images, TOLERANCE
        )
        for name, compared in images.items():
            for count in BATCHES:
                _require_same_exits(subject.name, ensemble, cascade, policy, compared[:count], name)
        eager, own = (_time_of_predict(model, batch, policy) for model in (ensemble, cascade))
        used, count = float(cascade.predict(batch, policy).students.double().mean()), len(ensemble.students)
        speed = f"{own:.3g} ms an image, {eager / own:.1f} times as fast as eager predict"
        _print(partial, path, f"{found}  {speed} ({words}: {used:.3g} of {count} students, {kind})")
        os.replace(partial, path)


def _time_of_predict(model: MambaPKDEnsemble | OnnxCascade, images: Tensor, policy: Confidence | Agreement) -> float:
    """Milliseconds for an image, one by one: early exit takes longer for some than for others."""
    singly = images.split(1)
    return median_time(lambda: [model.predict(image, policy) for image in singly], repeats=50) / len(images)


def _require_same_exits(
    name: str,
    ensemble: MambaPKDEnsemble,
    cascade: OnnxCascade,
    policy: Confidence | Agreement,
    x: Tensor,
    kind: str,
) -> None:
    """Raise a ConfigError unless the images leave where they do in eager PyTorch, with the same logits.

    An image may leave elsewhere if its confidence is within `TOLERANCE` of a threshold or, where agreement decides, its
    two largest logits are that near to each other.
    """
    true, ours = ensemble.predict(x, policy), cascade.predict(x, policy)
    with torch.no_grad():
        steps = ensemble.combine(ensemble.student_logits(x))  # (N, B, C)
    for i, (one, other) in enumerate(zip(true.students.tolist(), ours.students.tolist(), strict=True)):
        if one == other:
            difference, bound = (true.logits[i] - ours.logits[i]).abs().max(), true.logits[i].abs().max().clamp(min=1)
            same = bool(difference <= TOLERANCE * bound)
        else:
            same = _undecided(steps[: min(one, other), i], policy)
        if not same:
            raise ConfigError(
                f"{name} differs from eager predict on {kind}: image {i + 1} uses {other} students, not {one}, or "
                "gets other logits: not written"
            )


def _undecided(steps: Tensor, policy: Confidence | Agreement) -> bool:
    """Whether rounding decides if an image leaves with the last of ``steps``, ensemble logits (k, C)."""
    if isinstance(policy, Confidence):
        k = len(steps) - 1
        sure = float(confidence(steps[-1], policy.measure, policy.temperatures[k]))
        return abs(sure - policy.thresholds[k]) <= TOLERANCE
    first, second = steps.topk(2).values.unbind(-1)
    return bool((first - second <= TOLERANCE * steps.abs().amax(-1).clamp(min=1)).any())


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
    data: Any = None if config is None or config.test_loader is None else config.test_loader.dataset
    while not hasattr(data, "transform") and hasattr(data, "dataset"):
        data = data.dataset
    transform = getattr(data, "transform", None if config is None else config.transform)
    if transform is None:
        if config is not None and config.missing:
            logger.warning("The config has no transforms of its test images: config.json holds timm's mean and std")
        return {}
    for step in getattr(transform, "transforms", [transform]):
        if isinstance(step, transforms.Normalize):
            return {"mean": tuple(map(float, step.mean)), "std": tuple(map(float, step.std))}
    channels = subject.input_size[0]
    return {"mean": (0.0,) * channels, "std": (1.0,) * channels}


def _card(subject: Subject) -> dict[str, str]:
    """The model card's sections on the run: what its early exit was measured to do, results, data and recipe."""
    config = subject.config
    if subject.run is None or config is None:
        return {}
    results = subject.run.path / "results.md"
    if not results.is_file():
        raise ConfigError(f"the run in {subject.run.path} has not finished: the same mamba-pkd train goes on with it")
    data = [
        f"- `{name}`: {len(images)} images of `{kind.__module__}.{kind.__qualname__}`"
        for name, images in config.datasets.items()
        if not isinstance(images, list)  # not the lists of splits that torchdistill builds on the way
        for kind in [public_class(images)]
    ] or [f"- `{name}`" for name in config.dataset_ids]
    versions = " and ".join(f"{name} {metadata.version(name)}" for name in ("timm_mamba_pkd", "torchdistill"))
    text = subject.run.config.read_text(encoding="utf-8")
    measured = subject.run.calibration / "calibration.md"
    policy = getattr(subject.whole, "policy", None)
    early_exit = {}
    if (
        policy is not None
        and measured.is_file()
        and int(subject.name.rpartition("_")[2]) == len(subject.whole.students)
    ):
        early_exit["Early exit"] = measured.read_text(encoding="utf-8").strip()
    return {
        **early_exit,
        "Results": f"The run that this model is of:\n\n{results.read_text(encoding='utf-8').strip()}",
        "Data": "\n".join(data),
        "Recipe": f"`mamba-pkd train --config config.yaml`, {versions}:\n\n```yaml\n{text.strip()}\n```",
    }
