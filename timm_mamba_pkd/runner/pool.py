"""The candidates of ``mamba-pkd select``: what runs have trained, and models by their timm name."""

import argparse
import logging
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from timm_mamba_pkd.datasets import num_classes, transform_of
from timm_mamba_pkd.distillation import build_model
from timm_mamba_pkd.models import Agreement, MambaPKDEnsemble, Policy
from timm_mamba_pkd.runner.config import model_name
from timm_mamba_pkd.runner.errors import ConfigError, explain
from timm_mamba_pkd.runner.evaluate_named import (
    labelled_images,
    load_named,
    naming_all_unreadable,
    open_images,
)
from timm_mamba_pkd.runner.named import brings_weights, try_image
from timm_mamba_pkd.runner.run_folder import RunFolder
from timm_mamba_pkd.runner.safe_config import Folders
from timm_mamba_pkd.runner.source import Source, child, pairs
from timm_mamba_pkd.runner.trained import Trained, load_trained, prepare_trained
from timm_mamba_pkd.runner.unreadable import Readable
from timm_mamba_pkd.runner.validation import validation_split

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Samples:
    """Labelled images in a fixed order, in batches of images (B, C, H, W) and labels (B,).

    Attributes:
        images: the data set.
        name: where they are from.
        input_size: (C, H, W).
        batch_size, workers: of the loader.
    """

    images: Readable
    name: str
    input_size: tuple[int, int, int]
    batch_size: int
    workers: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with naming_all_unreadable(self.images, self.workers):
            for images, labels, *_ in DataLoader(self.images, self.batch_size, num_workers=self.workers):
                yield images, labels

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)


@dataclass
class Member:
    """A candidate before it is measured.

    Attributes:
        name, kind: as in `timm_mamba_pkd.report.Candidate`.
        model: in eval mode; images (B, C, H, W) in, logits out.
        samples: the images as it takes them.
        how: a command that runs it, or the YAML of a torchdistill model.
        policy: of a cascade, whose model is the ensemble; None for models that take every image whole.
    """

    name: str
    kind: str
    model: nn.Module
    samples: Samples
    how: str
    policy: Policy | None = None


def gather(args: argparse.Namespace) -> list[Member]:
    """All candidates that the command names, each tried on an image.

    Raises:
        ConfigError: there are none, a run or a model cannot be loaded, there are no labelled samples for them, or
            these have classes that a model lacks.
    """
    if not args.runs and not args.models:
        raise ConfigError("the pool is empty: name folders of runs, or timm models by --models")
    of_config = ("img_size", "mean", "std", "crop_pct", "interpolation")
    if args.runs and (flags := [name for name in of_config if getattr(args, name)]):
        raise ConfigError(f"--{flags[0].replace('_', '-')} is that of the run in {args.runs[0]}: leave it out")
    members: list[Member] = []
    teachers: list[str] = []
    for path in args.runs:
        of_run = _members_of_run(RunFolder(path), args, teachers)
        if len(args.runs) > 1:
            for member in of_run:
                member.name = f"{RunFolder(path).path.name}/{member.name}"
        members += of_run
    samples = members[0].samples if members else None
    members += [_named(text, args, samples) for text in args.models]
    names: dict[str, int] = {}
    for member in members:
        samples = member.samples
        outputs = try_image(member.model, member.name, samples.input_size)
        classes = num_classes(samples.images)
        if classes is not None and classes > outputs:
            raise ConfigError(
                f"{samples.name} has {classes} classes, {member.name} has {outputs}: they must be the "
                "classes that it was trained on"
            )
        names[member.name] = names.get(member.name, 0) + 1
        if names[member.name] > 1:
            member.name += f" #{names[member.name]}"
    return members


def _members_of_run(run: RunFolder, args: argparse.Namespace, teachers: list[str]) -> list[Member]:
    """The teacher, unless it is one of ``teachers``, and what the run has trained."""
    if not run.config.is_file():
        raise ConfigError(f"{run.path} is not the folder of a run (no config.yaml in it)")
    output = run.path if args.output is None else Path(args.output)
    trained = prepare_trained(run.config, Folders(output) if args.safe_config else None)
    if not run.finished:
        logger.warning("The run in %s has not finished: these are its weights so far", run.path)
    ensemble = isinstance(trained.model, MambaPKDEnsemble)
    load_trained(trained.model, run.weights("ensemble" if ensemble else "model"))
    source = Source.read(run.config)
    samples = _validation_split(source, trained) if args.data_root is None else _images_of_run(trained, args)
    members = []
    teacher = _teacher(source, trained)
    if teacher is not None and teacher[1] not in teachers:
        teachers.append(teacher[1])
        name = model_name(yaml.safe_load(teacher[1])["models"]["model"])
        members.append(Member(name, "teacher", teacher[0], samples, teacher[1]))
    if isinstance(trained.model, MambaPKDEnsemble):
        return members + list(_members_of_ensemble(run, trained.model, samples))
    kind = "model" if child(child(source.root, "models"), "teacher_model") is None else "student"
    return [*members, Member(trained.name, kind, trained.model, samples, _export(str(run.path)))]


