"""``mamba-pkd evaluate --model``: any timm model with anybody's checkpoint, on a folder of images."""

import argparse
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_model_traits
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from timm_mamba_pkd.datasets import num_classes
from timm_mamba_pkd.models import WeightsError, count_macs, load_state, read_weights
from timm_mamba_pkd.report import count_params
from timm_mamba_pkd.runner.device import find_device, precision
from timm_mamba_pkd.runner.errors import ConfigError, explain
from timm_mamba_pkd.runner.evaluate import evaluate
from timm_mamba_pkd.runner.named import brings_weights, create_named
from timm_mamba_pkd.runner.unreadable import Readable, UnreadableError, all_unreadable

logger = logging.getLogger(__name__)

SHOWN = 10  # broken images that are named one by one


def evaluate_named(args: argparse.Namespace) -> None:
    """Print top-1 and top-5 of ``args.model``, with timm's transform for it, and what the model costs.

    Raises:
        ConfigError: no such model; a checkpoint that is missing, damaged, not plain, or of another model; no images,
            labels that the model does not have, images that cannot be read.
    """
    device = find_device(args.device)
    model, input_size = load_named(args)
    images, config = labelled_images(args, model, input_size)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    macs, topk = count_macs(model, input_size), (1, 5) if model.num_classes >= 5 else (1,)
    loader = DataLoader(images, args.batch_size, num_workers=args.workers)
    with naming_all_unreadable(images, args.workers):
        accuracies = evaluate(model.to(device), loader, device, topk, precision(args.amp, args.amp_dtype), "test")
    found = "  ".join(f"Acc@{k} {value:.2f}" for k, value in zip(topk, accuracies, strict=True))
    size = "x".join(map(str, input_size))
    print(f"{args.model}: {found}  on {len(images)} images of {num_classes(images)} classes")
    print(
        f"{count_params(model) / 1e6:.3g} M parameters, {macs / 1e6:.3g} MMACs; {size}, crop_pct {config['crop_pct']}, "
        f"{config['interpolation']}, mean {_short(config['mean'])}, std {_short(config['std'])}"
    )


def labelled_images(
    args: argparse.Namespace, model: Any, input_size: tuple[int, int, int]
) -> tuple[Readable, dict[str, Any]]:
    """The images that the flags name, as timm transforms them for ``model``, and timm's data config."""
    if input_size[0] not in (1, 3):
        raise ConfigError(f"{args.model} takes images of {input_size[0]} channels, but files have 1 or 3")
    for flag in ("mean", "std"):
        if getattr(args, flag) is not None and len(getattr(args, flag)) not in (1, input_size[0]):
            raise ConfigError(f"--{flag} must be one number, or {input_size[0]}, one for each channel")
    config = resolve_data_config({**vars(args), "input_size": input_size}, model=model, use_test_size=True)
    for name in ("mean", "std"):
        config[name] = adapt_to_chs(config[name], input_size[0])  # as timm's loader does
    images = open_images(args, create_transform(**config), input_size[0])
    classes = num_classes(images) or 0
    if classes > model.num_classes:
        raise ConfigError(
            f"--data-root {args.data_root} has {classes} classes, {args.model} {model.num_classes}: they must be the "
            "classes that it was trained on"
        )
    return images, config


@contextmanager
def naming_all_unreadable(images: Readable, workers: int) -> Iterator[None]:
    """An image that cannot be read in this context is an error that names all of them."""
    try:
        yield
    except UnreadableError as error:
        traceback.clear_frames(error.__traceback__)  # with the loader's iterator, which ends its workers in order
        broken = all_unreadable(images, workers)
        if not broken:
            raise
        shown = "; ".join(broken[:SHOWN]) + ("; ..." if len(broken) > SHOWN else "")
        raise ConfigError(
            f"{len(broken)} of {len(images)} images cannot be read, so there is no result: repair or remove them: "
            f"{shown}"
        ) from error


def load_named(args: argparse.Namespace) -> tuple[Any, tuple[int, int, int]]:
    """The model with its weights. What is not given, the checkpoint's first convolution and classifier say."""
    sizes: dict[str, Any] = {"num_classes": args.num_classes, "in_chans": args.in_chans}
    if ":" in args.model or (args.checkpoint is None and brings_weights(args.model)):
        if args.checkpoint is not None or any(sizes.values()) or args.model_kwargs:
            raise ConfigError(
                f"{args.model} brings its weights: leave --checkpoint, --num-classes, --in-chans and --model-kwargs out"
            )
        return create_named(args.model, img_size=args.img_size)
    if args.checkpoint is None:
        raise ConfigError(f"{args.model} has no weights: name a file by --checkpoint")
    with torch.device("meta"):
        template, _ = create_named(args.model, try_it=False, weights=False, model_kwargs=args.model_kwargs)
    try:
        state = read_weights(args.checkpoint)
        found = _sizes(template, state)
        sizes = {name: found.get(name) if value is None else value for name, value in sizes.items()}
        model, input_size = create_named(
            args.model, **sizes, img_size=args.img_size, weights=False, model_kwargs=args.model_kwargs
        )
        load_state(model, state, args.checkpoint)
    except WeightsError as error:
        raise ConfigError(str(error)) from error
    return model, input_size


def _sizes(model: Any, state: dict[str, Tensor]) -> dict[str, int]:
    """Class count and channels of a state dict, by timm's names of the layers that tell."""
    students = getattr(model, "students", None)
    if students is not None:  # an ensemble: as its first student
        prefix = "students.0."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        return _sizes(students[0], state)
    sizes: dict[str, int] = {}
    for name, trait, dim in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        layer = get_model_traits(model).get(trait) or getattr(model, "pretrained_cfg", {}).get(trait)
        for path in (layer,) if isinstance(layer, str) else layer or ():
            weight = state.get(f"{path}.weight")
            if weight is not None and weight.ndim > dim:
                sizes[name] = weight.shape[dim]
    return sizes


def open_images(args: argparse.Namespace, transform: Any, channels: int) -> Readable:
    """The images that ``--data-root``, ``--dataset`` and ``--split`` name, made grey or coloured and transformed."""
    if args.data_root is None:
        raise ConfigError("--model needs images: name their folder by --data-root")
    root = Path(args.data_root).expanduser()
    if not root.is_dir():
        raise ConfigError(f"--data-root {root} is {'a file' if root.exists() else 'not there'}: name a folder")
    if args.dataset.partition("/")[0].lower() not in ("", "torch"):
        raise ConfigError(
            f"--dataset {args.dataset} is not supported: leave it out, or take one of timm's torch/ names"
        )
    try:
        dataset: Any = create_dataset(args.dataset, str(root), args.split, input_img_mode="")  # as the files are
    except (Exception, SystemExit) as error:  # whatever a data set's constructor raises
        raise ConfigError(f"--data-root {root}: {explain(error)}") from error
    if not args.dataset and Path(dataset.reader.root) == root and (root / "train").is_dir():
        logger.warning(
            "--data-root %s has no folder of the split %s, so all below it is tested, the training images as well: "
            "name one by --split", root, args.split,
        )  # fmt: skip
    mode = "RGB" if channels == 3 else "L"
    dataset.transform = transforms.Compose([methodcaller("convert", mode), transform])
    return Readable(dataset, args.data_root, training=False)


def _short(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in dict.fromkeys(values))
