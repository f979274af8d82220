"""What ``mamba-pkd export`` exports: a model of a run or of timm, and how its files are compared with it."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from timm_mamba_pkd.datasets import Digits
from timm_mamba_pkd.deploy import first_students
from timm_mamba_pkd.deploy.formats import Run
from timm_mamba_pkd.distillation import unknown_name
from timm_mamba_pkd.models import MambaPKDEnsemble
from timm_mamba_pkd.models.state_dict import not_finite
from timm_mamba_pkd.runner.device import find_device
from timm_mamba_pkd.runner.errors import ConfigError
from timm_mamba_pkd.runner.named import brings_weights, create_named
from timm_mamba_pkd.runner.run_folder import RunFolder
from timm_mamba_pkd.runner.safe_config import Folders
from timm_mamba_pkd.runner.streams import first_samples
from timm_mamba_pkd.runner.trained import Trained, load_trained, prepare_trained

logger = logging.getLogger(__name__)

BATCHES = (1, 7)
TOLERANCE = 1e-4  # of the largest logit, or of `LEAST` where all are smaller; and of a confidence
LEAST = 1e-3


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
        k: how many students of an ensemble; None for other models.
    """

    name: str
    whole: Any
    eager: nn.Module
    exportable: nn.Module
    input_size: tuple[int, int, int]
    config: Trained | None
    run: RunFolder | None
    k: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether no student of an ensemble is left out."""
        return self.k is None or self.k == len(self.whole.students)

    def first_students(self) -> MambaPKDEnsemble:
        """An ensemble of the students that are exported alone, made anew, with its policy."""
        assert self.k is not None
        return first_students(self.whole, self.k, self.input_size[1:])


def find_subject(args: argparse.Namespace) -> Subject:
    """The model that the command names, a folder or a name in timm, with the weights it names."""
    find_device("cpu")
    path = Path(args.model).expanduser()
    if ":" not in args.model and not is_model(args.model) and (path.is_dir() or "/" in args.model):
        return _find_in_run(args, RunFolder(path))
    own_weights = brings_weights(args.model) and args.checkpoint is None
    if (":" in args.model or own_weights) and (args.num_classes is not None or args.in_chans is not None):
        raise ConfigError(f"--num-classes and --in-chans are those of {args.model}: leave them out")
    if ":" in args.model and args.model_kwargs:
        raise ConfigError(f"--model-kwargs are those of {args.model}: leave them out")
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
    whole, input_size = create_named(args.model, **sizes, weights=own_weights, model_kwargs=args.model_kwargs)
    exportable, _ = create_named(
        args.model, **sizes, exportable=True, weights=own_weights, model_kwargs=args.model_kwargs
    )
    if args.checkpoint is not None:
        load_trained(whole, Path(args.checkpoint))
    elif broken := not_finite(whole.state_dict()):
        raise ConfigError(f"the weights of {args.model} hold values that are not finite: {broken}")
    exportable.load_state_dict(whole.state_dict())
    name = Path(args.model.partition(":")[2] or args.model).name
    subject = _subject(args, name, whole, exportable, input_size, config, None)
    if args.checkpoint is None and not own_weights:
        logger.warning("%s is exported with random weights: name trained ones by --checkpoint", args.model)
    return subject


def _find_in_run(args: argparse.Namespace, run: RunFolder) -> Subject:
    if not run.config.is_file():
        raise ConfigError(f"{args.model} is neither a model of timm nor the folder of a run (no config.yaml in it)")
    if args.config is not None:
        raise ConfigError(f"--config is that of the run in {args.model}: leave it out")
    _refuse_sizes(args, f"the run in {args.model}")
    if args.model_kwargs:
        raise ConfigError(f"--model-kwargs are those of the run in {args.model}: leave them out")
    config = prepare_trained(run.config, _folders(args, run))
    exportable = config.exportable()
    ensemble = isinstance(config.model, MambaPKDEnsemble)
    if args.checkpoint is None and not run.finished:
        logger.warning("The run in %s has not finished: these are its weights so far", run.path)
    load_trained(config.model, Path(args.checkpoint or run.weights("ensemble" if ensemble else "model")))
    exportable.load_state_dict(config.model.state_dict())
    return _subject(args, config.name, config.model, exportable, config.input_size, config, run)


def _folders(args: argparse.Namespace, run: RunFolder) -> Folders | None:
    return Folders(run.path if args.output is None else Path(args.output)) if args.safe_config else None


def _refuse_sizes(args: argparse.Namespace, source: str) -> None:
    for flag in ("num_classes", "in_chans", "img_size"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} is that of {source}: leave it out")


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
    return Subject(name, whole, whole.first(k), exportable.first(k), input_size, config, run, k)


def comparison_images(subject: Subject) -> dict[str, Tensor]:
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


def differences(subject: Subject, run: Run, images: dict[str, Tensor], tolerance: float) -> str:
    """The largest difference between the logits of ``run`` and those of eager PyTorch, in words.

    Raises:
        ConfigError: it is larger than ``tolerance`` times the largest logit, or `LEAST`.
    """
    found = []
    for kind, batch in images.items():
        with torch.no_grad():
            true = torch.cat([subject.eager(batch[:count]) for count in BATCHES])
            ours = torch.cat([run(batch[:count]) for count in BATCHES])
        difference, largest = float((ours - true).abs().max()), float(true.abs().max())
        if not difference <= tolerance * max(LEAST, largest):
            raise ConfigError(f"{subject.name} differs from eager PyTorch by {difference:.1e} on {kind}: not written")
        found.append(f"{difference:.1e} ({kind})")
    return "largest difference " + ", ".join(found)