def _members_of_ensemble(run: RunFolder, ensemble: MambaPKDEnsemble, samples: Samples) -> Iterator[Member]:
    """Each student alone and the ensemble after k students for every k, of those that are trained.

    The mean of one student is that student, so it is no candidate of its own.
    """
    positions = ensemble.active_positions
    for i in positions:
        name = ensemble.names[i]
        if ensemble.connections()[i] is not None:
            logger.warning("%s is no candidate alone: it reuses the features of earlier students", name)
            continue
        weights = run.weights(f"{i + 1}_{name}")
        if not weights.is_file():
            logger.warning("%s is no candidate alone: its weights in %s are missing", name, weights)
            continue
        pool = ensemble.global_pool
        kwargs = [] if pool is None else ["--model-kwargs", f"global_pool={pool}"]
        words = ["--checkpoint", str(weights), "--config", str(run.config), "--output", str(run.path / "export")]
        how = _export(name, *words, *kwargs)
        yield Member(name, "student", ensemble.alone(i), samples, how)
    if positions == list(range(len(positions))):
        for k in range(1 if ensemble.weights is not None else 2, 1 + len(positions)):
            how = _export(str(run.path), "--students", str(k))
            yield Member(f"ensemble_{k}", "ensemble", ensemble.first(k), samples, how)
    yield from _cascades(run, ensemble, samples)


def _cascades(run: RunFolder, ensemble: MambaPKDEnsemble, samples: Samples) -> Iterator[Member]:
    """The ensemble with early exit: by the policy that was fitted with it, and by agreement, which needs three."""
    kwargs = {"students": list(ensemble.names), "num_classes": ensemble.num_classes, "in_chans": ensemble.in_chans}
    kwargs |= {"img_size": tuple(ensemble.img_size), "checkpoint_path": str(run.weights("ensemble"))}
    if ensemble.global_pool is not None:
        kwargs["global_pool"] = ensemble.global_pool
    arguments = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
    policies: list[tuple[str, Policy, str]] = []
    if ensemble.policy is not None:
        try:
            ensemble.policy.start(ensemble, torch.zeros(1, *samples.input_size))
            policies.append(("confidence", ensemble.policy, ""))
        except ValueError as error:
            logger.warning("The policy of %s is left out: %s", run.path, error)
    if ensemble.num_active > 2:
        policies.append(("agreement", Agreement(), "timm_mamba_pkd.models.Agreement()"))
    for name, policy, words in policies:
        code = (
            f"import timm, torch, timm_mamba_pkd; model = timm.create_model('mamba_pkd_ensemble', {arguments}).eval(); "
        )
        code += (
            f"print(model.predict(torch.zeros(1, {', '.join(map(str, samples.input_size))}){words and f', {words}'}))"
        )
        how = shlex.join(["python", "-c", code])
        yield Member(f"cascade_{name}", "cascade", ensemble, samples, how, policy)


def _teacher(source: Source, trained: Trained) -> tuple[nn.Module, str] | None:
    """The teacher of a config and the YAML that stands for it; None, with a warning, where there are no weights."""
    node = child(child(source.root, "models"), "teacher_model")
    entry = None if node is None else source.load(at=("models", "teacher_model"))
    if entry is None:
        return None
    kwargs = entry.get("kwargs") or {}
    if not entry.get("src_ckpt") and not any(kwargs.get(k) for k in ("pretrained", "weights", "checkpoint_path")):
        logger.warning("The teacher of %s is left out: the config names no weights of it", trained.path)
        return None
    try:
        teacher = build_model(entry).eval()
    except Exception as error:  # whatever a model's constructor raises
        logger.warning("The teacher of %s is left out: %s", trained.path, explain(error))
        return None
    names = source.load(at=("dependencies",))
    dependencies = "" if names is None else yaml.safe_dump({"dependencies": names}, default_flow_style=None)
    key = yaml.ScalarNode("tag:yaml.org,2002:str", "model")
    models = yaml.MappingNode("tag:yaml.org,2002:map", [(key, node)])
    key = yaml.ScalarNode("tag:yaml.org,2002:str", "models")
    return teacher, dependencies + yaml.serialize(yaml.MappingNode("tag:yaml.org,2002:map", [(key, models)]))


