"""``mamba-pkd evaluate --model``: any timm model with anybody's checkpoint, on a folder of images."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_model_traits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from timm_mamba_pkd.models import WeightsError, load_state, read_weights
from timm_mamba_pkd.report import count_macs, count_params
from timm_mamba_pkd.runner.device import find_device, precision
from timm_mamba_pkd.runner.errors import ConfigError, explain, first_line
from timm_mamba_pkd.runner.evaluate import evaluate
from timm_mamba_pkd.runner.named import create_named

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
    loader = ImageLoader(images, args.batch_size, args.workers)
    amp = precision(args.amp, args.amp_dtype)
    accuracies = evaluate(model.to(device), loader, device, topk, amp, "test")  # pyright: ignore[reportArgumentType]
    loader.require_all_readable()
    found = "  ".join(f"Acc@{k} {value:.2f}" for k, value in zip(topk, accuracies, strict=True))
    size = "x".join(map(str, input_size))
    print(f"{args.model}: {found}  on {len(images)} images of {images.num_classes} classes")
    print(
        f"{count_params(model) / 1e6:.3g} M parameters, {macs / 1e6:.3g} MMACs; {size}, crop_pct {config['crop_pct']}, "
        f"{config['interpolation']}, mean {_short(config['mean'])}, std {_short(config['std'])}"
    )


def labelled_images(
    args: argparse.Namespace, model: Any, input_size: tuple[int, int, int]
) -> tuple["LabelledImages", dict[str, Any]]:
    """The images that the flags name, as timm transforms them for ``model``, and timm's data config."""
    if input_size[0] not in (1, 3):
        raise ConfigError(f"{args.model} takes images of {input_size[0]} channels, but files have 1 or 3")
    for flag in ("mean", "std"):
        if getattr(args, flag) is not None and len(getattr(args, flag)) not in (1, input_size[0]):
            raise ConfigError(f"--{flag} must be one number, or {input_size[0]}, one for each channel")
    config = resolve_data_config({**vars(args), "input_size": input_size}, model=model, use_test_size=True)
    for name in ("mean", "std"):
        config[name] = adapt_to_chs(config[name], input_size[0])  # as timm's loader does
    images = LabelledImages(open_images(args), create_transform(**config), input_size)
    if images.num_classes > model.num_classes:
        raise ConfigError(
            f"--data-root {args.data_root} has {images.num_classes} classes, {args.model} {model.num_classes}: they "
            "must be the classes that it was trained on"
        )
    return images, config


def load_named(args: argparse.Namespace) -> tuple[Any, tuple[int, int, int]]:
    """The model with its weights. What is not given, the checkpoint's first convolution and classifier say."""
    sizes = {"num_classes": args.num_classes, "in_chans": args.in_chans}
    if ":" in args.model:
        if args.checkpoint is not None or any(sizes.values()):
            raise ConfigError(f"{args.model} brings its weights: leave --checkpoint, --num-classes and --in-chans out")
        return create_named(args.model, img_size=args.img_size)
    if args.checkpoint is None:
        raise ConfigError(f"{args.model} has no weights: name a file by --checkpoint")
    with torch.device("meta"):
        template, _ = create_named(args.model, try_it=False, **args.model_kwargs)
    try:
        state = read_weights(args.checkpoint)
        found = _sizes(template, state)
        sizes = {name: found.get(name) if value is None else value for name, value in sizes.items()}
        model, input_size = create_named(args.model, img_size=args.img_size, **sizes, **args.model_kwargs)
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


def open_images(args: argparse.Namespace) -> Any:
    """The data set that ``--data-root``, ``--dataset`` and ``--split`` name, without a transform."""
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
        return create_dataset(args.dataset, str(root), args.split)
    except (Exception, SystemExit) as error:  # whatever a data set's constructor raises
        raise ConfigError(f"--data-root {root}: {explain(error)}") from error


class LabelledImages(Dataset):
    """The images and labels of one of timm's data sets; one that cannot be read is zeros, and named.

    timm's own data set takes the next image in the place of a broken one.

    An item is (image float32 (C, H, W), label int, what is wrong str).
    """

    def __init__(self, dataset: Any, transform: Any, size: tuple[int, int, int]) -> None:
        self.dataset, self.transform, self.size = dataset, transform, size
        self.mode = "RGB" if size[0] == 3 else "L"
        self.reader = getattr(dataset, "reader", None)
        self.num_classes = len(dataset.classes if self.reader is None else self.reader.class_to_idx)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        try:
            image, label = self._read(index)
            return self.transform(image.convert(self.mode)), int(label), ""
        except Exception as error:  # whatever Pillow raises on a broken file
            return torch.zeros(self.size), 0, f"{self._name(index)} ({first_line(error)})"

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            return self.dataset[index]
        file, label = self.reader[index]
        with file:
            image = Image.open(file)
            image.load()
        return image, label

    def _name(self, index: int) -> str:
        if self.reader is not None:
            return self.reader.filename(index)
        return str(self.dataset.samples[index][0]) if hasattr(self.dataset, "samples") else f"image {index}"


class ImageLoader:
    """Batches of (images, labels); ``broken`` names those that could not be read."""

    def __init__(self, images: LabelledImages, batch_size: int, workers: int) -> None:
        self.images = images
        self.batches = DataLoader(images, batch_size, num_workers=workers)
        self.broken: list[str] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, wrong in self.batches:
            self.broken += [message for message in wrong if message]
            yield images, labels

    def require_all_readable(self) -> None:
        """Raise a ConfigError that names the images which could not be read, if there are any."""
        if self.broken:
            shown = "; ".join(self.broken[:SHOWN]) + ("; ..." if len(self.broken) > SHOWN else "")
            raise ConfigError(
                f"{len(self.broken)} of {len(self.images)} images cannot be read, so there is no result: repair or "
                f"remove them: {shown}"
            )


def _short(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in dict.fromkeys(values))