def _named(text: str, args: argparse.Namespace, samples: Samples | None) -> Member:
    """A model by NAME=CHECKPOINT, or by a name that brings weights, on these samples or on its own kind of images."""
    name, _, checkpoint = (text, "", "") if text.startswith(("local-dir:", "hf-hub:")) else text.partition("=")
    if not checkpoint and not brings_weights(name):
        raise ConfigError(f"--models {text} has no weights: write {text}=CHECKPOINT, or local-dir: or hf-hub:")
    size = args.img_size if samples is None else samples.input_size[1:]
    own = {"model": name, "checkpoint": checkpoint or None, "img_size": size}
    own = argparse.Namespace(**{**vars(args), "num_classes": None, "in_chans": None, "model_kwargs": {}, **own})
    try:
        model, input_size = load_named(own)
    except ConfigError as error:
        if name != "mamba_pkd_ensemble" or not Path(checkpoint).expanduser().is_file():
            raise
        raise ConfigError(
            f"{error}; if its students are others than s1 to s7, name its run, or the local-dir: that mamba-pkd export "
            f"{name} --checkpoint {checkpoint} --model-kwargs \"students=['mamba_pkd_s1','...']\" --format hf writes"
        ) from error
    words = [name, *(["--checkpoint", checkpoint] if checkpoint else [])]
    if checkpoint:
        words += ["--num-classes", str(model.num_classes), "--in-chans", str(input_size[0])]
    if size is not None:
        words += ["--img-size", str(input_size[-1])]
    if samples is None:
        if args.data_root is None:
            raise ConfigError("there are no labelled samples: name a folder of images by --data-root, or a run")
        images, _ = labelled_images(own, model, input_size)
        samples = _image_samples(images, args, input_size)
    elif not checkpoint:
        _compare_normalisation(name, model, samples)
    return Member(name, "model", model, samples, _export(*words))


def _compare_normalisation(name: str, model: Any, samples: Samples) -> None:
    """Warn if a model that brings its mean and std along sees images that torchvision has normalised otherwise."""
    last = transform_of(samples.images)
    while steps := getattr(last, "transforms", None):
        last = steps[-1]
    if not isinstance(last, transforms.Normalize):
        return
    config = resolve_data_config(model=model)
    for what in ("mean", "std"):
        own, seen = ([round(float(value), 3) for value in values] for values in (config[what], getattr(last, what)))
        if own != seen:
            logger.warning("%s is made for images of %s %s, those of %s are of %s", name, what, own, samples.name, seen)


def _validation_split(source: Source, trained: Trained) -> Samples:
    """The validation split of a run, in its order.

    Raises:
        ConfigError: it cannot be read, has no fixed order, or the test set has samples of it.
    """
    advice = "name labelled images by --data-root"
    if trained.missing:
        raise ConfigError(f"the data of {source.path} cannot be read ({trained.missing}): {advice}")
    numbers = range(sum(name.value.startswith("stage") for name, _ in pairs(child(source.root, "train"))), 0, -1)
    places = [("init", "kwargs"), *((f"stage{number}",) for number in numbers), ()]
    loaders = (source.load(at=("train", *at, "val_data_loader")) for at in places)
    loader = next((found for found in loaders if found is not None), None)
    test_id = str(source.load(at=("test", "test_data_loader", "dataset_id")))
    split, images = validation_split(trained.datasets, loader, test_id, source.path, advice)
    if not isinstance(images, Readable):
        raise ConfigError(f"the validation split of {source.path}, '{split}', has no fixed order: {advice}")
    name = f"{split} of {source.path}"
    assert loader is not None
    kwargs = loader.get("kwargs") or {}
    size = _size_of_sample(images, name)
    return Samples(images, name, size, kwargs.get("batch_size", 1), kwargs.get("num_workers", 0))


def _size_of_sample(dataset: Any, name: str) -> tuple[int, int, int]:
    try:
        image, label = dataset[0][:2]
        int(label)
        channels, height, width = image.shape
    except Exception as error:  # whatever a data set raises
        raise ConfigError(f"the samples of {name} are no labelled images: {explain(error)}") from error
    return channels, height, width


def _images_of_run(trained: Trained, args: argparse.Namespace) -> Samples:
    """The images of ``--data-root``, transformed as the config transforms its test images."""
    transform = trained.test_transform
    if transform is None:
        raise ConfigError(f"{trained.path} does not say how its images are transformed: leave --data-root out")
    return _image_samples(open_images(args, transform, trained.input_size[0]), args, trained.input_size)


def _image_samples(images: Readable, args: argparse.Namespace, size: tuple[int, int, int]) -> Samples:
    if (num_classes(images) or 0) < 2:
        raise ConfigError(f"--data-root {args.data_root} has no labels: it must hold a folder of images per class")
    return Samples(images, f"{args.data_root} ({args.split})", size, args.batch_size, args.workers)


def _export(*words: str) -> str:
    return shlex.join(["mamba-pkd", "export", *words, "--format", "pt2"])
